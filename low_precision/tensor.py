"""Rounding one tensor: `quantize`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from low_precision.engines import choice
from low_precision.errors import SettingError
from low_precision.formats import AnyFormat, BlockFormat, format_named
from low_precision.noise import Key
from low_precision.rounding import AnyRounding, Overflow, Rounding, is_random, rounding_named
from low_precision.rules import Spec, rule_of
from low_precision.torch_private import untraced


@untraced  # torch.compile would compile anew for each key, and cannot trace every engine
def quantize(
    x: Tensor,
    format: AnyFormat | str,
    rounding: AnyRounding | str = Rounding.NEAREST,
    key: Key | int | None = None,
    *,
    dim: int = -1,
    backward: Spec | None = None,
    overflow: Overflow | str = Overflow.SATURATE,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Round every element of `x` to a neighbouring value of `format`: a new tensor, same shape, dtype and device.

    x: float32 or float64, any shape and strides; float16 or bfloat16 where that type holds what comes out. Rounded
    once, from the value it holds. The memory format stays, e.g. channels_last.
    rounding: see `Rounding` and `FewBits`. Random ones take their bits from `key` and an element's row-major index
    alone; in a `BlockFormat`, from its place in the row-major order of blocks. The same key gives the same bits each
    time, so whoever rounds repeatedly needs another key for each time. dim: along which a BlockFormat's blocks run.
    out: a tensor of x's shape and dtype for the result, x itself for rounding in place; no gradients then.
    Special values: NaN stays NaN; beyond `format.largest`, see `Overflow`; the sign stays, of zeros too where the
    format has a negative zero; in float32 nothing is rounded (but float64 is). Gradients pass straight through (Bengio
    et al. 2013), rounded on the way where `backward` says how: a format or "FORMAT[:ROUNDING]", with the noise of a key
    of their own.
    Raises TypeError for other dtypes, IndexError for a `dim` that x has not, ValueError for unknown names, a missing
    key, an infinity that is not there, another shape of `out`.
    Source: IEEE 754-2019, 4.3 and 7.4; Croci et al. 2022, definition 1.
    """
    format = format_named(format) if isinstance(format, str) else format
    rounding = rounding_named(rounding) if isinstance(rounding, str) else rounding
    overflow = Overflow(overflow)
    key = key if key is None or isinstance(key, Key) else Key(key)
    if is_random(rounding):
        if key is None:
            raise ValueError("stochastic rounding needs a key: a whole number below 2**64, or a Key")
    else:
        key = None
    if overflow is Overflow.INFINITY and not format.has_infinity:
        raise SettingError("overflow", "infinity", f"saturate ({format.name} has no infinity)")
    if not isinstance(x, Tensor) or not choice.holds(x.dtype, format):
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"quantize to {format.name}: given {what}, allowed: a torch.float32 tensor (use x.float())")
    if isinstance(format, BlockFormat) and not -max(x.ndim, 1) <= dim < max(x.ndim, 1):
        raise IndexError(f"dim: given {dim}, allowed: {-x.ndim} .. {x.ndim - 1}")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise ValueError(f"out: given {out.dtype} {tuple(out.shape)}, allowed: {x.dtype} {tuple(x.shape)}, as x")
    round_gradient = _backward(backward, rounding, key, dim, overflow, backend) if backward else None
    if out is None and x.requires_grad and torch.is_grad_enabled():
        round_value = partial(
            quantize, format=format, rounding=rounding, key=key, dim=dim, overflow=overflow, backend=backend
        )
        return Round.apply(x, round_value, round_gradient)  # type: ignore[no-any-return, no-untyped-call]
    if out is not None and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # not every engine writes by an operation of torch
    return choice.quantize(x.detach(), format, rounding, overflow, key, dim, out, backend)


def _backward(
    spec: Spec, rounding: AnyRounding, key: Key | None, dim: int, overflow: Overflow, backend: str
) -> Callable[[Tensor], Tensor]:
    """What rounds the gradient of one call of `quantize`."""
    rule = rule_of(spec, rounding)
    if is_random(rule.rounding) and key is None:
        raise ValueError("stochastic rounding of the gradient needs a key: a whole number below 2**64, or a Key")
    if overflow is Overflow.INFINITY and not rule.format.has_infinity:
        raise SettingError("overflow", "infinity", f"saturate (backward: {rule.format} has no infinity)")
    key_back = key and Key.of(key.value, "backward")
    return partial(
        quantize, format=rule.format, rounding=rule.rounding, key=key_back, dim=dim, overflow=overflow, backend=backend
    )


class Round(torch.autograd.Function):
    """Rounds a tensor on the way forward and its gradient on the way back; None leaves that way alone."""

    @staticmethod
    def forward(
        x: Tensor, round_value: Callable[[Tensor], Tensor] | None, round_gradient: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        # .data, because an engine's result may be a view, and autograd would refuse an in-place ReLU on a view.
        return round_value(x).data if round_value else x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.round_gradient = inputs[2]

    @staticmethod
    @untraced
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.round_gradient(gradient) if ctx.round_gradient else gradient), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, round_value: Any, round_gradient: Any
    ) -> tuple[Tensor, Any]:
        # Rounding goes element by element, whichever dimension the batch is.
        return Round.apply(x, round_value, round_gradient), in_dims[0]  # type: ignore[no-untyped-call]


# torch asks for the signature at each call, and inspect would make it anew from the function each time.
Round.forward.__signature__ = inspect.signature(Round.forward)  # type: ignore[attr-defined]
