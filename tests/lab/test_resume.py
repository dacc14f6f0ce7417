"""Stopping and resuming: whatever ends a run, and wherever, --resume leads to the bits of one that was left alone."""

import itertools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from run_helpers import (
    BOSTON,
    NOISY_BOSTON,
    bits,
    has_failed,
    is_refused,
    kill_self,
    names,
    only,
    resumable,
    signal_after,
    snapshot,
    stopped,
    write_cifar10,
)

from lab import metrics
from lab.console import command
from lab.interrupt import Stop
from lab.record import Record
from lab.resume import RunEnded
from low_precision.engines import choice
from settings.config import Config

RUNS = {
    "everything rounded": [*NOISY_BOSTON, "--momentum", 0.9, "--site", "accumulator=float16:stochastic"],
    "float32": [*BOSTON, "--momentum", 0.9, "--schedule", "onecycle"],
    "float32 accumulator": [*NOISY_BOSTON, "--site", "accumulator=float32", "--schedule", "cosine"],
    "dynamic loss scale": [*NOISY_BOSTON, "--precision", "float8_e4m3fn", "--loss-scale", "dynamic"],
    "adam": [*NOISY_BOSTON, "--optimizer", "adam", "--site", "momentum=float16:stochastic"],
    "toy": ["--epochs", 28, "--precision", "float8", "--rounding", "stochastic"],
    "mlp": ["--dataset", "breast_cancer", "--epochs", 7, "--batch-size", 128, "--optimizer", "adamw"],
    "cnn": ["--dataset", "digits", "--epochs", 4, "--batch-size", 60, "--test-split", 0.8, "--precision", "float8"],
    "augmented images": ["--dataset", "cifar10", "--model", "cnn", "--epochs", 4, "--batch-size", 8, *NOISY_BOSTON[6:]],
    "compensation": [*NOISY_BOSTON, "--site", "compensation=float8", "--momentum", 0.9],
    "delayed scales": [
        *[*NOISY_BOSTON, "--momentum", 0.9, "--site", "weights=float8_e4m3fn@tensor@delayed3"],
        *["--site", "products=float8_e4m3fn@tensor@delayed4recent", "--site", "momentum=float8_e5m2@tensor@delayed2"],
    ],
    "scaled weights": [
        *[*NOISY_BOSTON, "--optimizer", "adam", "--site", "weights=float4_e2m1fn@2x4", "--smallest-state", 10],
        *["--site", "momentum.exp_avg=float8_e4m3fn@flat64@expand", "--site", "momentum=float8_e4m3fn@flat64"],
    ],
    "expanded weights": [*NOISY_BOSTON, "--site", "weights=float8_e4m3fn@flat8@expand"],
    "collage": ["--dataset", "breast_cancer", "--epochs", 7, "--batch-size", 128, "--optimizer", "collage"],
    "average": ["--dataset", "cifar10", "--epochs", 4, "--batch-size", 8, "--average-last", 0.5],
    "batch norm": ["--dataset", "cifar10", "--epochs", 4, "--batch-size", 8, "--recipe", "qtorch-tutorial"],
    "random bits of operands": [*BOSTON, "--model", "mlp", "--recipe", "nvfp4"],
    "random signs": [*BOSTON, "--model", "mlp", "--recipe", "mxfp4-rht"],
    "scales of earlier steps": [*BOSTON, "--model", "mlp", "--recipe", "te-delayed"],
}


pytestmark = pytest.mark.usefixtures("one_thread")


def arguments_of(name, folder):
    write_cifar10(folder, count=5)  # 25 + 5 images: 4 steps an epoch
    return [*RUNS[name], *(["--data-dir", folder] if "cifar10" in RUNS[name] else [])]


def goes_on(cli, arguments, stops, monkeypatch):
    """Start, stop after each of these numbers of steps, and resume, to the end. Returns the last of them."""
    ran, call = None, arguments
    for steps in stops:
        with monkeypatch.context() as patch:
            signal_after(patch, steps)
            ran = cli(*call)
        assert (ran.status, ran.out) == (143, ""), ran
        call = ["--resume", resumable(ran.err)]
    return cli(*call)


