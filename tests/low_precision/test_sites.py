"""Which tensors of a training step are rounded, with what noise; and quantize() as a user of Python calls it.

The references here share no code with the engines: `nearest` computes in float64, where all of it is exact.
"""

import copy
import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from low_precision.formats import ALL_SITES, NAMED, Format, Overflow, Rounding, Rule, format_named
from low_precision.model import Round
from low_precision.noise import Key
from low_precision.wrap import LayerRounding, LowPrecision, Scheme, quantize

FLOAT8 = NAMED["float8"]
SITES = (*ALL_SITES, "accumulator")  # a compensation would stand in its place
ALL = ALL_SITES
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


def nearest(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Round to nearest, ties to even, saturating: by its definition, in float64."""
    exact = x.detach().double().numpy()
    exponent = np.maximum(np.frexp(exact)[1] - 1, 1 - fmt.bias)
    last = np.ldexp(1.0, exponent - fmt.mantissa_bits)
    rounded = np.clip(np.rint(exact / last) * last, -fmt.largest, fmt.largest)
    return torch.from_numpy(np.asarray(rounded)).float()


def holds(x: torch.Tensor, fmt: Format) -> bool:
    """Whether every element is a value of the format."""
    return torch.equal(nearest(x, fmt), x.detach())


def rule(name: str, rounding: str = "nearest") -> Rule:
    return Rule(format_named(name), Rounding(rounding))


def rules(sites, name: str = "float8", rounding: str = "nearest") -> dict[str, Rule]:
    return dict.fromkeys(sites, rule(name, rounding))


def small(kind: str) -> nn.Module:
    torch.manual_seed(3)
    return models.mlp((5,), 3, width=8) if kind == "mlp" else models.cnn((1, 8, 8), 3)


def batch(kind: str, step: int = 0, n: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(100 + step)
    return torch.randn(n, *((5,) if kind == "mlp" else (1, 8, 8))), torch.randint(0, 3, (n,))


def train(model, low, optimizer, kind: str, steps, evaluate: bool = False) -> list[torch.Tensor]:
    """The losses of these steps."""
    losses = []
    for step in steps:
        x, y = batch(kind, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        low.scale(loss).backward()
        optimizer.step()
        losses.append(loss.detach())
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(x)
                model(x[:2])
            model.train()
    return losses


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_hand(model: nn.Sequential, formats: dict[str, Format], kind: str, steps: int, lr, momentum, decay):
    """Trains as the table of sites says, every rounding written out -> the weights and the momentum."""

    def at(site: str, x: torch.Tensor) -> torch.Tensor:
        return nearest(x, formats[site]) if site in formats else x.detach().clone()

    layers = list(model)
    state = {}  # (layer, name) -> (weight, master copy, momentum)
    for i, layer in enumerate(layers):
        for name, p in layer.named_parameters():
            master = at("accumulator", p)
            state[i, name] = (at("weights", master), master, None)
    for step in range(steps):
        x, y = batch(kind, step)
        tape = []  # what the way back needs of each layer
        for i, layer in enumerate(layers):
            own = {name: state[i, name][0].clone().requires_grad_() for name, _ in layer.named_parameters()}
            read = (at("inputs", x) if own else x.detach().clone()).requires_grad_()
            out = torch.func.functional_call(layer, own, (read,))
            tape.append((i, own, read, out))
            x = at("activations", out) if own else out.detach()
        x.requires_grad_()
        (error,) = torch.autograd.grad(F.cross_entropy(x, y), x)
        gradients = {}
        for i, own, read, out in reversed(tape):
            error = at("errors", error) if own else error
            error, *found = torch.autograd.grad(out, [read, *own.values()], error)
            error = at("errors", error) if own else error
            gradients |= {(i, name): gradient for name, gradient in zip(own, found, strict=True)}
        for place, gradient in gradients.items():
            weight, master, buffer = state[place]
            value = master if "accumulator" in formats else weight
            gradient = at("gradients", gradient).add(value, alpha=decay)
            buffer = gradient if buffer is None else (buffer * momentum).add(gradient)
            master = at("accumulator", value.add(buffer, alpha=-lr))
            state[place] = (at("weights", master), master, at("momentum", buffer))
    return [weight for weight, _, _ in state.values()], [buffer for _, _, buffer in state.values()]


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("sites", [(), *((site,) for site in SITES), ALL, SITES, ("weights", "accumulator")], ids=str)
def test_training_equals_the_table_of_sites_written_out(kind, sites):
    lr, momentum, decay = 0.1, 0.9, 0.01
    expected = by_hand(
        small(kind), {site: format_named(DISTINCT[site]) for site in sites}, kind, 3, lr, momentum, decay
    )
    model = small(kind)
    low = LowPrecision(model, Scheme({site: rule(DISTINCT[site]) for site in sites}))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=decay))
    train(model, low, optimizer, kind, range(3))
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
    low = LowPrecision(model, Scheme(rules(ALL)))
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
@pytest.mark.parametrize("sites", [*((site,) for site in ALL), ALL], ids=str)
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
        train(model, low, optimizer, "cnn", [step])
        seen["weights"] += parameters(model)
        if step:  # after the first step, it is the gradients
            seen["momentum"] += [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    # 4 layers, 8 parameters; the first layer reads data, which have no error.
    assert {site: len(seen[site]) for site in ALL} == {
        "weights": 32, "inputs": 12, "activations": 12, "errors": 21, "gradients": 24, "momentum": 16
    }  # fmt: skip
    for site in ALL:
        assert all(holds(tensor, FLOAT8) for tensor in seen[site]) == (site in sites), site


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("sites", [("activations",), ("errors",), ALL], ids=str)
def test_outputs_are_rounded_in_place_where_nobody_has_seen_them(name, sites, monkeypatch):
    """With a hook before ours, a layer's output is rounded into a new tensor: the same bits."""
    trained, places, made = [], [], []
    forward = Round.forward
    monkeypatch.setattr(Round, "forward", staticmethod(lambda *given: made.append(given) or forward(*given)))
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
        train(model, low, optimizer, name, range(3))
        trained.append(parameters(model))
        assert all(torch.equal(output, copy) for output, copy in seen)  # what was seen stays
        if hooked and sites != ("errors",):
            pairs = zip(seen, places[-len(seen) :], strict=True)
            assert all(output.data_ptr() != place for (output, _), place in pairs)
        if not hooked and sites == ("activations",):
            assert not made  # no new tensor
    assert equal(*trained)


def test_a_site_in_float32_is_not_rounded():
    given = rules(SITES, "float32", "stochastic")
    model, plain = small("mlp"), small("mlp")
    low = LowPrecision(model, Scheme(given))
    train(model, low, low.attach(torch.optim.SGD(model.parameters(), 0.1, 0.9)), "mlp", range(3))
    none = LowPrecision(plain, Scheme({}))
    train(plain, none, torch.optim.SGD(plain.parameters(), 0.1, 0.9), "mlp", range(3))
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


@pytest.mark.parametrize("sites", [["activations"], ["errors"], ["inputs"], ["activations", "errors"], ALL], ids=str)
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
    LowPrecision(model, Scheme(rules(ALL)))
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
    return train(model, low, optimizer, "mlp", range(steps), evaluate) + parameters(model)


def test_the_seed_alone_decides_the_noise():
    torch.manual_seed(8)
    first = noisy()
    torch.manual_seed(9)
    assert equal(first, noisy())
    for site in ALL:
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
            given = x.clone().requires_grad_()
            out = []
            hook = model[layer].register_forward_hook(lambda layer, read, y, out=out: out.append(read[0].detach()))
            y = model[layer](given)
            hook.remove()
            y.backward(x)
            met[layer, call, "input"], met[layer, call, "error"] = out[0], given.grad
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


# Copies, names, state


def test_a_deep_copy_is_rounded_and_independent():
    model = small("mlp")
    low = LowPrecision(model, Scheme(rules(SITES, "float8", "stochastic"), seed=2))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.1))
    twin = copy.deepcopy(model)
    before = parameters(twin)
    x = batch("mlp")[0]
    assert torch.equal(twin(x), copy.deepcopy(model)(x))
    assert holds(twin(x), FLOAT8)
    train(model, low, optimizer, "mlp", range(2))
    assert equal(parameters(twin), before)
    unrounded = {name: torch.full_like(p, 0.3) for name, p in model.state_dict().items()}
    of_model = parameters(model)
    twin.load_state_dict(unrounded)
    assert all(holds(p, FLOAT8) for p in twin.parameters())
    assert equal(parameters(model), of_model)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_saved_model_computes_the_same_bits(how):
    model = small("cnn")
    LowPrecision(model, Scheme(rules(SITES, "float8", "stochastic"), seed=2))
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    x, _ = batch("cnn")
    assert torch.equal(loaded(x), model(x))
    assert holds(loaded(x), FLOAT8)


