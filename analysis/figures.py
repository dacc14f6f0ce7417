"""Figures of runs: where settings end and how they get there.

A setting looks the same in all figures, because its colour, line and mark follow from its rules alone. The colours are
those of Okabe and Ito 2008 and of Paul Tol's "muted", which the colour-blind tell apart.
"""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.run import common_unit, units
from analysis.runs import Run, Setting, baseline_of, main_rule, names, settings_of, write
from analysis.tables import band, is_percent
from low_precision.formats import AnyFormat, BlockFormat
from low_precision.rounding import is_random
from low_precision.rules import ADDED_SITES, AROUND_LAYERS

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito
STYLES = ("-", "--", "-.", ":")
OTHER_COLOURS = ("#332288", "#44AA99", "#117733", "#999933", "#CC6677", "#882255", "#AA4499")  # Tol, the darker ones
# By format, whether it is rounded at random, and whether the weights have an accumulator or a compensation.
KNOWN_COLOURS = {
    ("float16", False, False): "#0072B2",
    ("float16", True, False): "#56B4E9",
    ("float8", False, False): "#D55E00",
    ("float8", True, False): "#E69F00",
    ("float8", False, True): "#CC79A7",
    ("float8", True, True): "#009E73",
}
MANY_EPOCHS = 100  # from here on, their axis is logarithmic
MANY_TIMES = 50.0  # and that of the metric, where it spans so much
MOST_ROWS = 40  # of more settings, the best and the worst are drawn
MOST_CURVES = 6
APART = 0.03  # of the axis: a curve that is nearer to another one, on average over its second half, looks like it
FAR = 3.0  # times the middle half of all ends: a value beyond is drawn at the edge
WRAP = 42  # letters in a line of a setting's name
LINE_HEIGHT = 0.2  # of such a line, in inches
GAP = 0.6  # between two rows, in such lines
KEY = 0.45  # inches between a name and the axis, where a piece of its curve stands


@dataclass(frozen=True)
class Look:
    colour: str
    line: str
    mark: str


def look(setting: Setting) -> Look:
    """Colour by the main rule, and whether updates are kept in a wider form; line by its rounding; mark by the rest."""
    rules = setting.rules
    if not setting.rounds:
        return Look("#000000", "-", "o")
    rule = main_rule(rules)
    random = is_random(rule.rounding)
    kept = any(site in rules for site in ADDED_SITES)
    apart = [site for site, other in rules.items() if other != rule and site not in ADDED_SITES]
    weights, layers = "weights" in apart, any(site in apart for site in AROUND_LAYERS)
    mark = {(False, False): "s" if kept else "o", (True, False): "^", (False, True): "D", (True, True): "v"}
    number = _number(rule.format) + random + 2 * kept + 3 * weights
    other = OTHER_COLOURS[number % len(OTHER_COLOURS)]
    colour = KNOWN_COLOURS.get((rule.format.name, random, kept), other)
    return Look(colour, "--" if random else "-", mark[weights, layers])


def _number(number_format: AnyFormat) -> int:
    """A whole number that follows from the format's bits, so that formats of one family have different colours."""
    if isinstance(number_format, BlockFormat):
        return _number(number_format.element) + 1
    return 2 * number_format.exponent_bits + number_format.mantissa_bits + number_format.bias


