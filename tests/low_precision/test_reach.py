"""What a model's rounding does not reach is refused, or said in one sentence that is true; else nothing is said."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from training_helpers import AROUND, FLOAT8, holds, nearest, set_gradients, small

import models
from low_precision.errors import SettingError
from low_precision.wrap import quantize_model, quantize_optimizer
from settings.models import TEXT_MODELS

pytestmark = pytest.mark.usefixtures("one_thread")

FLOWING = dict.fromkeys(AROUND, "float8")


class Said:
    """Which warnings of rounding were given inside the block."""

    def __enter__(self):
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *error):
        return self._catch.__exit__(*error)

    @property
    def texts(self):
        return [str(w.message) for w in self._caught if "rounded" in str(w.message)]


class Child(nn.Module):
    """Computes something of what it reads and of a weight."""

    def __init__(self, compute):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.compute = compute

    def forward(self, x):
        return self.compute(x, self.weight)

    def plain_method(self, x):
        return torch.ops.aten.mm(x, self.weight)


class Model(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.layer, self.child = nn.Linear(8, 8), child

    def forward(self, x):
        return self.child(self.layer(x))


UNREACHED = {
    "sparse.mm": lambda a, b: torch.sparse.mm(a.to_sparse(), b),
    "grouped_mm, groups of the sum": lambda a, b: F.grouped_mm(a, b, offs=torch.tensor([4, 8], dtype=torch.int32)).sum(
        0
    ),
    "aten": lambda a, b: torch.ops.aten.mm.default(a, b),
}
NO_PRODUCT = {
    "mul": lambda a, b: a * b,
    "softmax": lambda a, b: (a.softmax(-1) + b).sum(0),
    "layer_norm": lambda a, b: F.layer_norm(a, (8,), b[0]),
    "matmul": torch.matmul,  # whose operands are rounded
    "attention": lambda a, b: F.scaled_dot_product_attention(a[None], b[None], b[None]),
}


# Functions


@pytest.mark.parametrize("how", UNREACHED)
def test_a_product_that_is_not_rounded_is_named_with_its_module_once(how):
    model = quantize_model(Model(Child(UNREACHED[how])), **FLOWING)
    with Said() as said:
        model(torch.ones(8, 8))
    assert len(said.texts) == 1
    assert "products that are not rounded: " in said.texts[0]
    assert "in child (Child)" in said.texts[0]
    with Said() as said:
        model(torch.ones(8, 8))
    assert not said.texts


@pytest.mark.parametrize("how", NO_PRODUCT)
def test_nothing_is_said_of_other_functions(how):
    model = quantize_model(Model(Child(NO_PRODUCT[how])), **FLOWING)
    with Said() as said:
        model(torch.ones(8, 8))
    assert not said.texts


def test_a_product_in_a_plain_method_is_that_of_the_module_which_runs():
    child = Child(None)
    child.forward = child.plain_method
    model = quantize_model(nn.Sequential(Model(child)), **FLOWING)
    with pytest.warns(UserWarning, match=r"mm in 0\.child \(Child\)$"):
        model(torch.ones(2, 8))


@pytest.mark.parametrize("first", ["error", "evaluation"])
def test_a_product_that_the_first_pass_did_not_come_to_is_named_when_it_runs(first):
    """A first pass that ended by an error, or an evaluation before training, as Lightning makes one."""
    model = Model(Child(lambda a, b: torch.ops.aten.mm(a, b) if model.training else a))
    quantize_model(model, **FLOWING)
    if first == "error":
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.ones(2, 7))
    else:
        model.eval()
        with torch.no_grad():
            model(torch.ones(2, 8))
        model.train()
    with pytest.warns(UserWarning, match="mm in child"):
        model(torch.ones(2, 8))


@pytest.mark.parametrize("fails", [False, True])
def test_listening_ends_with_the_first_pass(fails):
    """A mode of torch that stayed would slow everything that the process does. The error is the user's own."""

    def compute(a, b):
        if fails:
            raise ZeroDivisionError("of the user")
        return a

    model = quantize_model(Model(Child(compute)), **FLOWING)
    modes, hooks = torch._C._len_torch_function_stack(), len(model._forward_hooks)
    if fails:
        with pytest.raises(ZeroDivisionError, match="of the user"):
            model(torch.ones(2, 8))
    else:
        model(torch.ones(2, 8))
    assert torch._C._len_torch_function_stack() == modes
    assert len(model._forward_hooks) == hooks


# Sites that nothing is there for


