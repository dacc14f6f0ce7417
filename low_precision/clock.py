"""The time of a model's training, from which the noise of each rounding follows; and the same time once more.

Activation checkpointing (torch.utils.checkpoint) runs a part of the forward pass a second time, on the way back. That
is one rounding computed again, so it must take the bits of the first time: the first run notes the time of every clock,
and the later one reads that in place of the clock itself, in its own thread.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from low_precision.delayed import DelayedScales
from low_precision.listener import Listener
from low_precision.torch_private import process_rank, wrap_checkpointing


@dataclass(frozen=True)
class BatchPart:
    """Which samples this process has, where several processes share a batch.

    rows, rows_before: so many rows of the whole batch, and how many of it are before them; 0 rows: not known. The noise
    of a row then depends on its place in the whole batch, so that the number of processes changes nothing.
    rank: where the rows are not known, the number of the process, which enters the noise of what flows through the
    model; None: torch.distributed's. Set 0 in all processes that compute the same tensors (tensor parallelism).
    """

    rows: int = 0
    rows_before: int = 0
    rank: int | None = None

    def first_row(self, rows: int) -> int:
        """The place in the whole batch of the first of so many rows of a tensor, which has as many for each sample."""
        return self.rows_before * rows // self.rows if self.rows_before else 0


@dataclass(eq=False)
class Time:
    """What the noise of a forward pass depends on, beside its seed and names."""

    step: int = 0  # optimizer steps done
    # By (layer, training mode, replica): forward passes since the last step.
    calls: Counter[tuple[str, bool, int]] = field(default_factory=Counter)
    part: BatchPart = BatchPart()
    rank: int = 0  # of this process, as it enters the noise
    paused: int = 0  # inside so many blocks of `unquantized`, which round nothing

    def noted(self) -> Time:
        """A copy that does not move with this one."""
        return Time(self.step, Counter(self.calls), self.part, self.rank, self.paused)

    def backward_passes(self, rounding: tuple[Any, ...]) -> Iterator[int]:
        """Counts the backward passes of one rounding of a forward pass: 0, 1, ..."""
        return itertools.count()


@dataclass(eq=False)
class Clock(Time):
    """The time of one model, as its training moves it."""

    seed: int = 0  # of all its noise
    writes: int = 0  # weights taken over from outside since the last step
    delayed: DelayedScales = field(default_factory=DelayedScales)  # the model's, which move at steps too
    watcher: Listener | None = None  # listens to what is rounded
    is_aside: bool = False  # of what is only tried: no loss scale looks at its errors

    def __post_init__(self) -> None:
        with _all_clocks:
            _clocks.add(self)
        _watch_checkpointing()

    def __getstate__(self) -> dict[str, Any]:
        """A copy that is made inside a block of `unquantized` is outside of it, and nobody listens to it."""
        return vars(self) | {"paused": 0, "watcher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copied or loaded one
        self.__dict__.update(state)
        self.__post_init__()

    def move_to(self, step: int) -> None:
        """So many optimizer steps are done."""
        self.step, self.writes = step, 0
        self.calls.clear()

    def begin_part(self, part: BatchPart) -> None:
        """The next forward pass is of that part of a step's batch.

        Parts that pass one after the other are one pass: the noise of a row is that of its place in the batch,
        and what has no rows, as a weight, is rounded with the same noise for each of them.
        """
        self.part = part
        self.calls.clear()
        if self.watcher is not None:
            self.watcher.begin_part()

    def now(self) -> Time:
        """The clock itself, or in a recomputation the time of the first run."""
        again = _thread.again
        if again is not None and self in again.times:
            return again.times[self]
        # Each time, because a part of a model may be called alone, and torch.distributed may begin at any time.
        self.rank = 0 if self.part.rows else process_rank() if self.part.rank is None else self.part.rank
        return self


class FirstRun:
    """The first run of a part of a forward pass that may be computed again; made just before it."""

    def __init__(self) -> None:
        inside = _thread.again  # a checkpoint within a recomputed one
        with _all_clocks:
            clocks = list(_clocks)
        self._times = {clock: clock.now().noted() for clock in clocks}
        self._backward_passes = inside.backward_passes if inside else {}
        self._surroundings = [note() for note in _notes]

    @contextmanager
    def again(self) -> Iterator[None]:
        """What runs inside is rounded with the bits of the first run."""
        before = _thread.again
        _thread.again = _Again(self._times, self._backward_passes)
        try:
            with ExitStack() as stack:
                for surroundings in self._surroundings:
                    stack.enter_context(surroundings())
                yield
        finally:
            _thread.again = before

    def replayed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, as a later run of what ran first."""

        @functools.wraps(function, updated=())
        def run(*arguments: Any, **named: Any) -> Any:
            with self.again():
                return function(*arguments, **named)

        return run


class _Again:
    """A recomputation: its own copies of the noted times, and the backward passes of what it rounds.

    The backward passes are counted over all recomputations of one first run, since each gives autograd a new graph.
    """

    def __init__(self, times: dict[Clock, Time], backward_passes: dict[tuple[Any, ...], Iterator[int]]) -> None:
        self.backward_passes = backward_passes
        self.times = {clock: _TimeAgain(time, clock, backward_passes) for clock, time in times.items()}


class _TimeAgain(Time):
    """A noted time that moves again."""

    def __init__(self, noted: Time, clock: Clock, backward_passes: dict[tuple[Any, ...], Iterator[int]]) -> None:
        super().__init__(noted.step, Counter(noted.calls), noted.part, noted.rank, noted.paused)
        self._clock, self._backward_passes = clock, backward_passes

    def backward_passes(self, rounding: tuple[Any, ...]) -> Iterator[int]:
        return self._backward_passes.setdefault((self._clock, self.step, *rounding), itertools.count())


def on_first_run(note: Callable[[], Callable[[], AbstractContextManager[None]]]) -> None:
    """Has `note` called before each first run; what it gives makes the surroundings of each later one."""
    _notes.append(note)


def next_seed() -> int:
    """A seed for what is given none: 0, 1, ... in one process."""
    return next(_seeds)


_seeds = itertools.count()
_clocks: weakref.WeakSet[Clock] = weakref.WeakSet()  # all that there are
_notes: list[Callable[[], Callable[[], AbstractContextManager[None]]]] = []
_all_clocks = threading.RLock()  # held while they are read or get another one


class _Thread(threading.local):
    again: _Again | None = None  # the recomputation that this thread is in


_thread = _Thread()


@functools.cache
def _watch_checkpointing() -> None:
    """From now on, the first run of each checkpointed function is noted."""

    def reentrant(function: Callable[..., Any]) -> Callable[..., Any]:
        """torch calls the same function for the first run and for each later one."""
        first, later = FirstRun(), False
        replayed = first.replayed(function)

        @functools.wraps(function, updated=())
        def run(*arguments: Any) -> Any:
            nonlocal later
            if later:
                return replayed(*arguments)
            later = True
            return function(*arguments)

        return run

    wrap_checkpointing(reentrant, lambda function: FirstRun().replayed(function))
