"""Loss scaling: it is divided out, finds what overflows, skips that step, and grows again."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
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
)

from low_precision.loss_scale import LossScale
from low_precision.model import LowPrecision
from low_precision.rules import ALL_SITES
from low_precision.scheme import Scheme

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
    (model(batch("mlp")[0]) * bad).sum().backward()
    optimizer.step()
    assert (optimizer.loss_scale.value, optimizer.loss_scale.skipped) == (32768, 1)
    assert equal(parameters(model), before)
    optimizer.zero_grad()
    model(batch("mlp")[0]).sum().backward()  # the next step does not suffer for it
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
