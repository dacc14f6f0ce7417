"""Blocks whose numbers are multiplied by a factor, in the fused engine: what the kernels in scaled.py are told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from low_precision import blocks
from low_precision.engines import scaled
from low_precision.engines.lanes import LANES
from low_precision.engines.lines import Lines, is_dense
from low_precision.engines.lines import lines as lines_of
from low_precision.engines.parameters import bits, bits64
from low_precision.engines.tasks import MaximaTask, QuestTask, ScaledTask
from low_precision.engines.threads import PIECE, run
from low_precision.formats import BlockFormat, Format, Table

_CHUNK = 2**12  # numbers of a long block that are one unit where the largest magnitude is sought


class Seen(NamedTuple):
    """A tensor as kernels see it: `numbers` float32, whose blocks of `length` run along dimension `dim`."""

    numbers: Tensor
    dim: int
    length: int
    lines: Lines
    in_rows: bool = False  # whether numbers are a copy, blocks.rows, of a block a row
    as_they_lie: bool = False  # whether numbers are all of a tensor, in the order of memory

    @property
    def padded(self) -> int:
        """How many numbers there are with the filling at the end of each line."""
        lines = self.lines
        return lines.outer * lines.inner * -(-lines.along // self.length) * self.length


def seen_as_lines(x: Tensor, fmt: BlockFormat, dim: int, ordered: bool = True) -> Seen:
    """x: float32, or two bytes a number, not empty. ordered: whether it matters which number is which."""
    is_one = fmt.block == "tensor" and fmt.scaling.kind != "quest"
    if is_one and not ordered and not x.is_contiguous() and is_dense(x.shape, x.stride()):
        numbers = x.as_strided((x.numel(),), (1,)).float()
        lines = lines_of(numbers.shape, numbers.stride(), 0)
        assert lines is not None
        return Seen(numbers, 0, len(numbers), lines, as_they_lie=True)
    view = _view(x, fmt, dim)
    if view is not None:
        numbers, d, length = view[0].float(), view[1], view[2]
        lines = lines_of(numbers.shape, numbers.stride(), d)
        if lines is not None:
            return Seen(numbers, d, length, lines)
    return _copied_as_rows(x, fmt, dim)


def seen_as_rows(x: Tensor, fmt: BlockFormat, dim: int) -> Seen:
    """The same, with blocks one after the other in memory, in the order of blocks.rows: a copy where they are not."""
    seen = seen_as_lines(x, fmt, dim)
    is_dense = seen.numbers.is_contiguous() and seen.lines.inner == 1 and seen.lines.along % seen.length == 0
    return seen if is_dense else _copied_as_rows(x, fmt, dim)


def _copied_as_rows(x: Tensor, fmt: BlockFormat, dim: int) -> Seen:
    rows = blocks.rows(x, fmt, dim).float()
    lines = lines_of(rows.shape, rows.stride(), 1)
    assert lines is not None
    return Seen(rows, 1, rows.shape[1], lines, in_rows=True)


def _view(x: Tensor, fmt: BlockFormat, dim: int) -> tuple[Tensor, int, int] | None:
    """The tensor, the dimension and the length of blocks along it; None where blocks are no such lines."""
    if x.ndim == 0 or fmt.scaling.kind == "quest":
        return None
    if fmt.sizes is not None:
        return (x.reshape(-1), 0, fmt.sizes[1]) if fmt.is_flat else (x, dim % x.ndim, fmt.sizes[1])
    if fmt.block == "tensor" or (fmt.block == "column" and x.ndim < 2):
        return x.reshape(-1), 0, x.numel()
    if fmt.block == "row":
        return x.reshape(len(x), -1), 1, x.numel() // len(x)
    return (x, 0, len(x)) if x.ndim == 2 else None


def factors(
    seen: Seen,
    x: Tensor,
    fmt: BlockFormat,
    dim: int,
    to_nearest: Callable[[Tensor, Format], Tensor],
    scale: Tensor | None,
) -> blocks.Factors:
    """Of each block, in the order of memory. to_nearest: as blocks.factors takes it, for dense tensors."""
    type_largest = torch.finfo(x.dtype).max
    if fmt.scaling.kind == "quest":
        return _quest_factors(seen.numbers, fmt.element, type_largest)
    grid = maxima(seen.numbers, seen.dim, seen.length, type_largest)
    if seen.in_rows:
        grid = blocks.shared(grid, x, fmt, dim)
    elif fmt.sizes is not None and fmt.sizes[0] > 1 and x.ndim > 1:
        grid = _laid_out_as(grid, blocks.shared_grid(grid, fmt, dim))
    if fmt.scaling.is_power:
        return blocks.Factors(_laid_out_as(grid, (1.0 / blocks.powers(grid, fmt)).float()))
    made = blocks.factors(grid, fmt, to_nearest, scale)
    decode = made.decode if made.decode is None else _laid_out_as(grid, made.decode)
    return blocks.Factors(_laid_out_as(grid, made.encode), decode, made.tensor)


def _quest_factors(rows: Tensor, element: Format | Table, type_largest: float) -> blocks.Factors:
    count, length = rows.shape
    if length > LANES:
        return blocks.quest_factors(rows, element, type_largest)
    encode = torch.empty(count, 1, dtype=torch.float32, device="cpu")
    task = QuestTask(
        source=rows.data_ptr(),
        target=encode.data_ptr(),
        count=count,
        piece=max(1, PIECE // length),
        length=length,
        places=1 << (length - 1).bit_length(),
        type_largest=bits(type_largest),
        factor=bits64(blocks.quest_factor(element)),
    )
    run(scaled.quest(), task)
    return blocks.Factors(encode)


def _laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def maxima(numbers: Tensor, dim: int, length: int, type_largest: float) -> Tensor:
    """blocks.maxima of float32 numbers: as many along `dim` as there are blocks, else of the same shape and order."""
    lines = lines_of(numbers.shape, numbers.stride(), dim)
    assert lines is not None
    along, inner = lines.along, lines.inner
    count = -(-along // length)
    chunk = min(length, _CHUNK) if count == 1 else length
    order = sorted(range(numbers.ndim), key=lambda d: (numbers.shape[d] != 1, -numbers.stride()[d]))
    chunks = -(-along // chunk)
    shape = [chunks if d == dim else numbers.shape[d] for d in order]
    in_memory = torch.empty(shape, dtype=torch.float32, device="cpu")
    grid = in_memory.permute([order.index(d) for d in range(numbers.ndim)])
    width = min(inner, LANES)
    task = MaximaTask(
        source=numbers.data_ptr(),
        target=grid.data_ptr(),
        count=lines.outer * chunks * -(-inner // LANES),
        piece=max(1, PIECE // (min(chunk, along) * width)),
        length=chunk,
        along=along,
        inner=inner,
        type_largest=bits(type_largest),
    )
    run(scaled.maxima(inner > 1, chunk <= scaled.SHORT), task)
    return grid if chunks == count else grid.amax(dim, keepdim=True)


def rounded(seen: Seen, factors: blocks.Factors, mode: int, parameters: int, key: int, first: int) -> Tensor:
    """The numbers, rounded. parameters: the address of the element's; key: Key.value as int64."""
    lines, result = seen.lines, torch.empty_like(seen.numbers)
    decode, levels = (factors.encode, 1) if factors.decode is None else (factors.decode, 2)
    if lines.inner == 1 and seen.numbers.is_contiguous() and lines.along % seen.length == 0:
        lines = lines._replace(outer=1, along=lines.outer * lines.along, outer_1=1, outer_2=1)  # as one long line
    is_columns, along, width = lines.inner > 1, lines.along, min(lines.inner, LANES)
    unit = min(along, scaled.ROWS) * width if is_columns else min(along, scaled.RUN)
    runs = math.ceil(along / scaled.ROWS) * math.ceil(lines.inner / LANES) if is_columns else -(-along // scaled.RUN)
    task = ScaledTask(
        source=seen.numbers.data_ptr(),
        target=result.data_ptr(),
        count=lines.outer * runs,
        piece=max(1, PIECE // unit),
        key=key,
        parameters=parameters,
        first=first,
        length=seen.length,
        encode=factors.encode.data_ptr(),
        decode=decode.data_ptr(),
        tensor=0 if factors.tensor is None else bits(float(factors.tensor)),
        **lines._asdict(),
    )
    run((scaled.columns if is_columns else scaled.neighbours)(mode, levels), task)
    return result


def restored(numbers: Tensor, seen: Seen, x: Tensor, fmt: BlockFormat, dim: int) -> Tensor:
    """The rounded numbers as a tensor like x."""
    if seen.in_rows:
        return blocks.restore(numbers, x, fmt, dim)
    if seen.as_they_lie:
        return numbers.as_strided(x.shape, x.stride())
    result = numbers.reshape(x.shape)
    return result if result.stride() == x.stride() else torch.empty_like(x, dtype=torch.float32).copy_(result)
