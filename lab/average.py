"""The average of the weights at the last evaluations (SWALP: Yang et al. 2019, arXiv:1904.11943), in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from data import Data
from lab.batches import batch_rows
from lab.metrics import Task, evaluate
from lab.plan import Plan
from low_precision.noise import Key
from settings.config import Config


class Average:
    """The average of the weights, float32, in a model of its own that rounds nothing."""

    def __init__(self, config: Config, plan: Plan, model: nn.Module) -> None:
        """model: of the same kind as the one that trains, on the CPU."""
        self.config, self._plan = config, plan
        self._averaged = AveragedModel(model)
        # The first evaluation that counts.
        self._first = math.floor((1 - config.average_last) * plan.evaluations + 1e-9) + 1

    def state_dict(self) -> dict[str, Any]:
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averaged.load_state_dict(state)

    def update(self, model: nn.Module, evaluation: int) -> None:
        """Takes in the weights at that evaluation, once: again after an interruption it changes nothing."""
        if self._averaged.n_averaged < evaluation - self._first + 1:
            self._averaged.update_parameters(model)

    def measured(self, data: Data, task: Task, check: Callable[[], None] | None) -> dict[str, float]:
        """The test set's metrics; statistics of batch norms are taken anew, from the training rows."""
        config, device = self.config, data.train_x.device
        epoch = math.ceil(self._plan.steps / self._plan.in_epoch) + 1  # one that training has not begun

        def batches() -> Iterator[Tensor]:
            noise = torch.Generator().manual_seed(Key.of(config.seed, "averaging").value)
            for rows in batch_rows(data, config, epoch, device):
                if check:
                    check()
                yield data.batch(rows, noise)[0]

        self._averaged.to(device)
        update_bn(batches(), self._averaged)
        metrics = evaluate(self._averaged, data, task, check)
        return {f"averaged_{name}": value for name, value in metrics.items()}