@pytest.mark.parametrize(
    ("name", "stops"),
    [(name, stops) for name in RUNS for stops in ([3, 2, 7], [1], [14]) if len(stops) > 1 or name != "batch norm"],
)
def test_a_stopped_run_ends_in_the_bits_of_one_that_was_left_alone(cli, tmp_path, monkeypatch, name, stops):
    arguments = arguments_of(name, tmp_path)
    expected = bits(cli(*arguments, "--output-dir", "straight").folder)
    resumed = goes_on(cli, arguments, stops, monkeypatch)
    assert resumed.status == 0
    assert bits(resumed.folder) == expected
    assert names(tmp_path / "runs") == [resumed.folder.name]
    steps = list(itertools.accumulate(stops))
    assert resumed.summary["resumed"] == steps
    assert f"step {steps[-1]}\n" in resumed.err
    assert "--resume" not in resumed.summary["command"]


@pytest.mark.parametrize("every", ["1", "3", "0.000001s"])
def test_how_often_checkpoints_are_written_changes_no_bit(cli, tmp_path, monkeypatch, every):
    arguments = arguments_of("augmented images", tmp_path)
    expected = cli(*arguments, "--output-dir", "straight")
    written, write = [], Record.checkpoint
    monkeypatch.setattr(Record, "checkpoint", lambda record, data: written.append(write(record, data)))
    ran = cli(*arguments, "--checkpoint-every", every)
    assert len(written) == {"1": 4, "3": 2}.get(every, 4 * 4 + 4)  # before each of 4 steps, after each epoch
    assert bits(ran.folder) == bits(expected.folder)
    assert ran.folder.name == expected.folder.name


@pytest.mark.parametrize("chunk", [0, 3])
def test_stopped_while_it_is_evaluated(cli, tmp_path, monkeypatch, chunk):
    arguments = ["--dataset", "digits", "--epochs", 2, "--precision", "float8", "--rounding", "stochastic"]
    expected = bits(cli(*arguments, "--output-dir", "straight").folder)
    monkeypatch.setattr(metrics, "EVALUATION_ROWS", 100)  # 4 chunks
    checks, check = [], Stop.check

    def stop_in_the_chunk(stop):
        checks.append(1)
        if len(checks) == 1 + chunk:  # one before each chunk
            os.kill(os.getpid(), signal.SIGTERM)
        check(stop)

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", stop_in_the_chunk)
        assert cli(*arguments).status == 143
    folder = only(tmp_path / "runs")
    assert (folder / "metrics.jsonl").read_text() == ""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert bits(cli("--resume", folder).folder) == expected


@pytest.mark.parametrize("first", [e for e in ("auto", *choice.ENGINES) if e != "qtorch"])
@pytest.mark.parametrize("second", [e for e in ("auto", *choice.ENGINES) if e != "qtorch"])
def test_engines_take_over_from_each_other(cli, monkeypatch, first, second):
    arguments = RUNS["everything rounded"]
    expected = bits(cli(*arguments, "--output-dir", "straight").folder)
    with monkeypatch.context() as patch:
        signal_after(patch, 10)
        cli(*arguments, "--backend", first)
    folder = only(Path("runs"))
    ran = cli("--resume", folder, "--backend", second)
    assert bits(ran.folder) == expected
    assert ran.config["backend"] == second


def test_qtorch_to_nearest_with_an_accumulator(cli, monkeypatch):
    """Its stochastic rounding draws from numbers that nobody can save."""
    pytest.importorskip("qtorch.quant", exc_type=Exception, reason="needs a C++ compiler")
    arguments = [*BOSTON, "--precision", "float8", "--backend", "qtorch", "--site", "accumulator=float16"]
    expected = bits(cli(*arguments, "--output-dir", "straight").folder)
    assert bits(goes_on(cli, arguments, [10], monkeypatch).folder) == expected


