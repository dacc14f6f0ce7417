"""What there is to say of a format, as text: facts, values on the number line, errors by magnitude."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Hashable, Mapping, Sequence

from low_precision import facts
from low_precision import group_facts as groups
from low_precision.facts import Binade, Side
from low_precision.formats import FLOAT32, AnyFormat, BlockFormat, Format, Table
from low_precision.rounding import AnyRounding, Rounding, is_random
from low_precision.rules import Rule
from low_precision.scales import DELAYED, SCALES

WIDTH = 100  # characters of a page
LINE = 61  # of a number line
MOST_LISTED = 16  # values of a format
MOST_ROWS, MOST_FALLING = 16, 3  # of a table of errors; and of neighbours that fall, where there are more rows
MARKS = "| one, 2 to 9 so many, + more"
Row = tuple[str, ...]


def number(x: float) -> str:
    """In full where that takes ten digits or fewer, else in seven."""
    return f"{x:.10g}" if float(f"{x:.10g}") == x else f"{x:.7g}"


def power(x: float) -> str:
    """As a power of two times few digits; empty where it is none."""
    mantissa, exponent = math.frexp(abs(x))
    if x == 0 or 2 * mantissa * 2**12 % 1:
        return ""
    times = "" if mantissa == 0.5 else f"{2 * mantissa:.13g} * "
    return f"{'-' if x < 0 else ''}{times}2^{exponent - 1}"


def both(x: float) -> str:
    """A number, and as a power of two where it is easier to read."""
    text = power(x)
    return f"{number(x)} ({text})" if text and (x < 0.1 or x >= 1000) else number(x)


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def aligned(rows: Sequence[Row], left: Sequence[int] = (0,)) -> list[str]:
    """In columns; those of `left` begin at one place, the others end at one."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        ("  " + "  ".join(f"{cell:{'<' if n in left else '>'}{widths[n]}}" for n, cell in enumerate(row))).rstrip()
        for row in rows
    ]


