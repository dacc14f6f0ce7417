"""The fast Hadamard transform in the fused engine: hadamard.py's additions in the same order, in one pass over memory.

A tensor is (outer, along, inner) in memory, as engines/lines.py has it; blocks of `size` numbers run along the middle
dimension. Where inner is 1, the first four steps of a block are within a vector of 16 numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc
from torch import Tensor

from low_precision.engines.group import room_for
from low_precision.engines.lines import lines as lines_of
from low_precision.engines.operations import (
    VECTOR,
    as_bits,
    as_float,
    inlined,
    instruction,
    kernel,
    load,
    next_piece,
    reader,
    store,
)
from low_precision.engines.tasks import RotationTask
from low_precision.engines.threads import PIECE, run

RUN = 2**10  # neighbours that are one unit of work, whole blocks
_SIDE = 4 * VECTOR  # lines that lie side by side and are one unit
_LONGEST = 256
_FLOATS = ir.VectorType(ir.FloatType(), VECTOR)
_rotation_task = reader(RotationTask)
_run_buffer, _side_buffer = room_for(RUN + VECTOR), room_for(_LONGEST * _SIDE)


def rotate(x: Tensor, dim: int, size: int, before: list[float], after: list[float]) -> Tensor:
    """The transform of a float32 tensor on the CPU, not empty, whose blocks along `dim` are whole: a new tensor.

    before, after: what each of the `size` numbers of a block is multiplied by, before the additions and after them.
    """
    lines = lines_of(x.shape, x.stride(), dim)
    if lines is None:  # its memory is not filled
        x = torch.empty_like(x).copy_(x)
        lines = lines_of(x.shape, x.stride(), dim)
    if lines is None:
        return torch.empty_like(x).copy_(rotate(x.contiguous(), dim, size, before, after))
    result, along, inner = torch.empty_like(x), lines.along, lines.inner
    factors = torch.tensor([before, after], dtype=torch.float32, device="cpu")
    if inner == 1:
        factors = factors.repeat(1, RUN // size)
    tiles = -(-inner // _SIDE)
    task = RotationTask(
        source=x.data_ptr(),
        target=result.data_ptr(),
        count=-(-x.numel() // RUN) if inner == 1 else lines.outer * (along // size) * tiles,
        piece=max(1, PIECE // (RUN if inner == 1 else size * min(_SIDE, inner))),
        numbers=x.numel(),
        inner=inner,
        before=factors[0].data_ptr(),
        after=factors[1].data_ptr(),
    )
    run(neighbours(size) if inner == 1 else side_by_side(size), task)
    return result


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _FLOATS.as_pointer())


@instruction
def _sum_and_difference(typing_context, first, second):
    """void (int64, int64): VECTOR numbers at two addresses become their sums and their differences."""

    def generate(context, builder, signature, arguments):
        places = [_pointer(builder, address) for address in arguments]
        a, b = (builder.load(place, align=4) for place in places)
        builder.store(builder.fadd(a, b), places[0], align=4)
        builder.store(builder.fsub(a, b), places[1], align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@cache
def _within_vector(size: int) -> Any:
    """void (int64): the steps 1, 2, 4 and 8, as far as they are below `size`, of the VECTOR numbers at an address."""

    def constant(number_type: Any, numbers: list[Any]) -> Any:
        return ir.Constant(ir.VectorType(number_type, VECTOR), [ir.Constant(number_type, n) for n in numbers])

    @instruction
    def within(typing_context, address):
        def generate(context, builder, signature, arguments):
            place = _pointer(builder, arguments[0])
            numbers, step = builder.load(place, align=4), 1
            while step < min(size, VECTOR):
                # The other number of a pair: the first takes their sum, the second the first one less itself.
                others = builder.shuffle_vector(
                    numbers, numbers, constant(ir.IntType(32), [i ^ step for i in range(VECTOR)])
                )
                is_second = constant(ir.IntType(1), [bool(i & step) for i in range(VECTOR)])
                sums, differences = builder.fadd(numbers, others), builder.fsub(others, numbers)
                numbers, step = builder.select(is_second, differences, sums), 2 * step
            builder.store(numbers, place, align=4)
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return within


@inlined
def _multiplied(target, source, factors, size):
    for i in range(size):
        store(target, i, as_bits(as_float(load(source, i)) * as_float(load(factors, i))))


@inlined
def _all_multiplied(target, source, factor, size):
    for i in range(size):
        store(target, i, as_bits(as_float(load(source, i)) * as_float(factor)))


@cache
def neighbours(size: int) -> CFunc:
    """The kernel of a RotationTask whose `inner` is 1. A unit is RUN numbers, the last of them fewer."""
    within = _within_vector(size)

    @kernel
    def rotated_neighbours_kernel(address):
        task, buffer = _rotation_task(address), _run_buffer()
        piece = next_piece(address)
        while piece * task.piece < task.count:
            for unit in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                begin = unit * RUN
                length = min(RUN, task.numbers - begin)
                _multiplied(buffer, task.source + 4 * begin, task.before, length)
                for start in range(0, length, VECTOR):
                    within(buffer + 4 * start)
                step = VECTOR
                while step < size:
                    for start in range(0, length, 2 * step):
                        for place in range(start, start + step, VECTOR):
                            _sum_and_difference(buffer + 4 * place, buffer + 4 * (place + step))
                    step *= 2
                _multiplied(task.target + 4 * begin, buffer, task.after, length)
            piece = next_piece(address)

    return rotated_neighbours_kernel


@cache
def side_by_side(size: int) -> CFunc:
    """The kernel of a RotationTask whose `inner` is more than 1. A unit is a block of at most _SIDE lines."""

    @kernel
    def rotated_side_by_side_kernel(address):
        task, buffer = _rotation_task(address), _side_buffer()
        inner = task.inner
        tiles = (inner + _SIDE - 1) // _SIDE
        piece = next_piece(address)
        while piece * task.piece < task.count:
            for unit in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                lane = unit % tiles * _SIDE
                begin, width = 4 * (unit // tiles * size * inner + lane), min(_SIDE, inner - lane)
                for row in range(size):
                    source = task.source + begin + 4 * row * inner
                    _all_multiplied(buffer + 4 * row * _SIDE, source, load(task.before, row), width)
                step = 1
                while step < size:
                    for row in range(size):
                        if row & step == 0:
                            first, second = buffer + 4 * row * _SIDE, buffer + 4 * (row + step) * _SIDE
                            for place in range(0, 4 * width, 4 * VECTOR):
                                _sum_and_difference(first + place, second + place)
                    step *= 2
                for row in range(size):
                    target = task.target + begin + 4 * row * inner
                    _all_multiplied(target, buffer + 4 * row * _SIDE, load(task.after, row), width)
            piece = next_piece(address)

    return rotated_side_by_side_kernel
