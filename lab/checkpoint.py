"""Checkpoints: all that continues a run to the bit, in a file that shows if one bit of it is wrong.

A checkpoint is what torch.save writes, a zip archive, with the SHA-256 of itself as the archive's comment: torch would
read flipped bits without a word. Nothing in it is executed: it is read with weights_only=True.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab import record as track
from settings.config import Config, ConfigError
from settings.kinds import epochs_or_seconds

VERSION = 1  # of what `State.save` gives; another one is refused
_COMMENT = 7 + 64  # bytes: "sha256:" and 64 hex digits


class CheckpointError(Exception):
    """A checkpoint that cannot be used: one line that says why."""


def pack(state: dict[str, Any]) -> bytes:
    """The file of a state of tensors, numbers, texts, lists and dicts."""
    buffer = io.BytesIO()  # torch.save into a file turns a full disk into a RuntimeError
    torch.save(state, buffer)
    buffer.seek(-2, io.SEEK_END)  # a zip archive ends with the length of its comment, and the comment
    buffer.write(_COMMENT.to_bytes(2, "little"))
    buffer.write(_digest(buffer.getbuffer()))
    return buffer.getvalue()


def unpack(raw: bytes) -> dict[str, Any]:
    """The state of a file. CheckpointError unless each of its bytes is as it was written, and it runs no code."""
    if not raw[-_COMMENT:].startswith(b"sha256:"):
        raise CheckpointError("cut off, or no checkpoint")
    if raw[-_COMMENT:] != _digest(memoryview(raw)[:-_COMMENT]):
        raise CheckpointError("corrupted: its SHA-256 is not that of its bytes")
    try:
        entries = zipfile.ZipFile(io.BytesIO(raw)).infolist()
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > len(raw):
            raise ValueError("it would unpack to more than it is")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an archive of another kind is refused all the same
            state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("no state of a run")
    except Exception as error:  # a file that somebody made can raise anything
        raise CheckpointError(f"refused: {_line(error)}") from error
    return state


def _digest(data: memoryview) -> bytes:
    return b"sha256:" + hashlib.sha256(data).hexdigest().encode()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass(frozen=True)
class Found:
    """A checkpoint in a record's folder. notes: why it is not the newest one."""

    state: dict[str, Any]
    name: str
    raw: bytes
    notes: list[str]


def latest(folder: Path) -> Found | None:
    """The newest whole checkpoint of a record; None where there is none. CheckpointError where none is whole."""
    notes: list[str] = []
    for name in track.CHECKPOINTS:
        if (folder / name).exists():
            raw = track.read(folder / name)
            try:
                return Found(unpack(raw), name, raw, notes)
            except CheckpointError as error:
                notes.append(f"{folder / name}: {error}")
        else:
            notes.append(f"{folder / name}: missing")
    if all(note.endswith(": missing") for note in notes):
        return None
    raise CheckpointError(f"{'; '.join(notes)}; start it anew without --resume")


class Due:
    """When the next checkpoint is to be written. every: as in Config.checkpoint_every."""

    def __init__(self, every: str) -> None:
        self.epochs, self.seconds = epochs_or_seconds(every)
        self.written = time.monotonic()

    def after_step(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.written >= self.seconds

    def after_epoch(self, epoch: int) -> bool:
        return self.after_step() or (self.epochs is not None and epoch % self.epochs == 0)


@dataclass
class State:
    """All that moves while a run trains. Data order and rounding noise need nothing: seed, epoch and step say them."""

    config: Config
    model: nn.Module
    optimizer: torch.optim.Optimizer  # its state_dict holds the accumulator and the loss scale too
    schedule: Any
    train: Any  # the epoch's metrics so far
    average: nn.Module | None = None  # of the weights
    command: str | None = None
    epoch: int = 0  # epochs done
    batch: int = 0  # batches done of the next one
    step: int = 0
    diverged_step: int | None = None
    history: list[dict[str, float | int | None]] = field(default_factory=list)  # the lines of metrics.jsonl
    pending: list[Tensor] = field(default_factory=list)  # losses that nobody has looked at yet
    noise: torch.Generator = field(default_factory=torch.Generator)  # of this epoch's augmentation
    seconds: float = 0.0  # before it was resumed
    resumed: list[int] = field(default_factory=list)  # the steps at which it was
    wandb_id: str | None = None

    def save(self, seconds: float) -> dict[str, Any]:
        """seconds: of this run so far, since it was last resumed."""
        return {
            "version": VERSION,
            "config": asdict(self.config),
            "command": self.command,
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "diverged_step": self.diverged_step,
            "metrics": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "train": self.train.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "pending": torch.stack(self.pending) if self.pending else None,
            "augmentation": self.noise.get_state(),
            "torch_rng": torch.get_rng_state(),
            "seconds": self.seconds + seconds,
            "resumed": self.resumed,
            "wandb_id": self.wandb_id,
        }

    def load(self, saved: dict[str, Any], steps: int, where: Path) -> None:
        """Go on from what `save` gave. steps: of an epoch.

        ConfigError for another version or configuration, CheckpointError for what is no state of this run.
        """
        if saved.get("version") != VERSION:
            version = saved.get("version", "none")
            raise ConfigError(f"--resume: given {where}: its format version is {version}, allowed: {VERSION}")
        try:
            differences = self.config.differences(Config.make(**saved["config"]))
        except Exception as error:
            raise CheckpointError(f"{where}: no configuration of this program ({_line(error)})") from error
        if differences:
            what = f"given {where}: it is of another configuration"
            raise ConfigError(f"--resume: {what} ({'; '.join(differences)}), allowed: its own")
        try:
            self._load(saved, steps)
        except Exception as error:  # what somebody edited can raise anything
            raise CheckpointError(f"{where}: no state of this run ({_line(error)})") from error

    def _load(self, saved: dict[str, Any], steps: int) -> None:
        self.epoch, self.batch, self.step = (_whole(saved[name]) for name in ("epoch", "batch", "step"))
        self.diverged_step = None if saved["diverged_step"] is None else _whole(saved["diverged_step"])
        _check(self.epoch <= self.config.epochs and self.batch <= steps, "its position")
        _check(self.diverged_step is not None or self.step == self.epoch * steps + self.batch, "its position")
        self.history = saved["metrics"]
        _check(isinstance(self.history, list) and all(map(_is_metrics, self.history)), "its metrics")
        _check([line["epoch"] for line in self.history] == list(range(1, self.epoch + 1)), "its metrics")
        self.model.load_state_dict(saved["model"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, moments in saved["optimizer"]["state"].items():
            for value in moments.values():
                _check(not torch.is_tensor(value) or value.shape in ((), parameters[index].shape), "its optimizer")
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(saved["schedule"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        device = parameters[0].device
        self.train.load_state_dict(saved["train"], device)
        self.pending = [] if saved["pending"] is None else list(saved["pending"].to(device))
        self.noise.set_state(saved["augmentation"])
        torch.set_rng_state(saved["torch_rng"])
        self.seconds, self.resumed = float(saved["seconds"]), [*map(_whole, saved["resumed"]), self.step]
        _check(self.seconds >= 0 and math.isfinite(self.seconds), "its seconds")
        for name in ("command", "wandb_id"):
            _check(saved[name] is None or isinstance(saved[name], str), f"its {name}")
        self.command, self.wandb_id = saved["command"], saved["wandb_id"]


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
