"""What a format can hold, and how far rounding to it may go wrong. No torch here.

A format's values lie on a line that zero cuts into two sides; a side is told in magnitudes, from zero on. All that is
said of one follows from its values and from the gaps between them.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from low_precision.errors import SettingError
from low_precision.formats import Format, Table
from low_precision.rounding import AnyRounding, FewBits, Rounding, is_random

MOST_BITS = 16  # the values of wider formats are counted, and not listed


def width(fmt: Format | Table) -> int:
    """How many bits hold a number: of a table, as many as its values need."""
    if isinstance(fmt, Table):
        return (len(fmt.values) - 1).bit_length()
    return int(fmt.signed) + (fmt.exponent_bits or 1) + fmt.mantissa_bits


def is_listed(fmt: Format | Table) -> bool:
    """Whether `values` lists them."""
    return width(fmt) <= MOST_BITS


@functools.lru_cache(maxsize=16)
def values(fmt: Format | Table) -> tuple[float, ...]:
    """All finite values, in order, each once: a negative zero is not told from zero. Exact floats.

    SettingError for a format of more than MOST_BITS bits.
    """
    if not is_listed(fmt):
        raise SettingError("format", fmt.name, f"one of at most {MOST_BITS} bits, whose values can be listed")
    if isinstance(fmt, Table):
        return fmt.values
    above = tuple(_value(fmt, code) for code in range(1, _code(fmt, fmt.largest) + 1))
    below = tuple(-value for value in reversed(above)) if fmt.signed else ()
    lowest = (fmt.lowest,) if fmt.twos_complement else ()
    return (*lowest, *below, 0.0, *above)


def _value(fmt: Format, code: int) -> float:
    """The value of a code, the sign aside: they are numbered from zero on."""
    field, significand = divmod(code, (1 << fmt.mantissa_bits))
    if field:  # else it is a subnormal number
        significand += 1 << fmt.mantissa_bits
    return math.ldexp(significand, max(field, 1) - fmt.bias - fmt.mantissa_bits)


def _code(fmt: Format, x: float) -> int:
    """The code of the largest value that is not above x >= 0: how many there are above zero and not above x."""
    if x == 0:
        return 0
    x = min(x, fmt.largest)
    exponent = max(math.frexp(x)[1] - 1, 1 - fmt.bias)
    spacings = math.ldexp(x, fmt.mantissa_bits - exponent)
    return (exponent + fmt.bias - 1) * (1 << fmt.mantissa_bits) + math.floor(spacings)


def count(fmt: Format | Table) -> int:
    """How many finite values there are, zero counted once."""
    if isinstance(fmt, Table):
        return len(fmt.values)
    above = _code(fmt, fmt.largest)
    return 1 + above + (above if fmt.signed else 0) + int(fmt.twos_complement)


class Gap(NamedTuple):
    """Two neighbouring values, in magnitudes. low: below zero where the side's first value has none before it."""

    low: float
    high: float
    high_is_odd: bool  # its code


@dataclass(frozen=True)
class Side:
    """What lies on one side of zero, in magnitudes.

    gaps: in order; of a format that is not listed, the first two of each power of two and the last. first: what
    numbers below all gaps become: zero, or the smallest value where the format has none of the other side. last: the
    largest value, which stands for all beyond. values: those above zero, where they are listed.
    """

    gaps: tuple[Gap, ...]
    first: float
    last: float
    values: tuple[float, ...] | None
    is_negative: bool = False
    format: Format | None = None  # where its values are not listed
    scale: float = 1.0  # what those have been multiplied by

    def number(self, low: float, high: float) -> int:
        """How many values there are from `low` > 0 on, below `high`."""
        if self.values is not None:
            return bisect.bisect_left(self.values, high) - bisect.bisect_left(self.values, low)
        assert self.format is not None
        return self._below(high) - self._below(low)

    def _below(self, x: float) -> int:
        """How many of a format's lie above zero and below x."""
        assert self.format is not None
        code = _code(self.format, min(x / self.scale, self.format.largest))
        while code and _value(self.format, code) * self.scale >= x:  # a division may have rounded
            code -= 1
        return code

    def reaching(self, low: float, high: float) -> list[Gap]:
        """The gaps with numbers between low and high; of what is not listed, those that have the largest errors."""
        start = bisect.bisect_right(self.gaps, low, key=lambda gap: gap.high)
        inside = list(itertools.takewhile(lambda gap: gap.low < high, itertools.islice(self.gaps, start, None)))
        if self.format is None:
            return inside
        code, last = self._below(math.nextafter(low, math.inf)), _code(self.format, self.format.largest)
        points = [(_value(self.format, one) * self.scale, one) for one in range(code, min(code + 2, last) + 1)]
        around = [Gap(low, high, code % 2 == 1) for (low, _), (high, code) in itertools.pairwise(points)]
        return [gap for gap in around if gap.low < high] + inside

    def at_or_below(self, x: float) -> float:
        """The largest value that is not above x > 0; 0 where all above zero are."""
        if self.values is not None:
            place = bisect.bisect_right(self.values, x)
            return self.values[place - 1] if place else 0.0
        assert self.format is not None
        return min(_value(self.format, self._below(math.nextafter(x, math.inf))) * self.scale, self.last)

    def smallest(self) -> float:
        """The smallest value above zero; 0 where there is none."""
        if self.values is not None:
            return self.values[0] if self.values else 0.0
        return self.gaps[0].high


