"""The fused engine: one pass over memory on all cores, bit for bit what engines/eager.py gives.

The loops are in engines/loops.py, loops64.py, lanes.py and scaled.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from low_precision import blocks
from low_precision.engines import door, eager, lanes, loops, loops64, scaled_lines, table_loops
from low_precision.engines.group import GROUP
from low_precision.engines.lanes import LANES
from low_precision.engines.lines import is_dense
from low_precision.engines.lines import lines as lines_of
from low_precision.engines.parameters import (
    SATURATE,
    Parameters,
    bits,
    mode_of,
    overflow_of,
    parameters,
    parameters64,
)
from low_precision.engines.tasks import BlocksTask, ImagesTask, LinesTask, RoundingTask
from low_precision.engines.threads import ALONE, PIECE, run
from low_precision.formats import AnyFormat, BlockFormat, Format
from low_precision.noise import Key
from low_precision.rounding import AnyRounding, Overflow, Rounding
from low_precision.tables import Table

_SCALED = 2**17  # how many numbers of blocks are multiplied at a time, in the cache
_HALVES = 2**18  # how many of a float16 or bfloat16 tensor are float32 numbers at a time, in the cache


_BY = eager.By(to_table=table_loops.round_table, powers_in_float32=True)


def quantize(
    x: Tensor,
    fmt: AnyFormat,
    rounding: AnyRounding,
    overflow: Overflow,
    key: Key | None,
    dim: int = -1,
    out: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Round `x` of any shape and strides, on the CPU; see tensor.quantize. Few rare cases are left to eager."""
    first = key.first_element(len(x), x.numel()) if key and key.first_row else 0
    if first % PIECE and first % 2**32 + x.numel() > 2**32:  # a piece would take words of two blocks of 2**32
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out, scale)
    if isinstance(fmt, Table):
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out, by=_BY)
    if isinstance(fmt, BlockFormat):
        return _quantize_blocks(x, fmt, rounding, overflow, key, dim, out, scale)
    beyond = overflow_of(overflow, fmt)
    if x.dtype == torch.float64 or fmt.needs_float64:
        if fmt.smallest_subnormal < torch.finfo(torch.float64).tiny:
            return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
        return _in_float64(x, fmt, rounding, beyond, key, first, out)
    stored = _stored(fmt, rounding)
    result = torch.empty_like(x) if out is None else out
    apart = out is None or door.are_apart(x, out)
    if apart and x.is_contiguous() and result.is_contiguous():
        _flat(stored, beyond, x, result, key, first)
    elif (
        apart and key is None and x.stride() == result.stride() and is_dense(x.shape, x.stride())
    ):  # then no element's index matters
        source, target = (tensor.as_strided((tensor.numel(),), (1,)) for tensor in (x, result))
        _flat(stored, beyond, source, target, key, first)
    elif apart and key is not None and _is_of_images(x, result) and first + x.numel() <= 2**32:
        _channels_last(stored, beyond, x, result, key, first)
    else:
        contiguous = x.clone(memory_format=torch.contiguous_format)  # never x itself
        _flat(stored, beyond, contiguous, contiguous, key, first)
        result.copy_(contiguous)
    return result


def _is_of_images(x: Tensor, result: Tensor) -> bool:
    """Whether both lie pixel by pixel, as float32 numbers."""
    if x.dtype != torch.float32 or x.ndim not in (4, 5) or x.stride() != result.stride():
        return False
    return x.movedim(1, -1).is_contiguous()


def _flat(stored: _StoredParameters, beyond: int, x: Tensor, result: Tensor, key: Key | None, first: int) -> None:
    """x, result: contiguous, float32 or, by way of it, another type."""
    kernel = loops.flat(stored.mode, beyond)
    if x.dtype == torch.float32:
        task = RoundingTask(
            source=x.data_ptr(),
            target=result.data_ptr(),
            count=x.numel(),
            piece=PIECE,
            key=_as_int64(key),
            parameters=stored.address,
            first=first,
        )
        run(kernel, task)
        return
    flat, rounded = x.view(-1), result.view(-1)
    for start in range(0, len(flat), _HALVES):
        numbers = flat[start : start + _HALVES].float()
        _flat(stored, beyond, numbers, numbers, key, first + start)
        narrow = rounded[start : start + _HALVES].copy_(numbers)
        if blocks.may_have_nan(numbers):
            narrow.copy_(blocks.narrowed(numbers, x.dtype))


