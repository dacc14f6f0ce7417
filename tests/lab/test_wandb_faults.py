"""wandb_run.py: nothing that happens to wandb reaches the training, and nothing that was logged is lost."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import ROOT, names
from wandb_helpers import (
    KEY,
    STEPS,
    assert_whole,
    folder_in,
    history,
    server,
    stored,
    tracker,
    whole_run,
)

from lab import wandb_run

pytestmark = pytest.mark.usefixtures("bare_wandb")


def test_wandb_that_is_not_installed_costs_one_warning(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise ImportError('No module named wandb')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert whole_run("auto", tmp_path / "runs") == [
        "wandb: warning: No module named wandb",
        "wandb: warning: the run is not recorded there",
    ]


def test_wandb_that_breaks_costs_a_warning(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise RuntimeError('broken\\nin two lines')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert whole_run("auto", tmp_path / "runs") == [
        "wandb: warning: broken",
        "wandb: warning: the run is not recorded there",
    ]


def test_a_process_that_cannot_be_started_costs_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run.sys, "executable", str(tmp_path / "no python"))
    (line,) = whole_run("offline", tmp_path)
    assert line.startswith("wandb: warning: cannot start a process for it: ")


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    lines = whole_run("offline", tmp_path / "file")
    assert "cannot write to" in lines[0]
    assert_whole(lines, warnings=1)


def test_servers_that_refuse_or_never_answer_cost_a_warning_and_no_metric(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            ports = [mute.getsockname()[1], closed.getsockname()[1]]
        runs = []
        for port in ports:
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
            runs.append(tracker("online", tmp_path))
        for run in runs:  # both at once, for the sake of time
            for step, metrics in enumerate(STEPS):
                run.log(metrics, step=step)
        for run in runs:
            assert_whole(run.finish({}), warnings=1)
    assert len([name for name in names(tmp_path / "wandb") if "run-" in name and name != "latest-run"]) == 2


def test_a_key_that_the_server_does_not_know_costs_a_warning_and_no_metric(tmp_path, monkeypatch):
    with server(monkeypatch, status=401):
        lines = whole_run("online", tmp_path)
    assert "not logged in" in lines[0]
    assert_whole(lines, warnings=1)


def test_a_key_of_the_wrong_form_costs_a_warning_and_no_metric(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    lines = whole_run("auto", tmp_path)
    assert "WANDB_API_KEY invalid" in lines[0]
    assert "short" not in lines[0]
    assert_whole(lines, warnings=1)


def test_a_server_that_falls_silent_half_way_costs_a_warning_and_no_metric(tmp_path, monkeypatch):
    with server(monkeypatch, hang_at="/file_stream"):
        lines = whole_run("online", tmp_path)
    assert "/runs/" in lines[0]
    assert "did not take everything" in lines[1]
    assert history(stored(folder_in(lines))) == dict(enumerate(STEPS))


def wandb_core(run, directory):
    """The process id of wandb's own service, once the run has begun."""
    deadline = time.monotonic() + 60
    while not list(directory.glob("wandb/*run-*/*.wandb")):
        assert time.monotonic() < deadline, "wandb did not start"
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            if "wandb-core" in name and int(rest.split()[1]) == run._process.pid:
                return int(stat.parent.name)
    raise AssertionError("no wandb-core in /proc")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds wandb's processes in /proc")
@pytest.mark.parametrize("victim", ["wandb-core", "relay"])
def test_wandb_killed_half_way_costs_a_warning_and_no_metric(tmp_path, victim):
    run = tracker("offline", tmp_path)
    for step in range(15):
        run.log(STEPS[step], step=step)
    core = wandb_core(run, tmp_path)
    os.kill(core if victim == "wandb-core" else run._process.pid, signal.SIGKILL)
    for step in range(15, 30):
        run.log(STEPS[step], step=step)
    assert_whole(run.finish({}), warnings=1)


def test_a_process_that_reads_nothing_never_holds_up_the_training(tmp_path):
    run = tracker("offline", tmp_path)
    os.kill(run._process.pid, signal.SIGSTOP)
    text = "x" * 1000
    for step in range(300):  # more than a pipe holds
        run.log({"text": text}, step=step)
    os.kill(run._process.pid, signal.SIGCONT)
    lines = run.finish({})
    assert len(lines) == 1
    assert history(stored(folder_in(lines))) == {step: {"text": text} for step in range(300)}


@pytest.mark.parametrize(
    ("ending", "returncode", "exit_code"),
    [
        ("run.finish({}, exit_code=1)", 0, 1),  # after Ctrl-C, which the whole process group got
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, 1),
        ("raise SystemExit(1)", 1, 1),  # without finish
    ],
)
def test_a_training_that_ends_early_has_its_run_closed(tmp_path, ending, returncode, exit_code):
    code = f"""
import os, signal
from lab import wandb_run
run = wandb_run.Wandb("offline", None, None, "name", "group", {{}}, {str(tmp_path)!r})
try:
    for step in range(30):
        run.log({{"loss": 0.5 * step}}, step=step)
    os.killpg(0, signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    {ending}
"""
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    assert run.wait(timeout=60) == returncode
    deadline = time.monotonic() + 60  # where the training was killed, the run is closed after its end
    while not (exits := closed_runs(tmp_path)) and time.monotonic() < deadline:
        pass
    assert exits == [exit_code]
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert history(stored(folder)) == {step: {"loss": 0.5 * step} for step in range(30)}


def closed_runs(directory):
    records = [stored(file.parent) for file in directory.glob("wandb/offline-run-*/*.wandb") if file.stat().st_size > 7]
    return [record.exit.exit_code for run in records for record in run if record.HasField("exit")]
