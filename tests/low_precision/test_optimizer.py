"""The optimizers of torch with rounding around them: steps, closures, checkpoints."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from training_helpers import (
    FLOAT8,
    OPTIMIZERS,
    SITES,
    batch,
    equal,
    holds,
    nearest,
    optimizer_state,
    parameters,
    rounded_mlp,
    rule,
    rules,
    set_gradients,
    sgd,
    small,
    train,
)

from low_precision.formats import format_named
from low_precision.model import LowPrecision
from low_precision.optimizer import EXTRA_STATE
from low_precision.rules import ALL_SITES
from low_precision.scheme import Scheme

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INFINITY = float("nan"), float("inf")
# Wide enough that Adam's second moments do not become zero.
FINE = dict.fromkeys(("weights", "gradients", "momentum"), rule("e8m5"))


@pytest.mark.parametrize("accumulator", [None, "float32", "e8m9"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_equal_a_plain_one_with_the_roundings_written_out(name, accumulator):
    scheme = FINE | ({"accumulator": rule(accumulator)} if accumulator else {})
    model, optimizer = rounded_mlp(scheme, OPTIMIZERS[name])
    train(model, optimizer, range(5))

    plain, weights = small("mlp"), format_named("e8m5")
    reference = OPTIMIZERS[name](plain.parameters())
    masters = {p: p.detach().clone() for p in plain.parameters()}
    for step in range(-1, 5):
        if step >= 0:
            x, y = batch("mlp", step)
            reference.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            for p in plain.parameters():
                p.grad = nearest(p.grad, weights)
                p.data.copy_(masters[p] if accumulator else p)
            reference.step()
        for p in plain.parameters():
            for key, value in reference.state[p].items():
                if key not in ("step", "mu_product") and value is not None:
                    value.copy_(nearest(value, weights))
            fine = format_named(accumulator) if accumulator else weights
            masters[p] = p.detach().clone() if accumulator == "float32" else nearest(p, fine)
            p.data.copy_(nearest(masters[p], weights))
    assert equal(parameters(model), parameters(plain))
    assert equal(optimizer_state(optimizer), optimizer_state(reference))
    assert not equal(parameters(model), [nearest(p, weights) for p in small("mlp").parameters()])


def test_parameter_groups_and_a_group_added_later():
    def run(rounded: bool):
        model = small("mlp")
        optimizer = torch.optim.SGD([{"params": model.hidden1.parameters(), "lr": 0.5}], lr=0.1, momentum=0.9)
        low = LowPrecision(model, Scheme(rules(ALL_SITES) if rounded else {}))
        low.attach(optimizer)
        optimizer.add_param_group({"params": model.output.parameters(), "weight_decay": 0.1})
        before = parameters(model.hidden2)
        train(model, optimizer, range(3))
        assert equal(parameters(model.hidden2), before)  # in no group
        return model, optimizer

    model, optimizer = run(True)
    assert all(holds(p, FLOAT8) for p in model.parameters())
    assert all(holds(buffer, FLOAT8) for buffer in optimizer_state(optimizer))
    assert len(optimizer_state(optimizer)) == 4
    assert not equal(parameters(model.output), [nearest(p, FLOAT8) for p in parameters(run(False)[0].output)])


@pytest.mark.parametrize("name", ["momentum", "adamw", "foreach"])
def test_frozen_and_unused_parameters_do_not_move(name):
    """Nor do they flicker, where a stochastic rounding of the accumulator could come out otherwise."""
    model = small("mlp")
    model.hidden1.requires_grad_(False)
    model.unused = nn.Linear(5, 5)
    nn.Sequential.forward = nn.Sequential.forward
    model.forward = lambda x: model.output(F.relu(model.hidden2(F.relu(model.hidden1(x)))))
    scheme = rules(ALL_SITES, "float8", "stochastic") | {"accumulator": rule("float32")}
    low = LowPrecision(model, Scheme(scheme, seed=1))
    optimizer = low.attach(OPTIMIZERS[name](model.parameters()))
    still, moving = [model.hidden1, model.unused], [model.hidden2, model.output]
    before = [[parameters(layer) for layer in layers] for layers in (still, moving)]
    train(model, optimizer, range(3))
    assert all(equal(parameters(layer), then) for layer, then in zip(still, before[0], strict=True))
    assert not any(equal(parameters(layer), then) for layer, then in zip(moving, before[1], strict=True))


def test_parameters_of_others_stay_in_float32():
    """A learnable temperature beside the model: the loss scale is divided out of its gradient, nothing is rounded."""
    model, outside = small("mlp"), torch.tensor(0.3, requires_grad=True)
    low = LowPrecision(model, Scheme(rules(ALL_SITES)))
    optimizer = low.attach(torch.optim.SGD([*model.parameters(), outside], 0.1), 8)
    optimizer.loss_scale.scale(outside * 0.7).backward()
    optimizer.step()
    assert outside.item() == (torch.tensor(0.3) - torch.tensor(0.1) * torch.tensor(0.7)).item()


# Closures


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_called_and_its_loss_returned(by_name):
    model, optimizer = rounded_mlp(rules(SITES, "float8", "stochastic"), scale=16)
    twin, twin_optimizer = rounded_mlp(rules(SITES, "float8", "stochastic"), scale=16)
    losses = train(twin, twin_optimizer, range(3))
    for step in range(3):
        x, y = batch("mlp", step)
        calls = []

        def closure(x=x, y=y, calls=calls):
            calls.append(parameters(model))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            optimizer.loss_scale.scale(loss).backward()
            return loss

        returned = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert torch.equal(returned, losses[step])
        assert len(calls) == 1
        assert all(holds(p, FLOAT8) for p in calls[0])
    assert equal(parameters(model), parameters(twin))


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("accumulator", [{}, {"accumulator": rule("float32")}])
def test_lbfgs_evaluates_at_rounded_weights_and_converges(search, accumulator):
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    model = nn.Linear(4, 1)
    low = LowPrecision(model, Scheme(rules(["weights", "gradients"], "bfloat16") | accumulator))
    optimizer = low.attach(torch.optim.LBFGS(model.parameters(), line_search_fn=search, max_iter=6))
    met = []

    def closure():
        assert all(holds(p, format_named("bfloat16")) for p in model.parameters())
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        met.append(loss.item())
        return loss

    for _ in range(3):
        assert isinstance(optimizer.step(closure), torch.Tensor)
    assert len(met) > 3
    assert all(holds(p, format_named("bfloat16")) for p in model.parameters())
    assert F.mse_loss(model(x), y).item() < 1e-3 * met[0]


def test_an_error_in_a_closure_loses_nothing():
    model, optimizer = rounded_mlp(rules(["weights"]) | {"accumulator": rule("float32")})
    before = parameters(model)

    def closure():
        raise KeyError("data")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert equal(parameters(model), before)


def test_schedulers_reach_the_step():
    model, optimizer = rounded_mlp(rules(SITES, "bfloat16"))
    schedule = CosineAnnealingLR(optimizer, 2)
    train(model, optimizer, [0])
    for _ in range(2):
        schedule.step()  # the learning rate is zero now, and so is every move
    before = parameters(model)
    train(model, optimizer, [1])
    assert equal(parameters(model), before)


# Checkpoints

EVERYTHING = rules(ALL_SITES, "float8", "stochastic") | {"accumulator": rule("float16", "stochastic")}


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("kind", ["sgd", "amsgrad"])
@pytest.mark.parametrize("accumulator", [None, "float16", "float32"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "after a skipped step"])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(order, kind, accumulator, skip):
    scheme = rules(ALL_SITES, "float8", "stochastic")
    if kind == "amsgrad":  # in float8 its second moments become 0, and the steps by them overflow
        scheme["momentum"] = rule("float16", "stochastic")
    if accumulator:
        scheme["accumulator"] = rule(accumulator, "stochastic")

    def begin():
        return rounded_mlp(scheme, sgd if kind == "sgd" else OPTIMIZERS[kind], "dynamic")

    def half(model, optimizer) -> None:
        train(model, optimizer, range(3))
        if skip:
            set_gradients(model, INFINITY)
            optimizer.step()

    straight = begin()
    half(*straight)
    losses = train(*straight, range(3, 6))

    first = begin()
    half(*first)
    file = io.BytesIO()
    torch.save({"model": first[0].state_dict(), "optimizer": first[1].state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer = begin()
    train(model, optimizer, [77])  # somewhere else altogether
    if order == "model first":
        model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if order == "optimizer first":
        model.load_state_dict(saved["model"])
    assert equal(parameters(model), parameters(first[0]))
    assert equal(losses, train(model, optimizer, range(3, 6)))
    assert equal(parameters(model), parameters(straight[0]))
    assert equal(optimizer_state(optimizer), optimizer_state(straight[1]))
    assert optimizer.loss_scale.state_dict() == straight[1].loss_scale.state_dict()
    assert optimizer.loss_scale.skipped == skip


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_going_back_in_the_same_process(order):
    """After a forward pass whose step never came."""
    model, optimizer = rounded_mlp(EVERYTHING)
    train(model, optimizer, range(2))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    losses = train(model, optimizer, range(2, 4))
    after = parameters(model)
    for forward_passes in (0, 1):
        for part in [model, optimizer] if order == "model first" else [optimizer, model]:
            part.load_state_dict(copy.deepcopy(saved[part is optimizer]))
        if forward_passes:
            model(batch("mlp")[0])
            optimizer.load_state_dict(copy.deepcopy(saved[1]))
        assert equal(losses, train(model, optimizer, range(2, 4)))
        assert equal(parameters(model), after)


def test_loaded_weights_are_not_overwritten_by_the_accumulator():
    model, optimizer = rounded_mlp(rules(["weights"]) | {"accumulator": rule("float32")})
    train(model, optimizer, range(3))
    plain = small("cnn").output  # any numbers
    torch.manual_seed(11)
    loaded = {name: torch.randn_like(p) for name, p in model.state_dict().items()}
    model.load_state_dict(loaded)
    assert equal(parameters(model), [nearest(p, FLOAT8) for p in loaded.values()])
    set_gradients(model, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert equal(parameters(model), [nearest(p, FLOAT8) for p in loaded.values()])
    assert plain is not None


@pytest.mark.parametrize("accumulator", [{}, {"accumulator": rule("float32")}])
def test_weights_written_in_place_are_taken_over(accumulator):
    model, optimizer = rounded_mlp(rules(["weights"]) | accumulator, lambda p: torch.optim.SGD(p, 0.0))
    with torch.no_grad():
        model.output.weight.fill_(0.3)
        model.output.bias.clamp_(0.4, 0.4)
    train(model, optimizer, [0])
    assert torch.equal(model.output.weight, torch.full((3, 8), 0.3125))
    assert torch.equal(model.output.bias, torch.full((3,), 0.375))


def test_a_plain_optimizers_state_is_taken_and_rounded():
    plain = small("mlp")
    theirs = sgd(plain.parameters())
    train(plain, theirs, range(2))
    model, optimizer = rounded_mlp(EVERYTHING)
    model.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(theirs.state_dict())
    buffers = optimizer_state(optimizer)
    assert all(holds(buffer, FLOAT8) for buffer in buffers)
    assert not any(bool((buffer == 0).all()) for buffer in buffers)
    train(model, optimizer, range(2))


def test_a_checkpoint_without_accumulator_starts_one_from_its_weights():
    model, optimizer = rounded_mlp(rules(["weights", "momentum"]))
    train(model, optimizer, range(2))
    later, later_optimizer = rounded_mlp(rules(["weights", "momentum"]) | {"accumulator": rule("float32")})
    later_optimizer.load_state_dict(optimizer.state_dict())
    later.load_state_dict(model.state_dict())
    assert equal(parameters(later), parameters(model))
    masters = later_optimizer.state_dict()[EXTRA_STATE]["accumulator"]
    assert equal([masters[name] for name, _ in later.named_parameters()], parameters(model))
    train(later, later_optimizer, range(2))


def test_the_learning_rate_can_be_changed_after_loading():
    model, optimizer = rounded_mlp(EVERYTHING)
    train(model, optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    fixed = [p.clone() for p in optimizer.state_dict()[EXTRA_STATE]["accumulator"].values()]
    train(model, optimizer, [2])
    assert equal(list(optimizer.state_dict()[EXTRA_STATE]["accumulator"].values()), fixed)
