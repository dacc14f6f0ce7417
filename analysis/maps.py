"""Maps of a metric over the exponent and mantissa bits of the format. Their colours are cividis, for all eyes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from analysis.figures import axis_label, factor, pyplot, shown, store, title_of
from analysis.runs import Run, settings_of, uniform_rule
from analysis.tables import is_percent
from low_precision.formats import AnyFormat, Format
from low_precision.rounding import AnyRounding

Maps = dict[AnyRounding, dict[tuple[int, int], list[float]]]


def _widths(runs: Sequence[Run], metric: str, epoch: int | None) -> Maps:
    """By rounding, then by exponent and mantissa bits: the values of the settings with all sites in one eXmY."""
    maps: Maps = {}
    for setting in settings_of(runs):
        rule, values = uniform_rule(setting.rules), setting.values(metric, epoch)
        if rule and values and not setting.lines and _is_any_width(rule.format):
            bits = rule.format.exponent_bits, rule.format.mantissa_bits
            maps.setdefault(rule.rounding, {}).setdefault(bits, []).extend(factor(metric) * v for v in values)
    return maps


def _is_any_width(number_format: AnyFormat) -> bool:
    """Whether it is an eXmY; the named formats are not, as some of them have special values of their own."""
    if not isinstance(number_format, Format):
        return False
    name = f"e{number_format.exponent_bits}m{number_format.mantissa_bits}"
    return number_format.name == name


def has_bit_widths(runs: Sequence[Run], metric: str, epochs: Sequence[int] = ()) -> bool:
    """Whether there is anything for `bit_widths` to show."""
    return bool(_widths(runs, metric, epochs[-1] if epochs else None))


def bit_widths(runs: Sequence[Run], metric: str, path: Path, title: str = "", epochs: Sequence[int] = ()) -> None:
    """The median of `metric` at the end by exponent and mantissa bits of the format, a panel for each rounding."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    epoch = epochs[-1] if epochs else None
    maps = _widths(runs, metric, epoch)
    medians = {r: {bits: statistics.median(v) for bits, v in places.items()} for r, places in maps.items()}
    every = [value for places in medians.values() for value in places.values()]
    logarithmic = min(every) > 0 and max(every) > 2 * min(every) and not is_percent(metric)
    norm = LogNorm(min(every), max(every)) if logarithmic else Normalize(min(every), max(every))
    exponents = sorted({e for places in maps.values() for e, _ in places})
    mantissas = sorted({m for places in maps.values() for _, m in places})
    plt = pyplot()
    chart, panels = plt.subplots(
        1,
        len(maps),
        squeeze=False,
        sharey=True,
        layout="constrained",
        figsize=(1.8 + 0.38 * len(mantissas) * len(maps), 1.7 + 0.36 * len(exponents)),
    )
    colours = plt.get_cmap("cividis" if is_percent(metric) else "cividis_r")
    for axes, (rounding, places) in zip(panels[0], medians.items(), strict=True):
        axes.grid(False)
        axes.set_facecolor("#dddddd")
        for (e, m), value in places.items():
            x, y, colour = mantissas.index(m), exponents.index(e), colours(norm(value))
            axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour))
            dark = sum(weight * part for weight, part in zip((0.3, 0.59, 0.11), colour[:3], strict=True)) < 0.5
            digits = f"{value:#.2g}".removesuffix(".")
            axes.text(x, y, digits, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        axes.set(xlim=(-0.5, len(mantissas) - 0.5), ylim=(-0.5, len(exponents) - 0.5), xlabel="mantissa bits")
        axes.set_xticks(range(len(mantissas)), mantissas)
        axes.set_yticks(range(len(exponents)), exponents)
        axes.set_title(f"rounding: {rounding}", fontsize="medium")
    panels[0][0].set_ylabel("exponent bits")
    bar = chart.colorbar(
        plt.cm.ScalarMappable(norm, colours), ax=panels[0], label=axis_label(metric), fraction=0.03, pad=0.01
    )
    if logarithmic:
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    settings = settings_of(runs)
    baseline = [factor(metric) * v for s in settings if not s.rounds for v in s.values(metric, epoch)]
    against = f"; float32: {shown(statistics.median(baseline), metric)}" if baseline else ""
    chart.suptitle((title or f"{title_of(settings, metric)}") + against)
    runs_of_each = sorted({len(values) for places in maps.values() for values in places.values()})
    count = "-".join(map(str, sorted({runs_of_each[0], runs_of_each[-1]})))
    chart.supxlabel(f"median of {count} runs of each format" if count != "1" else "one run of each", fontsize="small")
    store(chart, path)
