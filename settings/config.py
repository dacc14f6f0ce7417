"""Config: one run, frozen and validated; to and from JSON. No torch here: a wrong argument answers at once.

Each field carries its flag's help, its allowed values and its check; main.py makes the flags from the fields. They are
declared by group: data.py, training.py, rounding.py and records.py; checks.py says what does not go together.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import Field, asdict, dataclass, fields, replace
from typing import Any

from data import spec_of
from low_precision.errors import SettingError, nearest
from low_precision.formats import FLOAT32, digest_of_file, format_named
from low_precision.rounding import is_random, rounding_named
from low_precision.rules import ALL_SITES as ALL_SITES
from low_precision.rules import EVERY, Line, Rule, effective, is_there, overridden, site_line
from low_precision.transforms import Transform, transforms_of
from settings import checks, files
from settings.data import DataSettings
from settings.errors import ConfigError as ConfigError
from settings.errors import flag as flag
from settings.errors import refused as refused
from settings.errors import shown_value
from settings.kinds import Kind
from settings.models import MODEL_NAMES as MODEL_NAMES
from settings.models import Option, options_of
from settings.records import RecordSettings
from settings.rounding import RoundingSettings
from settings.training import BETAS, TrainingSettings
from settings.training import OPTIMIZERS as OPTIMIZERS

# These settings say where a run is recorded, tracked or computed, and change nothing in its result.
INDECISIVE = (
    *("data_dir", "files_dir", "device", "output_dir", "checkpoint_every", "wandb", "wandb_project", "wandb_entity"),
    *("watch", "watch_also", "shadow", "sample"),
)
# At their defaults these are not in a record, so that those of before keep their bytes.
TRAINING_ADDED_LATER = (
    *("steps", "evaluate_every", "micro_batch", "betas", "decay", "clip_norm", "warmup", "final_learning_rate"),
)
ADDED_LATER = ("files_dir", "recipe", "smallest_state", "transform", "watch", "watch_also", "shadow", "model_options")
ADDED_LATER += ("sample", *TRAINING_ADDED_LATER)
# What they decide is in Config.rules and Config.lines.
RULES_FIELDS = ("precision", "rounding", "quantize", "site", "recipe")


@dataclass(frozen=True)
class Config(RecordSettings, RoundingSettings, TrainingSettings, DataSettings):
    """One run. The constructor takes values; `make` takes flags' texts too. ConfigError for what is not allowed.

    The fields come in the order of the groups: those of the last class that is named here are the first ones.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if (converted := _convert(f, value)) != value:
                raise refused(f.name, value, f"{converted!r}; Config.make takes the other spellings too")
        checks.check(self)

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
        if self.steps is not None:
            del settings["epochs"]
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
    def is_by_step(self) -> bool:
        """Whether its evaluations are told by their steps, and not by their epochs."""
        return self.steps is not None or self.evaluate_every is not None

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

    def _without_effect(self) -> list[str]:
        """The settings of the training that decide nothing beside the others."""
        names = [name for name in TRAINING_ADDED_LATER if getattr(self, name) == getattr(Config, name)]
        is_ours = self.optimizer in OPTIMIZERS  # else it is told these, and its own defaults may be others
        idle = {
            "epochs": self.steps is not None,
            "micro_batch": self.micro_batch is not None and self.micro_batch >= self.batch_size,
            "betas": is_ours and self.betas == BETAS,
            "decay": is_ours and not self.weight_decay,
        }
        return list(dict.fromkeys([*names, *(name for name, is_idle in idle.items() if is_idle)]))

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
        for name in self._without_effect():
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
