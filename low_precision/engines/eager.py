"""The readable engine: integer arithmetic on the bits of floating-point numbers, in plain PyTorch, on any device.

It is the specification: every other engine must equal it bit for bit. No floating-point arithmetic rounds on the way,
so there is no double rounding anywhere, and neither the processor's rounding mode nor its flushing of subnormals
matters.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from low_precision import blocks
from low_precision.formats import AnyFormat, BlockFormat, Format
from low_precision.noise import LOW_WORD, Key, hash_words, words
from low_precision.rounding import AnyRounding, FewBits, Overflow, Rounding, is_random

_CPU_BLOCK = 2**17  # elements at a time: the temporaries of a block stay in the cache
_GPU_BLOCK = 2**26


@dataclass(frozen=True)
class _Carrier:
    """The floating-point type that holds the numbers, of `width` bits, and the whole numbers that hold its bits."""

    floats: torch.dtype
    integers: torch.dtype
    codes: tuple[str, str]  # of both, for struct
    width: int
    digits: int  # of the mantissa
    bias: int
    most_dropped: int  # bits that one rounding cuts off; what lies further down needs more random bits

    @property
    def magnitudes(self) -> int:
        """A mask of all bits but the sign."""
        return (1 << self.width - 1) - 1

    @property
    def infinity(self) -> int:
        """Its bits; a magnitude above it is a NaN."""
        return ((1 << self.width - 1 - self.digits) - 1) << self.digits

    def bits_of(self, value: float) -> int:
        """value: a finite number of the type, >= 0."""
        return int(struct.unpack(self.codes[1], struct.pack(self.codes[0], value))[0])


_SINGLE = _Carrier(torch.float32, torch.int32, ("<f", "<i"), 32, 23, 127, 30)
_DOUBLE = _Carrier(torch.float64, torch.int64, ("<d", "<q"), 64, 52, 1023, 59)


def quantize(
    x: Tensor,
    fmt: AnyFormat,
    rounding: AnyRounding,
    overflow: Overflow,
    key: Key | None,
    dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Round `x` of any shape and strides; see tensor.quantize. Elements count in row-major order."""
    if isinstance(fmt, BlockFormat):
        result = _quantize_blocks(x, fmt, rounding, key, dim)
    else:
        dtype, x = x.dtype, x if x.dtype == torch.float64 else x.float()
        rounded = _round(x.reshape(-1), fmt, rounding, overflow, key, _first(key, x, x.numel()))
        if x.is_contiguous():
            result = rounded.as_strided(x.shape, x.stride())
        else:  # copy_ keeps the layout of x, e.g. channels_last
            result = torch.empty_like(x).copy_(rounded.view(x.shape))
        result = blocks.narrowed(result, dtype)
    return result if out is None else out.copy_(result)


def _quantize_blocks(x: Tensor, fmt: BlockFormat, rounding: AnyRounding, key: Key | None, dim: int) -> Tensor:
    """In float64, where division by a scale of a power of two and multiplication by any scale are exact, and a quotient
    by a scale of NVFP4 is a tie only where it is one exactly.

    Elements count in the order of blocks.rows, the filling at a line's end included.
    """
    rows = blocks.rows(x, fmt, dim)
    type_largest = torch.finfo(x.dtype).max
    scales = blocks.scales(blocks.maxima(rows, type_largest), fmt, type_largest)  # (blocks, 1)
    scaled = rows.double() / scales
    if rows.dtype == torch.float64:
        # A quotient too small for float64 is far below the smallest element. So is float64's smallest normal number,
        # which becomes the same: zero, or the smallest element upwards.
        least = torch.finfo(torch.float64).tiny
        scaled = torch.where((rows != 0) & (scaled.abs() < least), rows.sign() * least, scaled)
    first = _first(key, x, rows.numel())
    rounded = _round(scaled.reshape(-1), fmt.element, rounding, Overflow.SATURATE, key, first).view(rows.shape)
    return blocks.restore(blocks.narrowed(blocks.reached(rounded * scales, fmt, x.dtype), x.dtype), x, fmt, dim)


def _first(key: Key | None, x: Tensor, elements: int) -> int:
    return key.first_element(len(x), elements) if key and key.first_row else 0


