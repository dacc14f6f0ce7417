"""Kernels of the fused engine for short blocks along any dimension of a tensor, which is not copied.

A tensor that fills a piece of memory is (outer, along, inner) there: blocks run along the middle dimension. Where
`inner` is large, neighbouring numbers belong to neighbouring lines, and each place of a vector instruction, its lane,
has a block of its own: the largest magnitudes are sought down the columns. Where `inner` is 1, the numbers of a block
are neighbours, and several short blocks are rounded at once. Either way each number is rounded by the exponent of its
block, which lies in a row of memory beside it. See loops.py for how kernels are called, number.py for how one number is
rounded.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from numba import int32, int64, types, uint32
from numba.core.ccallback import CFunc

from low_precision.engines.group import GROUP, Group, deep_group, noise_of, room_for
from low_precision.engines.number import (
    INFINITY,
    MAGNITUDE,
    UNDECIDED,
    exponent_of_block,
    general_one,
    is_deep,
    nearest_one,
    of_block,
    saturated,
    small_one,
)
from low_precision.engines.operations import (
    VECTOR,
    add,
    and_,
    fill,
    inlined,
    kernel,
    load,
    next_piece,
    or_,
    prefetch_to_read,
    prefetch_to_write,
    put_largest,
    put_largest_of_two,
    reader,
    refuse,
    store,
    sub,
)
from low_precision.engines.parameters import NEAREST, SATURATE, STOCHASTIC, Parameters
from low_precision.engines.tasks import LinesTask

LANES = GROUP  # lines, or neighbouring numbers, that are rounded at once
KEPT = 32 * LANES  # numbers of blocks that are kept on the stack between the two times that they are read
AHEAD, CACHE_LINE = 4, 64  # rows, bytes
_lines_task, _parameters = reader(LinesTask), reader(Parameters, types.uint32)
_lane_buffer, _kept_buffer = room_for(LANES + VECTOR), room_for(KEPT)


class Lanes(NamedTuple):
    """Numbers that lie one after the other in memory, at most LANES, of which each has a block of its own."""

    source: int  # the address of the first one
    target: int  # the address where the first result goes
    size: Any  # int64
    exponents: int  # the address of uint32: exponent_of_block of each
    indices: int  # the address of uint32: the index of each, less `more`
    more: Any  # uint32


class Range(NamedTuple):
    """Of the exponents of some blocks."""

    lowest: Any  # uint32
    highest: Any


@inlined
def _parameters_at(lanes, i, element):
    exponent = load(lanes.exponents, i)
    return of_block(element, sub(exponent, element.levels_below), exponent)


@inlined
def _small_lanes(lanes, noise, element, deep):
    """See small_one. Returns whether some are undecided with `deep`, and without, whether some needed it."""
    some = uint32(0)
    for i in range(lanes.size):
        bits, fmt = load(lanes.source, i), _parameters_at(lanes, i, element)
        magnitude = small_one(bits, add(load(lanes.indices, i), lanes.more), noise, fmt, deep)
        if deep:
            some = or_(some, uint32(magnitude == uint32(UNDECIDED)))
        else:
            some = or_(some, uint32(sub(and_(bits, MAGNITUDE), 1) < sub(fmt.deep_below, 1)))
        store(lanes.target, i, saturated(bits, magnitude, fmt))
    return some


@inlined
def _deep_lanes(lanes, noise, element):
    """deep_group for each number that needs it, one by one: hardly any."""
    for i in range(lanes.size):
        bits, fmt = load(lanes.source, i), _parameters_at(lanes, i, element)
        if and_(bits, MAGNITUDE) != uint32(0) and is_deep(bits, fmt):
            place, index = 4 * i, add(load(lanes.indices, i), lanes.more)
            one = Group(source=lanes.source + place, target=lanes.target + place, size=1, first=index, offsets=0)
            deep_group(SATURATE, one, noise, fmt)


@inlined
def _round_lanes(mode, lanes, noise, element, exponents):
    """Rounds them. source and target may be the same only where neither is looked at again. exponents: their Range."""
    plain = uint32(sub(element.mantissa, 1)) < uint32(21)  # see round_group
    plain = plain and int32(exponents.highest) - int32(element.levels_below) - int32(element.mantissa) < 230
    lowest_level = int32(exponents.lowest) - int32(element.levels_below)
    if mode == NEAREST and plain:
        for i in range(lanes.size):
            fmt = _parameters_at(lanes, i, element)
            store(lanes.target, i, nearest_one(SATURATE, load(lanes.source, i), fmt))
        return
    if mode == STOCHASTIC and plain and lowest_level + int32(element.normal_drop) > 55:
        if _small_lanes(lanes, noise, element, False) and _small_lanes(lanes, noise, element, True):
            _deep_lanes(lanes, noise, element)
        return
    for i in range(lanes.size):
        fmt, index = _parameters_at(lanes, i, element), uint32(0)
        if mode >= STOCHASTIC:
            index = add(load(lanes.indices, i), lanes.more)
        store(lanes.target, i, general_one(mode, SATURATE, load(lanes.source, i), index, noise, fmt))
    if mode == STOCHASTIC:
        _deep_lanes(lanes, noise, element)


@inlined
def _into_exponents(largest, size, element):
    """Largest magnitudes become exponents, in their place; returns the Range of them."""
    lowest, highest = uint32(0xFF), uint32(0)
    for i in range(size):
        exponent = exponent_of_block(load(largest, i), element)
        store(largest, i, exponent)
        lowest, highest = min(lowest, exponent), max(highest, exponent)
    return Range(lowest=lowest, highest=highest)


@inlined
def _is_refused(exponents, element):
    """Whether a block is so close to float32's smallest or largest numbers that it is left to another engine."""
    too_small = int32(exponents.lowest) - int32(element.levels_below) + int32(element.normal_drop) < 31
    return too_small or exponents.highest == uint32(255)