@functools.lru_cache(maxsize=32)
def side(fmt: Format | Table, is_negative: bool = False) -> Side:
    """The values of one side of zero."""
    if isinstance(fmt, Table):
        signed, codes = fmt.values, range(fmt.first_code, fmt.first_code + len(fmt.values))
        points = list(zip(signed, codes, strict=True))
        if is_negative:
            points = [(-value, code) for value, code in reversed(points)]
        gaps = tuple(Gap(low, high, code % 2 == 1) for (low, _), (high, code) in itertools.pairwise(points) if high > 0)
        magnitudes = tuple(value for value, _ in points if value > 0)
        last = points[-1][0] + 0.0
        return Side(gaps, gaps[0].low + 0.0 if gaps else last, last, magnitudes, is_negative)
    if is_negative and not fmt.signed:
        return Side((), 0.0, 0.0, (), True)
    beyond = [Gap(fmt.largest, -fmt.lowest, False)] if is_negative and fmt.twos_complement else []
    last = -fmt.lowest if is_negative else fmt.largest
    if not is_listed(fmt):
        return Side((*_sampled(fmt), *beyond), 0.0, last, None, is_negative, fmt)
    above = (*values(fmt)[-_code(fmt, fmt.largest) :], *(gap.high for gap in beyond))
    between = itertools.pairwise((0.0, *above))
    gaps = tuple(Gap(low, high, place % 2 == 1) for place, (low, high) in enumerate(between, 1))
    return Side(gaps, 0.0, last, above, is_negative)


def _sampled(fmt: Format) -> Iterator[Gap]:
    """Of each power of two, the first two gaps and the last; between two powers all are equal."""
    last, power = _code(fmt, fmt.largest), math.frexp(fmt.smallest_subnormal)[1] - 1
    codes = {0}
    for exponent in range(power, math.frexp(fmt.largest)[1]):
        code = _code(fmt, math.ldexp(1.0, exponent))
        codes |= {code - 1, code, code + 1}
    for code in sorted(code for code in codes if 0 <= code < last):
        yield Gap(_value(fmt, code), _value(fmt, code + 1), code % 2 == 0)


# Relative errors


def largest_error(line: Side, rounding: AnyRounding, low: float, high: float) -> float:
    """The largest relative error |rounded - x| / x of numbers x between `low` > 0 and `high`.

    Beyond the largest value too. Of stochastic rounding, the largest of its expected value: E|rounded - x| / x. A
    supremum: directed roundings come as near to it as one likes.
    """
    errors = []
    if low < line.first:
        errors.append((line.first - low) / low)
    if high > line.last:
        errors.append((high - line.last) / high if line.last >= 0 else (low - line.last) / low)
    for gap in line.reaching(low, high):
        errors.append(_in_gap(gap, rounding, max(low, gap.low), min(high, gap.high), line.is_negative))
    return max(errors, default=0.0)


def _in_gap(gap: Gap, rounding: AnyRounding, low: float, high: float, is_negative: bool) -> float:
    """The largest relative error between low and high, which lie in the gap. Between these points it rises or falls."""
    a, b = gap.low, gap.high
    points = {low, high}
    if is_random(rounding) and a > 0:
        points.add(math.sqrt(a) * math.sqrt(b))  # where the expected error is largest
    points.add(a + (b - a) / 2)
    inside = [point for point in points if low <= point <= high]
    if not isinstance(rounding, FewBits):
        return max(error(gap, rounding, x, is_negative) for x in inside)
    shares = {(x - a) / (b - a) for x in inside}
    from_high = is_negative and a < 0
    errors = []
    for share, p in _steps(rounding, {1 - share for share in shares} if from_high else shares):
        x = b - share * (b - a) if from_high else a + share * (b - a)
        if low <= x <= high:
            p = 1 - p if from_high else p
            errors.append(((1 - p) * (x - a) + p * (b - x)) / x)
    return max(errors)


def error(gap: Gap, rounding: AnyRounding, x: float, is_negative: bool = False) -> float:
    """The relative error of a number in the gap, as it is near the gap's ends too; of `stochastic` the expected one."""
    a, b = gap.low, gap.high
    if rounding is Rounding.STOCHASTIC:
        return 2 * ((x - a) / (b - a)) * ((b - x) / x)
    if rounding in (Rounding.NEAREST, Rounding.NEAREST_AWAY):
        return min(x - a, b - x) / x
    if rounding is Rounding.TO_ODD:
        goes_up = gap.high_is_odd
    elif rounding is Rounding.TOWARD_ZERO:
        goes_up = b < -a or (b == -a and is_negative)
    else:
        goes_up = (rounding is Rounding.UP) != is_negative
    return (b - x if goes_up else x - a) / x


