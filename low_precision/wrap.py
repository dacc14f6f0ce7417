"""The calls around any plain model and torch optimizer: `quantize_model`, `quantize_optimizer`, and what ends them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from low_precision import transforms
from low_precision.by_layer import ByLayer, lines_of
from low_precision.clock import Clock, next_seed
from low_precision.delayed import is_delayed
from low_precision.engines import choice
from low_precision.errors import SettingError, nearest, shown
from low_precision.flow import place_of, replica_of, round_flowing
from low_precision.formats import FLOAT32
from low_precision.layers import LayerRounding
from low_precision.model import LowPrecision
from low_precision.noted import Coverage, Row
from low_precision.optimizer import OptimizerRounding
from low_precision.recipe import Recipe
from low_precision.recipes import recipe_of
from low_precision.rounding import AnyRounding, Overflow, Rounding, overflow_named, rounding_named
from low_precision.rules import (
    ELEMENTWISE,
    OPERANDS,
    PRODUCTS,
    Rule,
    Spec,
    check_overflow,
    is_of_optimizer,
    overridden,
    rule_at,
    rule_of,
)
from low_precision.running import hidden
from low_precision.scheme import Quantizer, Scheme
from low_precision.torch_private import untraced, unwrapped


def quantize_model(
    model: nn.Module,
    *,
    weights: Spec | None = None,
    inputs: Spec | None = None,
    activations: Spec | None = None,
    errors: Spec | None = None,
    accumulator: Spec | None = None,
    compensation: Spec | None = None,
    elementwise: Spec | None = None,
    rounding: AnyRounding | str = Rounding.NEAREST,
    seed: int | None = None,
    layers: Iterable[str] | ByLayer | None = None,
    overflow: Overflow | str = Overflow.SATURATE,
    backend: str = "auto",
    transform: transforms.Spec | None = None,
    recipe: Recipe | str | None = None,
    **operands: Spec | None,
) -> nn.Module:
    """Round what `model` computes with, from now on: the same model, in place, weights rounded at once.

    weights, ... compensation: for each site (docs/sites.md) how it is rounded, a text "FORMAT[:ROUNDING]", a Format
    or a Rule; None: not at all. An accumulator, a master copy of the weights for the optimizer, starts from the weights
    before they are rounded; a compensation keeps what their rounding cuts off for the next update. rounding: where a
    site names none. seed: of all stochastic rounding, that of the optimizer too; None: a model takes 0, the next one of
    this process 1, and so on, and the optimizer's state_dict holds the number. layers: name patterns of the modules to
    round, see LowPrecision; or {pattern: None, or rules by site}, in order, later ones win, as layers={"head": None,
    "blocks.11.*": {"weights": "bfloat16"}}: None leaves these modules alone, and what is not named follows the model. A
    site there may be gradients, momentum or momentum.NAME too, "products", or "*": all that have a rule there so far.
    operands: what products read, by site, **{"forward.inputs": "mxfp8_e4m3"}; "products" stands for all six. One may
    name another, **{"dgrad.weights": "forward.weights>bfloat16"}. transform: what both operands of a product are
    multiplied by before they are rounded, "wgrad=hadamard16:fixed", several texts, or a dict by product.
    recipe: a name or a row of lp.RECIPES, whose rules hold where nothing else is passed; "float32" switches one of them
    off. With a recipe of operands, they are rounded of products with a weight alone: not of attention's.
    A layer or parameter that is added or replaced later: RuntimeError at the next forward pass or step, until
    quantize_model(model), without a site, takes it in. What is compiled or parallel is wrapped after, or before: both
    work, with the same noise. Raises ValueError for unknown names and a model that is rounded already, TypeError for
    parameters that are not float32.
    """
    sites = {"weights": weights, "inputs": inputs, "activations": activations, "errors": errors}
    for name in operands:
        if name not in (*OPERANDS, PRODUCTS):
            near = nearest(name, (*OPERANDS, PRODUCTS))
            hint = f" (did you mean {near}?)" if near else ""
            raise TypeError(f"quantize_model() got an unexpected keyword argument {name!r}{hint}")
    kept = {"accumulator": accumulator, "compensation": compensation, ELEMENTWISE: elementwise}
    of_operands = _rules(operands, rounding)
    of_all = {PRODUCTS: of_operands.pop(PRODUCTS)} if PRODUCTS in of_operands else {}
    row = None if recipe is None else recipe_of(recipe)
    others = (*_rules(sites | kept, rounding).items(), *of_all.items(), *of_operands.items())
    rules = overridden(_of_recipe(row, of_model=True), others)
    _check_seed(seed)
    choice.check(backend)
    plain = unwrapped(model)
    low = LowPrecision.of(plain)
    lines = lines_of(layers, rounding) if isinstance(layers, Mapping) else ()
    by_product = transforms.transforms_of(transform, _transforms_of(row))
    if low is None:
        scheme = Scheme(rules, seed, overflow_named(overflow), backend, rounding_named(rounding), lines, by_product)
        if row:
            scheme = replace(scheme, weights_only=bool(row.operands), recipe=row, smallest_state=row.smallest_state)
        LowPrecision(plain, scheme, None if isinstance(layers, Mapping) else layers)
    elif rules or row or by_product or layers is not None:
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
    rounding: AnyRounding | str | None = None,
    loss_scale: float | str | None = None,
    smallest_state: int | None = None,
    **states: Spec | None,
) -> torch.optim.Optimizer:
    """Round what `optimizer` does to a model of `quantize_model`: the same optimizer, in place.

    Each step rounds the gradients, then the optimizer's state (momentum, moments), accumulator and weights; its
    state_dict holds accumulator, compensation and the count of steps, from which all noise follows. gradients,
    momentum: as the sites of quantize_model. states: one of the optimizer's states by torch's name for it, over
    momentum: **{"momentum.exp_avg_sq": "bfloat16"}. Rules that the model's layers= has for single modules win over all
    of these. rounding: the model's unless given. Parameters that are not the model's stay in float32.
    What is not passed comes from the model's recipe, if it has one: these rules, loss_scale, smallest_state.
    loss_scale: a number (1 where nothing says another one), or "dynamic" (LossScale):
    optimizer.loss_scale.scale(loss).backward(), and before what reads gradients, as clipping does,
    optimizer.loss_scale.unscale(optimizer). A step on gradients of a loss that was not
    scaled is a RuntimeError, and so is one by torch.amp.GradScaler.
    smallest_state: a state of fewer numbers is not rounded (0 unless given); a warning names them once.
    Several optimizers may share a model. Raises ValueError for a model or an optimizer that does not fit. With the
    backend qtorch, returns qtorch's OptimLP around the optimizer.
    """
    for name in states:
        if not name.startswith("momentum."):
            raise TypeError(f"quantize_optimizer() got an unexpected keyword argument {name!r}")
    plain = unwrapped(model)
    low = LowPrecision.of(plain)
    if low is None:
        raise ValueError("quantize_optimizer: this model is not rounded: call quantize_model(model, ...) first")
    of_model = {id(p) for p in plain.parameters()}
    if not any(id(p) in of_model for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("quantize_optimizer: the optimizer has no parameter of this model: make it from parameters()")
    default = low.scheme.rounding if rounding is None else rounding
    rules = _rules({"gradients": gradients, "momentum": momentum, **states}, default)
    row = low.scheme.recipe
    of_optimizer = _of_recipe(row, of_model=False) | rules
    if loss_scale is None:
        loss_scale = row.loss_scale if row else 1.0
    smallest = low.scheme.smallest_state if smallest_state is None else smallest_state
    if isinstance(smallest, bool) or not isinstance(smallest, int) or smallest < 0:
        raise SettingError("smallest_state", shown(smallest, repr), "a whole number >= 0")
    scheme = replace(low.scheme, rules=low.scheme.rules | of_optimizer, smallest_state=smallest)
    attached = low.attach(optimizer, loss_scale, scheme)
    if isinstance(hooks := getattr(attached, "low_precision", None), OptimizerRounding):
        wanted = [(line.site, line.rule) for line in low.scheme.lines] + list(rules.items())
        hooks.wants_states = any(site == "momentum" and rule.format != FLOAT32 for site, rule in wanted)
    return attached


class Quantize(nn.Module):
    """Rounds the tensor that it is called with, anywhere in a model: quantize() with a fresh key at each call.

    spec: "FORMAT[:ROUNDING]", a Format or a Rule. backward: the same for the gradient, which else passes straight
    through. rounding: where they name none. dim, overflow, backend: as in quantize(). Training and evaluation count
    their calls apart; the counts and the seed are in the state_dict, so a resumed run goes on with the same bits, and
    what activation checkpointing computes again has the bits of the first time. seed: a whole number below 2**63;
    None: the next number of this process, which a loaded state replaces by its own. SettingError for unknown names.

        self.rounded = Quantize("float8:stochastic", seed=1)
        y = self.rounded(y)  # float32 of any shape -> the same shape
    """

    def __init__(
        self,
        spec: Spec,
        *,
        backward: Spec | None = None,
        rounding: AnyRounding | str = Rounding.NEAREST,
        seed: int | None = None,
        dim: int = -1,
        overflow: Overflow | str = Overflow.SATURATE,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_seed(seed, below=2**63)
        choice.check(backend)
        self.dim, self._has_seed = dim, seed is not None
        self.rules = {"value": rule_of(spec, rounding)} | _rules({"backward": backward}, rounding)
        overflow = overflow_named(overflow)
        for name, rule in self.rules.items():
            check_overflow(overflow, rule.format, name)
            if is_delayed(rule.format):
                raise SettingError(
                    name, rule.format.name, "a scale that needs no optimizer, whose steps move a delayed one"
                )
        self.clock = Clock(seed=next_seed() if seed is None else seed)
        self._value, self._error = (
            None if rule is None or rule.format == FLOAT32 else Quantizer(rule, names, self.clock, overflow, backend)
            for rule, names in (
                (self.rules["value"], ("Quantize", "value")),
                (self.rules.get("backward"), ("Quantize", "backward")),
            )
        )
        self._calls_before = {True: 0, False: 0}  # those of training and of evaluation before the state was loaded

    @untraced
    def forward(self, x: Tensor) -> Tensor:
        time = self.clock.now()
        if time.paused or not (self._value or (self._error and x.requires_grad)):
            return x
        replica = replica_of(self, x)
        time.calls["", self.training, replica] += 1
        passes = self._calls_before[self.training] + time.calls["", self.training, replica]
        place = place_of(x, time, passes, self.training, replica, self.dim)
        with hidden():
            return round_flowing(x, self._value, self._error, time, place)

    def get_extra_state(self) -> Tensor:
        """int64 (3,): the seed, and the calls in training and in evaluation."""
        counts = [self._calls_before[training] + self._calls(training) for training in (True, False)]
        return torch.tensor([self.clock.seed, *counts], dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        seed, in_training, in_evaluation = map(int, state)
        self.clock.seed = self.clock.seed if self._has_seed else seed
        self.clock.calls.clear()
        self._calls_before = {True: in_training, False: in_evaluation}

    def _calls(self, training: bool) -> int:
        """How many there were; each replica makes as many."""
        return max((n for (_, mode, _), n in self.clock.calls.items() if mode == training), default=0)

    def extra_repr(self) -> str:
        return ", ".join(str(rule) if name == "value" else f"{name}={rule}" for name, rule in self.rules.items())


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """`with unquantized(model):` nothing that flows through the model is rounded, and weights are used as they stand.

    Weights that are written inside, for an evaluation, are rounded at the next forward pass after it, unless those from
    before are back by then. ValueError for a model that is not rounded and has no Quantize in it.
    """
    clocks = [module.clock for module in model.modules() if isinstance(module, Quantize)]
    clocks += [low.clock for low in _roundings_in(model)]
    if not clocks:
        _rounded(model, "unquantized")
    times = [clock.now() for clock in clocks]  # inside a checkpointed part that is computed again: not the clock itself
    for time in times:
        time.paused += 1
    try:
        yield
    finally:
        for time in times:
            time.paused -= 1


def remove(model: nn.Module) -> nn.Module:
    """Take the rounding off a model of quantize_model, and off its optimizers: the same model, plain again.

    The weights stay as they are, in their format; accumulators and compensations are dropped. ValueError for a model
    that is not rounded.
    """
    roundings = _roundings_in(model) or [_rounded(model, "remove")]
    for low in roundings:
        low.remove()
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model of quantize_model without rounding, with the weights as they are.

    For an average of weights, which would be rounded itself in a copy that rounds:
    torch.optim.swa_utils.AveragedModel(plain_copy(model)). A model that is not rounded is copied as it is.
    """
    duplicate = copy.deepcopy(model)
    for low in _roundings_in(duplicate):
        low.remove()
    if any(isinstance(module, LayerRounding) for module in duplicate.modules()):
        raise ValueError("plain_copy: given a part of a rounded model, allowed: the whole of it")
    return duplicate


