"""The fused engine: one pass over memory on all cores, bit for bit what kernels/eager.py gives.

The loops are in kernels/compiled.py. As many threads as torch has take pieces of the tensor in turn.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from formats import BlockFormat, FewBits, Format, Overflow, Rounding
from kernels import blocks, compiled, eager
from kernels.noise import Key
from kernels.parameters import bits, parameters

PIECE = 2**17  # elements that a thread takes at a time; a smaller tensor is done by the calling thread alone
_HALF_PIECE = 2**14  # of a float16 or bfloat16 tensor, converted in the cache


def quantize(
    x: Tensor,
    fmt: Format | BlockFormat,
    rounding: Rounding | FewBits,
    overflow: Overflow,
    key: Key | None,
    dim: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Round `x` of any shape and strides, on the CPU; see quant.quantize. float64 and nvfp4 are left to eager."""
    if isinstance(fmt, BlockFormat):
        return _quantize_blocks(x, fmt, rounding, overflow, key, dim, out)
    if x.dtype == torch.float64 or (key is not None and x.numel() > 2**32 and not x.is_contiguous()):
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
    mode, address, _ = _parameters(fmt, rounding)
    infinity = overflow is Overflow.INFINITY
    result = torch.empty_like(x) if out is None else out
    if x.is_contiguous() and result.is_contiguous():
        _flat(compiled.flat(mode, infinity), x, result, key, address)
    elif x.stride() != result.stride() or not _is_dense(x):
        contiguous = x.clone(memory_format=torch.contiguous_format)  # never x itself
        _flat(compiled.flat(mode, infinity), contiguous, contiguous, key, address)
        result.copy_(contiguous)
    elif key is None:  # where an element lies is all the same
        memory = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in (x, result)]
        _flat(compiled.flat(mode, infinity), *memory, key, address)
    elif x.dtype == torch.float32 and x.ndim in (4, 5) and x.movedim(1, -1).is_contiguous():
        _channels_last(compiled.channels_last(mode, infinity), x, result, key, address)
    else:
        contiguous = x.clone(memory_format=torch.contiguous_format)  # never x itself
        _flat(compiled.flat(mode, infinity), contiguous, contiguous, key, address)
        result.copy_(contiguous)
    return result


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill a piece of memory, in whatever order."""
    place = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != place:
            return False
        place *= size
    return True


def _flat(kernel: Callable, x: Tensor, result: Tensor, key: Key | None, address: int) -> None:
    count, source, target = x.numel(), x.data_ptr(), result.data_ptr()
    if x.dtype != torch.float32:
        flat, rounded = x.view(-1), result.view(-1)

        def convert(start: int) -> None:
            piece = flat[start : start + _HALF_PIECE].float()
            kernel(piece.data_ptr(), piece.data_ptr(), len(piece), start % 2**32, *_key(key, start), address)
            rounded[start : start + _HALF_PIECE].copy_(piece)

        _share(convert, range(0, count, _HALF_PIECE))
    elif count <= PIECE:
        kernel(source, target, count, 0, *_key(key), address)
    else:

        def piece(start: int) -> None:
            size = min(PIECE, count - start)
            kernel(source + 4 * start, target + 4 * start, size, start % 2**32, *_key(key, start), address)

        _share(piece, range(0, count, PIECE))


def _channels_last(kernel: Callable, x: Tensor, result: Tensor, key: Key, address: int) -> None:
    images, channels = x.shape[:2]
    pixels = x[0, 0].numel() if images and channels else 0
    if not pixels:
        return
    table, unit = _table(channels, pixels)
    units = images * -(-pixels // unit)
    many = max(1, PIECE // (unit * channels))
    source, target, words = x.data_ptr(), result.data_ptr(), _key(key)

    def piece(first: int) -> None:
        last = min(first + many, units)
        kernel(source, target, first, last, channels, pixels, table.ctypes.data, *words, address)

    _share(piece, range(0, units, many))


@lru_cache(maxsize=256)
def _table(channels: int, pixels: int) -> tuple[np.ndarray, int]:
    """compiled.channels_last's table, and how many pixels its units have."""
    places = np.arange(compiled.GROUP, dtype=np.uint64)
    table = (places // channels + places % channels * pixels).astype(np.uint32)
    return table, max(1, compiled.GROUP // channels)


def _quantize_blocks(
    x: Tensor,
    fmt: BlockFormat,
    rounding: Rounding | FewBits,
    overflow: Overflow,
    key: Key | None,
    dim: int,
    out: Tensor | None,
) -> Tensor:
    if x.dtype == torch.float64 or fmt.scale is not None:
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
    mode, address, _ = _parameters(fmt.element, rounding, x.dtype)
    rows = blocks.rows(x, fmt, dim).float()
    rounded = torch.empty_like(rows)
    count, length = rows.shape
    kernel, source, target = compiled.blocks(mode), rows.data_ptr(), rounded.data_ptr()
    words = _key(key)
    left = []
    if rows.numel() > 2**32:
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
    many = max(1, PIECE // max(1, length))

    def piece(first: int) -> None:
        if kernel(source, target, first, min(first + many, count), length, *words, address):
            left.append(first)

    _share(piece, range(0, count, many))
    if left:
        return eager.quantize(x, fmt, rounding, overflow, key, dim, out)
    result = blocks.restore(rounded.to(x.dtype), x, fmt, dim)
    return result if out is None else out.copy_(result)


@lru_cache(maxsize=1024)
def _parameters(
    fmt: Format, rounding: Rounding | FewBits, dtype: torch.dtype = torch.float32
) -> tuple[int, int, np.ndarray]:
    """The kernel's mode, the address of compiled.PARAMETERS, and the array that must live as long."""
    values = parameters(fmt, rounding) | {"type_largest": bits(torch.finfo(dtype).max)}
    array = np.array([values[name] % 2**32 for name in compiled.PARAMETERS], dtype=np.uint32)
    return values["mode"], array.ctypes.data, array


def _key(key: Key | None, start: int = 0) -> tuple[int, int]:
    """The kernels' key and block of 2**32 elements, for elements from `start` on."""
    value = 0 if key is None else key.value
    return value - 2**64 if value >= 2**63 else value, start >> 32  # as int64, which is what they take


# The threads. Not numba's own: those crash when two threads of Python use them, or after a fork.
_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # of this process, for so many threads


def _share(work: Callable[[int], None], starts: range) -> None:
    """Calls work(start) for each of `starts`, on as many threads as torch.get_num_threads(); raises what it raises."""
    threads = min(torch.get_num_threads(), len(starts))
    if threads < 2:
        for start in starts:
            work(start)
        return
    global _pool
    process = os.getpid()
    if _pool is None or _pool[0] != process or _pool[1] < threads:
        _pool = (process, threads, ThreadPoolExecutor(threads - 1, "quantize"))
    turn = itertools.count()

    def take() -> None:
        while (number := next(turn)) < len(starts):
            work(starts[number])

    others = [_pool[2].submit(take) for _ in range(threads - 1)]
    try:
        take()
    finally:
        wait(others)  # before the memory that they write to may go
    for other in others:
        other.result()
