"""run(config) -> Result: one training run, from the data to its record. Read `_run` from top to bottom."""

from __future__ import annotations

import math
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import data
import models
from lab import checkpoint, console, wandb_run
from lab import metrics as measure
from lab import record as track
from lab.checkpoint import Due, State
from lab.processes import Processes
from low_precision.engines import choice as engines
from low_precision.formats import Overflow
from low_precision.noise import Key
from low_precision.optimizer import lean
from low_precision.wrap import LowPrecision, Scheme
from settings.config import Config, ConfigError

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


def run(config: Config, command: str | None = None, resume: Path | None = None, quiet: bool = False) -> Result:
    """Train as `config` says and record it; `command` is recorded as what started the run; quiet: without progress.

    resume: the folder of an unfinished record of the same configuration, to go on with from its last checkpoint. A run
    that diverges is a result too, its status "diverged". Ctrl-C, SIGTERM and SIGHUP end the run after its step, with a
    checkpoint, as a KeyboardInterrupt.
    Raises ConfigError for what this machine does not have and for a checkpoint of another configuration, and what
    loading, training or writing raises; before that, what was recorded is closed with the status "failed" or
    "interrupted". The exception's notes then say where it lies and how to go on.
    """
    with Processes(_device(config.device)) as processes:
        return _run(config.resolved(), processes, command, resume, quiet or not processes.first)


