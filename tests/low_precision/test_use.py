"""quantize_model and quantize_optimizer as a plain script uses them: compiled, copied, pickled, changed on the way."""

import os
import subprocess
import sys

import pytest
import torch
from run_helpers import ROOT
from torch import nn
from training_helpers import (
    AROUND,
    FLOAT8,
    FLOAT16,
    SITES,
    batch,
    equal,
    everything,
    holds,
    nearest,
    parameters,
    rounded,
    rounded_sgd,
    rule,
    rules,
    small,
    train,
)

from low_precision.formats import NAMED
from low_precision.model import LowPrecision
from low_precision.noise import Key
from low_precision.rounding import Rounding
from low_precision.rules import Rule
from low_precision.scheme import Scheme
from low_precision.tensor import quantize
from low_precision.wrap import quantize_model, quantize_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

# The two calls


def test_they_are_what_a_training_run_does():
    model = small("mlp")
    low = LowPrecision(model, Scheme(rules(SITES, "float8", "stochastic") | {"accumulator": rule("float16")}, seed=1))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.1, 0.9), 8)
    losses = train(model, optimizer, range(4))
    plain = small("mlp")
    theirs = torch.optim.SGD(plain.parameters(), 0.1, 0.9)
    assert rounded(plain, "weights", *AROUND, accumulator="float16:nearest") is plain
    assert quantize_optimizer(theirs, plain, gradients="float8", momentum="float8", loss_scale=8) is theirs
    assert equal(train(plain, theirs, range(4)), losses)
    assert equal(parameters(plain), parameters(model))
    assert str(plain) == str(model)


@pytest.mark.parametrize(
    "spec", ["float8_e4m3fn:up", NAMED["float8_e4m3fn"], Rule(NAMED["float8_e4m3fn"], Rounding.UP), "float8_e4m3fn"]
)
def test_a_site_is_a_text_a_format_or_a_rule(spec):
    model = quantize_model(nn.Linear(4, 4), activations=spec, rounding="up")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantize_optimizer(optimizer, model, gradients="float8", momentum="float16:nearest")  # the model's rounding
    assert "(activations=float8_e4m3fn:up, gradients=float8:up, momentum=float16:nearest)" in str(model)


def test_without_a_site_the_model_is_the_plain_one():
    model, plain = quantize_model(small("mlp")), small("mlp")
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1, 0.9), model)
    low = LowPrecision(plain, Scheme({}))
    losses = train(plain, low.attach(torch.optim.SGD(plain.parameters(), 0.1, 0.9)), range(2))
    assert equal(train(model, optimizer, range(2)), losses)
    assert equal(parameters(model), parameters(plain))
    assert "rounding" not in str(model)


def test_the_optimizers_sites_are_shown_where_they_are():
    model = quantize_model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), activations="float8")
    assert str(model).count("LayerRounding") == 1
    quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, gradients="float16")
    shown = [line.strip() for line in str(model).splitlines() if "LayerRounding" in line]
    assert shown == [
        "(rounding): LayerRounding(activations=float8:nearest, gradients=float16:nearest)",
        "(rounding): LayerRounding(gradients=float16:nearest)",
    ]


