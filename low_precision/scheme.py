"""How a model is rounded: a rule for each site, the streams of random bits, and the time that they depend on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from torch import Tensor

from low_precision.formats import FLOAT32, BlockFormat
from low_precision.noise import Key
from low_precision.rounding import AnyRounding, Overflow, Rounding, is_random
from low_precision.rules import Rule, check_rules
from low_precision.tensor import quantize


@dataclass
class Clock:
    """The time of one model's training, from which the noise of each rounding follows."""

    step: int = 0  # optimizer steps done
    # By (layer, training mode, replica): forward passes since the last step.
    calls: Counter[tuple[str, bool, int]] = field(default_factory=Counter)
    writes: int = 0  # weights taken over from outside since the last step

    def move_to(self, step: int) -> None:
        """So many optimizer steps are done."""
        self.step, self.writes = step, 0
        self.calls.clear()


@dataclass
class BatchPart:
    """Which rows of the whole batch this process has, where several processes share it; 0 rows: the whole batch.

    The noise of a row depends on its place in the whole batch, so that the number of processes changes nothing.
    """

    rows: int = 0
    rows_before: int = 0

    def first_row(self, rows: int) -> int:
        """The place in the whole batch of the first of so many rows of a tensor, which has as many for each sample."""
        return self.rows_before * rows // self.rows if self.rows_before else 0


@dataclass(frozen=True)
class Scheme:
    """How a training run rounds: a rule for each site that is rounded, and what all sites share."""

    rules: dict[str, Rule]  # by the names of SITES; a site that is not there stays in float32
    seed: int = 0  # of the stochastic rounding's noise
    overflow: Overflow = Overflow.SATURATE
    backend: str = "auto"
    rounding: AnyRounding = Rounding.NEAREST  # of the sites that quantize_optimizer adds, where they name none

    def __post_init__(self) -> None:
        check_rules(self.rules, Overflow(self.overflow))

    def quantizer(self, site: str, tensor: str, clock: Clock) -> Quantizer | None:
        """What rounds that tensor at that site, or None where it stays in float32."""
        rule = self.rules.get(site)
        if rule is None or rule.format == FLOAT32:
            return None
        return Quantizer(rule, Key.of(self.seed, site, tensor), clock, self.overflow, self.backend)


class Quantizer:
    """Rounds one named tensor at one site; its random bits depend on (seed, site, tensor, step, call) alone."""

    def __init__(self, rule: Rule, key: Key, clock: Clock, overflow: Overflow, backend: str) -> None:
        self.rule, self.key, self.clock, self.overflow, self.backend = rule, key, clock, overflow, backend

    def __call__(
        self,
        x: Tensor,
        call: int = 0,
        step: int | None = None,
        dim: int | None = None,
        out: Tensor | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """Round `x`, into `out` where that is given; see tensor.quantize.

        call: tells apart several roundings between two optimizer steps. step: the clock's unless given. dim: along
        which blocks run; unless given, a parameter's second dimension, its inputs, or its only one. first_row: see Key.
        """
        key = None
        if is_random(self.rule.rounding):
            key = self.key.fold(self.clock.step if step is None else step).fold(call)
            key = replace(key, first_row=first_row) if first_row else key
        return quantize(
            x,
            self.rule.format,
            self.rule.rounding,
            key,
            dim=min(1, x.ndim - 1) if dim is None else dim,
            overflow=self.overflow,
            backend=self.backend,
            out=out,
        )

    def beyond(self, x: Tensor) -> Tensor:
        """bool (): whether `x` holds a value that the format does not reach, or a NaN."""
        format = self.rule.format
        if isinstance(format, BlockFormat):  # a scale reaches everything finite
            return ~x.isfinite().all()
        return ~((x <= format.largest) & (x >= format.lowest)).all()