def nth_look(number: int) -> dict[str, str]:
    """The colour and the line of the curve of this number, in figures of something else than settings."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files, in this project's style."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "low_precision_ml"})
    return plt


def store(chart: Any, path: Path) -> None:
    """Write the figure, whole or not at all; the same bytes from the same runs."""
    drawn = io.BytesIO()
    kept = {"Software": None} if path.suffix == ".png" else {"Date": None}
    try:
        chart.savefig(drawn, dpi=150, metadata=kept, format=path.suffix.removeprefix("."))
    finally:
        pyplot().close(chart)
    write(path, drawn.getvalue())


@dataclass(frozen=True)
class Row:
    """A setting as it is drawn; accuracies in percent.

    place: where it stands, from the top, in lines. ends: by panel, the last values of its runs. by_epoch: all values,
    or by step where all runs have steps.
    """

    setting: Setting
    name: str
    look: Look
    ends: list[list[float]]
    by_epoch: dict[float, list[float]]
    place: float = 0.0

    @property
    def last(self) -> float | None:
        return statistics.median(self.ends[-1]) if self.ends[-1] else None

    @property
    def lines(self) -> int:
        return self.name.count("\n") + 1


def curves(runs: Sequence[Run], metric: str, path: Path, title: str = "", epochs: Sequence[int] = ()) -> None:
    """Where the settings end, the best on top, and the curves of `metric` by epoch of those that differ.

    A mark is the median over a setting's runs, a bar or a band goes from the 5th to the 95th percentile. There is a
    panel of marks for each of the last three of `epochs`, or one for the last values. Without `title`, `title_of` says
    what is drawn.
    """
    plt = pyplot()
    settings = settings_of(runs)
    panels, unit = list(epochs[-3:]) or [None], common_unit(settings)
    rows = _rows(settings, metric, panels)
    baseline = _only_baseline(rows, settings)
    shown_rows = _placed(_fewer(rows, baseline))
    logarithmic = _is_logarithmic([statistics.median(v) for row in rows for v in row.by_epoch.values()], metric)
    drawn = _that_differ(rows, baseline, logarithmic)
    has_curves = any(len(row.by_epoch) > 1 for row in rows)
    widths = [2.6 if len(panels) == 1 else 1.7] * len(panels) + [3.4] * has_curves
    height = max(3.8, 1.5 + LINE_HEIGHT * sum(row.lines + GAP for row in shown_rows))
    chart, grid = plt.subplots(
        1, len(widths), squeeze=False, layout="constrained", figsize=(10.4, height), width_ratios=widths
    )
    for number, epoch in enumerate(panels):
        axes = grid[0][number]
        _marks(axes, shown_rows, number, metric, logarithmic)
        if baseline and baseline.ends[number]:
            axes.axvline(statistics.median(baseline.ends[number]), color="black", linewidth=1, alpha=0.6, zorder=1)
        place = f"{units(settings, one=True)} {epoch}" if epoch else _last_place(settings)
        axes.set_title(f"after {place}", fontsize="medium")
        if number:
            axes.tick_params(labelleft=False)
        else:
            _names(chart, axes, shown_rows, [row.name for row in drawn] if has_curves else [])
    if has_curves:
        _lines(grid[0][-1], drawn, metric, logarithmic, unit)
        grid[0][-1].set_title(f"by {unit}" + ", where it differs" * (len(drawn) < len(rows)), fontsize="medium")
    chart.suptitle(title or title_of(settings, metric))
    chart.supxlabel(_about_runs(rows, shown_rows), fontsize="small")
    store(chart, path)


def title_of(settings: Sequence[Setting], metric: str) -> str:
    """Data, model and what is varied."""
    configs = [setting.config for setting in settings]
    data, models = (", ".join(sorted({getattr(c, name) for c in configs})) for name in ("dataset", "model_name"))
    lengths = {f"{c.epochs} epochs" if c.steps is None else f"{c.steps} steps" for c in configs}
    passes = f", {lengths.pop()}" if len(lengths) == 1 else ""
    return f"{data}, {models}{passes}: {_words(metric)} by what is rounded"


def _words(metric: str) -> str:
    return metric.replace("_", " ").replace("mse", "MSE").replace("rMSE", "RMSE")


def axis_label(metric: str) -> str:
    """What an axis of the metric is called."""
    return _words(metric) + (" (%)" if is_percent(metric) else "")


def factor(metric: str) -> int:
    """What a value is drawn times: an accuracy is in percent."""
    return 100 if is_percent(metric) else 1


def _rows(settings: Sequence[Setting], metric: str, panels: Sequence[int | None]) -> list[Row]:
    """The best one first; last the settings without a value."""
    times, rows, unit = factor(metric), [], common_unit(settings)
    for setting, name, its_look in zip(settings, names(settings), _looks(settings), strict=True):
        by_epoch: dict[float, list[float]] = {}
        for run in setting.runs:
            for line in run.history:
                if (value := line.get(metric)) is not None:
                    by_epoch.setdefault(line[unit], []).append(times * value)
        ends = [[times * value for value in setting.values(metric, epoch)] for epoch in panels]
        rows.append(Row(setting, _wrapped(name), its_look, ends, dict(sorted(by_epoch.items()))))
    sign = -1 if is_percent(metric) else 1
    return sorted(rows, key=lambda row: math.inf if row.last is None else sign * row.last)


def _looks(settings: Sequence[Setting]) -> list[Look]:
    """Each setting's own look; of settings that differ in their training or in single modules alone, the later ones
    take free colours.
    """
    looks: list[Look] = []
    for number, setting in enumerate(settings):
        its_look = look(setting)
        used = {other.colour for other in looks}
        free = [colour for colour in (*COLOURS, *OTHER_COLOURS) if colour not in used]
        if free and any(other.rules == setting.rules for other in settings[:number]):
            its_look = replace(its_look, colour=free[0])
        looks.append(its_look)
    return looks


def _wrapped(name: str) -> str:
    """In lines of WRAP letters at most; between the parts of a name where that is possible."""
    lines = [""]
    for part in name.split("; "):
        joined = f"{lines[-1]}; {part}" if lines[-1] else part
        if len(joined) <= WRAP:
            lines[-1] = joined
        else:
            lines[-1] += ";" * bool(lines[-1])
            lines += textwrap.wrap(part, WRAP) if lines[-1] else []
            lines = lines if lines[0] else textwrap.wrap(part, WRAP)
    return "\n".join(lines)


def _only_baseline(rows: Sequence[Row], settings: Sequence[Setting]) -> Row | None:
    """The row that all settings are compared with; None where there are several, or none."""
    compared = {id(baseline_of(setting, settings)) for setting in settings}
    return next((row for row in rows if compared == {id(row.setting)}), None)


def _fewer(rows: Sequence[Row], baseline: Row | None) -> list[Row]:
    """So many that they can be read: the best, the worst and the baseline."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    half = MOST_ROWS // 2
    return [row for n, row in enumerate(rows) if n < half or n >= len(rows) - half or row is baseline]


