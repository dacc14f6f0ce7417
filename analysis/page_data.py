"""What a page of runs shows, as plain data: settings, what differs between them, curves, last values, watched layers.

All statistics are made here; the page only draws. It must stay small for a sweep of thousands of runs, so numbers keep
four significant digits, and curves as many epochs, layers as many steps, as fit.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from analysis.figures import axis_label, title_of
from analysis.run import common_unit, units
from analysis.runs import (
    NOT_IN_FLAGS,
    ROUNDING_FIELDS,
    Run,
    Setting,
    baseline_of,
    codes,
    flags_text,
    metrics_of,
    names,
    settings_of,
)
from analysis.tables import Summary, band, interval, is_percent, summary
from analysis.watched import (
    FEWEST_STEPS,
    MOST_STEPS,
    Size,
    digits,
    picked,
    reduced,
    size_of,
    statistic,
)
from lab.step_lines import LAYERS, SHADOW
from settings.config import Config, flag
from settings.flags import REPEATABLE, flags_of

MOST_EPOCHS, FEWEST_EPOCHS = 200, 12  # of a curve
CURVE_NUMBERS = 400_000  # of all curves: about 3 bytes each in the file
LAYER_NUMBERS = 1_500_000  # of all layers: about 1.2 bytes each
STATISTICS_A_ROW = 9  # about, of a row of layers.jsonl
HISTOGRAM_NUMBERS = 200  # about, of a row
DRAWN = 8  # settings that are drawn at first


def page_data(runs: Sequence[Run], metric: str, page_folder: Path, title: str = "") -> dict[str, Any]:
    """All that the page shows. page_folder: where the page will lie, from which links to records lead."""
    settings = settings_of(runs)
    place = {id(run): number for number, run in enumerate(run for setting in settings for run in setting.runs)}
    ordered = [run for setting in settings for run in setting.runs]
    metrics = metrics_of(runs)
    columns, cells = differences([setting.config for setting in settings])
    ended = [Setting(s.config, tuple(run for run in s.runs if run.ended)) for s in settings]
    baselines = [baseline_of(setting, ended) for setting in ended]
    data: dict[str, Any] = {
        "title": title or title_of(settings, metric),
        "unit": common_unit(settings),
        "units": units(settings),
        "metric": metric,
        "metrics": [{"name": m, "label": axis_label(m), "percent": is_percent(m)} for m in metrics],
        "statuses": Counter(run.status for run in runs).most_common(),
        "codes": codes(runs).most_common(),
        "common": common_flags([setting.config for setting in settings]),
        "columns": columns,
        "settings": [
            {
                "name": name,
                "flags": flags_text(setting.config),
                "cells": line,
                "runs": [place[id(run)] for run in setting.runs],
                "rounds": setting.rounds,
            }
            for name, setting, line in zip(names(settings), settings, cells, strict=True)
        ],
        "table": {
            name: [_line(summary(*pair, name, None), name == metric) for pair in zip(ended, baselines, strict=True)]
            for name in metrics
        },
        "drawn": _drawn(ended, metric),
        "runs": _runs(ordered, metrics, page_folder),
        "curves": _curves(settings, metrics),
        "statistics": {},
    }
    for name in (LAYERS, SHADOW):
        data[name.removesuffix(".jsonl")] = watched = _watched(settings, place, name)
        for one in watched["runs"]:
            data["statistics"] |= {key: vars(statistic(key)) for key in one["values"]}
    return data


def differences(configs: Sequence[Config]) -> tuple[list[str], list[list[str]]]:
    """The flags in which some of them differ beside the seeds, and the values of each."""
    texts = [_texts(config) for config in configs]
    shown = [f.name for f in fields(Config) if f.name not in NOT_IN_FLAGS and len({line[f.name] for line in texts}) > 1]
    order = sorted(shown, key=lambda name: name not in ROUNDING_FIELDS)  # what is rounded comes first
    return [flag(name) for name in order], [[line[name] for name in order] for line in texts]


def _texts(config: Config) -> dict[str, str]:
    """Each field for people; of what may be repeated, such as --site, what a recipe does not bring."""
    flags = flags_of(config)
    said = {name: [flags[i + 1] for i, word in enumerate(flags) if word == flag(name)] for name in REPEATABLE}
    values = {f.name: tuple(said[f.name]) if f.name in said else getattr(config, f.name) for f in fields(Config)}
    values["epochs"] = None if config.steps is not None else config.epochs
    return {name: _text(value) for name, value in values.items()}


def common_flags(configs: Sequence[Config]) -> list[str]:
    """What all of them share beside the defaults, as flags with their values."""
    first, defaults = configs[0], {f.name: f.default for f in fields(Config)}
    alike = [name for name in defaults if all(getattr(config, name) == getattr(first, name) for config in configs)]
    told = [name for name in alike if name not in NOT_IN_FLAGS and getattr(first, name) != defaults[name]]
    if "dataset" in alike and "dataset" not in told:
        told.insert(0, "dataset")
    return [f"{flag(name)} {_text(getattr(first, name))}" for name in told]


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _line(one: Summary, with_interval: bool) -> list[Any]:
    """[median, 5th, 95th percentile, values, mean difference, the ends of its interval, median difference, pairs,
    diverged]: what settings.js reads by these places.
    """
    middle: list[Any] = [None] * 3
    if one.values:
        middle = [statistics.median(one.values), *band(one.values)]
    apart: list[Any] = [None] * 4
    if one.differences:
        ends = (interval(one.differences) if with_interval else None) or (None, None)
        apart = [statistics.fmean(one.differences), *ends, statistics.median(one.differences)]
    counts = len(one.differences or []), one.diverged
    return [*map(digits, middle), len(one.values), *map(digits, apart), *counts]


def _drawn(settings: Sequence[Setting], metric: str) -> list[int]:
    """Which settings are drawn at first: what rounds nothing, then those that end best."""
    if len(settings) <= DRAWN:
        return list(range(len(settings)))
    sign = -1 if is_percent(metric) else 1
    ends = {i: s.values(metric) for i, s in enumerate(settings)}
    ranked = sorted((i for i in ends if ends[i]), key=lambda i: sign * statistics.median(ends[i]))
    plain = [i for i, setting in enumerate(settings) if not setting.rounds][:2]
    chosen = [*plain, *(i for i in [*ranked, *ends] if i not in plain)]
    return sorted(list(dict.fromkeys(chosen))[:DRAWN])


def _runs(runs: Sequence[Run], metrics: Sequence[str], page_folder: Path) -> dict[str, Any]:
    """The runs, in columns. folders: links to their records, from the page."""
    statuses = list(dict.fromkeys(run.status for run in runs))
    return {
        "seeds": [run.seed for run in runs],
        "rounding_seeds": [run.config.noise_seed for run in runs],
        "statuses": statuses,
        "status": [statuses.index(run.status) for run in runs],
        "epochs": [run.last for run in runs],
        "of": [run.planned for run in runs],
        "seconds": [digits(run.seconds) for run in runs],
        "folders": [_link(run.folder, page_folder) if run.folder else "" for run in runs],
        "remarks": [list(run.remarks) for run in runs] if any(run.remarks for run in runs) else [],
        "ends": {metric: [digits(run.value(metric)) for run in runs] for metric in metrics},
    }


def _link(folder: Path, page_folder: Path) -> str:
    """Relative, so that page and records may be moved together."""
    try:
        return quote(Path(os.path.relpath(folder.resolve(), page_folder.resolve())).as_posix()) + "/"
    except ValueError:  # another drive
        return folder.resolve().as_uri() + "/"


def _curves(settings: Sequence[Setting], metrics: Sequence[str]) -> dict[str, Any]:
    """For each setting its epochs (steps, where all runs have them), and by metric the median, the 5th and the 95th
    percentile, and each run's values.

    Epochs are those of its longest run, or some of them, evenly; "of" is how many there are. A run that has not come so
    far, or diverged before, does not count there.
    """
    runs, unit = sum(len(setting.runs) for setting in settings), common_unit(settings)
    number = CURVE_NUMBERS // max(1, len(metrics) * (3 * len(settings) + runs))
    most = min(MOST_EPOCHS, max(FEWEST_EPOCHS, number))
    made = []
    for setting in settings:
        every = sorted({line[unit] or 0 for run in setting.runs for line in run.history})
        epochs = picked(every, most)
        lines = [{line[unit]: line for line in run.history} for run in setting.runs]
        by_metric = {}
        for metric in metrics:
            each = [[digits(line.get(epoch, {}).get(metric)) for epoch in epochs] for line in lines]
            if any(value is not None for values in each for value in values):
                by_metric[metric] = _with_bands(each)
        made.append({"epochs": epochs, "of": len(every), "metrics": by_metric})
    return {"settings": made, "most": most}


def _with_bands(each: list[list[float | None]]) -> dict[str, Any]:
    """{"runs": as they are} of one run, and of several the median, low and high, and the number of runs beside them."""
    if len(each) == 1:
        return {"runs": each}
    bands: dict[str, list[Any]] = {"median": [], "low": [], "high": [], "number": []}
    for column in zip(*each, strict=True):
        values = [value for value in column if value is not None]
        low, high = band(values) if values else (None, None)
        middle = statistics.median(values) if values else None
        for name, value in zip(bands, (middle, low, high, len(values)), strict=True):
            bands[name].append(digits(value))
    return {"runs": each, **bands}


def _watched(settings: Sequence[Setting], place: dict[int, int], name: str) -> dict[str, Any]:
    """The runs that have such a file, reduced, and how many there are: one of each setting first, as many as fit."""
    longest = max(len(setting.runs) for setting in settings)
    turns = [s.runs[turn] for turn in range(longest) for s in settings if turn < len(s.runs)]
    # A run that rounds nothing leaves an empty file.
    files = [(run, run.folder / name) for run in turns if run.folder]
    there = [(run, path) for run, path in files if path.is_file() and path.stat().st_size]
    chosen: list[tuple[Run, Path, Size]] = []
    left = LAYER_NUMBERS
    for run, path in there:
        size = size_of(path)
        if size is None:
            continue
        left -= size.rows * (STATISTICS_A_ROW * min(FEWEST_STEPS, len(size.steps)) + HISTOGRAM_NUMBERS)
        if left < 0 and chosen:
            break
        chosen.append((run, path, size))
    rows = sum(size.rows for _, _, size in chosen)
    most = MOST_STEPS
    if rows:
        fit = (LAYER_NUMBERS - rows * HISTOGRAM_NUMBERS) // (rows * STATISTICS_A_ROW)
        most = min(MOST_STEPS, max(FEWEST_STEPS, fit))
    made = []
    for run, path, size in sorted(chosen, key=lambda one: place[id(one[0])]):
        try:
            made.append({"run": place[id(run)], **reduced(path, size, most)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no file of a watched run: {' '.join(str(error).split())}") from None
    return {"runs": made, "there": len(there)}