def _round(flat: Tensor, fmt: Format, rounding: AnyRounding, overflow: Overflow, key: Key | None, first: int) -> Tensor:
    """flat: float32 or float64, contiguous (n,), its elements counted from `first` on -> new tensor, same."""
    carrier = _DOUBLE if flat.dtype == torch.float64 else _SINGLE
    rounded = torch.empty_like(flat)
    size = _CPU_BLOCK if flat.device.type == "cpu" else _GPU_BLOCK
    start = 0
    while start < len(flat):
        index = first + start
        stop = min(start + size, start + 2**32 - index % 2**32)  # what `words` can give
        block = flat[start:stop].view(carrier.integers)
        rounded[start:stop] = _round_block(block, carrier, fmt, rounding, overflow, key, index)
        start = stop
    return rounded


def _round_block(
    bits: Tensor,
    carrier: _Carrier,
    fmt: Format,
    rounding: AnyRounding,
    overflow: Overflow,
    key: Key | None,
    start: int,
) -> Tensor:
    """bits: (n,), those of the elements from `start` on -> floating-point (n,).

    Shifts and masks where one would expect comparisons and torch.where, which take PyTorch four times as long.
    """
    magnitude = bits & carrier.magnitudes
    sign = bits >> carrier.width - 1  # 0 or -1
    scale = (magnitude >> carrier.digits).sub_(1).clamp_(min=0)  # |x| = significand * 2**(scale - constant)
    significand = magnitude - (scale << carrier.digits)

    # How many of the significand's bits lie below the last place of the format: more in its subnormal range.
    normal_drop, lowest_level = carrier.digits - fmt.mantissa_bits, carrier.bias - fmt.bias
    level = scale.clamp(min=lowest_level)  # the scale that decides the last place
    whole_drop = (level - scale).add_(normal_drop)
    # Only random roundings look at the whole of it again; for the others, a copy of it would take time.
    most = carrier.most_dropped
    drop = whole_drop.clamp(max=most) if is_random(rounding) else whole_drop.clamp_(max=most)

    # Add the part of the last place that the rounding mode asks for, then cut what lies below the last place.
    if rounding is Rounding.TOWARD_ZERO:
        rounded = significand >> drop
    elif rounding is Rounding.STOCHASTIC or isinstance(rounding, FewBits):
        assert key is not None
        word = _words(carrier, key, start, len(bits), bits.device)
        noise = ((word >> 1) & carrier.magnitudes) >> (carrier.width - 1 - drop)  # the top `drop` bits of the word
        if isinstance(rounding, FewBits):
            reached = significand >> (whole_drop - drop).clamp_(max=carrier.width - 1)
            rounded = _few_of(noise, drop, rounding).add_(reached) >> drop
        else:
            rounded = noise.add_(significand) >> drop
            if bool((whole_drop > drop).any()):
                _round_deep(rounded, word, significand, whole_drop, carrier, key, start)
    else:
        exponent = None
        if rounding is Rounding.NEAREST and fmt.mantissa_bits == 0:
            exponent = (scale - lowest_level).clamp_(min=0)
        added = _part_of_last_place(rounding, significand, exponent, drop, sign)
        rounded = added.add_(significand) >> drop

    # Back to a floating-point number. A carry out of the significand is taken along.
    if fmt.bias == carrier.bias:  # the last place may be a subnormal of the carrier: compose the bits
        result = (rounded << drop).add_(scale << carrier.digits)
        result &= carrier.magnitudes  # a NaN's carry
    else:  # an exact product of normal numbers
        last_place = (level + (1 - fmt.mantissa_bits)) << carrier.digits
        result = rounded.to(carrier.floats).mul_(last_place.view(carrier.floats)).view(carrier.integers)
    return _finished(result, magnitude, sign, carrier, fmt, rounding, overflow)


