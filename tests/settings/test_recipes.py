"""Recipes: each does what it claims, against qtorch's optimizer, the algorithms as published, and plain averages."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from run_helpers import write_cifar10
from torch import nn

import data
import models
from lab import checkpoint
from low_precision.formats import NAMED
from low_precision.model import LowPrecision
from low_precision.rounding import Rounding
from low_precision.rules import Rule, rule_of
from low_precision.scheme import Scheme
from low_precision.tensor import quantize
from low_precision.wrap import quantize_model
from settings.config import Config

COMPILER = shutil.which("c++") or shutil.which("g++")


def small(seed: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return models.mlp((6,), 3, width=16), torch.randn(64, 6), torch.randint(0, 3, (64,))


def steps(model: nn.Module, optimizer, x, y, count: int, scale: float = 1.0) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) * scale).backward()
        optimizer.step()


@pytest.mark.skipif(not COMPILER, reason="qtorch compiles C++")
@pytest.mark.parametrize("accumulator", [None, "float16"])
def test_twenty_steps_are_those_of_optim_lp(accumulator):
    """The same weights, bit by bit, where both start from rounded ones (qtorch rounds them after its first step).

    Ours with ties away from zero, as qtorch's nearest has them: 0.9 * momentum + gradient is a tie every few steps, and
    so is a float16 accumulator between two float8 weights. But for ties, nearest is the same.
    """
    from qtorch import FloatingPoint
    from qtorch.optim import OptimLP
    from qtorch.quant import quantizer

    def nearest(format_name: str):
        exponent, mantissa = {"float8": (5, 2), "float16": (6, 9)}[format_name]
        return quantizer(forward_number=FloatingPoint(exponent, mantissa), forward_rounding="nearest")

    rules = {site: rule_of("float8", Rounding.NEAREST_AWAY) for site in ("weights", "gradients", "momentum")}
    rules |= {"accumulator": rule_of(accumulator, Rounding.NEAREST_AWAY)} if accumulator else {}
    ours, x, y = small()
    optimizer = LowPrecision(ours, Scheme(rules)).attach(torch.optim.SGD(ours.parameters(), lr=0.3, momentum=0.9))
    theirs, _, _ = small()
    theirs.load_state_dict({name: value for name, value in ours.state_dict().items() if name in theirs.state_dict()})
    if accumulator:  # theirs starts from the weights that it is given; ours from those before they were rounded
        for master, weight in zip(ours.low_precision.kept(), ours.parameters(), strict=True):
            master.copy_(weight.detach())
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.3, momentum=0.9)
    quants = {"weight_quant": nearest("float8"), "grad_quant": nearest("float8"), "momentum_quant": nearest("float8")}
    optim_lp = OptimLP(sgd, **quants, acc_quant=nearest(accumulator) if accumulator else None)
    moved = [p.detach().clone() for p in ours.parameters()]
    for _ in range(20):
        steps(ours, optimizer, x, y, 1)
        steps(theirs, optim_lp, x, y, 1)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(moved, ours.parameters(), strict=True))


def test_kahan_summation_as_written_with_torchs_bfloat16():
    """w + u + c in float32, w = bfloat16(that), c = bfloat16(what is left)."""
    ours, x, y = small()
    rules = {"weights": rule_of("bfloat16"), "compensation": rule_of("bfloat16")}
    optimizer = LowPrecision(ours, Scheme(rules)).attach(torch.optim.SGD(ours.parameters(), lr=0.01))
    theirs, _, _ = small()
    kept = []
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.bfloat16())
            kept.append(torch.zeros_like(p))
    for _ in range(50):
        steps(ours, optimizer, x, y, 1)
        theirs.zero_grad()
        F.cross_entropy(theirs(x), y).backward()
        with torch.no_grad():
            for p, lost in zip(theirs.parameters(), kept, strict=True):
                wanted = p.add(p.grad, alpha=-0.01) + lost
                p.copy_(wanted.bfloat16())
                lost.copy_((wanted - p).bfloat16())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    assert any(lost.any() for lost in ours.low_precision.kept())


@pytest.mark.parametrize(("site", "reached"), [(None, 1.0), ("compensation", 1.5)])
def test_small_updates_are_lost_without_compensation(site, reached):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    rules = {s: rule_of("bfloat16") for s in ("weights", site) if s}
    optimizer = LowPrecision(model, Scheme(rules)).attach(torch.optim.SGD(model.parameters(), lr=2.0**-10))
    for _ in range(512):  # each adds 2**-10; bfloat16's spacing at 1 is 2**-7
        optimizer.zero_grad()
        (-model(torch.ones(1, 1))).sum().backward()
        optimizer.step()
    assert model.weight.item() == reached


def test_compensation_starts_anew_where_weights_are_set():
    model, x, y = small()
    low = LowPrecision(
        model, Scheme({"weights": rule_of("float8"), "compensation": Rule(NAMED["float32"], Rounding.UP)})
    )
    optimizer = low.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    steps(model, optimizer, x, y, 3)
    assert all(lost.any() for lost in low.kept())
    before = [lost.clone() for lost in low.kept()]
    state = copy.deepcopy(optimizer.state_dict())
    model.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, low.kept(), strict=True))
    for p in model.parameters():
        with torch.no_grad():
            p.add_(0.3)
    model(x)
    assert not any(lost.any() for lost in low.kept())
    optimizer.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, low.kept(), strict=True))


@pytest.mark.parametrize(
    "sites", [{"compensation": "float16"}, dict.fromkeys(("weights", "compensation", "accumulator"), "float8")]
)
def test_a_compensation_is_of_rounded_weights_without_an_accumulator(sites):
    with pytest.raises(ValueError, match="compensation"):
        quantize_model(small()[0], **sites)
    with pytest.raises(ValueError, match="--site: given compensation"):
        Config.make(site=[f"{site}={name}" for site, name in sites.items()])


@pytest.mark.parametrize(("share", "averaged"), [(0.5, (3, 4)), (0.1, (4,)), (1, (1, 2, 3, 4))])
def test_the_average_is_that_of_the_weights_after_the_last_epochs(cli, share, averaged):
    flags = ["--dataset", "boston", "--batch-size", 64, "--learning-rate", 0.05, "--precision", "float8"]
    flags += ["--rounding", "stochastic"]
    weights = []
    for epoch in averaged:
        ran = cli(*flags, "--epochs", epoch)
        weights.append(checkpoint.latest(ran.folder).state["model"])
    mean = {name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[0]}
    model = models.build("linear", (13,), 1, 0)
    model.load_state_dict(mean)
    split = data.load("boston")
    expected = F.mse_loss(model(split.test_x), split.test_y).item()
    ran = cli(*flags, "--epochs", 4, "--average-last", share)
    assert ran.summary["averaged_testing_mse"] == pytest.approx(expected, rel=1e-5)
    assert "averaged_testing_mse" in ran.out
    assert "averaged_testing_mse" not in ran.metrics[0]


def test_the_averages_batch_norm_has_statistics_of_the_training_rows(cli, tmp_path):
    (tmp_path / "cifar").mkdir()
    write_cifar10(tmp_path / "cifar", count=8)
    flags = ["--dataset", "cifar10", "--data-dir", tmp_path / "cifar", "--epochs", 2, "--batch-size", 16]
    ran = cli(*flags, "--average-last", 1, "--learning-rate", 1e-9)
    state = checkpoint.latest(ran.folder).state["average"]
    assert state["n_averaged"] == 2
    assert state["module.bn.num_batches_tracked"] == 3  # 40 images
    assert state["module.bn.running_var"].ne(1).all()


@pytest.mark.parametrize(
    ("sites", "first", "second"),
    [
        ([], "float8", "float8"),
        (["momentum.exp_avg_sq=bfloat16"], "float8", "bfloat16"),
        (["momentum.exp_avg_sq=float32"], "float8", "float32"),
        (["momentum=float16", "momentum.exp_avg=fp16"], "fp16", "float16"),
    ],
    ids=str,
)
def test_each_moment_is_rounded_by_its_site(cli, sites, first, second):
    flags = ["--dataset", "boston", "--optimizer", "adam", "--precision", "float8", "--rounding", "stochastic"]
    ran = cli(*flags, *(word for site in sites for word in ("--site", site)))
    states = checkpoint.latest(ran.folder).state["optimizer"]["state"].values()
    for name, format_name in (("exp_avg", first), ("exp_avg_sq", second)):
        moments = torch.cat([state[name].flatten() for state in states])
        assert moments.unique().numel() > 3
        assert torch.equal(quantize(moments, format_name), moments)
        narrower = {"float8": "e5m1", "bfloat16": "float8", "float16": "bfloat16", "fp16": "float16", "float32": "fp16"}
        assert not torch.equal(quantize(moments, narrower[format_name]), moments)
