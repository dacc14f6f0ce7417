"""Rounding: of one tensor (`quantize`), and of all that a training step holds (`LowPrecision`).

Rounding is put around a plain model from outside, by hooks; print(model) shows what is rounded where, and the model's
state_dict stays that of the plain model. The optimizer stays a torch optimizer, schedulers and all; what rounding adds
to its state (step count, accumulator, loss scale) is in its state_dict.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from formats import FLOAT32, SITES, Format, Overflow, Rounding, Rule, format_named
from kernels.noise import Key
from optim import LossScale, OptimizerRounding, Weights

LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
AROUND_LAYERS = ("inputs", "activations", "errors")  # the sites at those; the others are at parameters

# A further engine is one file with a function `quantize(x, format, rounding, overflow, key)` and one entry here.
ENGINES = {"eager": "kernels.eager", "qtorch": "kernels.qtorch"}
AUTO = "eager"


def quantize(
    x: Tensor,
    format: Format | str,
    rounding: Rounding | str = Rounding.NEAREST,
    key: Key | int | None = None,
    *,
    overflow: Overflow | str = Overflow.SATURATE,
    backend: str = "auto",
) -> Tensor:
    """Round every element of `x` to a neighbouring value of `format`: a new tensor, same shape, dtype and device.

    x: float32, any shape and strides; float16 or bfloat16 too where that type holds every value of `format`.
    rounding: see `Rounding`. STOCHASTIC takes its random bits from `key` and an element's row-major index alone.
    Special values: NaN stays NaN; beyond `format.largest`, see `Overflow`; the sign stays, of zeros too where the
    format has a negative zero; in float32 nothing is rounded. Gradients pass straight through (Bengio et al. 2013).
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
    if x.requires_grad and torch.is_grad_enabled():
        return _Round.apply(x, lambda y: quantize(y, format, rounding, key, overflow=overflow, backend=backend), None)
    if format == FLOAT32:
        return x.detach().clone()
    engine = importlib.import_module(ENGINES[AUTO if backend == "auto" else backend])
    return engine.quantize(x.detach().float(), format, rounding, overflow, key).to(x.dtype)


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


