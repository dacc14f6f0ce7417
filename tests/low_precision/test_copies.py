"""Rounded models that are copied, pickled, replicated, changed on the way, and moved by other optimizers."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from training_helpers import (
    AROUND,
    FLOAT8,
    FLOAT16,
    batch,
    equal,
    everything,
    holds,
    parameters,
    rounded,
    rounded_sgd,
    rules,
    small,
    train,
)

from low_precision import layers
from low_precision.formats import format_named
from low_precision.loss_scale import OverflowWatch
from low_precision.optimizer import EXTRA_STATE
from low_precision.scheme import Scheme
from low_precision.wrap import quantize_model, quantize_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

# Copies


def copied(how: str, thing):
    if how == "deepcopy":
        return copy.deepcopy(thing)
    if how == "pickle":
        return pickle.loads(pickle.dumps(thing))
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


HOW = ["deepcopy", "pickle", "torch.save"]


@pytest.mark.parametrize("how", HOW)
def test_a_copy_trains_on_as_the_model_would_and_leaves_it_alone(how):
    """With an optimizer of its own: the copy's accumulator, clock, hooks and parameters are its own."""
    model, optimizer = everything()
    train(model, optimizer, range(3))
    twin = copied(how, model)
    theirs = rounded_sgd(twin)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = parameters(model)
    extra = copy.deepcopy(optimizer.state_dict()[EXTRA_STATE])
    losses = train(twin, theirs, range(3, 6))
    assert equal(parameters(model), before)
    assert model.low_precision.clock.step == extra["step"] == 3
    assert twin.low_precision.clock.step == 6
    now = optimizer.state_dict()[EXTRA_STATE]["accumulator"]
    assert equal(list(now.values()), list(extra["accumulator"].values()))
    after = parameters(twin)
    assert equal(train(model, optimizer, range(3, 6)), losses)
    assert equal(parameters(model), after)
    assert equal(parameters(twin), after)


@pytest.mark.parametrize("how", HOW)
def test_an_optimizer_copied_with_its_model_still_rounds(how):
    """A torch optimizer's copy has no hooks."""
    model, optimizer = everything(loss_scale=8)
    train(model, optimizer, range(2))
    twin, theirs = copied(how, (model, optimizer))
    assert theirs.param_groups[0]["params"][0] is next(twin.parameters())
    for _ in range(2):  # a copy's copy too
        twin, theirs = copied(how, (twin, theirs))
    assert equal(train(twin, theirs, range(2, 5)), train(model, optimizer, range(2, 5)))
    assert equal(parameters(twin), parameters(model))
    assert theirs.loss_scale.value == 8
    assert theirs.loss_scale is not optimizer.loss_scale


def test_a_copy_without_an_optimizer_of_ours_stays_in_its_format():
    """As an average of weights does, that is written in place."""
    model, _ = everything()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.01)
    twin(batch("mlp")[0])
    assert all(holds(p, FLOAT8) for p in twin.parameters())


def test_hooks_of_a_new_process_do_not_replace_those_of_a_loaded_model(monkeypatch):
    """Hooks are numbered from 0 in every process."""
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    model = rounded(nn.Sequential(nn.Linear(8, 8)), "weights", "inputs", "activations")
    saved = pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    loaded = pickle.loads(saved)
    for _ in range(4):
        loaded[0].register_forward_hook(lambda layer, read, y: None)
        loaded[0].register_forward_pre_hook(lambda layer, read: None)
        loaded.register_forward_pre_hook(lambda layer, read: None)
    x = torch.randn(3, 8)
    assert holds(loaded(x), FLOAT8)
    assert torch.equal(copy.deepcopy(loaded)(x), copy.deepcopy(loaded)(x))


def test_the_state_dicts_of_both_continue_a_run():
    """The weights are written by hand on the way, whose noise is of the same step."""

    def write(model) -> None:
        with torch.no_grad():
            model.hidden1.weight.add_(0.01)
        model(batch("mlp")[0])

    model, optimizer = everything()
    train(model, optimizer, range(2))
    write(model)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    later, theirs = everything()
    later.load_state_dict(states[0])
    theirs.load_state_dict(states[1])
    saved = [state[EXTRA_STATE]["accumulator"] for state in (states[1], theirs.state_dict())]
    assert equal(list(saved[0].values()), list(saved[1].values()))
    assert not equal(list(saved[0].values()), parameters(model))
    model.low_precision.clock.move_to(2)  # the forward pass of `write` was an extra one
    assert equal(train(later, theirs, range(2, 4)), train(model, optimizer, range(2, 4)))
    assert equal(parameters(later), parameters(model))


