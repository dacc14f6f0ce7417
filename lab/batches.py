"""The batches of an epoch: which rows, in which order, and this process's part of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data import Data, Text
from lab.draws import drawn
from lab.processes import Processes
from low_precision.noise import Key
from settings.config import Config, refused

if TYPE_CHECKING:
    from lab.state import State


@dataclass(frozen=True)
class Batch:
    """This process's part of a batch, or a part of that."""

    x: Tensor  # float32 (n, *shape), or numbers of characters, as the model reads it
    y: Tensor  # targets, as in data.Data
    first_row: int  # the place of its first row in the whole batch
    whole: int  # rows of the whole batch
    processes: Processes
    seed: int  # of the run

    @property
    def rows(self) -> int:
        return len(self.y)

    def drawn(self, step: int) -> AbstractContextManager[None]:
        """Around the forward pass of that step: what is dropped out follows from it and from `first_row`."""
        return drawn(self.seed, step, self.first_row, self.y.device)

    def parts(self, rows: int | None) -> list[Batch]:
        """So many rows at a time, the last ones fewer; None: all of them at once."""
        if rows is None or rows >= self.rows:
            return [self]
        pairs = zip(self.x.split(rows), self.y.split(rows), strict=True)
        return [replace(self, x=x, y=y, first_row=self.first_row + rows * i) for i, (x, y) in enumerate(pairs)]

    def share(self, loss: Tensor) -> Tensor:
        """The mean loss of this part -> what has to be added over parts, and averaged over processes, for the mean of
        the whole.
        """
        return loss if self.rows == self.whole else loss * self.processes.share(self.rows, self.whole)

    def over_processes(self, results: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor, int | Tensor]:
        """Mean loss, count of right answers and rows of each of its parts -> those of the whole batch."""
        loss, correct, _ = results[0]
        if len(results) > 1:
            total = torch.stack([loss.double() * rows for loss, _, rows in results]).sum()
            loss, correct = (total / self.rows).to(loss.dtype), torch.stack([c for _, c, _ in results]).sum()
        return self.processes.sums(loss, correct, self.rows)


class Batches:
    """The training rows, batch by batch."""

    def __init__(self, config: Config, data: Data, processes: Processes) -> None:
        """ConfigError where one of the processes would have no row of a batch."""
        self.config, self.data, self.processes = config, data, processes
        self.rows = rows = len(data.train_x)
        self.steps = data.steps(config.batch_size)  # in an epoch
        smallest = rows % config.batch_size or min(config.batch_size, rows)
        if isinstance(data, Text):  # whose windows overlap: every batch is full
            smallest = config.batch_size
        if smallest < processes.count:
            rows = f"a row for each of {processes.count} processes in the last batch too ({rows} rows)"
            raise refused("batch_size", config.batch_size, f"what leaves {rows}")
        self._epoch: tuple[int, Sequence[Tensor]] = (0, ())  # whose batches are known, and the row numbers of each

    def remaining(self, state: State) -> Iterator[Tensor]:
        """Row numbers of each batch from where the state is to its next evaluation, over the ends of epochs."""
        while state.step < state.next_evaluation:
            epochs, number = divmod(state.step, self.steps)
            if self._epoch[0] != epochs + 1:
                self._epoch = epochs + 1, batch_rows(self.data, self.config, epochs + 1, self.processes.device)
            state.begin_batch()
            yield self._epoch[1][number]

    def part(self, rows: Tensor, noise: torch.Generator) -> Batch:
        """This process's part of the batch of these rows; images are augmented with `noise`, which moves on."""
        part = self.processes.part(len(rows))
        x, y = self.data.batch(rows, noise, part)
        return Batch(x, y, part.start, len(rows), self.processes, self.config.seed)


def batch_rows(data: Data, config: Config, epoch: int, device: torch.device) -> Sequence[Tensor]:
    """Row numbers of each batch of that epoch, of a text where its windows begin. They depend on (seed, epoch)."""
    if not isinstance(data, Text):
        return row_numbers(len(data.train_x), config, epoch, device)
    starts = torch.randint(
        data.windows, (data.steps(config.batch_size), config.batch_size), generator=_order(config, epoch)
    )
    return starts.to(device).unbind()


def row_numbers(rows: int, config: Config, epoch: int, device: torch.device) -> Sequence[Tensor]:
    """Each row once, in an order of this epoch; a batch of all rows leaves it alone."""
    order = torch.arange(rows) if config.batch_size >= rows else torch.randperm(rows, generator=_order(config, epoch))
    return order.to(device).split(min(config.batch_size, rows))


def _order(config: Config, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(Key.of(config.seed, "order", epoch).value)
