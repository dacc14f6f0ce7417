"""Recurrent layers in plain PyTorch against torch's: same results and gradients, and what a Call sees of them."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.overrides import TorchFunctionMode

from low_precision import recurrent
from low_precision.forms import Linear

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *sizes, **settings: nn.RNN(*sizes, nonlinearity="relu", **settings),
}
CELLS = {
    "lstm_cell": nn.LSTMCell,
    "gru_cell": nn.GRUCell,
    "rnn_tanh_cell": nn.RNNCell,
    "rnn_relu_cell": lambda *sizes, **settings: nn.RNNCell(*sizes, nonlinearity="relu", **settings),
}
FUNCTIONS = {getattr(torch, name): getattr(recurrent, name) for name in (*LAYERS, *CELLS)}

FEATURES, HIDDEN, TIME, BATCH = 5, 4, 7, 3


class Plain:
    """A Call that rounds nothing."""

    def inputs(self, x):
        return x

    def activations(self, y):
        return y

    def elementwise(self, y):
        return y

    def multiply(self, name, a, b, bias, form):
        return form.forward(a, b, bias)


class Recording(Plain):
    """A Call that rounds nothing and writes down what it is asked for."""

    def __init__(self):
        self.products, self.read, self.made, self.other = [], [], [], []

    def inputs(self, x):
        self.read.append(tuple(x.shape))
        return x

    def activations(self, y):
        self.made.append(tuple(y.shape))
        return y

    def elementwise(self, y):
        self.other.append(tuple(y.shape))
        return y

    def multiply(self, name, a, b, bias, form):
        assert form == Linear()
        assert a.is_contiguous()
        self.products.append((name, tuple(a.shape), bias is not None))
        return form.forward(a, b, bias)


class InPlainTorch(TorchFunctionMode):
    """Has the functions of recurrent.py compute what a module asks torch's recurrent functions for."""

    def __init__(self, call):
        super().__init__()
        self.call, self.calls = call, 0

    def __torch_function__(self, function, types, arguments=(), named=None):
        in_plain_torch = FUNCTIONS.get(function)
        if in_plain_torch is None:
            return function(*arguments, **(named or {}))
        self.calls += 1
        return in_plain_torch(self.call, *arguments, **(named or {}))


def tensors_in(result):
    """All tensors of a module's result, from the first to the last."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in tensors_in(part)]


def results(module, call, x, states=None):
    """All results of a call, and all gradients; call: None for torch's."""
    read = [*tensors_in(x), *tensors_in(() if states is None else states)]
    arguments = (x,) if states is None else (x, states)
    if call is None:
        made = tensors_in(module(*arguments))
    else:
        with InPlainTorch(call) as mode:
            made = tensors_in(module(*arguments))
        assert mode.calls == 1
    # Each number of each result counts, with a factor of its own.
    loss = sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in made)
    gradients = torch.autograd.grad(loss, [*read, *module.parameters()])
    return [tensor.detach() for tensor in (*made, *gradients)]


def sequences(layer, *, time=TIME, batch=BATCH, packed=False, with_states=False):
    """What the layer reads, of its parameters' type: x, and its initial states or None."""
    dtype = next(layer.parameters()).dtype
    if packed:  # of different lengths, not in falling order
        x = [torch.randn(1 + (3 * i + time) % (time + 1), FEATURES, dtype=dtype) for i in range(batch)]
        x = pack_sequence(x, enforce_sorted=False)
        x = x._replace(data=x.data.requires_grad_())
    else:
        x = torch.randn((batch, time, FEATURES) if layer.batch_first else (time, batch, FEATURES), dtype=dtype)
        x.requires_grad_()
    if not with_states:
        return x, None
    parts = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or HIDDEN] + [HIDDEN] * isinstance(layer, nn.LSTM)
    states = tuple(torch.randn(parts, batch, width, dtype=dtype, requires_grad=True) for width in widths)
    return x, states if len(states) > 1 else states[0]


