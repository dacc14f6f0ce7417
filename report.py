"""Records to tables and figures; trains nothing: `python report.py runs --metric testing_accuracy --figure out.png`.

Runs that differ in their seeds alone are one setting. A table has a line for each setting: the median over its runs,
and the 5th to the 95th percentile; and the mean difference to float32 in pairs of runs of the same seed, with its 95 %
confidence interval (bootstrap of the pairs). A figure has a curve for each setting and, for several runs, where they
end. A diverged run has no last value: it is counted, and left out.
"""

from __future__ import annotations

import argparse
import csv
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from analysis import figures
from analysis import runs as records
from analysis.runs import Run
from settings.config import ConfigError

RESAMPLES = 9999  # of the bootstrap
BLOCK = re.compile(r"^(<!-- report\.py ([^\n]*?) -->\n).*?(?=^<!-- end -->$)", re.DOTALL | re.MULTILINE)  # of a README


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of their mean, by bootstrap (percentiles); the same numbers at each call.

    None of fewer than two, or of equal ones, which say nothing of a spread.
    """
    import numpy as np
    from scipy.stats import bootstrap

    if len(set(differences)) < 2:
        return None
    found = bootstrap((differences,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def pairs(runs: Sequence[Run], baseline: Sequence[Run], metric: str, epoch: int | None = None) -> list[float]:
    """What each run has more than the baseline's run of its seed."""
    those = {run.seed: run.value(metric, epoch) for run in baseline}
    both = [(run.value(metric, epoch), those.get(run.seed)) for run in runs]
    return [a - b for a, b in both if a is not None and b is not None]


def table(runs: Sequence[Run], metric: str, epochs: Sequence[int | None] = (None,)) -> list[list[str]]:
    """Lines of cells, the first their heads: each setting's `metric` after each of `epochs` (None: the last)."""
    percent = figures.is_percent(metric)
    factor, unit = (100, " %") if percent else (1, "")

    def shown(value: float) -> str:
        return f"{factor * value:.2f}{unit}" if percent else f"{value:.4g}"

    def change(value: float) -> str:
        return f"{factor * value:+.2f}" if percent else f"{value:+.2g}"

    groups = records.by_setting(runs)
    baselines = {setting: groups.get(records.baseline_of(setting), []) for setting in groups}
    compared = any(group is not baselines[setting] for setting, group in groups.items() if baselines[setting])
    head = ["what is rounded", "runs", "epochs"]
    for epoch in epochs:
        head.append(metric.replace("_", " ") + (f", epoch {epoch}" if epoch else ""))
        head += ["difference to float32" + (", points" if percent else "")] * compared
    lines = [[*head, "time a run"]]
    for setting, group in groups.items():
        count = sorted({run.epochs for run in group})
        cells = [setting, str(len(group)), "-".join(str(n) for n in sorted({count[0], count[-1]}))]
        for epoch in epochs:
            there = [value for run in group if (value := run.value(metric, epoch)) is not None]
            text = shown(statistics.median(there)) if there else "-"
            if len(set(there)) > 1:
                text += f" ({' - '.join(map(shown, figures.band(there)))})"
            diverged = sum(run.status == "diverged" and run.value(metric, epoch) is None for run in group)
            if diverged:
                text += f"; {diverged} diverged"
            if other := len(group) - len(there) - diverged:
                text += f"; {other} without a value there"
            cells.append(text)
            if compared:
                found = [] if group is baselines[setting] else pairs(group, baselines[setting], metric, epoch)
                text = change(statistics.fmean(found)) if found else "-"
                if ends := interval(found):
                    text += f" [{', '.join(map(change, ends))}]"
                cells.append(text)
        lines.append([*cells, _time(statistics.median(run.seconds for run in group))])
    return lines


def _time(seconds: float) -> str:
    return f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.2g} s"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([rows[0], "|---" * len(lines[0]) + "|\n", *rows[1:]])


def _plain(paths: Sequence[Path]) -> list[list[str]] | None:
    """The cells of one CSV file that holds no runs, as those of experiments/; None of anything else."""
    if len(paths) != 1 or paths[0].suffix != ".csv":
        return None
    with open(paths[0], newline="") as file:
        lines = [line for line in csv.reader(file) if line]
    return None if not lines or lines[0][: len(records.COLUMNS)] == list(records.COLUMNS) else lines


