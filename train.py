"""run(config) -> Result: one training run, from the data to its record. Read `run` from top to bottom."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import models
import quant
import track
import wandb_run
from config import Config, ConfigError
from formats import Overflow
from kernels.noise import Key
from quant import LowPrecision, Scheme

EVALUATION_ROWS = 1000  # at a time
CHECKPOINT_SECONDS = 1.0  # between two checkpoints at least: a run of milliseconds does not wait for the disk
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal, ten lines a run apart
CUDA_CHECK_STEPS = 50  # between two looks at the losses: each look waits for the device


@dataclass(frozen=True)
class Result:
    """What came of a run. summary: as in summary.json; folder: where the record lies; notes: lines for the user."""

    config: Config
    summary: dict[str, Any]
    history: list[dict[str, float | int | None]]  # the lines of metrics.jsonl
    folder: Path
    notes: list[str]


class Diverged(Exception):
    """The loss of a step is NaN or infinite."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss of step {step} is not finite")
        self.step = step


def run(config: Config, command: str | None = None) -> Result:
    """Train as `config` says and record it; `command` is recorded as what started the run.

    A run that diverges is a result too, its status "diverged". Raises ConfigError for what this machine does not
    have, and what loading, training or writing raises; before that, and at a KeyboardInterrupt, what was recorded is
    closed with the status "failed" or "interrupted".
    """
    config = config.resolved()
    device = _device(config.device)
    started = time.perf_counter()

    spec = data.DATASETS[config.dataset]
    layout = torch.channels_last if len(spec.shape) == 3 else torch.contiguous_format  # convolutions run faster so
    model = models.build(config.model, spec.shape, spec.outputs, config.seed).to(device, memory_format=layout)
    scheme = Scheme(config.rules(), config.rounding_seed, Overflow(config.overflow), config.backend)
    try:
        low = LowPrecision(model, scheme, config.layers)
    except ValueError as error:  # a pattern that matches nothing: only the model knows its names
        raise ConfigError(f"--{error}") from None
    plain = _optimizer(config, model)
    optimizer = low.attach(plain, config.loss_scale)

    split = data.load(config.dataset, config.test_split, config.seed, config.scale_on, config.data_dir)
    train_x, test_x = (x.to(device, memory_format=layout) for x in (split.train_x, split.test_x))
    train_y, test_y = split.train_y.to(device), split.test_y.to(device)
    steps = math.ceil(len(train_x) / config.batch_size)
    schedule = _schedule(config, plain, config.epochs * steps)

    record = track.Record(config.output_dir, config.folder_name, asdict(config))
    wandb = wandb_run.Wandb(
        config.wandb,
        config.wandb_project,
        config.wandb_entity,
        config.name,
        config.group,
        asdict(config),
        config.output_dir,
    )
    history: list[dict[str, float | int | None]] = []
    summary: dict[str, Any] = {"name": config.name, "status": "failed", "epochs": 0, "steps": 0}
    saved = time.perf_counter()
    progress = _Progress(config, steps)
    try:
        if not config.epochs:
            summary |= _evaluate(model, test_x, test_y, spec.task, split.target_deviation)
            record.checkpoint(_state(config, model, plain, schedule, summary))
        for epoch in range(1, config.epochs + 1):
            diverged = None
            train = _TrainMetrics(spec.task)
            model.train()
            noise = torch.Generator().manual_seed(Key.of(config.seed, "augmentation", epoch).value)
            pending: list[Tensor] = []  # losses that nobody has looked at yet
            try:
                for rows in _batches(len(train_x), config, epoch, device):
                    x, y = train_x[rows], train_y[rows]
                    if split.augment:
                        x = data.augment(x, noise)
                    output = model(x)
                    loss = _loss(output, y, spec.task)
                    train.add(loss, output, y)
                    pending.append(loss.detach())
                    if device.type == "cpu" or len(pending) == CUDA_CHECK_STEPS:
                        _check_finite(pending, summary["steps"] + 1)
                    optimizer.zero_grad()
                    low.scale(loss).backward()
                    optimizer.step()
                    if schedule:
                        schedule.step()
                    summary["steps"] += 1
                    progress.step()
                _check_finite(pending, summary["steps"])
            except Diverged as error:
                diverged = error.step

            metrics = {"epoch": epoch, **train.values()}
            metrics |= _evaluate(model, test_x, test_y, spec.task, split.target_deviation)
            if diverged is None and not all(math.isfinite(value) for value in metrics.values()):
                diverged = summary["steps"]
            if config.loss_scale == "dynamic":
                metrics |= {"loss_scale": low.loss_scale.value, "skipped_steps": low.loss_scale.skipped}
            history.append(metrics)
            record.epoch(metrics)
            wandb.log(_wandb_keys(metrics), step=epoch)
            summary |= metrics | {"epochs": epoch}
            progress.epoch(metrics)
            last = diverged is not None or epoch == config.epochs
            if last or time.perf_counter() - saved > CHECKPOINT_SECONDS:
                record.checkpoint(_state(config, model, plain, schedule, summary))
                saved = time.perf_counter()
            if diverged is not None:
                summary["diverged_step"] = diverged
                break
        summary["status"] = "diverged" if "diverged_step" in summary else "complete"
    except KeyboardInterrupt:
        summary["status"] = "interrupted"
        raise
    finally:
        progress.close()
        summary.pop("epoch", None)
        summary["seconds"] = round(time.perf_counter() - started, 3)
        summary["parameters"] = sum(p.numel() for p in model.parameters())
        summary |= {"command": command, "environment": _environment(config, device)}
        folder = record.finish(summary)
        ended_well = summary["status"] in ("complete", "diverged")
        notes = wandb.finish(summary, exit_code=0 if ended_well else 1)
        if not ended_well:
            for line in [f"{summary['status']}: recorded so far in {folder}"] * folder.exists() + notes:
                print(line, file=sys.stderr)
    return Result(config, summary, history, folder, notes)


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("--device: given cuda, allowed here: auto, cpu (PyTorch finds no CUDA device)")
    device = torch.device("cuda" if there and name != "cpu" else "cpu")
    if device.type == "cuda":  # the same bits every time, and float32 that is float32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **settings)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), **settings)


