"""What the end of a run says: of moments that became zero, and of training that left the model worse."""

import pytest
import torch

from data import spec_of
from lab.remarks import SecondMoments, sentences, vanished
from settings.config import Config

ADAM = ["--dataset", "digits", "--optimizer", "adam", "--learning-rate", 0.001, "--batch-size", 64, "--epochs", 1]
FLOAT8 = ["--precision", "float8"]
SATURATING = ["--dataset", "boston", *FLOAT8, "--learning-rate", 10, "--epochs", 20]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_second_moments_in_float8_are_told(cli, rounding):
    ran = cli(*ADAM, *FLOAT8, "--rounding", rounding)
    assert (ran.status, ran.summary["status"]) == (0, "complete")
    of_moment = ran.summary["vanished"]["exp_avg_sq"]
    assert 0.8 < of_moment["share"] < 1
    assert of_moment["step"] in (1, 2)
    assert of_moment["at_the_end"] < 0.1
    told = [line for line in ran.out.splitlines() if line.startswith("warning: exp_avg_sq became zero")]
    assert told == ran.summary["remarks"][:1]
    assert f"for {of_moment['share']:.1%} of the weights at step {of_moment['step']} and " in told[0]
    assert "--site momentum.exp_avg_sq=bfloat16" in told[0]


def test_a_run_that_saturates_is_told(cli):
    ran = cli(*SATURATING)
    assert (ran.status, ran.summary["status"]) == (0, "complete")
    assert ran.summary["training_mse"] > 1e9
    assert ran.summary["saturated"] == {"weights": 1.0}
    assert ran.summary["first_loss"] < 2
    (told,) = [line for line in ran.out.splitlines() if line.startswith("warning: ")]
    assert [told] == ran.summary["remarks"]
    numbers = (f"{ran.summary['first_loss']:.4g}", f"{ran.summary['training_mse']:.4g}", "100.0% of weights at 114688")
    for words in ("training made the model worse", *numbers, "--learning-rate below 10"):
        assert words in told


def test_weights_at_the_end_of_their_format_in_a_run_that_learned_nothing_are_told(cli):
    ran = cli("--dataset", "digits", "--precision", "float8_e4m3fn", "--learning-rate", 10, "--epochs", 5)
    assert ran.summary["testing_accuracy"] < 0.2
    assert ran.summary["saturated"]["weights"] > 0.1
    assert "warning: the model learned nothing" in ran.out
    assert f"{ran.summary['saturated']['weights']:.1%} of weights at 448" in ran.out


HEALTHY = [
    [],
    ["--epochs", 0],
    FLOAT8,
    ["--dataset", "boston"],
    ["--dataset", "boston", *FLOAT8, "--rounding", "stochastic", "--batch-size", 1, "--epochs", 1],
    ["--dataset", "diabetes", "--precision", "mxfp4", "--model", "mlp"],
    ["--dataset", "boston", "--model", "mlp", "--optimizer", "adam", "--precision", "float16", "--epochs", 10],
    ["--dataset", "breast_cancer", "--optimizer", "adamw", "--recipe", "bfloat16-kahan"],
    ["--precision", "fixed8.7", "--learning-rate", 0.1, "--epochs", 50],  # the weight is 1: beyond the largest, 0.992
    [*ADAM, *FLOAT8, "--site", "momentum=bfloat16"],
    [*ADAM, "--precision", "float16"],  # 4 % of the second moments vanish in the first step, and it does no harm
    [*ADAM, "--precision", "mxfp8_e4m3", "--rounding", "stochastic"],
    ["--dataset", "digits", "--momentum", 0.9, "--precision", "fixed8.4", "--quantize", "momentum"],
    ["--dataset", "boston", *FLOAT8, "--learning-rate", 1e-30],  # it learns nothing, and no number is at an end
]


@pytest.mark.parametrize("arguments", HEALTHY, ids=lambda arguments: " ".join(map(str, arguments)) or "default")
def test_nothing_is_told_of_a_healthy_run(cli, arguments):
    ran = cli(*arguments)
    assert (ran.status, ran.summary["status"]) == (0, "complete")
    assert "remarks" not in ran.summary
    assert ran.out.splitlines()[-1].startswith("record: ")


def test_metrics_are_those_of_a_run_that_looks_at_nothing(cli, monkeypatch):
    looked = cli(*ADAM, *FLOAT8)
    monkeypatch.setattr(SecondMoments, "after_step", lambda *_: None)
    assert cli(*ADAM, *FLOAT8, "--output-dir", "unseen").metrics == looked.metrics


# The criteria, on made-up runs


def of_loss(first, training, testing, saturated=None, **settings) -> list[str]:
    config = Config.make(**{"dataset": "boston", "precision": "float8"} | settings)
    name = "loss" if config.dataset == "digits" else "mse"
    losses = {f"training_{name}": training, f"testing_{name}": testing}
    return sentences(
        config,
        {"status": "complete", "first_loss": first, **losses, "saturated": saturated or {}},
        spec_of(config.dataset),
    )


