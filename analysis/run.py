"""One run of a report, and runs that differ in their seeds alone."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lab.record import REPLACING
from low_precision.rules import Line, Rule, is_there
from settings.config import Config

UNFINISHED = "going on or killed"  # a record without a summary looks the same in both cases


@dataclass(frozen=True)
class Run:
    """One record. history: the lines of its metrics.jsonl; NaN and infinite metrics are None.

    A line is of an epoch, or of a step: `unit` says which, and `last`, `value` and the like count in it.
    status: of a run without a summary, UNFINISHED. code: the fingerprint of the code that made it; None of an earlier
    version, and of CSV files, which have none. folder: the record; None of a CSV file. remarks: what its end said.
    """

    config: Config
    status: str
    seconds: float
    history: list[dict[str, float | None]]
    code: str | None = None
    folder: Path | None = None
    remarks: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """By itself, complete or diverged."""
        return self.status in REPLACING

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def unit(self) -> str:
        """By what its lines are told apart: "epoch" or "step"."""
        return "step" if self.config.is_by_step else "epoch"

    def value(self, metric: str, place: int | None = None) -> float | None:
        """After that epoch or step, or the last one -> None where there is none, as of a diverged run."""
        if place is None:
            return self.history[-1].get(metric) if self.history and self.status != "diverged" else None
        return next((line.get(metric) for line in self.history if line[self.unit] == place), None)

    @property
    def last(self) -> int:
        """The epoch or step of its last line, 0 where there is none."""
        return int(self.history[-1][self.unit] or 0) if self.history else 0

    @property
    def planned(self) -> int | None:
        """The epoch or step at which it is to end, where its settings say that."""
        return self.config.steps if self.config.is_by_step else self.config.epochs  # None: steps of unknown epochs


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seeds alone, at least one. config: that of the first one, whose seeds mean nothing."""

    config: Config
    runs: tuple[Run, ...]

    @functools.cached_property
    def rules(self) -> dict[str, Rule]:
        return self.config.rules()

    @functools.cached_property
    def lines(self) -> tuple[Line, ...]:
        """What stands over the rules in some modules."""
        return self.config.lines()

    @property
    def rounds(self) -> bool:
        """Whether anything is rounded."""
        some = self.rules or self.config.transforms() or any(is_there(line.site, line.rule) for line in self.lines)
        return bool(some)

    def values(self, metric: str, place: int | None = None) -> list[float]:
        """Those of its runs after that epoch or step, where there is one."""
        return [value for run in self.runs if (value := run.value(metric, place)) is not None]

    @property
    def unit(self) -> str:
        """By what the lines of its runs are told apart."""
        return self.runs[0].unit

    @property
    def last(self) -> int:
        """The last epoch or step of its longest run."""
        return max(run.last for run in self.runs)


def is_metric(name: str) -> bool:
    """Whether a number of a line is a metric, and not its place."""
    return name not in ("epoch", "step")


def common_unit(runs: Iterable[Run | Setting]) -> str:
    """What a figure of all of them has along its axis: every line has an epoch, and where all have one, a step."""
    return "step" if {run.unit for run in runs} == {"step"} else "epoch"


def units(runs: Iterable[Run | Setting], one: bool = False) -> str:
    """What the numbers of their lines count: "epochs", "steps", or "epochs or steps"; one: "epoch or step"."""
    names = sorted({run.unit for run in runs}) or ["epoch"]
    return " or ".join(name if one else f"{name}s" for name in names)