@inlined
def first_line_of(outer, task):
    """The place of the first line with that index, in row-major order of the lines."""
    if outer < task.outer_2:  # always so, mostly: divisions take time
        return outer * task.step_2
    rest = outer // task.outer_2
    return rest // task.outer_1 * task.step_0 + rest % task.outer_1 * task.step_1 + outer % task.outer_2 * task.step_2


@inlined
def _prefetch(source, target, place, row, rows, stride, size):
    """Asks for a row of the block before it is needed: the processor does not foresee so large steps.

    row: of the source, then of the target, then of the source of the block beside it.
    """
    address = source + place + row * stride
    if row >= 2 * rows:
        address = source + place + (row - 2 * rows) * stride + 4 * size
    if rows <= row < 2 * rows:
        address = target + place + (row - rows) * stride
        for line in range(0, 4 * size, CACHE_LINE):
            prefetch_to_write(address + line)
    else:
        for line in range(0, 4 * size, CACHE_LINE):
            prefetch_to_read(address + line)


@cache
def columns(mode: int) -> CFunc:
    """The kernel of a LinesTask whose `inner` is more than 1, or whose lines have one number.

    A unit is a block of at most LANES lines that lie side by side. As loops.blocks, it may refuse.
    """

    @kernel
    def columns_kernel(address):
        task, kept_buffer, exponents, indices = _lines_task(address), _kept_buffer(), _lane_buffer(), _lane_buffer()
        element, noise = _parameters(task.parameters), noise_of(task.key, 0)
        length, along, inner = task.length, task.along, task.inner
        blocks = (along + length - 1) // length  # of a line
        tiles = (inner + LANES - 1) // LANES
        piece = next_piece(address)
        while piece * task.piece < task.count:
            for number in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                rest, lane = number // tiles, number % tiles * LANES
                outer, begin = rest // blocks, rest % blocks * length
                size, rows = min(LANES, inner - lane), min(length, along - begin)
                place, stride = 4 * ((outer * along + begin) * inner + lane), 4 * inner
                # Kept where there is room: rows whose distance is a power of two throw each other out of the cache.
                keeps = rows * LANES <= KEPT
                for i in range(size):
                    store(exponents, i, uint32(0))
                for row in range(rows):
                    source = task.source + place + row * stride
                    _prefetch(task.source, task.target, place, row + AHEAD, rows, stride, size)
                    if keeps:
                        for i in range(size):
                            store(kept_buffer + 4 * LANES * row, i, load(source, i))
                        source = kept_buffer + 4 * LANES * row
                    for i in range(size):
                        magnitude = and_(load(source, i), MAGNITUDE)
                        magnitude = uint32(0) if magnitude > uint32(INFINITY) else magnitude
                        store(exponents, i, max(load(exponents, i), magnitude))
                exponents_range = _into_exponents(exponents, size, element)
                if _is_refused(exponents_range, element):
                    refuse(address)
                    return
                if mode >= STOCHASTIC:
                    first = first_line_of(outer, task)
                    slow, fast = lane // task.inner_1, lane % task.inner_1
                    for i in range(size):
                        line = first + slow * task.inner_step_0 + fast * task.inner_step_1
                        store(indices, i, uint32(task.first + line * blocks * length + begin))
                        fast += 1
                        if fast == task.inner_1:
                            slow, fast = slow + 1, 0
                for row in range(rows):
                    _prefetch(task.source, task.target, place, rows + row + AHEAD, rows, stride, size)
                    source = kept_buffer + 4 * LANES * row if keeps else task.source + place + row * stride
                    lanes = Lanes(
                        source=source,
                        target=task.target + place + row * stride,
                        size=size,
                        exponents=exponents,
                        indices=indices,
                        more=uint32(row),
                    )
                    _round_lanes(mode, lanes, noise, element, exponents_range)
            piece = next_piece(address)

    return columns_kernel