# Replicas, and tensors in the place of parameters


def replicate(model: nn.Module, index: int) -> nn.Module:
    """What nn.parallel.replicate, which needs GPUs, makes of a model: its tensors lead to the model's weights."""
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in made.items():
        for name, child in module._modules.items():
            setattr(replica, name, made[child])
        for name, p in module._parameters.items():
            setattr(replica, name, p if p is None else p.view_as(p))
        replica.index = index
    return made[model]


def test_replicas_round_with_noise_of_their_own_in_whatever_order_they_run(monkeypatch):
    monkeypatch.setattr(layers, "replica_of", lambda layer, x: getattr(layer, "index", 0))
    x, _ = batch("mlp", n=64)
    met = []
    for order in ([0, 1], [1, 0], "at once"):
        model, optimizer = everything(loss_scale="dynamic")
        replicas = [replicate(model, index) for index in (0, 1)]
        outputs = {}
        if order == "at once":
            with ThreadPoolExecutor(2) as pool:
                outputs = dict(enumerate(pool.map(lambda replica: replica(x), replicas)))
        else:
            for index in order:
                outputs[index] = replicas[index](x)
        assert holds(outputs[0], FLOAT8)
        assert not torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], everything()[0](x))  # the first is as the model itself would be
        optimizer.loss_scale.scale((outputs[0] + outputs[1]).square().sum()).backward()
        assert all(p.grad is not None for p in model.parameters())
        met.append([outputs[0].detach(), outputs[1].detach(), *(p.grad for p in model.parameters())])
    assert equal(met[0], met[1])
    assert equal(met[0][:2], met[2][:2])
    optimizer.step()
    assert model.low_precision.clock.step == 1


def test_a_replica_is_told_by_its_device():
    layer = nn.Linear(2, 2)
    x = SimpleNamespace(device=torch.device("cuda", 3))
    assert layers.replica_of(layer, x) == 0  # the noise of a model does not depend on the device that it is on
    replica = layer._replicate_for_data_parallel()
    assert layers.replica_of(replica, x) == 3
    assert layers.replica_of(replica, torch.ones(1)) == 0


def test_overflows_on_several_devices_are_all_found():
    watch = OverflowWatch()
    for device, overflowed in [("cpu", True), ("meta", False), ("cpu", False)]:
        watch.note(torch.tensor(overflowed, device=device))
    assert bool(watch._overflowed[torch.device("cpu")])
    assert len(watch._overflowed) == 2


def test_tensors_given_for_the_parameters_are_used_as_they_are():
    model, _ = everything()
    before = parameters(model)
    tensors = {name: torch.full_like(p, 0.3).requires_grad_() for name, p in model.named_parameters()}
    met = []
    model.hidden1.register_forward_hook(lambda layer, read, y: met.append((layer.weight, read[0], y)))
    y = functional_call(model, tensors, (batch("mlp")[0],))
    assert met[0][0] is tensors["hidden1.weight"]
    assert holds(met[0][1], FLOAT8)
    assert holds(met[0][2], FLOAT8)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in tensors.values())
    assert all(p.grad is None for p in model.parameters())
    assert equal(parameters(model), before)
    assert torch.equal(tensors["hidden1.weight"].detach(), torch.full((8, 5), 0.3))


def test_parameters_of_another_model_are_refused_where_they_would_not_be_rounded():
    model, _ = everything()
    with pytest.raises(RuntimeError, match=r"hidden1.weight .*functional_call.*quantize"):
        functional_call(model, dict(small("mlp").named_parameters()), (batch("mlp")[0],))
    functional_call(model, dict(model.named_parameters()), (batch("mlp")[0],))


def test_the_transforms_of_torch_func():
    model = rounded(small("mlp"), *AROUND, rounding="nearest")
    x, y = batch("mlp")
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)
    for row in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[row : row + 1]), y[row : row + 1]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][row], p.grad, rtol=1e-5, atol=1e-7)
            assert torch.equal(torch.func.grad(loss)(weights, x[row], y[row])[name], p.grad)


# Tied, frozen, added


