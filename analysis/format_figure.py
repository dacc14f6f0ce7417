"""A figure of formats: their values on the number line, and by magnitude; relative errors by magnitude."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.figures import COLOURS, OTHER_COLOURS, STYLES, pyplot, store
from analysis.format_data import Drawn, drawn
from low_precision.format_text import number
from low_precision.rounding import is_random
from low_precision.rules import Rule

ROW = 0.34  # inches of a format in a number line
PIXELS = 2000  # marks that are nearer than this part of the axis are one


def draw(rules: Sequence[Rule], amax: float, path: Path, title: str = "") -> None:
    """The figure of these formats; of those with scales, of a group with that amax."""
    plt = pyplot()
    shown = [drawn(rule, amax) for rule in rules]
    rows = ROW * len(rules) + 0.9
    chart, (line, powers, errors) = plt.subplots(
        3, 1, layout="constrained", figsize=(10.4, 2 * rows + 4.2), height_ratios=[rows, rows, 4.0]
    )
    names = [_name(rule, one) for rule, one in zip(rules, shown, strict=True)]
    _number_line(line, shown, names)
    _by_powers(powers, shown, names)
    _errors(errors, rules, shown, [str(rule) for rule in rules])
    errors.set_xlim(powers.get_xlim())
    if errors.lines:
        chart.legend(fontsize="small", loc="outside lower center", ncols=min(3, len(rules)), frameon=False)
    chart.suptitle(title or f"What {_and([str(rule.format) for rule in rules])} can hold")
    store(chart, path)


def _and(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]


def _name(rule: Rule, one: Drawn) -> str:
    return f"{rule.format}\n(a group with amax {number(one.amax)})" if one.amax is not None else str(rule.format)


def _look(place: int) -> dict[str, Any]:
    """The colour and the line of the format that has this place."""
    colours = [*COLOURS, *OTHER_COLOURS]
    return {"color": colours[place % len(colours)], "linestyle": STYLES[place // len(colours) % len(STYLES)]}


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _number_line(axes: Any, shown: Sequence[Drawn], names: Sequence[str]) -> None:
    """Each over its own largest magnitude, because one axis for all would crowd the others into zero."""
    for place, one in enumerate(shown):
        largest = one.largest or 1.0
        numbers = [*one.above, *(-value for value in one.below), *([0.0] if one.zero else [])]
        marks = sorted({round(value / largest * PIXELS) / PIXELS for value in numbers})
        axes.eventplot(marks, lineoffsets=place, linelengths=0.62, linewidths=0.9, colors=_look(place)["color"])
        axes.text(1.03, place, f"largest {number(one.largest)}", va="center", fontsize="small", clip_on=False)
    _rows(axes, names)
    axes.set_xlim(-1.02, 1.02)
    axes.set_xlabel("value / largest magnitude")
    axes.set_title("Values on the number line, each format over its largest magnitude", fontsize="medium", loc="left")


def _by_powers(axes: Any, shown: Sequence[Drawn], names: Sequence[str]) -> None:
    for place, one in enumerate(shown):
        marks = sorted({round(math.log2(value) * 64) / 64 for value in one.above})
        axes.eventplot(marks, lineoffsets=place, linelengths=0.62, linewidths=0.9, colors=_look(place)["color"])
    _rows(axes, names)
    ends = [math.log2(value) for one in shown for value in (*one.above[:1], *one.above[-1:])] or [0.0]
    room = max(1.0, 0.02 * (max(ends) - min(ends)))
    axes.set_xlim(min(ends) - 1 - room, max(ends) + 1 + room)
    _powers_of_two(axes)
    axes.set_title("The same by powers of two, above zero", fontsize="medium", loc="left")


def _powers_of_two(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 4, 8, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda power, _: f"$2^{{{power:.0f}}}$"))


def _errors(axes: Any, rules: Sequence[Rule], shown: Sequence[Drawn], names: Sequence[str]) -> None:
    """The largest relative error in each gap between two values."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for place, (one, name) in enumerate(zip(shown, names, strict=True)):
        points = [(math.log2(x), 100 * error) for x, error in one.curve if error > 0]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.6, **_look(place))
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 200 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.10g} %"))
    axes.set_ylabel("relative error")
    axes.set_xlabel("magnitude of the number")
    _powers_of_two(axes)
    axes.spines[["top", "right"]].set_visible(False)
    random = ", of stochastic rounding the expected one" if any(is_random(rule.rounding) for rule in rules) else ""
    title = f"Relative error: the largest between two neighbouring values{random}"
    axes.set_title(title, fontsize="medium", loc="left")
