"""What rounding would lose in formats that are not in use: tried on the tensors of this run, beside it.

Each call of a function with products is made once more on copies of what it reads, with the rules that are tried, and
so is its way back with the gradient that comes. Nothing that comes out of it goes anywhere but into sums: the noise has
a key of its own, the random state of torch is put back, and autograd's graph of the run does not know of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from low_precision import torch_private
from low_precision.calls import HALVES, Frame, ModelRun, ModuleRounding
from low_precision.clock import Clock
from low_precision.elementwise import flat
from low_precision.frames import Frames
from low_precision.functions import FUNCTIONS
from low_precision.layers import LAYER_TYPES, type_of
from low_precision.listener import Listener, Rounder
from low_precision.losses import of_update
from low_precision.noise import Key
from low_precision.rules import ALL_SITES, COUNTS, OPERANDS, Rule, check_rules, momentum_rule, rule_at, rule_of
from low_precision.running import call_in
from low_precision.scheme import Scheme
from low_precision.torch_private import untraced
from low_precision.transforms import transforms_of
from low_precision.tried import recipe_tried

_COMPILED = (
    "watch: this model is compiled, so no layer's products can be tried in another format; weights, gradients and the "
    "optimizer's state are"
)


class _Voice(Listener):
    """Listens to what is tried, and says what it is."""

    def __init__(self, hears: Listener, also: str) -> None:
        self._hears, self._also = hears, also

    @property
    def is_on(self) -> bool:
        return self._hears.is_on

    def before(self, rounder: Rounder, x: Tensor, in_place: bool, *number: object) -> Tensor | None:
        return self._hears.before(rounder, x, in_place, self._also, *number)

    def rounded(
        self, rounder: Rounder, x: Tensor, rounded: Tensor, dim: int, scale: Tensor | None, also: str = ""
    ) -> None:
        self._hears.rounded(rounder, x, rounded, dim, scale, self._also)

    def product(
        self,
        site: str,
        layer: str,
        number: tuple[object, ...],
        result: Tensor,
        exact: Callable[[], Tensor],
        also: str = "",
    ) -> None:
        self._hears.product(site, layer, (self._also, *number), result, exact, self._also)


class Tried:
    """One rule, or one recipe, that is tried: a rule at every site of `all` and all operands, a recipe at its own."""

    def __init__(self, text: str, base: Scheme, seed: int, model: nn.Module, names: Mapping[Tensor, str]) -> None:
        """base: the scheme of the run, for its overflow and its engine. names: of the parameters."""
        self.text, self._names = text, names
        recipe = recipe_tried(text)
        if recipe is None:
            rule = rule_of(text)
            self._rules: dict[str, Rule] = dict.fromkeys((*ALL_SITES, *OPERANDS), rule)
        else:
            self._rules = {site: rule_at(site, spec) for site, spec in recipe.rules.items()}
        check_rules(self._rules, base.overflow, ())
        self._smallest = recipe.smallest_state if recipe else 0
        # What flows is rounded by each site on its own, and not one after the other: what each of them would lose.
        self._scheme = Scheme(
            {site: rule for site, rule in self._rules.items() if site in OPERANDS},
            seed,
            base.overflow,
            base.backend,
            transforms=transforms_of(recipe.transforms if recipe else None),
            weights_only=recipe is not None,
        )
        self.clock = Clock(seed=Key.of(seed, "watch-also", text).value % 2**63, is_aside=True)
        self.run = ModelRun(model)
        self._modules: dict[str, ModuleRounding] = {}
        self._failed: set[tuple[str, str]] = set()  # what a warning was given of

    def move_to(self, step: int) -> None:
        """So many optimizer steps are done."""
        self.clock.move_to(step)

    def _round(self, site: str, tensor: str, x: Tensor, call: int, dim: int | None = None) -> None:
        """Rounds x at that site, where there is a rule for it. Halves are widened, as operands of products are."""
        if (rule := self._rules.get(site)) and (quantizer := self._scheme.quantizer(site, tensor, self.clock, rule)):
            try:
                quantizer(x.float() if x.dtype in HALVES else x, call, dim=dim)
            except Exception as error:  # what is only tried ends no run
                self._warn(f"{site} of {tensor}", error)

    # What flows.

    def call(
        self, frame: Frame, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Callable[[Any], None] | None:
        """Makes the call aside. Returns what is to be called with the run's own result of it."""
        row = FUNCTIONS[function]
        ghost = self._frame(frame)
        name, is_layers = ghost.name_of(row.name)
        kind = type_of(frame.module) if is_layers else None
        dim = kind.block_dim if kind else -1
        ghost.time.calls[f"{name} aside", True, ghost.replica] += 1
        number = ghost.time.calls[f"{name} aside", True, ghost.replica]
        copies, named_copies, leaves = _copied(function, arguments, named)
        for position, x in enumerate(leaves):
            if not self.run.is_weight(x, frame.module):
                self._round("inputs", f"{name}[{position}]", x.detach(), number, dim)
        result = None
        if self._scheme.rules or self._scheme.transforms:
            with _aside(leaves):
                try:
                    result = call_in(ghost, function, copies, named_copies)
                except Exception as error:
                    self._warn(name, error)
        return partial(self._ended, name, number, dim, leaves, result)

    def _ended(self, name: str, number: int, dim: int, leaves: list[Tensor], tried: Any, result: Any) -> None:
        """The run's own call is done, with that result."""
        mine = flat([tried])
        for position, y in enumerate(flat([result])):
            if not (isinstance(y, Tensor) and y.is_floating_point()):
                continue
            self._round("activations", f"{name}[{position}]", y.detach(), number, dim)
            if y.requires_grad:
                of_mine = mine[position] if position < len(mine) else None
                back = partial(self._back, f"{name}[{position}].output", number, dim, leaves, of_mine)
                y.register_hook(back)  # type: ignore[no-untyped-call]

    def _back(
        self, name: str, number: int, dim: int, leaves: list[Tensor], tried: Tensor | None, error: Tensor
    ) -> None:
        """A hook of autograd: the gradient with respect to a result has come."""
        self._round("errors", name, error.detach(), number, dim)
        wanted = [x for x in leaves if x.requires_grad]
        if not (isinstance(tried, Tensor) and tried.requires_grad and wanted):
            return
        with _aside([error]):
            try:
                gradient = error.detach().to(tried.dtype)
                torch.autograd.grad(tried, wanted, gradient, retain_graph=True, allow_unused=True)
            except Exception as failure:
                self._warn(name, failure)

    def _frame(self, frame: Frame) -> Frame:
        """The module that runs, with the rules that are tried."""
        time = self.clock.now()
        ghost = frame.tried.get(self.text)
        if ghost is None:
            name = frame.rounding.name
            if name not in self._modules:
                is_torchs = type(frame.module) in LAYER_TYPES
                self._modules[name] = ModuleRounding(
                    self._scheme, name, self.clock, self.run, frame.rounding.is_layer, is_torchs
                )
            key = name, frame.training, frame.replica
            time.calls[key] += 1
            ghost = Frame(self._modules[name], frame.module, time, frame.replica, None, own_passes=time.calls[key])
            frame.tried[self.text] = ghost
        ghost.time = time
        return ghost

    def _warn(self, name: str, error: Exception) -> None:
        """Once for each: the run goes on."""
        text = " ".join(str(error).split()) or type(error).__name__
        if (name, text) not in self._failed:
            self._failed.add((name, text))
            warnings.warn(f"watch: {self.text} could not be tried at {name}: {text}", stacklevel=2)

    # What the optimizer has.

    def gradients(self, gradients: Mapping[Tensor, Tensor], number: int) -> None:
        """The gradients, while they are scaled, before they are rounded."""
        for p, gradient in gradients.items():
            if p in self._names and gradient.layout == torch.strided:
                self._round("gradients", self._names[p], gradient, number)

    def states(self, optimizer: torch.optim.Optimizer) -> None:
        """What the optimizer remembers after its step, before that is rounded."""
        for p, state in optimizer.state.items():
            for name, value in state.items() if p in self._names else ():
                rule = momentum_rule(self._rules, name)
                is_state = torch.is_tensor(value) and value.is_floating_point() and name not in COUNTS
                if rule and is_state and value.numel() >= max(self._smallest, 1):
                    quantizer = self._scheme.quantizer("momentum", self._names[p], self.clock, rule)
                    if quantizer is not None:
                        quantizer.for_state(name)(value, list(state).index(name))

    def update(self, hears: Listener, p: Tensor, found: Tensor, made: Tensor) -> None:
        """An optimizer found a parameter and made another one of it: what of that arrives at weights of this format.

        They stand in the format before, so the update is added to what was found, rounded.
        """
        rule = self._rules.get("weights")
        quantizer = self._scheme.quantizer("weights", self._names[p], self.clock, rule) if rule else None
        if quantizer is None:
            return
        quantizer(made, 0)
        silent = quantizer.noting(False)
        before = silent(found, 1)
        exact = made.double() - found.double()
        arrived = silent((before.double() + exact).to(found.dtype), 2).double() - before.double()
        hears.tried_update(quantizer, self.text, of_update(exact, arrived))


