"""The engine for CUDA: one pass over memory with the bits of engines/eager.py, in Triton, which comes with torch there.

engines/eager.py explains the arithmetic. Here every element takes the same way: memory is slower than that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from low_precision.blocks import NAN_BITS
from low_precision.engines import door, eager
from low_precision.engines.parameters import (
    DOWN,
    FEW_BITS,
    INFINITE,
    NEAREST,
    NEAREST_AWAY,
    PROPAGATE,
    STOCHASTIC,
    TO_ODD,
    TOWARD_ZERO,
    UP,
    mode_of,
    overflow_of,
    parameters,
)
from low_precision.engines.tasks import CannotCompile, because
from low_precision.formats import AnyFormat, Format
from low_precision.noise import GAMMA, MIX_MULTIPLIERS, MIX_SHIFTS, MULTIPLIERS, SHIFTS, Key
from low_precision.rounding import AnyRounding, Overflow

_TILE = 1024  # elements a program
_PIECE = 2**30  # elements a launch: indices within one fit in 32 bits, and none crosses a multiple of 2**32

# A kernel of Triton's sees those numbers of a module alone that are `constexpr`.
_NEAREST, _NEAREST_AWAY, _TOWARD_ZERO = tl.constexpr(NEAREST), tl.constexpr(NEAREST_AWAY), tl.constexpr(TOWARD_ZERO)
_UP, _DOWN = tl.constexpr(UP), tl.constexpr(DOWN)
_TO_ODD, _STOCHASTIC, _FEW_BITS = tl.constexpr(TO_ODD), tl.constexpr(STOCHASTIC), tl.constexpr(FEW_BITS)
_PROPAGATE, _INFINITE = tl.constexpr(PROPAGATE), tl.constexpr(INFINITE)
_MAGNITUDE, _INFINITY, _SIGN = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000), tl.constexpr(0x80000000)
_NAN_FLOAT16, _NAN_BFLOAT16 = (tl.constexpr(NAN_BITS[dtype] % 2**16) for dtype in (torch.float16, torch.bfloat16))
_SHIFT_0, _SHIFT_1, _SHIFT_2, _SHIFT_3 = (tl.constexpr(shift) for shift in SHIFTS)
_MULTIPLIER_0, _MULTIPLIER_1, _MULTIPLIER_2 = (tl.constexpr(multiplier) for multiplier in MULTIPLIERS)
_MIX_SHIFT_0, _MIX_SHIFT_1, _MIX_SHIFT_2 = (tl.constexpr(shift) for shift in MIX_SHIFTS)
_MIX_MULTIPLIER_0, _MIX_MULTIPLIER_1 = (tl.constexpr(multiplier) for multiplier in MIX_MULTIPLIERS)
_GAMMA = tl.constexpr(GAMMA)


@triton.jit
def _word(index, k0, k1, k2):
    """noise.word; k0, k1, k2: the words of the key."""
    x = index ^ k0
    x = (x ^ (x >> _SHIFT_0)) * _MULTIPLIER_0
    x = x ^ k1
    x = (x ^ (x >> _SHIFT_1)) * _MULTIPLIER_1
    x = x ^ k2
    x = (x ^ (x >> _SHIFT_2)) * _MULTIPLIER_2
    return x ^ (x >> _SHIFT_3)


@triton.jit
def _mix64(z):
    """noise.mix64."""
    z = (z ^ (z >> _MIX_SHIFT_0)) * _MIX_MULTIPLIER_0
    z = (z ^ (z >> _MIX_SHIFT_1)) * _MIX_MULTIPLIER_1
    return z ^ (z >> _MIX_SHIFT_2)


@triton.jit
def _words(index, key, draw):
    """The words of `draw`; key: noise.Key's value, moved to the elements' block of 2**32."""
    start = key + (draw.to(tl.uint64) << 32) * _GAMMA
    mixed, more = _mix64(start), _mix64(start ^ 0xFFFFFFFFFFFFFFFF)
    return _word(index, mixed.to(tl.uint32), (mixed >> 32).to(tl.uint32), more.to(tl.uint32))


@triton.jit(do_not_specialize=["count", "first", "key", "channels", "pixels"])
def _round(
    source,
    target,
    count,
    first,
    key,
    channels,
    pixels,
    MODE: tl.constexpr,
    OVERFLOW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMAL_DROP: tl.constexpr,
    LOWEST_LEVEL: tl.constexpr,
    MANTISSA: tl.constexpr,
    SAME_BIAS: tl.constexpr,
    DEEP_BELOW: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_NEGATIVE: tl.constexpr,
    SIGNED_ZERO: tl.constexpr,
    RANDOM_BITS: tl.constexpr,
    HALF_OFFSET: tl.constexpr,
    EVEN: tl.constexpr,
    UNSIGNED: tl.constexpr,
    ENDS_ODD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rounds `count` numbers. first: the index of the first one; the capitals: parameters.Parameters.

    key: noise.Key's value, moved to the elements' block of 2**32. channels, pixels of an image: where CHANNELS_LAST.
    """
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = place < count
    bits = tl.load(source + place, inside, other=0.0).to(tl.float32).to(tl.uint32, bitcast=True)
    if CHANNELS_LAST:
        pixel = place // channels
        order = (pixel // pixels * channels + place % channels) * pixels + pixel % pixels
        index = order.to(tl.uint32)
    else:
        index = place.to(tl.uint32) + first.to(tl.uint32)
    key = key.to(tl.uint64)

    magnitude = bits & _MAGNITUDE
    negative = (bits >> 31) != 0
    scale = tl.maximum(magnitude >> 23, 1) - 1
    significand = magnitude - (scale << 23)
    level = tl.maximum(scale, LOWEST_LEVEL)
    whole_drop = level - scale + NORMAL_DROP
    drop = tl.minimum(whole_drop, 30)
    below = (tl.full((TILE,), 1, tl.uint32) << drop) - 1
    reached = significand
    added = tl.zeros((TILE,), tl.uint32)
    last = significand >> drop
    if MANTISSA == 0:
        last += level - LOWEST_LEVEL
    if MODE == _NEAREST:
        added = (below + (last & 1)) >> 1
    if MODE == _TO_ODD:
        added = tl.where((last & 1) == 0, below, 0)
    if MODE == _NEAREST_AWAY:
        added = (below + 1) >> 1
    if MODE == _UP:
        added = tl.where(negative, 0, below)
    if MODE == _DOWN:
        added = tl.where(negative, below, 0)
    if MODE >= _STOCHASTIC:
        word = _words(index, key, tl.zeros((1,), tl.uint64))
        added = (word >> 1) >> (31 - drop)
        if MODE == _FEW_BITS:
            unused = tl.maximum(drop, RANDOM_BITS) - RANDOM_BITS
            added = (added >> unused) << unused
            if HALF_OFFSET:
                added = added | ((tl.full((TILE,), 1, tl.uint32) << unused) >> 1)
            too_far = tl.minimum(whole_drop - drop, 31)
            reached = significand >> too_far
            if EVEN:
                reached = reached | ((reached << too_far) != significand).to(tl.uint32)
                one = tl.full((TILE,), 1, tl.uint32) << unused
                added = added | ((one - 1 + ((reached >> unused) & 1)) >> 1)
    rounded = (reached + added) >> drop
    if SAME_BIAS:
        result = (rounded << drop) + (scale << 23)
    else:
        last_place = ((level + 1 - MANTISSA) << 23).to(tl.float32, bitcast=True)
        result = (rounded.to(tl.int32).to(tl.float32) * last_place).to(tl.uint32, bitcast=True)

    if MODE == _STOCHASTIC and DEEP_BELOW > 0:
        deep = (magnitude < DEEP_BELOW) & (magnitude != 0)
        if tl.max(deep.to(tl.int32), 0) != 0:
            digits = significand.to(tl.int32).to(tl.float32).to(tl.uint32, bitcast=True) >> 23
            missing = tl.where(significand == 0, 0, 150 - digits)
            up = (word >> 8) < (significand << missing)
            zeros = (whole_drop - 24 + missing).to(tl.int32)
            for draw in range(1, 7):  # zeros < 6 * 32: no format has its smallest value further from float32's
                further = _words(index, key, tl.full((1,), draw, tl.uint64))
                needed = tl.minimum(tl.maximum(zeros, 0), 32)
                zero = tl.where(needed == 0, 0, further >> ((32 - needed) & 31).to(tl.uint32)) == 0
                up = up & zero
                zeros -= 32
            smallest = tl.full((TILE,), (LOWEST_LEVEL + 1 - MANTISSA) << 23, tl.uint32)
            result = tl.where(deep, tl.where(up, smallest, 0), result)

    limit = tl.where(negative, tl.full((TILE,), LARGEST_NEGATIVE, tl.uint32), tl.full((TILE,), LARGEST, tl.uint32))
    infinite = tl.full((TILE,), _INFINITY, tl.uint32)
    if OVERFLOW == _INFINITE:
        if UNSIGNED:  # a NaN below zero
            infinite = tl.where(negative, tl.full((TILE,), _MAGNITUDE, tl.uint32), infinite)
        beyond = infinite
        if MODE == _TOWARD_ZERO:
            beyond = limit
        if MODE == _UP:
            beyond = tl.where(negative, limit, infinite)
        if MODE == _DOWN:
            beyond = tl.where(negative, infinite, limit)
        if MODE == _TO_ODD and ENDS_ODD:
            beyond = limit
            if UNSIGNED:
                beyond = tl.where(negative, infinite, limit)
        result = tl.where(result > limit, beyond, result)
        result = tl.where(magnitude == _INFINITY, infinite, result)
    else:
        result = tl.minimum(result, limit)
        if OVERFLOW == _PROPAGATE:
            if UNSIGNED:
                infinite = tl.where(negative, 0, infinite)
            result = tl.where(magnitude == _INFINITY, infinite, result)
    result = tl.where(magnitude > _INFINITY, tl.full((TILE,), _MAGNITUDE, tl.uint32), result)
    sign = bits & _SIGN
    if not SIGNED_ZERO:
        sign = tl.where(result == 0, 0, sign)
    value = (result | sign).to(tl.float32, bitcast=True).to(target.dtype.element_ty)
    if target.dtype.element_ty.primitive_bitwidth == 16:  # see blocks.narrowed
        bits_of_nan = _NAN_BFLOAT16 if target.dtype.element_ty == tl.bfloat16 else _NAN_FLOAT16
        not_a_number = tl.full((TILE,), bits_of_nan, tl.uint16)
        bits_16 = tl.where(magnitude > _INFINITY, not_a_number, value.to(tl.uint16, bitcast=True))
        value = bits_16.to(target.dtype.element_ty, bitcast=True)
    tl.store(target + place, value, inside)


def quantize(
    x: Tensor,
    fmt: AnyFormat,
    rounding: AnyRounding,
    overflow: Overflow,
    key: Key | None,
    dim: int = -1,
    out: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Round `x` of any shape and strides, on CUDA; see tensor.quantize. float64 and tables are left to eager.

    Of groups that share a scale, eager does what is not the rounding to elements.
    """
    first = key.first_element(len(x), x.numel()) if key and key.first_row else 0
    images = x.ndim in (4, 5) and x.movedim(1, -1).is_contiguous()
    images &= x.numel() <= _PIECE and first % 2**32 + x.numel() <= 2**32
    if not isinstance(fmt, Format) or x.dtype == torch.float64 or fmt.needs_float64:
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out, scale, by=_BY)
    result = torch.empty_like(x) if out is None else out
    apart = out is None or door.are_apart(x, out)
    if apart and x.stride() == result.stride() and (x.is_contiguous() or images):
        _launch(x, result, fmt, rounding, overflow, key, first, not x.is_contiguous())
    else:
        contiguous = x.clone(memory_format=torch.contiguous_format)  # never x itself
        _launch(contiguous, contiguous, fmt, rounding, overflow, key, first, False)
        result.copy_(contiguous)
    return result


def _to_format(
    flat: Tensor, fmt: Format, rounding: AnyRounding, overflow: Overflow, key: Key | None, first: int
) -> Tensor:
    """As eager does it."""
    if flat.dtype == torch.float64 or fmt.needs_float64:
        return eager.By().to_format(flat, fmt, rounding, overflow, key, first)
    rounded = torch.empty_like(flat)
    _launch(flat, rounded, fmt, rounding, overflow, key, first, False)
    return rounded


_BY = eager.By(_to_format, powers_in_float32=True)


def _launch(
    x: Tensor,
    result: Tensor,
    fmt: Format,
    rounding: AnyRounding,
    overflow: Overflow,
    key: Key | None,
    first: int,
    channels_last: bool,
) -> None:
    """x, result: both dense, with the same strides; they may be the same. first: the index of the first element."""
    numbers, key_value = parameters(fmt, rounding), 0 if key is None else key.value
    channels, pixels = (x.shape[1], x[0, 0].numel()) if channels_last else (1, 1)
    source, target = (t.as_strided((t.numel(),), (1,)) for t in (x, result))
    start = 0
    while start < len(source):
        index = first + start
        piece = slice(start, min(start + _PIECE, start + 2**32 - index % 2**32))
        count = len(source[piece])
        try:
            _round[(triton.cdiv(count, _TILE),)](
                source=source[piece],
                target=target[piece],
                count=count,
                first=_signed(index, 32),
                key=_signed(block_key(key_value, index >> 32), 64),
                channels=channels,
                pixels=pixels,
                MODE=mode_of(rounding),
                OVERFLOW=overflow_of(overflow, fmt),
                CHANNELS_LAST=channels_last,
                NORMAL_DROP=numbers.normal_drop,
                LOWEST_LEVEL=numbers.lowest_level,
                MANTISSA=numbers.mantissa,
                SAME_BIAS=numbers.same_bias,
                DEEP_BELOW=numbers.deep_below,
                LARGEST=numbers.largest,
                LARGEST_NEGATIVE=numbers.largest_negative,
                SIGNED_ZERO=numbers.signed_zero,
                RANDOM_BITS=numbers.random_bits,
                HALF_OFFSET=numbers.half_offset,
                EVEN=numbers.even,
                UNSIGNED=numbers.unsigned,
                ENDS_ODD=numbers.ends_odd,
                TILE=_TILE,
            )
        except Exception as error:  # no compiler for what starts a kernel, no folder for Triton's cache, and the like
            raise CannotCompile("cuda", because(error)) from error
        start = piece.stop


def block_key(value: int, block: int) -> int:
    """What Key.parts starts from for draw 0."""
    return (value + GAMMA * (1 + block)) % 2**64


def _signed(value: int, width: int) -> int:
    """The whole number of the same `width` bits: Triton compiles again for an argument of another type."""
    value %= 2**width
    return value - 2**width if value >= 2 ** (width - 1) else value
