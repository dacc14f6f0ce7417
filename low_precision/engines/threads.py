"""Which threads run a kernel of the fused engine: torch's own, where it has them from GNU OpenMP, as on Linux.

They wait for work when an operation of torch ends, and take pieces of a task in turn.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from numba.core.ccallback import CFunc

from low_precision.engines.tasks import Task

PIECE = 2**15  # elements that a thread takes at a time
ALONE = 2**16  # up to so many elements, the calling thread does the work alone


def run(kernel: CFunc, task: Task) -> None:
    """Has the task done by torch's threads. The caller holds what the task names by address."""
    address, pieces = ctypes.addressof(task), -(-task.count // task.piece)
    threads = min(torch.get_num_threads(), pieces) if pieces * PIECE > ALONE else 1
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
