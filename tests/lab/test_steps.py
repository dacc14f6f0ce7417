"""Runs that are told by their steps: which steps are evaluated, what their lines say, and where they go on."""

import json

import pytest
import torch
from run_helpers import BOSTON, NOISY_BOSTON, bits, is_refused, only, signal_after, stopped, write_cifar10

from lab.interrupt import Stop
from lab.plan import Plan
from lab.record import Record
from settings.config import Config

pytestmark = pytest.mark.usefixtures("one_thread")

BY_STEP = [*BOSTON[:-2], "--precision", "float8", "--rounding", "stochastic", "--steps", 24, "--evaluate-every", 9]


@pytest.mark.parametrize(
    ("settings", "evaluated"),
    [
        ({"epochs": 3}, [7, 14, 21]),
        ({"steps": 10}, [10]),
        ({"steps": 10, "evaluate_every": 3}, [3, 6, 9, 10]),
        ({"steps": 10, "evaluate_every": 5}, [5, 10]),
        ({"steps": 10, "evaluate_every": 99}, [10]),
        ({"epochs": 2, "evaluate_every": 4}, [4, 8, 12, 14]),
        ({"steps": 0}, []),
        ({"epochs": 0, "evaluate_every": 4}, []),
    ],
    ids=str,
)
def test_which_steps_are_evaluated(settings, evaluated):
    plan = Plan.of(Config(**settings), 7)
    assert [plan.evaluation(number) for number in range(1, plan.evaluations + 1)] == evaluated
    assert plan.evaluation(0) == 0


def test_a_line_has_its_step_and_the_epochs_until_there(cli):
    ran = cli(*BY_STEP)
    assert [list(line)[:2] for line in ran.metrics] == [["step", "epoch"]] * 3
    assert [(line["step"], line["epoch"]) for line in ran.metrics] == [(9, 1.285714), (18, 2.571429), (24, 3.428571)]
    assert (ran.summary["steps"], ran.summary["epochs"]) == (24, 3.428571)
    assert "step" not in ran.summary
    assert ran.err.splitlines()[-1].startswith("step 24/24  training_mse ")
    assert ("epochs" in ran.config, ran.config["steps"], ran.config["evaluate_every"]) == (False, 24, 9)
    assert [line["epoch"] for line in cli("--steps", 4, "--evaluate-every", 2).metrics] == [2, 4]  # whole numbers


def test_the_steps_are_those_of_epochs(cli):
    """When a run is evaluated changes no bit of it; nor does what is counted."""
    by_epoch = torch.load(cli(*NOISY_BOSTON).folder / "checkpoint.pt", weights_only=True)
    for flags in (["--steps", 28], ["--steps", 28, "--evaluate-every", 5], ["--epochs", 4, "--evaluate-every", 1]):
        ran = cli(*BOSTON[:-2], *NOISY_BOSTON[6:], *flags)
        state = torch.load(ran.folder / "checkpoint.pt", weights_only=True)
        assert all(torch.equal(state["model"][name], value) for name, value in by_epoch["model"].items())
        assert (state["step"], state["epoch"], state["batch"]) == (28, 4, 0)


def test_training_metrics_are_those_of_the_steps_since_the_last_line(cli):
    """Of classes, means over rows: weighted by rows, the lines of two halves are the line of both."""
    flags = ["--dataset", "digits", "--model", "linear", "--batch-size", 100, "--steps", 10]
    (whole,) = cli(*flags).metrics
    first, second = cli(*flags, "--evaluate-every", 5).metrics
    for name in ("training_loss", "training_accuracy"):
        assert whole[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-12)
    assert whole["testing_loss"] == second["testing_loss"]


@pytest.mark.parametrize("steps", [3, 9, 16])
def test_stopped_between_two_evaluations_or_before_one(cli, tmp_path, monkeypatch, steps):
    write_cifar10(tmp_path, count=5)  # images: their augmentation is drawn anew in each epoch, of 4 steps
    images = ["--dataset", "cifar10", "--model", "cnn", "--batch-size", 8, "--data-dir", tmp_path]
    flags = [*images, "--steps", 21, "--evaluate-every", 9, "--clip-norm", 0.5, "--schedule", "cosine", "--warmup", 5]
    flags += ["--precision", "float8_e4m3fn", "--rounding", "stochastic", "--loss-scale", "dynamic"]
    expected = bits(cli(*flags, "--output-dir", "straight").folder)
    folder = stopped(cli, monkeypatch, *flags, steps=steps)
    ran = cli("--resume", folder)
    assert f"resuming {folder} after step {steps} of 21\n" in ran.err
    assert bits(ran.folder) == expected
    assert ran.summary["resumed"] == [steps]


