"""Loops of the fused engine in 64 bits, compiled by numba: of float64 tensors, and of blocks whose scale is no power of
two, which float64 holds the quotients of. See kernels/compiled.py for how kernels are called.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba import cfunc, float32, float64, int64, njit, types, uint32
from numba.extending import intrinsic

from kernels.compiled import KERNEL, as_bits, as_float, field, load, mark, next_piece, store, word, words_of
from kernels.noise import LOW_WORD
from kernels.parameters import MODES

_MAGNITUDE, _INFINITY, _MOST_DROPPED = 2**63 - 1, 0x7FF << 52, 59  # as eager._DOUBLE
_MAGNITUDE32, _INFINITY32 = 0x7FFFFFFF, 0x7F800000
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
    """eager._round_block for one number: its bits, and 1 if more random bits must decide, else 0."""
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


# What a kernel reads at `parameters`, as int64, in this order: see kernels/parameters.py.
PARAMETERS = ("always", "lowest_level", "mantissa", "largest", "lowest", "signed_zero", "few", "half")


@cache
def flat(mode: int, infinity: bool):
    """As compiled.flat, for float64 numbers. The task's second field is 1 afterwards where there was a number so small
    that more random bits must decide, and `target` is then of no use.
    """

    @cfunc("void(int64)", **KERNEL)
    def kernel(task):
        pieces, source, target, key = field(task, 2), field(task, 3), field(task, 4), field(task, 5)
        parameters, count, first, size = field(task, 6), field(task, 7), field(task, 8), field(task, 9)
        always, lowest_level, mantissa = field(parameters, 0), field(parameters, 1), field(parameters, 2)
        largest, lowest, signed_zero = field(parameters, 3), field(parameters, 4), field(parameters, 5)
        few, half = field(parameters, 6), field(parameters, 7)
        piece = next_piece(task)
        while piece < pieces:
            begin, end = piece * size, min((piece + 1) * size, count)
            block = (first + begin) >> 32
            k0, k1, k2 = words_of(key, block, 0)
            l0, l1, l2 = words_of(key, block, LOW_WORD)
            undecided = int64(0)
            for i in range(begin, end):
                rounded, deep = _round(
                    mode, infinity, field(source, i), uint32(first + i), k0, k1, k2, l0, l1, l2, always, lowest_level,
                    mantissa, largest, lowest, signed_zero, few, half,
                )  # fmt: skip
                undecided |= deep
                _store64(target, i, rounded)
            if undecided < 0:
                mark(task)
                return
            piece = next_piece(task)

    return kernel


@cache
def scaled(mode: int):
    """As compiled.blocks, for float32 numbers in blocks of any scale.

    Further fields: how many blocks; size, how many of them are a piece; length; the address of the scales, float64. The
    second field is 1 afterwards where there was a number so small, beside its scale, that more random bits must decide.
    """

    @cfunc("void(int64)", **KERNEL)
    def kernel(task):
        pieces, source, target, key = field(task, 2), field(task, 3), field(task, 4), field(task, 5)
        parameters, count, size, length = field(task, 6), field(task, 7), field(task, 8), field(task, 9)
        always, lowest_level, mantissa = field(parameters, 0), field(parameters, 1), field(parameters, 2)
        largest, lowest, signed_zero = field(parameters, 3), field(parameters, 4), field(parameters, 5)
        few, half, scales = field(parameters, 6), field(parameters, 7), field(task, 10)
        k0, k1, k2 = words_of(key, 0, 0)
        l0, l1, l2 = words_of(key, 0, LOW_WORD)
        piece = next_piece(task)
        while piece < pieces:
            undecided = int64(0)
            for number in range(piece * size, min((piece + 1) * size, count)):
                scale = _as_double(field(scales, number))
                for i in range(number * length, (number + 1) * length):
                    quotient = _as_bits64(float64(as_float(load(source, i))) / scale)
                    rounded, deep = _round(
                        mode, False, quotient, uint32(i), k0, k1, k2, l0, l1, l2, always, lowest_level, mantissa,
                        largest, lowest, signed_zero, few, half,
                    )  # fmt: skip
                    undecided |= deep
                    store(target, i, as_bits(float32(_as_double(rounded) * scale)))
            if undecided < 0:
                mark(task)
                return
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