@inlined
def put_largest_of(target, source, size):
    """The largest magnitude of so many numbers, NaNs aside, into as many places, and fewer than VECTOR behind them."""
    if size <= VECTOR:
        put_largest(target, source, size)
    elif size == 2 * VECTOR:
        put_largest_of_two(target, source)
    else:
        largest = uint32(0)
        for start in range(0, size, VECTOR):
            put_largest(target, source + 4 * start, min(size - start, VECTOR))
            largest = max(largest, load(target, 0))
        for start in range(0, size, VECTOR):
            fill(target + 4 * start, largest, uint32(0))


@cache
def neighbours(mode: int) -> CFunc:
    """The kernel of a LinesTask whose `inner` is 1, with blocks of at most LANES numbers.

    A unit is a block, the last of a line perhaps a shorter one. As loops.blocks, it may refuse.
    """

    @kernel
    def neighbours_kernel(address):
        task, exponents, indices = _lines_task(address), _lane_buffer(), _lane_buffer()
        element, noise = _parameters(task.parameters), noise_of(task.key, 0)
        length, along = task.length, task.along
        blocks = (along + length - 1) // length  # of a line
        piece = next_piece(address)
        while piece * task.piece < task.count:
            number, end = piece * task.piece, min((piece + 1) * task.piece, task.count)
            outer, block = number // blocks, number % blocks
            while number < end:
                place = 4 * (outer * along + block * length)
                size = int64(0)
                while number < end:  # as many blocks as there is room for
                    begin = block * length
                    more = min(length, along - begin)
                    if size + more > LANES:
                        break
                    put_largest_of(exponents + 4 * size, task.source + place + 4 * size, more)
                    if mode >= STOCHASTIC:
                        first = uint32(task.first + first_line_of(outer, task) * blocks * length + begin)
                        for start in range(0, more, VECTOR):
                            fill(indices + 4 * (size + start), add(first, uint32(start)), uint32(1))
                    size, number, block = size + more, number + 1, block + 1
                    if block == blocks:
                        outer, block = outer + 1, 0
                exponents_range = _into_exponents(exponents, size, element)
                if _is_refused(exponents_range, element):
                    refuse(address)
                    return
                lanes = Lanes(
                    source=task.source + place,
                    target=task.target + place,
                    size=size,
                    exponents=exponents,
                    indices=indices,
                    more=uint32(0),
                )
                _round_lanes(mode, lanes, noise, element, exponents_range)
            piece = next_piece(address)

    return neighbours_kernel