def test_the_state_dict_is_that_of_the_plain_model():
    plain, model = models.resnet20((3, 8, 8), 10), models.resnet20((3, 8, 8), 10)
    LowPrecision(model, Scheme(rules(SITES)))
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("part", ["whole", "layer"])
def test_loaded_weights_are_rounded_at_once(part):
    model, other = small("mlp"), models.mlp((5,), 3, width=8)
    LowPrecision(model, Scheme(rules(["weights"])))
    loaded, source = (model, other) if part == "whole" else (model.hidden1, other.hidden1)
    loaded.load_state_dict(source.state_dict())
    assert equal(parameters(loaded), [nearest(p, FLOAT8) for p in source.parameters()])


def test_parameters_that_loading_replaces_are_refused():
    model = small("mlp")
    LowPrecision(model, Scheme(rules(["weights"])))
    with pytest.raises(ValueError, match="assign"):
        model.load_state_dict(small("mlp").state_dict(), assign=True)


@pytest.mark.parametrize(
    ("patterns", "rounded"),
    [
        (None, {"conv1", "conv2", "conv3", "output"}),
        (["conv*"], {"conv1", "conv2", "conv3"}),
        (["conv[13]", "output"], {"conv1", "conv3", "output"}),
        ("output", {"output"}),
        (["*"], {"conv1", "conv2", "conv3", "output"}),
    ],
)
def test_layers_by_pattern(patterns, rounded):
    model = small("cnn")
    LowPrecision(model, Scheme(rules(SITES)), patterns)
    seen = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda module, _, output, name=name: seen.update({name: output}))
    model(batch("cnn")[0])
    for name, module in model.named_children():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert holds(seen[name], FLOAT8) == (name in rounded)
            assert holds(module.weight, FLOAT8) == (name in rounded)
            assert hasattr(module, "rounding") == (name in rounded)


