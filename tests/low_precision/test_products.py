"""The operands of each matrix product, against the products written out in plain PyTorch."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from product_helpers import LAYERS, layer_and_input
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from training_helpers import equal_bits

import low_precision as lp
from low_precision.rules import OPERANDS

pytestmark = pytest.mark.usefixtures("one_thread")


def results(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients with respect to input and parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("name", LAYERS)
def test_operands_of_all_digits_change_no_bit(name):
    """e8m23 is float32 by another name: what is left is how the products are computed."""
    layer, x = layer_and_input(name)
    rounded = lp.quantize_model(copy.deepcopy(layer), **{"products": "e8m23"})
    assert equal_bits(results(rounded, x), results(layer, x))


def q(x: torch.Tensor, fmt: str, dim: int = -1) -> torch.Tensor:
    return lp.quantize(x.detach(), fmt, dim=dim)


@pytest.mark.parametrize("fmt", ["float8", "e3m1", "mxfp8_e4m3", "mxfp4", "mxint8", "nvfp4", "bfp8"])
@pytest.mark.parametrize("shape", [(40, 48), (3, 20, 48)])
def test_linear_by_its_formulas(fmt, shape):
    """Groups of numbers that share a scale run along the sum of each product: features, outputs, rows."""
    torch.manual_seed(1)
    layer = lp.quantize_model(nn.Linear(48, 33), **{"products": fmt})
    x = (torch.randn(shape) * 10.0 ** torch.randint(-3, 3, shape)).requires_grad_()
    y = layer(x)
    error = torch.randn_like(y)
    y.backward(error)
    rows, errors, w = x.detach().flatten(0, -2), error.flatten(0, -2), layer.weight
    assert equal_bits([y.detach()], [F.linear(q(x, fmt, -1), q(w, fmt, 1), layer.bias).detach()])
    assert equal_bits([x.grad], [q(error, fmt, -1) @ q(w, fmt, 0)])
    assert equal_bits([w.grad], [q(errors, fmt, 0).t() @ q(rows, fmt, 0)])
    assert equal_bits([layer.bias.grad], [errors.sum(0)])


@pytest.mark.parametrize(("fmt", "by_line"), [("bfp8_row", True), ("bfp8_column", False)])
def test_one_scale_for_each_line_or_each_index_of_the_sum(fmt, by_line):
    torch.manual_seed(1)
    layer = lp.quantize_model(nn.Linear(48, 33), **{"products": fmt})
    x = (torch.randn(20, 48) * 10.0 ** torch.randint(-3, 3, (20, 48))).requires_grad_()
    y = layer(x)
    error = torch.randn_like(y)
    y.backward(error)

    def scaled(matrix: torch.Tensor, over: int) -> torch.Tensor:
        """A scale for each index of the dimension that stays, or for each of the sum's."""
        lines = matrix if (over == 1) == by_line else matrix.t()
        rounded = torch.stack([lp.quantize(line, "bfp8") for line in lines.detach()])
        return rounded if lines is matrix else rounded.t()

    w = layer.weight
    assert equal_bits([y.detach()], [F.linear(scaled(x, 1), scaled(w, 1), layer.bias).detach()])
    assert equal_bits([x.grad], [scaled(error, 1) @ scaled(w, 0)])
    assert equal_bits([w.grad], [scaled(error, 0).t() @ scaled(x, 0)])


