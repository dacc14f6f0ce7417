"""Kernels of the fused engine for blocks whose numbers are multiplied by a factor before they are rounded.

First the largest magnitude of each block is sought. From these, blocks.factors makes the factors, for every engine
alike. Then each number is multiplied, rounded to the element, and scaled back, in float32. A tensor is (outer, along,
inner) in memory, as engines/lanes.py has it, and is not copied. See loops.py for how kernels are called.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from numba import float32, float64, int64, types, uint32
from numba.core.ccallback import CFunc

from low_precision.engines.group import GROUP, Group, group_buffer, largest_in, noise_of, room_for, round_group
from low_precision.engines.lanes import AHEAD, CACHE_LINE, LANES, first_line_of, put_largest_of
from low_precision.engines.number import INFINITY, MAGNITUDE, SIGN
from low_precision.engines.operations import (
    VECTOR,
    and_,
    as_bits,
    as_bits64,
    as_double,
    as_float,
    fill,
    inlined,
    kernel,
    largest_of_vector,
    load,
    load64,
    next_piece,
    or_,
    prefetch_to_read,
    prefetch_to_write,
    reader,
    store,
    store64,
)
from low_precision.engines.parameters import SATURATE, STOCHASTIC, Parameters
from low_precision.engines.tasks import MaximaTask, QuestTask, ScaledTask

SHORT = 2 * VECTOR
RUN, ROWS = 16 * GROUP, 16  # numbers of a line, or rows of lines side by side, that are one unit of work
_LARGEST = 0x7F7FFFFF  # the bits of float32's largest number
_scaled_task, _maxima_task, _quest_task = reader(ScaledTask), reader(MaximaTask), reader(QuestTask)
_parameters = reader(Parameters, types.uint32)
_lane_buffer, _doubles_buffer = room_for(LANES + VECTOR), room_for(2 * LANES)


@inlined
def _multiplied(target, source, factors, size):
    """So many numbers, each times its factor."""
    for i in range(size):
        store(target, i, as_bits(as_float(load(source, i)) * as_float(load(factors, i))))


@inlined
def _scaled_back(levels, target, elements, size, encode, decode, tensor):
    """blocks.scaled_back of so many numbers."""
    for i in range(size):
        element = as_float(load(elements, i))
        if levels == 2:
            bits = as_bits(element * as_float(load(decode, i)) * as_float(tensor))
        else:
            bits = as_bits(element / as_float(load(encode, i)))
        magnitude = and_(bits, MAGNITUDE)
        limited = min(magnitude, uint32(_LARGEST))
        limited = magnitude if magnitude > uint32(INFINITY) else limited
        store(target, i, or_(limited, and_(bits, SIGN)))


@inlined
def _spread(target, factors, begin, size, length):
    """The factor of each of so many numbers of a line, from place `begin` on, and fewer than VECTOR behind them."""
    if length == VECTOR:  # begin is a multiple of it
        for start in range(0, size, VECTOR):
            fill(target + 4 * start, load(factors, (begin + start) // VECTOR), uint32(0))
        return
    place, block, end = begin, begin // length, begin + size
    while place < end:
        stop = min((block + 1) * length, end)
        factor = load(factors, block)
        for start in range(place, stop, VECTOR):
            fill(target + 4 * (start - begin), factor, uint32(0))
        place, block = stop, block + 1


@cache
def neighbours(mode: int, levels: int) -> CFunc:
    """The kernel of a ScaledTask whose `inner` is 1. A unit is RUN numbers of a line, the last of it fewer.

    levels: 1, or 2 where a block's scale is a number of a format.
    """

    @kernel
    def scaled_neighbours_kernel(address):
        task, numbers, elements, buffer = _scaled_task(address), group_buffer(), group_buffer(), group_buffer()
        encode, decode = _lane_buffer(), _lane_buffer()
        fmt, noise = _parameters(task.parameters), noise_of(task.key, 0)
        length, along = task.length, task.along
        blocks, runs = (along + length - 1) // length, (along + RUN - 1) // RUN
        piece = next_piece(address)
        while piece * task.piece < task.count:
            for number in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                outer, begin = number // runs, number % runs * RUN
                end, of_line = min(begin + RUN, along), 4 * outer * blocks
                first = task.first
                if mode >= STOCHASTIC:
                    first += first_line_of(outer, task) * blocks * length
                for start in range(begin, end, GROUP):
                    size, place = min(GROUP, end - start), 4 * (outer * along + start)
                    _spread(encode, task.encode + of_line, start, size, length)
                    if levels == 2:
                        _spread(decode, task.decode + of_line, start, size, length)
                    _multiplied(numbers, task.source + place, encode, size)
                    group = Group(source=numbers, target=elements, size=size, first=uint32(first + start), offsets=0)
                    round_group(mode, SATURATE, group, noise, fmt, buffer)
                    _scaled_back(levels, task.target + place, elements, size, encode, decode, uint32(task.tensor))
            piece = next_piece(address)

    return scaled_neighbours_kernel


@cache
def columns(mode: int, levels: int) -> CFunc:
    """The kernel of a ScaledTask whose `inner` is more than 1. A unit is ROWS rows of LANES lines, or of fewer."""

    @kernel
    def scaled_columns_kernel(address):
        task, numbers, elements, buffer = _scaled_task(address), group_buffer(), group_buffer(), group_buffer()
        indices = _lane_buffer()
        fmt, noise = _parameters(task.parameters), noise_of(task.key, 0)
        length, along, inner = task.length, task.along, task.inner
        blocks, tiles, runs = (along + length - 1) // length, (inner + LANES - 1) // LANES, (along + ROWS - 1) // ROWS
        piece = next_piece(address)
        while piece * task.piece < task.count:
            for number in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                rest, lane = number // tiles, number % tiles * LANES
                outer, begin, size = rest // runs, rest % runs * ROWS, min(LANES, inner - lane)
                if mode >= STOCHASTIC:
                    first = first_line_of(outer, task)
                    slow, fast = lane // task.inner_1, lane % task.inner_1
                    for i in range(size):
                        line = first + slow * task.inner_step_0 + fast * task.inner_step_1
                        store(indices, i, uint32(task.first + line * blocks * length))
                        fast += 1
                        if fast == task.inner_1:
                            slow, fast = slow + 1, 0
                offsets: Any = indices if mode >= STOCHASTIC else int64(0)
                for row in range(begin, min(begin + ROWS, along)):
                    factors = 4 * ((outer * blocks + row // length) * inner + lane)
                    place = 4 * ((outer * along + row) * inner + lane)
                    encode, decode = task.encode + factors, task.decode + factors
                    ahead = place + 4 * AHEAD * inner if row + AHEAD < along else place
                    for line in range(0, 4 * size, CACHE_LINE):  # the processor does not foresee so large steps
                        prefetch_to_read(task.source + ahead + line)
                        prefetch_to_write(task.target + ahead + line)
                    _multiplied(numbers, task.source + place, encode, size)
                    index: Any = uint32(row)
                    group = Group(source=numbers, target=elements, size=size, first=index, offsets=offsets)
                    round_group(mode, SATURATE, group, noise, fmt, buffer)
                    _scaled_back(levels, task.target + place, elements, size, encode, decode, uint32(task.tensor))
            piece = next_piece(address)

    return scaled_columns_kernel


@cache
def maxima(side_by_side: bool, short: bool) -> CFunc:
    """The kernel of a MaximaTask: the largest magnitude of each block of float32 numbers, NaNs aside.

    side_by_side: whether `inner` is more than 1. A unit is a block, or one of at most LANES lines side by side. short:
    whether a block has at most SHORT numbers; in one kernel, each of the two ways makes the other slow.
    """

    @kernel
    def maxima_kernel(address):
        task, largest = _maxima_task(address), _lane_buffer()
        length, along, inner, most = task.length, task.along, task.inner, uint32(task.type_largest)
        blocks, tiles = (along + length - 1) // length, (inner + LANES - 1) // LANES
        piece = next_piece(address)
        while piece * task.piece < task.count:
            for number in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                if side_by_side:
                    rest, lane = number // tiles, number % tiles * LANES
                    outer, begin = rest // blocks, rest % blocks * length
                    size = min(LANES, inner - lane)
                    for i in range(size):
                        store(largest, i, uint32(0))
                    for row in range(begin, min(begin + length, along)):
                        source = task.source + 4 * ((outer * along + row) * inner + lane)
                        for i in range(size):
                            magnitude = and_(load(source, i), MAGNITUDE)
                            magnitude = uint32(0) if magnitude > uint32(INFINITY) else magnitude
                            store(largest, i, max(load(largest, i), magnitude))
                    target = task.target + 4 * (rest * inner + lane)
                    for i in range(size):
                        store(target, i, min(load(largest, i), most))
                else:
                    outer, begin = number // blocks, number % blocks * length
                    size, source = min(length, along - begin), task.source + 4 * (outer * along + begin)
                    if not short:
                        store(task.target, number, min(largest_in(source, size), most))
                    elif size == VECTOR:
                        store(task.target, number, min(largest_of_vector(source), most))
                    else:
                        put_largest_of(largest, source, size)
                        store(task.target, number, min(load(largest, 0), most))
            piece = next_piece(address)

    return maxima_kernel


@inlined
def _halved(numbers, length):
    """blocks._sum of so many float64 numbers, a power of two, which are overwritten."""
    while length > 1:
        length //= 2
        for i in range(length):
            store64(numbers, i, as_bits64(as_double(load64(numbers, i)) + as_double(load64(numbers, i + length))))
    return as_double(load64(numbers, 0))


@cache
def quest() -> CFunc:
    """The kernel of a QuestTask: blocks.quest_factors of each block, of at most LANES numbers."""

    @kernel
    def quest_kernel(address):
        task, numbers, squares = _quest_task(address), _doubles_buffer(), _doubles_buffer()
        length, most = task.length, float64(as_float(uint32(task.type_largest)))
        places, piece = task.places, next_piece(address)
        while piece * task.piece < task.count:
            for number in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                source = task.source + 4 * number * length
                for i in range(length):
                    bits = load(source, i)
                    is_nan = and_(bits, MAGNITUDE) > uint32(INFINITY)
                    x = float64(as_float(uint32(0) if is_nan else bits))
                    x = max(min(x, most), -most)
                    store64(numbers, i, as_bits64(x))
                    store64(squares, i, as_bits64(x * x))
                for i in range(length, places):
                    store64(numbers, i, 0)
                    store64(squares, i, 0)
                mean, square = _halved(numbers, places) / float64(length), _halved(squares, places) / float64(length)
                deviation = math.sqrt(max(square - mean * mean, 0.0))
                bits64 = as_bits64(deviation * as_double(task.factor) + 1e-8) & (0x7FF << 52)
                bits64 = min(max(bits64, (1023 - 127) << 52), (1023 + 127) << 52)
                store(task.target, number, as_bits(float32(1.0 / as_double(bits64))))
            piece = next_piece(address)

    return quest_kernel
