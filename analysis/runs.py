"""The runs of record folders, or of CSV files made of them: what was rounded, and every metric by epoch."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lab import record as track
from low_precision.formats import ADDED_SITES, ALL_SITES, FLOAT32, Rule, format_named, rounding_named
from settings.config import Config, flag

COLUMNS = ("setting", "seed", "rounding_seed", "status", "seconds", "epoch")  # of a CSV file; the metrics follow
# What float32 must have alike to be a setting's baseline. An average of weights adds metrics, and changes no other.
TRAINING_FLAGS = {flag(f.name) for f in fields(Config) if f.metadata["group"] != "rounding"} - {"--average-last"}


@dataclass(frozen=True)
class Run:
    """One record. history: the lines of its metrics.jsonl; NaN and infinite metrics are None."""

    setting: str
    seed: int
    status: str
    seconds: float
    history: list[dict[str, float | None]]
    rounding_seed: int | None = None

    def value(self, metric: str, epoch: int | None = None) -> float | None:
        """After that epoch, or the last one -> None where there is none, as of a diverged run."""
        if epoch is None:
            return self.history[-1].get(metric) if self.history and self.status != "diverged" else None
        return next((line.get(metric) for line in self.history if line["epoch"] == epoch), None)

    @property
    def epochs(self) -> int:
        return int(self.history[-1]["epoch"]) if self.history else 0


def setting_of(config: Config) -> str:
    """What is rounded, in a few words: "float8 stochastic; accumulator float16 stochastic"."""
    rules = config.rules()
    if not rules:
        return FLOAT32.name
    base = Rule(format_named(config.precision), rounding_named(config.rounding))
    words = [str(base).replace(":", " ", 1)]
    if base.format == FLOAT32:
        words = []
    elif left := [site for site in ALL_SITES if site not in rules]:
        kept = [site for site in ALL_SITES if rules.get(site) == base]
        words = [f"{words[0]} {', '.join(kept)}"] if len(kept) < len(left) else [*words, f"{', '.join(left)} float32"]
    others = [(str(rule), site) for site, rule in rules.items() if rule != base or site in ADDED_SITES]
    for rule, sites in itertools.groupby(sorted(others, key=lambda pair: pair[0]), key=lambda pair: pair[0]):
        words.append(f"{', '.join(site for _, site in sites)} {rule.replace(':', ' ', 1)}")
    return "; ".join(words)


def read(paths: Iterable[Path]) -> list[Run]:
    """The runs of record folders, of folders of them, and of CSV files that `save` wrote; of one setting side by side.

    Runs that are still going on, were interrupted or failed are left out; diverged ones are results.
    OSError, ValueError, KeyError or ConfigError for what is none of these.
    """
    runs: list[Run] = []
    folders: list[Path] = []
    for path in paths:
        if path.suffix == ".csv":
            found = list(_from_csv(path))
            if both := {run.setting for run in runs} & {run.setting for run in found}:
                raise ValueError(f"{path}: {min(both)!r} is in another file too, and what they differ in is not known")
            runs += found
        else:
            folders += [path] if (path / "config.json").exists() else [p.parent for p in path.glob("*/config.json")]
    ended = [folder for folder in folders if track.status(folder) in track.REPLACING]
    configs = {folder: Config.from_json((folder / "config.json").read_text()) for folder in ended}
    ordered = sorted(configs, key=lambda f: (configs[f].group, configs[f].seed, configs[f].noise_seed))
    names = _names([configs[folder] for folder in ordered])
    runs += [_from_record(folder, name) for folder, name in zip(ordered, names, strict=True)]
    return sorted(runs, key=lambda run: run.setting != baseline_of(run.setting))  # the baseline first


def _names(configs: list[Config]) -> list[str]:
    """Settings by name: what is rounded, and the flags in which the runs differ beside it.

    A flag of training or data in which any two runs differ is in every name, so "float32 --dataset boston" is the
    baseline of "float8 nearest --dataset boston"; one of rounding only where names would be the same without it.
    """
    plain = {config.group: replace(config, seed=0, rounding_seed=0) for config in configs}
    apart = {name for config in plain.values() for name in _differing(config, next(iter(plain.values())))}
    common = [f.name for f in fields(Config) if f.name in apart and flag(f.name) in TRAINING_FLAGS]
    alike: dict[str, list[Config]] = {}
    for config in plain.values():
        alike.setdefault(setting_of(config), []).append(config)
    names = {}
    for group, config in plain.items():
        same = alike[setting_of(config)]
        own = {name for other in same for name in _differing(config, other)} - set(common)
        texts = [f"{flag(name)} {_shown(getattr(config, name))}" for name in (*common, *sorted(own))]
        names[group] = " ".join([setting_of(config), *texts])
    return [names[config.group] for config in configs]


def _differing(config: Config, other: Config) -> set[str]:
    return {text.split()[0].removeprefix("--").replace("-", "_") for text in config.differences(other)}


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def baseline_of(setting: str) -> str:
    """The float32 setting that differs from this one in its rounding alone."""
    kept = [f"{name} {value}" for name, value in re.findall(r"(--\S+) (\S+)", setting) if name in TRAINING_FLAGS]
    return " ".join([FLOAT32.name, *kept])


def _from_record(folder: Path, setting: str) -> Run:
    config = json.loads((folder / "config.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    history = list(map(json.loads, lines))
    return Run(setting, config["seed"], summary["status"], summary["seconds"], history, config["rounding_seed"])


def _from_csv(path: Path) -> Iterator[Run]:
    """ValueError for what `save` did not write."""
    own = COLUMNS[:-1]
    with open(path, newline="") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ())[: len(COLUMNS)] != COLUMNS:
            raise ValueError(f"{path}: no file of --save, whose columns begin with {', '.join(COLUMNS)}")
        for key, rows in itertools.groupby(table, key=lambda row: tuple(row[name] for name in own)):
            try:
                setting, seed, rounding_seed, status, seconds = key
                history = [{name: float(v) for name, v in row.items() if v and name not in own} for row in rows]
                noise = int(rounding_seed) if rounding_seed else None
                kept = [line for line in history if "epoch" in line]
                yield Run(setting, int(seed), status, float(seconds), kept, noise)
            except (TypeError, ValueError):
                raise ValueError(f"{path}: line {table.line_num} is no line of --save") from None


def save(runs: Sequence[Run], path: Path, epochs: Collection[int] = ()) -> None:
    """A CSV file with a line for each epoch of each run, or for these epochs: small enough to keep beside the code."""
    metrics = list(dict.fromkeys(name for run in runs for line in run.history for name in line if name != "epoch"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*COLUMNS, *metrics])
        for run in runs:
            kept = [line for line in run.history if not epochs or line["epoch"] in epochs]
            for line in kept or [{}]:  # a run that diverged before them is still a run
                values = [None if line.get(name) is None else f"{line[name]:.6g}" for name in metrics]
                epoch = int(line["epoch"]) if line else None
                told = (run.setting, run.seed, run.rounding_seed, run.status, f"{run.seconds:.4g}", epoch)
                rows.writerow([*told, *values])


def by_setting(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """In the order in which settings come up first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append(run)
    return found


def metrics(runs: Iterable[Run]) -> list[str]:
    return sorted({name for run in runs for line in run.history for name in line if name != "epoch"})