def _run(config: Config, processes: Processes, command: str | None, resume: Path | None, quiet: bool) -> Result:
    device = processes.device
    started = time.monotonic()

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

    if processes.count > 1:
        low.clock.any_overflowed = lambda here: processes.any(here)[0]
    model_of_all = processes.wrap(model)

    where = (config.dataset, config.test_split, config.seed, config.scale_on, config.data_dir)
    split = processes.first_before_others(lambda: data.load(*where)).to(device, layout)
    steps = math.ceil(len(split.train_x) / config.batch_size)
    _check_parts(config, len(split.train_x), processes.count)
    schedule = _schedule(config, plain, config.epochs * steps)
    average = _average(config) if config.average_last else None
    unaveraged = math.floor((1 - config.average_last) * config.epochs + 1e-9)  # how many epochs

    at = State(config, model, plain, schedule, measure.TrainMetrics(spec.task), average, command)  # where the run is
    if resume:
        record = _resumed(resume, at, steps, processes)
    elif processes.first:
        record = track.Record(config.output_dir, config.folder_name, asdict(config))
    else:
        record = track.NoRecord()
    wandb = _wandb(at, processes.first)
    progress = console.Progress(config, steps, at.step, quiet=quiet)
    due = Due(config.checkpoint_every)

    def write_checkpoint() -> None:
        processes.check_same(_replicated(model, plain, low))
        record.checkpoint(checkpoint.pack(at.save(time.monotonic() - started)))
        due.written = time.monotonic()

    def check() -> bool:
        """Whether a checkpoint is due; raises Stopped if one of the processes was asked to stop."""
        stopping, writing = processes.any(stop.asked > 0, due.after_step())
        if stopping:
            raise console.Stopped(stop.number)
        return writing

    untrained: dict[str, float] = {}  # the metrics of a run of no epochs
    failure: BaseException | None = None
    with console.Stop() as stop:
        try:
            if not config.epochs:
                untrained = processes.from_first(lambda: measure.evaluate(model, split, spec.task))
                write_checkpoint()
            while at.epoch < config.epochs and at.diverged_step is None:
                epoch, diverged = at.epoch + 1, None
                if at.batch == 0:  # else a run that goes on is in the middle of it
                    at.train.reset()
                    at.noise.manual_seed(Key.of(config.seed, "augmentation", epoch).value)
                model.train()
                try:
                    for rows in islice(_batches(len(split.train_x), config, epoch, device), at.batch, None):
                        if check():
                            write_checkpoint()
                        part = processes.part(len(rows))
                        x, y = split.features(split.train_x[rows], at.noise, part), split.train_y[rows[part]]
                        low.clock.rows, low.clock.rows_before = len(y), part.start
                        output = model_of_all(x)
                        loss = measure.loss_of(output, y, spec.task)
                        seen = processes.sums(loss.detach(), measure.count_correct(output, y, spec.task), len(y))
                        at.train.add(*seen)
                        at.pending.append(seen[0])
                        if device.type == "cpu" or len(at.pending) == CUDA_CHECK_STEPS:
                            _check_finite(at.pending, at.step + 1)
                        optimizer.zero_grad()
                        if processes.count > 1:
                            loss = loss * processes.share(len(y), len(rows))
                        low.scale(loss).backward()
                        optimizer.step()
                        if schedule:
                            schedule.step()
                        at.step += 1
                        at.batch += 1
                        progress.step()
                    check()
                    _check_finite(at.pending, at.step)
                except Diverged as error:
                    diverged = error.step

                metrics = {"epoch": epoch, **at.train.values()}
                # A step that diverged is half done, and of several processes, the others do not evaluate.
                stoppable = stop.check if diverged is None and processes.count == 1 else None
                metrics |= processes.from_first(partial(measure.evaluate, model, split, spec.task, stoppable))
                if average and diverged is None:
                    if average.n_averaged < epoch - unaveraged:  # else it was interrupted below
                        average.update_parameters(model)
                    if epoch == config.epochs:
                        averaged = partial(_evaluate_average, average, split, config, device, stoppable)
                        metrics |= processes.from_first(averaged)
                if diverged is None and not all(math.isfinite(value) for value in metrics.values()):
                    diverged = at.step
                if config.loss_scale == "dynamic":
                    metrics |= {"loss_scale": low.loss_scale.value, "skipped_steps": low.loss_scale.skipped}
                record.epoch(metrics)
                at.history.append(metrics)
                at.epoch, at.batch, at.diverged_step = epoch, 0, diverged
                wandb.log(measure.wandb_keys(metrics), step=epoch)
                progress.epoch(metrics)
                last = diverged is not None or epoch == config.epochs
                if processes.any(last or due.after_epoch(epoch))[0]:
                    write_checkpoint()
        except console.Stopped as error:
            failure = _failure_of(write_checkpoint) or error
        except BaseException as error:
            failure = _out_of_memory(error, at.step + 1, config.batch_size) or error
        progress.close()
        summary = _summary(at, failure, untrained, time.monotonic() - started)
        summary |= {"command": at.command, "environment": _environment(config, processes)}
        folder = record.folder
        try:
            folder = record.finish(summary)
        except (OSError, KeyboardInterrupt) as error:  # all of it is where it was
            failure = failure or error
            summary["status"] = "failed"
    notes = [*record.notes]
    if stop.asked < 2:  # else at once: wandb's process sees that we are gone, and closes the run
        try:
            notes += wandb.finish(summary, exit_code=1 if failure else 0)
        except KeyboardInterrupt:  # the record is whole and in its place
            notes.append("wandb: not waited for")
    if failure:
        to_go_on = f"recorded so far in {folder}; to go on: python main.py --resume {shlex.quote(str(folder))}"
        for note in [to_go_on if folder.exists() else "nothing is recorded yet", *notes] if processes.first else []:
            failure.add_note(note)
        raise failure
    return Result(config, summary, at.history, folder, notes)


def _resumed(folder: Path, at: State, steps: int, processes: Processes) -> track.Record | track.NoRecord:
    """Take `at` and the record to where the run's last checkpoint was; to the start where there is none yet."""
    found = processes.from_first(lambda: checkpoint.latest(folder))
    if found:
        at.load(found.state, steps, folder / found.name)
    if not processes.first:
        return track.NoRecord()
    record = track.Record.resume(folder, asdict(at.config), at.history, (found.name, found.raw) if found else None)
    if not found:
        console.say(f"resuming {folder}: no checkpoint yet, from the start")
        return record
    for note in found.notes:
        console.say(f"{note}; going on from {found.name}")
    console.say(f"resuming {folder} after epoch {at.epoch} of {at.config.epochs}, step {at.step}")
    return record


def _wandb(at: State, first: bool) -> wandb_run.Wandb:
    """The run at wandb, with the epochs that `at` has behind it; none but for the first process."""
    config = at.config if first else replace(at.config, wandb="disabled")
    where = (config.wandb, config.wandb_project, config.wandb_entity)
    made = wandb_run.Wandb(*where, config.name, config.group, asdict(config), config.output_dir, at.wandb_id)
    at.wandb_id = made.id or at.wandb_id
    for metrics in at.history:
        made.log(measure.wandb_keys(metrics), step=metrics["epoch"])
    return made


