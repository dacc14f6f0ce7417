"""wandb_run.py: which mode is started, what is recorded, online and offline, at once and in a run that is resumed."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from run_helpers import ROOT, names
from wandb_helpers import (
    KEY,
    NAME,
    STEPS,
    assert_whole,
    folder_in,
    history,
    server,
    stored,
    tracker,
    uploaded,
    whole_run,
)

from lab import wandb_run

pytestmark = pytest.mark.usefixtures("bare_wandb")


def test_offline_records_every_metric_of_every_step(tmp_path):
    run = tracker("offline", tmp_path)
    for step, metrics in enumerate(STEPS):
        run.log({**metrics, "absent": None, "nan": float("nan"), "inf": float("inf")}, step=step)
    lines = run.finish({"status": "complete", "testing_mse": 0.5})

    assert len(lines) == 1
    folder = folder_in(lines)
    assert folder.parent == tmp_path / "wandb"
    assert folder.name.startswith("offline-run-")
    records = stored(folder)
    special = {"nan": float("nan"), "inf": float("inf")}
    back = history(records)
    assert {step: {k: v for k, v in items.items() if k not in special} for step, items in back.items()} == dict(
        enumerate(STEPS)
    )
    assert all(items["nan"] != items["nan"] and items["inf"] == float("inf") for items in back.values())
    run_record = next(record.run for record in records if record.HasField("run"))
    assert (run_record.project, run_record.display_name, run_record.run_group) == (
        "low-precision-ml",
        NAME[:-9],
        "boston",
    )
    config = {item.key: json.loads(item.value_json) for item in run_record.config.update}
    assert config["seed"] == 42
    assert config["a"] == [1]
    summary = {item.key: item.value_json for record in records for item in record.summary.update}
    assert json.loads(summary["status"]) == "complete"
    assert json.loads(summary["testing_mse"]) == 0.5
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    assert names(Path(os.environ["HOME"])) in ([], [".cache"])  # no netrc, no settings


def test_the_environment_names_project_entity_and_folder_and_arguments_win(tmp_path, monkeypatch):
    for name, value in {"PROJECT": "p-env", "ENTITY": "e-env", "DIR": str(tmp_path / "it's here")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    first = tracker("offline", tmp_path / "runs")
    second = tracker("offline", tmp_path / "runs", project="p-arg", entity="e-arg")
    first, second = (folder_in(run.finish({}, exit_code=1)) for run in (first, second))
    assert first.parent == second.parent == tmp_path / "it's here" / "wandb"
    for folder, expected in ((first, ("p-env", "e-env")), (second, ("p-arg", "e-arg"))):
        records = stored(folder)
        assert next((r.run.project, r.run.entity) for r in records if r.HasField("run")) == expected
        assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1]
    assert not (tmp_path / "runs").exists()


def test_online_uploads_every_metric_and_names_the_page(tmp_path, monkeypatch):
    with server(monkeypatch) as requests:
        lines = whole_run("auto", tmp_path)
        (line,) = lines
        assert line.startswith(f"wandb: {os.environ['WANDB_BASE_URL']}/somebody/low-precision-ml/runs/")
        assert uploaded(requests) == dict(enumerate(STEPS))


RESOLUTION = [
    # mode, WANDB_MODE, what is started
    ("auto", None, "auto"),
    ("auto", "", "auto"),
    ("auto", "online", "online"),
    ("auto", "run", "run"),
    ("auto", "shared", "shared"),
    ("auto", "offline", "offline"),
    ("auto", "dryrun", "dryrun"),
    ("auto", "disabled", None),
    ("auto", "sideways", "offline"),
    ("online", "offline", "online"),
    ("offline", "online", "offline"),
    ("disabled", "online", None),
    ("online", "sideways", "online"),
]


@pytest.mark.parametrize(("mode", "variable", "expected"), RESOLUTION)
def test_what_is_started(tmp_path, monkeypatch, mode, variable, expected):
    started = []
    monkeypatch.setattr(wandb_run.Wandb, "_start", lambda self, mode: started.append(mode))
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    lines = tracker(mode, tmp_path).finish({})
    assert started == ([expected] if expected else [])
    assert bool(lines) == (mode == "auto" and variable == "sideways")
    assert all("WANDB_MODE is 'sideways'" in line for line in lines)


def no_key(home):
    pass


def key_in_netrc(home):
    host = os.environ["WANDB_BASE_URL"].removeprefix("http://")
    (home / ".netrc").write_text(f"machine {host} login user password {KEY}\n")


def key_for_another_host(home):
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")


def settings_offline(home):
    key_in_netrc(home)
    (home / ".config" / "wandb").mkdir(parents=True)
    (home / ".config" / "wandb" / "settings").write_text("[default]\nmode = offline\n")


def settings_disabled(home):
    settings_offline(home)
    (home / ".config" / "wandb" / "settings").write_text("[default]\nmode = disabled\n")


@pytest.mark.parametrize(
    ("prepare", "where"),
    [
        (no_key, "offline"),
        (key_in_netrc, "online"),
        (key_for_another_host, "offline"),
        (settings_offline, "offline"),
        (settings_disabled, None),
    ],
)
def test_auto_where_wandb_mode_is_not_set(tmp_path, monkeypatch, prepare, where):
    with server(monkeypatch, key=False) as requests:
        prepare(Path(os.environ["HOME"]))
        lines = tracker("auto", tmp_path).finish({})
        assert bool(requests) == (where == "online")
    if where is None:
        assert lines == []
    elif where == "offline":
        assert len(lines) == 1
        assert folder_in(lines).exists()
    else:
        assert lines[0].startswith(f"wandb: {os.environ['WANDB_BASE_URL']}")


def test_online_without_a_key_warns_and_asks_nothing_even_at_a_terminal(tmp_path):
    """On a terminal of its own, which is where wandb would ask."""
    code = f"""
