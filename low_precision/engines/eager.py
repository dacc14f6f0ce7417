"""The readable engine: integer arithmetic on the bits of floating-point numbers, in plain PyTorch, on any device.

It is the specification: every other engine must equal it bit for bit. No floating-point arithmetic rounds on the way,
so there is no double rounding anywhere, and neither the processor's rounding mode nor its flushing of subnormals
matters. But where numbers share a scale that is no power of two, they are multiplied by it first, in their own type,
as hardware does.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from low_precision import blocks
from low_precision.engines import table
from low_precision.expand import quantize_expand
from low_precision.formats import AnyFormat, BlockFormat, Format
from low_precision.noise import LOW_WORD, Key, hash_words, words
from low_precision.rounding import AnyRounding, FewBits, Overflow, Rounding, is_random
from low_precision.tables import Table

_CPU_BLOCK = 2**17  # elements at a time: the temporaries of a block stay in the cache
_GPU_BLOCK = 2**26
_SMALLEST_NORMAL = 2.0**-1022  # of float64
_UPWARDS = 2.0**512  # an even power, so that codes without a mantissa stay even or odd


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
    scale: Tensor | None = None,
    *,
    by: By | None = None,
) -> Tensor:
    """Round `x` of any shape and strides; see tensor.quantize. Elements count in row-major order.

    by: what another engine does faster.
    """
    by = by or By()
    if isinstance(fmt, BlockFormat):
        result = _quantize_blocks(x, fmt, rounding, key, dim, scale, by)
    else:
        dtype, x = x.dtype, x if x.dtype == torch.float64 else x.float()
        flat, first = x.reshape(-1).contiguous(), _first(key, x, x.numel())  # reshape alone may give every other number
        if isinstance(fmt, Table):
            rounded = by.to_table(flat, fmt, rounding, key, first)
        else:
            rounded = by.to_format(flat, fmt, rounding, overflow, key, first)
        if x.is_contiguous():
            result = rounded.as_strided(x.shape, x.stride())
        else:  # copy_ keeps the layout of x, e.g. channels_last
            result = torch.empty_like(x).copy_(rounded.view(x.shape))
        result = blocks.narrowed(result, dtype)
    return result if out is None else out.copy_(result)


def _quantize_blocks(
    x: Tensor,
    fmt: BlockFormat,
    rounding: AnyRounding,
    key: Key | None,
    dim: int,
    scale: Tensor | None,
    by: By,
) -> Tensor:
    """Elements count in the order of blocks.rows, the filling at a line's end included."""
    rows, type_largest = blocks.rows(x, fmt, dim), torch.finfo(x.dtype).max
    rows = rows if rows.dtype == torch.float64 else rows.float()
    largest_in = blocks.shared(blocks.maxima(rows, type_largest), x, fmt, dim)  # (blocks, 1)

    def to_elements(numbers: Tensor) -> Tensor:
        first = _first(key, x, rows.numel())
        flat = numbers.reshape(-1)
        if isinstance(fmt.element, Table):
            return by.to_table(flat, fmt.element, rounding, key, first).view(rows.shape)
        return by.to_format(flat, fmt.element, rounding, Overflow.SATURATE, key, first).view(rows.shape)

    def to_nearest(numbers: Tensor, scale_format: Format) -> Tensor:
        flat = numbers.reshape(-1)
        return by.to_format(flat, scale_format, Rounding.NEAREST, Overflow.SATURATE, None, 0).view(numbers.shape)

    if fmt.scaling.is_power and by.powers_in_float32 and rows.dtype == torch.float32 and not goes_up(rounding):
        factors = blocks.Factors((1.0 / blocks.powers(largest_in, fmt)).float())
        rounded = blocks.scaled_back(to_elements(rows * factors.encode), factors)
    elif fmt.scaling.is_power:
        rounded = _in_powers(rows, blocks.powers(largest_in, fmt), to_elements)
    elif fmt.scaling.kind == "expand":
        rounded = quantize_expand(rows, fmt.element.largest, type_largest, to_elements)
    else:
        is_quest = fmt.scaling.kind == "quest"
        factors = (
            blocks.quest_factors(rows, fmt.element, type_largest)
            if is_quest
            else blocks.factors(largest_in, fmt, to_nearest, scale)
        )
        rounded = blocks.scaled_back(to_elements(rows * factors.encode), factors)
    if not x.is_cpu or fmt.scaling.kind == "expand":  # a product or a power of a NaN may have another sign
        rounded = blocks.with_nans_of(rows, rounded)
    return blocks.restore(blocks.narrowed(blocks.reached(rounded, x.dtype), x.dtype), x, fmt, dim)