@pytest.mark.parametrize("name", ["conv1d, same", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"])
@pytest.mark.parametrize("fmt", ["float8", "mxfp4", "nvfp4"])
def test_convolutions_by_their_formulas(name, fmt):
    """Groups run along channels, along outputs, and along the samples of the batch."""
    torch.manual_seed(2)
    make, shape = LAYERS[name]
    layer = make()
    rounded = lp.quantize_model(copy.deepcopy(layer), **{"products": fmt})
    x = torch.randn((40, *shape[1:])).requires_grad_()
    y = rounded(x)
    error = torch.randn_like(y)
    y.backward(error)
    inputs, outputs = (0, 1) if "transpose" in name else (1, 0)  # the weight's dimensions

    def plain(read: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The layer's output and the function that takes its gradients, with these in place of input and weight."""
        read, weight = read.detach().requires_grad_(), weight.detach().requires_grad_()
        return read, weight, torch.func.functional_call(layer, {"weight": weight}, (read,))

    w = layer.weight
    assert equal_bits([y.detach()], [plain(q(x, fmt, 1), q(w, fmt, inputs))[2].detach()])
    read, _, out = plain(x, q(w, fmt, outputs))
    assert equal_bits([x.grad], [torch.autograd.grad(out, read, q(error, fmt, 1))[0]])
    _, weight, out = plain(q(x, fmt, 0), w)
    assert equal_bits([rounded.weight.grad], [torch.autograd.grad(out, weight, q(error, fmt, 0))[0]])


@pytest.mark.parametrize("fmt", ["float8", "mxfp8_e4m3", "bfp8_row", "bfp8_column"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_stays(fmt, layout):
    layer = nn.Conv2d(40, 36, 3).to(memory_format=layout)
    x = torch.randn(3, 40, 7, 7).to(memory_format=layout).requires_grad_()
    plain, rounded = layer(x), lp.quantize_model(copy.deepcopy(layer), products=fmt)(x)
    assert rounded.stride() == plain.stride()
    (gradient,) = torch.autograd.grad(rounded.sum(), x)
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize("fmt", ["float8", "mxfp8_e4m3", "bfp8", "bfp8_row", "bfp8_column", "nvfp4"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(7, 4), (0, 7)),
        (lambda: nn.Linear(7, 4), (3, 0, 7)),
        (lambda: nn.Linear(0, 4), (3, 0)),
        (lambda: nn.Conv2d(3, 4, 3), (0, 3, 5, 5)),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_rows_and_no_features(make, shape, fmt):
    layer = make()
    x = torch.zeros(shape, requires_grad=True)
    assert equal_bits(
        results(lp.quantize_model(copy.deepcopy(layer), products=fmt), x.detach()), results(layer, x.detach())
    )


@pytest.mark.parametrize("site", OPERANDS)
def test_one_operand_alone(site):
    """It changes the result of its own product, and no other."""
    layer, x = layer_and_input("linear")
    plain = results(layer, x)
    rounded = results(lp.quantize_model(copy.deepcopy(layer), **{site: "float8"}), x)
    same = [torch.equal(a, b) for a, b in zip(rounded, plain, strict=True)]
    product = site.partition(".")[0]
    if product == "forward":  # the errors follow from the output
        assert not same[0]
    else:
        assert same == [True, product != "dgrad", product != "wgrad", True]


def test_products_stand_for_all_six_and_single_ones_win():
    layer, x = layer_and_input("linear")
    six = lp.quantize_model(copy.deepcopy(layer), **dict.fromkeys(OPERANDS, "float8"))
    all_of_them = lp.quantize_model(copy.deepcopy(layer), products="float8")
    assert equal_bits(results(six, x), results(all_of_them, x))
    but_one = {"wgrad.errors": "bfloat16", "products": "float8"}
    expected = lp.quantize_model(
        copy.deepcopy(layer), **dict.fromkeys(OPERANDS, "float8") | {"wgrad.errors": "bfloat16"}
    )
    assert equal_bits(results(lp.quantize_model(copy.deepcopy(layer), **but_one), x), results(expected, x))


def test_an_operand_is_rounded_from_the_stored_tensor():
    layer, x = layer_and_input("linear")
    stored = {"weights": "float8", "inputs": "float8", "activations": "float8", "errors": "float8"}
    without = results(lp.quantize_model(copy.deepcopy(layer), **stored), x)
    rounded = lp.quantize_model(copy.deepcopy(layer), **stored, products="float8")  # a value of the format stays
    assert equal_bits(results(rounded, x), without)


def network() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Linear(16, 4)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), head)


IMAGES = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1))
SETTINGS = {
    "float8": {"products": "float8"},
    "mxfp8": {"products": "mxfp8_e4m3"},
    "stored too": {"products": "nvfp4", "weights": "bfloat16", "inputs": "float16", "errors": "float8"},
    "by column": {"products": "bfp8_column"},
    "transformed": {
        "products": "mxfp4",
        "dgrad.weights": "forward.weights>mxfp6_e2m3",
        "wgrad.errors": "dgrad.errors",
        "transform": ["hadamard16:random", "wgrad=hadamard4:fixed:bfloat16"],
    },
}


def trained(model, optimizer, forward=None, steps=range(3)) -> list[torch.Tensor]:
    losses = []
    for _ in steps:
        optimizer.zero_grad()
        loss = (forward or model)(IMAGES.clone().requires_grad_()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.detach().clone() for p in model.parameters())]


def rounded_network(name: str, **settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = lp.quantize_model(network(), **SETTINGS[name], **settings, rounding="stochastic", seed=3)
    return model, lp.quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), model)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "how", ["eager", "fused", "reentrant", "not reentrant", "threads", "copy", "pickle", "replica"]
)
def test_the_same_bits_however_it_is_computed(name, how):
    expected = trained(*rounded_network(name))
    model, optimizer = rounded_network(name, **({"backend": how} if how in ("eager", "fused") else {}))
    forward = None
    if how in ("reentrant", "not reentrant"):
        forward = lambda x: checkpoint(model, x, use_reentrant=how == "reentrant")  # noqa: E731
    if how == "threads":
        torch.set_num_threads(2)
    if how == "copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    if how == "pickle":
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    if how == "replica":
        forward = nn.DataParallel(model)
    assert equal_bits(trained(model, optimizer, forward), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_bits_compiled(name):
    model, optimizer = rounded_network(name)
    assert equal_bits(trained(model, optimizer, torch.compile(model, backend="eager")), trained(*rounded_network(name)))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_goes_on_with_the_same_bits(name):
    model, optimizer = rounded_network(name)
    trained(model, optimizer)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = trained(model, optimizer)
    model, optimizer = rounded_network(name)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert equal_bits(trained(model, optimizer), expected)


def test_noise_of_each_operand_layer_pass_and_backward_pass():
    """Where all numbers are the same, what differs is noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    for p in model.parameters():
        nn.init.constant_(p, 1.1)
    lp.quantize_model(model, products="float8:stochastic", seed=1)
    read = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), named=None):
            if function is F.linear:
                read.extend(arguments[:2])
            return function(*arguments, **(named or {}))

    x = torch.full((64, 64), 1.1, requires_grad=True)
    with Watch():
        y = model(x)
        first = torch.autograd.grad(y, [x, *model.parameters()], torch.full_like(y, 1.1), retain_graph=True)
        second = torch.autograd.grad(y, [x, *model.parameters()], torch.full_like(y, 1.1))
        again = model(x)
    assert not torch.equal(y, again)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    flat = torch.stack([tensor.detach().flatten() for tensor in read if tensor.shape == (64, 64)])
    assert len(flat) >= 4
    off = torch.corrcoef(flat[[0, 1, 3]]) - torch.eye(3)  # x, W of the first layer, and of the second
    assert off.abs().max() < 0.1


def test_a_layer_that_multiplies_twice_has_noise_for_each():
    class Twice(nn.Linear):
        def forward(self, x):
            return torch.stack([F.linear(x, self.weight), F.linear(x, weight=self.weight, bias=None)])

    layer = lp.quantize_model(Twice(64, 64), **{"forward.inputs": "float8:stochastic"}, seed=1)
    one, two = layer(torch.full((64, 64), 1.1))
    assert not torch.equal(one, two)


def test_double_backward_passes_straight_through():
    """With operands of all digits it is torch's own, and rounded ones are followed through."""
    layer, x = layer_and_input("conv2d")

    def second(layer: nn.Module) -> list[torch.Tensor]:
        read = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(read).sin().sum(), read, create_graph=True)
        gradient.square().sum().backward()
        return [read.grad, *(p.grad for p in layer.parameters())]

    expected = second(copy.deepcopy(layer))
    wide = second(lp.quantize_model(copy.deepcopy(layer), products="e8m23"))
    for a, b in zip(wide, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    narrow = second(lp.quantize_model(copy.deepcopy(layer), products="float8"))
    assert all(0 < (a - b).norm() < 0.5 * b.norm() for a, b in zip(narrow, expected, strict=True))


def test_vmap_and_per_sample_gradients():
    layer, x = layer_and_input("linear")
    lp.quantize_model(layer, products="float8")
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample,)).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(3):
        alone = torch.func.grad(loss)(parameters, x[n])
        torch.testing.assert_close({name: g[n] for name, g in each.items()}, alone)


