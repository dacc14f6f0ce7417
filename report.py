"""Records to tables and figures; trains nothing: `python report.py runs --metric testing_accuracy --figure out.png`.

Runs that differ in their seeds alone are one setting. A table has a line for each setting, a figure a curve: the median
over its runs, and from the 5th to the 95th percentile where there are several.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from config import Config, ConfigError
from formats import ADDED_SITES, ALL_SITES, FLOAT32, Rule, format_named, rounding_named

COLUMNS = ("setting", "seed", "status", "seconds", "epoch")  # of a CSV file; the metrics follow
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito 2008
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Run:
    """One record. history: the lines of its metrics.jsonl; NaN and infinite metrics are None."""

    setting: str
    seed: int
    status: str
    seconds: float
    history: list[dict[str, float | None]]


def setting_of(config: Config) -> str:
    """What is rounded, in a few words: "float8 stochastic; accumulator float16 stochastic"."""
    rules = config.rules()
    if not rules:
        return "float32"
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
    """The runs of record folders, of folders of them, and of CSV files that `save` wrote."""
    runs: list[Run] = []
    folders: list[Path] = []
    for path in paths:
        if path.suffix == ".csv":
            runs += _from_csv(path)
        else:
            folders += [path] if (path / "config.json").exists() else [p.parent for p in path.glob("*/config.json")]
    configs = {f: Config.from_json((f / "config.json").read_text()) for f in folders if (f / "summary.json").exists()}
    ordered = sorted(configs, key=lambda f: (configs[f].group, configs[f].seed, configs[f].noise_seed))
    return runs + [_from_record(folder, configs[folder], list(configs.values())) for folder in ordered]


def _from_record(folder: Path, config: Config, others: list[Config]) -> Run:
    """others: of all runs; what the settings of one name differ in belongs to their names."""
    name, plain = setting_of(config), _without_seeds(config)
    alike = [_without_seeds(other) for other in others if setting_of(other) == name]
    name = " ".join([name, *sorted({text.partition(", not ")[0] for o in alike for text in plain.differences(o)})])
    summary = json.loads((folder / "summary.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return Run(name, config.seed, summary["status"], summary["seconds"], list(map(json.loads, lines)))


def _without_seeds(config: Config) -> Config:
    return replace(config, seed=0, rounding_seed=0)


def _from_csv(path: Path) -> Iterator[Run]:
    with open(path, newline="") as file:
        for (setting, seed, status, seconds), rows in itertools.groupby(
            csv.DictReader(file), key=lambda row: tuple(row[name] for name in COLUMNS[:4])
        ):
            history = [{k: float(v) for k, v in row.items() if v and k not in COLUMNS[:4]} for row in rows]
            yield Run(setting, int(seed), status, float(seconds), history)


def save(runs: Sequence[Run], path: Path) -> None:
    """A CSV file with a line for each epoch of each run, small enough to keep beside the code."""
    metrics = list(dict.fromkeys(name for run in runs for line in run.history for name in line if name != "epoch"))
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*COLUMNS, *metrics])
        for run in runs:
            for line in run.history:
                values = [None if line.get(name) is None else f"{line[name]:.6g}" for name in metrics]
                rows.writerow([run.setting, run.seed, run.status, run.seconds, int(line["epoch"]), *values])


def by_setting(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """In the order in which settings come up first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append(run)
    return found


def table(runs: Sequence[Run], metric: str) -> str:
    """Markdown: of each setting the last value of `metric`, its median and range, and the minutes of a run."""
    percent = metric.endswith("accuracy")
    shown = (lambda v: f"{100 * v:.2f} %") if percent else (lambda v: f"{v:.4g}")
    lines = [
        f"| what is rounded | runs | epochs | {metric.replace('_', ' ')} | minutes a run |",
        "|---|---|---|---|---|",
    ]
    for setting, group in by_setting(runs).items():
        last = [run.history[-1].get(metric) if run.history else None for run in group]
        there = [value for value in last if value is not None]
        value = shown(statistics.median(there)) if there else "-"
        if len(there) > 1:
            value = f"{value} ({shown(min(there))} - {shown(max(there))})"
        if stopped := sum(run.status == "diverged" for run in group):
            value += f"; {stopped} diverged"
        epochs = "-".join(sorted({str(len(run.history)) for run in group}, key=int))
        minutes = statistics.median(run.seconds for run in group) / 60
        lines.append(f"| {setting} | {len(group)} | {epochs} | {value} | {minutes:.3g} |")
    return "\n".join(lines)


def figure(runs: Sequence[Run], metric: str, path: Path, title: str) -> None:
    """`metric` over the epochs, a curve for each setting: PNG or SVG, by the file's name."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    percent = metric.endswith("accuracy")
    chart, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (setting, group) in enumerate(by_setting(runs).items()):
        look = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}
        epochs = range(1, max(len(run.history) for run in group) + 1)
        curves = [[line.get(metric) for run in group for line in run.history[e - 1 : e]] for e in epochs]
        curves = [[100 * v if percent else v for v in values if v is not None] for values in curves]
        places = [e for e, values in zip(epochs, curves, strict=True) if values]
        curves = [values for values in curves if values]
        middle = [statistics.median(values) for values in curves]
        last = f" {middle[-1]:.1f} %" if percent and middle else f" {middle[-1]:.3g}" if middle else ""
        several = f", n = {len(group)}" if len(group) > 1 else ""
        axes.plot(places, middle, label=f"{setting}:{last}{several}", linewidth=1.8, marker="o", markersize=3, **look)
        if len(group) > 1:
            ends = [
                statistics.quantiles(v, n=20, method="inclusive")[::18] if len(v) > 1 else (v[0], v[0]) for v in curves
            ]
            axes.fill_between(places, *zip(*ends, strict=True), color=look["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel="epoch", ylabel=metric.replace("_", " ") + (" (%)" if percent else ""), title=title)
    axes.grid(alpha=0.3)
    chart.legend(loc="outside lower center", title="what is rounded: last value", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.savefig(path, dpi=150)
    plt.close(chart)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("paths", nargs="+", type=Path, help="record folders, folders of them, or CSV files of --save")
    parser.add_argument("--metric", default="testing_accuracy", help="of metrics.jsonl [default: testing_accuracy]")
    parser.add_argument("--figure", type=Path, help="a PNG or SVG file of its curves")
    parser.add_argument("--title", default="", help="of the figure")
    parser.add_argument("--save", type=Path, help="a CSV file with every epoch of every run")
    given = parser.parse_args(argv)
    try:
        runs = read(given.paths)
        known = sorted({name for run in runs for line in run.history for name in line if name != "epoch"})
        if not runs:
            raise ValueError(f"{', '.join(map(str, given.paths))}: no record there, nor a CSV file")
        if given.metric not in known:
            raise ValueError(f"--metric: given {given.metric}, allowed here: {', '.join(known)}")
        if given.figure and given.figure.suffix not in (".png", ".svg"):
            raise ValueError(f"--figure: given {given.figure}, allowed: a name in .png or .svg")
    except (ConfigError, OSError, ValueError, KeyError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    print(table(runs, given.metric))
    if given.save:
        save(runs, given.save)
    if given.figure:
        figure(runs, given.metric, given.figure, given.title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