def goes_up(rounding: AnyRounding) -> bool:
    """Whether a number however small may become the smallest value: no quotient may become zero before."""
    return rounding in (Rounding.UP, Rounding.DOWN, Rounding.TO_ODD)


def _in_powers(rows: Tensor, scales: Tensor, to_elements: Callable[[Tensor], Tensor]) -> Tensor:
    """Numbers divided by powers of two, and multiplied again: in float64, where both are exact."""
    scaled = rows.double() / scales
    if rows.dtype == torch.float64:
        # A quotient too small for float64 is far below the smallest element. So is float64's smallest normal number,
        # which becomes the same: zero, or the smallest element upwards.
        least = torch.finfo(torch.float64).tiny
        scaled = torch.where((rows != 0) & (scaled.abs() < least), rows.sign() * least, scaled)
    return to_elements(scaled) * scales


def _first(key: Key | None, x: Tensor, elements: int) -> int:
    return key.first_element(len(x), elements) if key and key.first_row else 0


def _round(flat: Tensor, fmt: Format, rounding: AnyRounding, overflow: Overflow, key: Key | None, first: int) -> Tensor:
    """flat: float32 or float64, contiguous (n,), its elements counted from `first` on -> new tensor, same."""
    if flat.dtype == torch.float32 and fmt.needs_float64:
        return _round(flat.double(), fmt, rounding, overflow, key, first).float()
    if fmt.smallest_subnormal < _SMALLEST_NORMAL:
        return _round_below_float64(flat, fmt, rounding, overflow, key, first)
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


def _round_below_float64(
    flat: Tensor, fmt: Format, rounding: AnyRounding, overflow: Overflow, key: Key | None, first: int
) -> Tensor:
    """Of float64 numbers, to a format whose spacing is a subnormal number of theirs: those below 1 as numbers far above
    themselves, and the others without the format's smallest values. All products are exact.
    """
    below, above = _parts_of(fmt)
    is_below = flat.abs() < 1
    moved = torch.where(is_below | ~flat.isfinite(), flat, flat.sign()) * _UPWARDS
    result = _round(moved, below, rounding, overflow, key, first) * (1 / _UPWARDS)
    if above is None:
        return result
    return torch.where(is_below, result, _round(flat, above, rounding, overflow, key, first))


@functools.cache
def _parts_of(fmt: Format) -> tuple[Format, Format | None]:
    """The format times _UPWARDS up to 1, and from 1 on; None where it ends below 1."""
    bias, largest = fmt.bias - 512, min(fmt.largest, 1.0) * _UPWARDS
    above = replace(fmt, bias=bias) if fmt.largest >= 1 else None
    return replace(fmt, bias=bias, largest=largest), above


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
            too_far = (whole_drop - drop).clamp_(max=carrier.width - 1)
            reached = significand >> too_far
            if rounding.even:  # what is shifted out is less than all random bits, and counts for ties, as one bit
                reached |= ((reached << too_far) != significand).to(carrier.integers)
            rounded = _few_of(noise, drop, reached, rounding).add_(reached) >> drop
        else:
            rounded = noise.add_(significand) >> drop
            if bool((whole_drop > drop).any()):
                _round_deep(rounded, word, significand, whole_drop, carrier, key, start)
    else:
        exponent = None
        if rounding in (Rounding.NEAREST, Rounding.TO_ODD) and fmt.mantissa_bits == 0:
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
    largest, lowest = carrier.bits_of(fmt.largest), carrier.bits_of(abs(fmt.lowest))
    limit = largest if largest == lowest else largest + (sign & (lowest - largest))
    if overflow is Overflow.INFINITY:
        infinite = carrier.infinity if fmt.signed else (sign & carrier.magnitudes) | carrier.infinity  # NaN below zero
        stops = _stops_at_largest(fmt, rounding, magnitude < carrier.infinity, sign)
        beyond = torch.where(stops, limit, infinite)
        result = torch.where(result > limit, beyond.to(carrier.integers), result)
    else:
        result = result.clamp_(max=limit)
        if overflow is Overflow.PROPAGATE and fmt.has_infinity:
            stays = (magnitude == carrier.infinity) & (fmt.signed | (sign == 0))
            result = result.masked_fill_(stays, carrier.infinity)
    result |= ((carrier.infinity - magnitude) >> carrier.width - 1) & carrier.magnitudes  # NaN stays: there, all bits
    negative = sign << carrier.width - 1
    if not fmt.has_negative_zero:
        negative &= (-result) >> carrier.width - 1
    return result.bitwise_or_(negative).view(carrier.floats)


