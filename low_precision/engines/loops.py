"""The kernels of the fused engine, compiled by numba for the processor at hand: groups of a tensor in one pass.

A kernel is a C function of one argument, the address of a task (engines/tasks.py). The work is in pieces, and any
number of threads may call the kernel with the same task: each takes the next piece until none is left. Addresses and
counts are the caller's, who answers for them; nothing here allocates or raises. engines/group.py says how a group is
rounded.
"""

from __future__ import annotations

from functools import cache

from numba import int32, types, uint32
from numba.core.ccallback import CFunc

from low_precision.engines.group import (
    GROUP,
    Group,
    group_buffer,
    largest_in,
    noise_of,
    round_group,
)
from low_precision.engines.number import exponent_of_block, of_block
from low_precision.engines.operations import kernel, next_piece, reader, refuse, sub
from low_precision.engines.parameters import SATURATE, Parameters
from low_precision.engines.tasks import BlocksTask, ImagesTask, RoundingTask

_rounding_task, _images_task, _blocks_task = reader(RoundingTask), reader(ImagesTask), reader(BlocksTask)
_parameters = reader(Parameters, types.uint32)


@cache
def flat(mode: int, overflow: int) -> CFunc:
    """The kernel of a RoundingTask whose float32 numbers are one after the other in memory.

    mode: a place in MODES. overflow: SATURATE, PROPAGATE or INFINITE. No piece may cross an
    index that is a multiple of 2**32.
    """

    @kernel
    def flat_kernel(address):
        task, buffer = _rounding_task(address), group_buffer()
        fmt = _parameters(task.parameters)
        piece = next_piece(address)
        while piece * task.piece < task.count:
            begin, end = piece * task.piece, min((piece + 1) * task.piece, task.count)
            noise = noise_of(task.key, (task.first + begin) >> 32)
            for start in range(begin, end, GROUP):
                group = Group(
                    source=task.source + 4 * start,
                    target=task.target + 4 * start,
                    size=min(GROUP, end - start),
                    first=uint32(task.first + start),
                    offsets=0,
                )
                round_group(mode, overflow, group, noise, fmt, buffer)
            piece = next_piece(address)

    return flat_kernel


@cache
def channels_last(mode: int, overflow: int) -> CFunc:
    """The kernel of an ImagesTask: float32 numbers that lie pixel by pixel, counted channel by channel, at most 2**32.

    A unit is max(1, GROUP // channels) pixels, the last of an image fewer.
    """

    @kernel
    def channels_last_kernel(address):
        task, buffer = _images_task(address), group_buffer()
        fmt, noise = _parameters(task.parameters), noise_of(task.key, 0)
        channels, pixels = task.channels, task.pixels
        unit = max(1, GROUP // channels)
        units = (pixels + unit - 1) // unit  # of an image
        piece = next_piece(address)
        while piece * task.piece < task.count:
            for number in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                image, pixel = number // units, number % units * unit
                elements = min(unit, pixels - pixel) * channels
                first = task.first + image * pixels * channels + pixel
                for start in range(0, elements, GROUP):  # several only where there are more channels than GROUP
                    place = 4 * ((image * pixels + pixel) * channels + start)
                    group = Group(
                        source=task.source + place,
                        target=task.target + place,
                        size=min(GROUP, elements - start),
                        first=uint32(first + start * pixels),
                        offsets=task.offsets,
                    )
                    round_group(mode, overflow, group, noise, fmt, buffer)
            piece = next_piece(address)

    return channels_last_kernel


@cache
def blocks(mode: int) -> CFunc:
    """The kernel of a BlocksTask: float32 numbers in blocks with a power of two as scale (formats.BlockFormat).

    At most 2**32 numbers. A block so close to float32's smallest or largest numbers that it must be left to another
    engine makes it stop, and the task `refused`.
    """

    @kernel
    def blocks_kernel(address):
        task, buffer = _blocks_task(address), group_buffer()
        element, noise = _parameters(task.parameters), noise_of(task.key, 0)
        piece = next_piece(address)
        while piece * task.piece < task.count:
            for number in range(piece * task.piece, min((piece + 1) * task.piece, task.count)):
                begin = number * task.length
                largest = largest_in(task.source + 4 * begin, task.length)
                exponent = exponent_of_block(largest, element)
                lowest_level = sub(exponent, element.levels_below)
                if int32(lowest_level) + int32(element.normal_drop) < 31 or exponent == uint32(255):
                    refuse(address)
                    return
                fmt = of_block(element, lowest_level, exponent)
                end = begin + task.length
                for start in range(begin, end, GROUP):
                    group = Group(
                        source=task.source + 4 * start,
                        target=task.target + 4 * start,
                        size=min(GROUP, end - start),
                        first=uint32(task.first + start),
                        offsets=0,
                    )
                    round_group(mode, SATURATE, group, noise, fmt, buffer)
            piece = next_piece(address)

    return blocks_kernel