from lab import wandb_run
for line in wandb_run.Wandb("online", None, None, "name", "group", {{}}, {str(tmp_path)!r}).finish({{}}):
    print(line)
"""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", code])
    guard = threading.Timer(60, os.kill, [pid, signal.SIGKILL])
    guard.start()
    output = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while data := os.read(terminal, 4096):
            output += data
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    guard.cancel()
    warning, where = output.decode().splitlines()
    assert warning.startswith("wandb: warning: No API key")
    assert folder_in([where]).exists()


@pytest.mark.parametrize("exit_by", ["return", "exception"])
def test_disabled_starts_nothing_and_imports_nothing(tmp_path, exit_by):
    code = f"""
import subprocess, sys, threading
from lab import wandb_run
subprocess.Popen = None
run = wandb_run.Wandb("disabled", None, None, "name", "group", {{}}, {str(tmp_path)!r})
run.log({{"loss": 1.0}}, step=0)
assert run.finish({{}}, exit_code=1) == []
assert not [name for name in sys.modules if name.split(".")[0] in ("wandb", "torch")]
assert threading.active_count() == 1
{"raise SystemExit(3)" if exit_by == "exception" else ""}
"""
    environment = os.environ | {"WANDB_API_KEY": KEY}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, env=environment)
    assert run.returncode == (3 if exit_by == "exception" else 0)
    assert names(tmp_path) == []


# A run that is resumed


def begun(directory, mode="offline", steps=10):
    """A run that ended after some steps; its id."""
    run = tracker(mode, directory)
    for step in range(steps):
        run.log(STEPS[step], step=step)
    lines = run.finish({"status": "interrupted"}, 1)
    return run.id, lines


def continued(directory, run_id, mode="offline"):
    run = tracker(mode, directory, run_id=run_id)
    assert run.id == run_id
    for step, metrics in enumerate(STEPS):  # the earlier ones too
        run.log(metrics, step=step)
    return run.finish({"status": "complete"})


def test_a_resumed_offline_run_is_one_whole_run_under_its_first_id(tmp_path):
    run_id, lines = begun(tmp_path)
    first = folder_in(lines)
    stranger = tmp_path / "wandb" / "offline-run-20200101_000000-12345678"
    stranger.mkdir()
    lines = continued(tmp_path, run_id)
    records = assert_whole(lines)
    assert next(record.run.run_id for record in records if record.HasField("run")) == run_id
    assert stranger.exists()
    assert not first.exists()  # what was in it is in the new one
    assert [path.name for path in (tmp_path / "wandb").glob("offline-run-*")].count(folder_in(lines).name) == 1


def test_a_resumed_online_run_goes_on_under_its_first_id(tmp_path, monkeypatch):
    with server(monkeypatch) as requests:
        run_id, (line,) = begun(tmp_path, "online")
        assert line.endswith(f"/runs/{run_id}")
        seen = len(requests)
        (again,) = continued(tmp_path, run_id, "online")
        assert again == line
        assert uploaded(requests[seen:]) == dict(enumerate(STEPS))
        upserts = [json.loads(body)["variables"] for _, body in requests[seen:] if "upsertBucket" in body]
        assert {variables["name"] for variables in upserts} == {run_id}


def test_a_run_resumed_while_the_process_of_the_killed_one_still_closes_it(tmp_path):
    code = f"""
import os, signal
from lab import wandb_run
run = wandb_run.Wandb("offline", None, None, "name", "group", {{}}, {str(tmp_path)!r})
run.log({{"loss": 1.0}}, step=0)
print(run.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    run_id = killed.stdout.strip()
    lines = continued(tmp_path, run_id)
    assert_whole(lines)
    assert folder_in(lines).name.endswith(f"-{run_id}-{os.getpid()}")  # which the killed one's cannot be