@pytest.mark.parametrize("pattern", ["convv*", "relu1", "conv1.weight", "pool"])
def test_a_pattern_that_matches_nothing_is_named(pattern):
    with pytest.raises(ValueError, match=pattern.replace("*", r"\*") + ".*conv1, conv2, conv3, output"):
        LowPrecision(small("cnn"), Scheme({}), ["conv1", pattern])


def test_printing_the_model_shows_what_is_rounded_where():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    scheme = rules(["weights", "errors"], "float8", "stochastic") | {
        "inputs": rule("float32"),
        "accumulator": rule("float32"),
    }
    LowPrecision(model, Scheme(scheme), ["0", "1"])
    norm, errors = "weights=float8:stochastic, accumulator=float32", "errors=float8:stochastic, "
    first = norm.replace("accumulator", errors + "accumulator")
    assert [line.strip() for line in str(model).splitlines() if "rounding" in line] == [
        f"(rounding): LayerRounding({first})",
        f"(rounding): LayerRounding({norm})",
    ]


def test_what_cannot_be_wrapped_is_refused_untouched():
    with pytest.raises(TypeError, match=r"weight.*float16"):
        LowPrecision(nn.Linear(2, 2).half(), Scheme(rules(ALL)))
    with pytest.raises(ValueError, match=r"weihgts.*weights"):
        Scheme(rules(["weihgts"]))
    with pytest.raises(ValueError, match="errors: float8 has no infinity"):
        Scheme(rules(["errors"]), overflow=Overflow.INFINITY)
    model = small("mlp")
    LowPrecision(model, Scheme(rules(["weights"])))
    hooks = len(model.hidden1._forward_hooks)
    with pytest.raises(ValueError, match="hidden1 is rounded already"):
        LowPrecision(model, Scheme(rules(ALL)))
    assert len(model.hidden1._forward_hooks) == hooks
    assert sum(isinstance(module, LayerRounding) for module in model.modules()) == 3


# quantize()


def test_gradients_pass_straight_through():
    x = torch.tensor([0.3, 1e9, float("nan")], requires_grad=True)
    y = quantize(x, "float8")
    y.backward(torch.tensor([0.123, 4.0, 5.0]))
    assert y[:2].tolist() == [0.3125, 114688.0]
    assert torch.equal(x.grad, torch.tensor([0.123, 4.0, 5.0]))
    assert x.is_leaf
    with torch.no_grad():
        assert not quantize(x, "float8").requires_grad
    assert not quantize(x.detach(), "float8").requires_grad
    hidden = x * 1
    quantize(hidden, "float32").sum().backward()  # float32 does not cut the graph either
    assert torch.equal(x.grad, torch.tensor([1.123, 5.0, 6.0]))