def _channels_last(stored: _StoredParameters, beyond: int, x: Tensor, result: Tensor, key: Key, first: int) -> None:
    images, channels = x.shape[:2]
    pixels = x[0, 0].numel()
    offsets, unit = _offsets(channels, pixels)
    task = ImagesTask(
        source=x.data_ptr(),
        target=result.data_ptr(),
        count=images * -(-pixels // unit),
        piece=max(1, PIECE // (unit * channels)),
        key=_as_int64(key),
        parameters=stored.address,
        first=first,
        channels=channels,
        pixels=pixels,
        offsets=offsets.ctypes.data,
    )
    run(loops.channels_last(stored.mode, beyond), task)


@lru_cache(maxsize=256)
def _offsets(channels: int, pixels: int) -> tuple[np.ndarray, int]:
    """ImagesTask.offsets, and how many pixels its units have."""
    place = np.arange(GROUP, dtype=np.uint64)
    offsets = (place // channels + place % channels * pixels).astype(np.uint32)
    return offsets, max(1, GROUP // channels)


def _in_float64(
    x: Tensor, fmt: Format, rounding: AnyRounding, beyond: int, key: Key | None, first: int, out: Tensor | None
) -> Tensor:
    """float64 numbers; or others as such, where the format needs it, which then come back as they were."""
    stored = _stored64(fmt, rounding)
    source = x.contiguous() if x.dtype == torch.float64 else x.float().contiguous()
    rounded = torch.empty_like(source)
    task = RoundingTask(
        source=source.data_ptr(),
        target=rounded.data_ptr(),
        count=x.numel(),
        piece=PIECE,
        key=_as_int64(key),
        parameters=stored.address,
        first=first,
    )
    run(loops64.flat(stored.mode, beyond, is_wide=source.dtype == torch.float64), task)
    rounded = rounded if x.dtype == source.dtype else blocks.narrowed(rounded, x.dtype)
    if out is None:
        out = rounded if x.is_contiguous() else torch.empty_like(x)
    return out if out is rounded else out.copy_(rounded)


def _quantize_blocks(
    x: Tensor,
    fmt: BlockFormat,
    rounding: AnyRounding,
    overflow: Overflow,
    key: Key | None,
    dim: int,
    out: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    rounded = None if x.dtype == torch.float64 else _blocks_of_float32(x, fmt, rounding, key, dim, scale)
    if rounded is None:
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out, scale, by=_BY)
    if x.dtype != torch.float32:
        rounded = blocks.narrowed(blocks.reached(rounded, x.dtype), x.dtype)
    return rounded if out is None else out.copy_(rounded)


def _blocks_of_float32(
    x: Tensor, fmt: BlockFormat, rounding: AnyRounding, key: Key | None, dim: int, scale: Tensor | None
) -> Tensor | None:
    """The tensor in float32, rounded, in its layout; None where eager must round it."""
    if isinstance(fmt.element, Table):  # eager divides by a power of two in float64
        return None if fmt.scaling.is_power else _in_table(x, fmt, fmt.element, rounding, key, dim, scale)
    if fmt.element.needs_float64:
        return None
    if not fmt.scaling.is_power:
        return _in_factors(x, fmt, rounding, key, dim, scale)
    is_of_lines = fmt.sizes is not None and (fmt.sizes[0] > 1 or fmt.is_flat)
    if (is_of_lines or fmt.block == "column") and not eager.goes_up(rounding):
        return _in_factors(x, fmt, rounding, key, dim, scale)
    if is_of_lines:  # a quotient below float32's numbers would become zero before it is rounded up
        return None
    type_largest, addend = torch.finfo(x.dtype).max, blocks.addend(fmt, 23)
    stored = _stored(fmt.element, rounding, type_largest, addend)
    rounded = _lines(x, fmt, stored, key, dim)
    if rounded is not None:
        return rounded
    rows = blocks.rows(x, fmt, dim).float()
    first = key.first_element(len(x), rows.numel()) if key and key.first_row else 0
    if first + rows.numel() > 2**32:
        return None
    if len(rows) == 1 and rows.numel() > ALONE:
        largest = bits(float(scaled_lines.maxima(rows, 1, rows.shape[1], type_largest)))
        of_block = parameters(fmt.element, rounding, type_largest, addend).of_block(largest)
        if of_block is None:
            return None
        rounded = torch.empty_like(rows)
        _flat(_store(mode_of(rounding), of_block), SATURATE, rows, rounded, key, first)
    else:
        rounded = _blocks(rows, stored, key, first)
    return None if rounded is None else blocks.restore(rounded, x, fmt, dim)


def _lines(x: Tensor, fmt: BlockFormat, stored: _StoredParameters, key: Key | None, dim: int) -> Tensor | None:
    """Blocks of so many numbers along a dimension, with a power of two as scale, of a tensor that is not copied.

    None where it is another block, or an engine of such a tensor cannot round it: then its blocks.rows are rounded.
    """
    if fmt.sizes is None or x.ndim == 0:
        return None
    lines, length = lines_of(x.shape, x.stride(), dim % x.ndim), fmt.sizes[1]
    if lines is None or (lines.inner == 1 and lines.along > 1 and length > LANES):
        return None
    outer, along, inner = lines[:3]
    padded = outer * inner * -(-along // length) * length
    first = key.first_element(len(x), padded) if key and key.first_row else 0
    source = x.float()
    rounded = torch.empty_like(source)
    if first + padded > 2**32 or not source.stride() == rounded.stride() == x.stride():
        return None
    is_columns = inner > 1 or along == 1
    numbers = min(length, along) * (min(inner, LANES) if is_columns else 1)  # of a unit
    task = LinesTask(
        source=source.data_ptr(),
        target=rounded.data_ptr(),
        count=outer * -(-along // length) * (-(-inner // LANES) if is_columns else 1),
        piece=max(1, PIECE // numbers),
        key=_as_int64(key),
        parameters=stored.address,
        first=first,
        length=length,
        **lines._asdict(),
    )
    run((lanes.columns if is_columns else lanes.neighbours)(stored.mode), task)
    return None if task.refused else rounded


def _blocks(rows: Tensor, stored: _StoredParameters, key: Key | None, first: int) -> Tensor | None:
    """Blocks whose scale is a power of two, or None where eager must round them."""
    rounded, (count, length) = torch.empty_like(rows), rows.shape
    task = BlocksTask(
        source=rows.data_ptr(),
        target=rounded.data_ptr(),
        count=count,
        piece=max(1, PIECE // max(1, length)),
        key=_as_int64(key),
        parameters=stored.address,
        first=first,
        length=length,
    )
    run(loops.blocks(stored.mode), task)
    return None if task.refused else rounded


def _to_nearest(x: Tensor, fmt: Format) -> Tensor:
    """x: float32, dense in whatever order."""
    rounded = torch.empty_like(x)
    source, target = (tensor.as_strided((x.numel(),), (1,)) for tensor in (x, rounded))
    _flat(_stored(fmt, Rounding.NEAREST), False, source, target, None, 0)
    return rounded


def _in_factors(
    x: Tensor, fmt: BlockFormat, rounding: AnyRounding, key: Key | None, dim: int, scale: Tensor | None
) -> Tensor | None:
    """Blocks whose numbers are multiplied before they are rounded (blocks.Factors), or None where eager must do it."""
    seen = scaled_lines.seen_as_lines(x, fmt, dim, ordered=key is not None)
    first = key.first_element(len(x), seen.padded) if key and key.first_row else 0
    if first + seen.padded > 2**32:
        return None
    factors = scaled_lines.factors(seen, x, fmt, dim, _to_nearest, scale)
    stored = _stored(fmt.element, rounding)
    rounded = scaled_lines.rounded(seen, factors, stored.mode, stored.address, _as_int64(key), first)
    return scaled_lines.restored(rounded, seen, x, fmt, dim)


def _in_table(
    x: Tensor,
    fmt: BlockFormat,
    element: Table,
    rounding: AnyRounding,
    key: Key | None,
    dim: int,
    scale: Tensor | None,
) -> Tensor:
    """As `_in_factors`, for elements that are values of a table."""
    seen = scaled_lines.seen_as_rows(x, fmt, dim)
    first = key.first_element(len(x), seen.padded) if key and key.first_row else 0
    factors = scaled_lines.factors(seen, x, fmt, dim, _to_nearest, scale)
    encode = factors.encode.reshape(-1, 1)
    decode = encode if factors.decode is None else factors.decode.reshape(-1, 1)
    numbers, rounded = seen.numbers.reshape(-1, seen.length), torch.empty_like(seen.numbers).view(-1, seen.length)
    rows, columns = max(1, _SCALED // seen.length), min(_SCALED, seen.length)
    for row in range(0, len(numbers), rows):
        for column in range(0, seen.length, columns):
            place = slice(row, row + rows), slice(column, column + columns)
            of_rows = factors._replace(
                encode=encode[place[0]], decode=None if factors.decode is None else decode[place[0]]
            )
            scaled = numbers[place] * of_rows.encode
            index = first + row * seen.length + column
            elements = table_loops.round_table(scaled.view(-1), element, rounding, key, index).view(scaled.shape)
            rounded[place] = blocks.scaled_back(elements, of_rows)
    return scaled_lines.restored(rounded.view(seen.numbers.shape), seen, x, fmt, dim)


class _StoredParameters(NamedTuple):
    """The parameters of a format and a rounding where a kernel reads them."""

    mode: int  # a place in MODES
    address: int
    memory: np.ndarray  # which must live as long as the address is used


def _store(mode: int, numbers: Parameters) -> _StoredParameters:
    memory = np.array([number % 2**32 for number in numbers], dtype=np.uint32)
    return _StoredParameters(mode, memory.ctypes.data, memory)


@lru_cache(maxsize=1024)
def _stored(fmt: Format, rounding: AnyRounding, type_largest: float = 0.0, addend: int = 0) -> _StoredParameters:
    return _store(mode_of(rounding), parameters(fmt, rounding, type_largest, addend))


@lru_cache(maxsize=1024)
def _stored64(fmt: Format, rounding: AnyRounding) -> _StoredParameters:
    memory = np.array(parameters64(fmt, rounding), dtype=np.int64)
    return _StoredParameters(mode_of(rounding), memory.ctypes.data, memory)


def _as_int64(key: Key | None) -> int:
    """The key's value as an int64 of the same bits, which is what kernels take."""
    if key is None:
        return 0
    return key.value - 2**64 if key.value >= 2**63 else key.value