@pytest.mark.parametrize(
    ("first", "training", "testing", "saturated", "told"),
    [
        (1.4, 1e9, 1e9, {}, "worse"),
        (1.4, 14.1, 14.1, {}, "worse"),
        (1.4, 13.9, 13.9, {}, None),
        (0.01, 9.0, 9.0, {}, None),  # a first batch of one row that was right by chance
        (1.4, 1e9, 0.5, {}, None),  # one odd batch
        (1.4, 0.5, 1e9, {}, None),  # one odd row of the test split
        (500.0, 400.0, 400.0, {"weights": 0.5}, "nothing"),  # a model that was bad to begin with, and stayed so
        (500.0, 400.0, 400.0, {}, None),
        (1.4, 1.3, 1.3, {"weights": 0.5}, "nothing"),
        (1.4, 1.3, 1.3, {"weights": 0.009}, None),
        (1.4, 1.3, 1.3, {"momentum": 0.5}, None),
        (1.4, 0.9, 1.3, {"weights": 0.5}, None),
        (None, 1e9, 1e9, {"weights": 0.5}, None),  # resumed from a checkpoint of an earlier version
    ],
)
def test_when_a_loss_is_told(first, training, testing, saturated, told):
    said = of_loss(first, training, testing, saturated)
    assert len(said) == (told is not None)
    assert all(f"{told}: " in sentence for sentence in said)


def test_a_loss_of_classes_is_compared_with_even_odds():
    assert of_loss(2.3, 23.1, 23.1, dataset="digits") != []
    assert of_loss(2.3, 22.9, 22.9, dataset="digits") == []
    assert "a constant answer has 2.3" in of_loss(2.3, 23.1, 23.1, dataset="digits")[0]


def test_a_wider_format_is_advice_only_where_one_is_rounded_to():
    assert "a wider format" in of_loss(1.4, 1e9, 1e9)[0]
    assert "a wider format" not in of_loss(1.4, 1e9, 1e9, precision="float32")[0]


@pytest.mark.parametrize(("share", "told"), [(0.0, False), (0.09, False), (0.11, True), (1.0, True)])
@pytest.mark.parametrize("status", ["complete", "diverged"])
def test_when_moments_are_told(share, told, status):
    vanished = {"exp_avg_sq": {"share": share, "step": 2, "at_the_end": 0.0}}
    assert bool(sentences(Config(), {"status": status, "vanished": vanished}, spec_of("toy"))) == told


def adam(first: list[float], second: list[float], eps: float = 1e-8) -> torch.optim.Optimizer:
    p = torch.nn.Parameter(torch.zeros(len(first)))
    optimizer = torch.optim.Adam([p], eps=eps)
    optimizer.state[p] = {"exp_avg": torch.tensor(first), "exp_avg_sq": torch.tensor(second)}
    return optimizer


@pytest.mark.parametrize(
    ("first", "second", "eps", "share"),
    [
        ([1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], 1e-8, 0.25),
        ([-1.0, 1.1e-7, 0.9e-7, 0.0], [0.0, 0.0, 0.0, 0.0], 1e-8, 0.5),
        ([1.0, 1.1e-3, 0.9e-3, 0.0], [0.0, 0.0, 0.0, 0.0], 1e-4, 0.5),
        ([1.0, 1.0], [1e-45, 1.0], 1e-8, 0.0),
    ],
)
def test_what_has_vanished(first, second, eps, share):
    assert vanished(adam(first, second, eps)) == share


def test_other_optimizers_have_no_second_moments():
    p = torch.nn.Parameter(torch.ones(3))
    assert vanished(torch.optim.SGD([p], 0.1, 0.9)) is None
    assert vanished(torch.optim.Adam([p])) is None  # before its first step


def test_it_is_looked_at_in_the_steps_that_are_powers_of_two():
    moments, step_of = SecondMoments(rounded=True), {}
    for step in range(1, 20):
        optimizer = adam([1.0] * 20, [0.0] * step + [1.0] * (20 - step))
        moments.after_step(step, optimizer)
        step_of[step] = moments.step
    assert sorted(set(step_of.values())) == [1, 2, 4, 8, 16]
    assert (moments.share, moments.step) == (0.8, 16)
    moments.after_step(32, adam([1.0], [1.0]))  # less than before
    assert moments.state_dict() == {"share": 0.8, "step": 16}
    again = SecondMoments(rounded=True)
    again.load_state_dict(moments.state_dict())
    assert again.state_dict() == moments.state_dict()
    unrounded = SecondMoments(rounded=False)
    unrounded.after_step(1, adam([1.0], [0.0]))
    assert unrounded.share == 0.0


# What was not rounded


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (FLOAT8, "results of relu (3), max_pool2d"),
        (["--site", "products=float8"], "results of products (4), relu (3), max_pool2d"),
        ([*FLOAT8, "--quantize", "inputs"], None),
        ([*FLOAT8, "--site", "elementwise=bfloat16"], ""),
        (["--precision", "float8", "--quantize", "weights"], ""),  # nothing that flows is rounded: it was not asked for
        ([], ""),
    ],
)
def test_a_run_says_in_one_line_what_was_not_rounded(cli, flags, left):
    ran = cli("--dataset", "digits", "--epochs", 1, "--model", "cnn", *flags)
    lines = [line for line in ran.out.splitlines() if line.startswith("not rounded: ")]
    if left is None:
        (line,) = lines
        assert "operands of products: forward.weights (4), " in line
    else:
        assert lines == ([f"not rounded: {left}"] if left else [])
    assert ran.summary.get("not_rounded", "") == (lines[0].partition(": ")[2] if lines else "")


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "float8", "--site", "elementwise=bfloat16"],
        ["--site", "dgrad.weights=float8"],
    ],
)
def test_a_site_that_reaches_nothing_ends_the_run_in_its_first_step(cli, tmp_path, flags):
    ran = cli("--dataset", "boston", "--model", "linear", *flags)
    assert ran.status == 2
    site = flags[-1].partition("=")[0]
    assert ran.err.strip().splitlines()[-1].startswith(f"main.py: error: --site: given {site}, allowed: one that this")
    assert not list(tmp_path.rglob("*.json"))