def test_bad_arguments_are_named():
    def optimizer(model):
        return torch.optim.SGD(model.parameters(), 0.1)

    for settings, message in [
        ({"weights": "float9"}, r"^weights: format: given float9 \(did you mean float8\?\), allowed: float32"),
        ({"errors": "float8:nerest"}, r"^errors: rounding: given nerest \(did you mean nearest\?\), allowed: nearest"),
        ({"inputs": "float8:"}, "^inputs: rounding: given '', allowed: nearest"),
        ({"activations": "float8", "overflow": "infinity"}, "activations: float8 has no infinity"),
        ({"seed": 1.5}, "^seed: given 1.5, allowed: a whole number >= 0"),
        ({"seed": -1}, "^seed: given -1"),
        ({"backend": "fast"}, "^backend: given 'fast', allowed: auto, eager"),
        ({"rounding": "nerest"}, r"^rounding: given nerest \(did you mean nearest\?\)"),
        ({"layers": ["hiden1"]}, "hiden1.*hidden1"),
    ]:
        model = small("mlp")
        with pytest.raises(ValueError, match=message):
            quantize_model(model, **settings)
        assert not any(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    with pytest.raises(TypeError, match="weights: given 8"):
        quantize_model(small("mlp"), weights=8)
    with pytest.raises(ValueError, match="not rounded: call quantize_model"):
        quantize_optimizer(optimizer(model), model)
    model = quantize_model(small("mlp"), weights="float8")
    with pytest.raises(ValueError, match="rounded already"):
        quantize_model(model, activations="float8")
    with pytest.raises(ValueError, match="no parameter of this model"):
        quantize_optimizer(optimizer(small("mlp")), model)
    with pytest.raises(ValueError, match=r"^gradients: format: given float9"):
        quantize_optimizer(optimizer(model), model, gradients="float9")
    with pytest.raises(ValueError, match="LBFGS"):
        quantize_optimizer(torch.optim.LBFGS(model.parameters()), model, momentum="float8")
    theirs = quantize_optimizer(optimizer(model), model)
    with pytest.raises(ValueError, match="rounds already"):
        quantize_optimizer(theirs, model, gradients="float8")
    other = nn.Linear(2, 2)
    other.low_precision = True
    with pytest.raises(ValueError, match="low_precision of its own"):
        quantize_model(other, weights="float8")


def test_the_example_runs_anywhere_and_shows_what_it_says(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(ROOT / "examples" / "plain_script.py")]
    ran = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    errors = [float(line.split()[-1]) for line in ran.stdout.splitlines()]
    float32, to_nearest, stochastic, accumulator = errors
    assert float32 < stochastic < to_nearest / 5
    assert float32 < accumulator < to_nearest / 5
    assert not list(tmp_path.iterdir())


# Autograd


def test_the_gradient_is_rounded_by_the_backward_format():
    x = torch.tensor([0.3, 5.0], requires_grad=True)
    gradient = torch.tensor([1.1, 3.4])
    y = quantize(x, "float16", backward="e4m1")
    y.backward(gradient)
    assert torch.equal(y.detach(), nearest(x, FLOAT16))
    assert torch.equal(x.grad, torch.tensor([1.0, 3.0]))
    x.grad = None
    quantize(x, "float32", "up", backward="e4m1").backward(gradient)  # by the same rounding, where it names none
    assert torch.equal(x.grad, torch.tensor([1.5, 4.0]))
    x.grad = None
    quantize(x, "float8", "up", backward="e4m1:nearest").backward(gradient)
    assert torch.equal(x.grad, torch.tensor([1.0, 3.0]))


def test_the_gradients_noise_is_its_own_and_the_keys():
    n = 4096
    x = torch.full((n,), 1.125, requires_grad=True)  # halfway between two values of float8
    met = []
    for key in (7, 7, 8):
        x.grad = None
        y = quantize(x, "float8", "stochastic", key, backward="float8")
        y.backward(x.detach())
        met += [y.detach(), x.grad]
    assert equal(met[:2], met[2:4])
    assert set(met[1].tolist()) == {1.0, 1.25}
    for a, b in [(0, 1), (1, 5)]:
        assert abs((met[a] == met[b]).sum().item() - n / 2) < 5 * (n / 4) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backward": "float8:stochastic"}, "gradient needs a key"),
        ({"format": "fp16", "backward": "float8", "overflow": "infinity"}, "backward: float8 has no infinity"),
        ({"backward": "float9"}, "float9"),
    ],
)
def test_a_bad_backward_format_is_named_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(2), **{"format": "float8"} | settings)


