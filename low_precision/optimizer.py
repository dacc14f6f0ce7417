"""Rounding around any torch optimizer, by its own step and state_dict hooks.

One step: the gradients are rounded and the loss scale is divided out of them; the optimizer steps, on the accumulator
where there is one; its state, the accumulator and the weights are rounded. With a compensation (Kahan 1965), what the
rounding of the weights cut off is kept, in a format of its own, and added to the weights after the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from low_precision.loss_scale import LossScale, OverflowWatch
from low_precision.scheme import Quantizer, Scheme
from low_precision.torch_private import untraced
from low_precision.weights import Weights

COUNTS = ("step", "mu_product", "mu", "eta")  # of an optimizer's state, what says how far it is: no moment to round
EXTRA_STATE = "low_precision"  # where rounding keeps its own state in the optimizer's state_dict


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
        scheme: Scheme,
        scale: LossScale,
        overflow: OverflowWatch,
        check: Callable[[], None],
    ) -> None:
        self.names, self.weights, self.scheme, self.clock = names, weights, scheme, weights.clock
        self.scale, self.overflow, self.check = scale, overflow, check
        self.overflowed = False  # in this step
        self.moving: list[Tensor] = []  # what this step moves: no torch optimizer moves a parameter without gradient
        self._quantizers: dict[tuple[str, Tensor], Quantizer | None] = {}
        overflow.active = scale.dynamic

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)
        optimizer.register_load_state_dict_post_hook(self._round_state)
        optimizer.loss_scale = self.scale  # type: ignore[attr-defined]
        # A torch optimizer's copy, or what is pickled of it, has lost its hooks: it would go on without rounding.
        optimizer.__reduce_ex__ = lambda protocol: (  # type: ignore[method-assign]
            _remake,
            (type(optimizer), optimizer.__getstate__(), self),
        )

    def _quantizer(self, site: str, p: Tensor) -> Quantizer | None:
        """What rounds this parameter's gradient or momentum; None where it stays as it is."""
        if p not in self.names:
            return None
        if (site, p) not in self._quantizers:
            self._quantizers[site, p] = self.scheme.quantizer(site, self.names[p], self.clock)
        return self._quantizers[site, p]

    @untraced
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
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
        gradients = {p: p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        quantizers = {p: self._quantizer("gradients", p) for p in gradients}
        if self.scale.dynamic:
            beyond = [
                quantizer.beyond(gradients[p]) if quantizer else ~gradients[p].isfinite().all()
                for p, quantizer in quantizers.items()
            ]
            self.overflowed = self.overflow.take(*beyond)
            if self.overflowed:
                optimizer.zero_grad(set_to_none=True)
                self.moving = []
                return
        self.moving = list(gradients)
        for p, quantizer in quantizers.items():
            if quantizer:
                quantizer(gradients[p], call, out=gradients[p])
            if self.scale.value != 1.0:
                gradients[p].div_(self.scale.value)

    @untraced
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
            if quantizer is None:
                continue
            for call, (name, value) in enumerate(state.items()):
                if torch.is_tensor(value) and name not in COUNTS:
                    quantizer(value, call, out=value)

    def _save(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        extra = {
            "step": self.clock.step,
            "accumulator": {self.names[p]: master for p, master in self.weights.masters.items()},
            "compensation": {self.names[p]: lost for p, lost in self.weights.lost.items()},
            "rounded_at": {self.names[p]: when for p, when in self.weights.rounded_at.items()},
            "loss_scale": self.scale.state_dict(),
        }
        return state | {EXTRA_STATE: extra}

    @torch.no_grad()
    def _load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
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


def _remake(
    kind: type[torch.optim.Optimizer], state: dict[str, Any], rounding: OptimizerRounding
) -> torch.optim.Optimizer:
    """A copied or unpickled optimizer, with our hooks again."""
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    rounding.attach(optimizer)
    return optimizer
