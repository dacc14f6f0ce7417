"""What numbers that share a scale can hold: a group with a given largest magnitude, and how far the scales reach.

What is said here is what `quantize` does to float32 tensors: scales are those of blocks.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from low_precision import blocks, delayed, facts
from low_precision.errors import SettingError, shown
from low_precision.facts import Binade, Gap, Side
from low_precision.formats import BlockFormat
from low_precision.noise import Key
from low_precision.rounding import AnyRounding, Rounding, is_random
from low_precision.rules import Rule
from low_precision.scales import DELAYED
from low_precision.tensor import quantize

SMALLEST, LARGEST = 2.0**-149, torch.finfo(torch.float32).max  # float32's
EXPAND, QUEST, HEADROOM = "expand", "quest", "headroom"
EXPANDED = 2.0**8  # of a group that is raised to a power, how many times its smallest magnitude the largest is
_SAMPLES = 2**15
_KEY = Key(0)
_EAGER = functools.partial(quantize, key=_KEY, backend="eager")  # a few numbers at a time


@dataclass(frozen=True)
class Group:
    """A group of numbers in a float32 tensor, and what it can hold.

    amax: its largest magnitude; of "quest" its standard deviation. beside: the largest magnitude of the whole tensor
    (two levels), or of the steps before (delayed). becomes: what amax becomes, to nearest where the rounding takes
    random bits; of "quest" the largest value. scale: what an element is multiplied by to give its number; of "expand"
    the power that the numbers were raised to. line: what lies above zero, below it the same, mirrored.
    samples: of "expand", numbers from the smallest to amax, and the relative error of each.
    """

    amax: float
    beside: float
    scale: float
    becomes: float
    line: Side
    samples: tuple[tuple[float, float], ...] = ()
    is_quest: bool = False

    @property
    def error(self) -> float:
        """The relative error of amax."""
        return abs(self.becomes - self.amax) / self.amax

    @property
    def top(self) -> float:
        """The largest magnitude that a number of the group may have; of "quest", the largest value."""
        return self.becomes if self.is_quest else self.amax

    def binades(self, rounding: AnyRounding) -> list[Binade]:
        """Errors by magnitude, up to amax."""
        if not self.samples:
            return facts.binades(self.line, rounding, self.top)
        made = []
        for one in facts.binades(self.line, Rounding.NEAREST, self.amax)[1:]:
            low, high = math.ldexp(1.0, one.exponent), math.ldexp(2.0, one.exponent)
            errors = [error for x, error in self.samples if low <= x < high]
            made.append(replace(one, error=max(errors, default=0.0)))
        return made

    def curve(self, rounding: AnyRounding) -> list[tuple[float, float]]:
        """As facts.curve."""
        if not self.samples:
            return facts.curve(self.line, rounding)
        size = _SAMPLES // 256
        parts = (self.samples[start : start + size] for start in range(0, len(self.samples), size))
        return [max(part, key=lambda sample: sample[1]) for part in parts]


def group(rule: Rule, amax: float, beside: float | None = None) -> Group:
    """What a group with that largest magnitude can hold, rounded by that rule. beside: amax where there is none.

    SettingError for an amax that is no float32 number above zero.
    """
    fmt = block_format(rule)
    if not SMALLEST <= amax <= LARGEST:
        raise SettingError("amax", shown(amax), "a float32 number above 0")
    beside = amax if beside is None else beside
    if fmt.scaling.kind == EXPAND:
        return _expanded(rule, fmt, amax)
    to_values, scale = _decoder(fmt, amax, beside)
    if fmt.scaling.kind == QUEST:
        becomes = to_values([fmt.element.largest])[0]
        top = highest = becomes
    else:
        becomes = rounded(replace(rule, rounding=_quiet(rule.rounding)), [amax], beside)[0]
        top = max(becomes, rounded(replace(rule, rounding=Rounding.UP), [amax], beside)[0])
        highest = top if is_random(rule.rounding) else becomes
    line = _line(fmt, to_values, scale, top, highest)
    return Group(amax, beside, scale, becomes, line, is_quest=fmt.scaling.kind == QUEST)


def block_format(rule: Rule) -> BlockFormat:
    assert isinstance(rule.format, BlockFormat)
    return rule.format


def _quiet(rounding: AnyRounding) -> AnyRounding:
    return Rounding.NEAREST if is_random(rounding) else rounding


_Values = Callable[[Sequence[float]], list[float]]


def _decoder(fmt: BlockFormat, amax: float, beside: float) -> tuple[_Values, float]:
    """From elements to their values, and the factor that this is, but for float32's rounding."""
    largest_in = torch.tensor([[amax], [beside]], dtype=torch.float32)
    if fmt.scaling.is_power:
        power = float(blocks.powers(largest_in[:1], fmt))
        return lambda elements: _narrowed(torch.tensor(elements, dtype=torch.float64) * power), power
    if fmt.scaling.kind == QUEST:
        spread = torch.tensor([[amax, -amax]], dtype=torch.float32)  # whose deviation that is
        factors = blocks.quest_factors(spread, fmt.element, LARGEST)
    elif fmt.scaling.kind == DELAYED:
        factors = blocks.Factors(_delayed(fmt, beside))
    else:
        factors = blocks.factors(largest_in, fmt, lambda numbers, scale: _EAGER(numbers, scale))
        encode, decode, tensor = factors
        factors = blocks.Factors(encode[:1], None if decode is None else decode[:1], tensor)
    scale = 1 / float(factors.encode)
    if factors.decode is not None and factors.tensor is not None:
        scale = float(factors.decode) * float(factors.tensor)

    def to_values(elements: Sequence[float]) -> list[float]:
        return _narrowed(blocks.scaled_back(torch.tensor([elements], dtype=torch.float32), factors))

    return to_values, scale


