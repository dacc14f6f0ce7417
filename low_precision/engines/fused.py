"""The fused engine: one pass over memory on all cores, bit for bit what engines/eager.py gives.

The loops are in engines/loops.py and loops64.py. As many threads as torch has take pieces of the tensor in turn; where
torch has them from GNU OpenMP, as on Linux, they are the same threads, which wait for work when an operation of torch
ends.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numba.core.ccallback import CFunc
from torch import Tensor

from low_precision import blocks
from low_precision.engines import door, eager, lanes, loops, loops64
from low_precision.engines.group import GROUP
from low_precision.engines.lanes import LANES
from low_precision.engines.lines import lines as lines_of
from low_precision.engines.parameters import Parameters, bits, bits64, mode_of, parameters, parameters64
from low_precision.engines.tasks import BlocksTask, ImagesTask, LinesTask, MaximaTask, RoundingTask, ScaledTask, Task
from low_precision.formats import AnyFormat, BlockFormat, Format
from low_precision.noise import Key
from low_precision.rounding import AnyRounding, Overflow

PIECE = 2**15  # elements that a thread takes at a time
_ALONE = 2**16  # up to so many elements, the calling thread does the work alone
_HALVES = 2**18  # how many of a float16 or bfloat16 tensor are float32 numbers at a time, in the cache


def quantize(
    x: Tensor,
    fmt: AnyFormat,
    rounding: AnyRounding,
    overflow: Overflow,
    key: Key | None,
    dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Round `x` of any shape and strides, on the CPU; see tensor.quantize. Few rare cases are left to eager."""
    first = key.first_element(len(x), x.numel()) if key and key.first_row else 0
    if first % PIECE and first % 2**32 + x.numel() > 2**32:  # a piece would take words of two blocks of 2**32
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
    if isinstance(fmt, BlockFormat):
        return _quantize_blocks(x, fmt, rounding, overflow, key, dim, out)
    infinity = overflow is Overflow.INFINITY
    if x.dtype == torch.float64:
        return _quantize_float64(x, fmt, rounding, infinity, key, first, out)
    stored = _stored(fmt, rounding)
    result = torch.empty_like(x) if out is None else out
    apart = out is None or door.are_apart(x, out)
    if apart and x.is_contiguous() and result.is_contiguous():
        _flat(stored, infinity, x, result, key, first)
    elif apart and key is None and x.stride() == result.stride() and _is_dense(x):  # then no element's index matters
        source, target = (tensor.as_strided((tensor.numel(),), (1,)) for tensor in (x, result))
        _flat(stored, infinity, source, target, key, first)
    elif apart and key is not None and _is_of_images(x, result) and first + x.numel() <= 2**32:
        _channels_last(stored, infinity, x, result, key, first)
    else:
        contiguous = x.clone(memory_format=torch.contiguous_format)  # never x itself
        _flat(stored, infinity, contiguous, contiguous, key, first)
        result.copy_(contiguous)
    return result