def test_frozen_tied_and_accumulated():
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    first.bias.requires_grad_(False)
    model = lp.quantize_model(nn.Sequential(first, second), products="float8")
    x = torch.randn(5, 8)
    for _ in range(2):
        model(x).sum().backward()
    once = copy.deepcopy(model)
    once.zero_grad()
    once(x).sum().backward()
    assert first.bias.grad is None
    torch.testing.assert_close(model[0].weight.grad, 2 * once[0].weight.grad)


@pytest.mark.parametrize("site", ["dgrad.errors", "wgrad.errors"])
def test_an_operand_that_overflows_counts_for_the_dynamic_loss_scale(site):
    """e4m3 ends at 448, and a loss scale starts at 65536."""
    model = lp.quantize_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), **{site: "float8_e4m3fn"})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = lp.quantize_optimizer(optimizer, model, loss_scale="dynamic")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.loss_scale.scale(model(torch.ones(2, 4)).sum()).backward()
    optimizer.step()
    assert (optimizer.loss_scale.skipped, optimizer.loss_scale.value) == (1, 32768)
    assert equal_bits([p.detach() for p in model.parameters()], before)


@pytest.mark.parametrize("paused", [False, True])
def test_a_model_inside_a_layer_of_another(paused):
    """The end of the inner layer is not that of the outer one."""
    inner = lp.quantize_model(nn.Linear(8, 8), products="float8")

    class Outer(nn.Linear):
        def forward(self, x):
            with lp.unquantized(inner) if paused else contextlib.nullcontext():
                inner(x)
            return super().forward(x)

    torch.manual_seed(0)
    outer, x = Outer(8, 8), torch.randn(4, 8)
    expected = F.linear(q(x, "float8"), q(outer.weight, "float8"), outer.bias)
    lp.quantize_model(outer, products="float8")
    assert equal_bits([outer(x).detach()], [expected.detach()])


