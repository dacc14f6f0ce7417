"""wandb_run.py: nothing that happens to wandb reaches the training, and nothing that was logged is lost."""

import contextlib
import json
import os
import pty
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lab import wandb_run

KEY = "0123456789" * 4  # of the form of an API key
NAME = "boston-float8-nearest-42-1a2b3c4d"
ROOT = Path(wandb_run.__file__).parent.parent


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch, tmp_path_factory):
    """No wandb setting, key or netrc of whoever runs the tests; a home of their own."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


STEPS = [{"Training.MSE": 1 / (step + 1), "Testing.MSE": step * 0.1} for step in range(30)]


def tracker(mode, directory, **changes):
    given = {"project": None, "entity": None, "name": NAME[:-9], "group": "boston", "config": {"seed": 42, "a": [1]}}
    return wandb_run.Wandb(mode, directory=directory, **(given | changes))


def whole_run(mode, directory, exit_code=0, **changes):
    run = tracker(mode, directory, **changes)
    for step, metrics in enumerate(STEPS):
        run.log(metrics, step=step)
    return run.finish({"status": "complete", "testing_mse": 0.5}, exit_code)


def folder_in(lines):
    """The folder that the last line tells the user to upload, as a shell would read it."""
    words = shlex.split(lines[-1])
    assert words[-3:-1] == ["wandb", "sync"]
    return Path(words[-1])


def stored(folder):
    """All records of a run's .wandb file: blocks of 32768 bytes, records of which (crc32, length, type) comes first."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, parts, records = 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a header: the rest of the block is empty
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def history(records):
    steps = {}
    for record in records:
        if record.HasField("history"):
            items = {
                (item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
            }
            steps[items["_step"]] = {key: value for key, value in items.items() if not key.startswith("_")}
    return steps


def assert_whole(lines, warnings=0):
    """The lines tell of an offline run that has every metric of every step."""
    assert [line.startswith("wandb: warning: ") for line in lines] == [True] * warnings + [False], lines
    records = stored(folder_in(lines))
    assert history(records) == dict(enumerate(STEPS))
    return records


@contextlib.contextmanager
def server(monkeypatch, *, key=True, status=200, hang_at=None):
    """A W&B server that knows just enough: the run's creation, its history, its files (it wants none)."""
    requests, released = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            requests.append((self.path, body.decode(errors="replace")))
            if hang_at and hang_at in requests[-1][0]:
                released.wait()
            answer = {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}}
            if status != 200:
                answer = {"errors": [{"message": "user is not logged in"}]}
            elif "upsertBucket" in requests[-1][1]:
                given = json.loads(body)["variables"]
                project = {"id": "p", "name": given.get("project"), "entity": {"id": "e", "name": "somebody"}}
                bucket = {"id": "b", "name": given.get("name"), "config": "{}", "project": project}
                answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
            data = json.dumps(answer).encode()
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_PUT = do_POST

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    try:
        yield requests
    finally:
        released.set()
        listening.shutdown()
        listening.server_close()


def uploaded(requests):
    """The history that the server was sent, by step."""
    steps = {}
    for path, body in requests:
        if path.endswith("/file_stream"):
            for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                items = json.loads(line)
                steps[items["_step"]] = {key: value for key, value in items.items() if not key.startswith("_")}
    return steps


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
        assert {given["name"] for given in upserts} == {run_id}


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
