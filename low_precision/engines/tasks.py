"""What the kernels of the fused engine are told: memory that fused.py fills in and the kernels read, by the same names.

No numba here, and no torch.
"""

from __future__ import annotations

import ctypes
import inspect
from typing import TypeVar, dataclass_transform

_Structure = TypeVar("_Structure", bound=type[ctypes.Structure])


class CannotCompile(RuntimeError):
    """An engine does not load on this machine, or cannot compile what it needs."""

    def __init__(self, engine: str, reason: str) -> None:
        """engine: its name. reason: what happened, as `because` has it."""
        super().__init__(engine, reason)  # as they are, so that pickle can make it again
        self.engine, self.reason = engine, reason

    def __str__(self) -> str:
        return f"backend: given {self.engine}, which cannot be used here ({self.reason}), allowed: auto, eager"


def because(error: BaseException) -> str:
    """The error in one line that is not too long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


_LONGEST_REASON = 300  # characters


@dataclass_transform(kw_only_default=True)
def _of_int64(structure: _Structure) -> _Structure:
    """The fields that a class names by its annotations, after those of its base, each a whole number of 64 bits."""
    structure._fields_ = [(name, ctypes.c_int64) for name in inspect.get_annotations(structure)]
    return structure


def field_names(layout: type) -> tuple[str, ...]:
    """The fields of a structure or a named tuple, in the order of memory."""
    if issubclass(layout, tuple):
        return tuple(layout._fields)  # type: ignore[attr-defined]
    return tuple(name for base in reversed(layout.__mro__) for name, _ in vars(base).get("_fields_", ()))


@_of_int64
class Task(ctypes.Structure):
    """One tensor's work. It is in pieces: each thread that calls a kernel with the task takes the next one in turn.

    Addresses are those of memory that must live as long as the task.
    """

    __slots__ = ()  # so that a name which is no field is refused

    source: int  # the address of float32 numbers, of float64 numbers in loops64.flat
    target: int  # the address of what comes out; where that is as large as the source, it may be the source
    count: int  # how many numbers, units or blocks there are
    piece: int  # how many of them are one piece
    next_piece: int = 0  # the number of the piece that nobody has taken yet
    refused: int = 0  # 1 afterwards where the kernel could not do it; what it wrote is then of no use


@_of_int64
class RoundingTask(Task):
    """Numbers that are rounded."""

    __slots__ = ()

    key: int  # noise.Key.value, as an int64 of the same bits
    parameters: int  # the address of parameters.Parameters as uint32, or of Parameters64 as int64 in loops64
    first: int  # the index of the first number


@_of_int64
class TableTask(RoundingTask):
    """Numbers that are rounded to a table; see engines/table_loops.py. `parameters` is of no use."""

    __slots__ = ()

    first_key: int  # one below that of the lowest threshold; a key is the bits of a number, made to be in their order
    last_key: int  # of the highest one
    shift: int  # how many low bits of a key a bucket has
    buckets: int  # the address of uint32: for each bucket, how many thresholds lie below it
    steps: int  # how often the thresholds of a bucket are halved
    thresholds: int  # the address of int32: their keys, and larger ones behind them
    values: int  # the address of float32
    last: int  # the place of the last value
    random_bits: int
    whole: int  # the bits of the float64 number 2**random_bits
    offset: int  # the bits of the float64 number 1/2 with half_offset, else 0
    even: int  # 1 or 0


@_of_int64
class ImagesTask(RoundingTask):
    """Images that lie pixel by pixel, while their elements are counted channel by channel; see loops.channels_last."""

    __slots__ = ()

    channels: int
    pixels: int  # of an image
    offsets: int  # the address of uint32: for each of GROUP elements in memory, its index less the unit's first one


@_of_int64
class BlocksTask(RoundingTask):
    """Blocks of numbers that share a scale."""

    __slots__ = ()

    length: int  # how many numbers a block has


@_of_int64
class LinesTask(BlocksTask):
    """Blocks along one dimension of a tensor that fills a piece of memory: there it is (outer, along, inner).

    A line is all that has one index in the others, and noise counts lines in row-major order. In memory they may lie
    in another order: outer is (_, outer_1, outer_2), inner is (_, inner_1), and a step along each of these five
    dimensions is so many lines in the row-major order.
    """

    __slots__ = ()

    outer: int  # of all its three dimensions
    along: int  # numbers of a line
    inner: int  # lines that lie side by side: so far apart are the numbers of a line
    outer_1: int
    outer_2: int
    step_0: int
    step_1: int
    step_2: int
    inner_1: int
    inner_step_0: int
    inner_step_1: int


@_of_int64
class ScaledTask(LinesTask):
    """Blocks whose numbers are multiplied by a factor, rounded, and scaled back; see blocks.Factors.

    Addresses are of float32 numbers, one a block, which lie in memory as (outer, blocks of a line, inner).
    """

    __slots__ = ()

    encode: int  # an address
    decode: int  # an address; that of `encode` where there is one level
    tensor: int  # the bits of a float32 number; without two levels, of nothing


@_of_int64
class MaximaTask(Task):
    """Blocks of which the largest magnitude is sought: float32, as ScaledTask's factors lie."""

    __slots__ = ()

    length: int  # how many numbers a block has, the last of a line perhaps fewer
    along: int  # numbers of a line
    inner: int  # lines that lie side by side
    type_largest: int  # the bits of the float32 number that stands for infinity


@_of_int64
class RotationTask(Task):
    """Blocks of numbers that a Hadamard transform replaces."""

    __slots__ = ()

    numbers: int  # in all
    inner: int  # lines that lie side by side: so far apart are the numbers of a block
    before: int  # the address of float32 numbers: what each of a unit, or of a block, is multiplied by before
    after: int  # and after the additions


@_of_int64
class QuestTask(Task):
    """Blocks of which a factor is sought by the standard deviation (blocks.quest_factors): float32, one a block."""

    __slots__ = ()

    length: int  # how many numbers a block has
    places: int  # the next power of two
    type_largest: int  # as MaximaTask has it
    factor: int  # the bits of a float64 number: what the deviation is multiplied by
