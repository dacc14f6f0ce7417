"""Records to tables and figures; trains nothing: `python report.py runs --metric testing_accuracy --figure out.png`.

Runs that differ in their seeds alone are one setting. A table has a line for each setting: the median over its runs,
and the 5th to the 95th percentile; and the difference to float32 in pairs of runs of the same seed: its mean with the
95 % confidence interval (Student's t), and its median. A figure has a row for each setting, where its runs
end, and the curves of those that differ. A diverged run has no last value: it is counted, and left out. Where runs of
one table were made by different code, a line on stderr says so, and how many by each (`code` in their summary.json).

`--formats FORMAT,FORMAT` needs no records: what number formats can hold, and how far rounding to them goes wrong.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis import figures, maps, tables
from analysis import runs as records
from analysis.runs import Run
from low_precision.errors import nearest, shown
from low_precision.rules import rule_of
from settings.config import ConfigError
from settings.flags import Parser
from settings.stdout import show

ROOT = Path(__file__).resolve().parent
BLOCK = re.compile(r"^(<!-- report\.py ([^\n]*?) -->\n).*?(?=^<!-- end -->$)", re.DOTALL | re.MULTILINE)  # of a page
METRICS = ("testing_accuracy", "testing_mse", "testing_loss")  # in the absence of --metric, the first of the records'
FIGURE_TYPES = (".png", ".svg")


@dataclass(frozen=True)
class Asked:
    """The arguments, checked. metric: None for one of those that the records have; epochs: () for the last ones."""

    paths: list[Path]
    metric: str | None
    epochs: tuple[int, ...]
    figure: Path | None
    map: Path | None
    title: str
    save: Path | None
    output: Path | None
    html: Path | None
    readme: list[Path]
    formats: str | None
    amax: str | None

    @classmethod
    def of(cls, argv: Sequence[str]) -> Asked:
        """ConfigError for what is not allowed."""
        values = parser().values(argv)
        epochs = _epochs(values.pop("at"))
        for name in ("figure", "map"):
            if values[name] and values[name].suffix not in FIGURE_TYPES:
                raise ConfigError(f"--{name}", shown(values[name]), f"a name in {' or '.join(FIGURE_TYPES)}")
        if values["html"] and values["html"].is_dir():
            raise ConfigError("--html", shown(values["html"]), "the name of a file")
        asked = cls(**values, epochs=epochs)
        asked.check_formats()
        return asked

    def check_formats(self) -> None:
        """ConfigError for what does not go with --formats, or not without it."""
        if self.formats is None:
            if self.amax is not None:
                raise ConfigError("--amax", shown(self.amax), "with --formats alone")
            return
        others = {"paths": self.paths, "--metric": self.metric, "--at": self.epochs, "--map": self.map}
        others |= {"--save": self.save, "--output": self.output, "--readme": self.readme}
        for name, value in others.items():
            if value:
                raise ConfigError(
                    "--formats", f"it beside {name}", "it alone, or with --figure, --html, --title, --amax"
                )


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def parser() -> Parser:
    made = Parser(prog="report.py", description=__doc__, allow_abbrev=False)
    made.add_argument("paths", nargs="*", type=_path, help="record folders, folders of them, or CSV files of --save")
    made.add_argument(
        "--metric", help=f"of metrics.jsonl [default: the first that the records have of {', '.join(METRICS)}]"
    )
    made.add_argument(
        "--at", help="comma-separated epochs of the table and of --save, of runs by steps steps [default: last]"
    )
    made.add_argument("--figure", type=_path, help="a PNG or SVG file: where the settings end, and curves")
    made.add_argument("--map", type=_path, help="a PNG or SVG file: the last value by exponent and mantissa bits")
    made.add_argument("--title", default="", help="of the figure [default: data, model, and what is varied]")
    made.add_argument("--save", type=_path, help="a CSV file of every run: all lines of metrics, or those of --at")
    made.add_argument("--output", type=_path, help="a folder for all of it: table, figures as PNG and SVG, runs")
    made.add_argument("--html", type=_path, help="an HTML file of all of it, to look at; of running sweeps too")
    made.add_argument(
        "--readme",
        type=_path,
        action="append",
        default=[],
        help="a Markdown file, or a folder of them, whose blocks of this script are made anew; repeatable",
    )
    made.add_argument(
        "--formats",
        metavar="FORMAT[:ROUNDING],...",
        help="no records: what these formats can hold, and their errors, beside each other; --figure and --html too",
    )
    made.add_argument("--amax", help="with --formats: the largest magnitude of a group with a scale [default: 1]")
    return made


def _epochs(text: str | None) -> tuple[int, ...]:
    words = [] if text is None else text.split(",")
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", word.strip()) for word in words):
        raise ConfigError("--at", shown(text), "whole numbers >= 1, comma-separated")
    return tuple(int(word) for word in words)


def rewritten(text: str, folder: Path = ROOT) -> str:
    """A page's text with each block `<!-- report.py ARGUMENTS -->` to `<!-- end -->` made anew.

    Paths in blocks begin in the page's folder, or else in that of this script.
    """

    def block(match: re.Match[str]) -> str:
        asked = Asked.of(shlex.split(match[2]))
        paths = [folder / path if (folder / path).exists() else ROOT / path for path in asked.paths]
        return match[1] + _table_of(paths, asked)

    return BLOCK.sub(block, text)


def _rewrite(paths: Sequence[Path]) -> None:
    """Make the blocks of these pages anew: of all of them, or of none where one block cannot be made."""
    texts = {}
    for path in paths:
        old = path.read_text()
        try:
            new = rewritten(old, path.parent)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
        if new != old:
            texts[path] = new
    for path, text in texts.items():
        records.write(path, text)


def pages(paths: Sequence[Path]) -> list[Path]:
    """These files, and the *.md of these folders. ConfigError for a folder that has none."""
    inside = {path: sorted(path.glob("*.md")) for path in paths if path.is_dir()}
    for path, texts in inside.items():
        if not texts:
            raise ConfigError("--readme", shown(path), "a Markdown file, or a folder of them")
    return [page for path in paths for page in inside.get(path, [path])]


def _table_of(paths: Sequence[Path], asked: Asked) -> str:
    """The table in Markdown: of runs, or of the cells of a CSV file that holds none, as those of experiments/."""
    if len(paths) == 1 and paths[0].suffix == ".csv" and not records.holds_runs(paths[0]):
        with open(paths[0], newline="") as file:
            if lines := [line for line in csv.reader(file) if line]:
                return tables.markdown(lines)
    runs = _runs(paths)
    return tables.markdown(tables.table(runs, _metric(runs, asked.metric), asked.epochs or (None,)))


def _runs(paths: Sequence[Path], unfinished: bool = False) -> list[Run]:
    """What the paths hold; lines on stderr count the runs that are left out, and those that different code made."""
    if not paths:
        raise ConfigError("paths", "none", "record folders, folders of them, or CSV files of --save")
    read = records.read(paths, unfinished)
    if not read.runs:
        others = f" ({_left_out(read.left_out)})" if read.left_out else ""
        raise ValueError(f"{', '.join(map(str, paths))}: no record of a run that ended there, nor a CSV file{others}")
    left_out = read.left_out + Counter(run.status for run in read.runs if not run.ended)  # of the table
    if left_out:
        print(_left_out(left_out), file=sys.stderr)
    made_by = records.codes(read.runs)
    if len(made_by) > 1:
        counts = ", ".join(
            f"{count} {f'by {code}' if code else 'without a fingerprint'}" for code, count in made_by.most_common()
        )
        print(f"these runs were made by different code: {counts}", file=sys.stderr)
    return read.runs


def _left_out(counts: Counter[str]) -> str:
    return "left out: " + ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def _metric(runs: Sequence[Run], name: str | None) -> str:
    known = records.metrics_of(runs)
    if not known:
        raise ValueError("the runs have no metric: each of them ended before its first evaluation")
    if name is None:
        return next((metric for metric in METRICS if metric in known), known[-1])
    if name not in known:
        raise ConfigError("--metric", shown(name), ", ".join(known), nearest(name, known))
    return name


def _report(asked: Asked) -> None:
    """Everything that the arguments ask for, but the pages' blocks: the records are read once."""
    if not any((asked.save, asked.figure, asked.map, asked.output, asked.html)):
        show(_table_of(asked.paths, asked).removesuffix("\n"))
        return
    runs = _runs(asked.paths, unfinished=asked.html is not None)
    metric, epochs = _metric(runs, asked.metric), asked.epochs
    if asked.html:
        from analysis.page import write_page  # nothing else needs what it draws with

        write_page(runs, metric, asked.html, asked.title)
        runs = [run for run in runs if run.ended]
        if not runs:  # the page alone shows what there is of them
            return
    mapped = maps.has_bit_widths(runs, metric, epochs)
    if asked.map and not mapped:
        raise ConfigError("--map", "no run in a format eXmY with a value there", "at least one")
    text = tables.markdown(tables.table(runs, metric, epochs or (None,)))
    show(text.removesuffix("\n"))
    if asked.save:
        records.save(runs, asked.save, epochs)
    if asked.output:
        records.write(asked.output / "table.md", text)
        records.write(asked.output / "table.csv", tables.numbers(runs, metric, epochs or (None,)))
        records.save(runs, asked.output / "runs.csv", epochs)
    ends = [asked.output / f"curves{suffix}" for suffix in FIGURE_TYPES] if asked.output else []
    for path in [*([asked.figure] if asked.figure else []), *ends]:
        figures.curves(runs, metric, path, asked.title, epochs)
    places = [asked.output / f"map{suffix}" for suffix in FIGURE_TYPES] if asked.output and mapped else []
    for path in [*([asked.map] if asked.map else []), *places]:
        maps.bit_widths(runs, metric, path, asked.title, epochs)


def _formats(text: str, asked: Asked) -> None:
    """What --formats asks for. SettingError for a name that is none."""
    from low_precision import format_pages  # it loads torch, for which records need not wait

    rules = [rule_of(word.strip()) for word in text.split(",")]
    amax = format_pages.amax_of(asked.amax)
    show(format_pages.beside(rules, amax) if len(rules) > 1 else format_pages.describe(rules[0], amax))
    if asked.figure:
        from analysis import format_figure

        format_figure.draw(rules, amax, asked.figure, asked.title)
    if asked.html:
        from analysis import format_page

        format_page.write_page(rules, amax, asked.html, asked.title)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        asked = Asked.of(sys.argv[1:] if argv is None else argv)
        if asked.formats is not None:
            _formats(asked.formats, asked)
        elif asked.paths or not asked.readme:
            _report(asked)
        _rewrite(pages(asked.readme))  # last: blocks may show what was just saved
    except (ConfigError, OSError, ValueError, KeyError) as error:
        print(f"report.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
