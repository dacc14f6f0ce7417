"""Which engine rounds a tensor. Another engine is a file in this folder with `quantize`, and a name here.

All but qtorch give the same bits, so nothing but the time depends on the choice.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import time
import warnings
from types import ModuleType

import torch
from torch import Tensor

from low_precision.engines.tasks import CannotCompile, because
from low_precision.errors import SettingError, nearest, shown
from low_precision.formats import FLOAT32, AnyFormat, BlockFormat, Format
from low_precision.noise import Key
from low_precision.rounding import AnyRounding, Overflow
from low_precision.tables import Table

ENGINES = ("eager", "fused", "qtorch")  # those to choose; CUDA's is chosen by the device

# "auto" on the CPU: loading the fused engine takes about a second, in which it may compile more than one loop, and then
# pays for itself. So it is loaded once the eager engine has taken that long: never more than twice the best choice.
LOAD_SECONDS = 1.0
_spent = 0.0  # seconds in the eager engine, under "auto"


def check(backend: str) -> None:
    """SettingError for a name that is not allowed."""
    if backend != "auto" and backend not in ENGINES:
        raise SettingError("backend", shown(backend, repr), f"auto, {', '.join(ENGINES)}", nearest(backend, ENGINES))


def quantize(
    x: Tensor,
    format: AnyFormat,
    rounding: AnyRounding,
    overflow: Overflow,
    key: Key | None,
    dim: int,
    out: Tensor | None,
    backend: str,
    scale: Tensor | None = None,
) -> Tensor:
    """tensor.quantize of plain tensors (door.is_plain), its arguments checked, but for `backend`."""
    check(backend)
    if out is not None and not (torch.is_inference_mode_enabled() and out.is_inference()):
        torch.autograd.graph.increment_version(out)  # not every engine writes by an operation of torch
    if x.numel() == 0 or (format == FLOAT32 and x.dtype != torch.float64):
        result = x.clone()
        return result if out is None else out.copy_(result)
    if x.itemsize == 2:
        format = _within(format, x.dtype)
    if backend == "qtorch":
        from low_precision.engines import qtorch

        result = qtorch.quantize(x.float(), format, rounding, overflow).to(x.dtype)
        return result if out is None else out.copy_(result)
    global _spent
    timed = False
    expands = isinstance(format, BlockFormat) and format.scaling.kind == "expand"  # powers, which no other engine has
    if x.device.type == "cuda" and backend != "eager" and not expands:
        engine = _or_eager("cuda")
    elif x.device.type != "cpu" or backend == "eager" or expands:
        engine = _load("eager")
    elif backend == "fused":
        engine = _load("fused")
    elif _spent >= LOAD_SECONDS:
        engine = _or_eager("fused")
    else:
        engine, timed = _load("eager"), True
    flushes = not _SMALLEST * _ONE
    if flushes:  # a part of what engines compute with may be subnormal
        torch.set_flush_denormal(False)
    start = time.perf_counter() if timed else 0.0
    try:
        rounded: Tensor = engine.quantize(x, format, rounding, overflow, key, dim, out, scale)
    except CannotCompile as error:
        if backend == "fused" and x.device.type == "cpu":
            raise
        rounded = _give_up(engine, error).quantize(x, format, rounding, overflow, key, dim, out, scale)
    finally:
        if flushes:
            torch.set_flush_denormal(True)
    if timed:
        _spent += time.perf_counter() - start
    return rounded


_SMALLEST, _ONE = 5e-324, 1.0  # their product is 0 where torch.set_flush_denormal(True) is in force


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


def loops(backend: str) -> ModuleType | None:
    """engines/rotation.py, where the fused engine computes what is on the CPU by now."""
    if backend != "fused" and in_use(backend, torch.device("cpu")) != "fused":
        return None
    try:
        return _load("rotation")
    except CannotCompile:
        if backend == "fused":
            raise
        return None


@functools.cache
def _load(name: str) -> ModuleType:
    """That engine. CannotCompile where it does not load."""
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except Exception as error:  # an incomplete or broken installation can raise anything
        raise CannotCompile(name, because(error)) from error


_stand_ins: dict[str, ModuleType] = {}  # what rounds in place of an engine, by its name: itself, or the eager one


def _or_eager(name: str) -> ModuleType:
    """That engine, or with a warning, once, the eager one where it does not load."""
    if name not in _stand_ins:
        try:
            _stand_ins[name] = _load(name)
        except CannotCompile as error:
            _warn(name, error)
            _stand_ins[name] = _load("eager")
    return _stand_ins[name]


def _give_up(engine: ModuleType, error: CannotCompile) -> ModuleType:
    """The eager engine, from now on in place of this one, which loaded and then could not compile what it needs."""
    name = engine.__name__.rpartition(".")[2]
    _warn(name, error)
    _stand_ins[name] = _load("eager")
    return _stand_ins[name]


def _warn(name: str, error: CannotCompile) -> None:
    text = f"low_precision: the engine {name} cannot be used ({error.reason}); rounding with the slower eager engine"
    warnings.warn(text, stacklevel=2)


@functools.cache
def _within(format: AnyFormat, dtype: torch.dtype) -> AnyFormat:
    """The format without the values that numbers of that type do not reach: to where infinities saturate.

    A block's scale follows the type anyway; see blocks.narrowed.
    """
    if not isinstance(format, Format) or format.largest <= torch.finfo(dtype).max:
        return format
    return dataclasses.replace(format, largest=torch.finfo(dtype).max, twos_complement=False)


@functools.cache
def holds(dtype: torch.dtype, format: AnyFormat) -> bool:
    """Whether numbers of that floating-point type become numbers of the same type when they are rounded to `format`.

    float32 holds every format but those whose values are float64 numbers alone. A value of a narrower type lies on the
    format's grid, or its neighbours there have no more digits than itself. So what matters is the largest value, in a
    block as large as its scale: it must be one of the type's, or out of its reach.
    """
    if dtype == torch.float64:
        return True
    if isinstance(format, Format) and not format.fits_float32:
        return False
    if dtype == torch.float32:
        return True
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    limits = torch.finfo(dtype)
    if isinstance(format, Table):
        return all(abs(value) <= limits.max and _is_number(value, limits) for value in format.values)
    if isinstance(format, BlockFormat):
        return format.scaling.is_power or format.scaling.kind in ("pow2", "quest")  # with powers of two as scales
    if format.largest > limits.max:
        return bool(2.0**-format.mantissa_bits <= limits.eps)
    return all(_is_number(value, limits) for value in (format.largest, format.lowest))


def _is_number(value: float, limits: torch.finfo) -> bool:
    """Whether it is one of the type's, not above its largest. Without tensors, which may be those of a torch mode."""
    spacing = max(2.0 ** (math.frexp(value)[1] - 1), limits.tiny) * limits.eps
    return value % spacing == 0
