"""Which engine rounds a tensor. Another engine is a file in this folder with `quantize`, and a name here.

All but qtorch give the same bits, so nothing but the time depends on the choice.
"""

from __future__ import annotations

import functools
import importlib
import time
import warnings
from types import ModuleType

import torch
from torch import Tensor

from low_precision.errors import SettingError, nearest
from low_precision.formats import FLOAT32, AnyFormat, BlockFormat
from low_precision.noise import Key
from low_precision.rounding import AnyRounding, Overflow

ENGINES = ("eager", "fused", "qtorch")  # those to choose; CUDA's is chosen by the device

# "auto" on the CPU: loading the fused engine takes about a second, in which it may compile more than one loop, and then
# pays for itself. So it is loaded once the eager engine has taken that long: never more than twice the best choice.
LOAD_SECONDS = 1.0
_spent = 0.0  # seconds in the eager engine, under "auto"


def check(backend: str) -> None:
    """SettingError for a name that is not allowed."""
    if backend != "auto" and backend not in ENGINES:
        raise SettingError("backend", repr(backend), f"auto, {', '.join(ENGINES)}", nearest(backend, ENGINES))


def quantize(
    x: Tensor,
    format: AnyFormat,
    rounding: AnyRounding,
    overflow: Overflow,
    key: Key | None,
    dim: int,
    out: Tensor | None,
    backend: str,
) -> Tensor:
    """tensor.quantize, its arguments checked, but for `backend`."""
    check(backend)
    if x.numel() == 0 or (format == FLOAT32 and x.dtype != torch.float64):
        return x.clone() if out is None else out.copy_(x)
    if backend == "qtorch":
        from low_precision.engines import qtorch

        result = qtorch.quantize(x.float(), format, rounding, overflow).to(x.dtype)
        return result if out is None else out.copy_(result)
    global _spent
    timed = False
    if x.device.type == "cuda" and backend != "eager":
        engine = _or_eager("cuda")
    elif x.device.type != "cpu" or backend == "eager":
        engine = _load("eager")
    elif backend == "fused":
        engine = _load("fused")
    elif _spent >= LOAD_SECONDS:
        engine = _or_eager("fused")
    else:
        engine, timed = _load("eager"), True
    start = time.perf_counter()
    rounded: Tensor = engine.quantize(x, format, rounding, overflow, key, dim, out)
    if timed:
        _spent += time.perf_counter() - start
    return rounded


def in_use(backend: str, device: torch.device) -> str:
    """The name of the engine that rounds now, for the record."""
    if backend != "auto":
        return backend
    if device.type == "cuda":
        engine = _or_eager("cuda")
    elif _spent >= LOAD_SECONDS:
        engine = _or_eager("fused")
    else:
        return "eager"
    return engine.__name__.rpartition(".")[2]


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


@functools.cache
def _or_eager(name: str) -> ModuleType:
    """That engine, or with a warning, once, the eager one where it does not load."""
    try:
        return _load(name)
    except Exception as error:  # an incomplete or broken installation can raise anything
        told = f"low_precision.engines.{name} does not load ({error}); rounding with the slower eager engine"
        warnings.warn(told, stacklevel=2)
        return _load("eager")


@functools.cache
def holds(dtype: torch.dtype, format: AnyFormat) -> bool:
    """Whether numbers of that floating-point type become numbers of the same type when they are rounded to `format`.

    A value of the type lies on the format's grid, or its neighbours there have no more digits than itself. So what
    matters is the largest value, in a block as large as its scale: it must be one of the type's, or out of its reach.
    """
    if dtype in (torch.float32, torch.float64):
        return True
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    limits = torch.finfo(dtype)
    if isinstance(format, BlockFormat):
        return format.scale is None or dtype == torch.bfloat16  # a scale of NVFP4 may be larger than its block's needs
    if format.largest > limits.max:
        return bool(2.0**-format.mantissa_bits <= limits.eps)
    return all(float(torch.tensor(value).to(dtype)) == value for value in (format.largest, format.lowest))
