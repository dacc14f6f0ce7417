"""Several processes that torchrun starts: the run that one process makes, replicas that stay the same, one writer."""

import json
import os
import signal
import subprocess
import time

import pytest
from run_helpers import ROOT, TORCHRUN, bits, only, torchrun

ALONE = ("--wandb", "disabled")


def records(folder) -> tuple[dict, list[dict]]:
    record = only(folder)
    lines = (record / "metrics.jsonl").read_text().splitlines()
    return json.loads((record / "summary.json").read_text()), list(map(json.loads, lines))


def test_every_sample_is_rounded_as_in_one_process(cli, tmp_path):
    """Only what is summed over the batch differs, in its last bits; with noise by process, all of it would."""
    flags = [*ALONE, "--dataset", "boston", "--batch-size", 101, "--epochs", 3, "--precision", "float8"]
    flags += ["--rounding", "stochastic", "--quantize", "inputs,activations,errors", "--learning-rate", 1e-3]
    ran = torchrun(2, tmp_path, *flags, "--output-dir", tmp_path / "two")
    assert ran.stdout.count("record:") == 1  # one of them writes
    alone = cli(*flags)
    two, lines = records(tmp_path / "two")
    assert two["environment"]["processes"] == 2
    assert len(lines) == len(alone.metrics) == 3
    for line, expected in zip(lines, alone.metrics, strict=True):
        assert line.keys() == expected.keys()
        for name in line:
            assert line[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_of_two_processes_goes_on_with_one_or_two(cli, tmp_path):
    """All sites, momentum and accumulator too: each checkpoint compares the replicas, bit by bit."""
    flags = [*ALONE, "--dataset", "digits", "--batch-size", 250, "--precision", "float8", "--rounding", "stochastic"]
    flags += ["--momentum", 0.9, "--site", "accumulator=float16:stochastic", "--loss-scale", "dynamic"]
    flags += ["--checkpoint-every", 1, "--epochs", 40, "--output-dir", tmp_path / "runs"]
    running = subprocess.Popen(
        list(map(str, [*TORCHRUN, 2, ROOT / "main.py", *flags])),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/checkpoint.pt")):
        assert time.monotonic() < deadline
        with pytest.raises(subprocess.TimeoutExpired):  # it goes on
            running.wait(0.02)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert "interrupted: recorded so far in" in said
    folder = only(tmp_path / "runs")
    summary, lines = records(tmp_path / "runs")
    assert summary["status"] == "interrupted"
    assert 1 <= len(lines) < 40
    torchrun(2, tmp_path, *ALONE, "--resume", folder)
    summary, lines = records(tmp_path / "runs")
    assert (summary["status"], len(lines)) == ("complete", 40)
    assert summary["training_accuracy"] > 0.9


def test_a_shadow_of_two_processes_is_that_of_one(cli, tmp_path):
    flags = [*ALONE, "--dataset", "boston", "--batch-size", 101, "--epochs", 3, "--precision", "float8", "--shadow"]
    flags += ["--watch", 5, "--loss-scale", "dynamic", "--quantize", "inputs,activations,errors"]
    torchrun(2, tmp_path, *flags, "--output-dir", tmp_path / "two")
    two, one = only(tmp_path / "two"), cli(*flags, "--output-dir", tmp_path / "one").folder
    lines, expected = (
        [json.loads(line) for line in (folder / "shadow.jsonl").read_text().splitlines()] for folder in (two, one)
    )
    assert [line["step"] for line in lines] == [1, 1, 5, 5, 10, 10]
    for line, other in zip(lines, expected, strict=True):
        assert line.pop("layer") == other.pop("layer")
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_replicas_that_differ_are_noticed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from lab.processes import Processes

with Processes(torch.device("cpu")) as processes:
    assert processes.from_first(lambda: processes.rank) == 0
    assert processes.any(processes.rank == 1, False) == [True, False]
    assert [processes.part(7).start, processes.part(7).stop] == ([0, 3], [3, 7])[processes.rank]
    same, other = torch.arange(5.0), torch.zeros(3)
    processes.check_same([same])
    other[2] = -0.0 if processes.rank else 0.0
    try:
        processes.check_same([same, other])
    except RuntimeError as error:
        print(error)
""")
    ran = torchrun(2, tmp_path, script=script)
    assert ran.stdout.count("process 1 of 2 has other weights than the first one") == 2


def test_a_batch_without_a_row_for_each_process_is_refused(tmp_path):
    flags = [*ALONE, "--dataset", "toy", "--batch-size", 7, "--output-dir", tmp_path / "runs"]
    ran = torchrun(2, tmp_path, *flags, check=False)
    assert ran.stderr.count("--batch-size: given 7, allowed: what leaves a row for each of 2 processes") == 1
    assert not (tmp_path / "runs").exists()


MICRO = ["--dataset", "digits", "--model", "mlp", "--batch-size", 101, "--micro-batch", 20, "--optimizer", "adamw"]
MICRO += ["--weight-decay", 0.1, "--decay", "matrices", "--clip-norm", 0.5, "--schedule", "cosine", "--warmup", 3]
MICRO += ["--steps", 24, "--evaluate-every", 9, "--precision", "float8", "--rounding", "stochastic"]
MICRO += ["--quantize", "inputs,activations,errors", "--learning-rate", 1e-3]


def test_parts_of_parts_are_rounded_as_in_one_process(cli, tmp_path):
    """50 and 51 rows: three parts each, the noise of each row that of the whole batch; one all-reduce a step."""
    flags = [*ALONE, *MICRO, "--optimizer", "sgd"]  # Adam makes much of gradients that are nearly 0
    torchrun(2, tmp_path, *flags, "--output-dir", tmp_path / "two")
    _, lines = records(tmp_path / "two")
    alone = cli(*flags, "--micro-batch", 101)  # in one piece
    assert [line["step"] for line in lines] == [9, 18, 24]
    for line, expected in zip(lines, alone.metrics, strict=True):
        for name in ("training_loss", "testing_loss", "gradient_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.slow
def test_two_processes_stopped_between_two_evaluations(tmp_path):
    """The same bits as if they had been left alone: one of them is told to stop, and both do after the same step."""
    stop = tmp_path / "stop.py"
    stop.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from lab.console import Progress
step, done = Progress.step, []
def stepped(progress, loss):
    step(progress, loss)
    done.append(1)
    if len(done) == 13 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
Progress.step = stepped
import main
status = main.main(sys.argv[1:])
sys.exit(0 if status == 143 else 1)  # else torchrun would kill the other one
""")
    flags = [*ALONE, *MICRO, "--site", "momentum=float16:stochastic", "--shadow", "--loss-scale", "dynamic"]
    torchrun(2, tmp_path, *flags, "--output-dir", tmp_path / "straight")
    torchrun(2, tmp_path, *flags, "--output-dir", tmp_path / "runs", script=stop)
    folder = only(tmp_path / "runs")
    assert json.loads((folder / "summary.json").read_text())["steps"] == 13
    torchrun(2, tmp_path, *ALONE, "--resume", folder)
    assert bits(only(tmp_path / "runs")) == bits(only(tmp_path / "straight"))
