"""layers.jsonl and shadow.jsonl, what a watched run leaves, made small enough for a page.

A file has a line for each watched step, layer and site. Here it becomes a matrix for each statistic, a row for each
layer and site, a column for each step; of many steps some are picked, evenly, the first and the last among them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from low_precision.errors import SettingError
from low_precision.formats import BlockFormat
from low_precision.rules import OPERANDS, SITES, rule_of
from low_precision.tables import Table

MOST_STEPS, FEWEST_STEPS = 120, 20  # columns of a matrix
HISTOGRAMS = 12  # steps of which the exponents are kept
KEYS = ("step", "layer", "site", "rule", "also")  # the fields of a line that are no statistic


@dataclass(frozen=True)
class Statistic:
    """How people read one. kind: share, decibel, size (on a logarithmic scale), cosine, signed or step.

    worse: "high" or "low", where one end of its scale is the bad one.
    """

    label: str
    kind: str
    worse: str = ""
    text: str = ""


STATISTICS = {
    "flushed": Statistic("flushed to zero", "share", "high", "share of the numbers that rounding made zero"),
    "subnormal": Statistic("subnormal", "share", "high", "share of the numbers below the smallest normal one"),
    "saturated": Statistic("saturated", "share", "high", "share of the numbers cut off at the largest one"),
    "not_finite": Statistic("not finite", "share", "high", "share of NaN and infinities"),
    "sqnr_db": Statistic("signal to noise (dB)", "decibel", "low", "signal-to-quantization-noise ratio"),
    "bias": Statistic("relative bias", "signed", "", "mean of the rounding errors, relative"),
    "amax": Statistic("largest magnitude", "size", "", "amax, before rounding"),
    "scale_min": Statistic("smallest scale", "size", "", "what an element is multiplied by to give its number"),
    "scale_max": Statistic("largest scale", "size", "", "what an element is multiplied by to give its number"),
    "lost_updates": Statistic(
        "lost updates", "share", "high", "share of non-zero updates that left a weight as it was"
    ),
    "updates": Statistic("non-zero updates", "number", "", "how many numbers had an update that was not zero"),
    "update_norm": Statistic("norm of the update", "size", "", "of the exact update"),
    "arrived_norm": Statistic("norm that arrived", "share", "low", "share of the update's norm that arrived"),
    "update_cosine": Statistic("cosine of the update", "cosine", "low", "cosine of what arrived to the exact update"),
    "last_moved": Statistic("last step it moved", "step", "low", "the last step at which any weight moved"),
    "error": Statistic("error of the product", "size", "high", "relative error (Frobenius) of y, dx or dW"),
    "weights_distance": Statistic("distance of weights", "size", "high", "relative, to the same training in float32"),
    "gradient_cosine": Statistic("cosine of gradients", "cosine", "low", "to the same training in float32"),
    "loss_difference": Statistic("difference of losses", "signed", "high", "loss less that of float32"),
}


def statistic(name: str) -> Statistic:
    """That of the table, or one made of its name: a newer version may write more."""
    return STATISTICS.get(name) or Statistic(name.replace("_", " "), "number")


def digits(value: Any, count: int = 4) -> Any:
    """A number with so many significant digits; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{count}g}")


