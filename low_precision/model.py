"""Rounding around a plain model, by hooks, and around its optimizer: all of it together.

print(model) shows what is rounded where, and the model's state_dict stays that of the plain model. The optimizer stays
a torch optimizer, schedulers and all; what rounding adds to its state (step count, accumulator, loss scale) is in its
state_dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from low_precision import by_layer, reach
from low_precision.calls import ModelRun
from low_precision.clock import Clock, next_seed
from low_precision.errors import SettingError
from low_precision.formats import FLOAT32
from low_precision.frames import Frames
from low_precision.layers import LayerRounding, ShownFunctions, type_of
from low_precision.listening import Listening
from low_precision.loss_scale import LossScale
from low_precision.noted import Notes
from low_precision.optimizer import OptimizerRounding, has_optimizer
from low_precision.rules import (
    ADDED_SITES,
    ELEMENTWISE,
    FLOWING,
    OPERANDS,
    Rule,
    is_of_optimizer,
    is_there,
    state_of,
)
from low_precision.running import hidden
from low_precision.scheme import Scheme
from low_precision.torch_private import forget_compiled, is_replica, parameters_of, untraced, unwrapped
from low_precision.weights import Weights

_NEW = "was added or replaced after its model was quantized, and is not rounded: call quantize_model(model) again"
_GUESTS = "; in torch.func.functional_call, give tensors, quantize(p, ...) or p.detach(), for parameters"
_ROUNDED_ALREADY = "this model is rounded already, or has a low_precision of its own: start from a new model"


class LowPrecision:
    """Puts `scheme` around `model`, and with `attach` around its optimizer.

    layers: name patterns (fnmatch) of the modules to round, each with all that is in it, e.g. ["layer1", "fc"]; None:
    the whole model. Where the scheme has lines, each module is rounded by its own rules (Scheme.of), and one that they
    leave alone as if it had not been selected.
    What flows is rounded at layers and functions with products (FUNCTIONS), weights, gradients, momentum and
    accumulator for all parameters. Products that no site reaches are named in a warning at the end of the first forward
    pass; a site that reaches nothing is a SettingError there, or at the first step. A pattern that matches no module:
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
        self.model, self.scheme = model, replace(scheme, shared_names={}) if scheme.lines else scheme
        if scheme.backend == "qtorch":
            if scheme.lines:
                allowed = "none: qtorch rounds all modules alike"
                raise SettingError("backend qtorch: layers", str(scheme.lines[0]), allowed)
            if others := [site for site in (ELEMENTWISE, *OPERANDS) if site in scheme.rules]:
                allowed = "one that qtorch rounds: no elementwise, no operands"
                raise SettingError("backend qtorch: site", others[0], allowed)
            if scheme.transforms:
                raise SettingError("backend qtorch: transform", ", ".join(map(str, scheme.transforms.values())), "none")
        self.clock = Clock(seed=next_seed() if scheme.seed is None else scheme.seed)
        self.loss_scale = LossScale()
        self.layers = by_layer.patterns_of(layers)
        self._whole = self.scheme  # with the optimizer's rules, once there is one
        self._rules: dict[nn.Module, dict[str, Rule]] = {}  # shown by each: the optimizer's come later
        self._weights = Weights(self.clock)
        self.parameter_names: dict[Tensor, str] = {}  # of the parameters that are rounded
        self._modules: list[nn.Module] = []  # those that are rounded
        by_layer.check_patterns(model, self.layers)
        by_layer.check_lines(model, scheme.lines, self.layers)
        self._hooks: list[Any] = []  # pickled with the model: else a hook of a new process could take their number
        self._nested: list[nn.TransformerEncoder] = []  # which would have made nested tensors
        self.run = ModelRun(model)
        self.frames = Frames(model, self.scheme, self.layers, self.clock, self.run)
        self.listening = Listening(self.run)
        self.extend()
        self._hooks.append(model.register_forward_pre_hook(self._before_model, prepend=True))
        self._hooks.append(model.register_state_dict_pre_hook(self._before_saving))  # type: ignore[no-untyped-call]
        model.low_precision = self  # type: ignore[assignment]

    def extend(self) -> None:
        """Takes in what the model has: all of it at first, later what was added or replaced since."""
        if self.scheme.lines:
            self.scheme.shared_names.clear()
            self.scheme.shared_names.update(by_layer.shared_names(self.model))
        modules, names = self._missing()
        self._check_new(modules, names)
        forget_compiled()
        present = {p for module in self._selected().values() for p in module.parameters(recurse=False)}
        for parameter in [p for p in self.parameter_names if p not in present]:
            del self.parameter_names[parameter]
            self._weights.drop(parameter)
        self.parameter_names |= names
        self._modules += modules.values()
        if self.scheme.backend != "qtorch":  # there, OptimLP rounds the weights itself, from its first step on
            self._round_parameters(names)
            for module in modules.values():  # each of them: somebody may call or load a part of the model
                # First of all, before one that computes with the parameters, as pruning does.
                self._hooks.append(module.register_forward_pre_hook(self._settle, prepend=True))
                self._hooks.append(module.register_load_state_dict_post_hook(self._loaded))  # type: ignore[no-untyped-call]
        self._hooks += self.frames.register() if self._flows() else []
        for name, module in modules.items():
            rounding = self._show(module, name)
            if rounding and rounding.flows:
                self._hooks.append(module.register_forward_pre_hook(rounding.before, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(rounding.after, always_call=True))
        self._prepare()

    def _flowing_sites(self) -> list[str]:
        """The sites of what flows through the model that round something."""
        there = set().union(*(_there(self.scheme.of(name)) for name in self._selected()))
        return [site for site in FLOWING if site in there]

    def _flows(self) -> bool:
        """Whether something that flows through the model is rounded or transformed."""
        return bool(self.scheme.transforms or self._flowing_sites())

    def _selected(self) -> dict[str, nn.Module]:
        """The modules to round, by name: those that `layers` select, but for those that lines leave alone."""
        modules = by_layer.select(self.model, self.layers)
        if not self.scheme.lines:
            return modules
        return {name: module for name, module in modules.items() if not self.scheme.leaves_alone(name)}

    @staticmethod
    def _rounding_of(module: nn.Module) -> LayerRounding | None:
        rounding = getattr(module, "rounding", None)
        return rounding if isinstance(rounding, LayerRounding) else None

    def _prepare(self) -> None:
        """Listens to the next forward pass of either mode, and has no nested tensors made in evaluation."""
        if not self._flows():
            return
        self.listening.start()
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
            self.scheme.of_parameter(name)  # raises where its rules do not go together
        for name, module in modules.items():
            if self._rounding_of(module):
                raise ValueError(f"module {name or 'model'} is rounded already: start from a new model")
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(f"module {name or 'model'}: given a scripted module, allowed: one of Python")
        if getattr(self.model, "low_precision", self) is not self:
            raise ValueError(_ROUNDED_ALREADY)
        if not self.scheme.lines and not self.scheme.rules.keys() & {"weights", *ADDED_SITES}:
            return
        for name, module in self._selected().items():  # a known one may compute its weights by now
            self._check_computed(name, module)

    def _check_computed(self, name: str, module: nn.Module) -> None:
        computed = reach.computed_weights(module)
        if computed and self.scheme.of(name).rules.keys() & {"weights", *ADDED_SITES}:
            raise ValueError(
                f"weights: {reach.described(name, module)} computes its {computed[0]} from other parameters, so "
                "what it multiplies by would not be rounded: give layers= without it, or remove the parametrization"
            )

    def _round_parameters(self, names: dict[Tensor, str]) -> None:
        schemes = {p: self.scheme.of_parameter(name) for p, name in names.items()}
        quantizers = {p: schemes[p].quantizer("weights", name, self.clock) for p, name in names.items()}
        added = {
            site: {
                p: schemes[p].quantizer(site, name, self.clock)  # None for one in float32
                for p, name in names.items()
                if site in schemes[p].rules
            }
            for site in ADDED_SITES
        }
        weights = {p: quantizer for p, quantizer in quantizers.items() if quantizer}
        self._weights.add(weights, added["accumulator"], added["compensation"])

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
        if scheme is not self.scheme and (lines := scheme.lines or self.scheme.lines):  # the model's hold here too
            if lines != self.scheme.lines:
                by_layer.check_lines(self.model, lines, self.layers)
            scheme = replace(scheme, lines=lines, shared_names=self.scheme.shared_names)
        scale = LossScale(loss_scale)
        if isinstance(getattr(optimizer, "loss_scale", None), LossScale):
            raise ValueError("this optimizer rounds already: make a new one")
        if inner := [name for name, value in vars(optimizer).items() if has_optimizer(value)]:
            given = f"{type(optimizer).__name__}, which has another optimizer inside ({inner[0]})"
            raise ValueError(f"given {given}, allowed: one that has not")
        for site, rule in (*scheme.rules.items(), *((line.site, line.rule) for line in scheme.lines)):
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
                is_same = self.loss_scale.value == scale.value and not self.loss_scale.dynamic
                scale = self.loss_scale if is_same else scale
            OptimizerRounding(self.parameter_names, self._weights, scheme, scale, self.check_step).attach(optimizer)
        self.loss_scale = scale
        self._whole = scheme
        names = {id(module): name for name, module in self.model.named_modules()}
        for module in self._modules:
            name = names.get(id(module), "")
            if module in self._rules:
                self._rules[module].clear()
                self._rules[module].update(self._shown_rules(module, name))
            self._show(module, name)
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
        for module in self.model.modules():
            ShownFunctions.show(module, [])
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
        modules, names = self._missing()
        for name, module in modules.items():
            sites = _there(self._whole.of(name))
            if sites - set(FLOWING) or (sites and type_of(module)):
                raise RuntimeError(f"layer {name or 'model'} {_NEW}")
        for name in names.values():
            if _there(self._whole.of_parameter(name)) - set(FLOWING):
                raise RuntimeError(f"parameter {name} {_NEW}{_GUESTS}")

    def _missing(self) -> tuple[dict[str, nn.Module], dict[Tensor, str]]:
        """What of the model should be rounded and is not: modules by name, parameters with their names."""
        known = set(map(id, self._modules))
        modules: dict[str, nn.Module] = {}
        names: dict[Tensor, str] = {}
        for name, module in self._selected().items():
            prefix = f"{name}." if name else ""
            named = [(p, f"{prefix}{key}") for key, p in parameters_of(module).items() if p is not None]
            if id(module) not in known and (named or type_of(module)):
                modules[name] = module
            for p, full_name in named:
                known_name = self.parameter_names.get(p)
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
        rules = self._rules.setdefault(module, self._shown_rules(module, name))
        scheme = self.scheme.of(name)
        has_operands = bool(scheme.transforms or _there(scheme) & set(OPERANDS))
        made = LayerRounding(scheme, rules, name, module, self.clock, has_operands)
        leaf = type_of(module) or next(module.children(), None) is None
        if not (leaf and made.extra_repr()):
            return None
        module.add_module("rounding", made)
        return made

    def _shown_rules(self, module: nn.Module, name: str) -> dict[str, Rule]:
        """Those of this module, and of its parameters, which another module may share."""
        rules = dict(self._whole.of(name).rules)
        parameter = next((key for key, p in parameters_of(module).items() if p is not None), None)
        if self._whole.lines and parameter is not None:
            theirs = self._whole.of_parameter(f"{name}.{parameter}" if name else parameter).rules
            rules = {site: rule for site, rule in rules.items() if site in FLOWING}
            rules |= {site: rule for site, rule in theirs.items() if site not in FLOWING}
        if not self._weights.optimizers:  # nothing rounds yet what lines ask for at the optimizer
            rules = {s: r for s, r in rules.items() if s in self.scheme.rules or not is_of_optimizer(s)}
        return rules

    def _before_model(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        """The model's forward pre-hook. torch.compile traces it, and so knows that nothing can listen there."""
        training = model.training and torch.is_grad_enabled()
        self._begin(model, arguments, training in self.listening.modes, torch.compiler.is_compiling())

    @untraced
    def _begin(self, model: nn.Module, arguments: tuple[Any, ...], listen: bool, compiled: bool) -> None:
        if self.clock.now().paused:
            return
        self.check()
        if is_replica(model):  # it has the parameters that the model had when it was replicated
            return
        training = model.training and torch.is_grad_enabled()
        if training and self.clock.now() is self.clock:  # and not computed again
            self.clock.delayed.begin_pass(bool(self._weights.optimizers))
        # All of them: a parent may use the parameters of a layer that it never calls.
        with hidden():
            self._weights.settle(training=training)
        if listen and not compiled:
            during = self.frames.everywhere()
            if self.listening.first_pass(model, self._flowing_sites(), self.scheme, self._show_calls, during):
                self.frames.begin(arguments)
        elif listen:
            self.listening.give_up()

    def _show_calls(self, notes: Notes, is_first: bool) -> None:
        """Has print(model) show what the first forward pass called, and the layers that it did not."""
        for module in self._modules if is_first else ():
            if rounding := self._rounding_of(module):
                rounding.not_called = rounding.name not in notes.modules
        for name, module in self._selected().items():
            ShownFunctions.show(module, self.listening.shown(name))

    @contextmanager
    def noting(self) -> Iterator[Notes]:
        """The notes of the forward pass that is made inside; it does not count as the model's first one."""
        with self.frames.everywhere(), self.listening.aside() as notes:
            yield notes

    @staticmethod
    def of(model: nn.Module) -> LowPrecision | None:
        """The rounding of a model, which may be compiled or wrapped for several devices; None where there is none."""
        low = getattr(unwrapped(model), "low_precision", None)
        return low if isinstance(low, LowPrecision) else None

    def check_step(self) -> None:
        """Before a step of an optimizer: RuntimeError as `check` has it; SettingError for a site of the backward pass
        that there was nothing for in the first training pass.
        """
        self.check()
        self.listening.check_backward(self._flowing_sites, self.scheme)

    @untraced
    def _settle(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Weights that were written since the last step, or moved by an optimizer that knows nothing of us."""
        if self.clock.now().paused:
            return
        training = module.training and torch.is_grad_enabled()
        with hidden():
            self._weights.settle(parameters_of(module).values(), training=training)

    def _before_saving(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not self.clock.paused:
            self._weights.settle()

    def _loaded(self, module: nn.Module, keys: Any) -> None:
        parameters = parameters_of(module)
        for name, parameter in parameters.items():
            if parameter is not None and parameter not in self.parameter_names:
                raise ValueError(f"load_state_dict: {name} is a new parameter, not rounded: load without assign")
        if not self.clock.paused:
            self._weights.settle(parameters.values())


def _there(scheme: Scheme) -> set[str]:
    """The sites at which a scheme does anything."""
    return {site for site, rule in scheme.rules.items() if is_there(site, rule)}
