"""Rounding around any torch optimizer, by its own step and state_dict hooks; loss scaling; optimizers that start fast.

One step: the gradients are rounded and the loss scale is divided out of them; the optimizer steps, on the accumulator
where there is one; its state, the accumulator and the weights are rounded. With a compensation (Kahan 1965), what the
rounding of the weights cut off is kept, in a format of its own, and added to the weights after the next step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from low_precision.torch_private import untraced

_OUTSIDE = 2**32  # calls above are of weights set from outside, those below of an optimizer's closures
COUNTS = ("step", "mu_product", "mu", "eta")  # of an optimizer's state, what says how far it is: no moment to round
EXTRA_STATE = "low_precision"  # where rounding keeps its own state in the optimizer's state_dict


def lean(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of torch's optimizer `kind` that does the same to the bit and starts a second or two sooner.

    Torch wraps these five methods for the sake of torch.compile, in wrappers that import torch._dynamo when an
    optimizer is made: most of the time of a small run. Nothing is compiled here, so the subclass has the methods
    themselves. What `step`'s wrapper does besides, it does too: gradients are recorded only if "differentiable".
    """
    step = inspect.unwrap(kind.step)

    def lean_step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return step(self, *args, **kwargs)

    others = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in others} | {"step": lean_step}
    return type(kind.__name__, (kind,), methods)