@pytest.mark.parametrize("site", ["inputs", "activations", "forward.inputs", "forward.weights", "products"])
@pytest.mark.parametrize("layers", [None, ["child"]])
def test_a_site_that_reaches_nothing_is_an_error_that_lists_what_there_is(site, layers):
    parts = [Child(lambda a, b: a + b)] if layers is None else [nn.Linear(8, 8)]
    model = nn.Sequential(*parts)
    model.add_module("child", nn.LayerNorm(8))
    quantize_model(model, **{site: "float8"}, layers=layers)
    for _ in range(2):  # each time, until the model is another one
        with pytest.raises(SettingError, match=r"site: given .*, allowed: one that this model has: elementwise"):
            model(torch.ones(8, 8))


def test_a_site_of_the_backward_pass_that_reaches_nothing_is_an_error_at_the_first_step():
    model = quantize_model(nn.Linear(8, 8), **{"dgrad.weights": "float8"})  # nobody asks for the input's gradient
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    model(torch.ones(2, 8)).sum().backward()
    before = model.weight.detach().clone()
    with pytest.raises(SettingError, match=r"site: given dgrad.weights, allowed: .*wgrad.errors, wgrad.inputs"):
        optimizer.step()
    assert torch.equal(model.weight, before)
    model = quantize_model(nn.Linear(8, 8), products="float8")  # it asks for all, and some are there
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()


def test_elementwise_reaches_nothing_in_a_model_of_products():
    model = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Flatten()), elementwise="bfloat16")
    with pytest.raises(SettingError, match=r"site: given elementwise, allowed: .*inputs, activations"):
        model(torch.ones(2, 8))


@pytest.mark.parametrize("name", models.MODELS)
def test_nothing_is_said_of_a_model_whose_products_are_all_reached(name):
    shape = {"resnet20": (3, 16, 16), "gpt": (8,)}.get(name, (1, 8, 8))
    sample = torch.zeros(shape, dtype=torch.long) if name in TEXT_MODELS else torch.ones(shape)
    with Said() as said:
        model = quantize_model(models.MODELS[name](shape, 3), weights="float8", **FLOWING)
        model(sample.expand(2, *shape))
    assert not said.texts


def test_nothing_is_said_where_weights_alone_are_rounded():
    with Said() as said:
        model = quantize_model(Model(Child(torch.ops.aten.mm)), weights="float8")
        model(torch.ones(8, 8))
        quantize_model(nn.Embedding(4, 4), weights="float8")(torch.tensor([1]))
    assert not said.texts


# torch's transformer: it multiplies by faster ways of its own where nobody looks


@pytest.mark.parametrize("sites", [AROUND, ("weights",), ("errors",)])
@pytest.mark.parametrize("mask", [None, "padding", "both"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_encoder_computes_as_the_plain_one(sites, mask, batch_first):
    """e8m23 rounds nothing. Masked places are left out: a nested tensor would hold zeros there."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantize_model(copy.deepcopy(plain), **dict.fromkeys(sites, "e8m23"))
        x, padded = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False] * 3])
        masks = {} if mask is None else {"src_key_padding_mask": padded}
        if mask == "both":
            masks["mask"] = torch.ones(3, 3, dtype=torch.bool).triu(1)
        x = x if batch_first else x.transpose(0, 1)
        for training, with_gradients in ((True, True), (False, True), (False, False)):
            with torch.set_grad_enabled(with_gradients):
                expected, y, again = (m.train(training)(x, **masks) for m in (plain, model, model))
            rows = slice(None) if mask is None else ~padded if batch_first else ~padded.T
            torch.testing.assert_close(y[rows], expected[rows])
            assert torch.equal(y[rows], again[rows])


# Weights that are computed


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 0.3


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
    "own, of the bias": lambda layer: parametrize.register_parametrization(layer, "bias", Scaled()),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_weights_that_are_computed_are_refused_before_and_after(how):
    def model():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    before = model()
    COMPUTED[how](before[0])
    with pytest.raises(ValueError, match=r"0 \(.*Linear\) computes its"):
        quantize_model(before, weights="float8")
    with pytest.raises(ValueError, match=r"0 \(.*Linear\) computes its"):
        quantize_model(before, accumulator="float32")
    quantize_model(before, weights="float8", layers=["1"])(torch.ones(2, 8))
    assert holds(before[1].weight, FLOAT8)

    after = quantize_model(model(), weights="float8")
    COMPUTED[how](after[0])
    with pytest.raises((RuntimeError, ValueError), match=r"after its model was quantized|computes its"):
        after(torch.ones(2, 8))
    with pytest.raises(ValueError, match="computes its"):
        quantize_model(after)


@pytest.mark.parametrize("when", ["before", "after"])
def test_pruned_weights_train_in_their_format(when):
    model = nn.Sequential(nn.Linear(8, 8))
    if when == "before":
        prune.l1_unstructured(model[0], "weight", 0.5)
    quantize_model(model, weights="float8", accumulator="float32")
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    if when == "after":
        prune.l1_unstructured(model[0], "weight", 0.5)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.full((2, 8), 0.5 + step)).square().sum().backward()
        optimizer.step()
    model(torch.ones(2, 8))
    assert holds(model[0].weight, FLOAT8)
    prune.remove(model[0], "weight")
    model(torch.ones(2, 8))
    assert holds(model[0].weight, FLOAT8)
    assert (model[0].weight == 0).sum() == 32


def test_pruning_reads_weights_that_are_rounded_already():
    layer = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
    model = quantize_model(nn.Sequential(layer), weights="float8")
    with torch.no_grad():
        layer.weight_orig.mul_(0.77)
    layer(torch.ones(2, 8))  # a part of the model, called alone
    assert holds(layer.weight, FLOAT8)
    assert model[0] is layer


# Patterns


class Encoder(nn.Module):
    """A container with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.full((8,), 1.1))
        self.layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Sequential(nn.Linear(8, 8))})

    def forward(self, x):
        return self.layers["b"](self.layers["a"](x + self.place))