def _finished(
    result: Tensor,
    magnitude: Tensor,
    sign: Tensor,
    carrier: _Carrier,
    fmt: Format,
    rounding: AnyRounding,
    overflow: Overflow,
) -> Tensor:
    """The result, which is overwritten, as floating-point numbers: after overflow, with NaNs and signs.

    magnitude, sign: of the numbers before they were rounded.
    """
    largest = carrier.bits_of(fmt.largest)
    limit = largest + (sign & (carrier.bits_of(-fmt.lowest) - largest)) if fmt.twos_complement else largest
    if overflow is Overflow.SATURATE:
        result = result.clamp_(max=limit)
    else:
        beyond = torch.where(_stops_at_largest(rounding, magnitude < carrier.infinity, sign), limit, carrier.infinity)
        result = torch.where(result > limit, beyond.to(carrier.integers), result)
    result |= ((carrier.infinity - magnitude) >> carrier.width - 1) & carrier.magnitudes  # NaN stays: there, all bits
    negative = sign << carrier.width - 1
    if not fmt.has_negative_zero:
        negative &= (-result) >> carrier.width - 1
    return result.bitwise_or_(negative).view(carrier.floats)


def _part_of_last_place(
    rounding: Rounding, significand: Tensor, exponent: Tensor | None, drop: Tensor, sign: Tensor
) -> Tensor:
    """What rounding to nearest, up or down adds before the lowest `drop` bits are cut off.

    exponent: that of the format's code below, where the code is nothing else because there is no mantissa.
    """
    below = torch.bitwise_left_shift(1, drop).sub_(1)  # the largest remainder: all dropped bits set
    if rounding is Rounding.NEAREST:
        last = significand >> drop  # its last bit is that of the format's code below ...
        if exponent is not None:  # ... but without a mantissa, the hidden bit and the exponent make it
            last += exponent
        return below.add_(last.bitwise_and_(1)) >> 1
    if rounding is Rounding.NEAREST_AWAY:
        return below.add_(1) >> 1
    if rounding is Rounding.UP:
        return below.bitwise_and_(~sign)
    return below.bitwise_and_(sign)


def _few_of(noise: Tensor, drop: Tensor, rounding: FewBits) -> Tensor:
    """The random bits that there are, the top ones of `drop`, and half of the last of them with half_offset."""
    unused = (drop - rounding.bits).clamp_(min=0)
    noise = (noise >> unused) << unused
    if rounding.half_offset:
        noise |= torch.bitwise_left_shift(1, unused) >> 1
    return noise


def _stops_at_largest(rounding: AnyRounding, finite: Tensor, sign: Tensor) -> Tensor:
    """Where a directed rounding of a finite number ends at the largest value, not at infinity (IEEE 754-2019, 7.4)."""
    if rounding is Rounding.TOWARD_ZERO:
        return finite
    if rounding is Rounding.UP:
        return finite & (sign < 0)
    if rounding is Rounding.DOWN:
        return finite & (sign == 0)
    return torch.zeros_like(finite)


def _words(carrier: _Carrier, key: Key, start: int, count: int, device: torch.device) -> Tensor:
    """A random word for each element, as wide as the carrier; float64's begins with float32's."""
    word = words(key, start, count, device)
    if carrier is _SINGLE:
        return word
    return (word.to(torch.int64) << 32) | (words(key, start, count, device, LOW_WORD).to(torch.int64) & 0xFFFFFFFF)


def _round_deep(
    rounded: Tensor, word: Tensor, significand: Tensor, drop: Tensor, carrier: _Carrier, key: Key, start: int
) -> None:
    """Stochastic rounding of values so far below the smallest one that one word has too few bits: in place.

    |x| = significand * 2**-drop of the smallest value. Where drop > most_dropped, it is rounded up if the word's top
    bits, as many as a significand has, are below the significand and all further random bits down to 2**-drop are zero.
    So the probability is exact for every number of the carrier.
    """
    where = ((drop > carrier.most_dropped) & (significand > 0)).nonzero().squeeze(1)
    width = carrier.digits + 1  # of a significand
    significand, drop = significand[where], drop[where]
    missing = width - torch.frexp(significand.double())[1]  # leading zeros, which a subnormal number's has
    up = ((word[where] >> carrier.width - width) & ((1 << width) - 1)) < significand << missing
    zeros = drop - width + missing  # how many further bits must be zero
    draw = 1
    while (undecided := up & (zeros > 0)).any():
        index = where[undecided] + start % 2**32
        further = hash_words(index.to(torch.int32), key.parts(start >> 32, draw)).to(torch.int64) & 0xFFFFFFFF
        up[undecided] = (further >> (32 - zeros[undecided].clamp(max=32))) == 0
        zeros -= 32
        draw += 1
    rounded[where] = up.to(rounded.dtype)
