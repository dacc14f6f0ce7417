"""What a figure and a page of formats draw: their values, errors by magnitude, and facts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from low_precision import facts, group_facts
from low_precision.facts import Side
from low_precision.formats import BlockFormat
from low_precision.rules import Rule

MOST_VALUES, BY_POWERS = 1024, 16  # of more values on one side of zero, so many are drawn, and so many a power of two
BEYOND = (1.0, 1.1, 1.25, 1.5, 2.0)  # times the largest value: numbers that become it


@dataclass(frozen=True)
class Drawn:
    """A format, or a group of numbers that share a scale.

    above, below: values on either side of zero, as magnitudes in order, or some of them. number: how many there are
    above zero. curve: (x, relative error) of the worst number in each gap. amax, scale: of a group.
    """

    above: list[float]
    below: list[float]
    number: int
    zero: bool
    curve: list[tuple[float, float]]
    amax: float | None = None
    scale: float = 1.0

    @property
    def largest(self) -> float:
        return max(self.above[-1:] + self.below[-1:], default=0.0)


def drawn(rule: Rule, amax: float) -> Drawn:
    """What is drawn of a format; of one with scales, of a group with that amax."""
    fmt = rule.format
    if not isinstance(fmt, BlockFormat):
        line, below = facts.side(fmt), facts.side(fmt, is_negative=True)
        curve = facts.curve(line, rule.rounding)
        curve += [(line.last * times, 1 - 1 / times) for times in BEYOND if 0 < line.last * times < math.inf]
        return Drawn(_some(line), _some(below), line.number(0.0, math.inf), _has_zero(line, below), curve)
    group = group_facts.group(rule, amax)
    below = facts.side(fmt.element, is_negative=True)
    is_alike = below.values is None or below.values == facts.side(fmt.element).values
    mirrored = _some(group.line) if is_alike else [v * group.scale for v in _some(below) if v * group.scale <= amax]
    curve = group.curve(rule.rounding)
    count = group.line.number(0.0, math.inf)
    return Drawn(_some(group.line), mirrored, count, _has_zero(group.line, below), curve, amax, group.scale)


def _has_zero(above: Side, below: Side) -> bool:
    return 0 in (above.first, below.first) or not (above.gaps or below.gaps)


def _some(line: Side) -> list[float]:
    """The values above zero; of more than MOST_VALUES, those that lie apart on a line or by powers of two."""
    values = line.values
    if values is not None and len(values) <= MOST_VALUES:
        return list(values)
    low, high = math.log2(line.smallest()), math.log2(line.last)
    steps = min(math.ceil((high - low) * BY_POWERS), 4 * MOST_VALUES)
    wanted = {line.last * (place / MOST_VALUES) for place in range(1, MOST_VALUES + 1)}
    wanted |= {2.0 ** (low + (high - low) * place / steps) for place in range(steps)}
    return sorted({line.at_or_below(x) for x in wanted if x >= line.smallest()} | {line.smallest()})