class _Round(torch.autograd.Function):
    """Rounds a tensor on the way forward and its gradient on the way back; None leaves that way alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable | None, backward: Callable | None) -> Tensor:
        ctx.round = backward
        return forward(x).data if forward else x.view_as(x)  # .data: an engine's view would refuse an in-place ReLU

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.round(gradient) if ctx.round else gradient), None, None


@dataclass(frozen=True)
class Scheme:
    """How a training run rounds: a rule for each site that is rounded, and what all sites share."""

    rules: dict[str, Rule]  # by the names of SITES; a site that is not there stays in float32
    seed: int = 0  # of the stochastic rounding's noise
    overflow: Overflow = Overflow.SATURATE
    backend: str = "auto"

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


@dataclass
class Clock:
    """What the rounding of one model shares while it trains."""

    step: int = 0  # optimizer steps done
    calls: Counter = field(default_factory=Counter)  # (layer, training mode) -> forward passes since the last step
    watch: bool = False  # whether to look for errors that overflow, as dynamic loss scaling needs
    overflowed: Tensor | None = None  # bool (): whether there were any since the last step

    def move_to(self, step: int) -> None:
        self.step = step
        self.calls.clear()


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


class LayerRounding(nn.Module):
    """The roundings of one layer, as a child of it: so that print(model) shows them.

    Those of its parameters too, though `Weights` and the optimizer's hooks do them: of a layer that is no Linear or
    Conv layer there are no others.
    """

    def __init__(self, scheme: Scheme, name: str, clock: Clock, layer: nn.Module) -> None:
        super().__init__()
        around = isinstance(layer, LAYER_TYPES)
        shown = {site: rule for site, rule in scheme.rules.items() if rule.format != FLOAT32 or site == "accumulator"}
        self.shown = {site: shown[site] for site in SITES if site in shown and (around or site not in AROUND_LAYERS)}
        self._name = name
        self.inputs = scheme.quantizer("inputs", name, clock)
        self.activations = scheme.quantizer("activations", name, clock)
        self.input_errors = scheme.quantizer("errors", f"{name}.input", clock)
        self.output_errors = scheme.quantizer("errors", f"{name}.output", clock)
        self.clock = clock

    def extra_repr(self) -> str:
        return ", ".join(f"{site}={rule}" for site, rule in self.shown.items())

    def before(self, layer: nn.Module, arguments: tuple, named: dict) -> tuple:
        """The layer's forward pre-hook: rounds what it reads."""
        self.clock.calls[self._name, self.training] += 1
        if not arguments:
            return (), named | {"input": self._around(named["input"], self.inputs, self.input_errors)}
        x, *others = arguments
        return (self._around(x, self.inputs, self.input_errors), *others), named

    def after(self, layer: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        """The layer's forward hook: rounds what it gives."""
        y = self._around(output, self.activations, self.output_errors)
        return y if self.activations or y is output else y.clone()  # _Round's view would refuse an in-place ReLU

    def _around(self, x: Tensor, forward: Quantizer | None, backward: Quantizer | None) -> Tensor:
        if not (forward or (backward and x.requires_grad)):
            return x
        # Evaluation never takes training's noise.
        call = 2 * (self.clock.calls[self._name, self.training] - 1) + self.training

        def round_error(gradient: Tensor) -> Tensor:
            if self.clock.watch:
                found = backward.beyond(gradient)
                self.clock.overflowed = found if self.clock.overflowed is None else self.clock.overflowed | found
            return backward(gradient, call)

        return _Round.apply(x, forward and (lambda y: forward(y, call)), backward and round_error)


class LowPrecision:
    """Puts `scheme` around `model`, and with `attach` around its optimizer.

    layers: name patterns (fnmatch) of the modules to round, e.g. ["layer1.*", "fc"]; None: the whole model. Inputs,
    activations and errors are rounded at the Linear and Conv layers among them, weights, gradients, momentum and
    accumulator for all their parameters. A pattern that matches no module with parameters: ValueError; a model that
    is rounded already: ValueError. float32 parameters only (TypeError).
    The weights are rounded at once, and again after every load_state_dict. Write to them in place under no_grad: what
    goes through `.data` is not seen, and an accumulator would overwrite it.

        low = LowPrecision(model, Scheme({"weights": Rule(NAMED["float8"], Rounding.STOCHASTIC)}, seed=1))
        optimizer = low.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        low.scale(loss).backward(); optimizer.step()
    """

    def __init__(self, model: nn.Module, scheme: Scheme, layers: Iterable[str] | None = None) -> None:
        self.scheme, self.clock, self.loss_scale = scheme, Clock(), LossScale()
        selected = _select(model, layers)
        self._names = {
            parameter: f"{name}.{own}" if name else own
            for name, module in selected.items()
            for own, parameter in module.named_parameters(recurse=False)
        }
        for parameter, name in self._names.items():
            if parameter.dtype != torch.float32:
                raise TypeError(f"parameter {name}: given {parameter.dtype}, allowed: torch.float32")
        for name, module in selected.items():
            if isinstance(getattr(module, "rounding", None), LayerRounding):
                raise ValueError(f"module {name or 'model'} is rounded already: start from a new model")
        for name, module in selected.items():
            leaf = next(module.parameters(recurse=False), None) is not None and next(module.children(), None) is None
            if not (leaf or isinstance(module, LAYER_TYPES)):
                continue
            rounding = LayerRounding(scheme, name, self.clock, module)
            if rounding.extra_repr():
                module.add_module("rounding", rounding)
            if any(site in rounding.shown for site in AROUND_LAYERS):
                module.register_forward_pre_hook(rounding.before, with_kwargs=True)
                module.register_forward_hook(rounding.after)
        if scheme.backend != "qtorch":  # there, OptimLP rounds the weights itself, from its first step on
            accumulator = {}
            if "accumulator" in scheme.rules:  # None for a master copy in float32
                accumulator = {p: scheme.quantizer("accumulator", name, self.clock) for p, name in self._names.items()}
            self._weights = Weights(self._quantizers("weights"), accumulator, self.clock)
            for module in selected.values():  # each of them: somebody may load a part of the model
                module.register_load_state_dict_post_hook(self._loaded)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward() on."""
        return loss if self.loss_scale.value == 1.0 else loss * self.loss_scale.value

    def attach(self, optimizer: torch.optim.Optimizer, loss_scale: float | str = 1.0) -> torch.optim.Optimizer:
        """Round the gradients before each step of `optimizer`, and its state and the weights after it.

        loss_scale: see optim.LossScale. Returns the optimizer to step: the same object, or with the backend qtorch
        qtorch's OptimLP around it.
        """
        self.loss_scale = LossScale(loss_scale)
        if self.scheme.backend == "qtorch":
            from kernels.qtorch import optim_lp

            return optim_lp(optimizer, self.scheme.rules, self.loss_scale.value)
        gradients, momentum = self._quantizers("gradients"), self._quantizers("momentum")
        OptimizerRounding(optimizer, self._names, self._weights, gradients, momentum, self.clock, self.loss_scale)
        return optimizer

    def _loaded(self, module: nn.Module, keys: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in self._names:
                raise ValueError(f"load_state_dict: {name} is a new parameter, not rounded: load without assign")
        self._weights.settle()

    def _quantizers(self, site: str) -> dict[Tensor, Quantizer]:
        made = {p: self.scheme.quantizer(site, name, self.clock) for p, name in self._names.items()}
        return {parameter: quantizer for parameter, quantizer in made.items() if quantizer}


def _select(model: nn.Module, patterns: Iterable[str] | None) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if patterns is None:
        return modules
    worth = [name for name, module in modules.items() if next(module.parameters(recurse=False), None) is not None]
    chosen = set()
    for pattern in patterns:
        matched = fnmatch.filter(worth, pattern)
        if not matched:
            raise ValueError(f"layers: given {pattern!r}, which matches none of: {', '.join(worth)}")
        chosen.update(matched)
    return {name: modules[name] for name in worth if name in chosen}