def test_a_diverged_run_that_was_killed_before_it_said_so(cli, monkeypatch):
    arguments = ["--dataset", "breast_cancer", "--learning-rate", 1e30, "--epochs", 50, "--batch-size", 4]
    expected = cli(*arguments, "--output-dir", "straight")
    with monkeypatch.context() as patch:
        patch.setattr(Record, "finish", lambda record, summary: record.folder)  # as a kill there
        killed = cli(*arguments)
    ran = cli("--resume", killed.folder)
    assert (ran.status, ran.summary["status"]) == (0, "diverged")
    assert ran.summary["diverged_step"] == expected.summary["diverged_step"]
    assert (ran.folder / "metrics.jsonl").read_bytes() == (expected.folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("epochs", [0, 3])
def test_what_is_finished_says_so(cli, epochs):
    ran = cli("--epochs", epochs)
    before = {path.name: path.read_bytes() for path in ran.folder.iterdir()}
    again = cli("--resume", f"{ran.folder}/")
    assert (again.status, again.folder) == (0, ran.folder)
    assert "toy-float32-42: complete, nothing is left to do" in again.out
    assert {path.name: path.read_bytes() for path in ran.folder.iterdir()} == before


# Signals


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_step_and_says_how_to_go_on(cli, tmp_path, monkeypatch, number, status):
    signal_after(monkeypatch, 17, number)
    ran = cli(*NOISY_BOSTON)
    assert (ran.status, ran.out) == (status, "")
    folder = only(tmp_path / "runs")
    resume = command("main.py", "--resume", f"runs/{folder.name}")
    assert ran.err.splitlines()[-1] == f"interrupted: recorded so far in runs/{folder.name}; to go on: {resume}"
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["batch"], state["step"]) == (2, 3, 17)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["epochs"], summary["steps"]) == ("interrupted", 2, 17)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_stops_at_once_and_leaves_the_last_checkpoint(cli, tmp_path, monkeypatch):
    signal_after(monkeypatch, 17, signal.SIGINT, times=2)
    ran = cli(*NOISY_BOSTON, "--checkpoint-every", 1)
    assert ran.status == 130
    folder = only(tmp_path / "runs")
    assert f"--resume runs/{folder.name}" in ran.err
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 14
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    expected = cli(*NOISY_BOSTON, "--output-dir", "straight")
    assert bits(cli("--resume", folder).folder) == bits(expected.folder)


def test_a_terminal_that_is_closed(cli, child, tmp_path):
    """SIGHUP, and nothing can be said any more."""
    expected = bits(cli(*NOISY_BOSTON, "--output-dir", "straight").folder)
    closed = "import os\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 2)\n"
    assert child(*NOISY_BOSTON, before=closed + kill_self("SIGHUP")).status == 129
    folder = only(tmp_path / "runs")
    assert bits(cli("--resume", folder).folder) == expected


def test_a_signal_while_wandb_is_waited_for_costs_no_result(cli, monkeypatch):
    from lab import wandb_run

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb_run.Wandb, "finish", interrupted)
    ran = cli(*NOISY_BOSTON)
    assert (ran.status, ran.summary["status"]) == (0, "complete")
    assert ran.out.splitlines()[-1] == "wandb: not waited for"


