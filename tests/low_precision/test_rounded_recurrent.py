"""Recurrent layers in a rounded model: the operands and stored sites of each product, and nothing without a rule."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from training_helpers import ReadRounded, equal_bits, holds

import low_precision as lp
from low_precision.formats import format_named
from low_precision.rules import OPERANDS

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **settings: nn.RNN(*sizes, nonlinearity="relu", **settings),
}
SETTINGS = {
    "one layer": {},
    "three layers": {"num_layers": 3},
    "both ways": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "num_layers": 2},
    "all dropped": {"num_layers": 2, "dropout": 1.0},
}
ALL = ("products", "inputs", "activations", "errors", "elementwise")


def results(model: nn.Module, arguments: list, packed: bool = False) -> list[torch.Tensor]:
    """Output, last states, and the gradients with respect to all that is differentiable."""
    leaves = [x.clone().requires_grad_() for x in arguments]
    x, *states = leaves
    if packed:
        x = pack_padded_sequence(x, [5, 2, 4], enforce_sorted=False)
    state = None if not states else states[0] if len(states) == 1 else tuple(states)
    y, last = model(x, state)
    y = pad_packed_sequence(y)[0] if packed else y
    outputs = [y, *([last] if isinstance(last, torch.Tensor) else last)]
    sum(out.sin().sum() for out in outputs).backward()
    return [*(out.detach() for out in outputs), *(x.grad for x in leaves), *(p.grad for p in model.parameters())]


def layer_and_arguments(kind: str, settings: dict, with_states: bool) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    layer = KINDS[kind](6, 4, **settings)
    shape = (3, 5, 6) if settings.get("batch_first") else (5, 3, 6)
    count = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    features = [settings.get("proj_size", 4), 4][: 2 if kind == "LSTM" else 1]
    states = [torch.randn(count, 3, size) for size in features] if with_states else []
    return layer, [torch.randn(shape), *states]


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_without_rounding_they_are_torchs(kind, settings, with_states):
    """e8m23 is float32 by another name: what is left is the order of float32 sums."""
    layer, arguments = layer_and_arguments(kind, SETTINGS[settings], with_states)
    expected = results(copy.deepcopy(layer), arguments)
    rounded = lp.quantize_model(layer, **dict.fromkeys(ALL, "e8m23"))
    for a, b in zip(results(rounded, arguments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_projected_states(bidirectional):
    settings = {"proj_size": 3, "num_layers": 2, "bidirectional": bidirectional}
    layer, arguments = layer_and_arguments("LSTM", settings, with_states=True)
    expected = results(copy.deepcopy(layer), arguments)
    rounded = lp.quantize_model(layer, **dict.fromkeys(ALL, "e8m23"))
    for a, b in zip(results(rounded, arguments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind, with_states):
    settings = {"num_layers": 2, "bidirectional": True}
    layer, arguments = layer_and_arguments(kind, settings, with_states)
    expected = results(copy.deepcopy(layer), arguments, packed=True)
    rounded = lp.quantize_model(layer, **dict.fromkeys(ALL, "e8m23"))
    for a, b in zip(results(rounded, arguments, packed=True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


CELLS = {"LSTMCell": nn.LSTMCell, "GRUCell": nn.GRUCell, "RNNCell": nn.RNNCell}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias):
    torch.manual_seed(0)
    cell, x = CELLS[kind](6, 4, bias=bias), torch.randn(3, 6)
    state = torch.randn(3, 4)
    state = (state, torch.randn(3, 4)) if kind == "LSTMCell" else state
    rounded = lp.quantize_model(copy.deepcopy(cell), **dict.fromkeys(ALL, "e8m23"))
    for a, b in zip(rounded(x, state), cell(x, state), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fmt", ["float8", "mxfp4", "nvfp4"])
def test_an_lstm_by_its_formulas(fmt):
    """All steps of x in one product, each step of h in one; torch's gates i, f, g, o."""
    torch.manual_seed(0)
    layer = nn.LSTM(40, 36, bias=False)
    x = torch.randn(4, 3, 40)
    w_ih, w_hh = (p.detach().clone().requires_grad_() for p in layer.parameters())
    of_x = ReadRounded.apply(x.flatten(0, 1), w_ih.t(), fmt).view(4, 3, -1)
    h = c = torch.zeros(3, 36)
    outputs = []
    for step in of_x:
        i, f, g, o = (step + ReadRounded.apply(h, w_hh.t(), fmt)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    expected = torch.stack(outputs)
    expected.sin().sum().backward()
    y, _ = lp.quantize_model(layer, products=fmt)(x)
    y.sin().sum().backward()
    assert equal_bits([y], [expected])
    torch.testing.assert_close([p.grad for p in layer.parameters()], [w_ih.grad, w_hh.grad], rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_in_its_format():
    layer, (x,) = layer_and_arguments("LSTM", {"num_layers": 2}, with_states=False)
    layer = lp.quantize_model(layer, inputs="float8", activations="bfloat16", errors="float8", elementwise="float16")
    y, (h, c) = layer(x)
    assert holds(y, format_named("bfloat16"))
    assert holds(h, format_named("bfloat16"))
    assert holds(c, format_named("float16"))
    (gradient,) = torch.autograd.grad(y.sum(), layer.weight_hh_l0)
    assert gradient.isfinite().all()


def test_coverage_names_the_products_of_each_layer_direction_and_step():
    layer, (x,) = layer_and_arguments("LSTM", {"bidirectional": True}, with_states=False)
    layer = lp.quantize_model(layer, products="float8", elementwise="bfloat16")
    layer(x)
    functions = {row.function.partition(".")[0] for row in lp.coverage(layer).rows if row.tensor in OPERANDS}
    assert functions == {"ih_l0", "hh_l0", "ih_l0_reverse", "hh_l0_reverse"}
    assert (
        sum(row.function.startswith("hh_l0.") for row in lp.coverage(layer).rows if row.tensor == "forward.inputs") == 4
    )
    assert lp.coverage(layer).sentence() == "results of products (10)"  # each h: it has no site activations


def trained(how: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.LSTM(6, 4, num_layers=2, dropout=0.5)
    lp.quantize_model(model, products="mxfp4", elementwise="bfloat16", rounding="stochastic", seed=1)
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    if how == "threads":
        torch.set_num_threads(2)
    x = torch.randn(5, 3, 6)
    outputs = []
    for _ in range(2):
        optimizer.zero_grad()
        read = x.clone().requires_grad_()
        y, _ = checkpoint(model, read, use_reentrant=False) if how == "checkpoint" else model(read)
        y.square().sum().backward()
        optimizer.step()
        outputs += [y.detach(), read.grad]
    return [*outputs, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("how", ["again", "checkpoint", "threads"])
def test_the_same_bits(how):
    assert equal_bits(trained(how), trained("once"))


@pytest.mark.parametrize("site", ["inputs", "activations", "elementwise", "forward.inputs", "forward.weights"])
def test_each_step_has_noise_of_its_own(site):
    """Where each step starts from the same h and reads the same x."""
    cell = nn.RNNCell(64, 64, bias=False)
    nn.init.constant_(cell.weight_ih, 0.0011)
    nn.init.constant_(cell.weight_hh, 0.0)

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.RNN(64, 64, bias=False)
            self.layer.load_state_dict({f"{name}_l0": p for name, p in cell.state_dict().items()})

        def forward(self, x):
            return self.layer(x)[0]

    model = lp.quantize_model(Steps(), **{site: "float8:stochastic"}, seed=1)
    y = model(torch.full((3, 8, 64), 1.1))
    if site != "forward.weights":  # of x's product, which is one
        assert not torch.equal(y[0], y[1])
        assert not torch.equal(y[1], y[2])
    assert not torch.equal(model(torch.full((3, 8, 64), 1.1)), y)


def test_left_alone_it_is_torchs_own():
    layer, (x,) = layer_and_arguments("GRU", {}, with_states=False)
    expected = layer(x)[0]
    assert torch.equal(lp.quantize_model(layer, weights="e8m23")(x)[0], expected)