def _placed(rows: Sequence[Row]) -> list[Row]:
    place, placed = 0.0, []
    for row in rows:
        placed.append(replace(row, place=place + (row.lines + GAP) / 2))
        place += row.lines + GAP
    return placed


def _is_logarithmic(values: Sequence[float], metric: str) -> bool:
    return bool(values) and 0 < MANY_TIMES * min(values) < max(values) and not is_percent(metric)


def _that_differ(rows: Sequence[Row], baseline: Row | None, logarithmic: bool) -> list[Row]:
    """The baseline, or the best one; then the others, the farthest first, but for those that run along one of these.

    One of each colour and line, as curves that cross cannot be told apart by their marks.
    """
    if not rows:
        return []

    def curve(row: Row) -> dict[float, float]:
        medians = {epoch: statistics.median(values) for epoch, values in row.by_epoch.items()}
        return {epoch: math.log(value) for epoch, value in medians.items() if value > 0} if logarithmic else medians

    lines = {row.name: curve(row) for row in rows}
    every = [value for line in lines.values() for value in line.values()]
    span = (max(every) - min(every) if every else 0.0) or 1.0

    def distance(row: Row, other: Row) -> float:
        both = lines[row.name].keys() & lines[other.name].keys()
        late = [epoch for epoch in both if 2 * epoch >= max(both)]  # the first half may differ by its noise
        return statistics.fmean(abs(lines[row.name][e] - lines[other.name][e]) for e in late) / span if late else 1.0

    drawn = [baseline or rows[0]]
    for row in sorted(rows, key=lambda row: -distance(row, drawn[0])):
        alike = any((row.look.colour, row.look.line) == (other.look.colour, other.look.line) for other in drawn)
        if len(drawn) < MOST_CURVES and not alike and min(distance(row, other) for other in drawn) >= APART:
            drawn.append(row)
    return drawn


def _marks(axes: Any, rows: Sequence[Row], panel: int, metric: str, logarithmic: bool) -> None:
    """Median and band of each row, and beside them the value in figures."""
    ends = {row.place: (*band(row.ends[panel]), statistics.median(row.ends[panel])) for row in rows if row.ends[panel]}
    low, high = (-math.inf, math.inf) if logarithmic else _fence([value for three in ends.values() for value in three])
    for row in rows:
        text = _value(row, panel, metric)
        axes.text(1.03, row.place, text, transform=axes.get_yaxis_transform(), va="center", fontsize="small")
        if row.place not in ends:
            continue
        left, right, middle = ends[row.place]
        style = {"color": row.look.colour, "markersize": 7, "clip_on": False, "zorder": 3}
        if low <= middle <= high:
            spread = [[middle - left], [right - middle]] if right > left else None
            axes.errorbar(middle, row.place, xerr=spread, marker=row.look.mark, capsize=3, **style | {"clip_on": True})
        else:  # an arrow at the edge, where it stands in the axes' own units
            edge = 0.015 if middle < low else 0.985
            mark = "<" if middle < low else ">"
            axes.plot(edge, row.place, marker=mark, transform=axes.get_yaxis_transform(), **style)
    if logarithmic:
        axes.set_xscale("log")
    inside = [three for three in ends.values() if low <= three[2] <= high]
    if len(inside) < len(ends):
        span = max(max(three) for three in inside) - min(min(three) for three in inside)
        axes.set_xlim(min(map(min, inside)) - 0.1 * span, max(map(max, inside)) + 0.1 * span)
    if rows:
        axes.set_ylim(rows[-1].place + (rows[-1].lines + GAP) / 2, 0)
    axes.set_yticks([row.place for row in rows], [""] * len(rows))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(axis_label(metric))


