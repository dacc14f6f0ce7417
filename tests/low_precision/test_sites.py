"""Which tensors of a training step are rounded, and with what noise.

The references here share no code with the engines.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import FLOAT8, SITES, batch, equal, holds, nearest, parameters, rule, rules, small, train

from low_precision.formats import Format, format_named
from low_precision.model import LowPrecision
from low_precision.rules import ALL_SITES
from low_precision.scheme import Scheme
from low_precision.tensor import Round

pytestmark = pytest.mark.usefixtures("one_thread")

# A format of its own for each site: a rounding at the wrong place shows.
DISTINCT = {
    "weights": "float8_e4m3fn",
    "inputs": "e5m6",
    "activations": "float16",
    "errors": "e6m5",
    "gradients": "e6m4",
    "momentum": "e6m3",
    "accumulator": "e6m8",
}


def by_hand(model: nn.Sequential, formats: dict[str, Format], kind: str, steps: int, lr, momentum, decay):
    """Trains as the table of sites says, every rounding written out -> the weights and the momentum."""

    def rounded_at(site: str, x: torch.Tensor) -> torch.Tensor:
        return nearest(x, formats[site]) if site in formats else x.detach().clone()

    layers = list(model)
    state = {}  # (layer, name) -> (weight, master copy, momentum)
    for i, layer in enumerate(layers):
        for name, p in layer.named_parameters():
            master = rounded_at("accumulator", p)
            state[i, name] = (rounded_at("weights", master), master, None)
    for step in range(steps):
        x, y = batch(kind, step)
        tape = []  # what the way back needs of each layer
        for i, layer in enumerate(layers):
            of_layer = {name: state[i, name][0].clone().requires_grad_() for name, _ in layer.named_parameters()}
            read = (rounded_at("inputs", x) if of_layer else x.detach().clone()).requires_grad_()
            out = torch.func.functional_call(layer, of_layer, (read,))
            tape.append((i, of_layer, read, out))
            x = rounded_at("activations", out) if of_layer else out.detach()
        x.requires_grad_()
        (error,) = torch.autograd.grad(F.cross_entropy(x, y), x)
        gradients = {}
        for i, of_layer, read, out in reversed(tape):
            error = rounded_at("errors", error) if of_layer else error
            error, *of_weights = torch.autograd.grad(out, [read, *of_layer.values()], error)
            error = rounded_at("errors", error) if of_layer else error
            gradients |= {(i, name): gradient for name, gradient in zip(of_layer, of_weights, strict=True)}
        for place, gradient in gradients.items():
            weight, master, buffer = state[place]
            value = master if "accumulator" in formats else weight
            gradient = rounded_at("gradients", gradient).add(value, alpha=decay)
            buffer = gradient if buffer is None else (buffer * momentum).add(gradient)
            master = rounded_at("accumulator", value.add(buffer, alpha=-lr))
            state[place] = (rounded_at("weights", master), master, rounded_at("momentum", buffer))
    return [weight for weight, _, _ in state.values()], [buffer for _, _, buffer in state.values()]


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize(
    "sites", [(), *((site,) for site in SITES), ALL_SITES, SITES, ("weights", "accumulator")], ids=str
)
def test_training_equals_the_table_of_sites_written_out(kind, sites):
    lr, momentum, decay = 0.1, 0.9, 0.01
    expected = by_hand(
        small(kind), {site: format_named(DISTINCT[site]) for site in sites}, kind, 3, lr, momentum, decay
    )
    model = small(kind)
    low = LowPrecision(model, Scheme({site: rule(DISTINCT[site]) for site in sites}))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=decay))
    train(model, optimizer, range(3), kind)
    assert equal(parameters(model), expected[0])
    assert equal([optimizer.state[p]["momentum_buffer"] for p in model.parameters()], expected[1])
    assert not equal(parameters(model), parameters(small(kind)))


def test_linear_regression_by_its_formulas():
    """30 steps in float64, where nothing rounds but what the table says; with these data float32 is exact too."""
    torch.manual_seed(1)
    n, lr, momentum, decay = 16, 2.0**-3, 0.875, 2.0**-6
    x = nearest(torch.randn(n, 3), format_named("e4m1"))
    y = (x @ torch.tensor([[1.0], [-2.0], [0.5]]) * 16).round() / 16 + 1
    model = nn.Linear(3, 1)

    def q(z: torch.Tensor) -> torch.Tensor:
        return nearest(z, FLOAT8).double()

    weight, bias = q(model.weight), q(model.bias)
    start, buffers = weight, None
    low = LowPrecision(model, Scheme(rules(ALL_SITES)))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=decay))
    for _ in range(30):
        output = q(q(x) @ weight.T + bias)
        error = q((output - y.double()) * 2 / n)
        moves = [q(error.T @ q(x)) + decay * weight, q(error.sum(0)) + decay * bias]
        buffers = moves if buffers is None else [momentum * b + m for b, m in zip(buffers, moves, strict=True)]
        weight, bias = q(weight - lr * buffers[0]), q(bias - lr * buffers[1])
        buffers = [q(b) for b in buffers]

        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        assert torch.equal(model.weight.double(), weight)
        assert torch.equal(model.bias.double(), bias)
    assert not torch.equal(weight, start)


def watch(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Registered before LowPrecision, these hooks see a layer's errors rounded; `watch_within` the rest."""
    seen = {site: [] for site in SITES}

    def note(tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: seen["errors"].append(gradient.clone()))

    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_pre_hook(lambda layer, arguments: note(arguments[0]))
            layer.register_forward_hook(lambda layer, arguments, output: note(output))
    return seen


