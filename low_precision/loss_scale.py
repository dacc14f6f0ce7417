"""Loss scaling: a factor on the loss, and the watch for what overflows."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from low_precision import torch_private
from low_precision.errors import SettingError, nearest, shown

if TYPE_CHECKING:
    from low_precision.scheme import Quantizer

INITIAL_SCALE = 65536.0  # torch.amp's numbers, as the growth interval
GROWTH_INTERVAL = 2000  # steps without an overflow, after which the scale is doubled
SMALLEST_SCALE = 2.0**-24


class LossScale:
    """A factor on the loss that keeps small errors above the format's smallest value; divided out before the optimizer.

    scale: a number above 0, or "dynamic": from 65536, halved after a step whose errors or gradients overflow or are
    not finite (that step is skipped), doubled after 2000 steps without (Micikevicius et al. 2018; torch.amp's numbers).
    SettingError for anything else.
    A backward pass belongs to the loss scale that scaled its loss: an error that overflows is noted there, whichever
    model it is in.

        loss_scale.scale(loss).backward()
        loss_scale.unscale(optimizer)  # only where something reads the gradients before the step
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    """

    def __init__(self, scale: float | str = 1.0) -> None:
        self.dynamic = scale == "dynamic"
        if isinstance(scale, str):
            if not self.dynamic:
                raise SettingError("loss scale", repr(scale), "a number > 0, or dynamic", nearest(scale, ("dynamic",)))
            scale = INITIAL_SCALE
        elif isinstance(scale, bool) or not (isinstance(scale, int | float) and 0 < scale <= sys.float_info.max):
            raise SettingError("loss scale", shown(scale, repr), "a number > 0, or dynamic")
        self.value = float(scale)
        self.clean_steps = 0  # since the scale last moved
        self.skipped = 0
        self.passes = 0  # backward passes of losses that this scaled
        self.overflow = OverflowWatch()

    @property
    def is_used(self) -> bool:
        """Whether scaling does anything: a fixed scale of 1 does not."""
        return self.dynamic or self.value != 1.0

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward() on."""
        return self._scaled(loss) if self.is_used else loss

    @torch_private.untraced
    def _scaled(self, loss: Tensor) -> Tensor:
        scaled = loss * self.value
        if scaled.requires_grad:
            scaled.register_hook(self._begin_pass)  # type: ignore[no-untyped-call]
        return scaled

    @torch_private.untraced
    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Rounds the gradients of `optimizer` and divides the scale out of them, before its step does.

        Call it once, after the last backward pass before a step, where something reads or changes the gradients:
        clipping, logging, noise. What it makes of them is not rounded again. Gradients that overflowed are divided
        and not rounded, and the step is skipped, as torch.amp.GradScaler does. ValueError for an optimizer that has
        another loss scale, RuntimeError for a second call before the step.
        """
        rounding = getattr(optimizer, "low_precision", None)
        if rounding is None or getattr(optimizer, "loss_scale", None) is not self:
            raise ValueError(
                "loss_scale.unscale: given an optimizer that has not this loss scale, allowed: one of "
                "quantize_optimizer, whose loss_scale this is"
            )
        rounding.unscale(optimizer)

    def scales_this_pass(self) -> bool:
        """Whether this scaled the loss of the backward pass that is running."""
        return self in _scales_of_this_pass()

    def update(self, overflowed: bool) -> None:
        """Ends one step of dynamic scaling."""
        self.clean_steps = 0 if overflowed else self.clean_steps + 1
        if overflowed:
            self.skipped += 1
            self.value = max(self.value / 2, SMALLEST_SCALE)
        elif self.clean_steps == GROWTH_INTERVAL:
            self.value, self.clean_steps = self.value * 2, 0

    def state_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "clean_steps": self.clean_steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.value = float(state["value"])
        self.clean_steps, self.skipped = int(state["clean_steps"]), int(state["skipped"])

    def _begin_pass(self, gradient: Tensor) -> None:
        """A hook on the scaled loss: a backward pass begins."""
        self.passes += 1
        task = torch_private.backward_task()
        this_pass = _passes.get(task)
        if this_pass is None:
            this_pass = _passes[task] = _Pass()
            if not torch_private.keep_during_backward(this_pass):
                _kept.append(this_pass)
        this_pass.scales[self] = None


class _Pass:
    """A backward pass that is running: it lives until the pass ends."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.scales: dict[LossScale, None] = {}  # those of its losses


# By torch's number of each.
_passes: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()
_kept: list[_Pass] = []  # where torch does not keep them


def forget_passes() -> None:
    """No backward pass is running in this thread."""
    _kept.clear()


def _scales_of_this_pass() -> list[LossScale]:
    """The loss scales of the backward pass that is running. Activation checkpointing starts a pass within a pass, which
    has a number of its own: it belongs to the last one of this thread that scaled a loss.
    """
    if not _passes:
        return []
    this_pass = _passes.get(torch_private.backward_task())
    if this_pass is None:
        running = [one for reference in _passes.valuerefs() if (one := reference()) is not None]
        here = threading.get_ident()
        in_this_thread = [one for one in running if one.thread == here]
        # A thread that is none of Python's is autograd's, for a device: it works for the passes of all threads.
        if not in_this_thread and here not in {thread.ident for thread in threading.enumerate()}:
            in_this_thread = running
        this_pass = in_this_thread[-1] if in_this_thread else None
    return list(this_pass.scales) if this_pass else []


def note_error(quantizer: Quantizer, error: Tensor) -> Tensor | None:
    """Notes an overflow where a dynamic loss scale scaled the loss of this backward pass.

    error: what `quantizer` is about to round. Returns None, or bool (): whether the error has to become NaN. That is so
    where other processes have to skip the step too, and gradients are all that reaches them.
    """
    dynamic = [scale for scale in _scales_of_this_pass() if scale.dynamic]
    if not dynamic or quantizer.clock.is_aside:
        return None
    beyond = quantizer.beyond(error)
    alone = torch_private.process_count() == 1
    for scale in dynamic:
        if alone or scale.overflow.over_processes:
            scale.overflow.note(beyond)
    return None if all(alone or scale.overflow.over_processes for scale in dynamic) else beyond


class OverflowWatch:
    """Whether an error was beyond its format since the last step; looked at only where dynamic loss scaling asks."""

    def __init__(self) -> None:
        self.over_processes: Callable[[bool], bool] | None = None  # one process's answer -> whether any of them says so
        # bool () by device. Each device has a place of its own: replicas go back in threads of their own.
        self._overflowed: dict[torch.device, Tensor] = {}

    def note(self, overflowed: Tensor) -> None:
        """Adds what was seen of one error, bool (), without waiting for its device."""
        before = self._overflowed.get(overflowed.device)
        self._overflowed[overflowed.device] = overflowed if before is None else before | overflowed

    def take(self, *further: Tensor) -> bool:
        """Whether there was an overflow in any process, or is one in `further`, bool () each; then forgets it."""
        overflowed = any(bool(flag) for flag in (*self._overflowed.values(), *further))
        self._overflowed.clear()
        return self.over_processes(overflowed) if self.over_processes else overflowed