def rewritten(text: str, folder: Path) -> str:
    """A README's text with each block `<!-- report.py ARGUMENTS -->` to `<!-- end -->` made anew; paths in `folder`."""

    def block(found: re.Match[str]) -> str:
        given = _parser().parse_args(shlex.split(found[2]))
        return found[1] + _told([folder / path for path in given.paths], given)

    return BLOCK.sub(block, text)


def _told(paths: list[Path], given: argparse.Namespace) -> str:
    """The table in Markdown."""
    if plain := _plain(paths):
        return markdown(plain)
    return markdown(table(_runs(paths, given.metric), given.metric, given.at or (None,)))


def _runs(paths: Sequence[Path], metric: str) -> list[Run]:
    runs = records.read(paths)
    if not runs:
        raise ValueError(f"{', '.join(map(str, paths)) or 'paths: none given'}: no record there, nor a CSV file")
    if metric not in (known := records.metrics(runs)):
        raise ValueError(f"--metric: given {metric}, allowed here: {', '.join(known)}")
    return runs


def _epochs(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"given {text}, allowed: whole numbers >= 1, comma-separated")
    return found


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def _parser() -> Parser:
    parser = Parser(prog="report.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("paths", nargs="*", type=Path, help="record folders, folders of them, or CSV files of --save")
    parser.add_argument("--metric", default="testing_accuracy", help="of metrics.jsonl [default: testing_accuracy]")
    parser.add_argument("--at", type=_epochs, help="comma-separated epochs of the table and of --save [default: last]")
    parser.add_argument("--figure", type=Path, help="a PNG or SVG file: its curves, and where they end")
    parser.add_argument("--map", type=Path, help="a PNG or SVG file: its last value by exponent and mantissa bits")
    parser.add_argument("--title", default="", help="of the figure")
    parser.add_argument("--save", type=Path, help="a CSV file of every run: all epochs, or those of --at")
    parser.add_argument("--output", type=Path, help="a folder for all of it: table, figures as PNG and SVG, runs")
    parser.add_argument("--readme", type=Path, help="a Markdown file whose blocks of this script are made anew")
    return parser


def _report(given: argparse.Namespace) -> None:
    """Everything that the arguments ask for, but README's blocks: the records are read once."""
    for name in ("figure", "map"):
        path = getattr(given, name)
        if path and path.suffix not in (".png", ".svg"):
            raise ValueError(f"--{name}: given {path}, allowed: a name in .png or .svg")
    if not any((given.save, given.figure, given.map, given.output)):
        print(_told(given.paths, given), end="")
        return
    runs, epochs = _runs(given.paths, given.metric), given.at or ()
    mapped = figures.has_bit_widths(runs, given.metric, epochs)
    if given.map and not mapped:
        raise ValueError("--map: given no run in a format eXmY with a value there, allowed: at least one")
    lines = table(runs, given.metric, epochs or (None,))
    drawn: list[tuple[Callable, Path]] = []
    if given.figure:
        drawn.append((figures.curves, given.figure))
    if given.map:
        drawn.append((figures.bit_widths, given.map))
    if given.output:
        kinds = [(figures.curves, "curves")] + [(figures.bit_widths, "map")] * mapped
        drawn += [(draw, given.output / f"{name}.{end}") for draw, name in kinds for end in ("png", "svg")]
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "table.md").write_text(markdown(lines))
        with open(given.output / "table.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
        records.save(runs, given.output / "runs.csv", epochs)
    print(markdown(lines), end="")
    if given.save:
        records.save(runs, given.save, epochs)
    for draw, path in drawn:
        draw(runs, given.metric, path, given.title, epochs)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        given = _parser().parse_args(argv)
        if given.paths or not given.readme:
            _report(given)
        if given.readme:  # last, as its blocks may show what was just saved
            given.readme.write_text(rewritten(given.readme.read_text(), given.readme.parent))
    except (ConfigError, OSError, ValueError, KeyError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
