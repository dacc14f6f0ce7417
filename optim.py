"""Rounding around any torch optimizer, by its own step and state_dict hooks; loss scaling; optimizers that start fast.

One step: the gradients are rounded and the loss scale is divided out of them; the optimizer steps, on the accumulator
where there is one; its state, the accumulator and the weights are rounded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    """The weights of a model, in their format at all times, and the accumulator behind them where there is one.

    weights: what rounds each parameter. accumulator: what rounds each parameter's master copy, None for a master copy
    in float32; a parameter that is in neither is left alone.
    """

    def __init__(self, weights: dict[Tensor, Callable], accumulator: dict[Tensor, Callable | None], clock: Any) -> None:
        self.weights, self.accumulator, self.clock = weights, accumulator, clock
        self.masters = {p: p.detach().clone() for p in accumulator}
        self.rounded_at: dict[Tensor, int] = {}  # the step whose noise is in the weight: not every step moves it
        self._seen: dict[Tensor, tuple] = {}
        for p in self.weights | self.masters:
            self._take(p)

    def _weight(self, p: Tensor, call: int = 0) -> Tensor:
        """What the parameter is, or should be: its accumulator, or what it is now, rounded."""
        value = self.masters.get(p, p)
        return self.weights[p](value, call, self.rounded_at[p]) if p in self.weights else value

    @torch.no_grad()
    def _take(self, p: Tensor, call: int = 0) -> None:
        """Takes over what the parameter is now: rounded, through the accumulator where there is one."""
        self.rounded_at[p] = self.clock.step
        if p in self.masters:
            round_ = self.accumulator[p]
            self.masters[p].copy_(round_(p, call) if round_ else p)
        p.copy_(self._weight(p, call))
        self._seen[p] = _version(p)

    @torch.no_grad()
    def settle(self) -> None:
        """Takes over weights that were set from outside: rounded, and the accumulator with them.

        An accumulator that rounds to just these weights stays: it came with them, from a checkpoint.
        """
        for p, seen in self._seen.items():
            if _version(p) == seen:
                continue
            if p in self.masters and torch.equal(p, self._weight(p)):
                self._seen[p] = _version(p)
            else:
                self._take(p)

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
                self._take(p, call)


def _version(p: Tensor) -> tuple[int, int]:
    """Changes when somebody writes to the parameter, in place or by giving it other memory."""
    return p.data_ptr(), p._version


class OptimizerRounding:
    """The hooks on one optimizer.

    names: the parameters that are rounded; any other of the optimizer's stays in float32. gradients, momentum: what
    rounds each of them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: dict[Tensor, str],
        weights: Weights,
        gradients: dict[Tensor, Callable],
        momentum: dict[Tensor, Callable],
        clock: Any,
        scale: LossScale,
    ) -> None:
        self.names, self.weights, self.gradients, self.momentum = names, weights, gradients, momentum
        self.clock, self.scale, self.overflowed = clock, scale, False
        self.moving: list[Tensor] = []  # what this step moves: no torch optimizer moves a parameter without gradient
        clock.watch = scale.dynamic
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)
        optimizer.register_load_state_dict_post_hook(self._round_state)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
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
            calls += 1
            loss = closure()
            self._take_gradients(optimizer)
            self.weights.enter(self.moving)
            return loss

        return (optimizer, low_precision_closure), {}

    @torch.no_grad()
    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Rounds the gradients, then divides the loss scale out; a step that overflows is left without gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.scale.dynamic:
            found = [] if self.clock.overflowed is None else [self.clock.overflowed]
            for p in parameters:
                found.append(self.gradients[p].beyond(p.grad) if p in self.gradients else ~p.grad.isfinite().all())
            self.clock.overflowed = None
            self.overflowed = any(bool(flag) for flag in found)
            if self.overflowed:
                optimizer.zero_grad(set_to_none=True)
                self.moving = []
                return
        self.moving = parameters
        for p in parameters:
            if p in self.gradients:
                p.grad.copy_(self.gradients[p](p.grad))
            if self.scale.value != 1.0:
                p.grad.div_(self.scale.value)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.clock.move_to(self.clock.step + 1)
        self._round_state(optimizer)
        self.weights.leave(self.moving)
        if self.scale.dynamic:
            self.scale.update(self.overflowed)

    @torch.no_grad()
    def _round_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Rounds what the optimizer remembers of each parameter: momentum and moments, not its step count."""
        for p, quantizer in self.momentum.items():
            for call, (name, value) in enumerate(optimizer.state.get(p, {}).items()):
                if name != "step" and torch.is_tensor(value) and value.shape == p.shape:
                    value.copy_(quantizer(value, call))

    def _save(self, optimizer: torch.optim.Optimizer, state: dict) -> dict:
        extra = {
            "step": self.clock.step,
            "accumulator": {self.names[p]: master for p, master in self.weights.masters.items()},
            "rounded_at": {self.names[p]: step for p, step in self.weights.rounded_at.items()},
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
        for p in self.weights.rounded_at:
            self.weights.rounded_at[p] = extra["rounded_at"].get(self.names[p], extra["step"])
        self.clock.move_to(extra["step"])
        self.scale.load_state_dict(extra["loss_scale"])
