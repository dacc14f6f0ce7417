"""What single settings cannot say: which of them do not go together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from data import spec_of
from low_precision.errors import SettingError, nearest
from low_precision.formats import Format
from low_precision.rounding import overflow_named
from low_precision.rules import OPERANDS, PRODUCTS, check_rules, site_line, state_of
from settings import qtorch
from settings.data import DataSettings
from settings.errors import ConfigError, refused
from settings.models import check_model
from settings.training import OPTIMIZERS, TrainingSettings

if TYPE_CHECKING:
    from settings.config import Config


def check(config: Config) -> None:
    """ConfigError for settings that do not go together."""
    _check_data(config)
    _check_training(config)
    if config.watch_also and not config.watch:
        raise refused("watch_also", config.watch_also[0], "none without --watch N")
    _check_states(config)
    _check_rounding(config)


def _check_data(config: Config) -> None:
    spec = spec_of(config.dataset)
    if spec.own_split and config.test_split != DataSettings.test_split:
        raise refused("test_split", config.test_split, f"{config.dataset} has its own split ({spec.own_split})")
    if not spec.own_split and spec.samples and spec.samples - math.ceil(config.test_split * spec.samples) < 1:
        rows = f"what leaves a training row of the {spec.samples} of {config.dataset}"
        raise refused("test_split", config.test_split, rows)
    check_model(config, spec)


def _check_training(config: Config) -> None:
    if config.steps is not None and config.epochs != TrainingSettings.epochs:
        raise refused("steps", config.steps, f"none with --epochs {config.epochs}: one of them says how long")
    if config.momentum and config.optimizer != "sgd" and config.optimizer in OPTIMIZERS:
        raise refused("momentum", config.momentum, f"0 ({config.optimizer} has moments of its own)")
    if config.betas is not None and config.optimizer == "sgd":
        raise refused("betas", config.betas, "none (sgd has no moments of Adam)")
    if config.warmup and config.schedule == "onecycle":
        raise refused("warmup", config.warmup, "0 (onecycle has a warmup of its own)")
    if config.steps is not None and config.warmup > config.steps:
        raise refused("warmup", config.warmup, f"at most {config.steps}, the steps of the run")
    if config.final_learning_rate and config.schedule != "cosine":
        raise refused("final_learning_rate", config.final_learning_rate, f"0 (with {config.schedule}; cosine has one)")
    if config.final_learning_rate > config.learning_rate:
        allowed = f"at most {config.learning_rate}, --learning-rate"
        raise refused("final_learning_rate", config.final_learning_rate, allowed)


def _check_states(config: Config) -> None:
    """No site momentum.NAME of a state that the optimizer does not keep, as far as that is known."""
    if config.optimizer not in OPTIMIZERS:
        return
    kept = OPTIMIZERS[config.optimizer] if config.optimizer != "sgd" or config.momentum else ()
    known = [f"momentum.{state}" for state in kept]
    allowed = f"{', '.join(known)} (what {config.optimizer} keeps)"
    if not known:
        allowed = f"no momentum.NAME ({config.optimizer} keeps no state without --momentum)"
    for name, texts in (("quantize", config.quantize), ("site", config.site)):
        for text in texts:
            site = text.partition("=")[0].rpartition("/")[2]
            if state_of(site) is not None and site not in known:
                raise refused(name, text, allowed, nearest(site, known))


def _check_rounding(config: Config) -> None:
    rules = config.rules()
    if config.recipe and not any(site_line(text).site in (*OPERANDS, PRODUCTS) for text in config.site):
        allowed = "None, or with the rules of its operands in site: settings.recipes.with_recipe gives both"
        raise refused("recipe", config.recipe, allowed)
    try:
        check_rules(rules, overflow_named(config.overflow), config.lines())
    except SettingError as error:
        raise ConfigError.of(error) from None
    for site, rule in (*rules.items(), *((line.left_side, line.rule) for line in config.lines())):
        if isinstance(rule.format, Format) and not rule.format.fits_float32:
            allowed = f"a format whose values are float32 numbers, as a run's are (those of {rule.format} are not)"
            name = "precision" if rule.format.name == config.precision else "site"
            raise refused(name, f"{site}={rule}", allowed)
    if config.backend == "qtorch":
        qtorch.check(config, rules)