def coverage(model: nn.Module, *inputs: Any, **named: Any) -> Coverage:
    """What the first forward pass of a model of quantize_model rounded, of training if there was one, and what not.

    inputs, named: what the model is called with, for a forward pass that is made to look: then random states, buffers
    and the count of passes are as before. Without them the model must have been called. A module or function for each
    row: the operands of its products, its results. dgrad and wgrad are there where a gradient is needed.
    ValueError for a model that is not rounded, or was not called; of a compiled one, call the plain model first.

        print(lp.coverage(model, torch.zeros(1, 3, 32, 32)))
    """
    low = LowPrecision.of(model)
    if low is None:
        raise ValueError("coverage: this model is not rounded: quantize_model(model, ...) rounds one")
    if inputs or named:
        return Coverage(tuple(_looked(low, inputs, named)))
    notes = low.listening.notes.get(True) or low.listening.notes.get(False)
    if notes is None:
        raise ValueError("coverage: this model was not called yet: coverage(model, *inputs) calls it")
    return Coverage(tuple(notes.rows()))


def _looked(low: LowPrecision, inputs: tuple[Any, ...], named: dict[str, Any]) -> Iterable[Row]:
    """The notes of a forward pass that leaves nothing behind."""
    model, calls = low.model, Counter(low.clock.calls)
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    watcher, low.clock.watcher = low.clock.watcher, None
    try:
        with (
            torch.random.fork_rng(sorted(d for d in devices if d is not None)),
            low.clock.delayed.standing(),
            low.noting() as notes,
        ):
            model(*inputs, **named)
    finally:
        low.clock.watcher = watcher
        low.clock.calls.clear()
        low.clock.calls.update(calls)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return notes.rows()


