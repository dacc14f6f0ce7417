"""The runs of record folders, or of CSV files made of them: what was run, and every metric by epoch.

A run carries its Config. Runs that differ in their seeds alone are one `Setting`. Settings are compared by their rules
and the other fields of their Configs; the name that people read (`names`) is made last, and never read back.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from analysis.run import UNFINISHED as UNFINISHED
from analysis.run import Run, Setting, is_metric
from lab.files import write_whole
from lab.fingerprint import split_code
from lab.record import REPLACING, summary_of
from low_precision.formats import FLOAT32, AnyFormat, BlockFormat
from low_precision.rounding import FewBits, Rounding
from low_precision.rules import ALL_SITES, OPERANDS, PRODUCTS, Rule, effective, in_order, is_there, site_line
from settings.config import INDECISIVE, Config, flag
from settings.flags import config_of, flags_of
from settings.recipes import RECIPES

COLUMNS = ("flags", "seed", "rounding_seed", "status", "seconds", "epoch")  # of a CSV file; the metrics follow
NOT_IN_FLAGS = ("seed", "rounding_seed", *INDECISIVE)  # the seeds have columns, the others decide no result
ROUNDING_FIELDS = [f.name for f in fields(Config) if f.metadata["group"] == "rounding"]
# An average of weights adds metrics and changes no other, so a float32 run without one is a baseline all the same.
TRAINING_FIELDS = [
    f.name
    for f in fields(Config)
    if f.name not in (*ROUNDING_FIELDS, *NOT_IN_FLAGS, "average_last") and f.metadata["group"] != "records"
]
UNROUNDED = Rule(FLOAT32, Rounding.NEAREST)


@dataclass(frozen=True)
class Records:
    """runs: those that were asked for, each once. left_out: the number of others, by why."""

    runs: list[Run]
    left_out: Counter[str]


def read(paths: Iterable[Path], unfinished: bool = False) -> Records:
    """The runs of record folders, of folders of them, and of CSV files that `save` wrote.

    Those that ended by themselves, complete or diverged; with `unfinished` the others too, as far as they have come.
    OSError, ValueError or KeyError for what is none of these.
    """
    runs: dict[str, Run] = {}
    left_out: Counter[str] = Counter()
    for path in paths:
        for run in _from_csv(path) if path.suffix == ".csv" else _from_folder(path, left_out, unfinished):
            name = run.config.folder_name
            if name not in runs or (run.ended and not runs[name].ended):
                left_out["read already"] += name in runs
                runs[name] = run
            else:
                left_out["read already"] += 1
    return Records(list(runs.values()), +left_out)


def _from_folder(path: Path, left_out: Counter[str], unfinished: bool) -> Iterator[Run]:
    folders = [path] if (path / "config.json").exists() else [p.parent for p in sorted(path.glob("*/config.json"))]
    for folder in folders:
        summary = summary_of(folder)
        ended = summary.get("status")
        if ended in REPLACING:
            yield _from_record(folder, summary)
        elif not unfinished:
            left_out[ended or UNFINISHED] += 1
        elif (run := _unfinished(folder, summary)) is not None:
            yield run
        else:
            left_out["vanished while it was read, or not written yet"] += 1


def _from_record(folder: Path, summary: dict[str, Any]) -> Run:
    try:
        config = Config.from_json((folder / "config.json").read_text())
        history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        remarks = tuple(map(str, summary.get("remarks", ())))
        return Run(config, summary["status"], summary["seconds"], history, summary.get("code"), folder, remarks)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: no whole record: {' '.join(str(error).split())}") from None


def _unfinished(folder: Path, summary: dict[str, Any]) -> Run | None:
    """What there is of a run; None where it has just begun, or was renamed at this moment because it ended."""
    try:
        config = Config.from_json((folder / "config.json").read_text())
        history = whole_lines(folder / "metrics.jsonl")
    except (OSError, ValueError):
        return None
    said = {"status": UNFINISHED, "seconds": math.nan, "code": None} | summary
    return Run(config, said["status"], said["seconds"], history, said["code"], folder, tuple(said.get("remarks", ())))


def codes(runs: Iterable[Run]) -> Counter[str]:
    """How many of the runs each code made, "" for those without a fingerprint: more than one where it differs.

    What people's own files hold counts where runs that name the same files differ in it.
    """
    parts = [(run, *split_code(run.code or "")) for run in runs if run.ended]
    contents: dict[tuple[str, ...], set[str]] = {}
    for run, _, files in parts:
        contents.setdefault(_named(run), set()).add(files)
    return Counter(
        f"{code} with files {files}" if len(contents[_named(run)]) > 1 else code for run, code, files in parts
    )


def _named(run: Run) -> tuple[str, ...]:
    return run.config.dataset, run.config.model_name, run.config.optimizer


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines that may be growing: a last line that is not whole yet is left for later.

    OSError where there is no such file, ValueError for another line that is none.
    """
    *lines, rest = path.read_text().split("\n")
    made = [json.loads(line) for line in lines]
    with contextlib.suppress(ValueError):
        made += [json.loads(rest)] if rest else []
    return made