def _failure_of(action: Callable[[], None]) -> BaseException | None:
    try:
        action()
    except BaseException as error:
        return error
    return None


def _out_of_memory(error: BaseException, step: int, batch_size: int) -> MemoryError | None:
    """One line for the many ways in which PyTorch says that there is no memory left; None for other errors."""
    said = str(error).strip().partition("\n")[0]
    signs = ("can't allocate memory", "not enough memory", "std::bad_alloc")
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(sign in said for sign in signs):
        return None
    told = MemoryError(f"out of memory in step {step}: a --batch-size below {batch_size} needs less ({said})")
    told.__cause__ = error
    return told


def _summary(at: State, failure: BaseException | None, untrained: dict[str, float], seconds: float) -> dict[str, Any]:
    status = "complete" if at.diverged_step is None else "diverged"
    if failure:
        status = "interrupted" if isinstance(failure, KeyboardInterrupt) else "failed"
    summary = {"name": at.config.name, "status": status, "epochs": at.epoch, "steps": at.step}
    summary |= at.history[-1] if at.history else untrained
    summary.pop("epoch", None)
    if at.diverged_step is not None:
        summary["diverged_step"] = at.diverged_step
    parameters = sum(p.numel() for p in at.model.parameters())
    return summary | {"seconds": round(at.seconds + seconds, 3), "parameters": parameters, "resumed": at.resumed}


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
        return lean(torch.optim.SGD)(model.parameters(), momentum=config.momentum, **settings)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return lean(kind)(model.parameters(), **settings)


def _average(config: Config) -> AveragedModel:
    """The average of the weights, float32, in a model of its own that rounds nothing."""
    spec = data.DATASETS[config.dataset]
    layout = torch.channels_last if len(spec.shape) == 3 else torch.contiguous_format
    return AveragedModel(models.build(config.model, spec.shape, spec.outputs, config.seed).to(memory_format=layout))


def _evaluate_average(
    average: AveragedModel, split: data.Data, config: Config, device: torch.device, check: Callable[[], None] | None
) -> dict[str, float]:
    """The metrics of the averaged weights; statistics of batch norms are taken anew, from the training rows."""

    def batches() -> Iterator[Tensor]:
        noise = torch.Generator().manual_seed(Key.of(config.seed, "averaging").value)
        for rows in _batches(len(split.train_x), config, config.epochs + 1, device):
            if check:
                check()
            yield split.features(split.train_x[rows], noise)

    average.to(device)
    update_bn(batches(), average)
    metrics = measure.evaluate(average, split, data.DATASETS[config.dataset].task, check)
    return {f"averaged_{name}": value for name, value in metrics.items()}


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


def _check_parts(config: Config, rows: int, processes: int) -> None:
    """ConfigError where one of the processes would have no row of a batch."""
    smallest = rows % config.batch_size or min(config.batch_size, rows)
    if smallest < processes:
        allowed = f"what leaves a row for each of {processes} processes in the last batch too ({rows} rows)"
        raise ConfigError(f"--batch-size: given {config.batch_size}, allowed: {allowed}")


def _replicated(model: nn.Module, optimizer: torch.optim.Optimizer, low: LowPrecision) -> Iterator[Tensor]:
    """What must have the same bits in every process. Batch norm's statistics are those of the first one."""
    yield from model.parameters()
    yield from low.kept()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))


def _check_finite(losses: list[Tensor], next_step: int) -> None:
    """Raises Diverged for the first of these losses that is NaN or infinite; the last is that of `next_step`."""
    if losses:
        finite = torch.stack(losses).isfinite().tolist()
        if not all(finite):
            raise Diverged(next_step - len(losses) + 1 + finite.index(False))
        losses.clear()


def _environment(config: Config, processes: Processes) -> dict[str, Any]:
    """What a result depends on, beside its config."""
    device = processes.device
    return {
        "versions": _versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": processes.count,
        "engine": engines.in_use(config.backend, device),
        "commit": _commit(),
    }


@cache
def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "qtorch", "scikit-learn", "numpy", "wandb"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


@cache
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