def _narrowed(numbers: Tensor) -> list[float]:
    return _floats(numbers.clamp(-LARGEST, LARGEST).float())


def float32(x: float) -> float:
    """The nearest float32 number; an infinity beyond them."""
    return float(torch.tensor(x, dtype=torch.float64).float())


def _floats(numbers: Tensor) -> list[float]:
    return [float(number) for number in numbers.reshape(-1)]


def _delayed(fmt: BlockFormat, amax: float) -> Tensor:
    """The scale after a step with that largest magnitude: float32 ()."""
    rule = delayed.Rule.of(fmt)
    newest = torch.tensor([amax], dtype=torch.float32)
    history, first = torch.zeros(1, rule.steps), torch.ones(1)
    return delayed.moved(history, first, newest, rule.scaled_largest, rule.recent)[1].reshape(())


def rounded(rule: Rule, numbers: Sequence[float], beside: float | None = None) -> list[float]:
    """What becomes of these numbers of one group; beside: as in `group`."""
    fmt = block_format(rule)
    line = torch.tensor([list(numbers)], dtype=torch.float32)
    beside = float(line.abs().max()) if beside is None else beside
    if fmt.scaling.kind == DELAYED:
        return _floats(_EAGER(line, fmt, rule.rounding, scale=_delayed(fmt, beside)))
    others = torch.full_like(line, beside)  # another group, with the tensor's largest magnitude
    return _floats(_EAGER(torch.cat([line, others]), _in_rows(fmt), rule.rounding)[:1])


@functools.lru_cache(maxsize=16)
def _in_rows(fmt: BlockFormat) -> BlockFormat:
    """The same with a group for each row, so that a group may have any number of numbers."""
    return replace(fmt, name=f"{fmt.name} in rows", block="row")


def _line(fmt: BlockFormat, to_values: _Values, scale: float, top: float, highest: float) -> Side:
    """The element's positive values, times the scale. top: the upper end of the last gap; highest: the last value."""
    line = facts.side(fmt.element)
    if scale == 0:
        return Side((), 0.0, 0.0, ())
    lows, highs = to_values([gap.low for gap in line.gaps]), to_values([gap.high for gap in line.gaps])
    ends = zip(lows, highs, line.gaps, strict=True)
    gaps = tuple(Gap(low, high, gap.high_is_odd) for low, high, gap in ends if low < top and low < high)
    first = max(to_values([line.first])[0], 0.0)
    if line.values is None:
        return Side(gaps, first, highest, None, False, line.format, scale)
    values = sorted({value for value in to_values(line.values) if 0 < value <= highest})
    return Side(gaps, first, max(values, default=0.0), tuple(values))


