"""Rounding, as Python uses it: of one tensor (`quantize`), of a model and its optimizer.

`quantize_model` and `quantize_optimizer` put rounding around any plain model and torch optimizer; what they do, and
what a training run does (train.py), is sites.LowPrecision under a Scheme.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from formats import FLOAT32, SITES, Format, Overflow, Rounding, Rule, format_named, rule_of
from kernels.noise import Key
from sites import Clock, LayerRounding, LowPrecision, Round

__all__ = [
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

# A further engine is one file with a function `quantize(x, format, rounding, overflow, key)` and one entry here.
ENGINES = {"eager": "kernels.eager", "qtorch": "kernels.qtorch"}
AUTO = "eager"


@torch.compiler.disable  # which would compile anew for each key, and cannot trace every engine
def quantize(
    x: Tensor,
    format: Format | str,
    rounding: Rounding | str = Rounding.NEAREST,
    key: Key | int | None = None,
    *,
    backward: Rule | Format | str | None = None,
    overflow: Overflow | str = Overflow.SATURATE,
    backend: str = "auto",
) -> Tensor:
    """Round every element of `x` to a neighbouring value of `format`: a new tensor, same shape, dtype and device.

    x: float32, any shape and strides; float16 or bfloat16 too where that type holds every value of `format`.
    rounding: see `Rounding`. STOCHASTIC takes its random bits from `key` and an element's row-major index alone.
    Special values: NaN stays NaN; beyond `format.largest`, see `Overflow`; the sign stays, of zeros too where the
    format has a negative zero; in float32 nothing is rounded. Gradients pass straight through (Bengio et al. 2013),
    rounded on the way where `backward` says how: a format or "FORMAT[:ROUNDING]", with the noise of a key of their own.
    Raises TypeError for other dtypes, ValueError for unknown names, a missing key, an infinity that is not there.
    Source: IEEE 754-2019, 4.3 and 7.4; Croci et al. 2022, definition 1.
    """
    format = format if isinstance(format, Format) else format_named(format)
    rounding, overflow = Rounding(rounding), Overflow(overflow)
    key = key if key is None or isinstance(key, Key) else Key(key)
    if rounding is Rounding.STOCHASTIC and key is None:
        raise ValueError("stochastic rounding needs a key: a whole number below 2**64, or a Key")
    if overflow is Overflow.INFINITY and not format.has_infinity:
        raise ValueError(f"overflow to infinity: {format.name} has no infinity; use saturate")
    if backend != "auto" and backend not in ENGINES:
        raise ValueError(f"backend: given {backend!r}, allowed: auto, {', '.join(ENGINES)}")
    if not isinstance(x, Tensor) or not _holds(x.dtype, format):
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"quantize to {format.name}: given {given}, allowed: a torch.float32 tensor (use x.float())")
    round_gradient = _backward(backward, rounding, key, overflow, backend)
    if x.requires_grad and torch.is_grad_enabled():
        straight = partial(quantize, format=format, rounding=rounding, key=key, overflow=overflow, backend=backend)
        return Round.apply(x, straight, round_gradient)
    if format == FLOAT32:
        return x.detach().clone()
    engine = importlib.import_module(ENGINES[AUTO if backend == "auto" else backend])
    return engine.quantize(x.detach().float(), format, rounding, overflow, key).to(x.dtype)


def _backward(
    spec: Rule | Format | str | None, rounding: Rounding, key: Key | None, overflow: Overflow, backend: str
) -> Callable | None:
    """What rounds the gradient of one call of `quantize`."""
    if spec is None:
        return None
    rule = rule_of(spec, rounding)
    if rule.rounding is Rounding.STOCHASTIC and key is None:
        raise ValueError("stochastic rounding of the gradient needs a key: a whole number below 2**64, or a Key")
    if overflow is Overflow.INFINITY and not rule.format.has_infinity:
        raise ValueError(f"overflow to infinity: backward: {rule.format.name} has no infinity; use saturate")
    own = key and Key.of(key.value, "backward")
    return partial(quantize, format=rule.format, rounding=rule.rounding, key=own, overflow=overflow, backend=backend)


def _holds(dtype: torch.dtype, format: Format) -> bool:
    """Whether every value of `format` is one of the floating-point type `dtype`, no wider than float32."""
    if dtype == torch.float32:
        return True
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    there = torch.finfo(dtype)
    return (
        format.unit_roundoff >= there.eps / 2
        and format.largest <= there.max
        and format.smallest_subnormal >= there.smallest_normal * there.eps
    )


@dataclass(frozen=True)
class Scheme:
    """How a training run rounds: a rule for each site that is rounded, and what all sites share."""

    rules: dict[str, Rule]  # by the names of SITES; a site that is not there stays in float32
    seed: int = 0  # of the stochastic rounding's noise
    overflow: Overflow = Overflow.SATURATE
    backend: str = "auto"
    rounding: Rounding = Rounding.NEAREST  # of the sites that quantize_optimizer adds, where they name none

    def __post_init__(self) -> None:
        unknown = set(self.rules) - set(SITES)
        if unknown:
            raise ValueError(f"site {sorted(unknown)[0]!r}: allowed: {', '.join(SITES)}")
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

    def __call__(self, x: Tensor, call: int = 0, step: int | None = None) -> Tensor:
        """`call` tells apart several roundings between two optimizer steps; `step` is the clock's unless given."""
        key = None
        if self.rule.rounding is Rounding.STOCHASTIC:
            key = self.key.fold(self.clock.step if step is None else step).fold(call)
        return quantize(x, self.rule.format, self.rule.rounding, key, overflow=self.overflow, backend=self.backend)

    def beyond(self, x: Tensor) -> Tensor:
        """bool (): whether `x` holds a value that the format does not reach, or a NaN."""
        return ~(x.abs() <= self.rule.format.largest).all()