def test_a_signal_before_it_began_touches_nothing(cli, tmp_path, monkeypatch):
    import data

    folder = stopped(cli, monkeypatch, *NOISY_BOSTON)
    before = snapshot(tmp_path)
    monkeypatch.setattr(data, "load", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    ran = cli("--resume", folder)
    assert (ran.status, ran.out, ran.err) == (143, "", "interrupted: before it began\n")
    assert snapshot(tmp_path) == before


def test_a_signal_that_is_ignored_stays_ignored(child):
    ran = child(
        *NOISY_BOSTON, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + kill_self("SIGHUP")
    )
    assert ran.status == 0
    assert "stopping" not in ran.err


# kill -9

DIES = """
import os, pathlib, signal
from lab.record import Record
from lab.resume import RunEnded
calls = 0
def dying(function, before):
    def call(*arguments, **named):
        global calls
        calls += 1
        if before and calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **named)
        if calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
for holder, name in ((os, "fsync"), (os, "replace"), (pathlib.Path, "rename"), (pathlib.Path, "mkdir"),
                     (Record, "_append")):
    setattr(holder, name, dying(getattr(holder, name), {before}))
"""


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_around_each_thing_that_it_writes(cli, child, tmp_path, before):
    """Each mkdir, fsync, rename and line: whatever lies there can be resumed, or begun anew if nothing lies there."""
    arguments = [*NOISY_BOSTON, "--epochs", 3, "--checkpoint-every", 1]
    expected = bits(cli(*arguments, "--output-dir", "straight").folder)
    resumed = 0
    for call in range(1, 100):
        output = f"runs-{call}"
        ran = child(*arguments, "--output-dir", output, before=DIES.format(call=call, before=before))
        if ran.status == 0:
            break
        assert ran.status == -signal.SIGKILL, ran
        folders = list((tmp_path / output).iterdir()) if (tmp_path / output).exists() else []
        if not any((folder / "config.json").exists() for folder in folders):
            continue
        (folder,) = folders
        lines = folder / "metrics.jsonl"
        assert lines.read_text().endswith("\n") if lines.exists() and lines.stat().st_size else True
        again = cli("--resume", f"{output}/{folder.name.partition('.')[0]}" if call % 2 else folder)
        assert again.status == 0, again
        resumed += 1
        assert bits(again.folder) == expected
        assert names(tmp_path / output) == [again.folder.name]
    assert call < 99
    assert resumed >= 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again(cli, child, tmp_path, seed):
    """Each session dies after some more steps, until there is nothing left to do."""
    arguments = arguments_of("batch norm", tmp_path)
    expected = bits(cli(*arguments, "--output-dir", "straight").folder)
    step, call = 3 + seed, [*arguments, "--checkpoint-every", "0.000001s"]
    for _ in range(10):
        ran = child(*call, before=kill_self("SIGKILL", step))
        if ran.status == 0:
            break
        folder = only(tmp_path / "runs")
        call = ["--resume", folder.with_name(folder.name.partition(".")[0])]
    assert bits(ran.folder) == expected
    assert len(ran.summary["resumed"]) >= 2


# What is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", 9], ["--epochs 9, not 4"]),
        (["--seed", 43, "--learning-rate", 0.5], ["--learning-rate 0.5, not 0.01", "--seed 43, not 42"]),
        (["--precision", "fp16"], ["--precision fp16, not float8"]),
        (["--site", "errors=fp16"], ["--site errors=fp16, not ''"]),
        (["--recipe", "published"], ["--scale-on all, not train", "--quantize activations,errors, not weights"]),
        (["--backend", "qtorch"], ["--backend qtorch, not auto"]),
        (["--model", "cnn"], ["--model: given cnn"]),
        (["--output-dir", "elsewhere"], ["--output-dir: given elsewhere", "allowed: runs"]),
    ],
)
def test_flags_that_would_change_the_result(cli, tmp_path, monkeypatch, flags, words):
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON)
    before = snapshot(tmp_path)
    is_refused(cli("--resume", folder, *flags), *words)
    assert snapshot(tmp_path) == before


def test_flags_that_do_not_are_taken(cli, monkeypatch):
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON)
    flags = [
        "--checkpoint-every",
        "2h",
        "--seed",
        42,
        "--output-dir",
        "./runs",
        "--wandb",
        "disabled",
        "--device",
        "cpu",
    ]
    ran = cli("--resume", folder, *flags)
    assert ran.status == 0
    assert (ran.config["checkpoint_every"], ran.config["device"]) == ("2h", "cpu")


