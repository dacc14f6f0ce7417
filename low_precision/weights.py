"""The weights of a model, in their format at all times, and what stands behind them: accumulator or compensation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from low_precision.scheme import Clock, Quantizer
from low_precision.torch_private import version_of

_OUTSIDE = 2**32  # calls from here on are of weights set from outside, those below of an optimizer's closures


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
        self._versions: dict[Tensor, tuple[int, int]] = {}  # of the weights as we last wrote or saw them

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
        self.weights.pop(p, None)
        self.accumulator.pop(p, None)
        self.compensation.pop(p, None)
        self.masters.pop(p, None)
        self.lost.pop(p, None)
        self.rounded_at.pop(p, None)
        self._versions.pop(p, None)

    def _rounded(self, p: Tensor, out: Tensor | None = None) -> Tensor:
        """What the parameter is, or should be: its accumulator, or what it is now, rounded, into `out` if given."""
        value = self.masters.get(p, p)
        step, call = self.rounded_at[p]
        if p in self.weights:
            return self.weights[p](value, call, step, out=out)
        return value if out is None else out.copy_(value)

    @torch.no_grad()
    def _take_over(self, p: Tensor, call: int = 0, compensate: bool = False) -> None:
        """Takes over what the parameter is now: rounded, through the accumulator where there is one.

        compensate: with what the last such rounding cut off; else there is nothing to add any more.
        """
        self.rounded_at[p] = self.clock.step, call
        if p in self.lost:
            self._compensate(p, call, compensate)
        else:
            if p in self.masters:
                quantizer, master = self.accumulator[p], self.masters[p]
                if quantizer:
                    quantizer(p, call, out=master)
                else:
                    master.copy_(p)
            self._rounded(p, out=p)
        self._versions[p] = version_of(p)

    def _compensate(self, p: Tensor, call: int, compensate: bool) -> None:
        """Kahan's summation: the weight is rounded, and what that cuts off is kept for the next update."""
        wanted = p + self.lost[p] if compensate else p
        rounded = self._rounded(p.copy_(wanted))
        lost = self.lost[p].copy_(wanted - rounded) if compensate else self.lost[p].zero_()
        if quantizer := self.compensation[p]:
            quantizer(lost, call, out=lost)
        p.copy_(rounded)

    @torch.no_grad()
    def settle(self, parameters: Iterable[Tensor | None] | None = None) -> None:
        """Takes over weights, all of them or these, that were set from outside: rounded, and the accumulator with them.

        An accumulator that rounds to just these weights stays: it came with them, from a checkpoint; and so does a
        compensation, where the weights are numbers of their format.
        """
        for p in list(self._versions) if parameters is None else parameters:
            if p is None or p not in self._versions or version_of(p) == self._versions[p]:
                continue
            for kept in (self.masters, self.lost):
                if p in kept:
                    kept[p] = kept[p].to(p.device)  # the model may have been moved
            if torch.equal(p, self._rounded(p)):
                self._versions[p] = version_of(p)
            else:  # fresh noise each time: no step of ours may ever come between two of them
                self.clock.writes += 1
                self._take_over(p, _OUTSIDE + self.clock.writes)

    @torch.no_grad()
    def enter(self, parameters: list[Tensor]) -> None:
        """Puts the accumulator where the optimizer finds these parameters."""
        for p in parameters:
            if p in self.masters:
                p.copy_(self.masters[p])

    def leave(self, parameters: list[Tensor], call: int = 0) -> None:
        """Takes over what the optimizer made of these parameters."""
        for p in parameters:
            if p in self._versions:
                self._take_over(p, call, compensate=True)