def _is_of_images(x: Tensor, result: Tensor) -> bool:
    """Whether both lie pixel by pixel, as float32 numbers."""
    if x.dtype != torch.float32 or x.ndim not in (4, 5) or x.stride() != result.stride():
        return False
    return x.movedim(1, -1).is_contiguous()


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill a piece of memory, in whatever order."""
    place = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != place:
            return False
        place *= size
    return True


def _flat(stored: _StoredParameters, infinity: bool, x: Tensor, result: Tensor, key: Key | None, first: int) -> None:
    """x, result: contiguous, float32 or, by way of it, another type."""
    kernel = loops.flat(stored.mode, infinity)
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
        _run(kernel, task)
        return
    flat, rounded = x.view(-1), result.view(-1)
    for start in range(0, len(flat), _HALVES):
        numbers = flat[start : start + _HALVES].float()
        _flat(stored, infinity, numbers, numbers, key, first + start)
        narrow = rounded[start : start + _HALVES].copy_(numbers)
        if blocks.may_have_nan(numbers):
            narrow.copy_(blocks.narrowed(numbers, x.dtype))


def _channels_last(stored: _StoredParameters, infinity: bool, x: Tensor, result: Tensor, key: Key, first: int) -> None:
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
    _run(loops.channels_last(stored.mode, infinity), task)


@lru_cache(maxsize=256)
def _offsets(channels: int, pixels: int) -> tuple[np.ndarray, int]:
    """ImagesTask.offsets, and how many pixels its units have."""
    place = np.arange(GROUP, dtype=np.uint64)
    offsets = (place // channels + place % channels * pixels).astype(np.uint32)
    return offsets, max(1, GROUP // channels)


def _quantize_float64(
    x: Tensor, fmt: Format, rounding: AnyRounding, infinity: bool, key: Key | None, first: int, out: Tensor | None
) -> Tensor:
    stored, source = _stored64(fmt, rounding), x.contiguous()
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
    _run(loops64.flat(stored.mode, infinity), task)
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
) -> Tensor:
    uncopied = _lines(x, fmt, rounding, key, dim)
    if uncopied is not None:
        return uncopied if out is None else out.copy_(uncopied)
    rows = blocks.rows(x, fmt, dim)
    first = key.first_element(len(x), rows.numel()) if key and key.first_row else 0
    if x.dtype == torch.float64 or first + rows.numel() > 2**32 or (fmt.scale and not _holds(x.dtype, fmt)):
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
    rows, type_largest = rows.float(), torch.finfo(x.dtype).max
    rounded: Tensor | None
    if fmt.scale is not None:
        rounded = _scaled(rows, fmt, rounding, key, first, type_largest)
    elif len(rows) == 1 and rows.numel() > _ALONE:
        rounded = _one_block(rows, fmt.element, rounding, key, first, type_largest)
    else:
        rounded = _blocks(rows, fmt.element, rounding, key, first, type_largest)
    if rounded is None:
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
    if x.dtype != torch.float32:
        rounded = blocks.narrowed(blocks.reached(rounded, fmt, x.dtype), x.dtype)
    result = blocks.restore(rounded, x, fmt, dim)
    return result if out is None else out.copy_(result)


def _lines(x: Tensor, fmt: BlockFormat, rounding: AnyRounding, key: Key | None, dim: int) -> Tensor | None:
    """Blocks of so many numbers along a dimension, with a power of two as scale, of a tensor that is not copied.

    None where it is another block, or an engine of such a tensor cannot round it: then its blocks.rows are rounded.
    """
    if isinstance(fmt.block, str) or fmt.scale is not None or x.ndim == 0 or x.dtype == torch.float64:
        return None
    lines = lines_of(x.shape, x.stride(), dim % x.ndim)
    if lines is None or (lines.inner == 1 and lines.along > 1 and fmt.block > LANES):
        return None
    outer, along, inner = lines[:3]
    padded = outer * inner * -(-along // fmt.block) * fmt.block
    first = key.first_element(len(x), padded) if key and key.first_row else 0
    source = x.float()
    rounded = torch.empty_like(source)
    if first + padded > 2**32 or not source.stride() == rounded.stride() == x.stride():
        return None
    is_columns = inner > 1 or along == 1
    numbers = min(fmt.block, along) * (min(inner, LANES) if is_columns else 1)  # of a unit
    stored = _stored(fmt.element, rounding, torch.finfo(x.dtype).max)
    task = LinesTask(
        source=source.data_ptr(),
        target=rounded.data_ptr(),
        count=outer * -(-along // fmt.block) * (-(-inner // LANES) if is_columns else 1),
        piece=max(1, PIECE // numbers),
        key=_as_int64(key),
        parameters=stored.address,
        first=first,
        length=fmt.block,
        **lines._asdict(),
    )
    _run((lanes.columns if is_columns else lanes.neighbours)(stored.mode), task)
    if task.refused:
        return None
    return rounded if x.dtype == torch.float32 else blocks.narrowed(blocks.reached(rounded, fmt, x.dtype), x.dtype)


def _holds(dtype: torch.dtype, fmt: BlockFormat) -> bool:
    """Whether the type has all digits of an element times a scale, or is float32, to which the kernel rounds it."""
    assert fmt.scale is not None
    digits = (fmt.element.mantissa_bits + 1) + (fmt.scale.mantissa_bits + 1)
    return bool(dtype == torch.float32 or 2.0 ** (1 - digits) >= torch.finfo(dtype).eps)


def _blocks(
    rows: Tensor, element: Format, rounding: AnyRounding, key: Key | None, first: int, type_largest: float
) -> Tensor | None:
    """Blocks whose scale is a power of two, or None where eager must round them."""
    stored, rounded, (count, length) = _stored(element, rounding, type_largest), torch.empty_like(rows), rows.shape
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
    _run(loops.blocks(stored.mode), task)
    return None if task.refused else rounded


def _one_block(
    rows: Tensor, element: Format, rounding: AnyRounding, key: Key | None, first: int, type_largest: float
) -> Tensor | None:
    """As `_blocks`, for one long block that threads share: they seek its largest magnitude, then they round."""
    length = rows.numel()
    whole = length - length % PIECE
    pieces = _maxima(rows[:, :whole].view(-1, PIECE), type_largest), _maxima(rows[:, whole:], type_largest)
    of_block = parameters(element, rounding, type_largest).of_block(bits(float(torch.cat(pieces).amax())))
    if of_block is None:
        return None
    stored, rounded = _store(mode_of(rounding), of_block), torch.empty_like(rows)
    _flat(stored, False, rows, rounded, key, first)
    return rounded


def _scaled(
    rows: Tensor, fmt: BlockFormat, rounding: AnyRounding, key: Key | None, first: int, type_largest: float
) -> Tensor:
    """Blocks whose scale is a number of the format `fmt.scale`, times a power of two for the tensor."""
    stored, rounded, (count, length) = _stored64(fmt.element, rounding), torch.empty_like(rows), rows.shape
    assert fmt.scale is not None
    maxima = _maxima(rows, type_largest)
    task = ScaledTask(
        source=rows.data_ptr(),
        target=rounded.data_ptr(),
        count=count,
        piece=max(1, PIECE // max(1, length)),
        key=_as_int64(key),
        parameters=stored.address,
        first=first,
        length=length,
        maxima=maxima.data_ptr(),
        counted=bits64(blocks.counted(type_largest)),
        element_largest=bits64(fmt.element.largest),
        tensor_scale=bits64(blocks.tensor_scale(float(maxima.amax()), fmt, type_largest)),
        scale_largest=bits64(fmt.scale.largest),
        scale_smallest=bits64(fmt.scale.smallest_subnormal),
        scale_lowest_exponent=math.frexp(fmt.scale.smallest_normal)[1] - 1,
        scale_mantissa=fmt.scale.mantissa_bits,
    )
    _run(loops64.scaled(stored.mode), task)
    return rounded


def _maxima(rows: Tensor, type_largest: float) -> Tensor:
    """blocks.maxima of float32 numbers: (blocks,)."""
    count, length = rows.shape
    maxima = torch.empty(count, dtype=torch.float32, device="cpu")
    task = MaximaTask(
        source=rows.data_ptr(),
        target=maxima.data_ptr(),
        count=count,
        piece=max(1, PIECE // max(1, length)),
        length=length,
        type_largest=bits(type_largest),
    )
    _run(loops64.maxima(), task)
    return maxima


class _StoredParameters(NamedTuple):
    """The parameters of a format and a rounding where a kernel reads them."""

    mode: int  # a place in MODES
    address: int
    memory: np.ndarray  # which must live as long as the address is used


def _store(mode: int, numbers: Parameters) -> _StoredParameters:
    memory = np.array([number % 2**32 for number in numbers], dtype=np.uint32)
    return _StoredParameters(mode, memory.ctypes.data, memory)


@lru_cache(maxsize=1024)
def _stored(fmt: Format, rounding: AnyRounding, type_largest: float = 0.0) -> _StoredParameters:
    return _store(mode_of(rounding), parameters(fmt, rounding, type_largest))


@lru_cache(maxsize=1024)
def _stored64(fmt: Format, rounding: AnyRounding) -> _StoredParameters:
    memory = np.array(parameters64(fmt, rounding), dtype=np.int64)
    return _StoredParameters(mode_of(rounding), memory.ctypes.data, memory)


def _as_int64(key: Key | None) -> int:
    """The key's value as an int64 of the same bits, which is what kernels take."""
    if key is None:
        return 0
    return key.value - 2**64 if key.value >= 2**63 else key.value


