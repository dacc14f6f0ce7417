"""Rounding around a plain model, by hooks, and around its optimizer: all of it together.

print(model) shows what is rounded where, and the model's state_dict stays that of the plain model. The optimizer stays
a torch optimizer, schedulers and all; what rounding adds to its state (step count, accumulator, loss scale) is in its
state_dict.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from low_precision import reach
from low_precision.clock import Clock, next_seed
from low_precision.errors import SettingError, wrong_type
from low_precision.formats import FLOAT32
from low_precision.layers import LayerRounding, type_of
from low_precision.loss_scale import LossScale
from low_precision.optimizer import OptimizerRounding
from low_precision.rules import ADDED_SITES, AROUND_LAYERS, OPERANDS, is_there, state_of
from low_precision.scheme import Scheme
from low_precision.torch_private import forget_compiled, is_replica, parameters_of, untraced
from low_precision.weights import Weights

_NEW = "was added or replaced after its model was quantized, and is not rounded: call quantize_model(model) again"
_ROUNDED_ALREADY = "this model is rounded already, or has a low_precision of its own: start from a new model"


class LowPrecision:
    """Puts `scheme` around `model`, and with `attach` around its optimizer.

    layers: name patterns (fnmatch) of the modules to round, each with all that is in it, e.g. ["layer1", "fc"]; None:
    the whole model. Inputs, activations and errors are rounded at the Linear and Conv layers among them, weights,
    gradients, momentum and accumulator for all their parameters. Layers of other types, and products that the model
    computes by functions in its first forward pass, are named in a warning. A pattern that matches no module:
    SettingError; a model that is rounded already, or whose rounded weights would be computed from others
    (parametrizations): ValueError. float32 parameters only (TypeError).
    The weights are rounded at once, and again after every load_state_dict. Write to them in place under no_grad: what
    goes through `.data` is not seen, and an accumulator would overwrite it.
    A module or parameter that the model gets later: RuntimeError at the next forward pass or step, until `extend`.

        low = LowPrecision(model, Scheme({"weights": Rule(NAMED["float8"], Rounding.STOCHASTIC)}, seed=1))
        optimizer = low.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        low.scale(loss).backward(); optimizer.step()
    """

    def __init__(self, model: nn.Module, scheme: Scheme, layers: Iterable[str] | None = None) -> None:
        self.model, self.scheme = model, scheme
        if scheme.backend == "qtorch" and (operands := [site for site in OPERANDS if site in scheme.rules]):
            raise SettingError("backend qtorch: site", operands[0], "a stored site: qtorch rounds no operands")
        self.clock = Clock(seed=next_seed() if scheme.seed is None else scheme.seed)
        self.loss_scale = LossScale()
        self.layers = _patterns(layers)
        self._rules = dict(scheme.rules)  # shown by the layers: the optimizer's come with it
        self._weights = Weights(self.clock)
        self._names: dict[Tensor, str] = {}  # of the parameters that are rounded
        self._modules: list[nn.Module] = []  # those that are rounded
        _check_patterns(model, self.layers)
        self._hooks: list[Any] = []  # pickled with the model: else a hook of a new process could take their number
        self._nested: list[nn.TransformerEncoder] = []  # which would have made nested tensors
        self._listen: set[bool] = set()  # for these modes of training, in the next forward pass
        self._heard: set[tuple[str, str]] = set()  # products that were named
        self.extend()
        self._hooks.append(model.register_forward_pre_hook(self._before_model))
        self._hooks.append(model.register_state_dict_pre_hook(self._before_saving))  # type: ignore[no-untyped-call]
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
                # First of all, before one that computes with the parameters, as pruning does.
                self._hooks.append(module.register_forward_pre_hook(self._settle, prepend=True))
                self._hooks.append(module.register_load_state_dict_post_hook(self._loaded))  # type: ignore[no-untyped-call]
        for name, module in modules.items():
            rounding = self._show(module, name)
            if rounding and any(site in rounding.shown() for site in (*AROUND_LAYERS, *OPERANDS)):
                self._hooks.append(module.register_forward_pre_hook(rounding.before, with_kwargs=True))
                if any(site in rounding.shown() for site in OPERANDS):
                    self._hooks.append(module.register_forward_hook(rounding.end_products, always_call=True))
                self._hooks.append(module.register_forward_hook(rounding.after))
        self._say_unreached()

    def _sites_around_layers(self) -> list[str]:
        sites = (*AROUND_LAYERS, *OPERANDS)
        return [site for site in sites if site in self._rules and is_there(site, self._rules[site])]

    @staticmethod
    def _rounding_of(module: nn.Module) -> LayerRounding | None:
        rounding = getattr(module, "rounding", None)
        return rounding if isinstance(rounding, LayerRounding) else None

    def _say_unreached(self) -> None:
        """A warning of the layers around which nothing is rounded; what functions do shows in the next forward pass."""
        sites = self._sites_around_layers()
        if not sites:
            return
        selected = _select(self.model, self.layers)
        places = reach.unreached(selected)
        has_layers = any(type_of(module) for module in selected.values())
        if places or not has_layers:
            reach.warn(sites, places, has_layers, selected=self.layers is not None)
        self._listen = {True, False} if has_layers else set()
        for module in self.model.modules():
            # In evaluation it would make a nested tensor of a padded batch, whose rows no quantizer can take.
            if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
                module.use_nested_tensor = False
                self._nested.append(module)

    def _check_new(self, modules: dict[str, nn.Module], names: dict[Tensor, str]) -> None:
        """TypeError or ValueError for modules and parameters that cannot be taken in."""
        for parameter, name in names.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name}: it has no shape yet: call the model once before quantize_model")
            if parameter.dtype != torch.float32:
                raise TypeError(f"parameter {name}: given {parameter.dtype}, allowed: torch.float32")
        for name, module in modules.items():
            if self._rounding_of(module):
                raise ValueError(f"module {name or 'model'} is rounded already: start from a new model")
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(f"module {name or 'model'}: given a scripted module, allowed: one of Python")
        if getattr(self.model, "low_precision", self) is not self:
            raise ValueError(_ROUNDED_ALREADY)
        if not self.scheme.rules.keys() & {"weights", *ADDED_SITES}:
            return
        for name, module in _select(self.model, self.layers).items():  # a known one may compute its weights by now
            self._check_computed(name, module)

    def _check_computed(self, name: str, module: nn.Module) -> None:
        computed = reach.computed_weights(module)
        if computed and self.scheme.rules.keys() & {"weights", *ADDED_SITES}:
            raise ValueError(
                f"weights: {reach.described(name, module)} computes its {computed[0]} from other parameters, so "
                "what it multiplies by would not be rounded: give layers= without it, or remove the parametrization"
            )

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
        Several optimizers of a model with the same fixed scale have one LossScale. ValueError for an optimizer that
        rounds already, or that has another one inside: that one steps.
        Returns the optimizer to step: the same object, or with the backend qtorch qtorch's OptimLP around it.
        """
        scheme = scheme or self.scheme
        scale = LossScale(loss_scale)
        if isinstance(getattr(optimizer, "loss_scale", None), LossScale):
            raise ValueError("this optimizer rounds already: make a new one")
        inner = [name for name, value in vars(optimizer).items() if _has_optimizer(value)]
        if inner:
            kind = type(optimizer).__name__
            raise ValueError(
                f"given {kind}, which has another optimizer inside ({inner[0]}), allowed: one that has not"
            )
        for site, rule in scheme.rules.items():
            if site.startswith("momentum") and rule.format != FLOAT32 and isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(f"{site}: LBFGS remembers steps, not moments of each parameter: it stays in float32")
        if self.scheme.backend == "qtorch":
            if states := [site for site in scheme.rules if state_of(site) is not None]:
                raise SettingError("backend qtorch: site", states[0], "momentum, for all states of the optimizer")
            from low_precision.engines.qtorch import optim_lp

            optimizer = optim_lp(optimizer, scheme.rules, scale.value)
            optimizer.loss_scale = scale  # type: ignore[attr-defined]
        else:
            if not scale.dynamic and any(other.scale is self.loss_scale for other in self._weights.optimizers):
                scale = (
                    self.loss_scale if self.loss_scale.value == scale.value and not self.loss_scale.dynamic else scale
                )
            OptimizerRounding(self._names, self._weights, scheme, scale, self.check).attach(optimizer)
        self.loss_scale = scale
        self._rules.clear()
        self._rules.update(scheme.rules)
        for module in self._modules:
            self._show(module)
        return optimizer

    def remove(self) -> None:
        """Takes all of it away: hooks, of the optimizers too, master copies; the weights stay as they are now."""
        if self.scheme.backend == "qtorch":
            raise ValueError("remove: given a model with backend='qtorch', whose OptimLP would go on rounding")
        forget_compiled()
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            if self._rounding_of(module):
                del module.rounding
        for encoder in self._nested:
            encoder.use_nested_tensor = True
        for rounding in self._weights.optimizers:
            rounding.detach()
        del self.model.low_precision

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
            prefix = f"{name}." if name else ""
            named = [(p, f"{prefix}{key}") for key, p in parameters_of(module).items() if p is not None]
            if id(module) not in known and (named or type_of(module)):
                modules[name] = module
            for p, full_name in named:
                known_name = self._names.get(p)
                if known_name is None:
                    # Other tensors in a parameter's place are a guest's: torch.func.functional_call brings them along.
                    if isinstance(p, nn.Parameter):
                        names[p] = full_name
                elif known_name != full_name and name not in modules:
                    self._check_computed(name, module)  # the older spectral_norm renames the parameter, pruning too
        return modules, names

    def _show(self, module: nn.Module, name: str = "") -> LayerRounding | None:
        """The rounding of this module, made where it has none yet and rules reach it; None where there is none."""
        if rounding := self._rounding_of(module):
            return rounding
        made = LayerRounding(self.scheme, self._rules, name, module, self.clock)
        leaf = type_of(module) or next(module.children(), None) is None
        if not (leaf and made.shown()):
            return None
        module.add_module("rounding", made)
        return made

    def _before_model(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        """The model's forward pre-hook. torch.compile traces it, and so knows that nothing can listen there."""
        self._begin(model, model.training in self._listen, torch.compiler.is_compiling())

    @untraced
    def _begin(self, model: nn.Module, listen: bool, compiled: bool) -> None:
        if self.clock.now().paused:
            return
        self.check()
        if is_replica(model):  # it has the parameters that the model had when it was replicated
            return
        # All of them: a parent may use the parameters of a layer that it never calls.
        self._weights.settle(training=model.training and torch.is_grad_enabled())
        if listen and not compiled:
            self._listen_to(model)
        elif listen:
            self._listen.clear()
            reach.warn_compiled(self._sites_around_layers())

    def _listen_to(self, model: nn.Module) -> None:
        """Has a warning given at the end of this forward pass of products that it computes outside rounded layers."""
        listener = reach.Listener(_select(self.model, self.layers))
        training, first = model.training, len(self._listen) == 2

        def end(model: nn.Module, arguments: Any, output: Any) -> None:
            listener.end()
            hook.remove()
            places = [place for key, place in listener.places.items() if key not in self._heard]
            self._heard.update(listener.places)
            if places:
                reach.warn(self._sites_around_layers(), places, has_layers=True)
            if output is None:  # an error: what comes behind it was not heard
                return
            self._listen.discard(training)
            called = {name for name, _, _ in self.clock.calls}
            for module in self._modules if first else ():
                if rounding := self._rounding_of(module):
                    rounding.not_called = rounding.name not in called

        hook = model.register_forward_hook(end, always_call=True)

    @untraced
    def _settle(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Weights that were written since the last step, or moved by an optimizer that knows nothing of us."""
        if self.clock.now().paused:
            return
        training = module.training and torch.is_grad_enabled()
        self._weights.settle(parameters_of(module).values(), training=training)

    def _before_saving(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not self.clock.paused:
            self._weights.settle()

    def _loaded(self, module: nn.Module, keys: Any) -> None:
        parameters = parameters_of(module)
        for name, parameter in parameters.items():
            if parameter is not None and parameter not in self._names:
                raise ValueError(f"load_state_dict: {name} is a new parameter, not rounded: load without assign")
        if not self.clock.paused:
            self._weights.settle(parameters.values())


def _select(model: nn.Module, patterns: list[str] | None) -> dict[str, nn.Module]:
    """The modules that are to be rounded, by name: those that match, and all that is in them."""
    modules = dict(model.named_modules())
    if patterns is None:
        return modules
    everywhere = dict(model.named_modules(remove_duplicate=False))  # a shared module has several names
    matching = {name for name in everywhere if any(fnmatch.fnmatch(name, p) for p in patterns)}
    chosen = {id(module) for name, module in everywhere.items() if matching & {name, *_containers(name)}}
    return {name: module for name, module in modules.items() if id(module) in chosen}


def _has_optimizer(value: object) -> bool:
    """Whether an attribute is an optimizer, or a list, tuple or dict with one in it."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, torch.optim.Optimizer) or (
        isinstance(value, list | tuple) and any(isinstance(item, torch.optim.Optimizer) for item in value)
    )


def _containers(name: str) -> Iterator[str]:
    """The names of the modules in which the module of that name lies, but for the model itself."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _patterns(layers: Iterable[str] | None) -> list[str] | None:
    """TypeError for what is neither a text nor several."""
    if layers is None:
        return None
    patterns = [layers] if isinstance(layers, str) or not isinstance(layers, Iterable) else list(layers)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise wrong_type("layers", pattern, "name patterns")
    return patterns


def _check_patterns(model: nn.Module, patterns: list[str] | None) -> None:
    """SettingError for a pattern that matches no module, or none with a parameter in it."""
    modules = model.named_modules(remove_duplicate=False)
    names = [name for name, module in modules if next(module.parameters(), None) is not None]
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise SettingError(
                "layers", repr(pattern), f"a pattern that matches one of: {', '.join(filter(None, names))}"
            )
