"""Delayed scaling: a scale that follows from the largest magnitudes of the last steps, as TransformerEngine has it.

A scale that follows from the very tensor that it scales has to wait until all of that tensor is known. A delayed one is
known beforehand. While a step lasts it stands still, and each tensor that is rounded with it is looked at: its largest
magnitude, of all micro-batches, is noted by an in-place maximum, so what activation checkpointing computes again
changes nothing. At the optimizer's step all scales move. Evaluation uses them as they stand, and notes nothing.

Source: TransformerEngine, common/recipe/delayed_scaling.cu, and the reduction in pytorch/quantization.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from low_precision import torch_private
from low_precision.formats import AnyFormat, BlockFormat
from low_precision.scales import DELAYED

_FORGOTTEN = (
    "delayed scales move at the steps of an optimizer that knows of them, and this model has none: call "
    "quantize_optimizer(optimizer, model) before training"
)
_LARGEST = torch.finfo(torch.float32).max


def is_delayed(format: AnyFormat) -> bool:
    """Whether numbers of the format have a scale that somebody has to keep."""
    return isinstance(format, BlockFormat) and format.scaling.kind == DELAYED


def largest_magnitude(x: Tensor) -> Tensor:
    """Of the numbers that are no NaN, infinities among them: float32 (); 0 where there are none."""
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float32)
    return x.detach().abs().nan_to_num_(nan=0.0, posinf=float("inf")).amax().float()


def moved(history: Tensor, scale: Tensor, newest: Tensor, scaled_largest: float, recent: bool) -> tuple[Tensor, Tensor]:
    """The histories and the scales of several tensors after a step: float32 (tensors, N) and (tensors,), both new.

    history: the largest magnitudes of the last N steps, oldest first; 0 where there were none. newest: those of this
    step. scaled_largest: the element's largest value, times 2**-margin.
    Where nothing but zeros came, the tensor counts as absent: history and scale stay. Else the scale is scaled_largest
    over the maximum of the N steps that end with this one (recent: over that of this step alone), in one float32
    division; an infinite quotient is float32's largest number. Where that maximum is infinite the scale stays.
    """
    is_there = newest != 0
    history = torch.where(is_there[:, None], torch.cat([history[:, 1:], newest[:, None]], 1), history)
    amax = newest if recent else history.amax(1)
    # By a tensor, because torch divides a number by a tensor as a product with the reciprocal, which rounds twice.
    wanted = torch.full_like(amax, scaled_largest).div(amax).clamp(max=_LARGEST)
    return history, torch.where(is_there & amax.isfinite() & (amax > 0), wanted, scale)


class Rule(NamedTuple):
    """How a scale moves. Those with equal rules move together."""

    steps: int  # N
    scaled_largest: float  # the element's largest value, times 2**-margin
    recent: bool

    @staticmethod
    def of(format: AnyFormat) -> Rule:
        assert isinstance(format, BlockFormat)
        scaling = format.scaling
        return Rule(scaling.history, format.element.largest * 2.0**-scaling.margin, scaling.recent)


class DelayedScale:
    """The scale of one tensor of one site, float32 (), and what it follows from."""

    def __init__(self, rule: Rule, device: torch.device) -> None:
        self.rule = rule
        with torch.inference_mode(False):  # a tensor made there could never be written to in training
            self.scale, self.amax = torch.ones((), device=device), torch.zeros((), device=device)
            self.history = torch.zeros(rule.steps, device=device)
        self._others: dict[torch.device, tuple[Tensor, Tensor]] = {}  # scale and amax for replicas of other devices

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scale and amax there. Each device has its own: replicas run in threads of their own."""
        if device == self.scale.device:
            return self.scale, self.amax
        if device not in self._others:
            self._others[device] = self.scale.to(device), torch.zeros((), device=device)
        return self._others[device]

    def newest(self) -> Tensor:
        """The largest magnitude of this step on all devices, which forget it."""
        for _, amax in self._others.values():
            torch.maximum(self.amax, amax.to(self.amax.device), out=self.amax)
            amax.zero_()
        newest = self.amax.clone()
        self.amax.zero_()
        return newest

    def set(self, history: Tensor, scale: Tensor) -> None:
        self.history.copy_(history)
        for mine in (self.scale, *(scale_there for scale_there, _ in self._others.values())):
            mine.copy_(scale)

    def state_dict(self) -> dict[str, Any]:
        """scale, amax, float32 (), and history, float32 (N,); and what else its rule says."""
        for _, amax in self._others.values():
            torch.maximum(self.amax, amax.to(self.amax.device), out=self.amax)
        tensors = {"scale": self.scale.clone(), "amax": self.amax.clone(), "history": self.history.clone()}
        return {**tensors, "scaled_largest": self.rule.scaled_largest, "recent": self.rule.recent}

    @staticmethod
    def loaded(state: Mapping[str, Any], rule: Rule | None = None) -> DelayedScale:
        """From what state_dict gave, with another rule where one is given."""
        rule = rule or Rule(len(state["history"]), float(state["scaled_largest"]), bool(state["recent"]))
        scale = DelayedScale(rule, state["scale"].device)
        scale.load_state_dict(state)
        return scale

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a longer or shorter history, the last steps."""
        for _, amax in self._others.values():
            amax.zero_()
        steps = self.rule.steps
        history = torch.cat([self.history.new_zeros(steps), state["history"].to(self.history.device)])[-steps:]
        self.amax.copy_(state["amax"])
        self.set(history, state["scale"])


class DelayedScales:
    """The delayed scales of one model, by site and tensor; its clock has them."""

    def __init__(self) -> None:
        self.is_used = False  # whether a rule of the model has such a scale
        self.over_processes = True  # whether all processes of torch.distributed train this model
        self._scales: dict[str, DelayedScale] = {}  # of what was noted so far
        self._is_standing = False
        self._has_trained = False

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_has_trained": False, "_is_standing": False}  # a copy gets an optimizer of its own

    def read(self, name: str, format: AnyFormat, x: Tensor, notes: bool) -> Tensor:
        """The scale for x, float32 () on its device, as this step has it. notes: whether it learns of x."""
        notes = notes and not self._is_standing
        known, rule = self._scales.get(name), Rule.of(format)
        if known is None or known.rule != rule:
            known = DelayedScale.loaded(known.state_dict(), rule) if known else DelayedScale(rule, x.device)
            if notes:
                self._scales[name] = known
        scale, amax = known.on(x.device)
        if notes and not torch_private.is_fake(x):
            self._note(amax, x)
        return scale

    @torch.no_grad()
    def _note(self, amax: Tensor, x: Tensor) -> None:
        if torch_private.transforms_are_active():
            x = torch_private.without_wrappers(x)  # of vmap: all samples, whose largest is that of each one noted alone
            with torch_private.without_transforms():
                amax.copy_(torch.maximum(amax, largest_magnitude(x)))
        else:
            amax.copy_(torch.maximum(amax, largest_magnitude(x)))

    def begin_pass(self, has_optimizer: bool) -> None:
        """A training pass begins. RuntimeError for the second one of a model whose optimizer knows nothing of us."""
        if self._is_standing:
            return
        if self._has_trained and self._scales and not has_optimizer:
            raise RuntimeError(_FORGOTTEN)
        self._has_trained = True

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Inside, nothing is noted."""
        before, self._is_standing = self._is_standing, True
        try:
            yield
        finally:
            self._is_standing = before

    @torch.no_grad()
    def move(self) -> None:
        """An optimizer has stepped: each scale follows from what was noted since the last step, in all processes.

        A tensor of which nothing came keeps its scale, so of two optimizers of a model the second one moves nothing.
        """
        if not self.is_used:
            return
        names = sorted(self._scales)
        if self.over_processes and torch_private.process_count() > 1:
            newest = _over_processes({name: self._scales[name].newest() for name in names})
        else:
            newest = {name: self._scales[name].newest() for name in names}
        alike: dict[tuple[Rule, torch.device], list[str]] = {}
        for name in names:
            known = self._scales[name]
            alike.setdefault((known.rule, known.scale.device), []).append(name)
        for (rule, _), group in alike.items():
            scales = [self._scales[name] for name in group]
            histories, moved_scales = moved(
                torch.stack([known.history for known in scales]),
                torch.stack([known.scale for known in scales]),
                torch.stack([newest[name] for name in group]),
                rule.scaled_largest,
                rule.recent,
            )
            for known, history, scale in zip(scales, histories, moved_scales, strict=True):
                known.set(history, scale)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """By site and tensor."""
        return {name: known.state_dict() for name, known in self._scales.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """A tensor that is not in it begins anew."""
        self._scales = {name: DelayedScale.loaded(saved) for name, saved in state.items()}


def _over_processes(newest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The largest of each in all processes of torch.distributed, by name; all of them have to call this."""
    names = list(newest)
    device = newest[names[0]].device if names else torch.device("cpu")
    fingerprint = zlib.crc32("\n".join(names).encode())
    bounds = torch.tensor([fingerprint, -fingerprint], device=device)
    torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX)
    if int(bounds[0]) == -int(bounds[1]):  # all have the same tensors
        if not names:
            return {}
        together = torch.stack([newest[name].to(device) for name in names])
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
        return {name: together[i].to(newest[name].device) for i, name in enumerate(names)}
    everywhere: list[Any] = [None] * torch_private.process_count()
    torch.distributed.all_gather_object(everywhere, {name: float(amax) for name, amax in newest.items()})
    return {
        name: torch.full_like(amax, max(theirs.get(name, 0.0) for theirs in everywhere))
        for name, amax in newest.items()
    }
