"""The optimizers and learning-rate schedules of a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lab.lean import lean
from lab.muon import MuonAdamW, hidden_matrices
from low_precision import CollageAdamW
from settings.config import Config, refused
from settings.training import BETAS, OPTIMIZERS
from sources import python_file

Schedule = torch.optim.lr_scheduler.LRScheduler
Groups = list[dict[str, Any]]


def build(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` names, of all the model's parameters.

    SettingError for a function of somebody's own that does not take what it is called with, or gives no such optimizer.
    """
    if config.optimizer not in OPTIMIZERS:
        return of_function(config, model)
    if config.optimizer == "muon":
        return _muon(config, model)
    parameters, lr, betas = list(model.parameters()), config.learning_rate, config.betas or BETAS
    if config.optimizer == "sgd":
        return lean(torch.optim.SGD)(_groups(config, parameters), lr, momentum=config.momentum)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "collage": CollageAdamW}
    return lean(kinds[config.optimizer])(_groups(config, parameters), lr, betas=betas)


def _groups(config: Config, parameters: Iterable[Tensor]) -> Groups:
    """The parameters with their weight decay; where it is for matrices alone, these and then the others."""
    parameters = list(parameters)
    if config.decay == "all" or not config.weight_decay or not parameters:  # torch takes no empty list of groups
        return [{"params": parameters, "weight_decay": config.weight_decay}]
    parts = {config.weight_decay: [p for p in parameters if p.ndim >= 2], 0.0: [p for p in parameters if p.ndim < 2]}
    return [{"params": part, "weight_decay": decay} for decay, part in parts.items() if part]


def _muon(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Muon for hidden matrices and AdamW for the others; ConfigError for a model without one of the former."""
    hidden = hidden_matrices(model)
    if not hidden:
        others = ", ".join(name for name in OPTIMIZERS if name != "muon")
        why = f"{config.model_name} has no matrix between its inputs and its head"
        raise refused("optimizer", "muon", f"{others} ({why})")
    known = set(hidden)
    others = _groups(config, [p for p in model.parameters() if p not in known])
    return lean(MuonAdamW)(_groups(config, hidden), others, config.learning_rate, config.betas or BETAS)


def of_function(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """What FILE.py:FUNCTION gives of (parameters, learning_rate).

    It takes weight_decay, momentum, betas and decay too where it has parameters of these names, and they are set.
    """
    name = config.placed(config.optimizer)
    function = python_file.function_named("optimizer", name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {}
    for setting in ("weight_decay", "momentum", "betas", "decay"):
        if (value := getattr(config, setting)) == getattr(Config, setting):
            continue
        if setting not in python_file.options_of(function):
            raise refused(setting, value, f"none ({name} has no parameter {setting})")
        options[setting] = value
    made = python_file.call("optimizer", name, function, parameters, config.learning_rate, **options)
    if not isinstance(made, torch.optim.Optimizer):
        raise refused("optimizer", f"{name}, which gives a {type(made).__name__}", "what gives a torch.optim.Optimizer")
    if (closure := inspect.signature(made.step).parameters.get("closure")) and closure.default is closure.empty:
        raise refused("optimizer", f"{name}, whose step needs a closure", "one whose step is called alone")
    updated = {id(p) for group in made.param_groups for p in group["params"]}
    if updated != set(map(id, parameters)):
        count = len(updated & set(map(id, parameters)))
        what = f"{name}, which updates {count} of {len(parameters)} parameters, and {len(updated) - count} others"
        raise refused("optimizer", what, "all that require gradients, and no others")
    return made


def schedule(config: Config, optimizer: torch.optim.Optimizer, steps: int) -> Schedule | None:
    """Moves the learning rate after each of so many steps of the run; None where there is nothing to move.

    ConfigError for a warmup of more steps.
    """
    if config.warmup > steps:
        raise refused("warmup", config.warmup, f"at most {steps}, the steps of the run")
    if (config.schedule == "constant" and not config.warmup) or steps == 0:
        return None
    if config.schedule == "onecycle":
        # The schedule's own cycling of the momentum would overrule --momentum.
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps, cycle_momentum=False)
    if config.warmup or config.final_learning_rate:
        end = None if config.schedule == "constant" else config.final_learning_rate
        return Warmup(optimizer, config.warmup, steps, end)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


class Warmup(Schedule):
    """A line up to the learning rate of each group in so many steps, then that, or half a cosine down to `end`.

    The first step has lr / (warmup + 1), and step warmup + 1 is the first one with lr. The cosine would reach `end` in
    the step after the last one. Both as in nanoGPT (get_lr in its train.py), in the same order of operations.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int, steps: int, end: float | None) -> None:
        """steps: of the run, >= warmup. end: None for no cosine."""
        self.warmup, self.steps, self.end = warmup, steps, end
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [self.rate(self.last_epoch, lr) for lr in self.base_lrs]  # the last "epoch" counts the steps done

    def rate(self, done: int, lr: float) -> float:
        """The learning rate of the step after so many."""
        if done < self.warmup:
            return lr * (done + 1) / (self.warmup + 1)
        if self.end is None:
            return lr
        if done >= self.steps:
            return self.end
        ratio = (done - self.warmup) / (self.steps - self.warmup)
        return self.end + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (lr - self.end)
