"""Config: one run, frozen and validated; to and from JSON. No torch here: a wrong argument answers at once.

Each field carries its flag's help, its allowed values and its check; main.py makes the flags from the fields.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import Field, asdict, dataclass, field, fields, replace
from typing import Any

from data import spec_of
from low_precision.errors import SettingError, nearest
from low_precision.formats import FLOAT32, Format, digest_of_file, format_named
from low_precision.rounding import Overflow, is_random, overflow_named, rounding_named
from low_precision.rules import (
    ADDED_SITES,
    ALL_SITES,
    ELEMENTWISE,
    EVERY,
    LINE_FORM,
    OPERANDS,
    PRODUCTS,
    SITE_NAMES,
    Line,
    Rule,
    check_rules,
    effective,
    is_there,
    overridden,
    site_line,
    state_of,
)
from low_precision.transforms import Transform, transforms_of
from settings import files, kinds, qtorch
from settings.errors import ConfigError as ConfigError
from settings.errors import flag as flag
from settings.errors import refused as refused
from settings.errors import shown_value
from settings.kinds import Kind
from settings.models import IMAGE_MODELS, OPTIONS, Option, check_model, options_of
from settings.models import MODEL_NAMES as MODEL_NAMES

OPTIMIZERS = {  # what each keeps of a parameter, by torch's names: momentum.NAME rounds one of them
    "sgd": ("momentum_buffer",),  # where there is a momentum
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "collage": ("exp_avg", "exp_avg_sq", "weight_rest", "exp_avg_sq_rest"),  # AdamW in bfloat16, of pairs
}

# These settings say where a run is recorded, tracked or computed, and change nothing in its result.
INDECISIVE = (
    *("data_dir", "files_dir", "device", "output_dir", "checkpoint_every", "wandb", "wandb_project", "wandb_entity"),
    *("watch", "watch_also", "shadow", "sample"),
)
# At their defaults these are not in a record, so that those of before keep their bytes.
ADDED_LATER = ("files_dir", "recipe", "smallest_state", "transform", "watch", "watch_also", "shadow", "model_options")
ADDED_LATER += ("sample",)
# What they decide is in Config.rules and Config.lines.
RULES_FIELDS = ("precision", "rounding", "quantize", "site", "recipe")


def _setting(default: Any, group: str, kind: Kind, text: str, *, default_text: str | None = None) -> Any:
    shown = default_text if default_text is not None else str(default)
    return field(default=default, metadata={"group": group, "kind": kind, "help": text, "default": shown})


@dataclass(frozen=True)
class Config:
    """One run. The constructor takes values; `make` takes flags' texts too. ConfigError for what is not allowed."""

    dataset: str = _setting("toy", "data", kinds.DATASET, "data set")
    test_split: float = _setting(
        0.2,
        "data",
        kinds.number("a fraction, 0 < f < 1; cifar10 has its own split", lambda f: 0 < f < 1),
        "share of the rows kept for testing",
    )
    scale_on: str = _setting("train", "data", kinds.one_of("train", "all"), "rows on which the scalers are fitted")
    data_dir: str | None = _setting(
        None,
        "data",
        kinds.or_none(kinds.FOLDER),
        "where downloads are kept, or already lie",
        default_text="the user's cache folder",
    )
    files_dir: str | None = _setting(
        None,
        "data",
        kinds.or_none(kinds.FOLDER),
        "from where a relative FILE of dataset, model or optimizer is taken",
        default_text="the current folder",
    )
    model: str | None = _setting(
        None,
        "training",
        kinds.or_none(kinds.name_or_function(MODEL_NAMES, ("models", "MODELS"))),
        f"model; {', '.join(IMAGE_MODELS)} need images, gpt a text",
        default_text="the data set's own",
    )
    model_options: str | None = _setting(
        None,
        "training",
        kinds.or_none(OPTIONS),
        "what the model is like, as layers=4,heads=4,width=128,context=64,dropout=0; context: characters of a window of"
        " text",
        default_text="those of its function in models.py",
    )
    epochs: int = _setting(2, "training", kinds.whole(0), "passes over the training rows")
    batch_size: int = _setting(256, "training", kinds.whole(1), "rows in a step")
    optimizer: str = _setting("sgd", "training", kinds.name_or_function(OPTIMIZERS), "optimizer")
    learning_rate: float = _setting(
        0.01, "training", kinds.POSITIVE, "learning rate; its peak, where there is a schedule"
    )
    momentum: float = _setting(0.0, "training", kinds.NOT_NEGATIVE, "momentum of sgd")
    weight_decay: float = _setting(0.0, "training", kinds.NOT_NEGATIVE, "weight decay, as the optimizer defines it")
    schedule: str = _setting(
        "constant",
        "training",
        kinds.one_of("constant", "cosine", "onecycle"),
        "learning rate over the steps of the run",
    )
    average_last: float = _setting(
        0.0,
        "training",
        kinds.number("a fraction, 0 <= f <= 1", lambda f: 0 <= f <= 1),
        "share of the epochs, the last ones, whose weights are averaged in float32; the average is tested at the end",
    )
    seed: int = _setting(42, "training", kinds.SEED, "split, initial weights, order of the rows, and rounding noise")
    device: str = _setting(
        "auto", "training", kinds.one_of("auto", "cpu", "cuda"), "where to compute; auto: cuda if there"
    )
    recipe: str | None = _setting(
        None,
        "rounding",
        kinds.or_none(kinds.RECIPE),
        "the recipe that rules of operands in site are from, so that they are for products with a weight alone",
        default_text="none",
    )
    precision: str = _setting("float32", "rounding", kinds.FORMAT, "number format of the rounded sites")
    rounding: str = _setting("nearest", "rounding", kinds.ROUNDING, "rounding of the rounded sites")
    quantize: tuple[str, ...] = _setting(
        ALL_SITES,
        "rounding",
        Kind(f"all, none, or a comma-separated choice of {SITE_NAMES}", kinds.sites),
        f"the sites that are rounded; all is every one but {', '.join(ADDED_SITES)}, {ELEMENTWISE} and {PRODUCTS}",
        default_text="all",
    )
    site: tuple[str, ...] = _setting(
        (),
        "rounding",
        Kind(
            f"{LINE_FORM}, each site once for each pattern, SITE one of {SITE_NAMES}, or {EVERY} for all that have a"
            " rule there so far",
            kinds.overrides,
        ),
        "a site in a format of its own, e.g. accumulator=float16:stochastic or momentum.exp_avg_sq=bfloat16; with a"
        " PATTERN, in the modules whose names it matches alone, e.g. 'stage3.*/weights=bfloat16' or 'fc/*=float32';"
        " repeatable, later ones win",
        default_text="none",
    )
    transform: tuple[str, ...] = _setting(
        (),
        "rounding",
        kinds.TRANSFORM,
        "what both operands of a product are multiplied by along its sum before they are rounded, of all three where no"
        " PRODUCT is named; fixed, random: the signs of the numbers; bfloat16: the result is rounded to it; repeatable,"
        " later ones win",
        default_text="none",
    )
    layers: tuple[str, ...] | None = _setting(
        None,
        "rounding",
        kinds.or_none(Kind("comma-separated name patterns, e.g. 'stage1.*,fc'", kinds.patterns)),
        "round only the modules with these names",
        default_text="every module",
    )
    rounding_seed: int | None = _setting(
        None, "rounding", kinds.or_none(kinds.SEED), "noise of stochastic rounding alone", default_text="the seed"
    )
    overflow: str = _setting(
        "saturate",
        "rounding",
        kinds.one_of(*(o.value for o in Overflow)),
        "beyond the largest value; infinity: where it is",
    )
    loss_scale: float | str = _setting(
        1.0,
        "rounding",
        Kind(f"{kinds.FACTOR.allowed}, or dynamic", kinds.loss_scale),
        "factor on the loss, divided out of the gradients",
    )
    smallest_state: int = _setting(
        0, "rounding", kinds.whole(0), "what the optimizer keeps of a parameter with fewer numbers is not rounded"
    )
    backend: str = _setting(
        "auto",
        "rounding",
        kinds.one_of("auto", "eager", "fused", "qtorch"),
        "rounding engine; qtorch runs qtorch itself",
    )
    output_dir: str = _setting("runs", "records", kinds.FOLDER, "where records go")
    checkpoint_every: str = _setting(
        "1m",
        "records",
        Kind("a number of epochs (5), or a time (90s, 10m, 2h)", kinds.interval),
        "how often a checkpoint is written, beside the one at the end",
    )
    watch: int = _setting(
        0, "records", kinds.whole(0), "in every so many steps, what each layer loses: layers.jsonl; 0: never"
    )
    watch_also: tuple[str, ...] = _setting(
        (),
        "records",
        kinds.TRIED,
        "what that would be in another format, or under another recipe, on the tensors of this run; repeatable",
        default_text="none",
    )
    shadow: bool = _setting(
        False,
        "records",
        kinds.SWITCH,
        "train the same in float32 beside it: shadow.jsonl has how far off this run is",
        default_text="off",
    )
    sample: int = _setting(
        0, "records", kinds.whole(0), "so many characters of text that the model makes up at the end; 0: none"
    )
    wandb: str = _setting(
        "auto",
        "records",
        kinds.one_of("auto", "online", "offline", "disabled"),
        "Weights & Biases; auto: WANDB_MODE, else online with an API key, else offline",
    )
    wandb_project: str | None = _setting(
        None, "records", kinds.or_none(kinds.NAME), "wandb project", default_text="low-precision-ml"
    )
    wandb_entity: str | None = _setting(
        None, "records", kinds.or_none(kinds.NAME), "wandb entity", default_text="wandb's own setting"
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if (converted := _convert(f, value)) != value:
                raise refused(f.name, value, f"{converted!r}; Config.make takes the other spellings too")
        self._check_together()

    def _check_together(self) -> None:
        """What single fields cannot say."""
        spec = spec_of(self.dataset)
        if spec.own_split and self.test_split != Config.test_split:
            raise refused("test_split", self.test_split, f"{self.dataset} has its own split ({spec.own_split})")
        if not spec.own_split and spec.samples and spec.samples - math.ceil(self.test_split * spec.samples) < 1:
            rows = f"what leaves a training row of the {spec.samples} of {self.dataset}"
            raise refused("test_split", self.test_split, rows)
        check_model(self, spec)
        if self.momentum and self.optimizer != "sgd" and self.optimizer in OPTIMIZERS:
            raise refused("momentum", self.momentum, f"0 ({self.optimizer} has moments of its own)")
        if self.watch_also and not self.watch:
            raise refused("watch_also", self.watch_also[0], "none without --watch N")
        self._check_states()
        rules = self.rules()
        if self.recipe and not any(site_line(text).site in (*OPERANDS, PRODUCTS) for text in self.site):
            allowed = "None, or with the rules of its operands in site: settings.recipes.with_recipe gives both"
            raise refused("recipe", self.recipe, allowed)
        try:
            check_rules(rules, overflow_named(self.overflow), self.lines())
        except SettingError as error:
            raise ConfigError.of(error) from None
        for site, rule in (*rules.items(), *((line.left_side, line.rule) for line in self.lines())):
            if isinstance(rule.format, Format) and not rule.format.fits_float32:
                allowed = f"a format whose values are float32 numbers, as a run's are (those of {rule.format} are not)"
                raise refused("precision" if rule.format.name == self.precision else "site", f"{site}={rule}", allowed)
        if self.backend == "qtorch":
            qtorch.check(self, rules)

    def _check_states(self) -> None:
        """No site momentum.NAME of a state that the optimizer does not keep, as far as that is known."""
        if self.optimizer not in OPTIMIZERS:
            return
        kept = OPTIMIZERS[self.optimizer] if self.optimizer != "sgd" or self.momentum else ()
        known = [f"momentum.{state}" for state in kept]
        allowed = f"{', '.join(known)} (what {self.optimizer} keeps)"
        if not known:
            allowed = f"no momentum.NAME ({self.optimizer} keeps no state without --momentum)"
        for name, texts in (("quantize", self.quantize), ("site", self.site)):
            for text in texts:
                site = text.partition("=")[0].rpartition("/")[2]
                if state_of(site) is not None and site not in known:
                    raise refused(name, text, allowed, nearest(site, known))

    @classmethod
    def make(cls, **settings: Any) -> Config:
        """A Config of settings by field name, each a value or a flag's text. An unknown name: ConfigError."""
        known = {f.name: f for f in fields(cls)}
        for name in settings:
            if name not in known:
                raise ConfigError(None, f"the setting {name!r}", "one of Config's fields", nearest(name, known))
        return cls(**{name: _convert(known[name], value) for name, value in settings.items()})

    @classmethod
    def from_json(cls, text: str) -> Config:
        """ConfigError for what `make` does not take, ValueError for what is not JSON."""
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ConfigError(None, type(settings).__name__, "a JSON object: settings by name")
        return cls.make(**settings)

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """The settings by field, as records hold them."""
        settings = asdict(self)
        return {n: value for n, value in settings.items() if n not in ADDED_LATER or value != getattr(Config, n)}

    def resolved(self) -> Config:
        """The same run with nothing left to defaults that depend on other settings."""
        folder = files.folder_to_record(self.files_dir, (self.dataset, self.model_name, self.optimizer))
        return replace(self, model=self.model_name, rounding_seed=self.noise_seed, files_dir=folder)

    def placed(self, name: str) -> str:
        """The name of a data set, model or optimizer, a FILE in it where it lies."""
        return files.placed(name, self.files_dir)

    @property
    def model_name(self) -> str:
        return self.model or spec_of(self.dataset).model

    @property
    def options(self) -> dict[str, Option]:
        """The model's options by name."""
        return options_of(self.model_options) if self.model_options else {}

    @property
    def noise_seed(self) -> int:
        return self.seed if self.rounding_seed is None else self.rounding_seed

    def rules(self) -> dict[str, Rule]:
        """How each rounded site is rounded: by --precision and --rounding, or by its --site without a pattern."""
        base = format_named(self.precision)
        rules = {site: Rule(base, rounding_named(self.rounding)) for site in self.quantize if base != FLOAT32}
        lines = [site_line(text, self.rounding) for text in self.site]
        return effective(overridden(rules, [(line.site, line.rule) for line in lines if line.pattern is None]))

    def lines(self) -> tuple[Line, ...]:
        """What stands over `rules` in some modules: the --site with a pattern, and those for the whole model after one.

        Empty where no --site has a pattern.
        """
        lines = [site_line(text, self.rounding) for text in self.site]
        first = next((i for i, line in enumerate(lines) if line.pattern is not None), len(lines))
        return tuple(lines[first:])

    def transforms(self) -> dict[str, Transform]:
        """What the operands of each product are multiplied by before they are rounded."""
        return transforms_of(self.transform)

    @property
    def label(self) -> str:
        """DATASET-PRECISION-ROUNDING, or DATASET-RECIPE where one sets operands: the run's name but for its seed."""
        dataset = files.label(self.dataset)
        if self.recipe:
            return f"{dataset}-{self.recipe}"
        parts = [dataset, self.precision, *([self.rounding] if self.precision != FLOAT32.name else [])]
        return "-".join(re.sub(r"[:/\\\s]", "-", part) for part in parts)  # no file system minds that

    @property
    def name(self) -> str:
        return f"{self.label}-{self.seed}"

    @property
    def group(self) -> str:
        """The same for runs that differ in their seeds alone."""
        return f"{self.label}-{_digest(self._decisive() | {'seed': None, 'rounding_seed': None})}"

    @property
    def folder_name(self) -> str:
        """NAME-HASH, the hash of all that decides the result."""
        return f"{self.name}-{_digest(self._decisive())}"

    def differences(self, other: Config) -> list[str]:
        """The names of the fields in which the two are different runs."""
        ours, theirs = self._decisive(), other._decisive()
        names = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
        if names & {"rules", "lines"}:
            names |= set(RULES_FIELDS)
        return [f.name for f in fields(self) if f.name in names and getattr(self, f.name) != getattr(other, f.name)]

    def told_differences(self, other: Config) -> list[str]:
        """`differences`, each as a text: "--seed 42, not 43"."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in self.differences(other)}
        return [
            f"{flag(name)} {shown_value(ours)}, not {shown_value(theirs)}" for name, (ours, theirs) in pairs.items()
        ]

    def _decisive(self) -> dict[str, Any]:
        """All that decides the result, by field, and "rules" for RULES_FIELDS; not what makes no difference.

        "lines" are there only where some are for single modules, and "transform" where there is one, so that the runs
        without keep their folders' names.
        """
        rules, lines, transforms = self.rules(), self.lines(), self.transforms()
        if not rules and not any(is_there(line.site, line.rule) for line in lines):
            lines = ()
        others = {f.name: _convert(f, getattr(self, f.name)) for f in fields(self)}
        for name in (*INDECISIVE, *RULES_FIELDS, "transform"):
            del others[name]
        sites = [*rules, *(line.site for line in lines)]
        if not (self.smallest_state and any(site.partition(".")[0] in ("momentum", EVERY) for site in sites)):
            del others["smallest_state"]
        if self.model_options is None:
            del others["model_options"]
        all_rules = [*rules.values(), *(line.rule for line in lines)]
        draws = any(transform.draws for transform in transforms.values())
        draws = draws or any(is_random(r.rounding) and r.format != FLOAT32 for r in all_rules)
        files = {r.format.name: digest for r in all_rules if (digest := digest_of_file(r.format))}
        decisive = others | {
            "rules": {site: str(rule) for site, rule in rules.items()},
            "model": self.model_name,
            "rounding_seed": self.noise_seed if draws else None,
            "overflow": self.overflow if all_rules else None,
            "layers": self.layers if all_rules or transforms else None,
            "backend": "qtorch" if self.backend == "qtorch" and rules else None,  # our engines give the same bits
        }
        decisive |= {"files": files} if files else {}
        decisive |= {"lines": [str(line) for line in lines]} if lines else {}
        decisive |= {"transform": {p: str(t) for p, t in transforms.items()}} if transforms else {}
        return decisive | {"recipe": self.recipe} if self.recipe else decisive


def _convert(f: Field, value: Any) -> Any:
    kind: Kind = f.metadata["kind"]
    try:
        return kind.convert(value)
    except SettingError as error:
        if error.setting is not None:  # of the library, which knows nothing of what else the flag takes
            raise refused(f.name, value, kind.allowed, error.nearest, error.note) from None
        exact = error.value or shown_value(value), error.allowed or kind.allowed
        raise ConfigError(flag(f.name), *exact, error.nearest, error.note) from None
    except (TypeError, ValueError, OverflowError, AttributeError):
        raise refused(f.name, value, kind.allowed) from None


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