def assert_close(new, torchs):
    """Equal to 1e-10 in float64, and in float32 to what the roundings of two orders of computing may add up to.

    The longest way from a number to one that depends on it leads forward and back through all steps of three layers.
    Each step has a sum of at most 20 terms and 10 other operations, and each of these rounds by at most half an eps.
    Roundings of both signs add up to about the root of their number; the bound is four times that.
    """
    roundings = 2 * TIME * 3 * 30
    for a, b in zip(new, torchs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        bound = 1e-10 if a.dtype == torch.float64 else 4 * math.sqrt(roundings) * torch.finfo(a.dtype).eps / 2
        largest = max(1.0, *b.abs().flatten().tolist()) if b.numel() else 1.0
        assert torch.all((a - b).abs() <= bound * largest)


SHAPES = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "three layers, both directions": {"num_layers": 3, "bidirectional": True},
    "both directions, batch first": {"bidirectional": True, "batch_first": True},
    "two layers, batch first, no bias": {"num_layers": 2, "batch_first": True, "bias": False},
    "projected": {"proj_size": 2},
    "two layers, projected, both directions, no bias": {
        "num_layers": 2,
        "proj_size": 3,
        "bidirectional": True,
        "bias": False,
    },
}
CALLS = {
    "from zeros": {},
    "with states": {"with_states": True},
    "one sequence": {"batch": 1, "with_states": True},
    "one step": {"time": 1, "with_states": True},
    "packed": {"packed": True},
    "packed, with states": {"packed": True, "with_states": True, "batch": 5},
    "packed, one sequence": {"packed": True, "batch": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize(
    ("kind", "shape"), [(k, s) for k in LAYERS for s in SHAPES if k == "lstm" or "proj_size" not in SHAPES[s]]
)
def test_a_layer_is_torchs(kind, shape, what, dtype):
    torch.manual_seed(3)
    layer = LAYERS[kind](FEATURES, HIDDEN, dtype=dtype, **SHAPES[shape])
    x, states = sequences(layer, **CALLS[what])
    assert_close(results(layer, Plain(), x, states), results(layer, None, x, states))


@pytest.mark.parametrize("kind", LAYERS)
def test_one_sequence_without_a_batch(kind):
    """torch's modules add the dimension of the batch, and take it away afterwards."""
    torch.manual_seed(4)
    layer = LAYERS[kind](FEATURES, HIDDEN, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(TIME, FEATURES, dtype=torch.float64, requires_grad=True)
    assert_close(results(layer, Plain(), x), results(layer, None, x))


def test_a_batch_without_sequences():
    layer = nn.LSTM(FEATURES, HIDDEN, num_layers=2, bidirectional=True)
    x = torch.randn(TIME, 0, FEATURES, requires_grad=True)
    assert_close(results(layer, Plain(), x), results(layer, None, x))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_sequence_without_steps_is_torchs_error(kind):
    layer = LAYERS[kind](FEATURES, HIDDEN)
    for mode in (torch.no_grad(), InPlainTorch(Plain())):
        with mode, pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            layer(torch.randn(0, BATCH, FEATURES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [BATCH, 1, None])
@pytest.mark.parametrize("with_states", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_torchs(kind, with_states, batch, bias, dtype):
    torch.manual_seed(5)
    cell = CELLS[kind](FEATURES, HIDDEN, bias=bias, dtype=dtype)
    rows = () if batch is None else (batch,)
    x = torch.randn(*rows, FEATURES, dtype=dtype, requires_grad=True)
    states = [torch.randn(*rows, HIDDEN, dtype=dtype, requires_grad=True) for _ in range(2)]
    states = tuple(states) if kind == "lstm_cell" else states[0]
    states = states if with_states else None
    assert_close(results(cell, Plain(), x, states), results(cell, None, x, states))


def second_gradients(module, call, x):
    """The gradients of a sum of squared gradients."""
    with InPlainTorch(call) if call else torch.enable_grad():
        y = sum(tensor.sin().sum() for tensor in tensors_in(module(x)))
    read = [x, *module.parameters()]
    first = torch.autograd.grad(y, read, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), read, allow_unused=True, materialize_grads=True)
    return [tensor.detach() for tensor in second]


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_gradients_of_a_cell(kind):
    torch.manual_seed(6)
    cell = CELLS[kind](FEATURES, HIDDEN, dtype=torch.float64)
    x = torch.randn(BATCH, FEATURES, dtype=torch.float64, requires_grad=True)
    assert_close(second_gradients(cell, Plain(), x), second_gradients(cell, None, x))


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_gradients_of_a_layer(kind):
    torch.manual_seed(6)
    layer = LAYERS[kind](FEATURES, HIDDEN, num_layers=2, dtype=torch.float64)
    x = torch.randn(TIME, BATCH, FEATURES, dtype=torch.float64, requires_grad=True)
    assert_close(second_gradients(layer, Plain(), x), second_gradients(layer, None, x))


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("what", ["padded", "batch first", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_draws_torchs_masks(kind, what, p):
    torch.manual_seed(7)
    settings = {"num_layers": 3, "bidirectional": True, "dropout": p, "batch_first": what == "batch first"}
    layer = LAYERS[kind](FEATURES, HIDDEN, dtype=torch.float64, **settings)
    x, _ = sequences(layer, packed=what == "packed")
    both = []
    for call in (Plain(), None):
        torch.manual_seed(8)
        both.append([*results(layer, call, x), torch.rand(3, dtype=torch.float64)])
    assert_close(*both)
    if p in (0.3, 0.9):  # another seed draws other masks
        assert not torch.equal(results(layer, Plain(), x)[0], both[0][0])
    layer.eval()
    state = torch.get_rng_state()
    assert_close(results(layer, Plain(), x), results(layer, None, x))
    assert torch.equal(torch.get_rng_state(), state)


def recorded(layer, x):
    call = Recording()
    with InPlainTorch(call):
        layer(x)
    return call


# How many results of elementwise operations a step has; h itself is not among them.
ELEMENTWISE = {"lstm": 1 + 4 + 3 + 1, "gru": 2 + 2 + 3 + 2, "rnn_tanh": 1, "rnn_relu": 1}


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_call_sees_of_two_layers_and_directions(kind):
    layer = LAYERS[kind](FEATURES, HIDDEN, num_layers=2, bidirectional=True, dropout=0.5)
    call = recorded(layer, torch.randn(TIME, BATCH, FEATURES))
    expected = []
    for number, suffix in itertools.product((0, 1), ("", "_reverse")):
        features = 2 * HIDDEN if number else FEATURES
        expected.append((f"ih_l{number}{suffix}", (BATCH, TIME, features), True))  # the rows of a sample lie together
        expected += [(f"hh_l{number}{suffix}", (BATCH, HIDDEN), True)] * TIME
    assert call.products == expected
    of_steps = [(BATCH, HIDDEN)] * (2 * TIME)
    assert call.read == [(BATCH, TIME, FEATURES), *of_steps, (BATCH, TIME, 2 * HIDDEN), *of_steps]
    assert call.made == of_steps * 2
    assert len(call.other) == 4 * TIME * ELEMENTWISE[kind] + 1
    assert call.other.count((TIME, BATCH, 2 * HIDDEN)) == 1  # of dropout


def test_what_a_call_sees_of_a_projection_without_bias():
    layer = nn.LSTM(FEATURES, HIDDEN, proj_size=2, bias=False, batch_first=True)
    call = recorded(layer, torch.randn(BATCH, TIME, FEATURES))
    step = [("hh_l0", (BATCH, 2), False), ("hr_l0", (BATCH, HIDDEN), False)]
    assert call.products == [("ih_l0", (BATCH, TIME, FEATURES), False), *step * TIME]
    assert call.read == [(BATCH, TIME, FEATURES), *[(BATCH, 2), (BATCH, HIDDEN)] * TIME]
    assert call.made == [(BATCH, 2)] * TIME
    assert len(call.other) == TIME * (ELEMENTWISE["lstm"] + 1)  # and what the projection reads


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_call_sees_of_a_packed_sequence(kind):
    """The product with x has the packed rows, those with h the sequences that have not ended."""
    layer = LAYERS[kind](FEATURES, HIDDEN, bidirectional=True)
    x = pack_sequence([torch.randn(length, FEATURES) for length in (1, 4, 2)], enforce_sorted=False)
    call = recorded(layer, x)
    rows = [3, 2, 1, 1]
    expected = [("ih_l0", (7, FEATURES), True), *(("hh_l0", (n, HIDDEN), True) for n in rows)]
    expected.append(("ih_l0_reverse", (7, FEATURES), True))
    expected += [("hh_l0_reverse", (n, HIDDEN), True) for n in reversed(rows)]
    assert call.products == expected
    assert call.read == [(7, FEATURES), *((n, HIDDEN) for n in (*rows, *reversed(rows)))]
    assert call.made == call.read[1:]
    assert len(call.other) == 2 * len(rows) * ELEMENTWISE[kind]


@pytest.mark.parametrize("kind", CELLS)
def test_what_a_call_sees_of_a_cell(kind):
    call = recorded(CELLS[kind](FEATURES, HIDDEN), torch.randn(BATCH, FEATURES))
    assert call.products == [("ih", (BATCH, FEATURES), True), ("hh", (BATCH, HIDDEN), True)]
    assert call.read == [(BATCH, FEATURES), (BATCH, HIDDEN)]
    assert call.made == [(BATCH, HIDDEN)]
    assert len(call.other) == ELEMENTWISE[kind.removesuffix("_cell")]


GRIDS = {"inputs": 2.0**-5, "activations": 2.0**-6, "elementwise": 2.0**-7, "operands": 2.0**-4}


class OnAGrid(Plain):
    """A Call that rounds to whole multiples of a number, another one for each site and for the products' operands."""

    def inputs(self, x):
        return self.round(x, "inputs")

    def activations(self, y):
        return self.round(y, "activations")

    def elementwise(self, y):
        return self.round(y, "elementwise")

    def multiply(self, name, a, b, bias, form):
        return form.forward(self.round(a, "operands"), self.round(b, "operands"), bias)

    def round(self, x, site):
        step = GRIDS[site]
        return x + ((x / step).round() * step - x).detach()


def test_each_rounding_of_an_lstm_stands_in_its_place():
    """Two steps written out, in float64, where all sums of such numbers are exact."""
    torch.manual_seed(9)
    layer = nn.LSTM(FEATURES, HIDDEN, dtype=torch.float64)
    x = torch.randn(2, BATCH, FEATURES, dtype=torch.float64)
    call = OnAGrid()
    with InPlainTorch(call):
        y, (h_n, c_n) = layer(x)
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    q, e = call.round, call.elementwise
    h = c = torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    for t in range(2):
        from_x = q(q(x[t], "inputs"), "operands") @ q(w_ih, "operands").t() + b_ih
        from_h = q(q(h, "inputs"), "operands") @ q(w_hh, "operands").t() + b_hh
        i, f, g, o = e(from_x + from_h).split(HIDDEN, 1)
        c = e(e(e(f.sigmoid()) * c) + e(e(i.sigmoid()) * e(g.tanh())))
        h = q(e(o.sigmoid()) * e(c.tanh()), "activations")
        torch.testing.assert_close(y[t], h, rtol=0, atol=1e-14)
    torch.testing.assert_close(h_n[0], h, rtol=0, atol=1e-14)
    torch.testing.assert_close(c_n[0], c, rtol=0, atol=1e-14)
    unrounded = layer(x)[0]
    assert (unrounded - y).abs().max() > 2.0**-8  # the roundings are seen


def test_each_rounding_of_a_gru_stands_in_its_place():
    torch.manual_seed(10)
    cell = nn.GRUCell(FEATURES, HIDDEN, dtype=torch.float64)
    x, before = (torch.randn(BATCH, width, dtype=torch.float64) for width in (FEATURES, HIDDEN))
    call = OnAGrid()
    with InPlainTorch(call):
        after = cell(x, before)
    w_ih, w_hh, b_ih, b_hh = cell.parameters()
    q, e = call.round, call.elementwise
    h = q(before, "inputs")  # which the products and the last sum read
    xr, xz, xn = (q(q(x, "inputs"), "operands") @ q(w_ih, "operands").t() + b_ih).split(HIDDEN, 1)
    hr, hz, hn = (q(h, "operands") @ q(w_hh, "operands").t() + b_hh).split(HIDDEN, 1)
    r, z = e(e(xr + hr).sigmoid()), e(e(xz + hz).sigmoid())
    n = e(e(xn + e(r * hn)).tanh())
    expected = q(e(e(h - n) * z) + n, "activations")
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-14)
    assert (cell(x, before) - after).abs().max() > 2.0**-8  # the roundings are seen
