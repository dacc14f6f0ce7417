"""Kernels of the fused engine in 64 bits: of float64 tensors, and of blocks whose scale is no power of two, because
float64 holds the quotients. See engines/loops.py for how kernels are called.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from numba import float32, float64, int64, njit, uint32
from numba.core.ccallback import CFunc

from low_precision.engines.group import largest_in
from low_precision.engines.operations import (
    KeyWords,
    as_bits,
    as_bits64,
    as_double,
    as_float,
    inlined,
    kernel,
    key_words,
    load,
    load64,
    next_piece,
    reader,
    store,
    store64,
    word,
)
from low_precision.engines.parameters import (
    DOWN,
    FEW_BITS,
    NEAREST,
    NEAREST_AWAY,
    STOCHASTIC,
    TOWARD_ZERO,
    UP,
    Parameters64,
)
from low_precision.engines.tasks import MaximaTask, RoundingTask, ScaledTask
from low_precision.noise import LOW_WORD

_MAGNITUDE, _INFINITY, _MOST_DROPPED = 2**63 - 1, 0x7FF << 52, 59  # as eager._DOUBLE
_GROUP = 64
_rounding_task, _scaled_task, _maxima_task = reader(RoundingTask), reader(ScaledTask), reader(MaximaTask)
_parameters = reader(Parameters64)


class Noise64(NamedTuple):
    """The random words of a block of 2**32 elements: of each 64-bit word the upper and the lower half."""

    high: KeyWords
    low: KeyWords


@inlined
def _noise_of(key, block):
    return Noise64(high=key_words(key, block, 0), low=key_words(key, block, LOW_WORD))


@inlined
def _word64(index, noise):
    """eager._words: 64 random bits for an element."""
    return (int64(word(index, noise.high)) << 32) | int64(word(index, noise.low))


@inlined
def _smallest(fmt):
    """The bits of the format's smallest value above zero."""
    return (fmt.lowest_level + (1 - fmt.mantissa)) << 52


@inlined
def _round(mode, infinity, bits, index, noise, fmt):
    """eager._round_block for one number: its bits, and whether `_deep` must decide, a negative number then."""
    magnitude, sign = bits & _MAGNITUDE, bits >> 63
    scale = max((magnitude >> 52) - 1, 0)
    significand = magnitude - (scale << 52)
    level = max(scale, fmt.lowest_level)
    whole_drop = level - scale + fmt.normal_drop
    drop = min(whole_drop, _MOST_DROPPED)
    below = (1 << drop) - 1
    added = int64(0)
    if mode == NEAREST:
        last = significand >> drop
        if fmt.mantissa == 0:  # without a mantissa, the code is the exponent
            last += max(scale - fmt.lowest_level, 0)
        added = (below + (last & 1)) >> 1
    elif mode == NEAREST_AWAY:
        added = (below + 1) >> 1
    elif mode == UP:
        added = below & ~sign
    elif mode == DOWN:
        added = below & sign
    elif mode >= STOCHASTIC:
        added = ((_word64(index, noise) >> 1) & _MAGNITUDE) >> (63 - drop)
        if mode == FEW_BITS:
            unused = max(drop - fmt.random_bits, 0)
            added = ((added >> unused) << unused) | (((1 << unused) >> 1) & fmt.half_offset)
            significand >>= min(whole_drop - drop, 63)
    rounded = (significand + added) >> drop
    result = as_bits64(float64(rounded) * as_double((level + (1 - fmt.mantissa)) << 52))  # exact, of normal numbers
    limit = fmt.largest + (sign & (fmt.largest_negative - fmt.largest))
    if infinity:
        beyond = int64(_INFINITY)
        if mode == TOWARD_ZERO:
            beyond = limit
        if mode == UP:
            beyond = limit if sign else int64(_INFINITY)
        if mode == DOWN:
            beyond = int64(_INFINITY) if sign else limit
        result = beyond if result > limit else result
        result = int64(_INFINITY) if magnitude == _INFINITY else result
    else:
        result = min(result, limit)
    result |= ((_INFINITY - magnitude) >> 63) & _MAGNITUDE  # NaN stays: there, all bits
    negative = sign << 63
    negative = negative & fmt.signed_zero if result == 0 else negative
    deep = 0
    if mode == STOCHASTIC:
        deep = (_MOST_DROPPED - whole_drop) & -significand & (magnitude - _INFINITY)  # negative where all three are
    return result | negative, deep


@inlined
def _is_deep(bits, fmt):
    magnitude = bits & _MAGNITUDE
    return magnitude > 0 and fmt.lowest_level + fmt.normal_drop - _MOST_DROPPED > max((magnitude >> 52) - 1, 0)


