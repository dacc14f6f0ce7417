"""What a person sees: commands that work as they stand, a bar on a terminal, a line now and then elsewhere."""

import contextlib
import os
import pty
import shlex
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch
from run_helpers import NOISY_BOSTON, ROOT, bits, kill_self, only

import main
from lab import console
from lab.console import Progress, command
from lab.plan import Plan
from settings.config import Config

# Commands


def run_in_shell(line: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("words", [["--help"], ["--list-formats"], ["--output-dir", "it's $HOME", "--help"]], ids=str)
@pytest.mark.parametrize("place", ["the checkout", "its parent", "another folder"])
def test_a_command_works_in_the_working_folder(words, place, tmp_path, monkeypatch):
    folder = {"the checkout": ROOT, "its parent": ROOT.parent, "another folder": tmp_path}[place]
    monkeypatch.chdir(folder)
    line = command("main.py", *words)
    script = shlex.split(line)[1]
    assert script == {"the checkout": "main.py", "its parent": f"{ROOT.name}/main.py"}.get(place, str(ROOT / "main.py"))
    ran = run_in_shell(line, folder)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout


def test_a_command_in_a_checkout_whose_name_has_a_space(tmp_path):
    (tmp_path / "my checkout").symlink_to(ROOT)
    code = "from lab.console import command; print(command('quant.py', 'float8', '0.3'))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "my checkout")}
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "'my checkout/quant.py'" in made.stdout
    assert run_in_shell(made.stdout, tmp_path).returncode == 0


def test_the_interpreter_is_the_one_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = Path(sys.executable)
    monkeypatch.setenv("PATH", "")
    assert shlex.split(command("main.py"))[0] == sys.executable  # nothing is found under the name
    monkeypatch.setenv("PATH", str(here.parent))
    if (here.parent / "python").exists() and here.name == "python":
        assert shlex.split(command("main.py"))[0] == "python"
    (tmp_path / "python").symlink_to(here)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shlex.split(command("main.py"))[0] == sys.executable  # another one is found
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(here)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert shlex.split(command("main.py"))[0] == ".venv/bin/python"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    assert shlex.split(command("main.py"))[0] == str(tmp_path / "python")  # a shell would look for `python` elsewhere


def test_the_command_that_a_stopped_run_prints_goes_on(cli, child, tmp_path):
    expected = bits(cli(*NOISY_BOSTON, "--output-dir", "straight").folder)
    stopped = child(*NOISY_BOSTON, "--output-dir", "the runs", before=kill_self("SIGTERM"))
    ran = run_in_shell(stopped.err.rpartition("to go on: ")[2], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert bits(only(tmp_path / "the runs")) == expected


def test_nobody_has_to_read_what_is_said(tmp_path):
    code = (
        "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 2)\nfrom lab.console import say\nsay('a'); say('b', 'c')"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Progress


def planned(config, steps):
    """A configuration, and its plan where an epoch has so many steps."""
    return config, Plan.of(config, steps)


class Terminal:
    """A terminal with so many columns, as a context: stderr is written to it. `shown` is what it has shown."""

    def __init__(self, columns: int) -> None:
        self.columns, self.shown = columns, ""

    def __enter__(self) -> "Terminal":
        self._parent, child = pty.openpty()
        termios.tcsetwinsize(child, (24, self.columns))
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._patch = pytest.MonkeyPatch()
        self._terminal = open(child, "w")
        self._patch.setattr("sys.stderr", self._terminal)
        return self

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            while chunk := os.read(self._parent, 4096):
                self._chunks.append(chunk)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        self._terminal.close()
        self._reader.join()
        os.close(self._parent)
        self.shown = b"".join(self._chunks).decode()


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) moves the time that the console sees; nobody sleeps."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


METRICS = {"epoch": 1, "training_mse": 0.5, "training_rmse": 0.7, "testing_mse": 0.4321, "testing_rmse": 0.66}


@pytest.mark.usefixtures("cli")
def test_a_bar_on_a_terminal():
    with Terminal(120) as terminal:
        assert main.main(["--epochs", "20"]) == 0
    assert "toy-float32-42 " in terminal.shown
    assert "/20" in terminal.shown  # steps
    assert "\r" in terminal.shown
    assert "\n" not in terminal.shown
    assert "epoch" not in terminal.shown


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dataset": "boston", "precision": "float8", "rounding": "stochastic"},
        {"dataset": "breast_cancer", "precision": "float8_e4m3fnuz", "rounding": "stochastic:23:half"},
    ],
    ids=str,
)
def test_the_bar_shows_a_metric_on_80_columns(settings, clock):
    """The training loss at first, then what the last epoch was tested with; however long the name is."""
    config = Config.make(**settings, epochs=3)
    with Terminal(80) as terminal:
        progress = Progress(config, Plan.of(config, 5), done=0)
        progress.bar.mininterval = 0
        for epoch in (1, 2):
            for _ in range(5):
                clock(2.0)
                progress.step(torch.tensor(0.123456))
            progress.evaluated(METRICS | {"epoch": epoch, "testing_mse": 0.4321 + epoch}, epoch)
        clock(2.0)
        progress.step(torch.tensor(0.1))
        progress.close()
    shown = [line.strip() for line in terminal.shown.split("\r")]
    assert max(map(len, shown)) <= 80
    assert sum("training_loss 0.1235" in line for line in shown) >= 3
    assert sum("testing_mse 1.432" in line for line in shown) >= 3
    assert "testing_mse 2.432" in [line for line in shown if line][-1]
    if not settings:
        assert any(f"{config.name}, testing_mse 1.432  60%|" in line and "9/15 [" in line for line in shown)


