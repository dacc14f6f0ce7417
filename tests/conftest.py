"""The fixtures of every test: no account, setting or thread count of whoever runs it, and the command line at hand."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
from run_helpers import NOISY_BOSTON, ROOT, Ran, only, signal_after

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported, here and in child processes


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
def bare_wandb(monkeypatch, tmp_path_factory):
    """No wandb setting, key or netrc of whoever runs the tests; a home of their own."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def one_thread():
    """Models of tests are so small that threads cost more than they do, much more on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hangup():
    """SIGHUP as in a terminal: under nohup it is ignored, and a run then leaves it so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def script():
    """The words that start main.py in a process of its own."""
    return [sys.executable, str(ROOT / "main.py")]


@pytest.fixture(scope="session")
def stopped_run(isolated, tmp_path_factory):
    """The record of a run that was stopped after ten steps, made once: tests work on copies of it."""
    import main

    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("stopped")
        patch.chdir(place)
        signal_after(patch, 10)
        assert main.main([str(word) for word in [*NOISY_BOSTON, "--momentum", 0.9]]) == 143
    return only(place / "runs")


def _in_child(folder: str, arguments: list[str], before: str) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's children ignore it
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


@pytest.fixture
def archive_server(monkeypatch):
    """A server of archives on this machine."""
    from cifar10_helpers import Server

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.close()