@pytest.mark.parametrize(
    ("patterns", "rounded"),
    [
        (["child"], ["child.place", "child.layers.a", "child.layers.b.0"]),
        (["child.layers"], ["child.layers.a", "child.layers.b.0"]),
        (["child.layers.b"], ["child.layers.b.0"]),
        (["*.a", "layer"], ["layer", "child.layers.a"]),
        (["child.*"], ["child.layers.a", "child.layers.b.0"]),
    ],
)
def test_a_pattern_means_all_that_is_in_a_module(patterns, rounded):
    model = quantize_model(Model(Encoder()), weights="float8", layers=patterns)
    for name, parameter in model.named_parameters():
        expected = any(name == place or name.startswith(f"{place}.") for place in rounded)
        assert holds(parameter, FLOAT8) == expected, name


def test_a_pattern_may_name_a_shared_module_by_any_of_its_names():
    model = Model(Child(torch.mm))
    model.again = nn.ModuleDict({"same": model.layer})
    for pattern in ("again", "again.same"):
        twin = copy.deepcopy(model)
        quantize_model(twin, weights="float8", layers=[pattern])
        assert holds(twin.layer.weight, FLOAT8)


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(SettingError, match=r"layers: given 'encoder', allowed: .*layer, child"):
        quantize_model(Model(Encoder()), weights="float8", layers=["layer", "encoder"])


# Optimizers


class Around(torch.optim.Optimizer):
    """Has another optimizer inside, which steps."""

    def __init__(self, parameters, hold):
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.inner = torch.optim.SGD(parameters, 0.1, 0.9)
        self.inside = hold(self.inner)
        del self.inner

    def step(self, closure=None):
        raise AssertionError("it was refused")


HOLDERS = {"itself": lambda o: o, "a list": lambda o: [o], "a tuple": lambda o: (o,), "a dict": lambda o: {"a": o}}


@pytest.mark.parametrize("holder", HOLDERS)
def test_an_optimizer_around_another_is_refused(holder):
    model = quantize_model(small(), weights="float8")
    with pytest.raises(ValueError, match=r"given Around, which has another optimizer inside \(inside\)"):
        quantize_optimizer(Around(model.parameters(), HOLDERS[holder]), model, momentum="float8")


@pytest.mark.parametrize(
    "settings", [{}, {"momentum": "float8"}, {"loss_scale": "dynamic"}, {"loss_scale": 8.0}, {"gradients": "float8"}]
)
@pytest.mark.parametrize("kept", [{}, {"accumulator": "float32"}])
def test_sparse_gradients_are_served_or_refused_in_a_sentence(settings, kept):
    torch.manual_seed(0)
    model = nn.Embedding(10, 4, sparse=True)
    before = model.weight.detach().clone()  # where an accumulator starts
    quantize_model(model, weights="float8", **kept)
    before = before if kept else model.weight.detach().clone()
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), 0.125), model, **settings)
    optimizer.loss_scale.scale(model(torch.tensor([1, 2, 2])).sum()).backward()
    if "gradients" in settings:
        with pytest.raises(RuntimeError, match="sparse gradient of weight, allowed: a dense one"):
            optimizer.step()
        return
    optimizer.step()
    before[1] -= 0.125
    before[2] -= 0.25
    assert torch.equal(model.weight, nearest(before, FLOAT8))


def test_a_parameter_without_gradient_stays():
    model = quantize_model(small(), weights="float8")
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, gradients="float8")
    set_gradients(model, 1.0)
    first = next(model.parameters())
    first.grad = None
    before = first.detach().clone()
    optimizer.step()
    assert torch.equal(first, before)
