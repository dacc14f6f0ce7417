"""What every test stands on: no account, setting or thread count of whoever runs it, and the command line at hand."""

from __future__ import annotations

import json
import multiprocessing
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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        status = main.main([str(argument) for argument in arguments])
        return Ran(status, *capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def script():
    """The words that start main.py in a process of its own."""
    return [sys.executable, str(ROOT / "main.py")]


def _in_child(folder: str, arguments: list[str], before: str) -> None:
    os.chdir(folder)
    for fd, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
    import main

    exec(before, {})
    sys.exit(main.main(arguments))


@pytest.fixture(scope="session")
def forks(isolated):
    """Processes with everything imported, made in milliseconds: forks of a server that has started no thread."""
    context = multiprocessing.get_context("forkserver")
    lazily = ["torch._dynamo", "sklearn.model_selection", "sklearn.preprocessing"]  # what the first run imports
    context.set_forkserver_preload(["train", *lazily])
    with pytest.MonkeyPatch.context() as patch:  # the server reads it when the first process is started
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context


@pytest.fixture
def child(forks, tmp_path):
    """child("--epochs", 3, before="..."): main.py with these arguments in a process of its own, after that code.

    With wait=False the process, whose streams are the files stdout and stderr in `tmp_path`.
    """

    def call(*arguments: object, before: str = "", folder: Path = tmp_path, wait: bool = True):
        process = forks.Process(target=_in_child, args=(str(folder), [str(a) for a in arguments], before))
        process.start()
        if not wait:
            return process
        process.join(120)
        return Ran(process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text())

    return call