def in_blocks(rows: Sequence[Row]) -> list[str]:
    """In columns, as many beside each other as a page is wide; the first one stands before each block of them."""
    widths = [2 + max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks: list[list[int]] = [[]]
    for column, wide in enumerate(widths[1:], 1):
        if blocks[-1] and widths[0] + sum(widths[n] for n in blocks[-1]) + wide > WIDTH:
            blocks.append([])
        blocks[-1].append(column)
    lines: list[str] = []
    for block in blocks:
        lines += ["", *aligned([(row[0], *(row[n] for n in block)) for row in rows])]
    return lines[1:]


def wrapped(text: str, before: str = "") -> list[str]:
    """Lines of a page, which begin below each other, behind `before`."""
    return textwrap.wrap(text, WIDTH, initial_indent=before, subsequent_indent=" " * len(before)) or [before.rstrip()]


def facts_lines(said: Mapping[str, str]) -> list[str]:
    wide = max(map(len, said))
    return [line for name, text in said.items() for line in wrapped(text, f"  {name:{wide}}  ")]


def element_of(fmt: AnyFormat) -> Format | Table:
    return fmt.element if isinstance(fmt, BlockFormat) else fmt


def title(rule: Rule) -> str:
    rounding = "" if rule.format == FLOAT32 else f", {rule.rounding}"
    return f"{rule.format} ({rule.format.bits}){rounding}"


def error_name(rounding: AnyRounding) -> str:
    return "expected error" if is_random(rounding) else "largest error"


# Facts


def range_facts(rule: Rule) -> dict[str, str]:
    """What `fact: text` there is to say of a format without a scale, or of the element of one with a scale."""
    fmt, is_scaled = element_of(rule.format), isinstance(rule.format, BlockFormat)
    line, below = facts.side(fmt), facts.side(fmt, is_negative=True)
    said = {} if is_scaled else {"bits": f"{facts.width(fmt)}"}
    said["finite values"] = f"{facts.count(fmt)}: {_values(fmt, line, below)}"
    said["largest"] = both(fmt.largest)
    if fmt.lowest != -fmt.largest:
        said["lowest"] = both(fmt.lowest)
    if isinstance(fmt, Table) or not fmt.exponent_bits:
        name = "smallest above 0" if isinstance(fmt, Table) else "spacing"
        said[name] = both(line.smallest()) if line.smallest() else "none"
    else:
        said["smallest normal"] = both(fmt.smallest_normal)
        said["smallest subnormal"] = both(fmt.smallest_subnormal) if fmt.mantissa_bits else "none"
        said["unit roundoff"] = both(fmt.unit_roundoff)
    if line.smallest():
        said["range"] = _powers(line.smallest(), line.last)
    said["special values"] = _special(fmt)
    if not is_scaled:
        said["becomes 0"] = _zero(line, rule.rounding)
        said["beyond the largest"] = f"becomes {number(fmt.largest)}"
    return said


def _values(fmt: Format | Table, line: Side, below: Side) -> str:
    if facts.count(fmt) > MOST_LISTED:
        return f"{line.number(0.0, math.inf)} above 0, {below.number(0.0, math.inf)} below"
    values = facts.values(fmt)
    if [-value for value in reversed(values)] == list(values):
        return " ".join(number(value) for value in values if value >= 0) + ", and below 0 the same"
    return " ".join(map(number, values))


def _powers(low: float, high: float) -> str:
    return f"{math.log2(high) - math.log2(low):.1f} powers of two"


def _special(fmt: Format | Table) -> str:
    if isinstance(fmt, Table):
        return "none"
    there = [("inf", fmt.has_infinity), ("NaN", fmt.has_nan), ("-0", fmt.has_negative_zero)]
    return ", ".join(word for word, is_there in there if is_there) or "none"


def _zero(line: Side, rounding: AnyRounding) -> str:
    ends = facts.zero_up_to(line, rounding)
    if ends:
        return f"{'up to' if ends[1] else 'below'} {both(ends[0])}"
    smallest = line.smallest()
    if rounding is Rounding.STOCHASTIC and line.gaps and line.gaps[0].low == 0:
        return f"x below {both(smallest)}, with probability 1 - x / {number(smallest)}"
    return "0 alone" if 0 in (line.first, line.last) else "nothing"


def group_said(rule: Rule) -> dict[str, str]:
    """What there is to say of groups that share a scale."""
    fmt = groups.block_format(rule)
    return {
        "bits": _bits(rule),
        "group": _group(fmt),
        "scale": SCALES.get(fmt.scaling.kind) or _other_scale(fmt),
        "range with scales": _reach(rule),
        "amax becomes": _change(rule),
    } | _two_levels(rule)


def _bits(rule: Rule) -> str:
    fmt = groups.block_format(rule)
    element, scale = facts.width(fmt.element), groups.scale_bits(rule)
    of_tensor = ", and 32 for the tensor" if fmt.scale_format else ""
    if fmt.sizes is None:
        return f"{element} a number, and {scale} for each {fmt.block}{of_tensor}"
    size = fmt.sizes[0] * fmt.sizes[1]
    return f"{element + scale / size:.6g} a number: {element}, and {scale} for each {size}{of_tensor}"


def _group(fmt: BlockFormat) -> str:
    if fmt.sizes is None:
        said = f"a {fmt.block} of the tensor" if fmt.block != "tensor" else "the tensor"
    else:
        said = f"{fmt.block} numbers of {'the tensor' if isinstance(fmt.block, str) else 'a line'}"
    return f"{said}; amax: its largest magnitude"


def _other_scale(fmt: BlockFormat) -> str:
    if fmt.scaling.kind == DELAYED:
        steps = "the last step" if fmt.scaling.recent else f"the last {fmt.scaling.history} steps"
        return f"largest / amax of {steps}" + f", times 2^-{fmt.scaling.margin}" * bool(fmt.scaling.margin)
    return f"a number of {fmt.scaling} for each group, and one of float32 for the tensor"


def _reach(rule: Rule) -> str:
    if (ends := groups.reach(rule)) is None:
        return "depends on all numbers of a group"
    return f"{ends[0]:.3g} to {ends[1]:.3g}: {_powers(*ends)}"


def _change(rule: Rule) -> str:
    if (ends := groups.change_of_largest(rule)) is None:
        return "depends on all numbers of a group"
    if max(abs(end - 1) for end in ends) < 1e-6:
        return "itself, but for float32's rounding"
    nearest = ", rounded to nearest" if is_random(rule.rounding) else ""
    return f"{ends[0]:.3g} to {ends[1]:.3g} times itself{nearest}"


def _two_levels(rule: Rule) -> dict[str, str]:
    share = groups.zero_below(rule)
    return {} if share is None else {"groups become 0": f"where amax is at most the tensor's / {1 / share:.7g}"}


# Number lines


def number_line(line: Side, other: Side | None = None) -> str:
    """Where the values lie: a mark for each of LINE equal parts, from zero on.

    other: the negative side, where it is another one, and the line goes from its end on.
    """
    low = -other.last if other else 0.0
    step = (line.last - low) / (LINE - 1) or 1.0
    counts = [0] * LINE
    if line.values is None:
        edges = [max(low + (place - 0.5) * step, 0.0) for place in range(LINE + 1)]
        counts = [line.number(start, end) for start, end in itertools.pairwise(edges)]
        counts[0] += 1
    else:
        signed = [*line.values, *([-value for value in other.values or ()] if other else [])]
        signed += [0.0] if 0 in (line.gaps[0].low if line.gaps else 0.0, line.first) else []
        for value in signed:
            counts[round((value - low) / step)] += 1
    return "".join(" " if not count else "|" if count == 1 else str(count) if count < 10 else "+" for count in counts)


def below_a_line(low: float, high: float) -> str:
    """The numbers of some places of a number line."""
    step = (high - low) / (LINE - 1)
    return _scale([(place, number(low + place * step)) for place in range(0, LINE, (LINE - 1) // 4)])


def _scale(labels: Sequence[tuple[int, str]]) -> str:
    """Each text where it begins, those left out that there is no room for."""
    text = ""
    for place, label in labels:
        if not text or len(text) < place:
            text = text.ljust(place) + label
    return text


def magnitudes(lines: Sequence[tuple[str, Sequence[Binade]]]) -> list[str]:
    """For each (name, binades) a digit for each power of two, or for several: log2 of how many values lie there."""
    there = [one.exponent for _, binades in lines for one in binades if one.number]
    if not there:
        return []
    low, high, wide = min(there), max(there), max(len(name) for name, _ in lines)
    each = -(-(high - low + 1) // LINE)
    rows = []
    for name, binades in lines:
        numbers = {one.exponent: one.number for one in binades if one.number}
        marks = ""
        for first in range(low, high + 1, each):
            most = max(numbers.get(exponent, 0) for exponent in range(first, first + each))
            is_inside = bool(numbers) and min(numbers) <= first <= max(numbers)
            marks += str(most.bit_length() - 1) if 0 < most < 1024 else "+" if most else "." if is_inside else " "
        rows.append(f"{name:{wide}}  {marks}".rstrip())
    places = range(0, -(-(high - low + 1) // each), 10)
    scale = _scale([(place, f"2^{low + place * each}") for place in places])
    return [*rows, f"{'':{wide}}  {scale}"]


# Errors by magnitude


def stretches(keys: Sequence[Hashable], errors: Sequence[Sequence[float | str]]) -> list[list[int]]:
    """Which rows of a table of errors are one: neighbours that have the same key.

    Where that leaves more than MOST_ROWS, also those of more than MOST_FALLING neighbours in which nothing but falls,
    as below the smallest normal number.
    """
    same = [[place for place, _ in run] for _, run in itertools.groupby(enumerate(keys), key=lambda one: one[1])]
    if len(same) <= MOST_ROWS:
        return same
    runs: list[list[list[int]]] = []
    for run in same:
        before = runs[-1][-1] if runs else []
        is_falling = len(run) == len(before) == 1 and _fall(errors[before[0]], errors[run[0]])
        if is_falling:
            runs[-1].append(run)
        else:
            runs.append([run])
    return [made for run in runs for made in ([list(itertools.chain(*run))] if len(run) > MOST_FALLING else run)]


def _fall(one: Sequence[float | str], other: Sequence[float | str]) -> bool:
    """Whether the errors of a row are those of the one before it, or smaller."""
    return all(
        a == b if isinstance(a, str) or isinstance(b, str) else b <= a * (1 + 1e-6)
        for a, b in zip(one, other, strict=True)
    )


def span(texts: Sequence[str]) -> str:
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} .. {texts[-1]}"


def error_rows(binades: Sequence[Binade], rounding: AnyRounding, top: float) -> list[Row]:
    """The rows of a table, its head first. top: where the last power of two ends early."""
    rows: list[Row] = [("numbers", "values", "spacing", error_name(rounding))]
    keys = [(one.number, percent(one.error)) for one in binades]
    for places in stretches(keys, [(one.error,) for one in binades]):
        run = [binades[place] for place in places]
        low, end = math.ldexp(1.0, run[0].exponent), min(_end(run[-1]), top)
        ends = number(top) if low == top else f"{power(low)} to {power(end) or number(end)}"
        counts = sorted({one.number for one in run})
        count = span([str(counts[0]), str(counts[-1])]) + " each" * (len(run) > 1)
        rows.append((ends, count, _spacing(run), span([percent(run[0].error), percent(run[-1].error)])))
    return rows


def _end(one: Binade) -> float:
    return math.ldexp(2.0, one.exponent) if one.exponent < 1023 else math.inf


def _spacing(run: Sequence[Binade]) -> str:
    (low, high), (_, last) = run[0].spacing, run[-1].spacing
    if last == 0:
        return "-"
    return span([power(one) or f"{one:.3g}" for one in (low, max(high, last))])
