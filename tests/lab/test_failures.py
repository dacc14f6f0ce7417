"""Failures on the way: exit status 1, one line that says why, and what was recorded stays."""

import errno
import json
import os
import resource
import subprocess

import pytest
from run_helpers import Ran, epochs_in, has_failed, names, only, write_cifar10

from lab.record import Record


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_folder_that_cannot_be(cli, tmp_path, output):
    (tmp_path / "file").write_text("mine")
    has_failed(cli("--output-dir", output), "file")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_output_folder_without_permission(cli, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    has_failed(cli("--output-dir", "locked/runs"), "locked")


def test_debug_shows_where(cli, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        cli("--output-dir", "file", "--debug")


def test_broken_data(cli, tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"short")
    has_failed(cli("--dataset", "cifar10", "--data-dir", tmp_path), "data_batch_3.bin", "5 bytes")
    (tmp_path / "data_batch_3.bin").unlink()
    has_failed(cli("--dataset", "cifar10", "--data-dir", tmp_path), "missing data_batch_3.bin")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc, in which nobody can make a file")
def test_a_data_folder_in_which_no_file_can_be_made(script, tmp_path):
    command = [*script, "--dataset", "cifar10", "--data-dir", "/proc"]
    ran = subprocess.run(command, cwd=tmp_path, timeout=60, capture_output=True, text=True)
    has_failed(Ran(ran.returncode, ran.stdout, ran.stderr), "/proc/cifar-10-binary.tar.gz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "epochs", "full"),
    [(200, 1, "config.json"), (2500, 1, "checkpoint.pt"), (20_000, 300, "metrics.jsonl")],
)
def test_no_space(script, tmp_path, limit, epochs, full):
    """No file may grow beyond `limit` bytes: the system refuses the write, as on a full disk."""
    ran = subprocess.run(
        [*script, "--epochs", str(epochs)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    *progress, last = ran.stderr.splitlines()
    has_failed(Ran(ran.returncode, ran.stdout, last), os.strerror(errno.EFBIG), full)
    assert all(line.startswith("epoch ") for line in progress)
    if full == "config.json":
        assert (progress, list(tmp_path.iterdir())) == ([], [])
        return
    folder = only(tmp_path / "runs")
    written = set(names(folder)) - ({"checkpoint.pt"} if full == "metrics.jsonl" else set())
    assert written == {"config.json", "metrics.jsonl", "summary.json"}  # of a slow run, also an earlier checkpoint
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    recorded = epochs_in(folder)
    assert recorded == list(range(1, 1 + len(recorded)))
    assert (folder / "metrics.jsonl").stat().st_size > limit - 300 or epochs == 1


def test_a_failure_half_way_keeps_what_was_recorded(cli, tmp_path, monkeypatch):
    write, epochs = Record.evaluation, []

    def fail_in_the_third(record, metrics):
        epochs.append(metrics)
        if len(epochs) == 3:
            raise OSError(28, "No space left\non device")
        write(record, metrics)

    monkeypatch.setattr(Record, "evaluation", fail_in_the_third)
    ran = cli("--epochs", 10)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.splitlines()[-1].startswith("main.py: error: [Errno 28] No space left on device")
    assert "Traceback" not in ran.err
    folder = only(tmp_path / "runs")
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert epochs_in(folder) == [1, 2]
