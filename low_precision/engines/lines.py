"""How the lines of a tensor lie in memory, along which the blocks of a format run. No numba here."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Lines(NamedTuple):
    """A tensor that fills a piece of memory, as tasks.LinesTask has it, by the same names."""

    outer: int  # of all its three dimensions
    along: int
    inner: int
    outer_1: int
    outer_2: int
    step_0: int
    step_1: int
    step_2: int
    inner_1: int
    inner_step_0: int
    inner_step_1: int


_Run = tuple[int, int]  # (size, step in lines) of a dimension, or of some that are one to whoever counts lines


@lru_cache(maxsize=1024)
def lines(shape: tuple[int, ...], strides: tuple[int, ...], dim: int) -> Lines | None:
    """Those along dimension `dim` (0 .. dimensions - 1), or None where memory is not filled, or in too many pieces."""
    steps, step = [0] * len(shape), 1  # of each dimension but dim: how many lines to the next index, in row-major order
    for d in reversed(range(len(shape))):
        if d != dim:
            steps[d], step = step, step * shape[d]
    order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[d])
    place = 1
    for d in reversed(order):
        if strides[d] != place:
            return None
        place *= shape[d]
    middle = order.index(dim) if dim in order else 0
    outer = _merged([(shape[d], steps[d]) for d in order[:middle]])
    inner = _merged([(shape[d], steps[d]) for d in order[middle + (dim in order) :]])
    if len(outer) > 3 or len(inner) > 2:
        return None
    (size_0, step_0), (outer_1, step_1), (outer_2, step_2) = [(1, 0)] * (3 - len(outer)) + outer
    (inner_0, inner_step_0), (inner_1, inner_step_1) = [(1, 0)] * (2 - len(inner)) + inner
    return Lines(
        outer=size_0 * outer_1 * outer_2,
        along=shape[dim],
        inner=inner_0 * inner_1,
        outer_1=outer_1,
        outer_2=outer_2,
        step_0=step_0,
        step_1=step_1,
        step_2=step_2,
        inner_1=inner_1,
        inner_step_0=inner_step_0,
        inner_step_1=inner_step_1,
    )


def _merged(dimensions: list[_Run]) -> list[_Run]:
    """Neighbours become one where a step of the first is as many lines as the whole of the second."""
    runs: list[_Run] = []
    for size, step in dimensions:
        if runs and runs[-1][1] == size * step:
            runs[-1] = (runs[-1][0] * size, step)
        else:
            runs.append((size, step))
    return runs


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements of such a tensor fill a piece of memory, in whatever order."""
    place = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != place:
            return False
        place *= size
    return True