def _expanded(rule: Rule, fmt: BlockFormat, amax: float) -> Group:
    """Of numbers between amax and a part of it; what becomes of them is tried, as the power bends the line."""
    exponents = torch.linspace(0, 1, _SAMPLES, dtype=torch.float64)
    numbers = (amax * EXPANDED ** (exponents - 1)).float()
    results = _EAGER(numbers, replace(fmt, name=f"{fmt.name} in a tensor", block="tensor"), _quiet(rule.rounding))
    errors = ((results.double() - numbers.double()).abs() / numbers.double()).tolist()
    values = sorted(set(results.tolist()))
    gaps = tuple(Gap(low, high, False) for low, high in itertools.pairwise(values))
    line = Side(gaps, values[0], values[-1], tuple(values))
    power = math.floor(16 * math.log2(fmt.element.largest**2 / 2) / math.log2(EXPANDED)) / 16
    samples = tuple(zip(numbers.tolist(), errors, strict=True))
    return Group(amax, amax, power, float(results[-1]), line, samples)


# All groups


def change_of_largest(rule: Rule) -> tuple[float, float] | None:
    """What amax becomes, over amax: the least and the most, where no scale is at an end of its range.

    A scale follows from amax's digits, so it is enough to try those of one power of two: many of them and the last.
    With two levels the tensor's amax is the next power of two but one, whose scale is not rounded. None of "quest",
    whose scale follows from all numbers of a group.
    """
    fmt = block_format(rule)
    if fmt.scaling.kind == QUEST:
        return None
    many = 64 if fmt.scaling.kind == DELAYED else 2**16  # a delayed scale is looked at one by one, and is float32's
    tried = [1 + place / many for place in range(many)] + [2 - 2.0**-23]
    numbers = torch.tensor(tried, dtype=torch.float32)
    quiet = replace(rule, rounding=_quiet(rule.rounding))
    if fmt.scaling.kind == DELAYED:
        results = [rounded(quiet, [one])[0] for one in tried]
    else:
        others = torch.tensor([4.0] if fmt.scale_format else [])
        groups = torch.cat([numbers, others])[:, None]
        results = _floats(_EAGER(groups, _in_rows(fmt), quiet.rounding))[: len(tried)]
    shares = [result / number for result, number in zip(results, tried, strict=True)]
    return min(shares), max(shares)


def reach(rule: Rule) -> tuple[float, float] | None:
    """The smallest and the largest magnitude above zero that a number of a float32 tensor can become, to nearest.

    Over all scales that there are. None of "expand", where it depends on all numbers of a group.
    """
    fmt = block_format(rule)
    if fmt.scaling.kind == EXPAND:
        return None
    nearest, element = Rule(fmt, Rounding.NEAREST), facts.side(fmt.element).smallest()
    parts = [1.0]
    if fmt.scale_format:
        parts.append(fmt.scale_format.smallest_subnormal / fmt.scale_format.largest)
    smallest = LARGEST
    for part in parts:
        for exponent in range(-149, 128):
            beside = math.ldexp(1.0, exponent)
            amax = beside * part
            value = _decoder(fmt, amax, beside)[0]([element])[0] if amax >= SMALLEST else 0.0
            is_reached = fmt.scaling.kind == QUEST or rounded(nearest, [max(amax, value), value], beside)[1] == value
            if value > 0 and is_reached:
                smallest = min(smallest, value)
                break  # a larger scale has larger values
    return smallest, rounded(nearest, [LARGEST, -LARGEST])[0]  # two, whose deviation is as large


def zero_below(rule: Rule) -> float | None:
    """With two levels: groups of numbers that are not above this share of the tensor's largest become zeros, because
    their scale does. None of other scales.
    """
    scale = block_format(rule).scale_format
    if scale is None:
        return None
    ends = facts.zero_up_to(facts.side(scale), Rounding.NEAREST)
    return ends[0] / scale.largest if ends else None


def scale_bits(rule: Rule) -> int:
    """How many bits hold what a group shares: one scale; of "expand", COAT's three float32 numbers."""
    fmt = block_format(rule)
    if fmt.scale_format:
        return facts.width(fmt.scale_format)
    if fmt.scaling.kind == EXPAND:
        return 96
    return 8 if fmt.scaling.is_power or fmt.scaling.kind in (HEADROOM, QUEST) else 32
