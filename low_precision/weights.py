"""The weights of a model, in their format at all times, and what stands behind them: accumulator or compensation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from low_precision import stored
from low_precision.clock import Clock
from low_precision.loss_scale import LossScale
from low_precision.scheme import Quantizer
from low_precision.torch_private import version_of

_OUTSIDE = 2**32  # calls from here on are of weights set from outside, those below of an optimizer's closures
_FORGOTTEN = (
    "its optimizer moves the weights and not their {kept}, which would be lost: call quantize_optimizer(optimizer, "
    "model) before training"
)
_RESIZED = (
    "a weight of shape {before} has the shape {now} since its model was quantized, and its accumulator or compensation "
    "has not: resize the weight before quantize_model"
)
_COPY = (
    "the weights of a copied model were written, and are rounded again: for an average of weights, "
    "low_precision.plain_copy(model) gives a copy without rounding"
)


class Stepper(Protocol):
    """An optimizer that steps weights here: optimizer.OptimizerRounding."""

    scale: LossScale

    def has(self, p: Tensor) -> bool: ...

    def detach(self) -> None: ...


@dataclass(frozen=True)
class _Aside:
    """What stood behind a weight that somebody replaced: it comes back with the weight."""

    weight: Tensor | None  # where it does not follow from the accumulator
    master: Tensor | None
    lost: Tensor | None
    rounded_at: tuple[int, int]
    rounded_by: Tensor | None


class Weights:
    """The weights of a model, in their format at all times, and the accumulator behind them where there is one."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.weights: dict[Tensor, Quantizer] = {}
        self.accumulator: dict[Tensor, Quantizer | None] = {}  # None: in float32, as below
        self.compensation: dict[Tensor, Quantizer | None] = {}
        self.masters: dict[Tensor, Tensor] = {}  # what the accumulator holds
        self.lost: dict[Tensor, Tensor] = {}  # what the compensation holds
        self.rounded_at: dict[Tensor, tuple[int, int]] = {}  # step and call whose noise is in the weight
        self.rounded_by: dict[Tensor, Tensor] = {}  # the delayed scale that is in it, where it has one
        self.optimizers: list[Stepper] = []  # those that step them
        self._versions: dict[Tensor, tuple[int, int]] = {}  # of the weights as we last wrote or saw them
        # The weights before a step, where it may leave a group of numbers that share a scale as it was (stored.py); and
        # those of a compensation, which may come back.
        self._before: dict[Tensor, Tensor] = {}
        self._aside: dict[Tensor, _Aside] = {}
        # Until the next step: weights as they came from outside, with the version that they were rounded to; and the
        # checksums that an optimizer's state has of them. What fits is one of our own, and was not to be rounded again.
        self._raw: dict[Tensor, tuple[Tensor, tuple[int, int]]] = {}
        self._expected: dict[Tensor, int] = {}
        self._trained = False  # whether a training pass was made
        self._is_copy = self._said_copy = False

    def __getstate__(self) -> dict[str, Any]:
        """For a copy: the optimizers are the original's, until they are copied too. Its weights are not written yet."""
        unchanged = {p for p in self.weights if self._versions.get(p) == version_of(p)}
        expected = self._expected | {p: checksum for p, checksum in self.checksums().items() if p in unchanged}
        return vars(self) | {"optimizers": [], "_expected": expected, "_is_copy": True, "_trained": False}

    def add(
        self,
        weights: Mapping[Tensor, Quantizer],
        accumulator: Mapping[Tensor, Quantizer | None],
        compensation: Mapping[Tensor, Quantizer | None],
    ) -> None:
        """Takes in parameters, rounded at once.

        weights: what rounds each of them. accumulator, compensation: what rounds each one's master copy, and what is
        kept of it, None for float32; a parameter that is in none of the three is left alone.
        """
        self.weights |= weights
        self.accumulator |= accumulator
        self.compensation |= compensation
        with torch.inference_mode(False):  # a tensor made there could never be trained
            self.masters |= {p: p.detach().clone() for p in accumulator}
            self.lost |= {p: torch.zeros_like(p, requires_grad=False) for p in compensation}
        for p in dict.fromkeys([*weights, *accumulator]):
            self._take_over(p)

    def drop(self, p: Tensor) -> None:
        """Forgets a parameter that its model has no more."""
        tables: list[dict[Tensor, Any]] = [self.weights, self.accumulator, self.compensation, self.masters, self.lost]
        tables += [self.rounded_at, self.rounded_by, self._versions, self._before, self._aside]
        tables += [self._raw, self._expected]
        for table in tables:
            table.pop(p, None)

    def rounder(self, site: str, p: Tensor) -> Quantizer | None:
        """What rounds a parameter, or what is kept of it, at that site; None: nothing."""
        at: dict[str, Mapping[Tensor, Quantizer | None]]
        at = {"weights": self.weights, "accumulator": self.accumulator, "compensation": self.compensation}
        return at[site].get(p)

    def forget_aside(self) -> None:
        """What stood behind replaced weights will not come back."""
        self._aside.clear()

    def checksums(self) -> dict[Tensor, int]:
        """Of the weights that would move if they were rounded again, or have a compensation, which belongs to them."""
        wanted = (p for p, q in self.weights.items() if p in self.lost or stored.moves_again(q.rule.format))
        return {p: stored.checksum(p) for p in wanted}

    @torch.no_grad()
    def expect(self, checksums: Mapping[Tensor, int]) -> None:
        """A state of ours is loaded, with these weights: they may have come before it, or come after it."""
        self._expected = dict(checksums)
        for p, (raw, version) in self._raw.items():
            if version == version_of(p) and stored.checksum(raw) == self._expected.get(p):
                p.copy_(raw)
                self._versions[p] = version_of(p)
                if p in self.lost:
                    self._before[p] = p.clone()
        self._raw.clear()

    def _rounded(self, p: Tensor, out: Tensor | None = None, again: bool = False) -> Tensor:
        """What the parameter is, or should be: its accumulator, or what it is now, rounded, into `out` if given.

        again: as it was rounded the last time.
        """
        value = self.masters.get(p, p)
        step, call = self.rounded_at[p]
        if p not in self.weights:
            return value if out is None else out.copy_(value)
        if again and p in self.rounded_by:
            scale: Tensor | None = self.rounded_by[p].to(p.device)
        elif (scale := self.weights[p].scale(value)) is not None:
            self.rounded_by[p] = scale = scale.clone()
        return self.weights[p](value, call, step, out=out, scale=scale)

    @torch.no_grad()
    def _take_over(self, p: Tensor, call: int = 0, compensate: bool = False, is_stored: bool = False) -> None:
        """Takes over what the parameter is now: rounded, through the accumulator where there is one.

        compensate: with what the last such rounding cut off; else there is nothing to add any more. is_stored: whether
        it consists of numbers of its format already, and stays as it is.
        """
        self.rounded_at[p] = self.clock.step, call
        if p in self.lost:
            self._compensate(p, call, compensate)
        else:
            if p in self.masters:
                self._write_master(p, call)
            if not is_stored:
                self._round_changed(p)
        self._versions[p] = version_of(p)

    def _write_master(self, p: Tensor, call: int) -> None:
        quantizer, master = self.accumulator[p], self.masters[p]
        if quantizer is None:
            master.copy_(p)
        elif stored.moves_again(quantizer.rule.format):  # the optimizer found the accumulator as it is now
            master.copy_(stored.unchanged_or(master, p, quantizer(p, call), quantizer.rule.format))
        else:
            quantizer(p, call, out=master)

    def _round_changed(self, p: Tensor) -> None:
        """Rounds the parameter; groups of numbers that share a scale, and that the step left as they were, stay."""
        before = self._before.pop(p, None)
        if before is None:
            self._rounded(p, out=p)
        else:
            p.copy_(stored.unchanged_or(before, p, self._rounded(p), self.weights[p].rule.format))

    def _compensate(self, p: Tensor, call: int, compensate: bool) -> None:
        """Kahan's summation: the weight is rounded, and what that cuts off is kept for the next update."""
        wanted = p + self.lost[p] if compensate else p
        rounded = self._rounded(p.copy_(wanted))
        format, before = self.weights[p].rule.format, self._before.get(p)
        if compensate and before is not None and stored.moves_again(format):
            rounded = stored.unchanged_or(before, wanted, rounded, format)
        lost = self.lost[p].copy_(wanted - rounded) if compensate else self.lost[p].zero_()
        if quantizer := self.compensation[p]:
            quantizer(lost, call, out=lost)
        p.copy_(rounded)
        self._before[p] = rounded

    @torch.no_grad()
    def settle(self, parameters: Iterable[Tensor | None] | None = None, training: bool = False) -> None:
        """Takes over weights, all of them or these, that were set from outside: rounded, and the accumulator with them.

        An accumulator that rounds to just these weights stays: it came with them, from a checkpoint, or with the
        weights from before they were replaced; and so does a compensation. Weights that are numbers of their format
        stay as they are. training: whether a training pass begins; RuntimeError where an optimizer that we do not know
        has moved weights that have an accumulator or a compensation.
        """
        if not self._versions:
            return
        for p in list(self._versions) if parameters is None else parameters:
            if p is None or p not in self._versions or version_of(p) == self._versions[p]:
                continue
            for kept in (self.masters, self.lost):
                if p in kept:
                    if kept[p].shape != p.shape:
                        raise RuntimeError(_RESIZED.format(before=tuple(kept[p].shape), now=tuple(p.shape)))
                    kept[p] = kept[p].to(p.device)  # the model may have been moved
            if self._is_known(p):
                self._versions[p] = version_of(p)
                if p in self.lost:
                    before = self._before.get(p)
                    is_another = before is not None and not torch.equal(p, before.to(p.device))
                    if is_another and p not in self._aside and not self._is_expected(p):
                        self._put_aside(p, before)
                    self._before[p] = p.clone()
            else:
                self._take_over_from_outside(p, training)
        self._trained = self._trained or training

    def _is_known(self, p: Tensor) -> bool:
        """Whether the weight is what stands behind it, rounded; takes back what stood behind it before."""
        aside = self._aside.get(p)
        if aside is not None:
            here = aside.master if aside.weight is None else aside.weight
            assert here is not None
            if aside.weight is None and p in self.weights:
                here = self.weights[p](here, aside.rounded_at[1], aside.rounded_at[0])
            if torch.equal(p, here.to(p.device)):
                self._take_back(p, aside)
                return True
        if p in self.weights and p not in self.masters and stored.moves_again(self.weights[p].rule.format):
            return self._is_stored(p)
        return torch.equal(p, self._rounded(p, again=True))

    def _is_stored(self, p: Tensor) -> bool:
        """Whether the weight, of a format that moves again, consists of its numbers already."""
        return self._is_expected(p) or stored.is_stored(p, self.weights[p].rule.format)

    def _is_expected(self, p: Tensor) -> bool:
        """Whether the weight is that of a state of ours that was loaded."""
        return p in self._expected and stored.checksum(p) == self._expected[p]

    def _put_aside(self, p: Tensor, weight: Tensor | None) -> None:
        """What stands behind a weight that is replaced. weight: it, where it does not follow from the accumulator."""
        master, lost = (None if x is None else x.clone() for x in (self.masters.get(p), self.lost.get(p)))
        self._aside[p] = _Aside(weight, master, lost, self.rounded_at[p], self.rounded_by.get(p))

    def _take_back(self, p: Tensor, aside: _Aside) -> None:
        if aside.master is not None:
            self.masters[p].copy_(aside.master)
        if aside.lost is not None:
            self.lost[p].copy_(aside.lost)
            self._before[p] = p.clone()
        self.rounded_at[p] = aside.rounded_at
        if aside.rounded_by is not None:
            self.rounded_by[p] = aside.rounded_by
        del self._aside[p]

    def _take_over_from_outside(self, p: Tensor, training: bool) -> None:
        kept = "accumulator" if p in self.masters else "compensation" if p in self.lost else None
        is_ours = any(optimizer.has(p) for optimizer in self.optimizers)
        if training and self._trained and kept and not is_ours and p.requires_grad:
            raise RuntimeError(_FORGOTTEN.format(kept=kept))
        may_be_average = self._is_copy and not is_ours and not self._trained and not training and not self._said_copy
        written = p.clone() if may_be_average else p
        if kept and p not in self._aside:
            weight = self._before.get(p) if p in self.lost else None
            if p in self.masters and p in self.rounded_by:  # by another scale by then
                weight = self._rounded(p, again=True)
            if p in self.masters or weight is not None:
                self._put_aside(p, weight)
        moves_again = p in self.weights and stored.moves_again(self.weights[p].rule.format)
        is_stored = moves_again and self._is_stored(p)
        raw = p.clone() if moves_again and not is_stored else None
        self.clock.writes += 1  # fresh noise each time: no step of ours may ever come between two of them
        with nullcontext() if training else self.clock.delayed.standing():  # evaluation moves no scale
            self._take_over(p, _OUTSIDE + self.clock.writes, is_stored=is_stored)
        if raw is not None:
            self._raw[p] = raw, self._versions[p]
        if not torch.equal(written, p):
            self._said_copy = True
            warnings.warn(_COPY, stacklevel=2)

    @torch.no_grad()
    def enter(self, parameters: list[Tensor]) -> None:
        """Puts the accumulator where the optimizer finds these parameters."""
        self._raw.clear()
        self._expected.clear()
        if self.clock.watcher is not None:
            self.clock.watcher.found(self, parameters)
        for p in parameters:
            self._aside.pop(p, None)
            if p in self.masters:
                p.copy_(self.masters[p])
            elif p in self.weights and p not in self.lost and stored.moves_again(self.weights[p].rule.format):
                self._before[p] = p.clone()

    def leave(self, parameters: list[Tensor], call: int = 0) -> None:
        """Takes over what the optimizer made of these parameters."""
        watcher = self.clock.watcher
        with nullcontext() if watcher is None else watcher.update(self, parameters):
            for p in parameters:
                if p in self._versions:
                    self._take_over(p, call, compensate=True)
