"""What the engine qtorch can do of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from low_precision.formats import BlockFormat, Format
from low_precision.rounding import Rounding
from low_precision.rules import ELEMENTWISE, OPERANDS, Rule, state_of
from settings.errors import refused

if TYPE_CHECKING:
    from settings.config import Config


def check(config: Config, rules: dict[str, Rule]) -> None:
    """ConfigError for a run that qtorch cannot do."""
    others = "auto, eager, fused"
    if by_layer := [line for line in config.lines() if line.pattern is not None]:
        raise refused("backend", "qtorch", f"{others} (--site {by_layer[0]}: qtorch rounds all modules alike)")
    if config.watch:
        raise refused("backend", "qtorch", f"{others} (--watch: qtorch tells nobody what it rounds)")
    if config.smallest_state:
        raise refused("backend", "qtorch", f"{others} (--smallest-state: qtorch rounds all states alike)")
    for site, rule in rules.items():
        shared = isinstance(rule.format, BlockFormat) and rule.format.block in ("tensor", "row")
        fixed = isinstance(rule.format, Format) and not rule.format.exponent_bits
        if not (shared or fixed or rule.format.name in ("float8", "float16", "float32")):
            raise refused("backend", "qtorch", f"{others} ({site}: qtorch has no {rule.format})")
        if rule.rounding not in (Rounding.NEAREST, Rounding.STOCHASTIC):
            raise refused("backend", "qtorch", f"{others} ({site}: qtorch cannot round {rule.rounding})")
    unknown = (
        config.loss_scale == "dynamic"
        or config.layers
        or config.optimizer in ("adamw", "collage", "muon")
        or config.clip_norm is not None
        or "compensation" in rules
    )
    if unknown or any(state_of(site) is not None or site in (ELEMENTWISE, *OPERANDS) for site in rules):
        lacks = (
            "no dynamic loss scale, no choice of layers, no adamw, no collage, no muon, no clipping, no compensation,"
            " no momentum.NAME, no operands, no elementwise"
        )
        raise refused("backend", "qtorch", f"{others} (qtorch's OptimLP knows {lacks})")
    if config.transforms():
        raise refused("backend", "qtorch", f"{others} (--transform {config.transform[0]}: qtorch has no operands)")
