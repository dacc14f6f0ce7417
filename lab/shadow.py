"""The same training in float32 beside the run: where its weights, gradients and loss part from those without rounding.

The shadow is a second model with an optimizer and a schedule of its own. It begins with the run's initial weights as
they were before any rounding, and is trained on the very batches of the run, so it ends with the bits of a run in
float32 with the same seed. Nothing of it flows into the run.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lab import optimizers
from lab.batches import Batch
from lab.draws import draws_kept
from lab.metrics import Task
from lab.step_lines import SHADOW, Row, StepLines, WandbKeys
from low_precision.apart import apart, parameters_by_layer, rows_of
from settings.config import Config


class Shadow:
    """A float32 model that is trained beside the run, and how far the run is from it, in the steps that are looked at.

    It is looked at in every step, or in the first one and each `every`-th. What is measured waits on the device until
    somebody asks for the lines.
    """

    def __init__(
        self, config: Config, model: nn.Module, steps: int, wrap: Callable[[nn.Module], nn.Module], every: int = 1
    ) -> None:
        """model: with the run's initial weights, unrounded, and its device. steps: of the run. wrap: over processes."""
        if config.optimizer == "collage":
            config = replace(config, optimizer="adamw")  # collage is AdamW in pairs of bfloat16 numbers
        self.model, self._every = model.train(), every
        self.optimizer = optimizers.build(config, model)
        self._schedule = optimizers.schedule(config, self.optimizer, steps)
        self._micro_batch, self._clip_norm = config.micro_batch, config.clip_norm
        self._whole, self._layers = wrap(model), parameters_by_layer(model)
        self._loss: Tensor | None = None
        self._pending: list[tuple[int, Tensor, Tensor]] = []  # step, (layers, 2), (): difference of losses

    def train_step(self, batch: Batch, task: Task, step: int) -> None:
        """That step of its own, before the run's; what is dropped out is the same in both, and other random numbers
        are as before."""
        with _random_numbers_kept(batch.x.device):
            self.optimizer.zero_grad()
            parts, results = batch.parts(self._micro_batch), []
            for part in parts:
                with batch.processes.adding(self._whole, last=part is parts[-1]), part.drawn(step):
                    output = self._whole(part.x.clone())  # a model may change what it reads
                    loss = task.loss(output, part.y)
                    results.append((loss.detach(), task.correct(output, part.y), part.rows))
                    part.share(loss).backward()
            self._loss, _, _ = batch.over_processes(results)
            if self._clip_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
            self.optimizer.step()
        if self._schedule:
            self._schedule.step()

    def compare(self, model: nn.Module, loss: Tensor, step: int) -> None:
        """Notes how far the run is from the shadow after both did that step; loss: the run's, of the whole batch."""
        if (step == 1 or step % self._every == 0) and self._loss is not None:
            difference = loss.double() - self._loss.double()
            self._pending.append((step, apart(model, self.model, self._layers), difference))

    def take_lines(self) -> list[Row]:
        """The lines of shadow.jsonl that nobody has taken yet: for each step the model's, then each layer's."""
        lines: list[Row] = []
        for step, numbers, difference in self._pending:
            lines.append({"step": step, "layer": "", "loss_difference": float(difference)})
            lines += [{"step": step} | row for row in rows_of(list(self._layers), numbers)]
        self._pending.clear()
        return lines

    def state_dict(self) -> dict[str, Any]:
        """What is to be taken before it: the lines."""
        schedule = self._schedule.state_dict() if self._schedule else None
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "schedule": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._schedule:
            self._schedule.load_state_dict(state["schedule"])


@contextlib.contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """What is drawn inside, from PyTorch's, NumPy's or Python's generator of the process, is drawn again after it."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002, which a model may use
    with draws_kept(device):
        yield
    random.setstate(of_python)
    np.random.set_state(of_numpy)  # noqa: NPY002


def shadow_lines(shadow: Shadow) -> StepLines:
    """What is seen of the shadow, on its way to the record and to wandb."""
    return StepLines(SHADOW, shadow.take_lines, _wandb_keys)


def _wandb_keys(lines: Iterable[Row]) -> WandbKeys:
    """Rows of one step by wandb's keys, "shadow/loss_difference" and "shadow/LAYER/NUMBER"."""
    numbers = {}
    for line in lines:
        measured = {name: value for name, value in line.items() if name not in ("step", "layer")}
        layer = [] if "loss_difference" in line else [line["layer"] or "model"]
        numbers |= {"/".join(["shadow", *layer, name]): value for name, value in measured.items()}
    return numbers, {}
