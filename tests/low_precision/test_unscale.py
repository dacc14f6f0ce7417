"""`loss_scale.unscale`, and errors for what was forgotten: scale, the last pass, torch's GradScaler taken away."""

import copy
import io

import pytest
import torch
from torch import nn
from training_helpers import equal, parameters, two_layers

from low_precision.wrap import quantize_model, quantize_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INFINITY = float("nan"), float("inf")
SCALES = [1.0, 1024.0, "dynamic"]
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
FORGOTTEN, PARTLY = r"step: the gradients come from a loss that was not scaled", r"step: the gradient of .* in part"
AFTER_UNSCALE, UNSCALED = r"step: a backward pass came after loss_scale\.unscale", r"unscale: it was called already"


def two_optimizers(*scales: float | str) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    """The layers of one model, each with an optimizer."""
    torch.manual_seed(0)
    model = quantize_model(nn.ModuleList([nn.Linear(8, 1) for _ in scales]), errors="float8_e4m3fn")
    optimizers = [torch.optim.SGD(layer.parameters(), 0.1) for layer in model]
    for optimizer, scale in zip(optimizers, scales, strict=True):
        quantize_optimizer(optimizer, model, loss_scale=scale)
    return list(zip(model, optimizers, strict=True))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(X).square().mean()


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, factor: float = 1.0) -> None:
    optimizer.loss_scale.scale(loss_of(model) * factor).backward()


# What was forgotten


@pytest.mark.parametrize("scale", [1024.0, "dynamic"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_forgotten_scale(scale, set_to_none):
    model, optimizer = two_layers(scale)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        backward(model, optimizer, 1e-3)
        optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=FORGOTTEN) as raised:
        optimizer.step()
    assert "\n" not in str(raised.value)
    optimizer.zero_grad(set_to_none=set_to_none)  # and the next one is right again
    backward(model, optimizer, 1e-3)
    optimizer.step()


@pytest.mark.parametrize("forgotten", [0, 1, 2])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
def test_a_scale_that_one_of_several_micro_batches_forgot(forgotten, set_to_none, unscale):
    model, optimizer = two_layers(1024.0)
    for forget in (None, forgotten):
        optimizer.zero_grad(set_to_none=set_to_none)
        for number in range(3):
            if number == forget:
                loss_of(model).backward()
            else:
                backward(model, optimizer)
        if forget is not None:
            with pytest.raises(RuntimeError, match=PARTLY):
                optimizer.loss_scale.unscale(optimizer) if unscale else optimizer.step()
        else:
            optimizer.step()


def test_a_scale_that_one_of_two_optimizers_forgot():
    """Which share their fixed scale."""
    (one, first), (two, second) = two_optimizers(1024.0, 1024.0)
    assert first.loss_scale is second.loss_scale
    loss_of(one).backward()
    backward(two, second)
    second.step()
    with pytest.raises(RuntimeError, match=f"{FORGOTTEN}|{PARTLY}"):
        first.step()


def test_a_loss_that_another_scale_has_scaled():
    (one, first), (two, second) = two_optimizers(8.0, 1024.0)
    second.loss_scale.scale(loss_of(one) + loss_of(two)).backward()
    second.step()
    with pytest.raises(RuntimeError, match=FORGOTTEN):
        first.step()


@pytest.mark.parametrize("cleared", [True, False])
def test_gradients_that_another_models_pass_left(cleared):
    """A generator's pass goes through the discriminator: its zero_grad comes before its own pass."""
    (one, first), (_, second) = two_optimizers(8.0, 1024.0)
    second.loss_scale.scale(loss_of(one)).backward()
    if cleared:
        first.zero_grad()
        backward(one, first)
        first.step()
    else:
        backward(one, first)
        with pytest.raises(RuntimeError, match=PARTLY):
            first.step()


def test_gradients_that_are_written_by_hand_afterwards():
    """They are whatever the script says that they are."""
    model, optimizer = two_layers(1024.0)
    backward(model, optimizer)
    loss_of(model).backward()
    before = parameters(model)
    for p in model.parameters():
        p.grad.fill_(1024.0)
    optimizer.step()
    torch.testing.assert_close(parameters(model), [p - 0.1 for p in before])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("unscale", [True, False])
def test_torchs_grad_scaler_is_refused(fused, scale, unscale):
    model, optimizer = two_layers(scale, make=lambda p: torch.optim.Adam(p, 0.01, fused=fused))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(optimizer.loss_scale.scale(loss_of(model))).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"GradScaler.*loss_scale=") as raised:
        scaler.step(optimizer)
    assert "\n" not in str(raised.value)
    optimizer.zero_grad()  # whoever takes it away can go on
    backward(model, optimizer, 1e-3)
    optimizer.step()


