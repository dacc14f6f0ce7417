"""The batches of an epoch: which rows, in which order, and this process's part of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data import Data
from lab.processes import Processes
from low_precision.noise import Key
from settings.config import Config, refused

if TYPE_CHECKING:
    from lab.state import State


@dataclass(frozen=True)
class Batch:
    """This process's part of a batch."""

    x: Tensor  # float32 (n, *shape), as the model reads it
    y: Tensor  # targets, as in data.Data
    first_row: int  # the place of its first row in the whole batch
    whole: int  # rows of the whole batch
    processes: Processes

    @property
    def rows(self) -> int:
        return len(self.y)

    def share(self, loss: Tensor) -> Tensor:
        """The mean loss of this part -> that for which the average over all processes is the mean of the whole."""
        return loss if self.processes.count == 1 else loss * self.processes.share(self.rows, self.whole)

    def over_processes(self, loss: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """Mean loss and count of right answers of this part -> those of the whole batch, and its rows."""
        return self.processes.sums(loss, correct, self.rows)


class Batches:
    """The training rows, batch by batch."""

    def __init__(self, config: Config, data: Data, processes: Processes) -> None:
        """ConfigError where one of the processes would have no row of a batch."""
        self.config, self.data, self.processes = config, data, processes
        self.rows = len(data.train_x)
        self.steps = math.ceil(self.rows / config.batch_size)  # in an epoch
        smallest = self.rows % config.batch_size or min(config.batch_size, self.rows)
        if smallest < processes.count:
            rows = f"a row for each of {processes.count} processes in the last batch too ({self.rows} rows)"
            raise refused("batch_size", config.batch_size, f"what leaves {rows}")

    def remaining(self, state: State) -> Iterator[Tensor]:
        """Row numbers of each batch that is left of the next epoch: of all, unless a resumed run is in its middle."""
        return islice(row_numbers(self.rows, self.config, state.epoch + 1, self.processes.device), state.batch, None)

    def part(self, rows: Tensor, noise: torch.Generator) -> Batch:
        """This process's part of the batch of these rows; images are augmented with `noise`, which moves on."""
        part = self.processes.part(len(rows))
        x = self.data.features(self.data.train_x[rows], noise, part)
        return Batch(x, self.data.train_y[rows[part]], part.start, len(rows), self.processes)


def row_numbers(rows: int, config: Config, epoch: int, device: torch.device) -> Iterator[Tensor]:
    """Row numbers of each batch. The order depends on (seed, epoch); a batch of all rows leaves it alone."""
    if config.batch_size >= rows:
        order = torch.arange(rows)
    else:
        generator = torch.Generator().manual_seed(Key.of(config.seed, "order", epoch).value)
        order = torch.randperm(rows, generator=generator)
    yield from order.to(device).split(min(config.batch_size, rows))
