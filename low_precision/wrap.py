"""Rounding, as Python uses it: of one tensor (`quantize`), of a model and its optimizer.

`quantize_model` and `quantize_optimizer` put rounding around any plain model and torch optimizer; what they do, and
what a training run does (train.py), is sites.LowPrecision under a Scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from low_precision.engines import choice as engines
from low_precision.formats import (
    FLOAT32,
    SITES,
    BlockFormat,
    FewBits,
    Format,
    Overflow,
    Rounding,
    Rule,
    format_named,
    is_random,
    rounding_named,
    rule_of,
)
from low_precision.model import Clock, LayerRounding, LowPrecision, Round
from low_precision.noise import Key
from low_precision.torch_private import untraced

__all__ = [
    "BlockFormat",
    "FewBits",
    "Format",
    "Key",
    "LayerRounding",
    "LowPrecision",
    "Overflow",
    "Rounding",
    "Rule",
    "Scheme",
    "quantize",
    "quantize_model",
    "quantize_optimizer",
]


@untraced  # torch.compile would compile anew for each key, and cannot trace every engine
def quantize(
    x: Tensor,
    format: Format | BlockFormat | str,
    rounding: Rounding | FewBits | str = Rounding.NEAREST,
    key: Key | int | None = None,
    *,
    dim: int = -1,
    backward: Rule | Format | BlockFormat | str | None = None,
    overflow: Overflow | str = Overflow.SATURATE,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Round every element of `x` to a neighbouring value of `format`: a new tensor, same shape, dtype and device.

    x: float32 or float64, any shape and strides; float16 or bfloat16 where that type holds what comes out. Rounded
    once, from the value it holds. The memory format stays, e.g. channels_last.
    rounding: see `Rounding` and `FewBits`. Random ones take their bits from `key` and an element's row-major index
    alone; in a `BlockFormat`, from its place in the row-major order of blocks. dim: along which its blocks run.
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
        raise ValueError(f"overflow to infinity: {format.name} has no infinity; use saturate")
    if not isinstance(x, Tensor) or not engines.holds(x.dtype, format):
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"quantize to {format.name}: given {given}, allowed: a torch.float32 tensor (use x.float())")
    if isinstance(format, BlockFormat) and not -max(x.ndim, 1) <= dim < max(x.ndim, 1):
        raise IndexError(f"dim: given {dim}, allowed: {-x.ndim} .. {x.ndim - 1}")
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise ValueError(f"out: given {out.dtype} {tuple(out.shape)}, allowed: {x.dtype} {tuple(x.shape)}, as x")
    round_gradient = backward and _backward(backward, rounding, key, dim, overflow, backend)
    if out is None and x.requires_grad and torch.is_grad_enabled():
        settings = {"rounding": rounding, "key": key, "dim": dim, "overflow": overflow, "backend": backend}
        return Round.apply(x, partial(quantize, format=format, **settings), round_gradient)
    if out is not None and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # not every engine writes by an operation of torch
    return engines.quantize(x.detach(), format, rounding, overflow, key, dim, out, backend)


def _backward(
    spec: Rule | Format | BlockFormat | str,
    rounding: Rounding | FewBits,
    key: Key | None,
    dim: int,
    overflow: Overflow,
    backend: str,
) -> Callable:
    """What rounds the gradient of one call of `quantize`."""
    rule = rule_of(spec, rounding)
    if is_random(rule.rounding) and key is None:
        raise ValueError("stochastic rounding of the gradient needs a key: a whole number below 2**64, or a Key")
    if overflow is Overflow.INFINITY and not rule.format.has_infinity:
        raise ValueError(f"overflow to infinity: backward: {rule.format.name} has no infinity; use saturate")
    own = key and Key.of(key.value, "backward")
    settings = {"rounding": rule.rounding, "key": own, "dim": dim, "overflow": overflow, "backend": backend}
    return partial(quantize, format=rule.format, **settings)


@dataclass(frozen=True)
class Scheme:
    """How a training run rounds: a rule for each site that is rounded, and what all sites share."""

    rules: dict[str, Rule]  # by the names of SITES; a site that is not there stays in float32
    seed: int = 0  # of the stochastic rounding's noise
    overflow: Overflow = Overflow.SATURATE
    backend: str = "auto"
    rounding: Rounding | FewBits = Rounding.NEAREST  # of the sites that quantize_optimizer adds, where they name none

    def __post_init__(self) -> None:
        unknown = set(self.rules) - set(SITES)
        if unknown:
            raise ValueError(f"site {sorted(unknown)[0]!r}: allowed: {', '.join(SITES)}")
        if "compensation" in self.rules and ("weights" not in self.rules or "accumulator" in self.rules):
            raise ValueError("site 'compensation': allowed: one beside rounded weights, without an accumulator")
        for site, rule in self.rules.items():
            if Overflow(self.overflow) is Overflow.INFINITY and not rule.format.has_infinity:
                raise ValueError(f"overflow to infinity: {site}: {rule.format.name} has no infinity; use saturate")

    def quantizer(self, site: str, tensor: str, clock: Clock) -> Quantizer | None:
        """What rounds that tensor at that site, or None where it stays in float32."""
        rule = self.rules.get(site)
        if rule is None or rule.format == FLOAT32:
            return None
        return Quantizer(rule, Key.of(self.seed, site, tensor), clock, self.overflow, self.backend)


class Quantizer:
    """Rounds one named tensor at one site; its random bits depend on (seed, site, tensor, step, call) alone."""

    def __init__(self, rule: Rule, key: Key, clock: Clock, overflow: Overflow, backend: str) -> None:
        self.rule, self.key, self.clock, self.overflow, self.backend = rule, key, clock, overflow, backend

    def __call__(
        self,
        x: Tensor,
        call: int = 0,
        step: int | None = None,
        dim: int | None = None,
        out: Tensor | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """`call` tells apart several roundings between two optimizer steps; `step` is the clock's unless given.

        dim: along which blocks run; unless given, a parameter's second dimension, its inputs, or its only one.
        first_row: see Key.
        """
        key = None
        if is_random(self.rule.rounding):
            key = self.key.fold(self.clock.step if step is None else step).fold(call)
            key = replace(key, first_row=first_row) if first_row else key
        dim = min(1, x.ndim - 1) if dim is None else dim
        settings = {"dim": dim, "overflow": self.overflow, "backend": self.backend, "out": out}
        return quantize(x, self.rule.format, self.rule.rounding, key, **settings)

    def beyond(self, x: Tensor) -> Tensor:
        """bool (): whether `x` holds a value that the format does not reach, or a NaN."""
        format = self.rule.format
        if isinstance(format, BlockFormat):  # a scale reaches everything finite
            return ~x.isfinite().all()
        return ~((x <= format.largest) & (x >= format.lowest)).all()


Spec = Rule | Format | BlockFormat | str


def quantize_model(
    model: nn.Module,
    *,
    weights: Spec | None = None,
    inputs: Spec | None = None,
    activations: Spec | None = None,
    errors: Spec | None = None,
    accumulator: Spec | None = None,
    compensation: Spec | None = None,
    rounding: Rounding | FewBits | str = Rounding.NEAREST,
    seed: int = 0,
    layers: Iterable[str] | None = None,
    overflow: Overflow | str = Overflow.SATURATE,
    backend: str = "auto",
) -> nn.Module:
    """Round what `model` computes with, from now on: the same model, in place, weights rounded at once.

    weights, ... compensation: for each site (README, "Sites") how it is rounded, a text "FORMAT[:ROUNDING]", a Format
    or a Rule; None: not at all. An accumulator, a master copy of the weights for the optimizer, starts from the weights
    before they are rounded; a compensation keeps what their rounding cuts off for the next update. rounding: where a
    site names none. seed: of all stochastic rounding, that of the optimizer too. layers: name patterns of the modules
    to round, see LowPrecision.
    A layer or parameter that is added or replaced later: RuntimeError at the next forward pass or step, until
    quantize_model(model), without a site, takes it in. What is compiled or parallel is wrapped after, or before: both
    work, with the same noise. Raises ValueError for unknown names and a model that is rounded already, TypeError for
    parameters that are not float32.
    """
    sites = {"weights": weights, "inputs": inputs, "activations": activations, "errors": errors}
    rules = _rules(sites | {"accumulator": accumulator, "compensation": compensation}, rounding)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: given {seed!r}, allowed: a whole number >= 0")
    engines.check(backend)
    plain = _unwrapped(model)
    low = getattr(plain, "low_precision", None)
    if not isinstance(low, LowPrecision):
        rounding = rounding_named(rounding) if isinstance(rounding, str) else rounding
        LowPrecision(plain, Scheme(rules, seed, Overflow(overflow), backend, rounding), layers)
    elif rules or layers is not None:
        raise ValueError("this model is rounded already: start from a new one, or give no site to take in new layers")
    else:
        low.extend()
    return model


def quantize_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    gradients: Spec | None = None,
    momentum: Spec | None = None,
    rounding: Rounding | FewBits | str | None = None,
    loss_scale: float | str = 1.0,
) -> torch.optim.Optimizer:
    """Round what `optimizer` does to a model of `quantize_model`: the same optimizer, in place.

    Each step rounds the gradients, then the optimizer's state (momentum, moments), accumulator and weights; its
    state_dict holds accumulator, compensation and the count of steps, from which all noise follows. gradients,
    momentum: as the sites of quantize_model. rounding: the model's unless given. Parameters that are not the model's
    stay in float32.
    loss_scale: a number, or "dynamic" (optim.LossScale): optimizer.loss_scale.scale(loss).backward().
    Several optimizers may share a model, with one fixed loss scale. Raises ValueError for a model or an optimizer that
    does not fit. With the backend qtorch, returns qtorch's OptimLP around the optimizer.
    """
    plain = _unwrapped(model)
    low = getattr(plain, "low_precision", None)
    if not isinstance(low, LowPrecision):
        raise ValueError("quantize_optimizer: this model is not rounded: call quantize_model(model, ...) first")
    theirs = {id(p) for p in plain.parameters()}
    if not any(id(p) in theirs for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("quantize_optimizer: the optimizer has no parameter of this model: make it from parameters()")
    rules = _rules({"gradients": gradients, "momentum": momentum}, rounding or low.scheme.rounding)
    return low.attach(optimizer, loss_scale, replace(low.scheme, rules=low.scheme.rules | rules))


def _rules(specs: dict[str, Spec | None], rounding: Rounding | FewBits | str) -> dict[str, Rule]:
    rules = {}
    for site, spec in specs.items():
        try:
            if spec is not None:
                rules[site] = rule_of(spec, rounding)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{site}: {error}") from None
    return rules


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and the parallel wrappers."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)  # torch.compile's OptimizedModule
    return model if inner is None else _unwrapped(inner)