def watch_within(model: nn.Module, seen: dict[str, list[torch.Tensor]]) -> None:
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(
                lambda layer, arguments, _: seen["inputs"].append(arguments[0].detach().clone())
            )
            layer.register_forward_hook(lambda layer, _, output: seen["activations"].append(output.detach().clone()))


@pytest.mark.parametrize("rounding", ["stochastic", "up"])
@pytest.mark.parametrize("sites", [*((site,) for site in ALL_SITES), ALL_SITES], ids=str)
def test_chosen_sites_hold_values_of_the_format_and_no_others(sites, rounding):
    model = small("cnn")
    seen = watch(model)
    low = LowPrecision(model, Scheme(rules(sites, "float8", rounding), seed=5))
    watch_within(model, seen)
    optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.1, 0.9))
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen["gradients"].extend(p.grad.clone() for p in model.parameters())
    )
    seen["weights"] += parameters(model)
    for step in range(3):
        train(model, optimizer, [step], "cnn")
        seen["weights"] += parameters(model)
        if step:  # after the first step, it is the gradients
            seen["momentum"] += [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    # 4 layers, 8 parameters; the first layer reads data, which have no error.
    assert {site: len(seen[site]) for site in ALL_SITES} == {
        "weights": 32, "inputs": 12, "activations": 12, "errors": 21, "gradients": 24, "momentum": 16
    }  # fmt: skip
    for site in ALL_SITES:
        assert all(holds(tensor, FLOAT8) for tensor in seen[site]) == (site in sites), site


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("sites", [("activations",), ("errors",), ALL_SITES], ids=str)
def test_outputs_are_rounded_in_place_where_nobody_has_seen_them(name, sites, monkeypatch):
    """With a hook before ours, a layer's output is rounded into a new tensor: the same bits."""
    trained, places, made = [], [], []
    forward = Round.forward
    monkeypatch.setattr(
        Round, "forward", staticmethod(lambda *arguments: made.append(arguments) or forward(*arguments))
    )
    for hooked in (False, True):
        model = small(name)
        seen = []
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        if hooked:
            for layer in layers:
                layer.register_forward_hook(
                    lambda layer, _, output, seen=seen: seen.append((output, output.detach().clone()))
                )
        low = LowPrecision(model, Scheme(rules(sites, "float8", "stochastic"), seed=5))
        for layer in layers:
            layer.register_forward_hook(lambda layer, _, output: places.append(output.data_ptr()))
        optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.1, 0.9))
        train(model, optimizer, range(3), name)
        trained.append(parameters(model))
        assert all(torch.equal(output, copy) for output, copy in seen)  # what was seen stays
        if hooked and sites != ("errors",):
            pairs = zip(seen, places[-len(seen) :], strict=True)
            assert all(output.data_ptr() != place for (output, _), place in pairs)
        if not hooked and sites == ("activations",):
            assert not made  # no new tensor
    assert equal(*trained)


def test_a_site_in_float32_is_not_rounded():
    scheme = rules(SITES, "float32", "stochastic")
    model, plain = small("mlp"), small("mlp")
    low = LowPrecision(model, Scheme(scheme))
    train(model, low.attach(torch.optim.SGD(model.parameters(), 0.1, 0.9)), range(3))
    train(plain, torch.optim.SGD(plain.parameters(), 0.1, 0.9), range(3))
    assert equal(parameters(model), parameters(plain))