def test_a_gradients_gradient_passes_straight_through():
    """As a gradient penalty needs it."""
    model = rounded(nn.Linear(3, 1, bias=False), "errors", rounding="nearest", fmt="e4m1")
    x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.1, 2.9, 0.5]]))
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert torch.equal(gradient, torch.tensor([[1.0, 3.0, 0.5]]))
    gradient.square().sum().backward()
    assert torch.equal(model.weight.grad, torch.tensor([[2.0, 6.0, 1.0]]))
    y = quantize(x, "float8")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(gradient.sum(), x)[0], torch.full((1, 3), 2.0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_modes_give_the_bits_of_training(mode):
    (a, _), (b, _) = everything(), everything()
    x, _ = batch("mlp")
    with mode():
        quiet = a(x)
    assert torch.equal(quiet.clone(), b(x).detach())
    assert not quiet.requires_grad
    assert torch.equal(a(x), b(x))  # and then both train on


def test_a_model_rounded_in_inference_mode_trains():
    model, reference = small("mlp"), everything()
    with torch.inference_mode():
        model = rounded(model, "weights", *AROUND, accumulator="float16")
    optimizer = rounded_sgd(model)
    assert equal(train(model, optimizer, range(2)), train(*reference, range(2)))
    assert equal(parameters(model), parameters(reference[0]))


# torch.compile


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("what", "kind"),
    [("model", "mlp"), ("model", "cnn"), ("in place", "mlp"), ("whole step", "mlp"), ("before", "mlp")],
)
def test_compiled_models_have_the_bits_of_uncompiled_ones(backend, what, kind):
    torch.compiler.reset()
    reference, theirs = everything(small(kind), loss_scale="dynamic")
    model = small(kind)
    if what == "before":  # compiled, and run, when rounding comes
        forward = torch.compile(model, backend=backend)
        forward(batch(kind)[0])
        _, optimizer = everything(forward, loss_scale="dynamic")
    else:
        _, optimizer = everything(model, loss_scale="dynamic")
        forward = torch.compile(model, backend=backend) if what == "model" else model
        if what == "in place":
            model.compile(backend=backend)

    def run(step: int) -> list[torch.Tensor]:
        return train(model, optimizer, [step], kind, forward)

    if what == "whole step":
        run = torch.compile(run, backend=backend)
    for step in range(3):
        assert equal(run(step), train(reference, theirs, [step], kind=kind))
        x, _ = batch(kind)
        with torch.no_grad():  # the training mode is another graph, the step another noise
            assert torch.equal(forward.eval()(x), reference.eval()(x))
        forward.train(), reference.train()
    assert equal(parameters(model), parameters(reference))


def test_compiled_noise_changes_from_call_to_call_and_nothing_is_compiled_anew_for_it():
    torch.compiler.reset()
    model = rounded(nn.Linear(64, 64), "activations", "errors", "weights")
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), 0.0), model)
    graphs, counts, met = [], [], []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(6):
        x = torch.ones(8, 64, requires_grad=True)
        for _ in range(2):
            y = compiled(x)
            x.grad = None
            y.backward(torch.full_like(y, 0.3))
            met += [y.detach(), x.grad]
        optimizer.step()
        counts.append(len(graphs))
    assert all(holds(y, FLOAT8) for y in met)
    assert not any(torch.equal(a, b) for i, a in enumerate(met) for b in met[:i])
    assert counts[0] > 0
    assert counts[-1] == counts[0]


def test_quantize_in_a_compiled_function_takes_the_key_that_it_is_given():
    torch.compiler.reset()
    graphs, counts = [], []

    @torch.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    def function(x: torch.Tensor, key: int) -> torch.Tensor:
        return quantize(x * 2, "float8", "stochastic", key, backward="float8") * 2

    x = torch.randn(64, requires_grad=True)
    for key in [*range(6), 2**63, 2**64 - 1]:
        expected = quantize(x * 2, "float8", "stochastic", key, backward="float8") * 2
        got = function(x, key)
        assert torch.equal(got, expected)
        gradients = [torch.autograd.grad(y, x, torch.full_like(y, 0.3))[0] for y in (got, expected)]
        assert torch.equal(*gradients)
        counts.append(len(graphs))
    assert counts[-1] == counts[1]  # compiled for one number, then for any


def test_a_second_backward_pass_has_noise_of_its_own():
    x = torch.randn(1000, requires_grad=True)
    y = quantize(x, "float8", "stochastic", 3, backward="float8:stochastic")
    constant = torch.full_like(y, 1.1)
    first, second = (torch.autograd.grad(y, x, constant, retain_graph=True)[0] for _ in range(2))
    assert equal([first], [quantize(constant, "float8", "stochastic", Key.of(3, "backward"))])
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.15