def _check_seed(seed: int | None, below: int | None = None) -> None:
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 or (below and seed >= below):
        raise SettingError("seed", repr(seed), f"a whole number >= 0{f' and < {below}' if below else ''}, or None")


def _roundings_in(model: nn.Module) -> list[LowPrecision]:
    """Of the model, and of models inside it."""
    return [low for module in model.modules() if (low := LowPrecision.of(module)) and low.model is module]


def _rounded(model: nn.Module, call: str) -> LowPrecision:
    low = LowPrecision.of(model)
    if low is None:
        raise ValueError(f"{call}: this model is not rounded: quantize_model(model, ...) rounds one")
    return low


def _of_recipe(recipe: Recipe | None, of_model: bool) -> dict[str, Rule]:
    """A recipe's rules, those of the model or those of its optimizer; errors name the recipe and the site."""
    texts = {} if recipe is None else recipe.rules
    of_these = {site: text for site, text in texts.items() if is_of_optimizer(site) != of_model}
    try:
        return _rules(of_these, Rounding.NEAREST)
    except SettingError as error:
        assert recipe is not None
        name = f"recipe {recipe.name}: {error.setting}"
        raise SettingError(name, error.value, error.allowed, error.nearest, error.note) from None


def _transforms_of(recipe: Recipe | None) -> Mapping[str, transforms.Transform]:
    """A recipe's transforms; errors name the recipe."""
    try:
        return transforms.transforms_of(recipe.transforms if recipe else None)
    except SettingError as error:
        assert recipe is not None
        name = f"recipe {recipe.name}: {error.setting}"
        raise SettingError(name, error.value, error.allowed, error.nearest, error.note) from None


def _rules(specs: Mapping[str, Spec | None], rounding: AnyRounding | str) -> dict[str, Rule]:
    """The rules of these sites; errors name the site."""
    rules = {}
    for site, spec in specs.items():
        try:
            if spec is not None:
                rules[site] = rule_at(site, spec, rounding)
        except SettingError as error:
            name = f"{site}: {error.setting}"
            raise SettingError(name, error.value, error.allowed, error.nearest, error.note) from None
        except TypeError as error:
            raise TypeError(f"{site}: {error}") from None
    return rules
