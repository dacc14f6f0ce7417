"""What tests of whole runs share: runs of main.py that are stopped and resumed, what a record holds, made-up images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
CIFAR10_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
STEP_LINES = ("layers.jsonl", "shadow.jsonl")  # what a run leaves besides, where it is asked for

BOSTON = ["--dataset", "boston", "--batch-size", 64, "--epochs", 4]  # 7 steps an epoch
NOISY_BOSTON = [*BOSTON, "--precision", "float8", "--rounding", "stochastic"]


def strict_json(text: str):
    """The value of a JSON text; ValueError for NaN and Infinity, which Python's json would take."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def write_cifar10(folder: Path, count: int = 40, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """A made-up CIFAR-10 in the binary layout: six files of `count` records. Returns labels and pixels of each."""
    rng = np.random.default_rng(seed)
    batches = []
    for name in CIFAR10_FILES:
        labels = rng.integers(0, 10, count)
        pixels = rng.integers(0, 256, (count, 3, 32, 32)) // (1 + labels[:, None, None, None])  # dark: a high class
        records = np.concatenate([labels[:, None], pixels.reshape(count, -1)], axis=1)
        (folder / name).write_bytes(records.astype(np.uint8).tobytes())
        batches.append((labels, pixels))
    return batches


# Files of somebody's own

OWN_FILE = """
import torch
from torch import nn


def net(shape, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0], 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, outputs))


def circles():
    x = torch.randn(80, 2)
    return x, (x.norm(dim=1) > 1.2).long()


def heavy_ball(parameters, learning_rate, weight_decay=0.0, momentum=0.9):
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
"""


def house_csv(rows: int = 40) -> str:
    """A CSV file whose target is twice its first column."""
    rng = np.random.default_rng(0)
    lines = [f"{a},{b},{2 * a}" for a, b in rng.normal(size=(rows, 2))]
    return "\n".join(["rooms,age,price", *lines])


def write_own_files(folder: Path) -> None:
    """mine.py, with net, circles and heavy_ball, and house.csv, with rooms, age and price."""
    (folder / "mine.py").write_text(OWN_FILE)
    (folder / "house.csv").write_text(house_csv())


# One call of main.py


@dataclass
class Ran:
    """What one call of main.py came to."""

    status: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """Where the record lies."""
        return Path(self.out.split("record: ")[1].splitlines()[0])

    @property
    def summary(self) -> dict:
        return strict_json((self.folder / "summary.json").read_text())

    @property
    def config(self) -> dict:
        return strict_json((self.folder / "config.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        return [strict_json(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def is_one_line(ran: Ran, status: int, *words: str) -> None:
    """That status, one line on stderr with these words, nothing else printed."""
    assert (ran.status, ran.out) == (status, ""), ran
    assert len(ran.err.splitlines()) == 1, ran.err
    assert [word for word in ("main.py: error: ", *words) if word not in ran.err] == [], ran.err


def is_refused(ran: Ran, *words: str) -> None:
    """A wrong argument: exit status 2 and one line that says what was given and what is allowed."""
    is_one_line(ran, 2, "given", "allowed", *words)


def has_failed(ran: Ran, *words: str) -> None:
    """A failure on the way: exit status 1 and one line that says why."""
    is_one_line(ran, 1, "--debug", *words)


# Records and folders


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


def only(folder: Path) -> Path:
    """The one thing in a folder."""
    (path,) = folder.iterdir()
    return path


def snapshot(folder: Path) -> dict[Path, bytes]:
    """All files below a folder, and what is in them."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def epochs_in(folder: Path) -> list[int]:
    """The epochs of a record's metrics, whose lines must be whole."""
    lines = (folder / "metrics.jsonl").read_text()
    assert lines == "" or lines.endswith("\n")
    return [strict_json(line)["epoch"] for line in lines.splitlines()]


def bits(folder: Path) -> tuple[bytes, dict, dict]:
    """All that a complete run leaves but for times and places: the metrics' bytes, and every tensor and number."""
    import torch

    files = ["checkpoint.pt", "config.json", "metrics.jsonl", "summary.json"]
    assert [name for name in names(folder) if name not in STEP_LINES] == files
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    summary = strict_json((folder / "summary.json").read_text())
    for name in ("seconds", "resumed", "command", "environment"):
        del summary[name]
    flat = {}

    def visit(path: str, value) -> None:
        if isinstance(value, dict | list | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                visit(f"{path}/{key}", item)
        else:
            flat[path] = value.numpy().tobytes() if torch.is_tensor(value) else value

    for name in state.keys() - {"config", "command", "seconds", "resumed", "wandb_id"}:
        visit(name, state[name])
    return (folder / "metrics.jsonl").read_bytes(), summary, flat


# Runs that are stopped


def signal_after(patch, steps: int, number: int = signal.SIGTERM, times: int = 1) -> None:
    """From now on, this process sends itself that signal after so many steps."""
    from lab.console import Progress

    step, done = Progress.step, []

    def stepped(progress, loss) -> None:
        step(progress, loss)
        done.append(1)
        if len(done) == steps:
            for _ in range(times):
                os.kill(os.getpid(), number)

    patch.setattr(Progress, "step", stepped)


def resumable(text: str) -> Path:
    """The folder in the command that a stopped run prints."""
    return Path(text.rpartition("--resume ")[2].strip())


def stopped(cli, monkeypatch, *arguments: object, steps: int = 10) -> Path:
    """Starts a run and stops it after so many steps. Returns the folder of its record."""
    with monkeypatch.context() as patch:
        signal_after(patch, steps)
        ran = cli(*arguments)
    assert (ran.status, ran.out) == (143, ""), ran
    return resumable(ran.err)


def kill_self(name: str, step: int = 9) -> str:
    """Code for a child process, which then sends itself the signal of that name after so many steps."""
    return f"""
import os, signal
from lab.console import Progress
step, done = Progress.step, []
def stepped(progress, loss):
    step(progress, loss)
    done.append(1)
    if len(done) == {step}:
        os.kill(os.getpid(), signal.{name})
Progress.step = stepped
"""


# Several processes


def torchrun(
    count: int, folder, *arguments, check: bool = True, script=ROOT / "main.py"
) -> subprocess.CompletedProcess:
    command = [*TORCHRUN, count, script, *arguments]
    ran = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert not check or ran.returncode == 0, ran.stderr
    return ran
