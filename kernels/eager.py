"""The readable engine: integer arithmetic on the float32 bits, in plain PyTorch, on any device.

It is the specification: every other engine must equal it bit for bit. No float32 arithmetic rounds on the way, so
there is no double rounding anywhere, and neither the processor's rounding mode nor its flushing of subnormals matters.
"""

from __future__ import annotations

import struct

import torch

from formats import Format, Overflow, Rounding
from kernels.noise import Key, hash_words, words

_INFINITY = 0x7F800000  # the bits of float32's infinity; a magnitude above it is a NaN
_SIGN = -(2**31)
_CPU_BLOCK = 2**17  # elements at a time: the temporaries of a block stay in the cache
_GPU_BLOCK = 2**26
_MAX_DROP = 30  # the most bits that one word rounds away


def _bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def quantize(x: torch.Tensor, fmt: Format, rounding: Rounding, overflow: Overflow, key: Key | None) -> torch.Tensor:
    """Round float32 `x` of any shape and strides; see quant.quantize. Elements count in row-major order."""
    flat = x.detach().reshape(-1)
    rounded = torch.empty_like(flat)
    size = _CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    for start in range(0, len(flat), size):
        block = flat[start : start + size]
        rounded[start : start + size] = _round_block(block, fmt, rounding, overflow, key, start)
    if x.is_contiguous():
        return rounded.view(x.shape)
    return torch.empty_like(x).copy_(rounded.view(x.shape))  # keeps the layout of x, e.g. channels_last


def _round_block(
    x: torch.Tensor, fmt: Format, rounding: Rounding, overflow: Overflow, key: Key | None, start: int
) -> torch.Tensor:
    """x: float32 (n,), the elements from `start` on -> float32 (n,).

    Shifts and masks where one would expect comparisons and torch.where, which take PyTorch four times as long.
    """
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    scale = (magnitude >> 23).sub_(1).clamp_(min=0)  # |x| = significand * 2**(scale - 149), significand < 2**24
    significand = magnitude - (scale << 23)

    # How many of the significand's bits lie below the last place of the format: more in its subnormal range.
    always = 23 - fmt.mantissa_bits
    level = scale.clamp(min=127 - fmt.bias)  # the scale that decides the last place
    drop = (level - scale).add_(always)
    far = rounding is Rounding.STOCHASTIC and int(drop.max()) > _MAX_DROP
    drop.clamp_(max=_MAX_DROP)

    # Add the part of the last place that the rounding mode asks for, then cut what lies below the last place.
    if rounding is Rounding.TOWARD_ZERO:
        rounded = significand >> drop
    elif rounding is Rounding.STOCHASTIC:
        word = words(key, start, len(x), x.device)
        noise = ((word >> 1) & 0x7FFFFFFF) >> (31 - drop)  # the top `drop` bits of the word
        rounded = noise.add_(significand) >> drop
        if far:
            _round_far(rounded, word, significand, level - scale + always, key, start)
    else:
        below = torch.bitwise_left_shift(1, drop).sub_(1)  # the largest remainder: all dropped bits set
        if rounding is Rounding.NEAREST:
            last = significand >> drop  # its last bit is that of the format's code below ...
            if fmt.mantissa_bits == 0:  # ... but without a mantissa, the code is the exponent
                last += scale - (127 - fmt.bias)
            below = below.add_(last.bitwise_and_(1)) >> 1
        elif rounding is Rounding.NEAREST_AWAY:
            below = below.add_(1) >> 1
        elif rounding is Rounding.UP:
            below &= ~(bits >> 31)
        elif rounding is Rounding.DOWN:
            below &= bits >> 31
        rounded = below.add_(significand) >> drop

    # Back to float32: rounded * 2**(level - 149 + always). A carry out of the significand is taken along.
    if fmt.bias == 127:  # the last place may be a subnormal of float32: compose the bits
        result = (rounded << drop).add_(scale << 23)
    else:  # an exact product of normal numbers
        last_place = (level + (1 - fmt.mantissa_bits)) << 23
        result = rounded.float().mul_(last_place.view(torch.float32)).view(torch.int32)

    largest = _bits(fmt.largest)
    if overflow is Overflow.SATURATE:
        result.clamp_(max=largest)
    else:
        beyond = torch.where(_stops_at_largest(rounding, bits), largest, _INFINITY)
        result = torch.where(result > largest, beyond.to(torch.int32), result)
    result |= (_INFINITY - magnitude) >> 31  # NaN stays: there, all bits set
    sign = bits & _SIGN
    if not fmt.has_negative_zero:
        sign &= (-result) >> 31
    return result.bitwise_or_(sign).view(torch.float32)


def _stops_at_largest(rounding: Rounding, bits: torch.Tensor) -> torch.Tensor:
    """Where a directed rounding of a finite number ends at the largest value, not at infinity (IEEE 754-2019, 7.4)."""
    finite = (bits & 0x7FFFFFFF) < _INFINITY
    if rounding is Rounding.TOWARD_ZERO:
        return finite
    if rounding is Rounding.UP:
        return finite & (bits < 0)
    if rounding is Rounding.DOWN:
        return finite & (bits >= 0)
    return torch.zeros_like(finite)


def _round_far(
    rounded: torch.Tensor, word: torch.Tensor, significand: torch.Tensor, drop: torch.Tensor, key: Key, start: int
) -> None:
    """Stochastic rounding of values so far below the smallest one that one word has too few bits: in place.

    |x| = significand * 2**-drop of the smallest value, drop > 30: it is rounded up where the word's top 24 bits are
    below the significand and drop - 24 further random bits are all zero. So the probability is exact for every float32.
    """
    where = ((drop > _MAX_DROP) & (significand > 0)).nonzero().squeeze(1)
    up = ((word[where] >> 8) & 0xFFFFFF) < significand[where]
    zeros = drop[where] - 24  # how many further bits must be zero
    draw = 1
    while (undecided := up & (zeros > 0)).any():
        index = where[undecided] + start % 2**32
        further = hash_words(index.to(torch.int32), key.parts(start >> 32, draw)).to(torch.int64) & 0xFFFFFFFF
        up[undecided] = (further >> (32 - zeros[undecided].clamp(max=32))) == 0
        zeros -= 32
        draw += 1
    rounded[where] = up.to(rounded.dtype)
