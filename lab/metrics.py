"""What is measured: the loss, an epoch's training metrics, the test set's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Data

EVALUATION_ROWS = 250  # at a time: no more memory than a step takes


def loss_of(output: Tensor, y: Tensor, task: str, reduction: str = "mean") -> Tensor:
    return (F.mse_loss if task == "regression" else F.cross_entropy)(output, y, reduction=reduction)


def count_correct(output: Tensor, y: Tensor, task: str) -> Tensor:
    """int64 (): how many rows the model got right; 0 for a regression."""
    if task == "regression":
        return torch.zeros((), dtype=torch.int64, device=y.device)
    return (output.detach().argmax(1) == y).sum()


class TrainMetrics:
    """Regression: the loss of the last step, in its own batch. Classification: means over the epoch's rows."""

    def __init__(self, task: str) -> None:
        self.task = task
        self.reset()

    def reset(self) -> None:
        self.rows: int | Tensor = 0
        self.loss: Tensor | float = 0.0
        self.correct: Tensor | int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": int(self.rows), "loss": torch.as_tensor(self.loss), "correct": torch.as_tensor(self.correct)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.rows = int(state["rows"])
        self.loss, self.correct = state["loss"].reshape(()).to(device), state["correct"].reshape(()).to(device)

    def add(self, loss: Tensor, correct: Tensor, rows: int | Tensor) -> None:
        """A step's mean loss, and how many of its rows the model got right."""
        if self.task == "regression":
            self.loss, self.rows = loss, 1
        else:
            self.loss = self.loss + loss.double() * rows  # () on the device: no wait in the loop
            self.correct = self.correct + correct
            self.rows = self.rows + rows

    def values(self) -> dict[str, float]:
        loss = float(self.loss) / int(self.rows)
        if self.task == "regression":
            return {"training_mse": loss, "training_rmse": math.sqrt(loss)}
        return {"training_loss": loss, "training_accuracy": float(self.correct) / int(self.rows)}


@torch.no_grad()
def evaluate(model: nn.Module, split: Data, task: str, check: Callable[[], None] | None = None) -> dict[str, float]:
    """Means over all test rows, summed in float64; the model rounds as in training. check: called now and then."""
    model.eval()
    loss, correct = 0.0, 0
    count = len(split.test_x)
    for rows, truth in zip(split.test_x.split(EVALUATION_ROWS), split.test_y.split(EVALUATION_ROWS), strict=True):
        if check:
            check()
        output = model(split.features(rows))
        loss += float(loss_of(output, truth, task, "none").double().sum())
        if task == "classification":
            correct += int(count_correct(output, truth, task))
    loss /= count
    if task == "classification":
        return {"testing_loss": loss, "testing_accuracy": correct / count}
    rmse = math.sqrt(loss)
    return {"testing_mse": loss, "testing_rmse": rmse, "testing_rmse_target_units": rmse * split.target_deviation}


def wandb_keys(metrics: dict[str, float | int | None]) -> dict[str, float | int | None]:
    """training_mse -> Training.MSE."""
    named = {}
    for name, value in metrics.items():
        phase, _, what = name.partition("_")
        if phase in ("training", "testing", "averaged"):
            words = what.replace("_", " ").title().replace(" ", "")
            named[f"{phase.title()}.{words.replace('Rmse', 'RMSE').replace('Mse', 'MSE')}"] = value
        else:
            named[name] = value
    return named
