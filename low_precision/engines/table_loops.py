"""Rounding float32 numbers to a table of values, in the fused engine: bit for bit what engines/table.py gives.

The bits of a float32 number, as a whole number that is in order (its key), say in which bucket it lies, and few
thresholds lie in one bucket. See engines/loops.py for how kernels are called.
"""

from __future__ import annotations

import functools
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import float32, float64, int64, types, uint32
from numba.core.ccallback import CFunc
from torch import Tensor

from low_precision.engines import table as table_engine
from low_precision.engines.group import GROUP, room_for
from low_precision.engines.number import INFINITY
from low_precision.engines.operations import (
    VECTOR,
    add,
    all_of,
    and_,
    as_bits,
    as_double,
    as_float,
    inlined,
    instruction,
    kernel,
    key_words,
    load,
    next_piece,
    or_,
    reader,
    shr,
    store,
    sub,
    word,
    xor,
)
from low_precision.engines.parameters import bits64
from low_precision.engines.tasks import TableTask, field_names
from low_precision.engines.threads import PIECE, run
from low_precision.noise import Key
from low_precision.rounding import AnyRounding, FewBits, is_random
from low_precision.tables import Table

TABLE_FIELDS = field_names(TableTask)
_MOST_BUCKETS = 2**16  # what the processor keeps close
_MAGNITUDE = 0x7FFFFFFF
_ROUNDS = 2.0**52  # a number below it plus this has no digit behind the point
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_table_task = reader(TableTask)
_numbers_buffer, _lane_buffer = room_for(GROUP), room_for(GROUP)


# Vectors of VECTOR numbers. A branch for each number could not be foreseen, and LLVM makes branches of a loop here.


def _pointer(builder, address, i):
    """Of the vector that begins with the i-th number of 32 bits from an address on."""
    place = builder.add(address, builder.mul(i, _I64(4)))
    return builder.inttoptr(place, ir.VectorType(_I32, VECTOR).as_pointer())


def _gathered(builder, address, places):
    """The numbers in these places from an address on."""
    wide, width = ir.VectorType(_I64, VECTOR), _I64(2)
    distances = builder.shl(builder.zext(places, wide), all_of(builder, width, wide))
    addresses = builder.add(distances, all_of(builder, address, wide))
    flags, vector = ir.VectorType(ir.IntType(1), VECTOR), ir.VectorType(_I32, VECTOR)
    pointers = builder.inttoptr(addresses, ir.VectorType(_I32.as_pointer(), VECTOR))
    gather_type = ir.FunctionType(vector, [pointers.type, _I32, flags, vector])
    gather = builder.module.declare_intrinsic("llvm.masked.gather.v16i32.v16p0i32", fnty=gather_type)
    everywhere = ir.Constant(flags, [ir.Constant(ir.IntType(1), 1)] * VECTOR)
    return builder.call(gather, [pointers, _I32(4), everywhere, ir.Constant(vector, ir.Undefined)])


@instruction
def _put_buckets(typing_context, places, keys, i, task):
    """void: of VECTOR numbers from the i-th on, whose bits are where their keys shall be: their keys, none below the
    first or above the last of the thresholds', and how many thresholds lie below their buckets.
    """

    def generate(context, builder, signature, arguments):
        places, keys, i, task = arguments
        vector = ir.VectorType(_I32, VECTOR)

        def field(name):
            number = builder.extract_value(task, TABLE_FIELDS.index(name))
            return number if name == "buckets" else all_of(builder, builder.trunc(number, _I32), vector)

        bits = builder.load(_pointer(builder, keys, i), align=4)
        sign = builder.ashr(bits, all_of(builder, _I32(31), vector))
        key = builder.xor(bits, builder.and_(sign, all_of(builder, _I32(_MAGNITUDE), vector)))
        first, last = field("first_key"), field("last_key")
        key = builder.select(builder.icmp_signed("<", key, first), first, key)
        key = builder.select(builder.icmp_signed(">", key, last), last, key)
        builder.store(key, _pointer(builder, keys, i), align=4)
        bucket = builder.lshr(builder.sub(key, first), field("shift"))
        builder.store(_gathered(builder, field("buckets"), bucket), _pointer(builder, places, i), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, task), generate


