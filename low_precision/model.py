"""Rounding around a plain model, by hooks: which tensors of a training step are rounded, and with what noise.

print(model) shows what is rounded where, and the model's state_dict stays that of the plain model. The optimizer stays
a torch optimizer, schedulers and all; what rounding adds to its state (step count, accumulator, loss scale) is in its
state_dict. What rounds a tensor comes from a quant.Scheme: no engine is known here.
"""

from __future__ import annotations

import fnmatch
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from low_precision.formats import ADDED_SITES, FLOAT32, SITES, Rule
from low_precision.optimizer import LossScale, OptimizerRounding, Weights
from low_precision.torch_private import untraced

_NEW = "was added or replaced after its model was quantized, and is not rounded: call quantize_model(model) again"

LAYER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
AROUND_LAYERS = ("inputs", "activations", "errors")  # the sites at those; the others are at parameters


class Round(torch.autograd.Function):
    """Rounds a tensor on the way forward and its gradient on the way back; None leaves that way alone."""

    @staticmethod
    def forward(x: Tensor, forward: Callable | None, backward: Callable | None) -> Tensor:
        return forward(x).data if forward else x.view_as(x)  # .data: an engine's view would refuse an in-place ReLU

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.round = inputs[2]

    @staticmethod
    @untraced
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.round(gradient) if ctx.round else gradient), None, None

    @staticmethod
    def vmap(info: Any, dims: tuple, x: Tensor, forward: Callable | None, backward: Callable | None) -> tuple:
        return Round.apply(x, forward, backward), dims[0]  # element by element: whichever dimension the batch is


# torch asks for it at each call, and inspect would make it anew from the function each time.
Round.forward.__signature__ = inspect.signature(Round.forward)


@dataclass
class Clock:
    """What the rounding of one model shares while it trains."""

    step: int = 0  # optimizer steps done
    calls: Counter = field(default_factory=Counter)  # (layer, training mode, replica) -> forward passes since then
    writes: int = 0  # weights taken over from outside since then
    watch: bool = False  # whether to look for errors that overflow, as dynamic loss scaling needs
    overflowed: dict[torch.device, Tensor] = field(default_factory=dict)  # bool (): whether there were any since then
    # Of several processes with a part of the batch each: this one's rows, how many come before, and how they agree.
    rows: int = 0
    rows_before: int = 0
    any_overflowed: Callable[[bool], bool] | None = None

    def move_to(self, step: int) -> None:
        self.step, self.writes = step, 0
        self.calls.clear()

    def note(self, overflowed: Tensor) -> None:
        """Each device has a place of its own: replicas go back in threads of their own."""
        before = self.overflowed.get(overflowed.device)
        self.overflowed[overflowed.device] = overflowed if before is None else before | overflowed


