"""Tables of runs: what each setting came to in numbers, and those numbers as people read them.

A setting's value is the median over its runs. Its difference to float32 is taken in pairs of runs of the same seed,
which share split, initial weights and order of the rows; of these differences a table has the mean, with its 95 %
confidence interval (Student's t), and the median.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.run import units
from analysis.runs import Run, Setting, baseline_of, flags_text, names, settings_of

NUMBERS = (  # the columns of `numbers`
    "setting",
    "flags",
    "runs",
    "epochs",
    "metric",
    "epoch",
    "median",
    "percentile_5",
    "percentile_95",
    "pairs",
    "mean_difference",
    "mean_difference_low",
    "mean_difference_high",
    "median_difference",
    "diverged",
    "without_value",
    "unit",
)


def is_percent(metric: str) -> bool:
    """Whether people read the metric in percent."""
    return metric.endswith("accuracy")


def band(values: Sequence[float]) -> tuple[float, float]:
    """The 5th and the 95th percentile."""
    if len(values) == 1:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[0], cuts[-1]


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of their mean, by Student's t.

    Right for normal differences however few they are, where a bootstrap's is too short: of five by a third. None of
    fewer than two, or of equal ones, which say nothing of a spread.
    """
    from scipy.special import stdtrit  # its inverse

    if len(set(differences)) < 2:
        return None
    n = len(differences)
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(differences) / n**0.5
    mean = statistics.fmean(differences)
    return mean - half, mean + half


def pairs(runs: Sequence[Run], baseline: Sequence[Run], metric: str, epoch: int | None = None) -> list[float]:
    """What each run has more than the baseline's run of its seed."""
    values = {run.seed: run.value(metric, epoch) for run in baseline}
    both = [(run.value(metric, epoch), values.get(run.seed)) for run in runs]
    return [a - b for a, b in both if a is not None and b is not None]


@dataclass(frozen=True)
class Summary:
    """One metric of one setting after one epoch (None: the last one of each run).

    differences: to the baseline's runs of the same seeds; None for the baseline itself, and where there is none.
    diverged, without_value: the runs without a value there, of both kinds.
    """

    epoch: int | None
    values: list[float]
    differences: list[float] | None
    diverged: int
    without_value: int


def summary(setting: Setting, baseline: Setting | None, metric: str, epoch: int | None) -> Summary:
    values = setting.values(metric, epoch)
    diverged = sum(run.status == "diverged" and run.value(metric, epoch) is None for run in setting.runs)
    compared = baseline is not None and baseline is not setting
    differences = pairs(setting.runs, baseline.runs, metric, epoch) if compared else None
    return Summary(epoch, values, differences, diverged, len(setting.runs) - len(values) - diverged)


def table(runs: Sequence[Run], metric: str, epochs: Sequence[int | None] = (None,)) -> list[list[str]]:
    """Lines of cells for people, the first their heads: each setting's `metric` after each of `epochs` (None: last)."""
    settings = settings_of(runs)
    summaries = [_summaries(setting, settings, metric, epochs) for setting in settings]
    every = [one.differences for line in summaries for one in line if one.differences is not None]
    unit = ", points" if is_percent(metric) else ""
    head = ["what is rounded", "runs", units(settings)]
    for epoch in epochs:
        head.append(metric.replace("_", " ") + (f", {units(settings, one=True)} {epoch}" if epoch else ""))
        if any(len(differences) > 1 for differences in every):
            head.append(f"difference to float32{unit}: mean over pairs of the same seed [95 % interval]")
            head.append("median of the pairs")
        elif every:
            head.append(f"difference to float32 with the same seed{unit}")
    lines = [head]
    for name, setting, line in zip(names(settings), settings, summaries, strict=True):
        cells = [name, str(len(setting.runs)), "-".join(map(str, _ends([run.last for run in setting.runs])))]
        for one in line:
            cells.append(_value_text(one, metric))
            if every:
                cells.append(_mean_text(one.differences or [], metric))
            if any(len(differences) > 1 for differences in every):
                cells.append(_change(statistics.median(one.differences), metric) if one.differences else "-")
        lines.append(cells)
    return lines


def _summaries(
    setting: Setting, settings: Sequence[Setting], metric: str, epochs: Sequence[int | None]
) -> list[Summary]:
    baseline = baseline_of(setting, settings)
    return [summary(setting, baseline, metric, epoch) for epoch in epochs]


def _ends(numbers: Sequence[int]) -> list[int]:
    return sorted({min(numbers), max(numbers)})


def _value_text(one: Summary, metric: str) -> str:
    text = shown(statistics.median(one.values), metric) if one.values else "-"
    if len(set(one.values)) > 1:
        text += f" ({' - '.join(shown(end, metric) for end in band(one.values))})"
    text += f"; {one.diverged} diverged" * bool(one.diverged)
    return text + f"; {one.without_value} without a value there" * bool(one.without_value)


def _mean_text(differences: Sequence[float], metric: str) -> str:
    if not differences:
        return "-"
    text = _change(statistics.fmean(differences), metric)
    if ends := interval(differences):
        text += f" [{', '.join(_change(end, metric) for end in ends)}]"
    return text


def shown(value: float, metric: str) -> str:
    """A value for people."""
    return f"{100 * value:.2f} %" if is_percent(metric) else f"{value:.4g}"


def _change(value: float, metric: str) -> str:
    return f"{100 * value:+.2f}" if is_percent(metric) else f"{value:+.2g}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([rows[0], "|---" * len(lines[0]) + "|\n", *rows[1:]])


def numbers(runs: Sequence[Run], metric: str, epochs: Sequence[int | None] = (None,)) -> str:
    """The table as a CSV text for programs: a line for each setting and epoch, a number in each column of NUMBERS.

    Metrics are as in metrics.jsonl: an accuracy is a share. A column is empty where there is no such number. epochs:
    those of the setting's longest run; epoch: the one that the line is about; both are steps where unit says so.
    """
    settings = settings_of(runs)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(NUMBERS)
    for name, setting in zip(names(settings), settings, strict=True):
        for one in _summaries(setting, settings, metric, epochs):
            low, high = band(one.values) if one.values else (None, None)
            differences = one.differences or []
            ends = interval(differences) or (None, None)
            mean, median = (f(differences) if differences else None for f in (statistics.fmean, statistics.median))
            row = [name, flags_text(setting.config), len(setting.runs), setting.last, metric]
            row += [setting.last if one.epoch is None else one.epoch]
            row += [statistics.median(one.values) if one.values else None, low, high]
            row += [len(differences), mean, *ends, median, one.diverged, one.without_value, setting.unit]
            rows.writerow([f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row])
    return text.getvalue()