def test_stopped_while_it_is_evaluated_in_mid_epoch(cli, tmp_path, monkeypatch):
    expected = bits(cli(*BY_STEP, "--output-dir", "straight").folder)
    checks = []

    def stop_in_the_second(stop):
        checks.append(1)
        if len(checks) == 2:
            raise KeyboardInterrupt
        return None

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", stop_in_the_second)
        patch.setattr("lab.session.Stopped", KeyboardInterrupt)
        assert cli(*BY_STEP).status == 130
    folder = only(tmp_path / "runs")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (state["step"], len(state["metrics"])) == (18, 1)
    assert bits(cli("--resume", folder).folder) == expected


def test_a_diverged_run_ends_with_a_line_at_its_step(cli):
    flags = ["--dataset", "breast_cancer", "--learning-rate", 1e30, "--batch-size", 4, "--evaluate-every", 3]
    ran = cli(*flags, "--steps", 500)
    assert (ran.status, ran.summary["status"]) == (0, "diverged")
    steps = [line["step"] for line in ran.metrics]
    assert steps[:-1] == list(range(3, 3 * len(steps), 3))
    assert steps[-1] == ran.summary["diverged_step"] == ran.summary["steps"] + 1


def test_the_average_is_of_the_last_evaluations(cli, monkeypatch):
    """Of four evaluations the last two: the mean of the weights there, read from checkpoints."""
    flags = ["--dataset", "boston", "--batch-size", 64, "--steps", 20, "--evaluate-every", 5, "--average-last", 0.5]
    written, evaluated = [], Record.evaluation
    monkeypatch.setattr(Record, "evaluation", lambda record, line: (written.append(line), evaluated(record, line)))
    ran = cli(*flags)
    weights = []
    for step in (15, 20):
        state = torch.load(cli(*flags[:4], "--steps", step).folder / "checkpoint.pt", weights_only=True)
        weights.append(state["model"]["linear.weight"])
    averaged = torch.load(ran.folder / "checkpoint.pt", weights_only=True)["average"]
    assert int(averaged["n_averaged"]) == 2
    assert torch.allclose(averaged["module.linear.weight"], (weights[0] + weights[1]) / 2, rtol=1e-6, atol=0)
    assert ["averaged_testing_mse" in line for line in ran.metrics] == [False, False, False, True]


@pytest.mark.parametrize(("every", "steps"), [("1", [7, 14, 21, 24]), ("2", [14, 24])])
def test_checkpoints_of_so_many_epochs(cli, monkeypatch, every, steps):
    from lab.state import State

    saved, save = [], State.save
    monkeypatch.setattr(State, "save", lambda state, seconds: (saved.append(state.step), save(state, seconds))[1])
    cli(*BY_STEP, "--checkpoint-every", every)
    assert saved == steps


def test_no_steps(cli):
    ran = cli("--steps", 0)
    assert (ran.status, ran.summary["steps"], ran.metrics) == (0, 0, [])
    assert "testing_mse" in ran.summary


def test_a_checkpoint_with_another_position_is_refused(cli, tmp_path, monkeypatch):
    from lab import checkpoint

    folder = stopped(cli, monkeypatch, *BY_STEP, steps=16)
    state = checkpoint.latest(folder).state
    for change in ({"step": 8}, {"step": 19}, {"metrics": [state["metrics"][0] | {"step": 8}]}, {"metrics": []}):
        (folder / "checkpoint.pt").write_bytes(checkpoint.pack(state | change))
        ran = cli("--resume", folder)
        assert ran.status == 1
        assert "no state of this run" in ran.err


def test_the_same_command_again_says_how_far_it_was(cli, monkeypatch):
    folder = stopped(cli, monkeypatch, *BY_STEP, steps=16)
    assert f"unfinished before: 1 evaluation is in {folder}" in cli(*BY_STEP).err


def test_steps_are_in_the_hash_and_epochs_are_not():
    first, second = Config(steps=5), Config(steps=6)
    assert len({first.folder_name, second.folder_name, Config().folder_name}) == 3
    assert Config.from_json(first.to_json()) == first
    assert "epochs" not in json.loads(first.to_json())
    assert first.told_differences(second) == ["--steps 5, not 6"]


def test_resumed_with_another_length(cli, monkeypatch):
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        assert cli(*BY_STEP).status == 143
    folder = only(__import__("pathlib").Path("runs"))
    is_refused(cli("--resume", folder, "--steps", 30), "--steps 30, not 24")
    is_refused(cli("--resume", folder, "--epochs", 3), "--steps: given 24", "--epochs 3")
