"""Figures of runs. Colours: Okabe and Ito 2008, which the colour-blind tell apart, and cividis; white behind them."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.runs import Run, by_setting
from low_precision.formats import FLOAT32

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D")  # of the epochs of a table
BIT_WIDTHS = re.compile(r"e([2-8])m(\d+) (\S+)")  # the settings of a map
LETTERS = 10.5  # of a label, to an inch of a figure's width
MANY_EPOCHS = 100  # from here on, their axis is logarithmic
MANY_TIMES = 50.0  # and that of the metric, where it spans so much


def is_percent(metric: str) -> bool:
    return metric.endswith("accuracy")


def band(values: Sequence[float]) -> tuple[float, float]:
    """The 5th and the 95th percentile."""
    if len(values) == 1:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[0], cuts[-1]


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files, in this project's style."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "low_precision_ml"})
    return plt


def look(number: int) -> dict[str, str]:
    """The colour and the line of the curve of this number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}


def store(chart: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {"Software": None} if path.suffix == ".png" else {"Date": None}  # the same bytes from the same runs
    chart.savefig(path, dpi=150, metadata=kept)
    pyplot().close(chart)


def curves(runs: Sequence[Run], metric: str, path: Path, title: str, epochs: Sequence[int] = ()) -> None:
    """`metric` by epoch: the median of each setting, and a band from the 5th to the 95th percentile of its runs.

    Where a setting has several runs, a second panel has their medians and bands after each of `epochs` (or the last).
    """
    plt = pyplot()
    groups = by_setting(runs)
    several = max(len(group) for group in groups.values()) > 1
    width = 10 if several else 8
    labels = [_label(setting, group, metric, int(width * LETTERS)) for setting, group in groups.items()]
    height = 4.2 + 0.27 * sum(label.count("\n") + 1 for label in labels)
    if several:
        chart, (axes, ends) = plt.subplots(
            1, 2, figsize=(width, height), layout="constrained", width_ratios=(3, 2), sharey=True
        )
    else:
        chart, axes = plt.subplots(figsize=(width, height), layout="constrained")
    longest = max((run.epochs for run in runs), default=0)
    middles: list[float] = []
    for number, (label, group) in enumerate(zip(labels, groups.values(), strict=True)):
        found = _by_epoch(group, metric)
        places = sorted(found)
        middle = [statistics.median(found[e]) for e in places]
        middles += middle
        mark = {"marker": "o", "markersize": 3} if len(places) <= 40 else {}
        axes.plot(places, middle, label=label, linewidth=3.2 if number == 0 else 1.8, **mark, **look(number))
        if len(group) > 1 and places:
            low, high = zip(*(band(found[e]) for e in places), strict=True)
            axes.fill_between(places, low, high, color=look(number)["color"], alpha=0.18, linewidth=0)
        if several:
            _ends(ends, group, metric, number, len(groups), epochs or (longest,))
    if middles and min(middles) > 0 and max(middles) > MANY_TIMES * min(middles) and not is_percent(metric):
        axes.set_yscale("log")
    if longest >= MANY_EPOCHS:
        axes.set_xscale("log")
    axes.set(xlabel="epoch", ylabel=metric.replace("_", " ") + (" (%)" if is_percent(metric) else ""))
    if several:
        axes.set_title("median by epoch; band: 5 % to 95 % of the runs", fontsize="medium")
        ends.set_title("median and 5 % to 95 % of the runs", fontsize="medium")
        ends.set_xticks(range(len(epochs or (longest,))), [f"after epoch {e}" for e in epochs or (longest,)])
        ends.set_xlim(-0.5, len(epochs or (longest,)) - 0.5)
        ends.grid(False, axis="x")
    chart.suptitle(title)
    chart.legend(*axes.get_legend_handles_labels(), loc="outside lower center", title="what is rounded: last median")
    store(chart, path)


def _ends(axes: Any, group: Sequence[Run], metric: str, number: int, count: int, epochs: Sequence[int]) -> None:
    """The marks of setting `number` of `count`, side by side around each epoch's place."""
    factor = 100 if is_percent(metric) else 1
    for place, epoch in enumerate(epochs):
        values = [factor * v for run in group if (v := run.value(metric, epoch)) is not None]
        if values:
            middle, (low, high) = statistics.median(values), band(values)
            axes.errorbar(
                place + 0.7 * (number - (count - 1) / 2) / count,
                middle,
                [[middle - low], [high - middle]],
                color=look(number)["color"],
                marker=MARKS[number // len(COLOURS) % len(MARKS)],
                capsize=3,
            )


def _shown(value: float, metric: str) -> str:
    return f"{value:.1f} %" if is_percent(metric) else f"{value:.3g}"


def _by_epoch(group: Sequence[Run], metric: str) -> dict[int, list[float]]:
    """The metric of each run that has it, by epoch, as it is drawn."""
    factor, found = 100 if is_percent(metric) else 1, {}
    for run in group:
        for line in run.history:
            if line.get(metric) is not None:
                found.setdefault(int(line["epoch"]), []).append(factor * line[metric])
    return found


def _label(setting: str, group: Sequence[Run], metric: str, letters: int) -> str:
    """What the legend says of a setting, in lines of so many letters at most."""
    found = _by_epoch(group, metric)
    last = _shown(statistics.median(found[max(found)]), metric) if found else "-"
    count = f" (n = {len(group)})" if len(group) > 1 else ""
    return textwrap.fill(f"{setting}: {last}{count}", letters, subsequent_indent="    ")


def _widths(runs: Sequence[Run]) -> dict[str, dict[tuple[int, int], list[Run]]]:
    """By rounding, then by exponent and mantissa bits: the runs whose format is an eXmY, everything rounded to it."""
    found: dict[str, dict[tuple[int, int], list[Run]]] = {}
    for run in runs:
        if match := BIT_WIDTHS.fullmatch(run.setting):
            found.setdefault(match[3], {}).setdefault((int(match[1]), int(match[2])), []).append(run)
    return found


def has_bit_widths(runs: Sequence[Run], metric: str, epochs: Sequence[int] = ()) -> bool:
    """Whether there is anything for `bit_widths` to show."""
    epoch = epochs[-1] if epochs else None
    groups = [group for places in _widths(runs).values() for group in places.values()]
    return any(run.value(metric, epoch) is not None for group in groups for run in group)


def bit_widths(runs: Sequence[Run], metric: str, path: Path, title: str, epochs: Sequence[int] = ()) -> None:
    """The median of `metric` at the end by exponent and mantissa bits of the format, a panel for each rounding."""
    from matplotlib.colors import LogNorm, Normalize

    maps = _widths(runs)
    plt = pyplot()
    factor = 100 if is_percent(metric) else 1
    epoch = epochs[-1] if epochs else None
    values = {
        rounding: {
            bits: factor * statistics.median(there)
            for bits, group in places.items()
            if (there := [v for run in group if (v := run.value(metric, epoch)) is not None])
        }
        for rounding, places in maps.items()
    }
    alone = [run.value(metric, epoch) for run in runs if run.setting == FLOAT32.name]
    every = [value for places in values.values() for value in places.values()]
    positive = min(every) > 0 and max(every) > 2 * min(every) and not is_percent(metric)
    norm = LogNorm(min(every), max(every)) if positive else Normalize(min(every), max(every))
    exponents = sorted({e for places in maps.values() for e, _ in places})
    mantissas = sorted({m for places in maps.values() for _, m in places})
    chart, panels = plt.subplots(
        1,
        len(maps),
        squeeze=False,
        sharey=True,
        layout="constrained",
        figsize=(1.8 + 0.42 * len(mantissas) * len(maps), 1.6 + 0.4 * len(exponents)),
    )
    colours = plt.get_cmap("cividis" if is_percent(metric) else "cividis_r")
    for axes, (rounding, places) in zip(panels[0], values.items(), strict=True):
        axes.grid(False)
        axes.set_facecolor("#dddddd")
        for (e, m), value in places.items():
            x, y, colour = mantissas.index(m), exponents.index(e), colours(norm(value))
            axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour))
            dark = sum(weight * part for weight, part in zip((0.3, 0.59, 0.11), colour[:3], strict=True)) < 0.5
            axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axes.set(xlim=(-0.5, len(mantissas) - 0.5), ylim=(-0.5, len(exponents) - 0.5), xlabel="mantissa bits")
        axes.set_xticks(range(len(mantissas)), mantissas)
        axes.set_yticks(range(len(exponents)), exponents)
        axes.set_title(rounding, fontsize="medium")
    panels[0][0].set_ylabel("exponent bits")
    name = metric.replace("_", " ") + (" (%)" if is_percent(metric) else "")
    chart.colorbar(plt.cm.ScalarMappable(norm, colours), ax=panels[0], label=f"{name}, median", fraction=0.03)
    baseline = [v for v in alone if v is not None]
    against = f"; float32: {_shown(factor * statistics.median(baseline), metric)}" if baseline else ""
    chart.suptitle(f"{title}{against}" if title else f"{name}{against}")
    store(chart, path)
