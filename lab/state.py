"""All that moves while a run trains, and nothing else; what a checkpoint holds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import DataSet
from lab.average import Average
from lab.checkpoint import CheckpointError, first_line
from lab.clipping import Clipping
from lab.fingerprint import LENGTH, UNKNOWN
from lab.metrics import Losses, Metrics, TrainMetrics
from lab.optimizers import Schedule
from lab.plan import Plan
from lab.remarks import SecondMoments
from lab.shadow import Shadow
from low_precision.formats import FLOAT32
from low_precision.noise import Key
from low_precision.watcher import Watcher
from settings.config import OPTIMIZERS, Config, ConfigError

VERSION = 1  # of what `State.save` gives; another one is refused


@dataclass
class State:
    """All that moves while a run trains. Data order and rounding noise need nothing: seed and step say them.

    Where the run is follows from the steps and the lines of metrics.jsonl: between two evaluations, or before the one
    that comes after the last of these steps.
    """

    config: Config
    spec: DataSet  # of what it learns from, as loaded
    plan: Plan
    model: nn.Module
    optimizer: torch.optim.Optimizer  # its state_dict holds the accumulator and the loss scale too
    schedule: Schedule | None
    metrics: TrainMetrics  # since the last evaluation
    losses: Losses
    average: Average | None = None  # of the weights
    clipping: Clipping | None = None  # of the gradients
    command: str | None = None
    code: str = UNKNOWN  # the fingerprint of the code that trains; where that changed on the way, all of them: A+B
    watcher: Watcher | None = None  # hears what rounding loses
    shadow: Shadow | None = None  # the same training in float32
    step: int = 0  # steps done
    diverged_step: int | None = None
    history: list[Metrics] = field(default_factory=list)  # the lines of metrics.jsonl, one for each evaluation
    noise: torch.Generator = field(default_factory=torch.Generator)  # of this epoch's augmentation
    seconds: float = 0.0  # before it was resumed
    resumed: list[int] = field(default_factory=list)  # the steps at which it was
    wandb_id: str | None = None
    second_moments: SecondMoments = field(init=False)  # those of Adam that became zero

    def __post_init__(self) -> None:
        sites = [*self.config.rules(), *(line.site for line in self.config.lines() if line.rule.format != FLOAT32)]
        self.second_moments = SecondMoments(rounded=any(site.partition(".")[0] == "momentum" for site in sites))

    @property
    def epochs(self) -> int:
        """Epochs done; one that ended early because the loss diverged counts, where each has a line of its own."""
        return self.step // self.plan.in_epoch if self.plan.by_step else len(self.history)

    @property
    def next_evaluation(self) -> int:
        """The step after which the next evaluation is."""
        return self.plan.evaluation(len(self.history) + 1)

    def begin_measuring(self) -> None:
        """Starts the metrics of the steps up to the next evaluation, unless a resumed run is in their middle."""
        if self.step == self.plan.evaluation(len(self.history)):
            self.metrics.reset()
            if self.clipping:
                self.clipping.reset()

    def begin_batch(self) -> None:
        """The next batch is drawn; the first one of an epoch starts the noise of its images anew."""
        if self.step % self.plan.in_epoch == 0:
            epoch = self.step // self.plan.in_epoch + 1
            self.noise.manual_seed(Key.of(self.config.seed, "augmentation", epoch).value)

    def step_done(self) -> None:
        self.step += 1
        self.second_moments.after_step(self.step, self.optimizer)

    def end_evaluation(self, metrics: Metrics, diverged_step: int | None) -> None:
        """An evaluation is done, with these metrics; diverged_step: the step that ended the run early.

        Metrics that are not finite have diverged too, with the last step.
        """
        if diverged_step is None and not all(math.isfinite(value) for value in metrics.values() if value is not None):
            diverged_step = self.step
        self.history.append(metrics)
        self.diverged_step = diverged_step

    @property
    def finished(self) -> bool:
        return len(self.history) >= self.plan.evaluations or self.diverged_step is not None

    def save(self, seconds: float) -> dict[str, Any]:
        """seconds: of this run so far, since it was last resumed."""
        pending = self.losses.pending
        saved = {
            "version": VERSION,
            "config": self.config.as_dict(),
            "command": self.command,
            "code": self.code,
            "epoch": self.epochs,
            "batch": self._batch,
            "step": self.step,
            "diverged_step": self.diverged_step,
            "metrics": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "train": self.metrics.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "pending": torch.stack(pending) if pending else None,
            "first_loss": None if self.losses.first is None else float(self.losses.first),
            "second_moments": self.second_moments.state_dict(),
            "augmentation": self.noise.get_state(),
            "torch_rng": torch.get_rng_state(),
            "seconds": self.seconds + seconds,
            "resumed": self.resumed,
            "wandb_id": self.wandb_id,
        }
        saved |= {"shadow": self.shadow.state_dict()} if self.shadow else {}
        saved |= {"clipping": self.clipping.state_dict()} if self.clipping else {}
        return saved | ({"watch": self.watcher.state_dict()} if self.watcher else {})

    @property
    def _batch(self) -> int:
        """Batches done beside whole epochs: a checkpoint says it in words that people look for."""
        return 0 if self.diverged_step is not None else self.step - self.epochs * self.plan.in_epoch

    def load(self, saved: dict[str, Any], path: Path) -> None:
        """Go on from what `save` gave. path: of the checkpoint, for errors.

        ConfigError for another version or configuration, CheckpointError for what is no state of this run.
        """
        if saved.get("version") != VERSION:
            version = f" (its format version is {saved.get('version', 'none')}, allowed: {VERSION})"
            raise ConfigError("--resume", str(path), "a checkpoint of this version", note=version)
        try:
            recorded = Config.make(**saved["config"])
            differences = self.config.told_differences(recorded)
        except Exception as error:
            raise CheckpointError(f"{path}: no configuration of this program ({first_line(error)})") from error
        if self.shadow and "shadow" not in saved:
            raise ConfigError("--shadow", f"{path} without one", "where the run began with it")
        if differences:
            value = f"{path}: it is of another configuration ({'; '.join(differences)})"
            raise ConfigError("--resume", value, "its own")
        try:
            self._load(saved)
        except Exception as error:  # what somebody edited can raise anything
            raise CheckpointError(f"{path}: no state of this run ({first_line(error)})") from error

    def _load(self, saved: dict[str, Any]) -> None:
        self._load_position(saved)
        self.model.load_state_dict(saved["model"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, moments in saved["optimizer"]["state"].items():
            for value in moments.values() if self.config.optimizer in OPTIMIZERS else ():  # others have what they like
                _check(not torch.is_tensor(value) or value.shape in ((), parameters[index].shape), "its optimizer")
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(saved["schedule"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        if self.clipping:
            self.clipping.load_state_dict(saved["clipping"])
        if self.shadow:
            self.shadow.load_state_dict(saved["shadow"])
        device = parameters[0].device
        self.metrics.load_state_dict(saved["train"], device)
        self.losses.pending = [] if saved["pending"] is None else list(saved["pending"].to(device))
        if saved.get("first_loss") is not None:  # earlier versions kept neither this nor the next
            self.losses.first = torch.tensor(float(saved["first_loss"]), dtype=torch.float64)
        if "second_moments" in saved:
            self.second_moments.load_state_dict(saved["second_moments"])
        if self.watcher and "watch" in saved:  # else nobody watched the run until now
            self.watcher.load_state_dict(saved["watch"])
        self.noise.set_state(saved["augmentation"])
        torch.set_rng_state(saved["torch_rng"])
        self.seconds, self.resumed = float(saved["seconds"]), [*map(_whole, saved["resumed"]), self.step]
        _check(self.seconds >= 0 and math.isfinite(self.seconds), "its seconds")
        for name in ("command", "wandb_id"):
            _check(saved[name] is None or isinstance(saved[name], str), f"its {name}")
        self.command, self.wandb_id = saved["command"], saved["wandb_id"]
        self._load_code(saved.get("code", UNKNOWN))

    def _load_code(self, recorded: Any) -> None:
        """recorded: the fingerprints of the code that trained until here; the one that goes on comes behind them."""
        one = rf"({UNKNOWN}|[0-9a-f]{{{LENGTH}}})(\.[0-9a-f]{{{LENGTH}}})?"
        _check(isinstance(recorded, str) and re.fullmatch(rf"{one}(\+{one})*", recorded) is not None, "its code")
        earlier = recorded.split("+")
        self.code = "+".join(earlier if earlier[-1] == self.code else [*earlier, self.code])

    def _load_position(self, saved: dict[str, Any]) -> None:
        """Where the run is: its step, and the metrics until then."""
        self.step = _whole(saved["step"])
        self.diverged_step = None if saved["diverged_step"] is None else _whole(saved["diverged_step"])
        self.history = saved["metrics"]
        _check(isinstance(self.history, list) and all(map(_is_metrics, self.history)), "its metrics")
        done = len(self.history)
        _check([_whole(saved[name]) for name in ("epoch", "batch")] == [self.epochs, self._batch], "its position")
        whole = self.diverged_step is None  # else the last line is of a step that no evaluation was planned for
        if whole:
            _check(self.plan.evaluation(done) <= self.step <= self.plan.evaluation(done + 1), "its position")
        if self.plan.by_step:
            steps = list(map(self.plan.evaluation, range(1, done + whole)))
            _check([line.get("step") for line in self.history][: len(steps)] == steps, "its metrics")
        else:
            _check([line["epoch"] for line in self.history] == list(range(1, done + 1)), "its metrics")


def _check(right: bool, what: str) -> None:
    if not right:
        raise ValueError(f"{what} cannot be")


def _whole(value: Any) -> int:
    _check(isinstance(value, int) and not isinstance(value, bool) and value >= 0, "a count in it")
    return value


def _is_metrics(line: Any) -> bool:
    if not isinstance(line, dict) or "epoch" not in line or not all(isinstance(name, str) for name in line):
        return False
    return all(value is None or type(value) in (int, float) for value in line.values())