def holds_runs(path: Path) -> bool:
    """Whether a CSV file looks like one of `save`, of this version or an earlier one."""
    with open(path, newline="") as file:
        return {"seed", "status", "epoch"} <= set(next(csv.reader(file), ()))


def _from_csv(path: Path) -> Iterator[Run]:
    """ValueError for what `save` did not write."""
    key_columns = COLUMNS[:-1]
    parsed = functools.cache(lambda flags: config_of(shlex.split(flags)))
    with open(path, newline="") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ())[: len(COLUMNS)] != COLUMNS:
            raise ValueError(f"{path}: no file of --save, whose columns begin with {', '.join(COLUMNS)}")
        for key, rows in itertools.groupby(table, key=lambda row: tuple(row[name] for name in key_columns)):
            try:
                flags, seed, rounding_seed, ended, seconds = key
                noise = int(rounding_seed) if rounding_seed else None
                config = replace(parsed(flags), seed=int(seed), rounding_seed=noise)
                lines = [{name: float(v) for name, v in row.items() if v and name not in key_columns} for row in rows]
                yield Run(config, ended, float(seconds), [line for line in lines if "epoch" in line])
            except (TypeError, ValueError, AttributeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{path}: line {table.line_num} is no line of --save: {reason}") from None


def save(runs: Sequence[Run], path: Path, places: Collection[int] = ()) -> None:
    """A CSV file with a line for each epoch (evaluation) of each run, or for these epochs or steps: small enough to
    keep beside the code. Steps are the first column behind COLUMNS, where there are some.
    """
    metrics = list(dict.fromkeys(name for run in runs for line in run.history for name in line if is_metric(name)))
    columns = ["step"] * any(run.unit == "step" for run in runs)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*COLUMNS, *columns, *metrics])
    for run in runs:
        kept = [line for line in run.history if not places or line[run.unit] in places]
        for line in kept or [{}]:  # a run that diverged before them is still a run
            values = [None if line.get(name) is None else f"{line[name]:.6g}" for name in metrics]
            place = [None if line.get(name) is None else f"{line[name]:.9g}" for name in ("epoch", *columns)]
            seeds = run.config.seed, run.config.rounding_seed
            rows.writerow([flags_text(run.config), *seeds, run.status, f"{run.seconds:.4g}", *place, *values])
    write(path, text.getvalue())