def test_torchs_grad_scaler_that_is_not_enabled_does_nothing():
    met = []
    for scaled in (False, True):
        model, optimizer = two_layers(8.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        loss = optimizer.loss_scale.scale(loss_of(model))
        (scaler.scale(loss) if scaled else loss).backward()
        if scaled:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        met.append(parameters(model))
    assert equal(*met)


@pytest.mark.parametrize("forget", [True, False])
def test_steps_within_the_backward_pass(forget):
    """One optimizer for each parameter, which steps as soon as its gradient is there."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    quantize_model(model, weights="float8", errors="float8", seed=1)
    optimizers = {}
    for p in model.parameters():
        optimizers[p] = quantize_optimizer(torch.optim.SGD([p], 0.1), model, gradients="float8", loss_scale=8.0)

    def step(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    before = parameters(model)
    scale = optimizers[model[0].weight].loss_scale
    for _ in range(2):
        scale.scale(loss_of(model)).backward()
    assert not equal(parameters(model), before)
    if forget:
        with pytest.raises(RuntimeError, match=FORGOTTEN):
            loss_of(model).backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: saved(pair)])
def test_a_copy_knows_what_was_forgotten_too(copied):
    model, optimizer = copied(two_layers("dynamic"))
    backward(model, optimizer, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=FORGOTTEN):
        optimizer.step()


def saved(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# unscale


def clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def add_noise(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad += 0.01


@pytest.mark.parametrize("change", [clip_norm, clip_value, add_noise])
@pytest.mark.parametrize("gradients", [None, "float16:stochastic"])
@pytest.mark.parametrize("scale", [2.0**-4, 1024.0, "dynamic"])
def test_what_changes_the_gradients_after_unscale(change, gradients, scale):
    """The step does not depend on the scale, a power of two, and what clipping makes is not rounded again."""
    met = []
    for used in (1.0, scale):
        torch.manual_seed(1)
        model = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), seed=1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        quantize_optimizer(optimizer, model, gradients=gradients, loss_scale=used)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, optimizer, 10.0)
            optimizer.loss_scale.unscale(optimizer)
            change(model)
            expected = [p.detach() - 0.1 * p.grad for p in model.parameters()]
            optimizer.step()
            torch.testing.assert_close(parameters(model), expected, rtol=1e-6, atol=1e-7)
        met.append(parameters(model))
    assert equal(*met)


def test_unscale_changes_no_bit_of_the_step():
    met = []
    for unscale in (False, True):
        model, optimizer = two_layers(1000.0)
        for _ in range(3):
            optimizer.zero_grad()
            backward(model, optimizer)
            if unscale:
                optimizer.loss_scale.unscale(optimizer)
            optimizer.step()
        met.append(parameters(model))
    assert equal(*met)


@pytest.mark.parametrize("bad", [INFINITY, NAN, 1e30])
def test_unscale_of_gradients_that_overflow(bad):
    """They are divided, so that clipping sees what it would, and the step is skipped."""
    model, optimizer = two_layers("dynamic")
    before = parameters(model)
    optimizer.loss_scale.scale((model(X) * bad).sum()).backward()
    optimizer.loss_scale.unscale(optimizer)
    clip_norm(model)
    optimizer.step()
    assert (optimizer.loss_scale.skipped, optimizer.loss_scale.value) == (1, 32768)
    assert equal(parameters(model), before)
    optimizer.zero_grad()
    backward(model, optimizer, 1e-3)
    optimizer.loss_scale.unscale(optimizer)
    optimizer.step()
    assert optimizer.loss_scale.skipped == 1
    assert not equal(parameters(model), before)


@pytest.mark.parametrize("scale", SCALES)
def test_unscale_is_called_once_and_last(scale):
    model, optimizer = two_layers(scale)
    backward(model, optimizer, 1e-3)
    optimizer.loss_scale.unscale(optimizer)
    with pytest.raises(RuntimeError, match=UNSCALED):
        optimizer.loss_scale.unscale(optimizer)
    backward(model, optimizer, 1e-3)
    with pytest.raises(RuntimeError, match=AFTER_UNSCALE):
        optimizer.step()


def test_a_pass_without_scale_after_unscale():
    model, optimizer = two_layers(8.0)
    backward(model, optimizer)
    optimizer.loss_scale.unscale(optimizer)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=AFTER_UNSCALE):
        optimizer.step()


def test_another_optimizers_pass_may_come_after_unscale():
    """Which shares the fixed scale, and has other parameters."""
    (one, first), (two, second) = two_optimizers(1024.0, 1024.0)
    backward(one, first)
    first.loss_scale.unscale(first)
    backward(two, second)
    second.loss_scale.unscale(second)
    first.step()
    second.step()


@pytest.mark.parametrize("unscale_next", [True, False])
def test_a_step_that_is_left_out_after_unscale(unscale_next):
    """As scripts do where the norm is not finite."""
    model, optimizer = two_layers(1024.0)
    other, expected = two_layers(1024.0)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, optimizer)
        if step == 1 or unscale_next:
            optimizer.loss_scale.unscale(optimizer)
        if step != 1:
            optimizer.step()
            expected.zero_grad()
            backward(other, expected)
            expected.step()
    assert equal(parameters(model), parameters(other))


def test_a_loaded_state_forgets_unscale():
    model, optimizer = two_layers(8.0)
    backward(model, optimizer)
    optimizer.loss_scale.unscale(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    backward(model, optimizer)
    optimizer.loss_scale.unscale(optimizer)
    optimizer.step()


def test_unscale_in_a_closure():
    """LBFGS asks for the gradients several times a step."""
    met = []
    for scale in (1.0, 1024.0):
        model, optimizer = two_layers(scale, errors=None, make=lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3))

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            backward(model, optimizer)
            optimizer.loss_scale.unscale(optimizer)
            clip_norm(model)
            return loss_of(model)

        for _ in range(2):
            optimizer.step(closure)
        met.append(parameters(model))
    assert equal(*met)


def test_unscale_is_the_loss_scales_of_that_optimizer():
    (model, first), (_, second) = two_optimizers(8.0, 16.0)
    for other in (second, torch.optim.SGD(model.parameters(), 0.1), None):
        with pytest.raises(ValueError, match=r"loss_scale\.unscale: given"):
            first.loss_scale.unscale(other)


@pytest.mark.parametrize("scale", [8.0, "dynamic"])
def test_sparse_gradients_are_unscaled(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(10, 8, sparse=True), nn.Linear(8, 1))
    quantize_model(model, weights="float16", layers=["1"])
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, loss_scale=scale)
    before = parameters(model)[0]
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.loss_scale.scale(model(torch.tensor([[1, 2, 3]])).sum()).backward()
        optimizer.loss_scale.unscale(optimizer)
        optimizer.step()
    moved = (model[0].weight - before).abs().amax(1)
    assert moved.ne(0).tolist() == [False, True, True, True, *[False] * 6]
    assert moved.max() < 0.1


@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_optimizers_of_all_kinds(flag):
    met = []
    for scale in (1.0, 1024.0, "dynamic"):
        model, optimizer = two_layers(scale, errors=None, make=lambda p: torch.optim.Adam(p, 0.01, **{flag: True}))
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, optimizer)
            optimizer.loss_scale.unscale(optimizer)
            clip_norm(model)
            optimizer.step()
        met.append(parameters(model))
    assert equal(met[0], met[1])
    assert equal(met[0], met[2])


def test_a_dynamic_scale_resumes():
    """In the middle of steps that overflow, from a state that torch loads as weights alone."""
    met = []
    for cut in (False, True):
        model, optimizer = two_layers("dynamic")
        for step in range(6):
            if cut and step == 3:
                file = io.BytesIO()
                torch.save([model.state_dict(), optimizer.state_dict()], file)
                file.seek(0)
                states = torch.load(file, weights_only=True)
                model, optimizer = two_layers("dynamic", seed=2)
                model.load_state_dict(states[0])
                optimizer.load_state_dict(states[1])
            optimizer.zero_grad()
            backward(model, optimizer, 1e5 if step in (1, 4) else 1e-3)
            optimizer.step()
        met.append([*parameters(model), torch.tensor([*optimizer.loss_scale.state_dict().values()])])
    assert equal(*met)
    assert met[0][-1][2] == 2  # skipped
