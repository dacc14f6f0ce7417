"""LowPrecision around a model: copies, names and patterns, loading, printing, and what is refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from training_helpers import FLOAT8, SITES, batch, equal, holds, nearest, parameters, rule, rules, small, train

import models
from low_precision.layers import LayerRounding
from low_precision.model import LowPrecision
from low_precision.rounding import Overflow
from low_precision.rules import ALL_SITES
from low_precision.scheme import Scheme

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_deep_copy_is_rounded_and_independent():
    model = small("mlp")
    low = LowPrecision(model, Scheme(rules(SITES, "float8", "stochastic"), seed=2))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.1))
    twin = copy.deepcopy(model)
    before = parameters(twin)
    x = batch("mlp")[0]
    assert torch.equal(twin(x), copy.deepcopy(model)(x))
    assert holds(twin(x), FLOAT8)
    train(model, optimizer, range(2))
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
        LowPrecision(nn.Linear(2, 2).half(), Scheme(rules(ALL_SITES)))
    with pytest.raises(ValueError, match=r"weihgts.*weights"):
        Scheme(rules(["weihgts"]))
    with pytest.raises(ValueError, match="errors: float8 has no infinity"):
        Scheme(rules(["errors"]), overflow=Overflow.INFINITY)
    model = small("mlp")
    LowPrecision(model, Scheme(rules(["weights"])))
    hooks = len(model.hidden1._forward_hooks)
    with pytest.raises(ValueError, match="hidden1 is rounded already"):
        LowPrecision(model, Scheme(rules(ALL_SITES)))
    assert len(model.hidden1._forward_hooks) == hooks
    assert sum(isinstance(module, LayerRounding) for module in model.modules()) == 3