def test_an_error_in_a_layer_leaves_nothing_behind():
    model, _ = rounded_network("float8")
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(1, 3, 8, 8))
    a, w = torch.full((1, 1), 1.1), torch.ones(1, 1)
    assert torch.equal(F.linear(a, w), a)  # not rounded: nobody stands between
    model(IMAGES)


def test_autocast_and_lower_matmul_precision():
    """The product is float32's, and its result is of the type that autocast gives."""
    layer, x = layer_and_input("linear")
    rounded = lp.quantize_model(copy.deepcopy(layer), products="float8")
    expected = rounded(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = rounded(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(rounded(x), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_print_shows_the_operands_where_there_are_products():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    lp.quantize_model(model, **{"forward.inputs": "mxfp8_e4m3", "dgrad.errors": "float8:stochastic"})
    assert "forward.inputs=mxfp8_e4m3:nearest, dgrad.errors=float8:stochastic" in str(model[0])
    assert "rounding" not in str(model[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward.input": "float8"}, r"unexpected keyword argument 'forward.input' \(did you mean forward.inputs\?\)"),
        ({"product": "float8"}, r"did you mean products\?"),
        ({"products": "floot8"}, "products: format: given floot8"),
        ({"products": "float8", "backend": "qtorch"}, "backend qtorch: site: given forward.inputs"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lp.quantize_model(nn.Linear(2, 2), **arguments)