def _schedule(config: Config, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Moves the learning rate after each step; None where there is nothing to move."""
    if config.schedule == "constant" or steps == 0:
        return None
    if config.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # The schedule's own cycling of the momentum would overrule --momentum.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps, cycle_momentum=False)


def _batches(n: int, config: Config, epoch: int, device: torch.device) -> Iterator[Tensor]:
    """Row numbers of each batch. The order depends on (seed, epoch); a batch of all rows leaves it alone."""
    if config.batch_size >= n:
        order = torch.arange(n)
    else:
        generator = torch.Generator().manual_seed(Key.of(config.seed, "order", epoch).value)
        order = torch.randperm(n, generator=generator)
    yield from order.to(device).split(min(config.batch_size, n))


def _loss(output: Tensor, y: Tensor, task: str, reduction: str = "mean") -> Tensor:
    return (F.mse_loss if task == "regression" else F.cross_entropy)(output, y, reduction=reduction)


def _check_finite(losses: list[Tensor], next_step: int) -> None:
    """Raises Diverged for the first of these losses that is NaN or infinite; the last is that of `next_step`."""
    if losses:
        finite = torch.stack(losses).isfinite().tolist()
        if not all(finite):
            raise Diverged(next_step - len(losses) + 1 + finite.index(False))
        losses.clear()


class _TrainMetrics:
    """Regression: the loss of the last step, in its own batch. Classification: means over the epoch's rows."""

    def __init__(self, task: str) -> None:
        self.task, self.rows = task, 0
        self.loss: Tensor | float = 0.0
        self.correct: Tensor | int = 0

    def add(self, loss: Tensor, output: Tensor, y: Tensor) -> None:
        loss, output = loss.detach(), output.detach()
        if self.task == "regression":
            self.loss, self.rows = loss, 1
        else:
            self.loss = self.loss + loss.double() * len(y)  # () on the device: no wait in the loop
            self.correct = self.correct + (output.argmax(1) == y).sum()
            self.rows += len(y)

    def values(self) -> dict[str, float]:
        loss = float(self.loss) / self.rows
        if self.task == "regression":
            return {"training_mse": loss, "training_rmse": math.sqrt(loss)}
        return {"training_loss": loss, "training_accuracy": float(self.correct) / self.rows}


@torch.no_grad()
def _evaluate(model: nn.Module, x: Tensor, y: Tensor, task: str, target_deviation: float) -> dict[str, float]:
    """Means over all rows, summed in float64; the model rounds as in training."""
    model.eval()
    loss, correct = 0.0, 0
    for rows, truth in zip(x.split(EVALUATION_ROWS), y.split(EVALUATION_ROWS), strict=True):
        output = model(rows)
        loss += float(_loss(output, truth, task, "none").double().sum())
        if task == "classification":
            correct += int((output.argmax(1) == truth).sum())
    loss /= len(x)
    if task == "classification":
        return {"testing_loss": loss, "testing_accuracy": correct / len(x)}
    rmse = math.sqrt(loss)
    return {"testing_mse": loss, "testing_rmse": rmse, "testing_rmse_target_units": rmse * target_deviation}


def _wandb_keys(metrics: dict[str, float | int | None]) -> dict[str, float | int | None]:
    """training_mse -> Training.MSE."""
    named = {}
    for name, value in metrics.items():
        phase, _, what = name.partition("_")
        if phase in ("training", "testing"):
            words = what.replace("_", " ").title().replace(" ", "")
            named[f"{phase.title()}.{words.replace('Rmse', 'RMSE').replace('Mse', 'MSE')}"] = value
        else:
            named[name] = value
    return named


def _state(config: Config, model: nn.Module, optimizer: Any, schedule: Any, summary: dict[str, Any]) -> dict[str, Any]:
    """All that continues the run: data order, augmentation and rounding noise follow from seed, epoch and step."""
    return {
        "config": asdict(config),
        "epoch": summary["epochs"],
        "step": summary["steps"],
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict() if schedule else None,
        "torch_rng": torch.get_rng_state(),
    }


class _Progress:
    """A bar on a terminal, a line now and then elsewhere (and where a terminal says it has no columns); on stderr."""

    def __init__(self, config: Config, steps: int) -> None:
        self.epochs = config.epochs
        bar = sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0 and config.epochs > 0
        self.bar = tqdm(total=config.epochs * steps, desc=config.name, unit="step", leave=False) if bar else None
        self.said = time.perf_counter()

    def step(self) -> None:
        if self.bar:
            self.bar.update()

    def epoch(self, metrics: dict[str, float | int | None]) -> None:
        shown = {name: value for name, value in metrics.items() if name.endswith(("_mse", "_loss", "_accuracy"))}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self.bar:
            self.bar.set_postfix_str(text, refresh=False)
            return
        epoch, now = metrics["epoch"], time.perf_counter()
        tenth = epoch * 10 // self.epochs > (epoch - 1) * 10 // self.epochs
        if tenth or now - self.said > LINE_SECONDS:
            print(f"epoch {epoch}/{self.epochs}  {text}", file=sys.stderr, flush=True)
            self.said = now

    def close(self) -> None:
        if self.bar:
            self.bar.close()


def _environment(config: Config, device: torch.device) -> dict[str, Any]:
    """What a result depends on, beside its config."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "qtorch", "scikit-learn", "numpy", "wandb"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "engine": quant.AUTO if config.backend == "auto" else config.backend,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this code, "-dirty" where files differ from it; None outside a git checkout."""
    here = Path(__file__).parent
    if not (here / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
        )
    except OSError:  # no git
        return None
    return described.stdout.strip() or None
