"""Rounding around any torch optimizer, by its own step and state_dict hooks.

One step: the gradients are rounded and the loss scale is divided out of them; the optimizer steps, on the accumulator
where there is one; its state, the accumulator and the weights are rounded. With a compensation (Kahan 1965), what the
rounding of the weights cut off is kept, in a format of its own, and added to the weights after the next step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from low_precision import loss_scale, torch_private
from low_precision.loss_scale import LossScale
from low_precision.scheme import Quantizer, Scheme
from low_precision.states import SavedRules, States
from low_precision.torch_private import untraced, version_of
from low_precision.weights import Weights

EXTRA_STATE = "low_precision"  # where rounding keeps its own state in the optimizer's state_dict
_FORGOTTEN = (
    "step: the gradients come from a loss that was not scaled: call optimizer.loss_scale.scale(loss).backward(), since "
    "this optimizer divides its loss scale out of them"
)
_GRAD_SCALER = (
    "torch.amp.GradScaler: it does not see what overflows in a rounded model: use quantize_optimizer(..., loss_scale="
    '"dynamic") and optimizer.loss_scale in its place'
)
_UNSCALED = "loss_scale.unscale: it was called already since the last step"
_PARTLY_SCALED = (
    "step: the gradient of {name} comes in part from a loss that was not scaled: call "
    "optimizer.loss_scale.scale(loss).backward() for each, or zero_grad() before"
)
_BACKWARD_AFTER_UNSCALE = "step: a backward pass came after loss_scale.unscale: call it after the last one"


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
        check: Callable[[], None],
    ) -> None:
        self.names, self.weights, self.scheme, self.clock = names, weights, scheme, weights.clock
        self.scale, self.check = scale, check
        self.overflowed = False  # in this step
        self.moving: list[Tensor] = []  # what this step moves: no torch optimizer moves a parameter without gradient
        self._unscaled: dict[Tensor, weakref.ref[Tensor]] = {}  # the gradients that `unscale` took, by parameter
        self._is_unscaled = self._went_back_since = False  # whether `unscale` was called, and a backward pass came then
        self._not_scaled: dict[Tensor, tuple[weakref.ref[Tensor], tuple[int, int]]] = {}  # gradients, and versions
        self._roundings = 0  # of the gradients since the last step
        self._passes = scale.passes  # that this optimizer has stepped on
        self._has_other_gradients = False  # from backward passes since then that this loss scale did not scale
        self._quantizers: dict[Tensor, Quantizer | None] = {}  # of gradients
        self.states = States(names, scheme, self.clock)
        self._saved_rules: SavedRules | None = None  # of the state that is being loaded
        self.wants_states = False  # whether it is worth a warning that the optimizer keeps none
        self._has_looked = False  # for the states that have rules
        self._watches = False  # whether each gradient is seen
        self._hooks: list[Any] = []
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        self._watches = False
        if self.scale.is_used:
            self._watch(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self.weights.optimizers.append(self)
        optimizer.loss_scale = self.scale  # type: ignore[attr-defined]
        optimizer.low_precision = self  # type: ignore[attr-defined]
        torch_private.show_grad_scaler(optimizer)
        # A torch optimizer's copy, or what is pickled of it, has lost its hooks: it would go on without rounding.
        optimizer.__reduce_ex__ = lambda protocol: (  # type: ignore[method-assign]
            _remake,
            (type(optimizer), optimizer.__getstate__(), self),
        )

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on, each gradient that a backward pass makes for this optimizer is seen."""
        if self._watches:
            return
        self._watches = True
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and p.is_leaf):
            self._hooks.append(p.register_post_accumulate_grad_hook(self._see_gradient))

    @untraced
    def _see_gradient(self, p: Tensor) -> None:
        """A hook of autograd: a backward pass has added to the gradient of this parameter."""
        self._went_back_since = True
        gradient = p.grad
        if gradient is None or not self.scale.is_used:
            return
        mine = self.scale.scales_this_pass()
        self._has_other_gradients = self._has_other_gradients or not mine
        if gradient.layout != torch.strided:
            return
        version = version_of(gradient)
        if not mine:
            self._not_scaled[p] = weakref.ref(gradient), version
        elif p in self._not_scaled:
            seen, (memory, writes) = self._not_scaled[p]
            if seen() is gradient and version == (memory, writes + 1):  # nobody has set it to 0 in between
                self._not_scaled[p] = seen, version
            else:
                del self._not_scaled[p]

    def detach(self) -> None:
        """Makes a plain torch optimizer of it again."""
        optimizer = self._optimizer() if self._optimizer else None
        self._optimizer = None
        if optimizer is None:
            return
        for hook in self._hooks:
            hook.remove()
        for name in ("loss_scale", "low_precision", "__reduce_ex__"):
            vars(optimizer).pop(name, None)
        torch_private.hide_grad_scaler(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """Without the optimizer, to which its own copy attaches this."""
        return vars(self) | {"_optimizer": None, "_hooks": [], "_unscaled": {}, "_not_scaled": {}}

    def has(self, p: Tensor) -> bool:
        """Whether the optimizer steps this parameter."""
        optimizer = self._optimizer() if self._optimizer else None
        return optimizer is not None and any(p is own for group in optimizer.param_groups for own in group["params"])

    def _quantizer(self, p: Tensor) -> Quantizer | None:
        """What rounds this parameter's gradient; None where it stays as it is."""
        if p not in self.names:
            return None
        if p not in self._quantizers:
            scheme = self.scheme.of_parameter(self.names[p])
            self._quantizers[p] = scheme.quantizer("gradients", self.names[p], self.clock)
        return self._quantizers[p]

    @untraced
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if torch_private.grad_scaler_steps(optimizer):
            raise RuntimeError(_GRAD_SCALER)
        if torch_private.backward_task() < 0:
            loss_scale.forget_passes()
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
            self._take_gradients(optimizer)
            calls += 1
            self.weights.enter(self.moving)
            return loss

        return (optimizer, low_precision_closure), {}

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """See LossScale.unscale."""
        self._forget_unscaled()
        if self._is_unscaled:
            raise RuntimeError(_UNSCALED)
        self._watch(optimizer)
        gradients = _gradients(optimizer)
        self._round_gradients(gradients)
        self._is_unscaled, self._went_back_since = True, False
        self._unscaled = {p: weakref.ref(gradient) for p, gradient in gradients.items()}

    def _forget_unscaled(self) -> None:
        """Gradients that `unscale` took and that are gone: their step was left out."""
        if self._unscaled and all(p.grad is None or gradient() is not p.grad for p, gradient in self._unscaled.items()):
            self._is_unscaled, self._unscaled = False, {}

    @torch.no_grad()
    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Rounds the gradients, then divides the loss scale out; a step that overflows is left without gradients."""
        self._forget_unscaled()
        gradients = _gradients(optimizer)
        if not self._is_unscaled:
            self._round_gradients(gradients)
        elif self._went_back_since:
            raise RuntimeError(_BACKWARD_AFTER_UNSCALE)
        self._is_unscaled, self._unscaled = False, {}
        self._passes, self._has_other_gradients = self.scale.passes, False
        self._not_scaled.clear()
        if self.overflowed:
            optimizer.zero_grad(set_to_none=True)
        self.moving = [] if self.overflowed else list(gradients)

    @torch.no_grad()
    def _round_gradients(self, gradients: dict[Tensor, Tensor]) -> None:
        """gradients: of the optimizer, by parameter."""
        quantizers = {p: self._quantizer(p) for p in gradients}
        for p, quantizer in quantizers.items():
            if quantizer and gradients[p].layout != torch.strided:
                raise RuntimeError(
                    f"gradients: given a sparse gradient of {self.names[p]}, allowed: a dense one (sparse=False), or "
                    "no rule for gradients"
                )
        if self._has_other_gradients and self.scale.passes == self._passes:
            raise RuntimeError(_FORGOTTEN)
        for p, (seen, version) in self._not_scaled.items():
            if p in gradients and seen() is gradients[p] and version == version_of(gradients[p]):
                raise RuntimeError(_PARTLY_SCALED.format(name=self.names.get(p, "a parameter")))
        call = self._roundings
        self._roundings += 1
        if self.scale.dynamic:
            beyond = [
                quantizer.beyond(gradients[p]) if quantizer else ~_values(gradients[p]).isfinite().all()
                for p, quantizer in quantizers.items()
            ]
            self.overflowed = self.scale.overflow.take(*beyond)
        if self.clock.watcher is not None and self.clock.watcher.tries:
            self.clock.watcher.try_gradients(gradients)
        for p, quantizer in quantizers.items():
            if quantizer and not self.overflowed:
                quantizer(gradients[p], call, out=gradients[p])
            if self.scale.value != 1.0:
                gradients[p].div_(self.scale.value)

    @untraced
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clock.move_to(self.clock.step + 1)
        self.clock.delayed.move()  # before what the step has made is rounded: its scales follow from the steps before
        self._roundings = 0
        if self.clock.watcher is not None and self.clock.watcher.tries:
            self.clock.watcher.try_states(optimizer)
        self.states.round(optimizer)
        self.weights.leave(self.moving)
        if self.moving and not self._has_looked:
            self._has_looked = True
            self.states.check(optimizer, self.moving, self.wants_states)
        if self.scale.dynamic:
            self.scale.update(self.overflowed)
            self.overflowed = False
        if self.clock.watcher is not None:
            self.clock.watcher.end_step()

    def _save(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if not self.clock.paused:
            self.weights.settle()  # weights that were replaced may be back, and what stood behind them with them
        extra = {
            "step": self.clock.step,
            "accumulator": {self.names[p]: master for p, master in self.weights.masters.items()},
            "compensation": {self.names[p]: lost for p, lost in self.weights.lost.items()},
            "rounded_at": {self.names[p]: when for p, when in self.weights.rounded_at.items()},
            "rounded_by": {self.names[p]: scale for p, scale in self.weights.rounded_by.items()},
            "checksums": {self.names[p]: checksum for p, checksum in self.weights.checksums().items()},
            "delayed": self.clock.delayed.state_dict(),
            "loss_scale": self.scale.state_dict(),
            "seed": self.clock.seed,
            "rules": self._rules_as_texts(),
            "smallest_state": self.scheme.smallest_state,
        }
        return state | {EXTRA_STATE: extra}

    def _rules_as_texts(self) -> dict[str, str]:
        """By site, and after them the lines, by PATTERN/SITE, in their order."""
        texts = {site: str(rule) for site, rule in self.scheme.rules.items()}
        for line in self.scheme.lines:
            left = line.left_side if line.pattern is not None else f"*/{line.site}"
            texts.pop(left, None)  # the later one of two wins, and so stands where it does
            texts[left] = str(line.rule)
        return texts

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
        for p, scale in self.weights.rounded_by.items():
            scale.copy_(extra.get("rounded_by", {}).get(self.names[p], scale))
        self.weights.forget_aside()
        checksums = extra.get("checksums", {})
        self.weights.expect({p: checksums[name] for p, name in self.names.items() if name in checksums})
        self.clock.move_to(extra["step"])
        if self.clock.watcher is not None:
            self.clock.watcher.begin(self.clock.step + 1)
        self.clock.delayed.load_state_dict(extra.get("delayed", {}))
        if self.scheme.seed is None:
            self.clock.seed = extra.get("seed", self.clock.seed)
        self.scale.load_state_dict(extra["loss_scale"])
        self._is_unscaled, self._unscaled, self._roundings = False, {}, 0
        self._saved_rules = SavedRules(extra.get("rules"), extra.get("smallest_state", 0))

    def _after_load(self, optimizer: torch.optim.Optimizer) -> None:
        self.states.round(optimizer, self._saved_rules)
        self._saved_rules = None


def has_optimizer(value: object) -> bool:
    """Whether an attribute is an optimizer, or a list, tuple or dict with one in it."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, torch.optim.Optimizer) or (
        isinstance(value, list | tuple) and any(isinstance(item, torch.optim.Optimizer) for item in value)
    )


def _gradients(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    return {p: p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None}


def _values(gradient: Tensor) -> Tensor:
    """Its numbers, without the zeros of a sparse one that are not there."""
    return gradient if gradient.layout == torch.strided else gradient.coalesce().values()


def _remake(
    kind: type[torch.optim.Optimizer], state: dict[str, Any], rounding: OptimizerRounding
) -> torch.optim.Optimizer:
    """A copied or unpickled optimizer, with our hooks again."""
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    rounding.attach(optimizer)
    return optimizer
