"""Numbers that are stored in a format already, and so stay as they are.

A number of a format without scales never moves when it is rounded again. Where numbers share a scale it may: the scale
follows from the largest magnitude, which is another one after rounding, or from the steps before. So what is stored is
not rounded again: a group of numbers that nobody has changed, or that consists of numbers of the format under some
scale, as a loaded one does.
"""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from low_precision import blocks
from low_precision.formats import AnyElement, AnyFormat, BlockFormat, Format
from low_precision.scales import DELAYED, TWO_LEVEL
from low_precision.tensor import quantize

_MOST_VALUES = 1024  # of an element, for which a group's largest magnitude is tried to stand
_MOST_DIGITS = 7  # of the scale of two levels, behind its first one
_ULPS = (0, 1, -1, 2, -2)  # how far off a scale may be that is computed back from a rounded number
_GLANCE = 32  # numbers of a group that are looked at first, and groups of a tensor


def moves_again(format: AnyFormat) -> bool:
    """Whether a number of the format can move when it is rounded again, under whichever rounding.

    A scale of a power of two leaves all as it is, where the scale of what was rounded is the same or a smaller one: a
    larger element goes with it, and every number of a Format, times a power of two, is one. e8m0_even's may grow, and
    without negative numbers the largest magnitude may be gone.
    """
    if not isinstance(format, BlockFormat):
        return False
    is_power = format.scaling.kind in ("e8m0", "e8m0_ceil", "e8m0_rceil")
    return not (is_power and isinstance(format.element, Format) and format.element.signed)


def unchanged_or(before: Tensor, now: Tensor, rounded: Tensor, format: AnyFormat) -> Tensor:
    """`rounded`, but in groups of numbers that share a scale and are the same in `before` and `now`: `before`.

    All of one shape, that of a parameter, and format with a scale: moves_again(format).
    """
    assert isinstance(format, BlockFormat)
    changed = blocks.rows((before != now).float(), format, _dim(now))  # 1 or 0, and 0 where a line is filled up
    of_groups = blocks.shared(changed.amax(1, keepdim=True), now, format, _dim(now)) if changed.numel() else changed
    changed = of_groups.expand_as(changed).contiguous()
    return torch.where(blocks.restore(changed, now, format, _dim(now)) > 0, rounded, before)