def test_tied_weights_are_one_tensor_in_one_stream():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 12, bias=False))
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model)
    for m in (model, twin):
        rounded(m, "weights", accumulator="float16")
    assert twin[1].weight is twin[0].weight
    optimizers = [rounded_sgd(m) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(m(torch.arange(12)), torch.arange(12)).backward()
            optimizer.step()
    extra = optimizers[0].state_dict()[EXTRA_STATE]
    assert len(extra["accumulator"]) == len(extra["rounded_at"]) == 1
    (master,) = extra["accumulator"].values()
    assert holds(master, FLOAT16)
    expected = Scheme(rules(["weights"], "float8", "stochastic"), seed=1).quantizer(
        "weights", *extra["accumulator"], model.low_precision.clock
    )
    assert torch.equal(model[0].weight, expected(master))  # rounded once, by the noise of its one name
    assert equal(parameters(model), parameters(twin))


def test_parameters_frozen_and_unfrozen_on_the_way():
    model = small("mlp")
    model.hidden1.requires_grad_(False)
    optimizer = everything(model)[1]
    assert all(holds(p, FLOAT8) for p in model.parameters())  # frozen, and in the format
    frozen = parameters(model.hidden1)
    train(model, optimizer, range(2))
    assert equal(parameters(model.hidden1), frozen)
    model.hidden1.requires_grad_(True)
    model.hidden2.requires_grad_(False)
    optimizer.zero_grad()
    frozen, moving = parameters(model.hidden2), parameters(model.hidden1)
    train(model, optimizer, range(2, 5))
    assert equal(parameters(model.hidden2), frozen)
    assert not equal(parameters(model.hidden1), moving)
    assert all(holds(p, FLOAT8) for p in model.parameters())
    assert all(holds(optimizer.state[p]["momentum_buffer"], FLOAT8) for p in model.hidden1.parameters())


CHANGES = {
    "added": lambda model: model.append(nn.Linear(3, 3)),
    "replaced": lambda model: setattr(model, "output", nn.Linear(8, 4)),
    "a batch norm": lambda model: model.append(nn.BatchNorm1d(3)),
    "a parameter": lambda model: setattr(model.output, "bias", nn.Parameter(torch.full((3,), 0.3))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_added_later_is_an_error_and_then_rounded(change):
    model, optimizer = everything()
    train(model, optimizer, range(2))
    CHANGES[change](model)
    x, _ = batch("mlp")
    with pytest.raises(RuntimeError, match=r"added or replaced .*: call quantize_model\(model\)"):
        model(x)
    with pytest.raises(RuntimeError, match="added or replaced"):
        optimizer.step()  # of whom calls the parts of the model alone
    assert quantize_model(model) is model
    added = [p for p in model.parameters() if p not in {*optimizer.param_groups[0]["params"]}]
    assert added
    assert all(holds(p, FLOAT8) for p in added)
    optimizer.add_param_group({"params": added})
    before = [p.detach().clone() for p in added]
    train(model, optimizer, range(2, 5))
    assert not equal([p.detach() for p in added], before)
    assert all(holds(p, FLOAT8) for p in model.parameters())
    assert all(holds(optimizer.state[p]["momentum_buffer"], FLOAT8) for p in added)
    assert all(holds(p.grad, FLOAT8) for p in added)
    extra = optimizer.state_dict()[EXTRA_STATE]
    assert extra["accumulator"].keys() == {name for name, _ in model.named_parameters()}
    seen = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, read, y: seen.extend([read[0], y]))
    model(x)
    assert all(holds(tensor, FLOAT8) for tensor in seen)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # a replaced layer's old shape is forgotten


def test_weights_that_are_computed_from_others_later_are_refused():
    model, optimizer = everything()
    nn.utils.parametrizations.weight_norm(model.output)
    for use in (lambda: model(batch()[0]), optimizer.step):
        with pytest.raises(RuntimeError, match="added or replaced"):
            use()
    with pytest.raises(ValueError, match=r"weights: output .* computes its weight from other parameters"):
        quantize_model(model)


def test_what_no_pattern_asks_for_may_come_and_go():
    model = rounded(small("mlp"), "weights", "activations", layers=["hidden*"])
    model.output = nn.Linear(8, 7)
    x, _ = batch("mlp")
    assert not holds(model(x), FLOAT8)
    del model.hidden2  # nothing is left of some of the layers
    model(x)
    model.hidden3 = nn.Linear(7, 2)
    with pytest.raises(RuntimeError, match="layer hidden3"):
        model(x)
    activations = rounded(small("mlp"), "activations")
    activations.append(nn.BatchNorm1d(3))  # where nothing of it is to be rounded
    activations(x)
    activations.append(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="layer 7 was added"):
        activations(x)


def test_a_layer_that_moves_inside_the_model_stays_rounded():
    model, optimizer = everything()
    model.output = nn.Sequential(model.output)
    assert holds(model(batch("mlp")[0]), FLOAT8)
    train(model, optimizer, [0])


# Optimizers


def test_an_optimizer_that_knows_nothing_of_us():
    """quantize_model alone: each forward pass finds the weights rounded, with noise that is new each time."""
    n = 4096
    layer = rounded(nn.Linear(n, 1, bias=False), "weights")
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    met = []
    for _ in range(2):
        with torch.no_grad():
            layer.weight.fill_(1.0)
        layer(torch.zeros(1, n))
        layer.weight.grad = torch.full((1, n), -0.125)
        optimizer.step()  # to halfway between two values of float8
        layer(torch.zeros(1, n))
        met.append(layer.weight.detach().clone())
    assert set(met[0].unique().tolist()) == {1.0, 1.25}
    assert abs((met[0] == met[1]).sum().item() - n / 2) < 5 * (n / 4) ** 0.5


def test_a_part_of_the_model_alone_finds_its_weights_rounded():
    model, _ = everything()
    with torch.no_grad():
        model.hidden1.weight.fill_(0.3)
    model.hidden1(batch("mlp")[0])
    assert holds(model.hidden1.weight, FLOAT8)


def test_two_optimizers_share_a_model():
    model = rounded(small("mlp"), "weights", *AROUND, accumulator="float16")
    parts = [[*model.hidden1.parameters()], [*model.hidden2.parameters(), *model.output.parameters()]]
    optimizers = [torch.optim.SGD(parts[0], 0.1, 0.9), torch.optim.AdamW(parts[1], 0.01)]
    for optimizer, fmt in zip(optimizers, ("float8", "e8m5"), strict=True):
        quantize_optimizer(optimizer, model, gradients=fmt, momentum=fmt, loss_scale=16)
    before = parameters(model)
    for step in range(3):
        x, y = batch("mlp", step)
        model.zero_grad()
        optimizers[0].loss_scale.scale(F.cross_entropy(model(x), y)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(holds(p, FLOAT8) for p in model.parameters())
    assert not any(torch.equal(p, then) for p, then in zip(model.parameters(), before, strict=True))
    for optimizer, fmt in zip(optimizers, ("float8", "e8m5"), strict=True):
        moments = [v for held in optimizer.state.values() for name, v in held.items() if name != "step"]
        assert all(holds(v, format_named(fmt)) for v in moments)
        assert len(moments) in (2, 8)
    assert not holds(optimizers[1].state[parts[1][0]]["exp_avg"], FLOAT8)


@pytest.mark.parametrize("kind", ["NAdam", "ASGD", "Rprop"])
def test_counts_of_a_scalar_parameter_are_no_moments(kind):
    model, plain = nn.Module(), nn.Module()
    for m in (model, plain):
        m.scale = nn.Parameter(torch.tensor(0.5))
    quantize_model(model)
    optimizer = getattr(torch.optim, kind)(model.parameters())
    quantize_optimizer(optimizer, model, momentum="e8m0:up")
    theirs = getattr(torch.optim, kind)(plain.parameters())
    for m, o in ((model, optimizer), (plain, theirs)):
        for _ in range(3):
            m.scale.grad = torch.tensor(0.3)
            o.step()
    state, reference = optimizer.state[model.scale], theirs.state[plain.scale]
    for name in {"step", "mu_product", "eta", "mu"} & state.keys():
        assert torch.equal(state[name], reference[name]), name
    moments = [v for name, v in state.items() if name in ("exp_avg", "exp_avg_sq", "ax", "prev", "step_size")]
    assert moments
    assert all(holds(v, format_named("e8m0")) for v in moments)


def test_moments_of_another_shape_are_rounded_too():
    """Adafactor's, of rows and columns."""
    model = quantize_model(nn.Linear(8, 8, bias=False))
    optimizer = quantize_optimizer(torch.optim.Adafactor(model.parameters()), model, momentum="e8m1")
    for _ in range(2):
        model.weight.grad = torch.randn(8, 8)
        optimizer.step()
    moments = [v for name, v in optimizer.state[model.weight].items() if name in ("row_var", "col_var")]
    assert len(moments) == 2
    assert all(holds(v, format_named("e8m1")) for v in moments)
