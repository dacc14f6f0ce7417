"""Checkpoints: all that continues a run to the bit, in a file that shows if one bit of it is wrong.

A checkpoint is what torch.save writes, a zip archive, with the SHA-256 of itself as the archive's comment: torch would
read flipped bits without a word. Nothing in it is executed: it is read with weights_only=True.
"""

from __future__ import annotations

import hashlib
import io
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab.files import read
from lab.record import CHECKPOINTS
from settings.kinds import epochs_or_seconds

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
        raise CheckpointError(f"refused: {first_line(error)}") from error
    return state


def _digest(data: memoryview) -> bytes:
    return b"sha256:" + hashlib.sha256(data).hexdigest().encode()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a record's folder: its state, its file's name and bytes. notes: why it is not the newest one."""

    state: dict[str, Any]
    name: str
    raw: bytes
    notes: list[str]


def latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a record; None where there is none. CheckpointError where none is whole."""
    notes: list[str] = []
    for name in CHECKPOINTS:
        if (folder / name).exists():
            raw = read(folder / name)
            try:
                return Checkpoint(unpack(raw), name, raw, notes)
            except CheckpointError as error:
                notes.append(f"{folder / name}: {error}")
        else:
            notes.append(f"{folder / name}: missing")
    if all(note.endswith(": missing") for note in notes):
        return None
    raise CheckpointError(f"{'; '.join(notes)}; start it anew without --resume")


def code_of(folder: Path) -> str | None:
    """The fingerprint of the code that trained until the newest whole checkpoint; None where there is none."""
    try:
        last = latest(folder)
    except (CheckpointError, OSError):
        return None
    return last.state.get("code") if last else None


class Due:
    """When the next checkpoint is to be written."""

    def __init__(self, every: str, in_epoch: int, step: int) -> None:
        """every: as in Config.checkpoint_every. in_epoch: steps of an epoch. step: the steps that are done already."""
        epochs, self.seconds = epochs_or_seconds(every)
        self.steps = None if epochs is None else epochs * in_epoch
        self.was_written(step)

    def was_written(self, step: int) -> None:
        """One has just been written after that step."""
        self.written, self._step = time.monotonic(), step

    def after_step(self, step: int) -> bool:
        """Whether one is due after that step, which is evaluated already if it is to be."""
        if self.seconds is not None:
            return time.monotonic() - self.written >= self.seconds
        return self.steps is not None and step % self.steps == 0 and step != self._step