@njit
def _deep(bits, index, block, key, fmt):
    """eager._round_deep for one number: its bits."""
    magnitude, negative = bits & _MAGNITUDE, (bits >> 63) << 63
    scale = max((magnitude >> 52) - 1, 0)
    significand, left = magnitude - (scale << 52), max(scale, fmt.lowest_level) - scale + fmt.normal_drop - 53
    while significand < 1 << 52:  # a subnormal number
        significand, left = significand << 1, left + 1
    random_word = _word64(index, _noise_of(key, block))
    up, draw = ((random_word >> 11) & (2**53 - 1)) < significand, 1
    while up and left > 0:
        up = int64(word(index, key_words(key, block, draw))) >> (32 - min(left, 32)) == 0
        left -= 32
        draw += 1
    return _smallest(fmt) | negative if up else negative & fmt.signed_zero


@cache
def flat(mode: int, infinity: bool) -> CFunc:
    """The kernel of a RoundingTask, as loops.flat, for float64 numbers."""

    @kernel
    def flat64_kernel(address):
        task = _rounding_task(address)
        fmt = _parameters(task.parameters)
        piece = next_piece(address)
        while piece * task.piece < task.count:
            begin, end = piece * task.piece, min((piece + 1) * task.piece, task.count)
            block = (task.first + begin) >> 32
            noise = _noise_of(task.key, block)
            for start in range(begin, end, _GROUP):
                undecided = int64(0)
                stop = min(start + _GROUP, end)
                for i in range(start, stop):
                    index = uint32(task.first + i)
                    rounded, deep = _round(mode, infinity, load64(task.source, i), index, noise, fmt)
                    undecided |= deep
                    store64(task.target, i, rounded)
                if undecided < 0:
                    for i in range(start, stop):
                        bits = load64(task.source, i)
                        if _is_deep(bits, fmt):
                            store64(task.target, i, _deep(bits, uint32(task.first + i), block, task.key, fmt))
            piece = next_piece(address)

    return flat64_kernel


@inlined
def _scale_of(amax, task):
    """blocks.scales: the scale of a block whose largest magnitude is `amax`; all in float64."""
    tensor_scale = as_double(task.tensor_scale)
    wanted = min(amax, as_double(task.counted)) / as_double(task.element_largest) / tensor_scale
    wanted = max(min(wanted, as_double(task.scale_largest)), as_double(task.scale_smallest))
    exponent = max((as_bits64(wanted) >> 52) - 1023, task.scale_lowest_exponent)
    step = as_double((exponent - task.scale_mantissa + 1023) << 52)
    scale = (wanted / step + 2.0**52 - 2.0**52) * step * tensor_scale  # the sum rounds ties to even
    return scale if amax > 0 else 1.0


@cache
def scaled(mode: int) -> CFunc:
    """The kernel of a ScaledTask: as loops.blocks, for blocks whose scale is no power of two; it refuses none."""

    @kernel
    def scaled_kernel(address):
        task = _scaled_task(address)
        fmt, noise = _parameters(task.parameters), _noise_of(task.key, 0)
        piece = next_piece(address)
        while piece * task.piece < task.count:
            for number in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                scale = _scale_of(float64(as_float(load(task.maxima, number))), task)
                undecided = int64(0)
                for i in range(number * task.length, (number + 1) * task.length):
                    quotient = as_bits64(float64(as_float(load(task.source, i))) / scale)
                    rounded, deep = _round(mode, False, quotient, uint32(task.first + i), noise, fmt)
                    undecided |= deep
                    store(task.target, i, as_bits(float32(as_double(rounded) * scale)))
                if undecided < 0:
                    for i in range(number * task.length, (number + 1) * task.length):
                        quotient = as_bits64(float64(as_float(load(task.source, i))) / scale)
                        if _is_deep(quotient, fmt):
                            rounded = _deep(quotient, uint32(task.first + i), 0, task.key, fmt)
                            store(task.target, i, as_bits(float32(as_double(rounded) * scale)))
            piece = next_piece(address)

    return scaled_kernel


@cache
def maxima() -> CFunc:
    """The kernel of a MaximaTask: the largest magnitude of each block of float32 numbers, NaNs aside."""

    @kernel
    def maxima_kernel(address):
        task = _maxima_task(address)
        piece = next_piece(address)
        while piece * task.piece < task.count:
            for number in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                largest = largest_in(task.source + 4 * number * task.length, task.length)
                store(task.target, number, min(largest, uint32(task.type_largest)))
            piece = next_piece(address)

    return maxima_kernel