def test_a_resumed_bar_begins_where_the_run_does(clock):
    with Terminal(80) as terminal:
        Progress(*planned(Config(epochs=4), 5), done=10).close()
    assert "50%|" in terminal.shown
    assert "10/20 [" in terminal.shown


def test_lines_elsewhere(cli):
    lines = cli("--epochs", 20).err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{epoch}/20" for epoch in range(2, 21, 2)]
    assert all("training_mse" in line and "testing_mse" in line for line in lines)
    with Terminal(0) as terminal:
        assert main.main(["--epochs", "20"]) == 0
    assert terminal.shown.splitlines() == lines  # no columns: no room for a bar


def test_a_long_epoch_says_a_line_every_half_minute(clock, capsys):
    progress = Progress(*planned(Config(epochs=2), 100), done=0)
    for _ in range(100):
        clock(5.0)
        progress.step(torch.tensor(0.25))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["epoch 1/2  step 6/100  loss 0.25", "epoch 1/2  step 12/100  loss 0.25"]
    assert len(lines) == 100 // 6
    progress.evaluated(METRICS | {"training_mse": None}, 1)
    assert capsys.readouterr().err == "epoch 1/2  training_mse -  testing_mse 0.4321\n"
    clock(29)
    progress.step(torch.tensor(0.25))  # not so soon after the epoch's line
    assert capsys.readouterr().err == ""
    clock(2)
    progress.step(torch.tensor(float("nan")))
    assert capsys.readouterr().err == "epoch 2/2  step 2/100  loss nan\n"


def test_many_short_epochs_say_a_line_for_each_tenth(clock, capsys):
    progress = Progress(*planned(Config(epochs=1000), 1), done=0)
    for epoch in range(1, 1001):
        clock(0.001)
        progress.step(torch.tensor(0.25))
        progress.evaluated(METRICS | {"epoch": epoch}, epoch)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{hundred}00/1000" for hundred in range(1, 11)]


def test_quiet_is_quiet(clock, capsys):
    with Terminal(80) as terminal:
        progress = Progress(*planned(Config(epochs=1), 2), done=0, quiet=True)
        for _ in range(2):
            clock(100.0)
            progress.step(torch.tensor(0.25))
        progress.evaluated(METRICS, 1)
        progress.close()
    assert terminal.shown == ""
    assert capsys.readouterr() == ("", "")
