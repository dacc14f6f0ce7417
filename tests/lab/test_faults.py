"""Faults by real means, from the command line: each ends in one clear line, and what was recorded can be resumed."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from run_helpers import NOISY_BOSTON, ROOT, Ran, bits, epochs_in, kill_self, only

from lab.console import command

EPOCH_HOOK = """
from lab.record import Record
write = Record.evaluation
def epoch(record, metrics):
    if metrics["epoch"] == 3:
        fault(record)
    write(record, metrics)
Record.evaluation = epoch
"""
FIVE = [*NOISY_BOSTON, "--epochs", 5, "--checkpoint-every", 1]


@pytest.fixture
def straight(cli):
    """The bits of FIVE, undisturbed."""
    return bits(cli(*FIVE, "--output-dir", "straight").folder)


def fails_in_one_line(ran, *words, resumable=True):
    assert (ran.status, ran.out) == (1, ""), ran
    lines = [line for line in ran.err.splitlines() if not line.startswith(("epoch ", "resuming "))]
    assert len(lines) == 1, ran.err
    words = ["main.py: error: ", *words, *([f"to go on: {command('main.py', '--resume')} runs/"] if resumable else [])]
    assert [word for word in words if word not in lines[0]] == []


# A full disk


@pytest.mark.parametrize("what", ["checkpoint", "metrics"])
def test_a_disk_that_takes_no_more(cli, child, tmp_path, straight, what):
    """By RLIMIT_FSIZE, which every system has: no file may grow beyond so many bytes."""
    limit = "12000" if what == "checkpoint" else "os.path.getsize(record.folder / 'metrics.jsonl') + 20"
    fault = f"""
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def fault(record):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
"""
    ran = child(*FIVE, before=fault + EPOCH_HOOK)
    fails_in_one_line(ran, "File too large")
    folder = only(tmp_path / "runs")
    assert epochs_in(folder) == ([1, 2, 3] if what == "checkpoint" else [1, 2])
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == 2
    assert not list(folder.glob(".*.tmp"))
    assert bits(cli("--resume", folder).folder) == straight


def on_a_disk_of_its_own(arguments, tmp_path, size, script=""):
    """main.py on a tmpfs of that size, which is copied to tmp_path/disk afterwards; skipped where none can be had."""
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    shutil.copytree(tmp_path / "runs", tmp_path / "put", dirs_exist_ok=True) if (tmp_path / "runs").exists() else None
    (tmp_path / "before.py").write_text(script + "\nimport main, sys\nsys.exit(main.main(sys.argv[1:]))")
    commands = f"""
mount -t tmpfs -o size={size} tmpfs '{mounted}' || exit 99
[ -d '{tmp_path}/put' ] && cp -a '{tmp_path}/put' '{mounted}/runs'
cd '{mounted}'
'{sys.executable}' '{tmp_path}/before.py' "$@" > '{tmp_path}/stdout' 2> '{tmp_path}/stderr'
status=$?
cp -a '{mounted}' '{tmp_path}/disk'
exit $status
"""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare here")
    call = [unshare, "--user", "--map-root-user", "--mount", "sh", "-c", commands, "sh", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)
    if ran.returncode == 99 or "unshare" in ran.stderr:
        pytest.skip(f"no mount of our own here: {ran.stderr.strip()}")
    return Ran(ran.returncode, (tmp_path / "stdout").read_text(), (tmp_path / "stderr").read_text())


def test_a_full_disk(cli, tmp_path, straight):
    """A tmpfs that somebody else fills up in the third epoch, to its last page."""
    fault = """
