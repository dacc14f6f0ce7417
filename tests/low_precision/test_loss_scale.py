"""Loss scaling: it is divided out, finds what overflows, skips that step, and grows again."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_helpers import (
    FLOAT8,
    OPTIMIZERS,
    SITES,
    batch,
    equal,
    optimizer_state,
    parameters,
    rounded_mlp,
    rule,
    rules,
    set_gradients,
    train,
    two_layers,
)

from low_precision.loss_scale import LossScale
from low_precision.model import LowPrecision
from low_precision.rules import ALL_SITES
from low_precision.scheme import Scheme
from low_precision.wrap import quantize_model, quantize_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_scale_of_a_power_of_two_changes_no_bit(name):
    """Where nothing underflows: the division brings back every gradient."""
    made = []
    for scale in (1.0, 1024.0, 2.0**-5, "dynamic"):
        model, optimizer = rounded_mlp(rules(["weights", "activations", "momentum"], "e8m5"), OPTIMIZERS[name], scale)
        train(model, optimizer, range(4))
        made.append(parameters(model))
    assert all(equal(made[0], other) for other in made[1:])


def test_a_scale_of_1000_is_divided_out():
    met = []
    for scale in (1, 1000):
        model, optimizer = rounded_mlp({}, scale=scale)
        optimizer.register_step_pre_hook(lambda o, args, kwargs, model=model: met.append([*model.parameters()]))
        x, y = batch("mlp")
        optimizer.loss_scale.scale(F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    for one, thousand in zip(*met, strict=True):
        # A sum of at most 64 products in each of 3 layers: relative to the largest, 2 * 64 * 3 roundings of 2**-24.
        assert (one.grad - thousand.grad).abs().max() <= 2 * 64 * 3 * 2.0**-24 * one.grad.abs().max()


def test_a_scale_lifts_errors_above_the_smallest_value():
    x = torch.ones(4, 1)
    met = {}
    for scale in (1, 2.0**20):
        model = nn.Linear(1, 1)
        low = LowPrecision(model, Scheme(rules(["errors", "gradients"])))
        optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.0), scale)
        optimizer.loss_scale.scale(model(x).sum() * 2.0**-20).backward()
        optimizer.step()
        met[scale] = model.bias.grad.item()
    assert met == {1: 0.0, 2.0**20: 4 * 2.0**-20}


@pytest.mark.parametrize("bad", [INFINITY, -INFINITY, NAN, 1.01 * FLOAT8.largest])
@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("accumulator", [None, "float32"])
def test_dynamic_a_bad_gradient_halves_and_skips(bad, name, accumulator):
    scheme = rules(ALL_SITES, "float8", "stochastic") | ({"accumulator": rule(accumulator)} if accumulator else {})
    model, optimizer = rounded_mlp(scheme, OPTIMIZERS[name], "dynamic")
    train(model, optimizer, range(6))  # until the scale fits
    skipped, value = optimizer.loss_scale.skipped, optimizer.loss_scale.value
    before, held = parameters(model), optimizer_state(optimizer)
    assert value == 65536 / 2**skipped
    set_gradients(model, 0.0)
    model.hidden2.weight.grad[3, 2] = bad
    optimizer.step()
    assert (optimizer.loss_scale.skipped, optimizer.loss_scale.value) == (skipped + 1, value / 2)
    assert equal(parameters(model), before)
    assert equal(optimizer_state(optimizer), held)
    set_gradients(model, FLOAT8.largest / 4)  # large, but there
    optimizer.step()
    assert (optimizer.loss_scale.skipped, optimizer.loss_scale.value) == (skipped + 1, value / 2)
    assert not equal(parameters(model), before)


@pytest.mark.parametrize("bad", [INFINITY, NAN, 1e30])
def test_dynamic_errors_that_saturate_are_found(bad):
    """The gradients are finite there: the saturated errors hide it."""
    model, optimizer = rounded_mlp(rules(["errors"]), scale="dynamic")
    before = parameters(model)
    optimizer.loss_scale.scale((model(batch("mlp")[0]) * (bad / 65536)).sum()).backward()
    optimizer.step()
    assert (optimizer.loss_scale.value, optimizer.loss_scale.skipped) == (32768, 1)
    assert equal(parameters(model), before)
    optimizer.zero_grad()
    optimizer.loss_scale.scale(model(batch("mlp")[0]).sum() / 65536).backward()  # the next step does not suffer for it
    optimizer.step()
    assert (optimizer.loss_scale.value, optimizer.loss_scale.skipped) == (32768, 1)
    assert not equal(parameters(model), before)


def test_dynamic_without_rounding_looks_for_what_is_not_finite():
    model, optimizer = rounded_mlp({}, scale="dynamic")
    before = parameters(model)
    set_gradients(model, 1e38)
    model.output.bias.grad[0] = NAN
    optimizer.step()
    assert optimizer.loss_scale.skipped == 1
    assert equal(parameters(model), before)


def test_dynamic_skips_a_closures_step_too():
    model, optimizer = rounded_mlp(rules(["weights"]), scale="dynamic")
    before = parameters(model)

    def closure():
        set_gradients(model, NAN)
        return torch.tensor(1.0)

    assert optimizer.step(closure).item() == 1.0
    assert optimizer.loss_scale.skipped == 1
    assert equal(parameters(model), before)


def test_dynamic_grows_after_2000_clean_steps():
    model = nn.Linear(1, 1)
    low = LowPrecision(model, Scheme({}))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.0), "dynamic")
    values = []
    for step in range(4100):
        set_gradients(model, NAN if step == 50 else 1.0)
        optimizer.step()
        values.append(optimizer.loss_scale.value)
    changes = [(i, v) for i, v in enumerate(values) if i and v != values[i - 1]]
    assert values[0] == 65536
    assert changes == [(50, 32768), (2050, 65536), (4050, 131072)]


@pytest.mark.parametrize("scale", [0, -1.0, NAN, INFINITY, "dynamic ", None])
def test_impossible_scales_are_refused(scale):
    with pytest.raises(ValueError, match=r"loss scale.*dynamic"):
        LossScale(scale)


def test_a_diverged_run_looks_diverged():
    """With a fixed scale nothing is skipped, and NaN stays NaN through every site."""
    model, optimizer = rounded_mlp(rules(SITES))
    x, y = batch("mlp")
    optimizer.loss_scale.scale(F.cross_entropy(model(x), y) * NAN).backward()
    optimizer.step()
    assert all(p.isnan().any() for p in model.parameters())
    assert math.isnan(F.cross_entropy(model(x), y).item())


# Whose pass it is


SCALES = [1.0, 1024.0, "dynamic"]
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
    optimizer.loss_scale.scale(loss_of(model) * factor).backward()


@pytest.mark.parametrize("generators", SCALES)
@pytest.mark.parametrize("discriminators", SCALES)
@pytest.mark.parametrize("generator_first", [True, False])
def test_the_two_models_of_a_gan(generators, discriminators, generator_first):
    """No optimizer pays for the other's overflows, and neither's gradients are the other's."""
    torch.manual_seed(0)
    generator = nn.Linear(4, 8)
    discriminator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizers = []
    for model, scale in ((generator, generators), (discriminator, discriminators)):
        quantize_model(model, errors="float8_e4m3fn")
        optimizers.append(quantize_optimizer(torch.optim.SGD(model.parameters(), 1e-3), model, loss_scale=scale))
    for _ in range(10):
        fake = generator(torch.randn(64, 4))
        made = [lambda f=fake: -discriminator(f).mean(), lambda f=fake: discriminator(f.detach()).mean()]
        steps = [*zip(optimizers, made, strict=True)]
        for optimizer, loss in steps if generator_first else reversed(steps):
            optimizer.zero_grad()
            optimizer.loss_scale.scale(loss()).backward()
            optimizer.step()
    # Errors of a mean of 64 are 1/64 at the output: at 65536 / 4 they are 256, which the format reaches.
    assert [o.loss_scale.skipped for o in optimizers] == [2 * (s == "dynamic") for s in (generators, discriminators)]


