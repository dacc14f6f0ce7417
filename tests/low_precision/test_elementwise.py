"""The site `elementwise`: results of functions without products, and their gradients."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from training_helpers import equal_bits, holds

import low_precision as lp
import models
from low_precision.formats import format_named
from low_precision.names import computes

pytestmark = pytest.mark.usefixtures("one_thread")

BFLOAT16 = format_named("bfloat16")
EVERYTHING = dict.fromkeys(("weights", "inputs", "activations", "errors", "elementwise"), "bfloat16")
# Nodes of autograd that compute no numbers, by the beginning of their names.
MOVING = ("View", "Reshape", "Transpose", "Permute", "TBackward", "Unsqueeze", "Squeeze", "Select", "Slice", "Clone")
MOVING += ("Expand", "Alias", "Copy", "Pad", "Cat", "Unsafe", "AsStrided", "Where", "Round")
MOVING += ("torch::autograd::AccumulateGrad", "torch::autograd::CopyBackwards")


class Watch(TorchFunctionMode):
    """Sees what torch is given to compute with, below the mode that rounds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ignored = {id(buffer) for buffer in model.buffers()}
        self.outside: list[str] = []
        self.functions = 0

    def __torch_function__(self, function, types, arguments=(), named=None):
        read = [x for x in (*arguments, *(named or {}).values()) if isinstance(x, torch.Tensor)]
        read = [x for x in read if x.is_floating_point() and id(x) not in self.ignored]
        inside = [holds(x[x.isfinite()], BFLOAT16) for x in read]
        result = function(*arguments, **(named or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and computes(function):
            self.functions += len(read)
            self.outside += [function.__name__] if not all(inside) else []
        return result


def nodes_of(output: torch.Tensor) -> list:
    """All nodes of the graph that autograd has made of it."""
    seen, waiting = [], [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.append(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def image_model(name: str):
    shape = (3, 16, 16) if name == "resnet20" else (1, 8, 8)
    return models.MODELS[name](shape, 3), torch.randn(4, *shape)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(10, 16), nn.Parameter(torch.randn(5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, activation=F.gelu, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 10)

    def forward(self, tokens):
        return self.head(self.encoder(self.tokens(tokens) * math.sqrt(16) + self.places))


@pytest.mark.parametrize("name", ["cnn", "resnet20", "transformer"])
def test_no_number_is_outside_its_format_between_two_operations(name):
    """Forward: what every function reads. Backward: the gradient with respect to the result of every function."""
    torch.manual_seed(0)
    model, x = (Transformer(), torch.randint(10, (3, 5))) if name == "transformer" else image_model(name)
    x = x.bfloat16().float() if x.is_floating_point() else x
    lp.quantize_model(model, **EVERYTHING)
    watch = Watch(model)
    with watch:
        y = model(x)
    inside_attention = ["mul"] * (2 * (name == "transformer"))  # the scores are scaled within one call
    assert sorted(watch.outside) == inside_attention
    assert watch.functions > 10
    assert holds(y, BFLOAT16)

    checked = []

    def check(node, gradients):
        checked.append((node.name(), all(holds(g, BFLOAT16) for g in gradients if g is not None)))

    computing = [node for node in nodes_of(y) if not node.name().startswith(MOVING)]
    for node in computing:
        node.register_prehook(lambda gradients, node=node: check(node, gradients))
    y.backward(torch.randn_like(y))
    assert len(checked) == len(computing) >= 8
    inside_attention = {"MulBackward0", "BmmBackward0"} if name == "transformer" else set()
    assert {node for node, is_inside in checked if not is_inside} <= inside_attention
    assert lp.coverage(model).not_rounded == ()


def there_and_back(compute, x, rule="float8"):
    """The result, its error, and the gradient with respect to what is read, of a function inside a model."""

    class Model(nn.Module):
        def forward(self, x):
            return compute(x)

    x = x.clone().requires_grad_()
    y = lp.quantize_model(Model(), elementwise=rule, seed=1)(x)
    error = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(error)
    return y.detach(), error, x.grad


def q(x, fmt="float8"):
    return lp.quantize(x.detach(), fmt)


X = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def test_a_result_and_its_gradient_are_rounded_once():
    y, error, gradient = there_and_back(torch.tanh, X)
    x = X.clone().requires_grad_()
    x.tanh().backward(q(error))
    assert equal_bits([y, gradient], [q(X.tanh()), x.grad])


def test_the_gradient_is_rounded_after_the_sum_over_its_readers():
    def compute(x):
        h = x * 1.25
        return torch.cat([h.exp(), h.sin()])

    y, error, gradient = there_and_back(compute, X)
    h = q(X * 1.25)
    assert equal_bits([y], [torch.cat([q(h.exp()), q(h.sin())])])
    top, bottom = error.split(8)
    expected = q(q(top) * h.exp() + q(bottom) * h.cos()) * 1.25
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)


IN_PLACE = {
    "add_": lambda x: (x * 1.0).add_(0.3),
    "+=": lambda x: torch.Tensor.__iadd__(x * 1.0, 0.3),
    "relu_": lambda x: torch.relu_(x * 1.0),
    "F.relu": lambda x: F.relu(x * 1.0, inplace=True),
    "F.relu, by place": lambda x: F.relu(x * 1.0, True),
    "sigmoid_": lambda x: (x * 1.0).sigmoid_(),
    "a part": lambda x: _part(x * 1.0),
}
BESIDE = {
    "add_": lambda x: x * 1.0 + 0.3,
    "+=": lambda x: x * 1.0 + 0.3,
    "relu_": lambda x: torch.relu(x * 1.0),
    "F.relu": lambda x: F.relu(x * 1.0),
    "F.relu, by place": lambda x: F.relu(x * 1.0),
    "sigmoid_": lambda x: (x * 1.0).sigmoid(),
    "a part": lambda x: torch.cat([(x * 1.0)[:4] * 3, (x * 1.0)[4:]]),
}


def _part(x):
    x[:4].mul_(3)
    return x


@pytest.mark.parametrize("how", IN_PLACE)
def test_in_place_functions_are_rounded_in_place(how):
    y, _, gradient = there_and_back(IN_PLACE[how], X)
    expected, _, expected_gradient = there_and_back(BESIDE[how], X)
    assert equal_bits([y], [expected])
    if how != "a part":  # there, the one gradient is a sum
        assert equal_bits([gradient], [expected_gradient])


def test_in_place_is_in_place():
    kept = []

    def compute(x):
        h = x * 1.0
        kept.append((h, h.add_(0.3)))
        return h + 0.0

    there_and_back(compute, X)
    (h, result) = kept[0]
    assert h is result
    assert holds(h, format_named("float8"))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.view(4, 16),
        lambda x: x.t(),
        lambda x: x[1:3],
        lambda x: x.clone(),
        lambda x: torch.cat([x, x]),
        lambda x: F.pad(x, (1, 1)),
        lambda x: x.masked_fill(x > 0, 1.1),
        lambda x: x.expand(2, 8, 8),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.mse_loss(x, torch.full_like(x, 1.1)),
        lambda x: F.cross_entropy(x, torch.arange(8)),
        lambda x: torch.full((3,), 1.1, requires_grad=True),
        lambda x: x.requires_grad_(),
    ],
)
def test_what_computes_no_numbers_is_left_alone(compute):
    with torch.no_grad():
        expected = compute(X)

    class Model(nn.Module):
        def forward(self, x):
            return compute(x), x * 1.1

    y, other = lp.quantize_model(Model(), elementwise="float4_e2m1fn")(X)
    assert torch.equal(y, expected)
    assert holds(other, format_named("float4_e2m1fn"))


def test_each_part_of_a_result_is_rounded_and_keeps_its_type():
    class Model(nn.Module):
        def forward(self, x):
            return (x * 1.0).max(0), torch.var_mean(x, 0), x.sum(), x.argmax()

    largest, (variance, mean), total, place = lp.quantize_model(Model(), elementwise="float8")(X)
    assert isinstance(largest, torch.return_types.max)
    assert all(holds(x, format_named("float8")) for x in (largest.values, variance, mean, total))
    assert place.dtype == largest.indices.dtype == torch.int64


@pytest.mark.parametrize("where", ["mask", "number", "overflow"])
def test_an_infinity_that_an_operand_brought_stays(where):
    """Others end at the largest value, as everywhere."""
    compute = {
        "mask": lambda x: x + torch.tensor([0.0, -math.inf, math.inf, 0.0]),
        "number": lambda x: x - math.inf,
        "overflow": lambda x: x * 1e38 * 1e5,
    }[where]
    y, _, _ = there_and_back(compute, torch.ones(4))
    largest = format_named("float8").largest
    expected = {"mask": [1, -math.inf, math.inf, 1], "number": [-math.inf] * 4, "overflow": [largest] * 4}[where]
    assert y.tolist() == expected


def test_a_mask_takes_no_scale_away():
    """An infinity is no number of its block; torch.finfo.min, which some models add in its place, is one."""
    mask = torch.zeros(32)
    mask[20:] = -math.inf
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    y, _, _ = there_and_back(lambda x: x + mask, x, "mxfp8_e4m3")
    seen = x.clone().index_fill_(1, torch.arange(20, 32), 0.0)
    assert torch.equal(y[:, :20], lp.quantize(seen, "mxfp8_e4m3")[:, :20])
    assert (y[:, 20:] == -math.inf).all()


def test_noise_of_values_and_gradients_of_calls_and_passes():
    class Model(nn.Module):
        def forward(self, x):
            return torch.stack([x * 1.1, x * 1.1])

    model = lp.quantize_model(Model(), elementwise="float8:stochastic", seed=1)
    x = torch.ones(64, 64, requires_grad=True)
    seen = [*model(x), *model(x), *model.eval()(x)]
    seen = [*seen, *torch.autograd.grad([seen[0], seen[1]], x, [torch.full((64, 64), 1.1)] * 2)]
    assert not any(torch.equal(a, b) for n, a in enumerate(seen) for b in seen[:n])


def test_running_statistics_stay_in_float32():
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(8)
    rounded = lp.quantize_model(copy.deepcopy(plain), elementwise="float4_e2m1fn")
    plain(X), rounded(X)
    statistics = ("running_mean", "running_var")
    assert equal_bits([getattr(rounded, name) for name in statistics], [getattr(plain, name) for name in statistics])


def test_with_an_optimizer_that_trains():
    torch.manual_seed(0)
    model = lp.quantize_model(Transformer(), **EVERYTHING, accumulator="float32", rounding="stochastic", seed=1)
    optimizer = lp.quantize_optimizer(torch.optim.AdamW(model.parameters(), 3e-3), model, gradients="bfloat16")
    tokens = torch.randint(10, (8, 5))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