def fault(record):
    with open("filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
"""
    ran = on_a_disk_of_its_own(FIVE, tmp_path, "256k", fault + EPOCH_HOOK)
    fails_in_one_line(ran, "No space left on device")
    folder = only(tmp_path / "disk" / "runs")
    assert epochs_in(folder) in ([1, 2], [1, 2, 3])  # the third, where it still fits into the file's last page
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == 2
    assert bits(cli("--resume", folder).folder) == straight  # after it was copied to a disk with room


@pytest.mark.parametrize("begun", [False, True], ids=["new", "resumed"])
def test_a_read_only_folder(cli, child, tmp_path, straight, begun):
    if begun:
        child(*FIVE, before=kill_self("SIGTERM", 17))
        name = only(tmp_path / "runs").name
    script = "import subprocess; subprocess.run(['mount', '-o', 'remount,ro', '../mounted'], check=True)"
    arguments = ["--resume", f"runs/{name}"] if begun else FIVE
    ran = on_a_disk_of_its_own(arguments, tmp_path, "1m", script)
    fails_in_one_line(ran, "Read-only file system", resumable=False)
    if begun:
        assert bits(cli("--resume", only(tmp_path / "disk" / "runs")).folder) == straight


# A folder that vanishes


@pytest.mark.parametrize("how", ["shutil.rmtree('runs')", "os.rename('runs', 'moved')"], ids=["deleted", "moved"])
@pytest.mark.parametrize("arguments", [[], ["--checkpoint-every", "2h"]], ids=["checkpoints", "none yet"])
def test_records_that_vanish_are_written_anew(child, tmp_path, straight, how, arguments):
    ran = child(*FIVE, *arguments, before=f"import os, shutil\ndef fault(record): {how}\n{EPOCH_HOOK}")
    assert ran.status == 0
    assert "vanished while the run went on: written anew" in ran.out
    assert bits(only(tmp_path / "runs")) == straight
    if "moved" in how:
        assert epochs_in(only(tmp_path / "moved")) == [1, 2]


def test_records_that_vanish_right_before_the_end(child, tmp_path, straight):
    script = """
import shutil
from lab.record import Record
finish = Record.finish
def finishes(record, summary):
    shutil.rmtree("runs")
    return finish(record, summary)
Record.finish = finishes
"""
    ran = child(*FIVE, before=script)
    assert (ran.status, "written anew" in ran.out) == (0, True)
    assert bits(only(tmp_path / "runs")) == straight


def test_records_that_vanish_and_cannot_be_written_anew(child, tmp_path):
    script = (
        "import shutil\ndef fault(record):\n    shutil.rmtree('runs')\n    open('runs', 'w').close()\n" + EPOCH_HOOK
    )
    ran = child(*FIVE, before=script)
    fails_in_one_line(ran, "runs", "nothing is recorded yet", resumable=False)


# Memory


@pytest.mark.parametrize("step", [3, 17])
def test_out_of_memory_in_a_step(cli, child, tmp_path, straight, step):
    """By RLIMIT_AS: the process may not grow, and the next large tensor cannot be had."""
    script = f"""
import resource, torch
from lab.batches import Batches
remaining, batches = Batches.remaining, []
def hungry(self, state):
    for batch in remaining(self, state):
        batches.append(1)
        if len(batches) == {step}:
            resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.RLIM_INFINITY))
            torch.empty(2**34)
        yield batch
Batches.remaining = hungry
"""
    ran = child(*FIVE, before=script)
    has_epochs = step > 7
    fails_in_one_line(ran, f"out of memory in step {step}: a --batch-size below 64 needs less", resumable=has_epochs)
    if has_epochs:
        folder = only(tmp_path / "runs")
        assert epochs_in(folder) == [1, 2]
        assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
        assert bits(cli("--resume", folder).folder) == straight
    else:
        assert not (tmp_path / "runs").exists()


# Clocks, streams, wandb


def test_a_clock_that_jumps_changes_nothing(child, tmp_path, straight):
    """Backwards and forwards by years, at every look at it."""
    script = """
import datetime, itertools, time
jumps = itertools.cycle([0.0, 4e9, 1.0, 2e9])
time.time = lambda: next(jumps)
time.time_ns = lambda: int(next(jumps) * 1e9)
"""
    started = time.monotonic()
    ran = child(*FIVE, "--checkpoint-every", "0.000001s", before=script)
    assert ran.status == 0
    assert bits(only(tmp_path / "runs")) == straight
    assert 0 < ran_seconds(only(tmp_path / "runs")) <= time.monotonic() - started


def ran_seconds(folder):
    return json.loads((folder / "summary.json").read_text())["seconds"]


def test_seconds_add_up_over_sessions(cli, child, tmp_path):
    child(*FIVE, before=kill_self("SIGTERM", 17))
    before = ran_seconds(only(tmp_path / "runs"))
    ran = cli("--resume", only(tmp_path / "runs"))
    assert ran.summary["seconds"] > before > 0


def test_nobody_reads_what_it_says(child, tmp_path, straight):
    """A closed pipe at stderr, as after `2>&1 | head -1`."""
    script = "import os\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 2)"
    ran = child(*FIVE, before=script)
    assert ran.status == 0
    assert bits(only(tmp_path / "runs")) == straight


KILLS_WANDB = """
import os, signal
from lab.wandb_run import Wandb
begin, running = Wandb.__init__, []
def begins(run, *arguments):
    running.append(run)
    begin(run, *arguments)
Wandb.__init__ = begins
def fault(record):
    os.kill(running[0]._process.pid, signal.SIGKILL)
"""


@pytest.mark.parametrize("fault", ["its process killed", "its port closed"])
def test_wandb_that_fails_costs_a_warning(child, tmp_path, straight, fault):
    script = KILLS_WANDB + EPOCH_HOOK
    mode = "offline"
    if fault == "its port closed":
        mode = "online"
        port = "http://127.0.0.1:9"
        script = f"import os\nos.environ.update(WANDB_BASE_URL='{port}', WANDB_API_KEY='{'0123456789' * 4}')"
    ran = child(*FIVE, "--wandb", mode, before=script)
    assert ran.status == 0
    assert "wandb: warning: " in ran.out
    assert "wandb sync " in ran.out
    folder = the_folder_beside_wandb(tmp_path)
    assert bits(folder) == straight


def the_folder_beside_wandb(tmp_path):
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "wandb")
    return folder