class LossScale:
    """A factor on the loss that keeps small errors above the format's smallest value; divided out before the optimizer.

    scale: a number above 0, or "dynamic": from 65536, halved after a step whose errors or gradients overflow or are
    not finite (that step is skipped), doubled after 2000 steps without (Micikevicius et al. 2018; torch.amp's numbers).
    """

    def __init__(self, scale: float | str = 1.0) -> None:
        self.dynamic = scale == "dynamic"
        if not self.dynamic and not (isinstance(scale, int | float) and 0 < scale < float("inf")):
            raise ValueError(f"loss scale: given {scale!r}, allowed: a number > 0, or dynamic")
        self.value = 65536.0 if self.dynamic else float(scale)
        self.clean_steps = 0  # since the scale last moved
        self.skipped = 0

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward() on."""
        return loss if self.value == 1.0 else loss * self.value

    def update(self, overflowed: bool) -> None:
        """Ends one step of dynamic scaling."""
        self.clean_steps = 0 if overflowed else self.clean_steps + 1
        if overflowed:
            self.skipped += 1
            self.value = max(self.value / 2, 2.0**-24)
        elif self.clean_steps == 2000:
            self.value, self.clean_steps = self.value * 2, 0

    def state_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "clean_steps": self.clean_steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.value, self.clean_steps, self.skipped = state["value"], state["clean_steps"], state["skipped"]


class Weights:
    """The weights of a model, in their format at all times, and the accumulator behind them where there is one."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.weights: dict[Tensor, Callable] = {}
        self.accumulator: dict[Tensor, Callable | None] = {}
        self.compensation: dict[Tensor, Callable | None] = {}
        self.masters: dict[Tensor, Tensor] = {}
        self.lost: dict[Tensor, Tensor] = {}  # what the compensation holds
        self.rounded_at: dict[Tensor, tuple[int, int]] = {}  # step and call whose noise is in the weight
        self._seen: dict[Tensor, tuple] = {}

    def add(
        self,
        weights: dict[Tensor, Callable],
        accumulator: dict[Tensor, Callable | None] | None = None,
        compensation: dict[Tensor, Callable | None] | None = None,
    ) -> None:
        """Takes in parameters, rounded at once.

        weights: what rounds each of them. accumulator, compensation: what rounds each one's master copy, and what is
        kept of it, None for float32; a parameter that is in none of the three is left alone.
        """
        accumulator, compensation = accumulator or {}, compensation or {}
        self.weights |= weights
        self.accumulator |= accumulator
        self.compensation |= compensation
        with torch.inference_mode(False):  # a tensor made there could never be trained
            self.masters |= {p: p.detach().clone() for p in accumulator}
            self.lost |= {p: torch.zeros_like(p, requires_grad=False) for p in compensation}
        for p in weights | accumulator:
            self._take(p)

    def drop(self, p: Tensor) -> None:
        """Forgets a parameter that its model has no more."""
        kept = (self.accumulator, self.compensation, self.masters, self.lost)
        for held in (self.weights, *kept, self.rounded_at, self._seen):
            held.pop(p, None)

    def _weight(self, p: Tensor, out: Tensor | None = None) -> Tensor:
        """What the parameter is, or should be: its accumulator, or what it is now, rounded, into `out` if given."""
        value = self.masters.get(p, p)
        step, call = self.rounded_at[p]
        if p in self.weights:
            return self.weights[p](value, call, step, out=out)
        return value if out is None else out.copy_(value)

    @torch.no_grad()
    def _take(self, p: Tensor, call: int = 0, compensate: bool = False) -> None:
        """Takes over what the parameter is now: rounded, through the accumulator where there is one.

        compensate: with what the last such rounding cut off; else there is nothing to add any more.
        """
        self.rounded_at[p] = self.clock.step, call
        if p in self.lost:
            wanted = p + self.lost[p] if compensate else p
            rounded = self._weight(p.copy_(wanted))
            lost = self.lost[p].copy_(wanted - rounded) if compensate else self.lost[p].zero_()
            if round_ := self.compensation[p]:
                round_(lost, call, out=lost)
            p.copy_(rounded)
            self._seen[p] = _version(p)
            return
        if p in self.masters:
            round_, master = self.accumulator[p], self.masters[p]
            if round_:
                round_(p, call, out=master)
            else:
                master.copy_(p)
        self._weight(p, out=p)
        self._seen[p] = _version(p)

    @torch.no_grad()
    def settle(self, parameters: Iterable[Tensor | None] | None = None) -> None:
        """Takes over weights, all of them or these, that were set from outside: rounded, and the accumulator with them.

        An accumulator that rounds to just these weights stays: it came with them, from a checkpoint; and so does a
        compensation, where the weights are numbers of their format.
        """
        for p in list(self._seen) if parameters is None else parameters:
            if p not in self._seen or _version(p) == self._seen[p]:
                continue
            for kept in (self.masters, self.lost):
                if p in kept:
                    kept[p] = kept[p].to(p.device)  # the model may have been moved
            if torch.equal(p, self._weight(p)):
                self._seen[p] = _version(p)
            else:  # fresh noise each time: no step of ours may ever come between two of them
                self.clock.writes += 1
                self._take(p, _OUTSIDE + self.clock.writes)

    @torch.no_grad()
    def enter(self, parameters: list[Tensor]) -> None:
        """Puts the accumulator where the optimizer finds these parameters."""
        for p in parameters:
            if p in self.masters:
                p.copy_(self.masters[p])

    def leave(self, parameters: list[Tensor], call: int = 0) -> None:
        """Takes over what the optimizer made of these parameters."""
        for p in parameters:
            if p in self._seen:
                self._take(p, call, compensate=True)


def _version(p: Tensor) -> tuple[int, int]:
    """Changes when somebody writes to the parameter, in place or by giving it other memory."""
    return p.data_ptr(), 0 if p.is_inference() else p._version