class WhatIf:
    """All that is tried beside one run."""

    def __init__(
        self, tried: Sequence[Tried], frames: Frames, run: ModelRun, model: nn.Module, hears: Listener
    ) -> None:
        """frames, run: of the model's own rounding."""
        self.tried, self._frames, self._run, self._hears = tried, frames, run, hears
        self._seen = ExitStack()  # while all modules say when they run
        self._pass: Any = None  # Python's frame of the forward pass in which they began to
        self._said_compiled = False
        for one in tried:
            one.clock.watcher = _Voice(hears, one.text)
        self._hook = model.register_forward_pre_hook(self._before_pass)

    def remove(self) -> None:
        self.end_step()
        self._hook.remove()

    def end_step(self) -> None:
        """Nothing of this step runs any more."""
        self._seen.close()
        self._pass = None

    def _before_pass(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook of the model; torch.compile traces it, and knows that it does."""
        self._begin_pass(model, arguments, torch.compiler.is_compiling())

    @untraced
    def _begin_pass(self, model: nn.Module, arguments: tuple[Any, ...], compiled: bool) -> None:
        """Has all modules say when they run, so that their functions are seen: until the next pass or the step's end,
        because activation checkpointing runs some of them again on the way back.
        """
        if self._pass is not None and torch_private.is_running_in_a_thread(self._pass):
            return  # this pass is inside of that one, or beside it
        are_seen, self._pass = self._pass is not None, None
        call = torch_private.module_call()
        wanted = self._hears.is_on and model.training and torch.is_grad_enabled()
        if torch_private.is_replica(model):
            return
        if not wanted or call is None:
            if are_seen:  # the model's own hook has run in this pass already
                self.end_step()
                self._frames.end()
            return
        if compiled:
            if not self._said_compiled:
                self._said_compiled = True
                warnings.warn(_COMPILED, stacklevel=2)
            return
        for one in self.tried:
            one.run.begin()
        if self._run.notes is not None:  # a first pass, where they do already
            return
        self._pass = call
        if not are_seen:
            self._seen = ExitStack()
            self._seen.enter_context(self._frames.everywhere())
            self._frames.begin(arguments)

    def call(
        self, frame: Frame, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Callable[[Any], None]:
        """See Listener.try_call."""
        ends: list[Callable[[Any], None]] = []
        if frame.training and torch.is_grad_enabled() and not torch_private.transforms_are_active():
            ends = [end for one in self.tried if (end := one.call(frame, function, arguments, named))]
        return partial(_call_each, ends)


def _call_each(ends: Iterable[Callable[[Any], None]], result: Any) -> None:
    for end in ends:
        end(result)


def _copied(
    function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """The arguments with tensors that share the memory of the run's, and no graph; and these tensors.

    What the function would write to is a copy, or left out. One tensor stays one: attention asks whether q is k.
    """
    leaves: list[Tensor] = []
    known: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(copied, value))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if id(value) not in known:
            known[id(value)] = value.detach().requires_grad_(value.requires_grad)
            leaves.append(known[id(value)])
        return known[id(value)]

    copies = tuple(map(copied, arguments))
    name = getattr(function, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        copies = (copies[0].clone(), *copies[1:])
    return copies, {key: copied(value) for key, value in named.items() if key != "out"}, leaves


@contextmanager
def _aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """What is done inside leaves no trace: nobody's hooks see its graph, and torch's random state is put back."""
    devices = sorted({x.device.index or 0 for x in tensors if x.is_cuda})
    with (
        torch.random.fork_rng(devices),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        yield