def test_the_checkpoint_of_another_configuration(cli, tmp_path, monkeypatch):
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"epochs": 9, "rounding_seed": 7}))
    before = snapshot(tmp_path)
    is_refused(cli("--resume", folder), "checkpoint.pt", "--epochs 9, not 4", "--rounding-seed 7, not 42")
    assert snapshot(tmp_path) == before


def test_no_record(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    is_refused(cli("--resume", "nothing"), "--resume: given nothing", "the folder of a record")
    is_refused(cli("--resume", "file"), "--resume: given file", "the folder of a record")
    is_refused(cli("--resume", "empty"), "no config.json")
    for text in ("{", "[]", '{"epochs": -1}', '{"colour": 1}', "\udcff", "[" * 100_000):
        (tmp_path / "empty" / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        is_refused(cli("--resume", "empty"), "config.json: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "empty", "file"]


def test_a_record_that_another_process_writes(cli, tmp_path, monkeypatch):
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON)
    going = Record.resume(folder, json.loads((folder / "config.json").read_text()), [], None)
    before = snapshot(tmp_path)
    has_failed(cli("--resume", going.folder), "in use by another process", going.folder.name)
    is_refused(cli("--resume", folder), "--resume", f"no process writes to ({going.folder} is in use)")
    assert snapshot(tmp_path) == before
    going.finish({"status": "interrupted"})


def test_two_that_resume_the_same_at_once(cli, child, tmp_path, monkeypatch):
    expected = bits(cli(*NOISY_BOSTON, "--output-dir", "straight").folder)
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON)
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    processes = [child("--resume", tmp_path / folder, folder=place, wait=False) for place in places]
    for process in processes:
        process.join(120)
    statuses = sorted(process.exitcode for process in processes)
    assert statuses[0] == 0
    if statuses[1]:  # they did meet: one line, and no trace of the other
        said = [(place / "stderr").read_text() for place in places]
        assert sum("main.py: error: " in text for text in said) == 1
    assert not any("Traceback" in (place / "stderr").read_text() for place in places)
    assert names(tmp_path / "runs") == [folder.name]
    assert bits(tmp_path / folder) == expected


def test_two_of_the_same_command_at_once(cli, child, tmp_path):
    expected = bits(cli(*NOISY_BOSTON, "--output-dir", "straight").folder)
    processes = [child(*NOISY_BOSTON, "--output-dir", tmp_path / "runs", folder=tmp_path, wait=False) for _ in range(3)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    folder = only(tmp_path / "runs")
    assert bits(folder) == expected


def test_the_same_command_again_offers_to_go_on(cli, tmp_path, monkeypatch):
    first = stopped(cli, monkeypatch, *NOISY_BOSTON, steps=8)
    further = stopped(cli, monkeypatch, *NOISY_BOSTON, steps=15)
    assert further.name.startswith(f"{first.name}.partial-")
    ran = cli(*NOISY_BOSTON)
    resume = command("main.py", "--resume", str(further))
    offer = f"2 of 4 epochs are in {further}; to go on with it: {resume}; this starts anew"
    assert ran.err.splitlines()[0] == f"unfinished before: {offer}"
    assert ran.summary["resumed"] == []
    assert names(tmp_path / "runs") == [first.name]
    assert "unfinished" not in cli(*NOISY_BOSTON).err


def test_from_python(tmp_path, monkeypatch):
    import train

    config = Config(dataset="boston", batch_size=64, wandb="disabled", output_dir=str(tmp_path / "runs"))
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        with pytest.raises(KeyboardInterrupt) as stop:
            train.run(config)
    assert stop.value.args == (signal.SIGTERM,)
    folder, ended = only(tmp_path / "runs"), RunEnded.of(stop.value)
    assert (ended.folder, ended.notes) == (folder, [])
    resume = command("main.py", "--resume", str(folder))
    assert str(ended) == f"recorded so far in {folder}; to go on: {resume}"
    assert train.run(config, resume=folder).summary["resumed"] == [3]