def _run(kernel: CFunc, task: Task) -> None:
    """Has the task done by torch's threads. The caller holds what the task names by address."""
    address, pieces = ctypes.addressof(task), -(-task.count // task.piece)
    threads = min(torch.get_num_threads(), pieces) if pieces * PIECE > _ALONE else 1
    if threads < 2:
        kernel.ctypes(address)
    elif _gomp_parallel:
        _gomp_parallel(kernel.address, address, threads, 0)
    else:
        _in_pool(kernel, address, threads)


def _find_gomp_parallel() -> Callable[[int | None, int, int, int], None] | None:
    """What compilers call for `#pragma omp parallel` (GNU libgomp's ABI, which LLVM's library has on Linux too)."""
    try:
        openmp = ctypes.CDLL(None)  # torch brings its own library along, and shows it to all
        parallel, pause = openmp.GOMP_parallel, openmp.omp_pause_resource_all
    except (AttributeError, OSError, TypeError):  # another system's, another OpenMP
        return None
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    # A child process would wait for its parent's threads for ever, in torch's operations too. So they end at a fork.
    os.register_at_fork(before=lambda: pause(_HARD))
    return parallel


_HARD = 2  # omp_pause_hard
_gomp_parallel = _find_gomp_parallel()
_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # of this process, for so many threads


def _in_pool(kernel: CFunc, address: int, threads: int) -> None:
    """For systems without GNU OpenMP. Not numba's threads: those crash when two threads of Python use them."""
    global _pool
    process = os.getpid()
    if _pool is None or _pool[0] != process or _pool[1] < threads:
        _pool = (process, threads, ThreadPoolExecutor(threads - 1, "quantize"))
    others = [_pool[2].submit(kernel.ctypes, address) for _ in range(threads - 1)]
    kernel.ctypes(address)
    wait(others)  # before the memory that they write to may go