Spec = Rule | Format | str


def quantize_model(
    model: nn.Module,
    *,
    weights: Spec | None = None,
    inputs: Spec | None = None,
    activations: Spec | None = None,
    errors: Spec | None = None,
    accumulator: Spec | None = None,
    rounding: Rounding | str = Rounding.NEAREST,
    seed: int = 0,
    layers: Iterable[str] | None = None,
    overflow: Overflow | str = Overflow.SATURATE,
    backend: str = "auto",
) -> nn.Module:
    """Round what `model` computes with, from now on: the same model, in place, weights rounded at once.

    weights, ... accumulator: for each site (README, "Sites") how it is rounded, a text "FORMAT[:ROUNDING]", a Format
    or a Rule; None: not at all. An accumulator, a master copy of the weights for the optimizer, starts from the weights
    before they are rounded. rounding: where a site names none. seed: of all stochastic rounding, that of the optimizer
    too. layers: name patterns of the modules to round, see LowPrecision.
    A layer or parameter that is added or replaced later: RuntimeError at the next forward pass or step, until
    quantize_model(model), without a site, takes it in. What is compiled or parallel is wrapped after, or before: both
    work, with the same noise. Raises ValueError for unknown names and a model that is rounded already, TypeError for
    parameters that are not float32.
    """
    sites = {"weights": weights, "inputs": inputs, "activations": activations, "errors": errors}
    rules = _rules(sites | {"accumulator": accumulator}, rounding)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: given {seed!r}, allowed: a whole number >= 0")
    if backend != "auto" and backend not in ENGINES:
        raise ValueError(f"backend: given {backend!r}, allowed: auto, {', '.join(ENGINES)}")
    plain = _unwrapped(model)
    low = getattr(plain, "low_precision", None)
    if not isinstance(low, LowPrecision):
        LowPrecision(plain, Scheme(rules, seed, Overflow(overflow), backend, Rounding(rounding)), layers)
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
    rounding: Rounding | str | None = None,
    loss_scale: float | str = 1.0,
) -> torch.optim.Optimizer:
    """Round what `optimizer` does to a model of `quantize_model`: the same optimizer, in place.

    Each step rounds the gradients, then the optimizer's state (momentum, moments), accumulator and weights; its
    state_dict holds the accumulator and the count of steps, from which all noise follows. gradients, momentum: as the
    sites of quantize_model. rounding: the model's unless given. Parameters that are not the model's stay in float32.
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


def _rules(specs: dict[str, Spec | None], rounding: Rounding | str) -> dict[str, Rule]:
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