def layouts() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 3)
    return {
        "contiguous": x,
        "transposed": x.transpose(1, 3),
        "channels_last": x.to(memory_format=torch.channels_last),
        "expanded": x[:, :1].expand(4, 6, 5, 3),
        "every other": x[:, ::2, 1:, :],
        "flipped and unsqueezed": x.flip(0)[None],
        "offset": x.reshape(-1)[7:],
        "0-dim": torch.tensor(0.3),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(x),
    }


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("fmt", ["float8", "float32"])
def test_shape_layout_and_input_are_kept(name, rounding, fmt):
    x = layouts()[name]
    before = x.detach().clone()
    y = quantize(x, fmt, rounding, key=4)
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    if name in ("contiguous", "transposed", "channels_last"):
        assert y.stride() == x.stride()
    assert torch.equal(x, before)
    assert torch.equal(y, quantize(before.contiguous(), fmt, rounding, key=4))  # the same noise whatever the strides
    if x.numel():
        assert y.data_ptr() != x.data_ptr()
        y.detach().fill_(7)
        assert torch.equal(x, before)


def test_values_of_the_format_are_a_new_tensor_too():
    x = torch.tensor([1.0, -0.0, 0.0])
    for fmt in ("float8", "float32", "bfloat16"):
        y = quantize(x, fmt)
        assert y is not x
        assert y.data_ptr() != x.data_ptr()
        assert torch.equal(y.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize(
    ("dtype", "fmt"),
    [
        (torch.float16, "fp16"), (torch.float16, "float8_e5m2"), (torch.float16, "float8_e4m3fn"),
        (torch.bfloat16, "bfloat16"), (torch.bfloat16, "float8"), (torch.bfloat16, "float8_e5m2"),
    ],
)  # fmt: skip
def test_half_precision_inputs(dtype, fmt):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6).to(dtype).to(memory_format=torch.channels_last)
    y = quantize(x, fmt)
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    assert torch.equal(y.float(), nearest(x, format_named(fmt)))


@pytest.mark.parametrize(
    ("x", "fmt"),
    [
        (torch.ones(2, dtype=torch.int64), "float8"), (torch.ones(2, dtype=torch.bool), "float8"),
        (torch.ones(2, dtype=torch.complex64), "float8"), (torch.ones(2, dtype=torch.float16), "float8"),
        (torch.ones(2, dtype=torch.float16), "bfloat16"), (torch.ones(2, dtype=torch.bfloat16), "float16"),
        (torch.ones(2, dtype=torch.float16), "nvfp4"),
        ([1.0, 2.0], "float8"), (np.ones(2, np.float32), "float8"), (1.5, "float8"),
    ],
    ids=lambda x: str(getattr(x, "dtype", x)),
)  # fmt: skip
def test_other_types_are_refused(x, fmt):
    with pytest.raises(TypeError, match="float32"):
        quantize(x, fmt)


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        (["float9"], {}, "float9"),
        (["float8", "nerest"], {}, "nerest"),
        (["float8", "stochastic"], {}, "key"),
        (["float8", "stochastic", -1], {}, "-1"),
        (["float8", "stochastic", 2**64], {}, str(2**64)),
        (["float8", "stochastic", True], {}, "True"),
        (["float8", "stochastic", 1.0], {}, "1.0"),
        (["float8", "stochastic", "7"], {}, "7"),
        (["float8"], {"overflow": "clip"}, "clip"),
        (["float8"], {"overflow": "infinity"}, "float8 has no infinity"),
        (["float8"], {"backend": "fast"}, "fast.*eager"),
        (["e9m1"], {}, "e9m1"),
        (["e4m24"], {}, "e4m24"),
    ],
)
def test_bad_arguments_are_named(arguments, named, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(2), *arguments, **named)


def test_names_and_objects_mean_the_same():
    torch.manual_seed(0)
    x = torch.randn(1000) * 1e5
    by_name = quantize(x, "float8_e5m2", "stochastic", 7, overflow="infinity")
    by_object = quantize(x, NAMED["float8_e5m2"], Rounding.STOCHASTIC, Key(7), overflow=Overflow.INFINITY)
    assert torch.equal(by_name, by_object)
    assert by_name.isinf().any()
    assert torch.equal(quantize(x, replace(FLOAT8, name="mine")), quantize(x, "float8"))
    assert torch.equal(quantize(x, "float8"), nearest(x, FLOAT8))