@pytest.mark.parametrize("going_back", ["dynamic", "stepping"])
def test_threads_keep_their_overflows(going_back):
    """In the middle of one backward pass another thread overflows without a scale, or takes a step."""
    model, optimizer = two_layers("dynamic")
    other, other_optimizer = two_layers("dynamic" if going_back == "stepping" else 1.0, seed=2)
    if going_back == "stepping":
        backward(other, other_optimizer, 1e-3)
    does = other_optimizer.step if going_back == "stepping" else (other(X) * 1e30).sum().backward

    def meanwhile(gradient: torch.Tensor) -> None:
        thread = threading.Thread(target=does)
        thread.start()
        thread.join()

    y = model(X)
    # The overflow of the error comes after what the other thread does, and the gradients stay finite.
    y = y * (1e30 if going_back == "stepping" else 1e-6)
    y.register_hook(meanwhile)
    optimizer.loss_scale.scale(y.sum()).backward()
    optimizer.step()
    assert optimizer.loss_scale.skipped == (going_back == "stepping")
    assert other_optimizer.loss_scale.skipped == 0


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ZeroDivisionError


def test_a_backward_pass_that_fails_ends():
    """What comes after it is not taken for a part of it."""
    model, optimizer = two_layers("dynamic")
    with pytest.raises(ZeroDivisionError):
        optimizer.loss_scale.scale(Fails.apply(model(X)).sum()).backward()
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="not scaled"):
        optimizer.step()
    optimizer.zero_grad()
    backward(model, optimizer, 1e-3)
    optimizer.step()
    assert optimizer.loss_scale.skipped == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_overflows_in_a_checkpointed_part(reentrant):
    """Activation checkpointing goes back in a pass within the pass."""
    for factor, skipped in ((1e30, 1), (1e-6, 0)):
        model, optimizer = two_layers("dynamic")
        y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)
        optimizer.loss_scale.scale((y * factor).sum()).backward()
        optimizer.step()
        assert optimizer.loss_scale.skipped == skipped


@pytest.mark.parametrize("scale", [1024.0, "dynamic"])
@pytest.mark.parametrize("what", ["penalty", "two losses", "added"])
def test_the_scale_makes_no_difference(what, scale):
    """To a gradient penalty, to losses that go back together, to losses that are added up."""
    met = []
    for used in (1.0, scale):
        model, optimizer = two_layers(used, errors=None)
        scaled = optimizer.loss_scale.scale
        if what == "penalty":
            x = X.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(scaled(model(x).sum()), x, create_graph=True)
            penalty = (gradient / optimizer.loss_scale.value).norm(dim=1).sub(1).square().mean()
            scaled(loss_of(model) + penalty).backward()
        elif what == "two losses":
            torch.autograd.backward([scaled(loss_of(model)), scaled(model(X + 1).mean())])
        else:
            scaled(loss_of(model)).backward()
            scaled(model(X + 1).mean()).backward()
        optimizer.step()
        met.append(parameters(model))
    assert equal(*met)  # powers of two
