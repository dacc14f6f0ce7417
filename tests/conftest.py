"""What every test stands on: no account, setting or thread count of whoever runs it, and the command line at hand."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported, here and in child processes

ROOT = Path(__file__).parent.parent
CIFAR10_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def strict_json(text: str):
    """The value of a JSON text; ValueError for NaN and Infinity, which Python's json would take."""
    return json.loads(text, parse_constant=_no_constant)


def write_cifar10(folder, count=40, seed=0):
    """A made-up CIFAR-10 in the binary layout: six files of `count` records. Returns labels and pixels."""
    rng = np.random.default_rng(seed)
    batches = []
    for name in CIFAR10_FILES:
        labels = rng.integers(0, 10, count)
        pixels = rng.integers(0, 256, (count, 3, 32, 32)) // (1 + labels[:, None, None, None])  # dark: a high class
        records = np.concatenate([labels[:, None], pixels.reshape(count, -1)], axis=1)
        (folder / name).write_bytes(records.astype(np.uint8).tobytes())
        batches.append((labels, pixels))
    return batches


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


@pytest.fixture(scope="session", autouse=True)
def isolated(tmp_path_factory):
    """No WANDB_ variable, API key or settings file of the user; wandb off unless a test switches it on; a Ctrl-C."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("NETRC", os.devnull)
        patch.setenv("WANDB_CONFIG_DIR", str(tmp_path_factory.mktemp("wandb-config")))
        # A shell starts background jobs with SIGINT ignored, which Python and its children keep: no Ctrl-C to test.
        ours = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, ours)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli("--epochs", 3): main.py with these arguments, in this process, in an empty folder of the test's own."""
    import main

    monkeypatch.chdir(tmp_path)
    terminate = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        status = main.main([str(argument) for argument in arguments])
        return Ran(status, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, terminate)


@pytest.fixture
def script():
    """The words that start main.py in a process of its own."""
    return [sys.executable, str(ROOT / "main.py")]