def test_a_float32_accumulator_is_an_unrounded_master_copy():
    """Steps far below the weights' spacing add up in it, and nearest weights follow."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    low = LowPrecision(model, Scheme(rules(["weights"]) | {"accumulator": rule("float32")}))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), lr=2.0**-7))
    met = []
    for _ in range(64):
        optimizer.zero_grad()
        (-model(torch.ones(1, 1))).sum().backward()  # every step adds 2**-7; float8's spacing at 1 is 2**-2
        optimizer.step()
        met.append(model.weight.item())
    assert met == [nearest(torch.tensor(1 + (i + 1) / 128), FLOAT8).item() for i in range(64)]
    assert met[-1] == 1.5


def test_errors_are_rounded_for_output_and_input_of_each_layer():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    LowPrecision(model, Scheme(rules(["errors"], "e4m1")))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.1], [1.0, 1.3]]))
    x = torch.ones(1, 2, requires_grad=True)
    model(x).backward(torch.tensor([[1.2, 3.4]]))
    assert torch.equal(model[0].weight.grad, torch.tensor([[1.0, 1.0], [3.0, 3.0]]))  # 1.2 -> 1, 3.4 -> 3
    assert torch.equal(x.grad, torch.tensor([[4.0, 4.0]]))  # 1 + 3, 1.1 + 3.9 = 5 -> 4, a tie


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d], ids=lambda layer: layer.__name__)
def test_convolutions_of_all_dimensions(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer(2, 3, 2))
    LowPrecision(model, Scheme(rules(["weights", "activations"])))
    y = model(torch.randn(2, 2, *[4] * int(layer.__name__[4])))
    assert holds(y, FLOAT8)
    assert holds(model[0].weight, FLOAT8)


@pytest.mark.parametrize(
    "sites", [["activations"], ["errors"], ["inputs"], ["activations", "errors"], ALL_SITES], ids=str
)
def test_an_in_place_relu_after_a_layer(sites):
    """As in most models of torchvision. The same bits as with a ReLU that is not in place."""
    made = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(in_place), nn.Flatten(), nn.Linear(72, 3), nn.ReLU(in_place))
        LowPrecision(model, Scheme(rules(sites)))
        y = model(torch.randn(2, 1, 8, 8))
        y.square().sum().backward()
        made.append([y.detach(), *(p.grad for p in model.parameters())])
    assert equal(*made)


def test_a_layer_called_with_its_input_by_name():
    model = nn.Linear(2, 2)
    LowPrecision(model, Scheme(rules(ALL_SITES)))
    x = torch.randn(3, 2)
    assert torch.equal(model(input=x), model(x))
    assert holds(model(input=x), FLOAT8)


def test_batch_norm_statistics_and_the_loss_stay_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    LowPrecision(model, Scheme(rules(SITES)))
    y = model(torch.randn(8, 3))
    assert not holds(y, FLOAT8)
    assert not holds(model[1].running_mean, FLOAT8)


# Noise


def noisy(seed: int = 1, sites=SITES, evaluate: bool = False, steps: int = 4) -> list[torch.Tensor]:
    model = small("mlp")
    low = LowPrecision(model, Scheme(rules(sites, "float8", "stochastic"), seed=seed))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.1, 0.9))
    return train(model, optimizer, range(steps), evaluate=evaluate) + parameters(model)


def test_the_seed_alone_decides_the_noise():
    torch.manual_seed(8)
    first = noisy()
    torch.manual_seed(9)
    assert equal(first, noisy())
    for site in ALL_SITES:
        assert not equal(noisy(1, [site]), noisy(2, [site])), site


def test_evaluation_does_not_change_training():
    assert equal(noisy(), noisy(evaluate=True))


def test_evaluation_has_noise_of_its_own():
    model = nn.Linear(64, 64, bias=False)
    LowPrecision(model, Scheme(rules(["activations"], "float8", "stochastic")))
    x = torch.randn(8, 64)
    training = model(x)
    assert not torch.equal(model.eval()(x), training)


def test_streams_of_steps_tensors_sites_and_calls_differ():
    """The same numbers, rounded here, there, then and again: bits that agree no oftener than chance has it."""
    n, x = 96, torch.full((96, 96), 1.125)  # halfway between two values of float8
    model = nn.Sequential(nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False))
    met = {}
    for layer in model:
        layer.weight.data.copy_(torch.eye(n))
    scheme = rules(["inputs", "activations", "errors"], "float8", "stochastic")
    low = LowPrecision(model, Scheme(scheme, seed=3))
    for layer in (0, 1):
        for call in (0, 1):
            leaf = x.clone().requires_grad_()
            out = []
            hook = model[layer].register_forward_hook(lambda layer, read, y, out=out: out.append(read[0].detach()))
            y = model[layer](leaf)
            hook.remove()
            y.backward(x)
            met[layer, call, "input"], met[layer, call, "error"] = out[0], leaf.grad
    quantizer = Scheme(scheme, seed=3).quantizer("activations", "0", low.clock)
    met["activation"] = quantizer(x)
    met["call"] = quantizer(x, 1)
    low.clock.move_to(1)
    met["step"] = quantizer(x)
    names = list(met)
    for i, a in enumerate(names):
        assert set(met[a].unique().tolist()) == {1.0, 1.25}
        for b in names[:i]:
            same = (met[a] == met[b]).sum().item()
            assert abs(same - n * n / 2) < 5 * (n * n / 4) ** 0.5, (a, b)


def test_a_layer_called_twice_in_one_pass_has_fresh_noise_and_takes_both_gradients():
    layer = nn.Linear(64, 64, bias=False)
    LowPrecision(layer, Scheme(rules(["activations"], "float8", "stochastic")))
    x = torch.randn(16, 64)
    assert not torch.equal(layer(x), layer(x))


def test_tied_weights_are_one_parameter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    low = LowPrecision(model, Scheme(rules(SITES, "float8", "stochastic"), seed=2))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.1, 0.9))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    assert model[1].weight is model[0].weight
    assert holds(model[0].weight, FLOAT8)
    assert holds(optimizer.state[model[0].weight]["momentum_buffer"], FLOAT8)
