"""The fused engine: one pass over memory on all cores, bit for bit what engines/eager.py gives.

The loops are in engines/loops.py. As many threads as torch has take pieces of the tensor in turn; where torch has
them from GNU OpenMP, as on Linux, they are the same threads, which wait for work when an operation of torch ends.
"""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba.core.ccallback import CFunc
from torch import Tensor

from low_precision import blocks
from low_precision.engines import eager
from low_precision.engines import loops as compiled
from low_precision.engines import loops64 as wide
from low_precision.engines.parameters import bits, bits64, parameters, wide_parameters
from low_precision.formats import BlockFormat, FewBits, Format, Overflow, Rounding
from low_precision.noise import Key

PIECE = 2**15  # elements that a thread takes at a time
_ALONE = 2**16  # up to so many elements, the calling thread does the work alone
_HALVES = 2**18  # how many of a float16 or bfloat16 tensor are float32 numbers at a time, in the cache


def quantize(
    x: Tensor,
    fmt: Format | BlockFormat,
    rounding: Rounding | FewBits,
    overflow: Overflow,
    key: Key | None,
    dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Round `x` of any shape and strides, on the CPU; see quant.quantize. Few rare cases are left to eager."""
    first = key.first_element(len(x), x.numel()) if key and key.first_row else 0
    if first % PIECE and first % 2**32 + x.numel() > 2**32:  # a piece would take words of two blocks of 2**32
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
    if isinstance(fmt, BlockFormat):
        return _quantize_blocks(x, fmt, rounding, overflow, key, dim, out)
    if x.dtype == torch.float64:
        return _quantize_float64(x, fmt, rounding, overflow, key, first, out)
    mode, address, _ = _parameters(fmt, rounding)
    infinity = overflow is Overflow.INFINITY
    result = torch.empty_like(x) if out is None else out
    if x.is_contiguous() and result.is_contiguous():
        _flat(compiled.flat(mode, infinity), x, result, key, first, address)
    elif x.stride() != result.stride() or not _is_dense(x):
        contiguous = x.clone(memory_format=torch.contiguous_format)  # never x itself
        _flat(compiled.flat(mode, infinity), contiguous, contiguous, key, first, address)
        result.copy_(contiguous)
    elif key is None:  # where an element lies is all the same
        memory = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in (x, result)]
        _flat(compiled.flat(mode, infinity), *memory, key, first, address)
    elif _is_of_images(x) and x.dtype == torch.float32 and first + x.numel() <= 2**32:
        _channels_last(compiled.channels_last(mode, infinity), x, result, key, first, address)
    else:
        contiguous = x.clone(memory_format=torch.contiguous_format)  # never x itself
        _flat(compiled.flat(mode, infinity), contiguous, contiguous, key, first, address)
        result.copy_(contiguous)
    return result


def _is_of_images(x: Tensor) -> bool:
    """Whether it lies pixel by pixel."""
    return x.ndim in (4, 5) and x.movedim(1, -1).is_contiguous()


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill a piece of memory, in whatever order."""
    place = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != place:
            return False
        place *= size
    return True


def _flat(kernel: CFunc, x: Tensor, result: Tensor, key: Key | None, first: int, address: int) -> None:
    count, words = x.numel(), _key(key)
    if x.dtype == torch.float32:
        _run(kernel, count, PIECE, x.data_ptr(), result.data_ptr(), words, address, count, first, PIECE)
        return
    flat, rounded = x.view(-1), result.view(-1)
    for start in range(0, count, _HALVES):
        piece = flat[start : start + _HALVES].float()
        place, size = piece.data_ptr(), len(piece)
        _run(kernel, size, PIECE, place, place, words, address, size, first + start, PIECE)
        rounded[start : start + _HALVES].copy_(piece)


def _channels_last(kernel: CFunc, x: Tensor, result: Tensor, key: Key, first: int, address: int) -> None:
    images, channels = x.shape[:2]
    pixels = x[0, 0].numel()
    table, unit = _table(channels, pixels)
    units = images * -(-pixels // unit)
    many = max(1, PIECE // (unit * channels))
    places = x.data_ptr(), result.data_ptr(), _key(key), address
    _run(kernel, units, many, *places, units, many, channels, pixels, table.ctypes.data, first)


@lru_cache(maxsize=256)
def _table(channels: int, pixels: int) -> tuple[np.ndarray, int]:
    """compiled.channels_last's table, and how many pixels its units have."""
    places = np.arange(compiled.GROUP, dtype=np.uint64)
    table = (places // channels + places % channels * pixels).astype(np.uint32)
    return table, max(1, compiled.GROUP // channels)


def _quantize_float64(
    x: Tensor,
    fmt: Format,
    rounding: Rounding | FewBits,
    overflow: Overflow,
    key: Key | None,
    first: int,
    out: Tensor | None,
) -> Tensor:
    mode, address, _ = _wide_parameters(fmt, rounding)
    source, count = x.contiguous(), x.numel()
    rounded = torch.empty_like(source)
    places = source.data_ptr(), rounded.data_ptr(), _key(key), address
    _run(wide.flat(mode, overflow is Overflow.INFINITY), count, PIECE, *places, count, first, PIECE)
    if out is None:
        out = rounded if x.is_contiguous() else torch.empty_like(x)
    return out if out is rounded else out.copy_(rounded)


def _quantize_blocks(
    x: Tensor,
    fmt: BlockFormat,
    rounding: Rounding | FewBits,
    overflow: Overflow,
    key: Key | None,
    dim: int,
    out: Tensor | None,
) -> Tensor:
    rows = blocks.rows(x, fmt, dim)
    first = key.first_element(len(x), rows.numel()) if key and key.first_row else 0
    if x.dtype == torch.float64 or first + rows.numel() > 2**32:
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
    rows, largest = rows.float(), torch.finfo(x.dtype).max
    rounded = torch.empty_like(rows)
    count, length = rows.shape
    places, many = (rows.data_ptr(), rounded.data_ptr(), _key(key)), max(1, PIECE // max(1, length))
    if fmt.scale is not None:
        mode, address, _ = _wide_parameters(fmt.element, rounding)
        maxima = _maxima(rows, largest)
        tensor = blocks.tensor_scale(float(maxima.amax()), fmt, largest)
        numbers = blocks.counted(largest), fmt.element.largest, tensor, fmt.scale.largest, fmt.scale.smallest_subnormal
        exponent = math.frexp(fmt.scale.smallest_normal)[1] - 1
        more = maxima.data_ptr(), *map(bits64, numbers), exponent, fmt.scale.mantissa_bits, first
        left = _run(wide.scaled(mode), count, many, *places, address, count, many, length, *more)
    elif count == 1 and length > _ALONE:  # threads share the block, whose scale is known before
        mode, _, values = _parameters(fmt.element, rounding)
        whole = length - length % PIECE
        pieces = _maxima(rows[:, :whole].view(-1, PIECE), largest), _maxima(rows[:, whole:], largest)
        values = _of_block(values, bits(float(torch.cat(pieces).amax())))
        left = values is None
        if not left:
            _run(compiled.flat(mode, False), length, PIECE, *places, values.ctypes.data, length, first, PIECE)
    else:
        mode, address, _ = _parameters(fmt.element, rounding, x.dtype)
        left = _run(compiled.blocks(mode), count, many, *places, address, count, many, length, first)
    if left:
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
    result = blocks.restore(rounded.to(x.dtype), x, fmt, dim)
    return result if out is None else out.copy_(result)


def _maxima(rows: Tensor, largest: float) -> Tensor:
    """blocks.maxima of float32 numbers: (blocks,)."""
    count, length = rows.shape
    maxima, many = torch.empty(count), max(1, PIECE // max(1, length))
    _run(wide.maxima(), count, many, rows.data_ptr(), maxima.data_ptr(), 0, 0, count, many, length, bits(largest))
    return maxima


def _of_block(values: np.ndarray, amax: int) -> np.ndarray | None:
    """As compiled.blocks does for each block: compiled.PARAMETERS of its numbers, by the bits of its largest magnitude.

    None where that is left to another engine.
    """
    of = dict(zip(compiled.PARAMETERS, map(int, values), strict=True))
    exponent = (amax or bits(1.0)) >> 23
    lowest_level = exponent - of["exponents"]
    if lowest_level + of["always"] < 31:
        return None
    largest = of["largest"] + ((exponent - (of["largest"] >> 23)) << 23)
    of |= {"lowest_level": lowest_level, "largest": largest, "lowest": largest, "composed": 0, "fast_from": 0}
    if of["signed_zero"] and of["mantissa"]:
        of["fast_from"] = (lowest_level + 1) << 23
    of["deep_below"] = (lowest_level + of["always"] - 29) << 23
    return np.array([of[name] for name in compiled.PARAMETERS], dtype=np.uint32)


@lru_cache(maxsize=1024)
def _parameters(
    fmt: Format, rounding: Rounding | FewBits, dtype: torch.dtype = torch.float32
) -> tuple[int, int, np.ndarray]:
    """The kernel's mode, the address of compiled.PARAMETERS, and the array that must live as long."""
    values = parameters(fmt, rounding) | {"type_largest": bits(torch.finfo(dtype).max)}
    array = np.array([values[name] % 2**32 for name in compiled.PARAMETERS], dtype=np.uint32)
    return values["mode"], array.ctypes.data, array


@lru_cache(maxsize=1024)
def _wide_parameters(fmt: Format, rounding: Rounding | FewBits) -> tuple[int, int, np.ndarray]:
    """As `_parameters`, of wide.PARAMETERS."""
    values = wide_parameters(fmt, rounding)
    array = np.array([values[name] for name in wide.PARAMETERS], dtype=np.int64)
    return values["mode"], array.ctypes.data, array


def _key(key: Key | None) -> int:
    value = 0 if key is None else key.value
    return value - 2**64 if value >= 2**63 else value  # as int64, which is what kernels take


def _run(kernel: CFunc, count: int, size: int, source: int, target: int, key: int, address: int, *more: int) -> int:
    """Has `count` things done, `size` of them a piece, by torch's threads; returns the task's second field."""
    pieces = -(-count // size)
    task = array("q", (0, 0, pieces, source, target, key, address, *more))
    place = task.buffer_info()[0]
    threads = min(torch.get_num_threads(), pieces) if pieces * PIECE > _ALONE else 1
    if threads < 2:
        kernel.ctypes(place)
    elif _gomp_parallel:
        _gomp_parallel(kernel.address, place, threads, 0)
    else:
        _in_pool(kernel, place, threads)
    return task[1]


def _find_gomp_parallel() -> Any | None:
    """What compilers call for `#pragma omp parallel` (GNU libgomp's ABI, which LLVM's library has on Linux too)."""
    try:
        openmp = ctypes.CDLL(None)  # torch brings its own library along, and shows it to all
        found, pause = openmp.GOMP_parallel, openmp.omp_pause_resource_all
    except (AttributeError, OSError, TypeError):  # another system's, another OpenMP
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    # A child process would wait for its parent's threads for ever, in torch's operations too. So they end at a fork.
    os.register_at_fork(before=lambda: pause(_HARD))
    return found


_HARD = 2  # omp_pause_hard
_gomp_parallel = _find_gomp_parallel()
_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # of this process, for so many threads


def _in_pool(kernel: CFunc, place: int, threads: int) -> None:
    """For systems without GNU OpenMP. Not numba's threads: those crash when two threads of Python use them."""
    global _pool
    process = os.getpid()
    if _pool is None or _pool[0] != process or _pool[1] < threads:
        _pool = (process, threads, ThreadPoolExecutor(threads - 1, "quantize"))
    others = [_pool[2].submit(kernel.ctypes, place) for _ in range(threads - 1)]
    kernel.ctypes(place)
    wait(others)  # before the memory that they write to may go