class LayerRounding(nn.Module):
    """The roundings of one layer, as a child of it: so that print(model) shows them.

    Those of its parameters too, though `Weights` and the optimizer's hooks do them: of a layer that is no Linear or
    Conv layer there are no others.
    """

    def __init__(self, scheme: Any, rules: dict[str, Rule], name: str, clock: Clock, layer: nn.Module) -> None:
        super().__init__()
        self._rules, self._name, self._around_layer = rules, name, isinstance(layer, LAYER_TYPES)
        # Along which dimension of an input or output blocks run: features, or channels of images with or without batch.
        self._dim = -1 - len(getattr(layer, "kernel_size", ()))
        self.inputs = scheme.quantizer("inputs", name, clock)
        self.activations = scheme.quantizer("activations", name, clock)
        self.input_errors = scheme.quantizer("errors", f"{name}.input", clock)
        self.output_errors = scheme.quantizer("errors", f"{name}.output", clock)
        self.clock = clock

    def shown(self) -> dict[str, Rule]:
        """The rules that reach this layer."""
        there = {s: rule for s, rule in self._rules.items() if rule.format != FLOAT32 or s in ADDED_SITES}
        return {s: there[s] for s in SITES if s in there and (self._around_layer or s not in AROUND_LAYERS)}

    def extra_repr(self) -> str:
        return ", ".join(f"{site}={rule}" for site, rule in self.shown().items())

    # Not traced by torch.compile, to which step and call are constants: it would compile anew for each of them.
    @untraced
    def before(self, layer: nn.Module, arguments: tuple, named: dict) -> tuple:
        """The layer's forward pre-hook: rounds what it reads."""
        x = arguments[0] if arguments else named["input"]
        replica = _replica(layer, x)
        self.clock.calls[self._name, self.training, replica] += 1
        own = self.input_errors and _has_its_own_error(layer)
        own = own and next(reversed(layer._forward_pre_hooks.values())) == self.before  # the last to be given it
        x = self._around(x, self.inputs, self.input_errors, replica, own_error=bool(own))
        return ((x, *arguments[1:]), named) if arguments else ((), named | {"input": x})

    @untraced
    def after(self, layer: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        """The layer's forward hook: rounds what it gives."""
        in_place = next(iter(layer._forward_hooks.values())) == self.after and _is_new(layer, output)
        y = self._around(output, self.activations, self.output_errors, _replica(layer, output), in_place)
        return y if self.activations or y is output else y.clone()  # Round's view would refuse an in-place ReLU

    def _around(
        self, x: Tensor, forward: Any, backward: Any, replica: int, in_place: bool = False, own_error: bool = False
    ) -> Tensor:
        """in_place: nobody has seen `x`; own_error: nobody will see its gradient, which is rounded in place too."""
        if not (forward or (backward and x.requires_grad)):
            return x
        # Evaluation never takes training's noise, nor one replica another's.
        call = 2 * (self.clock.calls[self._name, self.training, replica] - 1) + self.training + (replica << 32)
        settings: dict[str, Any] = {"dim": self._dim}
        if self.clock.rows_before and self.training:
            settings["first_row"] = self.clock.rows_before * len(x) // self.clock.rows

        def round_error(gradient: Tensor) -> Tensor:
            if self.clock.watch:
                self.clock.note(backward.beyond(gradient))
            out = gradient if own_error and not gradient.requires_grad else None
            return backward(gradient, call, out=out, **settings)

        if in_place:
            if forward:
                forward(x.detach(), call, out=x.detach(), **settings)
            if backward and x.requires_grad:
                x.register_hook(round_error)
            return x
        return Round.apply(x, forward and (lambda y: forward(y, call, **settings)), backward and round_error)


_MAKERS = ("ConvolutionBackward0", "AddmmBackward0", "MmBackward0")  # going back, none of them reads its output


def _is_new(layer: nn.Module, output: Tensor) -> bool:
    """Whether a layer's own operation made the output and nobody else can have seen it: it can be rounded in place."""
    if torch._C._are_functorch_transforms_active() or nn.modules.module._global_forward_hooks:
        return False
    if output.grad_fn is None:  # nothing tells how it was made, but that of torch's own layers we know
        return type(layer) in LAYER_TYPES and "forward" not in vars(layer)
    return type(output.grad_fn).__name__ in _MAKERS


def _has_its_own_error(layer: nn.Module) -> bool:
    """Whether torch's own operation alone reads the rounded input and makes its gradient, and no hook sees either.

    Beside our own forward hook, that is: another one would be given the input, and could compute with it.
    """
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_backward_hooks or layer._backward_hooks:
        return False
    if torch._C._are_functorch_transforms_active() or len(layer._forward_hooks) > 1:
        return False
    return type(layer) in LAYER_TYPES and "forward" not in vars(layer)


def _replica(layer: nn.Module, x: Tensor) -> int:
    """Which of DataParallel's replicas the layer is: they run at once, one a device, and each needs its own noise."""
    return (x.device.index or 0) if getattr(layer, "_is_replica", False) else 0


class LowPrecision:
    """Puts `scheme` around `model`, and with `attach` around its optimizer.

    layers: name patterns (fnmatch) of the modules to round, e.g. ["layer1.*", "fc"]; None: the whole model. Inputs,
    activations and errors are rounded at the Linear and Conv layers among them, weights, gradients, momentum and
    accumulator for all their parameters. A pattern that matches no module with parameters: ValueError; a model that
    is rounded already: ValueError. float32 parameters only (TypeError).
    The weights are rounded at once, and again after every load_state_dict. Write to them in place under no_grad: what
    goes through `.data` is not seen, and an accumulator would overwrite it.
    A module or parameter that the model gets later: RuntimeError at the next forward pass or step, until `extend`.

        low = LowPrecision(model, Scheme({"weights": Rule(NAMED["float8"], Rounding.STOCHASTIC)}, seed=1))
        optimizer = low.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        low.scale(loss).backward(); optimizer.step()
    """

    def __init__(self, model: nn.Module, scheme: Any, layers: Iterable[str] | None = None) -> None:
        self.model, self.scheme, self.clock, self.loss_scale = model, scheme, Clock(), LossScale()
        self.layers = [layers] if isinstance(layers, str) else layers if layers is None else list(layers)
        self._rules = dict(scheme.rules)  # shown by the layers: the optimizer's come with it
        self._weights = Weights(self.clock)
        self._names: dict[Tensor, str] = {}
        self._modules: list[nn.Module] = []  # those that are rounded
        _check_patterns(model, self.layers)
        self._hooks: list[Any] = []  # pickled with the model: else a hook of a new process could take their number
        self.extend()
        self._hooks.append(model.register_forward_pre_hook(self._before_model))
        model.low_precision = self

    def extend(self) -> None:
        """Takes in what the model has: all of it at first, later what was added or replaced since."""
        modules, names = self._missing()
        there = {p for module in _select(self.model, self.layers).values() for p in module.parameters(recurse=False)}
        for parameter, name in names.items():
            if parameter.dtype != torch.float32:
                raise TypeError(f"parameter {name}: given {parameter.dtype}, allowed: torch.float32")
        for name, module in modules.items():
            if isinstance(getattr(module, "rounding", None), LayerRounding):
                raise ValueError(f"module {name or 'model'} is rounded already: start from a new model")
        if getattr(self.model, "low_precision", self) is not self:
            raise ValueError("this model is rounded already, or has a low_precision of its own: start from a new model")
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what is compiled already would not see hooks that come now
        for parameter in [p for p in self._names if p not in there]:
            del self._names[parameter]
            self._weights.drop(parameter)
        self._names |= names
        self._modules += modules.values()
        if self.scheme.backend != "qtorch":  # there, OptimLP rounds the weights itself, from its first step on
            weights = {p: self.scheme.quantizer("weights", name, self.clock) for p, name in names.items()}
            added = {
                site: {p: self.scheme.quantizer(site, name, self.clock) for p, name in names.items()}
                for site in ADDED_SITES
                if site in self.scheme.rules  # None for one in float32
            }
            self._weights.add({p: round_ for p, round_ in weights.items() if round_}, **added)
            for module in modules.values():  # each of them: somebody may call or load a part of the model
                self._hooks.append(module.register_forward_pre_hook(self._settle))
                self._hooks.append(module.register_load_state_dict_post_hook(self._loaded))
        for name, module in modules.items():
            rounding = self._show(module, name)
            if rounding and any(site in rounding.shown() for site in AROUND_LAYERS):
                self._hooks.append(module.register_forward_pre_hook(rounding.before, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(rounding.after))

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward() on."""
        return self.loss_scale.scale(loss)

    def attach(
        self, optimizer: torch.optim.Optimizer, loss_scale: float | str = 1.0, scheme: Any = None
    ) -> torch.optim.Optimizer:
        """Round the gradients before each step of `optimizer`, and its state and the weights after it.

        loss_scale: see optim.LossScale; the optimizer has it as `optimizer.loss_scale`. scheme: the model's unless
        given. Returns the optimizer to step: the same object, or with the backend qtorch qtorch's OptimLP around it.
        """
        scheme = scheme or self.scheme
        scale = LossScale(loss_scale)
        if isinstance(getattr(optimizer, "loss_scale", None), LossScale):
            raise ValueError("this optimizer rounds already: make a new one")
        momentum = scheme.rules.get("momentum")
        if isinstance(optimizer, torch.optim.LBFGS) and momentum and momentum.format != FLOAT32:
            raise ValueError("momentum: LBFGS remembers steps, not moments of each parameter: it stays in float32")
        if self.scheme.backend == "qtorch":
            from low_precision.engines.qtorch import optim_lp

            optimizer = optim_lp(optimizer, scheme.rules, scale.value)
            optimizer.loss_scale = scale
        else:
            rounding = OptimizerRounding(self._names, self._weights, scheme, self.clock, scale, self.check)
            rounding.attach(optimizer)
        self.loss_scale = scale
        self._rules.clear()
        self._rules.update(scheme.rules)
        for module in self._modules:
            self._show(module)
        return optimizer

    def kept(self) -> Iterable[Tensor]:
        """The accumulators, and what compensations hold."""
        return [*self._weights.masters.values(), *self._weights.lost.values()]

    def check(self) -> None:
        """RuntimeError where the model has got what should be rounded and is not."""
        sites = {site for site, rule in self._rules.items() if rule.format != FLOAT32 or site in ADDED_SITES}
        own, around = sites - set(AROUND_LAYERS), sites & set(AROUND_LAYERS)
        modules, names = self._missing()
        found = [name for name, module in modules.items() if own or (around and isinstance(module, LAYER_TYPES))]
        if found:
            raise RuntimeError(f"layer {found[0] or 'model'} {_NEW}")
        if own and names:
            hint = "; in torch.func.functional_call, give tensors, quantize(p, ...) or p.detach(), for parameters"
            raise RuntimeError(f"parameter {next(iter(names.values()))} {_NEW}{hint}")

    def _missing(self) -> tuple[dict[str, nn.Module], dict[Tensor, str]]:
        """What of the model should be rounded and is not: modules by name, parameters with their names."""
        known = set(map(id, self._modules))
        modules, names = {}, {}
        for name, module in _select(self.model, self.layers).items():
            own = {p: f"{name}.{key}" if name else key for key, p in module._parameters.items() if p is not None}
            if (own or isinstance(module, LAYER_TYPES)) and id(module) not in known:
                modules[name] = module
            # Other tensors in a parameter's place are a guest's: torch.func.functional_call brings them along.
            names |= {p: key for p, key in own.items() if isinstance(p, nn.Parameter) and p not in self._names}
        return modules, names

    def _show(self, module: nn.Module, name: str = "") -> LayerRounding | None:
        """The rounding of this module, made where it has none yet and rules reach it; None where there is none."""
        rounding = getattr(module, "rounding", None)
        if isinstance(rounding, LayerRounding):
            return rounding
        made = LayerRounding(self.scheme, self._rules, name, self.clock, module)
        leaf = isinstance(module, LAYER_TYPES) or next(module.children(), None) is None
        if not (leaf and made.shown()):
            return None
        module.add_module("rounding", made)
        return made

    @untraced
    def _before_model(self, model: nn.Module, arguments: tuple) -> None:
        self.check()

    @untraced
    def _settle(self, module: nn.Module, arguments: tuple) -> None:
        """Weights that were written since the last step, or moved by an optimizer that knows nothing of us."""
        self._weights.settle(module._parameters.values())

    def _loaded(self, module: nn.Module, keys: Any) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in self._names:
                raise ValueError(f"load_state_dict: {name} is a new parameter, not rounded: load without assign")
        self._weights.settle(module._parameters.values())


def _select(model: nn.Module, patterns: list[str] | None) -> dict[str, nn.Module]:
    """The modules that are to be rounded, by name."""
    modules = dict(model.named_modules())
    if patterns is None:
        return modules
    return {name: module for name, module in modules.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}


def _check_patterns(model: nn.Module, patterns: list[str] | None) -> None:
    worth = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    for pattern in patterns or ():
        if not fnmatch.filter(worth, pattern):
            raise ValueError(f"layers: given {pattern!r}, which matches none of: {', '.join(worth)}")
