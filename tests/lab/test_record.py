"""Records: what lies on disk at every moment."""

import errno
import os
import signal
import struct
import subprocess
import sys
import threading

import pytest
from run_helpers import ROOT, names, strict_json

from lab.files import write_whole
from lab.record import Record

NAME = "boston-float8-nearest-42-1a2b3c4d"


def finished(output_dir, status="complete", **summary):
    record = Record(output_dir, NAME, {"seed": 42})
    record.evaluation({"loss": 1.0})
    return record.finish({"status": status, **summary})


def status_of(folder):
    return strict_json((folder / "summary.json").read_text())["status"]


def test_a_record_holds_what_was_given(tmp_path):
    record = Record(tmp_path / "a" / "runs", NAME, {"seed": 42, "sites": ("weights", "errors"), "bad": float("nan")})
    assert record.folder == tmp_path / "a" / "runs" / f"{NAME}.partial-{os.getpid()}"
    for epoch in range(3):
        record.evaluation({"epoch": epoch, "loss": [0.1, float("nan"), float("-inf")][epoch], "accuracy": None})
    record.checkpoint(b"third epoch")
    record.checkpoint(b"fourth epoch")
    assert (record.folder / "checkpoint.previous.pt").read_bytes() == b"third epoch"
    folder = record.finish({"status": "diverged", "testing_mse": float("inf"), "nested": {"x": [float("nan"), 1.5]}})

    assert folder == record.folder == tmp_path / "a" / "runs" / NAME
    assert names(folder.parent) == [NAME]
    assert names(folder) == ["checkpoint.pt", "config.json", "metrics.jsonl", "summary.json"]
    assert strict_json((folder / "config.json").read_text()) == {
        "seed": 42,
        "sites": ["weights", "errors"],
        "bad": None,
    }
    assert [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == [
        {"epoch": 0, "loss": 0.1, "accuracy": None},
        {"epoch": 1, "loss": None, "accuracy": None},
        {"epoch": 2, "loss": None, "accuracy": None},
    ]
    summary = (folder / "summary.json").read_text()
    assert strict_json(summary) == {"status": "diverged", "testing_mse": None, "nested": {"x": [None, 1.5]}}
    assert '\n  "testing_mse": null' in summary
    assert (folder / "checkpoint.pt").read_bytes() == b"fourth epoch"


def test_every_float_comes_back_with_the_same_bits(tmp_path):
    values = [0.1, 1 / 3, 5e-324, -0.0, 1.7976931348623157e308, 114688.0]
    record = Record(tmp_path, NAME, {})
    for value in values:
        record.evaluation({"loss": value})
    folder = record.finish({"status": "complete"})
    back = [strict_json(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [struct.pack("d", value) for value in back] == [struct.pack("d", value) for value in values]


def test_after_kill_9_only_whole_lines_and_the_record_is_open_to_the_next(tmp_path):
    code = f"""
import os, signal
from lab.record import Record
record = Record({str(tmp_path)!r}, {NAME!r}, {{"seed": 42}})
for epoch in range(50):
    record.evaluation({{"epoch": epoch, "loss": 0.5}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(f"{NAME}.partial-")
    lines = (partial / "metrics.jsonl").read_text()
    assert lines.endswith("\n")
    assert [strict_json(line)["epoch"] for line in lines.splitlines()] == list(range(50))
    assert strict_json((partial / "config.json").read_text()) == {"seed": 42}

    finished(tmp_path, "interrupted")
    assert partial.exists()  # what was interrupted cleans nothing: the killed run may have come further
    finished(tmp_path, "complete")
    assert names(tmp_path) == [NAME]


def test_a_line_that_the_disk_takes_in_part_is_taken_back(tmp_path):
    code = f"""
import resource, signal
from lab.record import Record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
record = Record({str(tmp_path)!r}, {NAME!r}, {{}})
record.evaluation({{"loss": 1}})
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
for attempt in range(2):
    try:
        record.evaluation({{"loss": 12345678901234567890}})
    except OSError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, resource.RLIM_INFINITY))
record.evaluation({{"loss": 2}})
resource.setrlimit(resource.RLIMIT_FSIZE, (5, resource.RLIM_INFINITY))
for write in (lambda: record.checkpoint(b"longer than that"), lambda: record.finish({{"status": "complete"}})):
    try:
        write()
    except OSError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert run.stdout.count(os.strerror(errno.EFBIG)) == 4, run.stderr
    (partial,) = tmp_path.iterdir()
    assert (partial / "metrics.jsonl").read_text() == '{"loss": 1}\n{"loss": 2}\n'
    assert names(partial) == ["config.json", "metrics.jsonl"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_whole_keeps_the_older_file_and_leaves_nothing_when_it_fails(tmp_path, monkeypatch, call):
    path = tmp_path / "checkpoint.pt"
    write_whole(path, "older")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"newer, and longer")
    assert path.read_text() == "older"
    assert names(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("status", ["complete", "diverged"])
@pytest.mark.parametrize("older", ["complete", "diverged", "interrupted", "failed"])
def test_complete_and_diverged_replace(tmp_path, older, status):
    finished(tmp_path, older, run=1)
    folder = finished(tmp_path, status, run=2)
    assert names(tmp_path) == [NAME]
    assert strict_json((folder / "summary.json").read_text()) == {"status": status, "run": 2}


@pytest.mark.parametrize("status", ["interrupted", "failed"])
@pytest.mark.parametrize("older", ["complete", "interrupted"])
def test_interrupted_and_failed_replace_nothing(tmp_path, older, status):
    assert finished(tmp_path, older, run=1) == tmp_path / NAME  # the place was free
    folder = finished(tmp_path, status, run=2)
    assert folder == tmp_path / f"{NAME}.partial-{os.getpid()}"
    assert status_of(folder) == status
    assert strict_json((tmp_path / NAME / "summary.json").read_text())["run"] == 1
    again = finished(tmp_path, status)
    assert again == tmp_path / f"{NAME}.partial-{os.getpid()}-1"
    finished(tmp_path, "complete")
    assert names(tmp_path) == [NAME]


@pytest.mark.parametrize("there_before", [False, True])
def test_failed_before_the_first_epoch_leaves_nothing(tmp_path, there_before):
    output_dir = tmp_path / "a" / "b"
    if there_before:
        output_dir.mkdir(parents=True)
    folder = Record(output_dir, NAME, {}).finish({"status": "failed"})
    assert not folder.exists()
    assert names(tmp_path) == (["a"] if there_before else [])
    assert output_dir.exists() == there_before


def test_no_epoch_at_all_is_a_record_all_the_same(tmp_path):
    assert Record(tmp_path, NAME, {}).finish({"status": "complete"}) == tmp_path / NAME


def test_killed_between_the_two_renames_one_is_whole_and_the_next_puts_it_right(tmp_path):
    finished(tmp_path, "complete", run=1)
    code = f"""
import os, signal, pathlib
from lab.record import Record
rename, renames = pathlib.Path.rename, []
def once(self, target):
    moved = rename(self, target)
    renames.append(str(target))
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.rename = once
record = Record({str(tmp_path)!r}, {NAME!r}, {{}})
record.evaluation({{"loss": 1.0}})
record.finish({{"status": "complete", "run": 2}})
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    old, partial = sorted(tmp_path.iterdir())
    assert old.name.startswith(f"{NAME}.old-")
    assert strict_json((old / "summary.json").read_text())["run"] == 1
    assert strict_json((partial / "summary.json").read_text())["run"] == 2

    folder = finished(tmp_path, "interrupted", run=3)  # gives the older record its place back, and does not take it
    assert folder.name.startswith(f"{NAME}.partial-")
    assert strict_json((tmp_path / NAME / "summary.json").read_text())["run"] == 1
    finished(tmp_path, "complete", run=4)
    assert names(tmp_path) == [NAME]
    assert strict_json((tmp_path / NAME / "summary.json").read_text())["run"] == 4


def test_runs_of_the_same_name_that_are_still_going_are_left_alone(tmp_path):
    other = Record(tmp_path, NAME, {})
    stranger = tmp_path / f"{NAME}5.partial-1"
    stranger.mkdir()
    other.evaluation({"loss": 1.0})
    finished(tmp_path, "complete", run=1)
    other.evaluation({"loss": 2.0})
    folder = other.finish({"status": "complete", "run": 2})
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert names(tmp_path) == [NAME, stranger.name]


def test_many_at_once_leave_one_whole_record(tmp_path):
    records = [Record(tmp_path, NAME, {}) for _ in range(8)]
    for record in records:
        record.evaluation({"loss": 1.0})
    threads = [threading.Thread(target=record.finish, args=[{"status": "complete"}]) for record in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert names(tmp_path / NAME) == ["config.json", "metrics.jsonl", "summary.json"]
    finished(tmp_path)
    assert names(tmp_path) == [NAME]


def test_an_output_dir_that_cannot_be_used_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(OSError, match="file"):
            Record(output_dir, NAME, {})
    with pytest.raises(TypeError):
        Record(tmp_path / "runs", NAME, {"model": object()})
    assert names(tmp_path) == ["file"]
