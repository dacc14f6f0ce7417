"""What is measured: a task's loss, training metrics, the test set's. A new task is a class and a row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Data, Text

EVALUATION_ROWS = 250  # at a time: no more memory than a step takes
CUDA_CHECK_STEPS = 50  # between two looks at the losses on CUDA: each look waits for the device
Metrics = dict[str, float | int | None]


class Diverged(Exception):
    """The loss of a step is NaN or infinite."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss of step {step} is not finite")
        self.step = step


class Losses:
    """The losses of the steps that nobody has looked at yet."""

    def __init__(self, device: torch.device) -> None:
        self.first: Tensor | None = None  # (): that of the first step, which is the untrained model's
        self.pending: list[Tensor] = []  # () each, on the device
        self._every = 1 if device.type == "cpu" else CUDA_CHECK_STEPS

    def add(self, loss: Tensor, step: int) -> None:
        """The loss of that step. Diverged where a look is due and one of the pending losses is not finite."""
        if step == 1:
            self.first = loss
        self.pending.append(loss)
        if len(self.pending) >= self._every:
            self.check(step)

    def check(self, last_step: int) -> None:
        """Raises Diverged for the first pending loss that is NaN or infinite; the last one is that of `last_step`."""
        if not self.pending:
            return
        finite = torch.stack(self.pending).isfinite().tolist()
        if not all(finite):
            raise Diverged(last_step - len(self.pending) + 1 + finite.index(False))
        self.pending.clear()


class TrainMetrics:
    """The training metrics since the last evaluation: sums over the rows of these steps, on the device."""

    rows: int | Tensor
    loss: Tensor | float
    correct: Tensor | int

    def __init__(self, task: Task) -> None:
        self._task = task
        self.reset()

    def reset(self) -> None:
        self.rows, self.loss, self.correct = 0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"rows": int(self.rows), "loss": torch.as_tensor(self.loss), "correct": torch.as_tensor(self.correct)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.rows = int(state["rows"])
        self.loss, self.correct = state["loss"].reshape(()).to(device), state["correct"].reshape(()).to(device)

    def add(self, loss: Tensor, correct: Tensor, rows: int | Tensor) -> None:
        """A step's mean loss, and how many of its rows the model got right."""
        self._task.add(self, loss, correct, rows)

    def values(self) -> Metrics:
        return self._task.training(float(self.loss) / int(self.rows), int(self.correct), int(self.rows))


class Task(ABC):
    """What is learned: a loss, and the metrics that come of it."""

    loss_metric: str  # the name of the mean loss among the metrics, behind "training_" and "testing_"

    @abstractmethod
    def loss_of_constant(self, outputs: int) -> float:
        """The mean loss of the best model that gives the same answer for each sample, or what it comes to roughly."""

    @abstractmethod
    def loss(self, output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """(n, outputs), targets -> (), or with reduction "none" a loss for each element."""

    def correct(self, output: Tensor, y: Tensor) -> Tensor:
        """int64 (): how many rows the model got right; 0 where there is no right and wrong."""
        return torch.zeros((), dtype=torch.int64, device=y.device)

    def add(self, metrics: TrainMetrics, loss: Tensor, correct: Tensor, rows: int | Tensor) -> None:
        """Adds that to the sums."""
        metrics.loss = metrics.loss + loss.double() * rows  # () on the device: no wait in the loop
        metrics.correct = metrics.correct + correct
        metrics.rows = metrics.rows + rows

    @abstractmethod
    def training(self, loss: float, correct: int, rows: int) -> Metrics:
        """The training metrics by name, of the mean loss."""

    @abstractmethod
    def testing(self, loss: float, correct: int, rows: int, data: Data) -> dict[str, float]:
        """The test set's metrics by name, of the mean loss."""


class Regression(Task):
    """Mean squared error; in training that of the last step, in its own batch."""

    loss_metric = "mse"

    def loss_of_constant(self, outputs: int) -> float:
        return 1.0  # the variance of targets that are standardized

    def loss(self, output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.mse_loss(output, y, reduction=reduction)

    def add(self, metrics: TrainMetrics, loss: Tensor, correct: Tensor, rows: int | Tensor) -> None:
        metrics.loss, metrics.rows = loss, 1

    def training(self, loss: float, correct: int, rows: int) -> Metrics:
        return {"training_mse": loss, "training_rmse": math.sqrt(loss)}

    def testing(self, loss: float, correct: int, rows: int, data: Data) -> dict[str, float]:
        rmse = math.sqrt(loss)
        return {"testing_mse": loss, "testing_rmse": rmse, "testing_rmse_target_units": rmse * data.target_deviation}


class Classification(Task):
    """Cross entropy and accuracy; in training means over the rows, as they were trained on."""

    loss_metric = "loss"

    def loss_of_constant(self, outputs: int) -> float:
        return math.log(outputs)  # each class equally probable

    def loss(self, output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(output, y, reduction=reduction)

    def correct(self, output: Tensor, y: Tensor) -> Tensor:
        return (output.detach().argmax(1) == y).sum()

    def training(self, loss: float, correct: int, rows: int) -> Metrics:
        return {"training_loss": loss, "training_accuracy": float(correct) / rows}

    def testing(self, loss: float, correct: int, rows: int, data: Data) -> dict[str, float]:
        return {"testing_loss": loss, "testing_accuracy": correct / rows}


class Language(Task):
    """Cross entropy of the next token, in nats; in training the mean over the tokens, as they were read."""

    loss_metric = "loss"

    def loss_of_constant(self, outputs: int) -> float:
        return math.log(outputs)  # each symbol equally probable

    def loss(self, output: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """(n, length, symbols), int64 (n, length) -> (), or with reduction "none" (n * length,)."""
        return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction=reduction)

    def training(self, loss: float, correct: int, rows: int) -> Metrics:
        return {"training_loss": loss}

    def testing(self, loss: float, correct: int, rows: int, data: Data) -> dict[str, float]:
        of_characters = {"testing_bits_per_character": loss / math.log(2)} if isinstance(data, Text) else {}
        return {"testing_loss": loss, **of_characters}


TASKS: dict[str, Task] = {
    "regression": Regression(),
    "classification": Classification(),
    "language": Language(),
}


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, task: Task, check: Callable[[], None] | None = None) -> dict[str, float]:
    """Means over all test rows, of a text over the tokens of its windows, summed in float64.

    The model rounds as in training. check: called now and then.
    """
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for x, targets in data.test_batches(EVALUATION_ROWS):
        if check:
            check()
        output = model(x)
        losses = task.loss(output, targets, "none")
        loss += float(losses.double().sum())
        count += losses.numel()
        correct += int(task.correct(output, targets))
    return task.testing(loss / count, correct, count, data)


def wandb_keys(metrics: Metrics) -> Metrics:
    """training_mse -> Training.MSE."""
    named: Metrics = {}
    for name, value in metrics.items():
        phase, _, what = name.partition("_")
        if phase in ("training", "testing", "averaged"):
            words = what.replace("_", " ").title().replace(" ", "")
            named[f"{phase.title()}.{words.replace('Rmse', 'RMSE').replace('Mse', 'MSE')}"] = value
        else:
            named[name] = value
    return named
