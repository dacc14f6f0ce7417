"""Numbers that are stored in a format already, and so stay as they are.

A number of a format without scales never moves when it is rounded again. Where numbers share a scale that is a number
of a format itself, as in NVFP4, it may: the scale follows from the largest magnitude, and that is another one after
rounding. So what is stored is not rounded again: a group of numbers that nobody has changed, or that consists of
numbers of the format under some scale, as a loaded one does.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from low_precision import blocks
from low_precision.formats import AnyFormat, BlockFormat, Format
from low_precision.tensor import quantize


def moves_again(format: AnyFormat) -> bool:
    """Whether a number of the format can move when it is rounded again. A scale of a power of two stays what it is."""
    return isinstance(format, BlockFormat) and format.scale is not None


def unchanged_or(before: Tensor, now: Tensor, rounded: Tensor, format: AnyFormat) -> Tensor:
    """`rounded`, but in groups of numbers that share a scale and are the same in `before` and `now`: `before`.

    All of one shape, that of a parameter, and format with a scale: moves_again(format).
    """
    assert isinstance(format, BlockFormat)
    changed = blocks.rows((before != now).float(), format, _dim(now))  # 1 or 0, and 0 where a line is filled up
    changed = changed.amax(1, keepdim=True).expand_as(changed).contiguous()
    return torch.where(blocks.restore(changed, now, format, _dim(now)) > 0, rounded, before)


def is_stored(x: Tensor, format: AnyFormat) -> bool:
    """Whether all of `x`, a float32 parameter, are numbers of the format, each group under some scale of the format."""
    assert isinstance(format, BlockFormat)
    assert format.scale is not None
    if not bool(x.isfinite().all()) or _has_more_digits(x, format.element, format.scale):
        return False
    rows = blocks.rows(x.double(), format, _dim(x))
    rows = rows[(rows != 0).any(1)]
    # The largest magnitude of a group is one of the element's values times the group's scale. The tensor's own scale, a
    # power of two, was another one when a group was rounded that no step has changed since: so any will do.
    for value in _positive_values(format.element):
        scale = rows.abs().amax(1, keepdim=True) / value
        digits = torch.frexp(scale)[0] * 2.0 ** (format.scale.mantissa_bits + 1)
        is_scale = digits == digits.round()
        quotients = rows / torch.where(is_scale, scale, 1.0)
        right = is_scale & (quantize(quotients, format.element) == quotients).all(1, keepdim=True)
        rows = rows[~right[:, 0]]
        if not len(rows):
            return True
    return False


def _has_more_digits(x: Tensor, element: Format, scale: Format) -> bool:
    """Whether a number has more digits than any product of a value and a scale: this tells most tensors at once."""
    product_digits = element.mantissa_bits + scale.mantissa_bits + 1
    below = (1 << max(23 - product_digits, 0)) - 1
    return bool((x.detach().contiguous().view(torch.int32) & below).any())


@functools.cache
def _positive_values(format: Format) -> tuple[float, ...]:
    """The format's values above 0, from the largest to the smallest."""
    spacing, count = format.smallest_subnormal, 2**format.mantissa_bits
    values = {n * spacing for n in range(1, 2 * count)}
    exponent = 1
    while max(values) < format.largest:
        values |= {n * spacing * 2.0**exponent for n in range(count, 2 * count)}
        exponent += 1
    return tuple(sorted((value for value in values if value <= format.largest), reverse=True))


def _dim(x: Tensor) -> int:
    """Along which groups run in a parameter: Quantizer's default."""
    return min(1, x.ndim - 1)