def picked(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


@dataclass(frozen=True)
class Size:
    """What a file holds: its steps in their order, and how many rows each has (of the first one)."""

    steps: list[int]
    rows: int


def size_of(path: Path) -> Size | None:
    """None where there is no such file, or no whole line in it yet."""
    counts: dict[int, int] = {}
    try:
        for step, _ in _lines(path):
            counts[step] = counts.get(step, 0) + 1
    except OSError:
        return None
    return Size(sorted(counts), max(counts.values())) if counts else None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Step and text of each whole line. ValueError for a line that has no step."""
    with open(path) as file:
        for line in file:
            if not line.endswith("\n"):
                return  # it is being written
            if line.startswith('{"step": '):  # reading the step alone spares most of the time
                yield int(line[9:].partition(",")[0].rstrip("}\n")), line
            elif line.strip():
                yield int(json.loads(line)["step"]), line


def reduced(path: Path, size: Size, most_steps: int) -> dict[str, Any]:
    """The matrices of a file: {"steps", "of", "rows", "values", "exponents", "ranges"}.

    steps: those kept, of `of`. rows: [layer, site, rule, also] of each row, layers in the order of the file.
    values: statistic -> for each row its values by step (None where there is none), or None for a row without any.
    exponents: {"columns": places in `steps`, "counts": for each row, [lowest, counts] by column}.
    ranges: rule -> `range_of` it. ValueError or KeyError for a file that is none of these.
    """
    steps = picked(size.steps, most_steps)
    columns = {step: column for column, step in enumerate(steps)}
    with_counts = {step: place for place, step in enumerate(picked(steps, HISTOGRAMS))}
    rows: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for step, text in _lines(path):
        if step not in columns:
            continue
        line = json.loads(text)
        key = str(line["layer"]), str(line.get("site", "")), line.get("also")
        row = rows.setdefault(key, {"rule": None, "values": {}, "counts": [None] * len(with_counts)})
        row["rule"] = line.get("rule", row["rule"])
        for name, value in line.items():
            if name == "exponents":
                if value and step in with_counts:
                    row["counts"][with_counts[step]] = [int(value["lowest"]), list(map(int, value["counts"]))]
            elif name not in KEYS and name != "numbers":
                row["values"].setdefault(name, [None] * len(steps))[columns[step]] = digits(value, 3)
    keys = _ordered(list(rows))
    names = dict.fromkeys(name for key in keys for name in rows[key]["values"])
    known = [name for name in STATISTICS if name in names] + [name for name in names if name not in STATISTICS]
    rules = dict.fromkeys(rows[key]["rule"] for key in keys)
    return {
        "steps": steps,
        "of": len(size.steps),
        "rows": [[layer, site, rows[layer, site, also]["rule"], also] for layer, site, also in keys],
        "values": {name: [rows[key]["values"].get(name) for key in keys] for name in known},
        "exponents": {
            "columns": [columns[step] for step in with_counts],
            "counts": [rows[key]["counts"] if any(rows[key]["counts"]) else None for key in keys],
        },
        "ranges": {rule: its_range for rule in rules if rule and (its_range := range_of(rule))},
    }


def _ordered(keys: list[tuple[str, str, str | None]]) -> list[tuple[str, str, str | None]]:
    """Layers as they come in the file, each with its sites in the order of the documentation."""
    layers = {layer: place for place, layer in enumerate(dict.fromkeys(layer for layer, _, _ in keys))}
    sites = {site: place for place, site in enumerate((*SITES, *OPERANDS))}
    others = {also: place for place, also in enumerate(dict.fromkeys(also for _, _, also in keys))}
    return sorted(keys, key=lambda key: (layers[key[0]], sites.get(key[1], len(sites)), key[1], others[key[2]]))


@functools.cache
def range_of(rule: str) -> dict[str, Any] | None:
    """Where the magnitudes of a rule's format lie, as base-2 logarithms: {"lowest", "normal", "largest", "scaled"}.

    lowest: of the smallest magnitude above zero; normal: of the smallest normal one, equal to it for a table of values.
    scaled: whether they are those of elements, which a scale moves. None for a rule whose format nobody can look up.
    """
    try:
        number_format = rule_of(rule.partition(">")[2] or rule).format
    except (SettingError, ValueError, OSError):
        return None
    scaled = isinstance(number_format, BlockFormat)
    element = number_format.element if isinstance(number_format, BlockFormat) else number_format
    if isinstance(element, Table):
        magnitudes = [abs(value) for value in element.values if value]
        lowest, normal, largest = min(magnitudes), min(magnitudes), max(magnitudes)
    else:
        lowest, normal, largest = element.smallest_subnormal, element.smallest_normal, element.largest
    lowest, normal, largest = (round(math.log2(value), 3) for value in (lowest, normal, largest))
    return {"lowest": lowest, "normal": normal, "largest": largest, "scaled": scaled, "format": number_format.name}
