"""Rounding one tensor: `quantize`."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from low_precision import torch_private
from low_precision.engines import choice, door
from low_precision.errors import SettingError, wrong_type
from low_precision.formats import AnyFormat, BlockFormat, Format, format_named
from low_precision.noise import Key
from low_precision.rounding import (
    AnyRounding,
    Overflow,
    Rounding,
    is_random,
    overflow_named,
    rounding_named,
)
from low_precision.rules import Spec, check_overflow, rule_of
from low_precision.scales import DELAYED
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
    scale: Tensor | None = None,
) -> Tensor:
    """Round every element of `x` to a neighbouring value of `format`: a new tensor, same shape, dtype and device.

    x: float32 or float64, any shape and strides; float16 or bfloat16 where that type holds what comes out. Rounded
    once, from the value it holds. The memory format stays, e.g. channels_last. A subclass of Tensor is rounded by its
    own functions; a meta or fake tensor gives one without numbers.
    rounding: see `Rounding` and `FewBits`. Random ones take their bits from `key` and an element's row-major index
    alone; in a `BlockFormat`, from its place in the row-major order of blocks. The same key gives the same bits each
    time, so whoever rounds repeatedly needs another key for each time. dim: along which a BlockFormat's blocks run.
    out: a tensor of x's shape and dtype for the result, x itself for rounding in place; no gradients then. scale: of a
    format with a delayed scale, a float32 tensor () > 0: what numbers are multiplied by before they are rounded.
    Special values: NaN stays NaN. Beyond `format.largest` see `Overflow`; where x's type does not reach that, the
    type's own largest value stands for it. The sign stays, of zeros too where the format has a negative zero. In
    float32 nothing is rounded (but float64 is). Gradients pass straight through (Bengio et al. 2013), rounded on the
    way where `backward` says how: a format or "FORMAT[:ROUNDING]", with the noise of a key of their own.
    torch.func.vmap: each sample is rounded as it would be alone, with the same noise.
    Raises TypeError for other dtypes, and for tensors that are sparse, nested, without a shape, or of a class with a
    __torch_dispatch__ of its own, as DTensor; IndexError for a `dim` that x has not; ValueError for unknown names, a
    missing key, an infinity that is not there, freed memory, an `out` of another shape or that cannot be written to;
    RuntimeError in torch.jit.trace, make_fx and torch.func.functionalize. torch.compile does not trace it (a graph
    break).
    Source: IEEE 754-2019, 4.3 and 7.4; Croci et al. 2022, definition 1.
    """
    format = format if type(format) is Format else format_named(format)
    rounding = rounding if type(rounding) is Rounding else rounding_named(rounding)
    overflow = overflow if type(overflow) is Overflow else overflow_named(overflow)
    key_of_both = key if key is None or isinstance(key, Key) else Key(key)
    key = key_of_both if is_random(rounding) else None
    if key is None and is_random(rounding):
        raise ValueError("stochastic rounding needs a key: a whole number below 2**64, or a Key")
    if overflow is Overflow.INFINITY:
        check_overflow(overflow, format)
    is_open = door.is_open(x, out)
    if not is_open:
        door.check(x, out)
    if not choice.holds(x.dtype, format):
        wider = "float32 tensor (use x.float())" if choice.holds(torch.float32, format) else "float64 tensor"
        raise TypeError(f"quantize to {format.name}: given {x.dtype}, allowed: a torch.{wider}")
    if isinstance(format, BlockFormat):
        _check_dim(dim, x.ndim)
    _check_scale(scale, format)
    if out is not None:
        door.check_target(x, out)
    round_gradient = _backward(backward, rounding, key_of_both, dim, overflow, backend) if backward else None
    is_plain = is_open and not (out is None and x.requires_grad and torch.is_grad_enabled())
    if is_plain:
        x = x.detach() if x.requires_grad else x
        return choice.quantize(x, format, rounding, overflow, key, dim, out, backend, scale)
    round_value = partial(
        quantize, format=format, rounding=rounding, key=key, dim=dim, overflow=overflow, backend=backend, scale=scale
    )
    if is_open:
        return Round.apply(x, round_value, round_gradient)  # type: ignore[no-any-return, no-untyped-call]
    return _quantize_other(x, out, round_value, round_gradient)


def _check_dim(dim: int, dimensions: int) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise wrong_type("dim", dim, "a whole number")
    if not -max(dimensions, 1) <= dim < max(dimensions, 1):
        raise IndexError(f"dim: given {dim}, allowed: {-dimensions} .. {dimensions - 1}")


def _check_scale(scale: Tensor | None, format: AnyFormat) -> None:
    if scale is not None and not isinstance(scale, Tensor):
        raise wrong_type("scale", scale, "a float32 tensor ()")
    is_delayed = isinstance(format, BlockFormat) and format.scaling.kind == DELAYED
    if is_delayed and scale is None:
        allowed = "a format whose scale follows from the tensor alone; a delayed scale has a model and its optimizer"
        raise SettingError("format", format.name, allowed)
    if scale is not None and not (is_delayed and scale.ndim == 0 and scale.dtype == torch.float32):
        raise SettingError("scale", str(tuple(scale.shape)), "a float32 tensor () for a format with a delayed scale")


_Rounds = Callable[[Tensor], Tensor]


def _quantize_other(
    x: Tensor, out: Tensor | None, round_value: partial[Tensor], round_gradient: _Rounds | None
) -> Tensor:
    """Rounds what is not plain memory, or while somebody watches the operations of torch. round_value: `quantize`."""
    choice.check(round_value.keywords["backend"])
    if not torch_private.transforms_are_active():
        return _quantize_untransformed(x, out, round_value, round_gradient)
    if not any(torch_private.is_of_a_transform(tensor) for tensor in (x, out) if tensor is not None):
        with torch_private.without_transforms():  # which do not concern these tensors
            return _quantize_untransformed(x, out, round_value, round_gradient)
    if torch_private.functionalizes():
        raise RuntimeError("quantize: given a call under torch.func.functionalize, allowed: the other transforms")
    rounded = Round.apply(x, round_value, round_gradient)  # type: ignore[no-untyped-call]
    return rounded if out is None else door.written(out, rounded)


def _quantize_untransformed(
    x: Tensor, out: Tensor | None, round_value: partial[Tensor], round_gradient: _Rounds | None
) -> Tensor:
    if type(x) not in door.PLAIN_TYPES:
        with door.operations_of(x):
            rounded = _quantize_visible(x, None, partial(round_value, backend="eager"), round_gradient)
            return rounded if out is None else door.written(out, rounded)
    with torch_private.hidden_from_modes() as hidden:
        rounds = round_value if hidden else partial(round_value, backend="eager")
        x = x if door.is_readable(x) else door.plain(x)
        if out is None or door.is_readable(out):
            return _quantize_visible(x, out, rounds, round_gradient)
        rounded = _quantize_visible(x.detach(), None, rounds, None)
        if type(out) in door.PLAIN_TYPES:
            return door.written(out, rounded)
    return door.written(out, rounded)  # by operations of its class


def _quantize_visible(
    x: Tensor, out: Tensor | None, round_value: partial[Tensor], round_gradient: _Rounds | None
) -> Tensor:
    """By an engine, with gradients of both kinds. Where there are no numbers to round, the shape alone comes out."""
    tangent = torch.autograd.forward_ad.unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    if out is None and ((x.requires_grad and torch.is_grad_enabled()) or tangent is not None):
        return Round.apply(x, round_value, round_gradient)  # type: ignore[no-any-return, no-untyped-call]
    x = x if tangent is None and not x.requires_grad else x.detach()
    if torch_private.is_fake(x):
        return torch.empty_like(x) if out is None else out
    return choice.quantize(x, out=out, **round_value.keywords)


def _backward(
    spec: Spec, rounding: AnyRounding, key: Key | None, dim: int, overflow: Overflow, backend: str
) -> Callable[[Tensor], Tensor]:
    """What rounds the gradient of one call of `quantize`."""
    rule = rule_of(spec, rounding)
    if is_random(rule.rounding) and key is None:
        raise ValueError("stochastic rounding of the gradient needs a key: a whole number below 2**64, or a Key")
    check_overflow(overflow, rule.format, "backward")
    rounds = partial(quantize, format=rule.format, rounding=rule.rounding, dim=dim, overflow=overflow, backend=backend)
    if key is None or not is_random(rule.rounding):
        return rounds
    key_back, passes = Key.of(key.value, "backward"), itertools.count()

    def round_gradient(gradient: Tensor) -> Tensor:
        backward_pass = next(passes)  # a second one through the same forward pass has noise of its own
        return rounds(gradient, key=key_back.fold(backward_pass) if backward_pass else key_back)

    return round_gradient


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
        ctx.is_view = inputs[1] is None

    @staticmethod
    @untraced
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.round_gradient(gradient) if ctx.round_gradient else gradient), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.view_as(tangent) if ctx.is_view else tangent.clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, *rounds: _Rounds | None) -> tuple[Tensor, int]:
        dim = in_dims[0]
        return Round.apply(x, *(_by_sample(function, dim) for function in rounds)), dim  # type: ignore[no-untyped-call]


def _by_sample(rounds: _Rounds | None, dim: int) -> _Rounds | None:
    """What rounds a batch of samples, which lie along `dim`, each as `rounds` does it with the sample alone."""
    if rounds is None:
        return None
    if not (isinstance(rounds, partial) and rounds.func is quantize):  # it will call quantize, which comes back here
        return torch.vmap(rounds, in_dims=dim, out_dims=dim)
    if isinstance(rounds.keywords["format"], BlockFormat) or is_random(rounds.keywords["rounding"]):
        return partial(_each_sample, rounds, dim)
    return rounds  # it goes element by element


def _each_sample(rounds: _Rounds, dim: int, batch: Tensor) -> Tensor:
    return torch.stack([rounds(sample) for sample in batch.unbind(dim)], dim) if batch.numel() else batch.clone()


# torch asks for the signature at each call, and inspect would make it anew from the function each time.
Round.forward.__signature__ = inspect.signature(Round.forward)  # type: ignore[attr-defined]
