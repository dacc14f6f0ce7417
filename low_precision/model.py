"""Rounding around a plain model, by hooks, and around its optimizer: all of it together.

print(model) shows what is rounded where, and the model's state_dict stays that of the plain model. The optimizer stays
a torch optimizer, schedulers and all; what rounding adds to its state (step count, accumulator, loss scale) is in its
state_dict.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from low_precision.errors import SettingError
from low_precision.formats import FLOAT32
from low_precision.layers import LayerRounding, type_of
from low_precision.loss_scale import LossScale, OverflowWatch
from low_precision.optimizer import OptimizerRounding
from low_precision.rules import ADDED_SITES, AROUND_LAYERS, is_there
from low_precision.scheme import BatchPart, Clock, Scheme
from low_precision.torch_private import forget_compiled, parameters_of, untraced
from low_precision.weights import Weights

_NEW = "was added or replaced after its model was quantized, and is not rounded: call quantize_model(model) again"
_ROUNDED_ALREADY = "this model is rounded already, or has a low_precision of its own: start from a new model"


class LowPrecision:
    """Puts `scheme` around `model`, and with `attach` around its optimizer.

    layers: name patterns (fnmatch) of the modules to round, e.g. ["layer1.*", "fc"]; None: the whole model. Inputs,
    activations and errors are rounded at the Linear and Conv layers among them, weights, gradients, momentum and
    accumulator for all their parameters. A pattern that matches no module with parameters: SettingError; a model that
    is rounded already: ValueError. float32 parameters only (TypeError).
    The weights are rounded at once, and again after every load_state_dict. Write to them in place under no_grad: what
    goes through `.data` is not seen, and an accumulator would overwrite it.
    A module or parameter that the model gets later: RuntimeError at the next forward pass or step, until `extend`.

        low = LowPrecision(model, Scheme({"weights": Rule(NAMED["float8"], Rounding.STOCHASTIC)}, seed=1))
        optimizer = low.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        low.scale(loss).backward(); optimizer.step()
    """

    def __init__(self, model: nn.Module, scheme: Scheme, layers: Iterable[str] | None = None) -> None:
        self.model, self.scheme = model, scheme
        self.clock, self.part, self.overflow, self.loss_scale = Clock(), BatchPart(), OverflowWatch(), LossScale()
        self.layers = [layers] if isinstance(layers, str) else layers if layers is None else list(layers)
        self._rules = dict(scheme.rules)  # shown by the layers: the optimizer's come with it
        self._weights = Weights(self.clock)
        self._names: dict[Tensor, str] = {}  # of the parameters that are rounded
        self._modules: list[nn.Module] = []  # those that are rounded
        _check_patterns(model, self.layers)
        self._hooks: list[Any] = []  # pickled with the model: else a hook of a new process could take their number
        self.extend()
        self._hooks.append(model.register_forward_pre_hook(self._before_model))
        model.low_precision = self  # type: ignore[assignment]

    def extend(self) -> None:
        """Takes in what the model has: all of it at first, later what was added or replaced since."""
        modules, names = self._missing()
        self._check_new(modules, names)
        forget_compiled()
        present = {p for module in _select(self.model, self.layers).values() for p in module.parameters(recurse=False)}
        for parameter in [p for p in self._names if p not in present]:
            del self._names[parameter]
            self._weights.drop(parameter)
        self._names |= names
        self._modules += modules.values()
        if self.scheme.backend != "qtorch":  # there, OptimLP rounds the weights itself, from its first step on
            self._round_parameters(names)
            for module in modules.values():  # each of them: somebody may call or load a part of the model
                self._hooks.append(module.register_forward_pre_hook(self._settle))
                self._hooks.append(module.register_load_state_dict_post_hook(self._loaded))  # type: ignore[no-untyped-call]
        for name, module in modules.items():
            rounding = self._show(module, name)
            if rounding and any(site in rounding.shown() for site in AROUND_LAYERS):
                self._hooks.append(module.register_forward_pre_hook(rounding.before, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(rounding.after))

    def _check_new(self, modules: dict[str, nn.Module], names: dict[Tensor, str]) -> None:
        """TypeError or ValueError for modules and parameters that cannot be taken in."""
        for parameter, name in names.items():
            if parameter.dtype != torch.float32:
                raise TypeError(f"parameter {name}: given {parameter.dtype}, allowed: torch.float32")
        for name, module in modules.items():
            if isinstance(getattr(module, "rounding", None), LayerRounding):
                raise ValueError(f"module {name or 'model'} is rounded already: start from a new model")
        if getattr(self.model, "low_precision", self) is not self:
            raise ValueError(_ROUNDED_ALREADY)

    def _round_parameters(self, names: dict[Tensor, str]) -> None:
        quantizers = {p: self.scheme.quantizer("weights", name, self.clock) for p, name in names.items()}
        added = {
            site: {p: self.scheme.quantizer(site, name, self.clock) for p, name in names.items()}
            for site in ADDED_SITES
            if site in self.scheme.rules  # None for one in float32
        }
        weights = {p: quantizer for p, quantizer in quantizers.items() if quantizer}
        self._weights.add(weights, added.get("accumulator", {}), added.get("compensation", {}))

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward() on."""
        return self.loss_scale.scale(loss)

    def attach(
        self, optimizer: torch.optim.Optimizer, loss_scale: float | str = 1.0, scheme: Scheme | None = None
    ) -> torch.optim.Optimizer:
        """Round the gradients before each step of `optimizer`, and its state and the weights after it.

        loss_scale: see LossScale; the optimizer has it as `optimizer.loss_scale`. scheme: the model's unless given.
        Returns the optimizer to step: the same object, or with the backend qtorch qtorch's OptimLP around it.
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
            optimizer.loss_scale = scale  # type: ignore[attr-defined]
        else:
            rounding = OptimizerRounding(self._names, self._weights, scheme, scale, self.overflow, self.check)
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
        sites = {site for site, rule in self._rules.items() if is_there(site, rule)}
        of_parameters, around = sites - set(AROUND_LAYERS), sites & set(AROUND_LAYERS)
        modules, names = self._missing()
        new = [name for name, module in modules.items() if of_parameters or (around and type_of(module))]
        if new:
            raise RuntimeError(f"layer {new[0] or 'model'} {_NEW}")
        if of_parameters and names:
            hint = "; in torch.func.functional_call, give tensors, quantize(p, ...) or p.detach(), for parameters"
            raise RuntimeError(f"parameter {next(iter(names.values()))} {_NEW}{hint}")

    def _missing(self) -> tuple[dict[str, nn.Module], dict[Tensor, str]]:
        """What of the model should be rounded and is not: modules by name, parameters with their names."""
        known = set(map(id, self._modules))
        modules: dict[str, nn.Module] = {}
        names: dict[Tensor, str] = {}
        for name, module in _select(self.model, self.layers).items():
            parameters = parameters_of(module).items()
            full_names = {p: f"{name}.{key}" if name else key for key, p in parameters if p is not None}
            if id(module) not in known and (full_names or type_of(module)):
                modules[name] = module
            # Other tensors in a parameter's place are a guest's: torch.func.functional_call brings them along.
            names |= {
                p: full_name
                for p, full_name in full_names.items()
                if p not in self._names and isinstance(p, nn.Parameter)
            }
        return modules, names

    def _show(self, module: nn.Module, name: str = "") -> LayerRounding | None:
        """The rounding of this module, made where it has none yet and rules reach it; None where there is none."""
        rounding = getattr(module, "rounding", None)
        if isinstance(rounding, LayerRounding):
            return rounding
        made = LayerRounding(self.scheme, self._rules, name, module, self.clock, self.overflow, self.part)
        leaf = type_of(module) or next(module.children(), None) is None
        if not (leaf and made.shown()):
            return None
        module.add_module("rounding", made)
        return made

    @untraced
    def _before_model(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.check()

    @untraced
    def _settle(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Weights that were written since the last step, or moved by an optimizer that knows nothing of us."""
        self._weights.settle(parameters_of(module).values())

    def _loaded(self, module: nn.Module, keys: Any) -> None:
        parameters = parameters_of(module)
        for name, parameter in parameters.items():
            if parameter is not None and parameter not in self._names:
                raise ValueError(f"load_state_dict: {name} is a new parameter, not rounded: load without assign")
        self._weights.settle(parameters.values())


def _select(model: nn.Module, patterns: list[str] | None) -> dict[str, nn.Module]:
    """The modules that are to be rounded, by name."""
    modules = dict(model.named_modules())
    if patterns is None:
        return modules
    return {name: module for name, module in modules.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}


def _check_patterns(model: nn.Module, patterns: list[str] | None) -> None:
    """SettingError for a pattern that matches no module with parameters of its own."""
    names = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise SettingError("layers", repr(pattern), f"a pattern that matches one of: {', '.join(names)}")