def _fence(values: Sequence[float]) -> tuple[float, float]:
    """What lies outside would squeeze all others into a corner of the axis."""
    if len(values) < 8:
        return -math.inf, math.inf
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    far = FAR * (high - low) if high > low else math.inf
    return low - far, high + far


def _value(row: Row, panel: int, metric: str) -> str:
    values = row.ends[panel]
    text = shown(statistics.median(values), metric) if values else "-"
    diverged = sum(run.status == "diverged" for run in row.setting.runs) if len(values) < len(row.setting.runs) else 0
    return text + f", {diverged} diverged" * bool(diverged)


def shown(value: float, metric: str) -> str:
    """A value as it is drawn: an accuracy is in percent already."""
    digits = 4 if 1 <= abs(value) < 10 else 3  # as many behind the point as just below 1
    return f"{value:.1f}" if is_percent(metric) else f"{value:#.{digits}g}".removesuffix(".")


def _names(chart: Any, axes: Any, rows: Sequence[Row], with_curves: Sequence[str]) -> None:
    """The rows' names; between name and axis, a piece of the curve of those that have one."""
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    axes.set_yticks([row.place for row in rows], [row.name for row in rows], fontsize="small")
    axes.tick_params(axis="y", pad=6 + 72 * KEY)
    inches = chart.dpi_scale_trans + ScaledTranslation(0, 0, axes.transAxes)  # from the left edge of the axes
    for row in rows:
        if row.name in with_curves:
            axes.plot(
                [-KEY, -0.04],
                [row.place] * 2,
                transform=blended_transform_factory(inches, axes.transData),
                clip_on=False,
                color=row.look.colour,
                linestyle=row.look.line,
                linewidth=2,
            )


def _lines(axes: Any, rows: Sequence[Row], metric: str, logarithmic: bool, unit: str) -> None:
    """The median of each row by epoch or step, its mark at the end, and a band where there are several runs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    for row in reversed(rows):  # the baseline on top
        epochs = list(row.by_epoch)
        if not epochs:
            continue
        style = {"color": row.look.colour, "linestyle": row.look.line, "linewidth": 2}
        middle = [statistics.median(row.by_epoch[epoch]) for epoch in epochs]
        axes.plot(epochs, middle, marker=row.look.mark, markersize=7, markevery=[-1], **style)
        if len(row.setting.runs) > 1:
            low, high = zip(*(band(row.by_epoch[epoch]) for epoch in epochs), strict=True)
            axes.fill_between(epochs, low, high, color=row.look.colour, alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if unit == "epoch" and max((epoch for row in rows for epoch in row.by_epoch), default=0) >= MANY_EPOCHS:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda epoch, _: f"{epoch:g}"))
    if logarithmic:
        axes.set_yscale("log")
    axes.set(xlabel=unit, ylabel=axis_label(metric))
    axes.spines[["top", "right"]].set_visible(False)


def _last_place(settings: Sequence[Setting]) -> str:
    places = {f"{setting.unit} {setting.last}" for setting in settings}
    return places.pop() if len(places) == 1 else f"the last {units(settings, one=True)}"


def _about_runs(rows: Sequence[Row], shown_rows: Sequence[Row]) -> str:
    counts = sorted({len(row.setting.runs) for row in rows})
    text = "one run of each setting"
    if counts[-1] > 1:
        number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        text = f"median of {number} runs of each setting; bars and bands: 5 % to 95 % of them"
    hidden = len(rows) - len(shown_rows)
    return text + f"; {hidden} settings between the best and the worst are not shown" * bool(hidden)