def _part_of_last_place(
    rounding: Rounding, significand: Tensor, exponent: Tensor | None, drop: Tensor, sign: Tensor
) -> Tensor:
    """What rounding to nearest, up, down or to odd adds before the lowest `drop` bits are cut off.

    exponent: that of the format's code below, where the code is nothing else because there is no mantissa.
    """
    below = torch.bitwise_left_shift(1, drop).sub_(1)  # the largest remainder: all dropped bits set
    if rounding in (Rounding.NEAREST, Rounding.TO_ODD):
        last = significand >> drop  # its last bit is that of the format's code below ...
        if exponent is not None:  # ... but without a mantissa, the hidden bit and the exponent make it
            last += exponent
        last.bitwise_and_(1)
        if rounding is Rounding.TO_ODD:  # up to the next code from an even one, unless nothing is cut off
            return below.bitwise_and_(last.sub_(1))
        return below.add_(last) >> 1
    if rounding is Rounding.NEAREST_AWAY:
        return below.add_(1) >> 1
    if rounding is Rounding.UP:
        return below.bitwise_and_(~sign)
    return below.bitwise_and_(sign)


def _few_of(noise: Tensor, drop: Tensor, significand: Tensor, rounding: FewBits) -> Tensor:
    """The random bits that there are, the top ones of `drop`, and what is added below them: half of the last of them
    with half_offset, with `even` what rounds the part of the significand that is cut off to as many bits.
    """
    unused = (drop - rounding.bits).clamp_(min=0)
    noise = (noise >> unused) << unused
    if rounding.half_offset:
        noise |= torch.bitwise_left_shift(1, unused) >> 1
    elif rounding.even:
        last = (significand >> unused).bitwise_and_(1)
        noise |= torch.bitwise_left_shift(1, unused).sub_(1).add_(last) >> 1
    return noise


def _stops_at_largest(fmt: Format, rounding: AnyRounding, finite: Tensor, sign: Tensor) -> Tensor:
    """Where the rounding of a finite number ends at the largest value, not at infinity: a directed one (IEEE 754-2019,
    7.4), and one to odd where that value's code is odd (P3109, 4.7.5), but not below the zero of an unsigned format.
    """
    if rounding is Rounding.TO_ODD and fmt.ends_odd:
        return finite & (fmt.signed | (sign == 0))
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


@dataclass(frozen=True)
class By:
    """The parts of rounding that another engine may do in its own way, with the same bits.

    to_format, to_table: flat numbers to a Format, to a Table; see `_round` and table.round_table. powers_in_float32:
    whether float32 numbers are multiplied by scales that are powers of two in float32. That is exact but for quotients
    below float32's numbers, which become zero before they are rounded; see `goes_up`.
    """

    to_format: Callable[[Tensor, Format, AnyRounding, Overflow, Key | None, int], Tensor] = _round
    to_table: Callable[[Tensor, Table, AnyRounding, Key | None, int], Tensor] = table.round_table
    powers_in_float32: bool = False
