"""Several processes that train one model together, as torchrun starts them: torch.distributed does all of it.

Each has a part of every batch, and all have the same weights: gradients are averaged by DistributedDataParallel, and
what is random in rounding them is the same everywhere. The first process alone evaluates and writes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Processes:
    """How many there are, and which of them this one is; as a context, connected to the others. Alone: no more cost."""

    def __init__(self, device: torch.device) -> None:
        """Reads what torchrun sets. device: of the kind to compute on; `device` is this process's own."""
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = device
        if self.count > 1 and device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Processes:
        if self.count > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.count > 1 and kind is None:  # after a failure the others may never come: torchrun ends them
            torch.distributed.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over the processes."""
        if self.count == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def adding(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a pass of the model of `wrap` whose gradients are added to those of earlier ones: the last one alone
        averages them over the processes.
        """
        alone = last or not isinstance(model, nn.parallel.DistributedDataParallel)
        return nullcontext() if alone else model.no_sync()

    def part(self, count: int) -> slice:
        """This process's part of so many rows."""
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def share(self, rows: int, whole: int) -> float:
        """The factor on the mean loss of `rows` rows for which the average over processes is the mean of all rows."""
        return rows * self.count / whole

    def sums(self, loss: Tensor, correct: Tensor, rows: int) -> tuple[Tensor, Tensor, int]:
        """Mean loss, count of right answers and rows of one process -> those of all."""
        if self.count == 1:
            return loss, correct, rows
        totals = torch.stack([loss.double() * rows, correct.double(), torch.full_like(correct, rows).double()])
        torch.distributed.all_reduce(totals)
        whole = int(totals[2]) if self.device.type == "cpu" else totals[2]
        return totals[0] / whole, totals[1].long(), whole

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any of the processes."""
        if self.count == 1:
            return list(flags)
        everywhere = torch.tensor(flags, dtype=torch.uint8)
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MAX)
        return everywhere.bool().tolist()

    def any_of(self, flag: bool) -> bool:
        """Whether the flag is set in any of the processes."""
        return self.any(flag)[0]

    def everywhere(self, thing: T) -> list[T]:
        """What each process passes, in all of them, the first process's first."""
        if self.count == 1:
            return [thing]
        things: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(things, thing)
        return things

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, everywhere."""
        if self.count == 1:
            return make()
        made: list[Any] = [make() if self.first else None]
        torch.distributed.broadcast_object_list(made)
        return made[0]

    def first_before_others(self, make: Callable[[], T]) -> T:
        """make() in every process, in the first one before the others: it may download what they find."""
        if self.first:
            made = make()
        if self.count > 1:
            torch.distributed.barrier()
        return made if self.first else make()

    def check_same(self, tensors: Iterable[Tensor]) -> None:
        """RuntimeError unless all processes hold the same bits."""
        if self.count == 1:
            return
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        digests = self.everywhere(digest.hexdigest())
        if different := [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]:
            raise RuntimeError(f"process {different[0]} of {self.count} has other weights than the first one")
