"""Which steps a run makes, and after which of them it is evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from settings.config import Config


@dataclass(frozen=True)
class Plan:
    """The steps of a run. A line of metrics.jsonl is for each evaluation: the end of each epoch, or certain steps."""

    steps: int  # of the whole run
    in_epoch: int  # steps of an epoch
    every: int  # so many steps from one evaluation to the next; the last step has one too
    by_step: bool  # whether a line says its step

    @classmethod
    def of(cls, config: Config, in_epoch: int) -> Plan:
        """in_epoch: steps of an epoch of the data."""
        if config.steps is None:
            steps, every = config.epochs * in_epoch, config.evaluate_every or in_epoch
        else:
            steps, every = config.steps, config.evaluate_every or max(1, config.steps)
        return cls(steps, in_epoch, every, config.is_by_step)

    @property
    def evaluations(self) -> int:
        """How many there are."""
        return math.ceil(self.steps / self.every)

    def evaluation(self, number: int) -> int:
        """The step after which that evaluation is: 1 is the first one, and 0 the beginning of the run."""
        return min(number * self.every, self.steps)

    def epochs(self, step: int) -> int | float:
        """How many epochs so many steps are, a whole number where it is one."""
        return step // self.in_epoch if step % self.in_epoch == 0 else round(step / self.in_epoch, 6)

    def place(self, number: int, step: int) -> dict[str, int | float | None]:
        """How the line of that evaluation begins, which is after that step."""
        return {"step": step, "epoch": self.epochs(step)} if self.by_step else {"epoch": number}
