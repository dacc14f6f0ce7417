"""Formats told on a page of text: alone, and beside each other. `python quant.py --show` and `report.py --formats`."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence

from low_precision import facts
from low_precision import group_facts as groups
from low_precision.errors import SettingError, shown
from low_precision.facts import Binade, Side
from low_precision.format_text import (
    MARKS,
    WIDTH,
    Row,
    aligned,
    below_a_line,
    error_rows,
    facts_lines,
    group_said,
    in_blocks,
    magnitudes,
    number,
    number_line,
    percent,
    power,
    range_facts,
    span,
    stretches,
    title,
    wrapped,
)
from low_precision.formats import BlockFormat
from low_precision.rounding import AnyRounding, Rounding, is_random
from low_precision.rules import Rule
from low_precision.scales import DELAYED

IN_COLUMNS = 3  # formats beside each other
MOST_NAME = 20  # characters of a name before a number line


def amax_of(text: str | None) -> float:
    """The number of --amax; 1 of None. SettingError."""
    try:
        amax = 1.0 if text is None else groups.float32(float(text))
    except (ValueError, OverflowError):
        amax = math.nan
    if not 0 < amax < math.inf:
        raise SettingError("--amax", shown(text), f"a number above 0, float32's: up to {groups.LARGEST:.9g}")
    return amax


def describe(rule: Rule, amax: float = 1.0) -> str:
    """A format with a rounding, told on a page of text. amax: of the group that is shown, of a format with scales.

    SettingError for an amax that no group can have.
    """
    fmt = rule.format
    lines = [title(rule), *wrapped(f"source: {fmt.source}"), ""]
    if isinstance(fmt, BlockFormat):
        lines += facts_lines(group_said(rule))
        lines += ["", f"an element, which times the scale is a number: {fmt.element} ({fmt.element.bits})"]
        return "\n".join([*lines, *facts_lines(range_facts(rule)), "", *_of_group(rule, amax)])
    line, below = facts.side(fmt), facts.side(fmt, is_negative=True)
    is_alike = (line.values, line.last) == (below.values, below.last)
    lines += [*facts_lines(range_facts(rule)), ""]
    lines += _drawn(line, None if is_alike else below)
    lines += ["", *_errors(facts.binades(line, rule.rounding), rule.rounding, line.last)]
    bends = is_alike and rule.rounding in (Rounding.UP, Rounding.DOWN)
    if below.smallest() and (bends or not is_alike):
        lines += ["", "below 0, in magnitudes"]
        lines += _errors(facts.binades(below, rule.rounding), rule.rounding, below.last)
    return "\n".join(lines)


def _drawn(line: Side, below: Side | None = None) -> list[str]:
    low = -below.last if below else 0.0
    return [
        f"values from {number(low)} to {number(line.last)}: {MARKS}",
        f"  {number_line(line, below)}".rstrip(),
        f"  {below_a_line(low, line.last)}",
    ]


def _errors(binades: Sequence[Binade], rounding: AnyRounding, top: float) -> list[str]:
    return aligned(error_rows(binades, rounding, top))


def _of_group(rule: Rule, amax: float) -> list[str]:
    group = groups.group(rule, amax)
    kind = groups.block_format(rule).scaling.kind
    name = "standard deviation" if kind == groups.QUEST else "amax"
    lines = [f"groups by their {name}", *aligned(group_rows(rule, amax)), ""]
    lines += [f"a group with {name} {number(amax)}"]
    if kind == groups.EXPAND:
        lines[-1] += f" whose smallest magnitude is {number(amax / groups.EXPANDED)}, raised to the power {group.scale}"
    binades = group.binades(rule.rounding)
    if not binades:
        return [*lines, "  holds zeros alone"]
    return [*lines, *_drawn(group.line), "", *_errors(binades, rule.rounding, group.top)]


def amaxes(rule: Rule, amax: float) -> list[tuple[float, float]]:
    """Groups that tell how a scale works: (amax, that of the tensor or of the steps before), float32 numbers."""
    fmt = groups.block_format(rule)
    if fmt.scale_format:
        share = groups.zero_below(rule) or 2.0**-20
        parts = sorted({1.0, 2.0**-4, 2.0**-8, 2.0**-12, 2.0**-16, 2 * share, share}, reverse=True)
    elif fmt.scaling.kind == DELAYED:
        parts = [0.25, 0.5, 1.0, 1.5, 2.0]
    elif fmt.scaling.kind in ("float32", groups.EXPAND):
        parts = [1.0]
    else:
        parts = [1.0, 1.25, 1.5, 1.75, 1.9921875]
    is_beside = fmt.scale_format or fmt.scaling.kind == DELAYED
    there = [amax * part for part in parts if groups.SMALLEST <= amax * part <= groups.LARGEST]
    return [(one, amax if is_beside else one) for one in there]


def group_rows(rule: Rule, amax: float) -> list[Row]:
    fmt = groups.block_format(rule)
    beside = "of the tensor" if fmt.scale_format else "steps before" if fmt.scaling.kind == DELAYED else ""
    is_quest = fmt.scaling.kind == groups.QUEST
    first = "deviation" if is_quest else "amax"
    becomes = "largest" if is_quest else "becomes (nearest)" if is_random(rule.rounding) else "becomes"
    rows = [(first, beside, "scale", becomes, "error", "smallest above 0", "values above 0")]
    for one, other in amaxes(rule, amax):
        group = groups.group(rule, one, other)
        used = "-" if group.line.values is None else f"{len(group.line.values)}"
        error = "-" if is_quest else percent(group.error if group.error > 1e-6 else 0.0)
        row = (f"{one:.5g}", f"{other:.5g}" if beside else "", _short(group.scale), f"{group.becomes:.5g}")
        rows.append((*row, error, f"{group.line.smallest():.5g}", used))
    return [tuple(cell for place, cell in enumerate(row) if rows[0][place]) for row in rows]


def _short(x: float) -> str:
    text = power(x)
    return text if text and "*" not in text else f"{x:.5g}"


def beside(rules: Sequence[Rule], amax: float = 1.0) -> str:
    """Formats beside each other: facts, values on a line and by powers of two, and errors by magnitude.

    Of a format with scales the errors are those of a group with that amax.
    """
    said = [facts_of(rule) for rule in rules]
    heads = [str(rule.format) for rule in rules]
    sides = [shown_line(rule, amax) for rule in rules]
    binades = [errors_of(rule, amax) for rule in rules]
    wide = min(max(map(len, heads)), MOST_NAME)
    labels = [f"  {head if len(head) <= wide else head[: wide - 1] + '…':{wide}}" for head in heads]
    lines = [*_facts_beside(said, heads), "", f"values from 0 to the largest of each: {MARKS}"]
    lines += [f"{label}  {number_line(line)}  {number(line.last)}" for label, line in zip(labels, sides, strict=True)]
    lines += ["", "values by powers of two: d where 2^d lie from one to the next (+ more than 2^9, . none)"]
    lines += magnitudes(list(zip(labels, binades, strict=True)))
    if any(isinstance(rule.format, BlockFormat) for rule in rules):
        lines += [f"  of formats with scales, in all but the first table: a group with amax {number(amax)}"]
    lines += ["", "relative error by magnitude: the largest; of stochastic rounding, of its expected value"]
    return "\n".join([*lines, *in_blocks(_errors_beside(rules, sides, binades))])


def facts_of(rule: Rule) -> dict[str, str]:
    """The facts in their order, of a format with a scale those of its element in the middle."""
    said = {"rounding": str(rule.rounding)}
    if not isinstance(rule.format, BlockFormat):
        return said | range_facts(rule)
    of_group = group_said(rule)
    first = {name: of_group.pop(name) for name in ("bits", "group", "scale")} | {"scale": _scale_word(rule)}
    return said | first | {"element": str(rule.format.element)} | range_facts(rule) | of_group


def _scale_word(rule: Rule) -> str:
    """As it stands in a format's name."""
    fmt = groups.block_format(rule)
    return f"{fmt.scaling}, and float32 for the tensor" if fmt.scale_format else str(fmt.scaling)