def write(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all, with the folders above it; through a link, and into what is no plain file."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # such as /dev/stdout, which nothing may replace
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    else:
        write_whole(path, data)


def flags_text(config: Config) -> str:
    """The flags of a setting in one text, as a shell reads it; without the seeds, and what decides no result."""
    return shlex.join(flags_of(config, NOT_IN_FLAGS))


def metrics_of(runs: Iterable[Run]) -> list[str]:
    return sorted({name for run in runs for line in run.history for name in line if is_metric(name)})


# Settings: what belongs together, and what is compared with what.


def settings_of(runs: Iterable[Run]) -> list[Setting]:
    """Runs that differ in their seeds alone, together; those of one training side by side, float32 first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run.config), []).append(run)
    ordered = [sorted(group, key=lambda run: (run.seed, run.config.noise_seed)) for group in groups.values()]
    settings = [Setting(group[0].config, tuple(group)) for group in ordered]
    return sorted(settings, key=lambda setting: _order(setting.config))


def _key(config: Config) -> str:
    """The same for runs that differ in their seeds alone, however their rules were written."""
    return config.group.removeprefix(f"{config.label}-")  # the label says how they were written


def baseline_of(setting: Setting, settings: Iterable[Setting]) -> Setting | None:
    """The setting that rounds nothing and trains alike; of several, the one with the most fields at their defaults."""
    training = _key(_unrounded(setting.config))
    alike = [s for s in settings if not s.rounds and _key(_unrounded(s.config)) == training]
    return min(alike, key=lambda s: len(flags_of(s.config, NOT_IN_FLAGS)), default=None)


def _unrounded(config: Config) -> Config:
    defaults = {f.name: f.default for f in fields(Config)}
    return replace(config, **{name: defaults[name] for name in (*ROUNDING_FIELDS, "average_last")})


def main_rule(rules: dict[str, Rule]) -> Rule:
    """The rule of the most sites that are rounded by default; of equally many, that of the first one."""
    counts = Counter(rules[site] for site in ALL_SITES if site in rules)
    return counts.most_common(1)[0][0] if counts else UNROUNDED


def uniform_rule(rules: dict[str, Rule], sites: Sequence[str] = ALL_SITES) -> Rule | None:
    """The rule that all of `sites` share where no other site has one; float32's where none has; else None."""
    if not rules:
        return UNROUNDED
    return main_rule(rules) if set(rules) == set(sites) and len(set(rules.values())) == 1 else None


def bits_of(number_format: AnyFormat) -> int:
    """Bits of a number; of a block format, those of an element."""
    element = number_format.element if isinstance(number_format, BlockFormat) else number_format
    return 1 + element.exponent_bits + element.mantissa_bits + (not element.exponent_bits)


def _order(config: Config) -> tuple:
    """Sorts settings: by the training; then float32, wide formats before narrow ones, the roundings as listed."""
    rules = config.rules()
    base = main_rule(rules)
    training = tuple(_sortable(getattr(config.resolved(), name)) for name in TRAINING_FIELDS)
    rounding = Rounding.STOCHASTIC if isinstance(base.rounding, FewBits) else base.rounding
    main = -bits_of(base.format), _sortable(base.format.name), list(Rounding).index(rounding), _sortable(base.rounding)
    number = len(_others(rules)) + len(config.lines()) + len(config.transforms())
    return (
        training,
        bool(rules or config.lines() or config.transforms()),
        main,
        number,
        _sortable(rounded(config)),
        _sortable(flags_text(config)),
    )


def _sortable(value: Any) -> tuple:
    """None first, numbers by size, texts by the numbers in them: fixed16.8 before fixed16.10."""
    if value is None:
        return ()
    if isinstance(value, int | float):
        return (value,)
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", str(value)))


# Names: for people alone.


def names(settings: Sequence[Setting]) -> list[str]:
    """What is rounded, and the flags in which the settings differ beside it.

    A flag of training or data in which any two of them differ is in every name, so "float32 --dataset boston" is the
    baseline of "float8 nearest --dataset boston"; one of rounding only where names would be the same without it.
    """
    configs = [setting.config for setting in settings]
    apart = {name for config in configs for name in _differences(config, configs[0])}
    common = [f.name for f in fields(Config) if f.name in apart and f.name in TRAINING_FIELDS]
    texts = [rounded(config) for config in configs]
    complete = []
    for text, config in zip(texts, configs, strict=True):
        alike = [other for other_text, other in zip(texts, configs, strict=True) if other_text == text]
        special = {name for other in alike for name in _differences(config, other)} - set(common)
        told = [name for name in (*common, *sorted(special)) if _decides(config, name)]
        flags = [f"{flag(name)} {_shown(getattr(config, name))}" for name in told]
        complete.append(" ".join([text, *flags]))
    return complete


def _differences(config: Config, other: Config) -> list[str]:
    """The fields in which they differ, but for the seeds."""
    return config.differences(replace(other, seed=config.seed, rounding_seed=config.rounding_seed))


def _decides(config: Config, name: str) -> bool:
    """Whether a run has that setting at all: no epochs beside steps, and nothing that is off."""
    return getattr(config, name) is not None and not (name == "epochs" and config.steps is not None)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def rounded(config: Config) -> str:
    """What is rounded, in a few words: "float8 stochastic; accumulator float16 stochastic"."""
    return "; ".join([_rounded_everywhere(config), *_rounded_by_layer(config)])


def _rounded_by_layer(config: Config) -> list[str]:
    """The lines by layer, those of one rule and one pattern together, in their order; and the chosen layers."""
    groups: list[tuple[str, list[str], Rule]] = []  # pattern, sites, rule
    for line in config.lines():
        pattern = line.pattern or "*"
        if groups and (groups[-1][0], groups[-1][2]) == (pattern, line.rule):
            groups[-1][1].append(line.site)
        else:
            groups.append((pattern, [line.site], line.rule))
    texts = [f"{pattern}/{','.join(sites)} {_rule_name(rule)}" for pattern, sites, rule in groups]
    layers = config.layers if config.rules() or texts else None
    texts += [f"in {','.join(layers)}"] if layers else []
    return texts + _transformed(config)


def _transformed(config: Config) -> list[str]:
    """The transforms of the products, those in which a recipe is not its own."""
    row = RECIPES.get(config.recipe or "")
    theirs = dict(row.transforms) if row else {}
    ours = {product: str(transform) for product, transform in config.transforms().items()}
    texts = [f"{text} of {product}" for product, text in ours.items() if text != theirs.get(product)]
    return texts + [f"no transform of {product}" for product in theirs if product not in ours]


def _rounded_everywhere(config: Config) -> str:
    if config.recipe:
        return _rounded_by_recipe(config, config.recipe)
    rules = config.rules()
    if not rules:
        return FLOAT32.name
    base = main_rule(rules)
    words, others = [_rule_name(base)], _others(rules)
    usual = [site for site in ALL_SITES if rules.get(site) == base]
    if not usual:  # an accumulator alone
        words = []
    elif len(usual) < sum(site in others for site in ALL_SITES):
        words = [f"{_rule_name(base)} {', '.join(usual)}"]
        others = {site: rule for site, rule in others.items() if site in rules}  # float32 needs no saying there
    if not any(site in rules for site in ALL_SITES):  # operands alone, or a copy of the weights
        others = {site: rule for site, rule in others.items() if site in rules}
    by_rule: dict[Rule, list[str]] = {}
    for site, rule in others.items():
        by_rule.setdefault(rule, []).append(site)
    for rule, sites in by_rule.items():
        if set(OPERANDS) <= set(sites):
            sites = [*(site for site in sites if site not in OPERANDS), PRODUCTS]
        words.append(f"{', '.join(sites)} {_rule_name(rule)}")
    return "; ".join(words)


def _rounded_by_recipe(config: Config, recipe: str) -> str:
    """The recipe, and where the rules are not its own: "nvfp4; wgrad.errors nvfp4 nearest"."""
    row = RECIPES.get(recipe)  # None of a row that a user had
    lines = [site_line(f"{site}={text}") for site, text in row.rules.items()] if row else []
    theirs, rules = effective({line.site: line.rule for line in lines}), config.rules()
    by_rule: dict[Rule, list[str]] = {}
    for site in in_order({*rules, *theirs}):
        if rules.get(site) != theirs.get(site):
            by_rule.setdefault(rules.get(site, UNROUNDED), []).append(site)
    return "; ".join([recipe, *(f"{', '.join(sites)} {_rule_name(rule)}" for rule, sites in by_rule.items())])


def _others(rules: dict[str, Rule]) -> dict[str, Rule]:
    """The sites that are not as `main_rule` says: those with another rule or none, and those that are there besides."""
    if not rules:
        return {}
    base = main_rule(rules)
    sites = [site for site in ALL_SITES if rules.get(site) != base] + [site for site in rules if site not in ALL_SITES]
    return {site: rules[site] if site in rules and is_there(site, rules[site]) else UNROUNDED for site in sites}


def _rule_name(rule: Rule) -> str:
    return str(rule).replace(":", " ", 1)