class OptimizerRounding:
    """The hooks on one optimizer.

    names: the parameters that are rounded, more of them perhaps later; any other of the optimizer's stays in float32.
    scheme: makes what rounds gradients and momentum. check: raises where the model has got parameters that are not
    rounded.
    """

    def __init__(
        self,
        names: dict[Tensor, str],
        weights: Weights,
        scheme: Any,
        clock: Any,
        scale: LossScale,
        check: Callable[[], None],
    ) -> None:
        self.names, self.weights, self.scheme = names, weights, scheme
        self.clock, self.scale, self.check, self.overflowed = clock, scale, check, False
        self.moving: list[Tensor] = []  # what this step moves: no torch optimizer moves a parameter without gradient
        self._made: dict[tuple[str, Tensor], Callable | None] = {}
        clock.watch = scale.dynamic

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)
        optimizer.register_load_state_dict_post_hook(self._round_state)
        optimizer.loss_scale = self.scale
        # A torch optimizer's copy, or what is pickled of it, has lost its hooks: it would go on without rounding.
        optimizer.__reduce_ex__ = lambda protocol: (_remake, (type(optimizer), optimizer.__getstate__(), self))

    def _quantizer(self, site: str, p: Tensor) -> Any:
        """What rounds this parameter's gradient or momentum; None where it stays as it is."""
        if p not in self.names:
            return None
        if (site, p) not in self._made:
            self._made[site, p] = self.scheme.quantizer(site, self.names[p], self.clock)
        return self._made[site, p]

    @untraced
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        self.check()
        self.weights.settle()
        if closure is None:
            self._take_gradients(optimizer)
            self.weights.enter(self.moving)
            return None
        calls = 0

        def low_precision_closure() -> Any:
            nonlocal calls
            if calls:  # the optimizer has moved the parameters since: round them as after a step
                self.weights.leave(self.moving, calls)
            loss = closure()
            self._take_gradients(optimizer, calls)
            calls += 1
            self.weights.enter(self.moving)
            return loss

        return (optimizer, low_precision_closure), {}

    @torch.no_grad()
    def _take_gradients(self, optimizer: torch.optim.Optimizer, call: int = 0) -> None:
        """Rounds the gradients, then divides the loss scale out; a step that overflows is left without gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        quantizers = {p: self._quantizer("gradients", p) for p in parameters}
        if self.scale.dynamic:
            found = list(self.clock.overflowed.values())
            for p, quantizer in quantizers.items():
                found.append(quantizer.beyond(p.grad) if quantizer else ~p.grad.isfinite().all())
            self.clock.overflowed.clear()
            self.overflowed = any(bool(flag) for flag in found)
            if self.clock.any_overflowed:
                self.overflowed = self.clock.any_overflowed(self.overflowed)
            if self.overflowed:
                optimizer.zero_grad(set_to_none=True)
                self.moving = []
                return
        self.moving = parameters
        for p, quantizer in quantizers.items():
            if quantizer:
                quantizer(p.grad, call, out=p.grad)
            if self.scale.value != 1.0:
                p.grad.div_(self.scale.value)

    @untraced
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.clock.move_to(self.clock.step + 1)
        self._round_state(optimizer)
        self.weights.leave(self.moving)
        if self.scale.dynamic:
            self.scale.update(self.overflowed)

    @torch.no_grad()
    def _round_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Rounds what the optimizer remembers of each parameter: momentum and moments, not its counts."""
        for p, state in optimizer.state.items():
            quantizer = self._quantizer("momentum", p)
            for call, (name, value) in enumerate(state.items() if quantizer else ()):
                if torch.is_tensor(value) and name not in COUNTS:
                    quantizer(value, call, out=value)

    def _save(self, optimizer: torch.optim.Optimizer, state: dict) -> dict:
        extra = {
            "step": self.clock.step,
            "accumulator": {self.names[p]: master for p, master in self.weights.masters.items()},
            "compensation": {self.names[p]: lost for p, lost in self.weights.lost.items()},
            "rounded_at": {self.names[p]: when for p, when in self.weights.rounded_at.items()},
            "loss_scale": self.scale.state_dict(),
        }
        return state | {EXTRA_STATE: extra}

    @torch.no_grad()
    def _load(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Takes over a state that we saved; one without an accumulator starts it from the weights.

        A state without ours, of a plain float32 optimizer, is taken as it is.
        """
        extra = state.get(EXTRA_STATE)
        if extra is None:
            return
        for p, master in self.weights.masters.items():
            master.copy_(extra["accumulator"].get(self.names[p], p))
        for p, lost in self.weights.lost.items():
            lost.copy_(extra.get("compensation", {}).get(self.names[p], torch.zeros(())))
        for p in self.weights.rounded_at:
            self.weights.rounded_at[p] = extra["rounded_at"].get(self.names[p], (extra["step"], 0))
        self.clock.move_to(extra["step"])
        self.scale.load_state_dict(extra["loss_scale"])


def _remake(kind: type, state: dict, rounding: OptimizerRounding) -> torch.optim.Optimizer:
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    rounding.attach(optimizer)
    return optimizer