def checksum(x: Tensor) -> int:
    """Of the bits of a parameter, in the order of its elements."""
    return zlib.crc32(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def is_stored(x: Tensor, format: AnyFormat) -> bool:
    """Whether all of `x`, a float32 parameter, are numbers of the format, each group under some scale.

    Each group may have a scale of its own time, with two levels the tensor's too: it was rounded when a step changed
    it. False where nobody can tell: of an expansion, and of numbers so small that float32 has no digits left for them.
    """
    assert isinstance(format, BlockFormat)
    if format.scaling.kind == "expand" or not bool(x.isfinite().all()):
        return False
    rows, groups = _groups(x.detach().float(), format)
    # Most of what is not stored is told by few groups.
    return _are_stored(rows[:_GLANCE], groups[:_GLANCE], format) and _are_stored(rows, groups, format)


def _groups(x: Tensor, format: BlockFormat) -> tuple[Tensor, Tensor]:
    """blocks.rows, and the number of the group that each row is in, int64 (rows,)."""
    rows = blocks.rows(x, format, _dim(x))
    numbers = torch.arange(len(rows), dtype=torch.float64, device=x.device)[:, None]
    return rows, blocks.shared(numbers, x, format, _dim(x))[:, 0].long()


def _are_stored(rows: Tensor, groups: Tensor, format: BlockFormat) -> bool:
    """See is_stored. Tries one scale after the other for all groups, and goes on with those that none has fitted."""
    groups = torch.unique(groups, return_inverse=True)[1]
    largest = _largest_in(rows.abs().amax(1), groups)
    is_open = largest > 0  # by group; zeros are numbers of any format
    for scaled in _tries(format):
        here = is_open[groups]
        rows, groups = rows[here], groups[here]
        if not len(rows):
            return True
        fits = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for width in (min(rows.shape[1], _GLANCE), rows.shape[1]):
            part = rows[fits, :width]
            fits[fits.clone()] = (scaled(part, largest[groups[fits]][:, None]) == part).all(1)
        is_open = _largest_in((~fits).float(), groups, len(largest)) > 0
    return not bool(is_open[groups].any())


def _largest_in(x: Tensor, groups: Tensor, count: int | None = None) -> Tensor:
    """The largest number of each group: (rows,) -> (groups,)."""
    count = int(groups.max()) + 1 if count is None and len(groups) else count or 0
    return x.new_zeros(count).scatter_reduce_(0, groups, x, "amax")


_Scaled = Callable[[Tensor, Tensor], Tensor]  # (numbers, the largest magnitude of the group of each) -> rounded again


def _tries(format: BlockFormat) -> Iterator[_Scaled]:
    """What the numbers of a group become, if its largest magnitude is one of the element's values, for each of them."""
    kind, element = format.scaling.kind, format.element
    scale_format = format.scaling.element if isinstance(format.scaling.element, Format) else None
    for value in _magnitudes(element):
        if kind == TWO_LEVEL:
            for digits, ulps in itertools.product(_digits(scale_format), _ULPS):
                yield functools.partial(_under_two_levels, element, value, digits, ulps)
        elif kind in ("float32", DELAYED):
            for ulps in _ULPS:
                yield functools.partial(_under_float32, element, value, ulps)
        else:
            yield functools.partial(_under_a_power, element, value, 0.75 if kind == "headroom" else 1.0)
    most = torch.finfo(torch.float32).max  # a scale that would have been infinite
    if scale_format is not None:
        smallest = torch.tensor(1.0, dtype=torch.float32, device="cpu") / most
        for scale in _magnitudes(scale_format):
            yield functools.partial(_with_two_levels, element, scale, smallest)
    elif kind in ("float32", DELAYED):
        yield lambda x, largest: quantize(x * most, element) / torch.full_like(x, most)


def _under_float32(element: AnyElement, value: float, ulps: int, x: Tensor, largest: Tensor) -> Tensor:
    scale = _next(torch.full_like(largest, value) / largest, ulps)
    return quantize(x * scale, element) / scale


def _under_a_power(element: AnyElement, value: float, factor: float, x: Tensor, largest: Tensor) -> Tensor:
    """The scale is `factor` times a power of two: the one that is next to value / largest."""
    digits, exponents = torch.frexp(value / factor / largest.double())
    scale = factor * torch.ldexp(torch.ones_like(digits), exponents - (digits < 0.75).int())
    return (quantize(x.double() * scale, element) / scale).float()


def _under_two_levels(
    element: AnyElement, value: float, digits: float, ulps: int, x: Tensor, largest: Tensor
) -> Tensor:
    """digits: of the group's scale; its power of two goes into the tensor's, which is another one for each group."""
    return _with_two_levels(element, digits, _next(largest / torch.full_like(largest, value * digits), ulps), x)


def _with_two_levels(element: AnyElement, scale: float, tensor: Tensor, x: Tensor, _: Tensor | None = None) -> Tensor:
    return ((quantize(x.double() / (scale * tensor.double()), element) * scale).float() * tensor).float()


def _next(x: Tensor, ulps: int) -> Tensor:
    """The number that is so many float32 numbers above."""
    return (x.view(torch.int32) + ulps).view(torch.float32)


def _digits(format: Format | None) -> list[float]:
    """What the numbers of a format are, but for a power of two; none where they are too many."""
    bits = format.mantissa_bits if format else _MOST_DIGITS + 1
    return [1 + n / 2**bits for n in reversed(range(2**bits))] if bits <= _MOST_DIGITS else []


@functools.cache
def _magnitudes(element: AnyElement) -> tuple[float, ...]:
    """Of an element's values, from the largest on, but not 0 and no more than _MOST_VALUES."""
    if not isinstance(element, Format):
        return tuple(sorted({abs(value) for value in element.values if value}, reverse=True))[:_MOST_VALUES]
    magnitudes, value = [element.largest], element.largest
    while value > element.smallest_subnormal and len(magnitudes) < _MOST_VALUES:
        exponent = math.frexp(value)[1] - 1
        exponent -= math.ldexp(1.0, exponent) == value  # below a power of two numbers lie closer
        value -= max(math.ldexp(1.0, exponent - element.mantissa_bits), element.smallest_subnormal)
        magnitudes.append(value)
    return tuple(magnitudes)


def _dim(x: Tensor) -> int:
    """Along which groups run in a parameter: Quantizer's default."""
    return min(1, x.ndim - 1)