def _steps(rounding: FewBits, shares: set[float]) -> Iterator[tuple[float, float]]:
    """Shares of a gap and the probabilities of its far end there: at the ends of the steps around `shares`.

    The probability is a multiple of 2**-R, so the expected error has steps, and is largest at one of their ends.
    """
    steps = 2**rounding.bits
    shift = 0.5 if rounding.half_offset or rounding.even else 0.0
    around = {math.floor(share * steps + shift) + near for share in shares for near in range(-2, 3)}
    chosen = range(steps + 1) if rounding.bits <= 6 else sorted(around & set(range(min(around), steps + 1)))
    for step in chosen:
        if step < 0:
            continue
        start, end = (step - shift) / steps, (step + 1 - shift) / steps
        for share in {max(start, 0.0), min(end, 1.0), *(s for s in shares if start <= s < end)}:
            yield share, step / steps


@dataclass(frozen=True)
class Binade:
    """Numbers from 2**exponent on, below 2**(exponent + 1) and not beyond the largest value.

    spacing: of the values, the smallest and the largest, of all gaps that reach into it. error: `largest_error`.
    """

    exponent: int
    number: int
    spacing: tuple[float, float]
    error: float


def binades(line: Side, rounding: AnyRounding, top: float | None = None) -> list[Binade]:
    """From the one below the smallest value, to see what becomes of smaller numbers, to that of `top`, the largest."""
    top = line.last if top is None else top
    if line.last <= 0 or not line.smallest():
        return []
    first = max(math.frexp(line.smallest())[1] - 2, -1074)
    made = []
    for exponent in range(first, math.frexp(top)[1]):
        low = math.ldexp(1.0, exponent)
        end = 2 * low if exponent < 1023 else math.inf
        high = min(end, top)
        spacings = [gap.high - gap.low for gap in line.reaching(low, high)]
        spacing = (min(spacings), max(spacings)) if spacings else (0.0, 0.0)
        worst = largest_error(line, rounding, low, high) if low < high else 0.0
        made.append(Binade(exponent, line.number(low, end), spacing, worst))
    return made


def zero_up_to(line: Side, rounding: AnyRounding) -> tuple[float, bool] | None:
    """Below which number all become zero, and whether that number does too; None where none or not all of any do."""
    if not line.gaps or line.gaps[0].low != 0:
        return None
    gap = line.gaps[0]
    if rounding is Rounding.NEAREST:
        return gap.high / 2, gap.high_is_odd
    if rounding is Rounding.NEAREST_AWAY:
        return gap.high / 2, False
    if isinstance(rounding, FewBits):
        if rounding.even:
            return math.ldexp(gap.high, -rounding.bits - 1), True
        return math.ldexp(gap.high, -rounding.bits - rounding.half_offset), False
    if rounding is Rounding.STOCHASTIC:
        return None
    goes_up = gap.high_is_odd if rounding is Rounding.TO_ODD else (rounding is Rounding.UP) != line.is_negative
    if rounding is Rounding.TOWARD_ZERO or not goes_up:
        return gap.high, False
    return None


def curve(line: Side, rounding: AnyRounding, most: int = 1024) -> list[tuple[float, float]]:
    """The relative error as it is drawn: (x, error), at the worst number of each gap.

    Of many gaps some, in each power of two the first and the last among them: between two powers the worst errors of
    evenly spaced values fall as 1 / x, which is a straight line where both axes are logarithmic. From half of the
    smallest value on.
    """
    if not line.smallest():
        return []
    points = []
    by_power = itertools.groupby((gap for gap in line.gaps if gap.high > 0), key=lambda gap: math.frexp(gap.low)[1])
    powers = [list(gaps) for _, gaps in by_power]
    each = max(most // len(powers), 2)
    for gaps in powers:
        chosen = gaps if len(gaps) <= each else [gaps[n * (len(gaps) - 1) // (each - 1)] for n in range(each)]
        for gap in chosen:
            a, b = max(gap.low, gap.high / 4), gap.high
            tried = [a + (b - a) * part / 16 for part in range(17)]
            points.append(max(((x, error(gap, rounding, x)) for x in tried), key=lambda point: point[1]))
    return points


def code_of(fmt: Format, value: float) -> str:
    """The bits of a finite value: sign, exponent and mantissa; of fixed point, two's complement."""
    if not fmt.exponent_bits:
        return f"{int(value / fmt.smallest_subnormal) % (1 << width(fmt)):0{width(fmt)}b}"
    return f"{int(value < 0) if fmt.signed else ''}{_code(fmt, abs(value)):0{width(fmt) - fmt.signed}b}"
