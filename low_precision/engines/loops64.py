"""Loops of the fused engine in 64 bits, compiled by numba: of float64 tensors, and of blocks whose scale is no power of
two, which float64 holds the quotients of. See engines/loops.py for how kernels are called.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba import cfunc, float32, float64, int64, njit, types, uint32
from numba.extending import intrinsic

from low_precision.engines.loops import KERNEL, as_bits, as_float, field, load, next_piece, store, word, words_of
from low_precision.engines.parameters import MODES
from low_precision.noise import LOW_WORD

_MAGNITUDE, _INFINITY, _MOST_DROPPED = 2**63 - 1, 0x7FF << 52, 59  # as eager._DOUBLE
_MAGNITUDE32, _INFINITY32 = 0x7FFFFFFF, 0x7F800000
_GROUP = 64
_NEAREST, _AWAY, _ZERO, _UP, _DOWN, _STOCHASTIC, _FEW = range(len(MODES))


@intrinsic
def _as_double(typing_context, x):
    return types.float64(types.int64), lambda c, builder, s, arguments: builder.bitcast(arguments[0], ir.DoubleType())


@intrinsic
def _as_bits64(typing_context, x):
    return types.int64(types.float64), lambda c, builder, s, arguments: builder.bitcast(arguments[0], ir.IntType(64))


@intrinsic
def _store64(typing_context, address, i, value):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store(arguments[2], builder.gep(pointer, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(inline="always")
def _round(
    mode, infinity, bits, index, k0, k1, k2, l0, l1, l2, always, lowest_level, mantissa, largest, lowest, signed_zero,
    few, half,
):  # fmt: skip
    """eager._round_block for one number: its bits, and whether `_deep` must decide, a negative number then."""
    magnitude, sign = bits & _MAGNITUDE, bits >> 63
    scale = max((magnitude >> 52) - 1, 0)
    significand = magnitude - (scale << 52)
    level = max(scale, lowest_level)
    whole_drop = level - scale + always
    drop = min(whole_drop, _MOST_DROPPED)
    below = (1 << drop) - 1
    added = int64(0)
    if mode == _NEAREST:
        last = significand >> drop
        if mantissa == 0:  # without a mantissa, the code is the exponent
            last += max(scale - lowest_level, 0)
        added = (below + (last & 1)) >> 1
    elif mode == _AWAY:
        added = (below + 1) >> 1
    elif mode == _UP:
        added = below & ~sign
    elif mode == _DOWN:
        added = below & sign
    elif mode >= _STOCHASTIC:
        noise = (int64(word(index, k0, k1, k2)) << 32) | int64(word(index, l0, l1, l2))
        added = ((noise >> 1) & _MAGNITUDE) >> (63 - drop)
        if mode == _FEW:
            unused = max(drop - few, 0)
            added = ((added >> unused) << unused) | (((1 << unused) >> 1) & half)
            significand >>= min(whole_drop - drop, 63)
    rounded = (significand + added) >> drop
    result = _as_bits64(float64(rounded) * _as_double((level + (1 - mantissa)) << 52))  # exact, of normal numbers
    limit = largest + (sign & (lowest - largest))
    if infinity:
        beyond = int64(_INFINITY)
        if mode == _ZERO:
            beyond = limit
        if mode == _UP:
            beyond = limit if sign else int64(_INFINITY)
        if mode == _DOWN:
            beyond = int64(_INFINITY) if sign else limit
        result = beyond if result > limit else result
        result = int64(_INFINITY) if magnitude == _INFINITY else result
    else:
        result = min(result, limit)
    result |= ((_INFINITY - magnitude) >> 63) & _MAGNITUDE  # NaN stays: there, all bits
    negative = sign << 63
    negative = negative & signed_zero if result == 0 else negative
    deep = 0
    if mode == _STOCHASTIC:
        deep = (_MOST_DROPPED - whole_drop) & -significand & (magnitude - _INFINITY)  # negative where all three are
    return result | negative, deep


@njit(inline="always")
def _is_deep(bits, lowest_level, always):
    magnitude = bits & _MAGNITUDE
    return magnitude > 0 and lowest_level + always - _MOST_DROPPED > max((magnitude >> 52) - 1, 0)


@njit
def _deep(bits, index, block, key, always, lowest_level, smallest, signed_zero):
    """eager._round_deep for one number: its bits."""
    magnitude, negative = bits & _MAGNITUDE, (bits >> 63) << 63
    scale = max((magnitude >> 52) - 1, 0)
    significand, left = magnitude - (scale << 52), max(scale, lowest_level) - scale + always - 53
    while significand < 1 << 52:  # a subnormal number
        significand, left = significand << 1, left + 1
    high, low = words_of(key, block, 0), words_of(key, block, LOW_WORD)
    noise = (int64(word(index, high[0], high[1], high[2])) << 32) | int64(word(index, low[0], low[1], low[2]))
    up, draw = ((noise >> 11) & (2**53 - 1)) < significand, 1
    while up and left > 0:
        k0, k1, k2 = words_of(key, block, draw)
        up = int64(word(index, k0, k1, k2)) >> (32 - min(left, 32)) == 0
        left -= 32
        draw += 1
    return smallest | negative if up else negative & signed_zero


# What a kernel reads at `parameters`, as int64, in this order: see engines/parameters.py.
PARAMETERS = ("always", "lowest_level", "mantissa", "largest", "lowest", "signed_zero", "few", "half")


@cache
def flat(mode: int, infinity: bool):
    """As compiled.flat, for float64 numbers."""

    @cfunc("void(int64)", **KERNEL)
    def kernel(task):
        pieces, source, target, key = field(task, 2), field(task, 3), field(task, 4), field(task, 5)
        parameters, count, first, size = field(task, 6), field(task, 7), field(task, 8), field(task, 9)
        always, lowest_level, mantissa = field(parameters, 0), field(parameters, 1), field(parameters, 2)
        largest, lowest, signed_zero = field(parameters, 3), field(parameters, 4), field(parameters, 5)
        few, half, smallest = field(parameters, 6), field(parameters, 7), (lowest_level + (1 - mantissa)) << 52
        piece = next_piece(task)
        while piece < pieces:
            begin, end = piece * size, min((piece + 1) * size, count)
            block = (first + begin) >> 32
            k0, k1, k2 = words_of(key, block, 0)
            l0, l1, l2 = words_of(key, block, LOW_WORD)
            for start in range(begin, end, _GROUP):
                undecided = int64(0)
                stop = min(start + _GROUP, end)
                for i in range(start, stop):
                    rounded, deep = _round(
                        mode, infinity, field(source, i), uint32(first + i), k0, k1, k2, l0, l1, l2, always,
                        lowest_level, mantissa, largest, lowest, signed_zero, few, half,
                    )  # fmt: skip
                    undecided |= deep
                    _store64(target, i, rounded)
                if undecided < 0:
                    for i in range(start, stop):
                        if _is_deep(field(source, i), lowest_level, always):
                            rounded = _deep(
                                field(source, i), uint32(first + i), block, key, always, lowest_level, smallest,
                                signed_zero,
                            )  # fmt: skip
                            _store64(target, i, rounded)
            piece = next_piece(task)

    return kernel


@cache
def scaled(mode: int):
    """As compiled.blocks, for float32 numbers in blocks whose scale is no power of two (blocks.scales), but one of a
    format times `tensor`, a power of two.

    Further fields: how many blocks; size, how many of them are a piece; length; the address of the largest magnitude of
    each block; the bits of five float64 numbers: the largest magnitude that counts, the element's largest value,
    `tensor`, the scale's largest and smallest value; and, of the scale's smallest normal value and last place, the
    exponents of two; first, the index of the first number.
    """

    @cfunc("void(int64)", **KERNEL)
    def kernel(task):
        pieces, source, target, key = field(task, 2), field(task, 3), field(task, 4), field(task, 5)
        parameters, count, size, length = field(task, 6), field(task, 7), field(task, 8), field(task, 9)
        always, lowest_level, mantissa = field(parameters, 0), field(parameters, 1), field(parameters, 2)
        largest, lowest, signed_zero = field(parameters, 3), field(parameters, 4), field(parameters, 5)
        few, half, smallest = field(parameters, 6), field(parameters, 7), (lowest_level + (1 - mantissa)) << 52
        maxima, most = field(task, 10), _as_double(field(task, 11))
        element_largest, tensor = _as_double(field(task, 12)), _as_double(field(task, 13))
        scale_largest, scale_smallest = _as_double(field(task, 14)), _as_double(field(task, 15))
        lowest_exponent, digits, first = field(task, 16), field(task, 17), field(task, 18)
        k0, k1, k2 = words_of(key, 0, 0)
        l0, l1, l2 = words_of(key, 0, LOW_WORD)
        piece = next_piece(task)
        while piece < pieces:
            for number in range(piece * size, min((piece + 1) * size, count)):
                amax = float64(as_float(load(maxima, number)))
                wanted = min(amax, most) / element_largest / tensor
                wanted = max(min(wanted, scale_largest), scale_smallest)
                exponent = max((_as_bits64(wanted) >> 52) - 1023, lowest_exponent)
                step = _as_double((exponent - digits + 1023) << 52)
                scale = (wanted / step + 2.0**52 - 2.0**52) * step * tensor  # the sum rounds ties to even
                scale = scale if amax > 0 else 1.0
                undecided = int64(0)
                for i in range(number * length, (number + 1) * length):
                    quotient = _as_bits64(float64(as_float(load(source, i))) / scale)
                    rounded, deep = _round(
                        mode, False, quotient, uint32(first + i), k0, k1, k2, l0, l1, l2, always, lowest_level,
                        mantissa, largest, lowest, signed_zero, few, half,
                    )  # fmt: skip
                    undecided |= deep
                    store(target, i, as_bits(float32(_as_double(rounded) * scale)))
                if undecided < 0:
                    for i in range(number * length, (number + 1) * length):
                        quotient = _as_bits64(float64(as_float(load(source, i))) / scale)
                        if _is_deep(quotient, lowest_level, always):
                            rounded = _deep(
                                quotient, uint32(first + i), 0, key, always, lowest_level, smallest, signed_zero
                            )
                            store(target, i, as_bits(float32(_as_double(rounded) * scale)))
            piece = next_piece(task)

    return kernel


@cache
def maxima():
    """The kernel that puts the largest magnitude of each block at `source`, NaNs aside, at `target`, as float32.

    Further fields: how many blocks; size, how many of them are a piece; length; the bits of what stands for infinity.
    """

    @cfunc("void(int64)", **KERNEL)
    def kernel(task):
        pieces, source, target = field(task, 2), field(task, 3), field(task, 4)
        count, size, length, type_largest = field(task, 7), field(task, 8), field(task, 9), field(task, 10)
        piece = next_piece(task)
        while piece < pieces:
            for number in range(piece * size, min((piece + 1) * size, count)):
                largest = uint32(0)
                for i in range(number * length, (number + 1) * length):
                    magnitude = uint32(load(source, i) & uint32(_MAGNITUDE32))
                    largest = max(largest, uint32(0) if magnitude > uint32(_INFINITY32) else magnitude)
                store(target, number, min(largest, uint32(type_largest)))
            piece = next_piece(task)

    return kernel
