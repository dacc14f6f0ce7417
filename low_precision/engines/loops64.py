"""The kernel of the fused engine for float64 tensors, and for float32 ones where the format has smaller numbers.

See engines/loops.py for how kernels are called.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from numba import float32, float64, int64, njit, uint32
from numba.core.ccallback import CFunc

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
    INFINITE,
    NEAREST,
    NEAREST_AWAY,
    PROPAGATE,
    STOCHASTIC,
    TO_ODD,
    TOWARD_ZERO,
    UP,
    Parameters64,
)
from low_precision.engines.tasks import RoundingTask
from low_precision.noise import LOW_WORD

_MAGNITUDE, _INFINITY, _MOST_DROPPED = 2**63 - 1, 0x7FF << 52, 59  # as eager._DOUBLE
_GROUP = 64
_rounding_task = reader(RoundingTask)
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
def _finished(mode, overflow, bits, result, fmt):
    """eager._finished for one number: its bits, and the rounded magnitude's."""
    magnitude, sign = bits & _MAGNITUDE, bits >> 63
    limit = fmt.largest + (sign & (fmt.largest_negative - fmt.largest))
    below_zero = sign & fmt.unsigned  # a mask: a negative number of an unsigned format
    if overflow == INFINITE:
        infinite = _INFINITY | (below_zero & _MAGNITUDE)  # a NaN below zero
        beyond = infinite
        if mode == TOWARD_ZERO:
            beyond = limit
        if mode == UP:
            beyond = limit if sign else infinite
        if mode == DOWN:
            beyond = infinite if sign else limit
        if mode == TO_ODD:
            beyond = limit if fmt.ends_odd & ~below_zero else infinite
        result = beyond if result > limit else result
        result = infinite if magnitude == _INFINITY else result
    else:
        result = min(result, limit)
    if overflow == PROPAGATE:
        result = _INFINITY & ~below_zero if magnitude == _INFINITY else result
    result |= ((_INFINITY - magnitude) >> 63) & _MAGNITUDE  # NaN stays: there, all bits
    negative = sign << 63
    negative = negative & fmt.signed_zero if result == 0 else negative
    return result | negative


@inlined
def _round(mode, overflow, bits, index, noise, fmt):
    """eager._round_block for one number: its bits, and whether `_deep` must decide, a negative number then."""
    magnitude, sign = bits & _MAGNITUDE, bits >> 63
    scale = max((magnitude >> 52) - 1, 0)
    significand = magnitude - (scale << 52)
    level = max(scale, fmt.lowest_level)
    whole_drop = level - scale + fmt.normal_drop
    drop = min(whole_drop, _MOST_DROPPED)
    below = (1 << drop) - 1
    added = int64(0)
    if mode in (NEAREST, TO_ODD):
        last = significand >> drop
        if fmt.mantissa == 0:  # without a mantissa, the code is the exponent
            last += max(scale - fmt.lowest_level, 0)
        # To odd: from an even code up to the next one, unless nothing is cut off.
        added = (below + (last & 1)) >> 1 if mode == NEAREST else below & ((last & 1) - 1)
    elif mode == NEAREST_AWAY:
        added = (below + 1) >> 1
    elif mode == UP:
        added = below & ~sign
    elif mode == DOWN:
        added = below & sign
    elif mode >= STOCHASTIC:
        added = ((_word64(index, noise) >> 1) & _MAGNITUDE) >> (63 - drop)
        if mode == FEW_BITS:
            unused, too_far = max(drop - fmt.random_bits, 0), min(whole_drop - drop, 63)
            reached = significand >> too_far
            significand = reached | (int64(reached << too_far != significand) & fmt.even)
            added = ((added >> unused) << unused) | (((1 << unused) >> 1) & fmt.half_offset)
            added |= (((1 << unused) - 1 + ((significand >> unused) & 1)) >> 1) & fmt.even
    rounded = (significand + added) >> drop
    result = as_bits64(float64(rounded) * as_double((level + (1 - fmt.mantissa)) << 52))  # exact, of normal numbers
    result = _finished(mode, overflow, bits, result, fmt)
    deep = 0
    if mode == STOCHASTIC:
        deep = (_MOST_DROPPED - whole_drop) & -significand & (magnitude - _INFINITY)  # negative where all three are
    return result, deep


@inlined
def _is_deep(bits, fmt):
    magnitude = bits & _MAGNITUDE
    return magnitude > 0 and fmt.lowest_level + fmt.normal_drop - _MOST_DROPPED > max((magnitude >> 52) - 1, 0)


@njit
def _deep(overflow, bits, index, block, key, fmt):
    """eager._round_deep for one number: its bits."""
    magnitude = bits & _MAGNITUDE
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
    return _finished(STOCHASTIC, overflow, bits, _smallest(fmt) if up else 0, fmt)


@inlined
def _load(is_wide, address, i):
    """The bits of a float64 number, or those that a float32 number has as one."""
    return load64(address, i) if is_wide else as_bits64(float64(as_float(load(address, i))))


@inlined
def _store(is_wide, address, i, bits):
    if is_wide:
        store64(address, i, bits)
    else:
        store(address, i, as_bits(float32(as_double(bits))))


@cache
def flat(mode: int, overflow: int, *, is_wide: bool = True) -> CFunc:
    """The kernel of a RoundingTask, as loops.flat, for float64 numbers; else float32 numbers are rounded as such."""

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
                    rounded, deep = _round(mode, overflow, _load(is_wide, task.source, i), index, noise, fmt)
                    undecided |= deep
                    _store(is_wide, task.target, i, rounded)
                if undecided < 0:
                    for i in range(start, stop):
                        bits = _load(is_wide, task.source, i)
                        if _is_deep(bits, fmt):
                            rounded = _deep(overflow, bits, uint32(task.first + i), block, task.key, fmt)
                            _store(is_wide, task.target, i, rounded)
            piece = next_piece(address)

    return flat64_kernel