def in_order(lists: Sequence[Sequence[str]]) -> list[str]:
    """All names, each once; a name that an earlier list lacks comes after the one before it."""
    names: list[str] = []
    for one in lists:
        place = 0
        for name in one:
            if name not in names:
                names.insert(place, name)
            place = names.index(name) + 1
    return names


def shown_line(rule: Rule, amax: float) -> Side:
    """The positive side of what is shown of a format: all of it, or of a group with that amax."""
    if isinstance(rule.format, BlockFormat):
        return groups.group(rule, amax).line
    return facts.side(rule.format)


def errors_of(rule: Rule, amax: float) -> list[Binade]:
    """The errors of what is shown of a format."""
    if isinstance(rule.format, BlockFormat):
        return groups.group(rule, amax).binades(rule.rounding)
    return facts.binades(facts.side(rule.format), rule.rounding)


def _facts_beside(said: Sequence[Mapping[str, str]], heads: Sequence[str]) -> list[str]:
    """In columns, whose texts are broken into lines; a few formats beside each other, and the others below."""
    lines: list[str] = []
    for start in range(0, len(said), IN_COLUMNS):
        block = said[start : start + IN_COLUMNS]
        wide = (WIDTH - 20) // len(block) - 2
        texts = [("", heads[start : start + IN_COLUMNS])]
        texts += [(name, [one.get(name, "-") for one in block]) for name in in_order([list(one) for one in block])]
        rows: list[Row] = []
        for name, cells in texts:
            rows += itertools.zip_longest([name], *(textwrap.wrap(cell, wide) for cell in cells), fillvalue="")
        lines += ["", *aligned(rows, left=range(len(rows[0])))]
    return lines[1:]


def _errors_beside(rules: Sequence[Rule], lines: Sequence[Side], binades: Sequence[Sequence[Binade]]) -> list[Row]:
    exponents = sorted({one.exponent for of_format in binades for one in of_format})
    errors = [
        [_error_at(rule, line, there, exponent) for rule, line, there in zip(rules, lines, binades, strict=True)]
        for exponent in exponents
    ]
    texts = [tuple(one if isinstance(one, str) else percent(one) for one in row) for row in errors]
    table: list[Row] = [("numbers", *(str(rule) for rule in rules))]
    for run in stretches(texts, errors):
        ends = f"2^{exponents[run[0]]} to 2^{exponents[run[-1]] + 1}"
        table.append((ends, *(span(cells) for cells in zip(*(texts[place] for place in run), strict=True))))
    return table


def _error_at(rule: Rule, line: Side, binades: Sequence[Binade], exponent: int) -> float | str:
    """The error of numbers from that power of two to the next, up to the largest value; below the smallest too."""
    if not binades:
        return 1.0
    if exponent > binades[-1].exponent or (binades[-1].error == 0 and exponent == binades[-1].exponent):
        return "-" if isinstance(rule.format, BlockFormat) else "beyond"
    if exponent >= binades[0].exponent:
        return binades[exponent - binades[0].exponent].error
    if is_random(rule.rounding) and 0 in (line.first, line.gaps[0].low):
        return "up to 200 %"  # all the nearer, the smaller the number is
    low = math.ldexp(1.0, exponent)
    return facts.largest_error(line, rule.rounding, low, 2 * low)
