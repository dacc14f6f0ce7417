"""The optimizers and learning-rate schedules of a run."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from low_precision import CollageAdamW
from settings.config import OPTIMIZERS, Config, refused
from sources import python_file

Schedule = torch.optim.lr_scheduler.LRScheduler


def build(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` names, of all the model's parameters.

    SettingError for a function of somebody's own that does not take what it is called with, or gives no such optimizer.
    """
    if config.optimizer not in OPTIMIZERS:
        return of_function(config, model)
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return lean(torch.optim.SGD)(model.parameters(), momentum=config.momentum, **settings)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "collage": CollageAdamW}
    return lean(kinds[config.optimizer])(model.parameters(), **settings)


def of_function(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """What FILE.py:FUNCTION gives of (parameters, learning_rate).

    It takes weight_decay and momentum too where it has parameters of these names, and they are set.
    """
    name = config.placed(config.optimizer)
    function = python_file.function_named("optimizer", name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {}
    for setting in ("weight_decay", "momentum"):
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
    """Moves the learning rate after each of so many steps of the run; None where there is nothing to move."""
    if config.schedule == "constant" or steps == 0:
        return None
    if config.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # The schedule's own cycling of the momentum would overrule --momentum.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps, cycle_momentum=False)


def lean(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of torch's optimizer `kind` that does the same to the bit and starts a second or two sooner.

    Torch wraps these five methods for the sake of torch.compile, in wrappers that import torch._dynamo when an
    optimizer is made: most of the time of a small run. Nothing is compiled here, so the subclass has the methods
    themselves. What `step`'s wrapper does besides, it does too: gradients are recorded only if "differentiable".
    """
    step = inspect.unwrap(kind.step)

    def lean_step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return step(self, *args, **kwargs)

    others = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in others} | {"step": lean_step}
    return type(kind.__name__, (kind,), methods)