@instruction
def _halve(typing_context, places, keys, i, thresholds, step):
    """void: VECTOR numbers' places from the i-th on, `step` higher where so many more thresholds do not lie above."""

    def generate(context, builder, signature, arguments):
        places, keys, i, thresholds, step = arguments
        vector = ir.VectorType(_I32, VECTOR)
        where = _pointer(builder, places, i)
        place, key = builder.load(where, align=4), builder.load(_pointer(builder, keys, i), align=4)
        higher = builder.add(place, all_of(builder, builder.trunc(step, _I32), vector))
        threshold = _gathered(builder, builder.sub(thresholds, _I64(4)), higher)
        builder.store(builder.select(builder.icmp_signed("<=", threshold, key), higher, place), where, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@instruction
def _put_values(typing_context, target, places, i, values):
    """void: the values in VECTOR places from the i-th on."""

    def generate(context, builder, signature, arguments):
        target, places, i, values = arguments
        place = builder.load(_pointer(builder, places, i), align=4)
        builder.store(_gathered(builder, values, place), _pointer(builder, target, i), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@inlined
def _between(x, low, high, random_word, task):
    """table._stochastic for one number between two values: the bits of one of them."""
    swapped = and_(xor(low, high), sub(uint32(as_float(high) > float32(0)), 1))  # where the gap lies below zero
    base, other = xor(low, swapped), xor(high, swapped)
    distance = abs(float64(x) - float64(as_float(base)))
    share = distance / (float64(as_float(high)) - float64(as_float(low)))
    reached = share * as_double(task.whole) + as_double(task.offset)
    even = (reached + _ROUNDS) - _ROUNDS
    reached = even if task.even else reached
    drawn = float64(shr(random_word, sub(32, uint32(task.random_bits))))
    return base if reached < as_double(task.whole) - drawn else other


@cache
def flat(is_random: bool) -> CFunc:
    """The kernel of a TableTask: float32 numbers, one after the other. No piece may cross a multiple of 2**32."""

    @kernel
    def table_kernel(address):
        task, numbers, keys = _table_task(address), _numbers_buffer(), _lane_buffer()
        places, lows, highs = _lane_buffer(), _lane_buffer(), _lane_buffer()
        lowest, highest = as_float(load(task.values, 0)), as_float(load(task.values, task.last))
        piece = next_piece(address)
        while piece * task.piece < task.count:
            begin, end = piece * task.piece, min((piece + 1) * task.piece, task.count)
            words = key_words(task.key, (task.first + begin) >> 32, 0)
            for start in range(begin, end, GROUP):
                size, source, target = min(GROUP, end - start), task.source + 4 * start, task.target + 4 * start
                for i in range(size):
                    x = as_float(load(source, i)) + float32(0)  # -0.0 becomes 0.0
                    if is_random:
                        x = lowest if x < lowest else x
                        x = highest if x > highest else x
                    store(numbers, i, as_bits(x))
                    store(keys, i, as_bits(x))
                for i in range(0, size, VECTOR):
                    _put_buckets(places, keys, i, task)
                    step = int64(1) << task.steps
                    while step > 1:
                        step >>= 1
                        _halve(places, keys, i, task.thresholds, step)
                    _put_values(lows, places, i, task.values)
                    if is_random:
                        _put_values(highs, places, i, task.values + 4)
                for i in range(size):
                    bits, result = load(numbers, i), load(lows, i)
                    if is_random:
                        random_word = word(add(uint32(task.first + start), uint32(i)), words)
                        result = _between(as_float(bits), result, load(highs, i), random_word, task)
                    is_nan = and_(bits, _MAGNITUDE) > uint32(INFINITY)
                    store(target, i, or_(bits, _MAGNITUDE) if is_nan else result)
            piece = next_piece(address)

    return table_kernel


class _Stored(NamedTuple):
    """What a kernel reads of a table and a rounding."""

    fields: dict[str, int]  # of a TableTask
    memory: tuple[np.ndarray, ...]  # which must live as long as its addresses are used


@functools.lru_cache(maxsize=64)
def _stored(table: Table, rounding: AnyRounding) -> _Stored:
    of_gaps = np.array(table.values[1:-1], np.float32)
    if not is_random(rounding):
        of_gaps = table_engine.thresholds(table, rounding, torch.float32, torch.device("cpu")).numpy()
    bits = (of_gaps + np.float32(0)).view(np.int32)
    keys = bits ^ ((bits >> 31) & np.int32(_MAGNITUDE))
    if not len(keys):  # of two values, between which chance decides: a threshold above all
        keys = np.array([INFINITY], np.int32)
    shift, below = _buckets(keys)
    steps = int(np.diff(np.append(below, len(keys))).max()).bit_length()
    thresholds = np.append(keys, np.full(2**steps, _MAGNITUDE, np.int32))  # the largest key there is
    memory = below.astype(np.uint32), thresholds, np.array([*table.values, table.largest], np.float32)
    bits_drawn = rounding.bits if isinstance(rounding, FewBits) else 32
    fields = {
        "first_key": int(keys[0]) - 1,
        "last_key": int(keys[-1]),
        "shift": shift,
        "steps": steps,
        "last": len(table.values) - 1,
        "random_bits": bits_drawn,
        "whole": bits64(2.0**bits_drawn),
        "offset": bits64(0.5 if isinstance(rounding, FewBits) and rounding.half_offset else 0.0),
        "even": int(isinstance(rounding, FewBits) and rounding.even),
    }
    addresses = {
        name: array.ctypes.data for name, array in zip(("buckets", "thresholds", "values"), memory, strict=True)
    }
    return _Stored(fields | addresses, memory)


def _buckets(keys: np.ndarray) -> tuple[int, np.ndarray]:
    """The size of a bucket, as a shift, and how many thresholds lie below each: the fewest buckets with which a search
    within one is as short as it can be with _MOST_BUCKETS.
    """
    first = int(keys[0]) - 1
    span = int(keys[-1]) - first
    made: list[tuple[int, int, np.ndarray]] = []
    for shift in range(32):
        count = (span >> shift) + 1
        if count <= _MOST_BUCKETS:
            below = np.searchsorted(keys, first + (np.arange(count, dtype=np.int64) << shift))
            steps = int(np.diff(np.append(below, len(keys))).max()).bit_length()
            if made and steps > made[-1][0]:
                break
            made.append((steps, shift, below))
    _, shift, below = made[-1]
    return shift, below


def round_table(numbers: Tensor, table: Table, rounding: AnyRounding, key: Key | None, first: int) -> Tensor:
    """As table.round_table. The numbers are on the CPU; float64 ones are left to it, and rare cases."""
    crosses = first % PIECE and first % 2**32 + len(numbers) > 2**32  # a piece would take words of two blocks of 2**32
    if numbers.dtype != torch.float32 or crosses:
        return table_engine.round_table(numbers, table, rounding, key, first)
    stored, rounded = _stored(table, rounding), torch.empty_like(numbers)
    task = TableTask(
        source=numbers.data_ptr(),
        target=rounded.data_ptr(),
        count=len(numbers),
        piece=PIECE,
        key=0 if key is None else key.value - 2**64 if key.value >= 2**63 else key.value,
        parameters=0,
        first=first,
        **stored.fields,
    )
    run(flat(is_random(rounding)), task)
    return rounded
