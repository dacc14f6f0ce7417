"""Transforms of a product's operands: exact by their definition, without effect where nothing is rounded."""

import copy
import io
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from product_helpers import LAYERS, layer_and_input
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_helpers import equal_bits

import low_precision as lp
from low_precision import hadamard
from low_precision.noise import Key
from low_precision.transforms import SIGNS_OF_16, SIZES, Signs, Transform, transform_named, transforms_of

pytestmark = pytest.mark.usefixtures("one_thread")


def sylvester(size: int) -> list[list[int]]:
    """H_1 = 1, H_2N = [[H_N, H_N], [H_N, -H_N]]."""
    rows = [[1]]
    while len(rows) < size:
        rows = [row + row for row in rows] + [row + [-x for x in row] for row in rows]
    return rows


def matrix(size: int, signs=None) -> torch.Tensor:
    """diag(s) H / sqrt(N), float64."""
    s = torch.tensor(signs or [1] * size, dtype=torch.float64)
    return s.unsqueeze(1) * torch.tensor(sylvester(size), dtype=torch.float64) / math.sqrt(size)


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_sylvesters_with_signs_on_the_inputs(size):
    """Each column of the identity comes out exactly: one number, added to zeros, times the float of 1/sqrt(N)."""
    signs = hadamard.signs_from(Key(5), size)
    factor = torch.tensor(1 / math.sqrt(size), dtype=torch.float32)
    expected = torch.tensor([[s * h for h in row] for s, row in zip(signs, sylvester(size), strict=True)]) * factor
    assert equal_bits([hadamard.rotated(torch.eye(size), 1, size, signs)], [expected])
    assert equal_bits([hadamard.rotated(torch.eye(size), 0, size, signs)], [expected.t()])


@pytest.mark.parametrize("size", SIZES)
def test_the_order_of_additions_is_the_one_that_is_documented(size):
    """By plain Python, whose float64 sums of two float32 numbers, rounded to float32, are float32 sums."""

    def float32(x):
        return torch.tensor(x, dtype=torch.float64).float().double().item()

    torch.manual_seed(size)
    x, signs = torch.randn(size) * 10.0 ** torch.randint(-6, 6, (size,)), hadamard.signs_from(Key(1), size)
    z, step = [s * v for s, v in zip(signs, x.tolist(), strict=True)], 1
    while step < size:
        z = [float32(z[i] + z[i + step]) if not i & step else float32(z[i - step] - z[i]) for i in range(size)]
        step *= 2
    factor = float32(1 / math.sqrt(size))
    expected = torch.tensor([float32(v * factor) for v in z])
    for shape, dim in (((size,), 0), ((1, size), 1), ((size, 1), 0)):
        assert equal_bits([hadamard.rotated(x.reshape(shape), dim, size, signs).reshape(-1)], [expected])
    wide = x.unsqueeze(1).expand(size, 300)
    assert equal_bits([hadamard.rotated(wide, 0, size, signs)], [expected.unsqueeze(1).expand(size, 300)])


@pytest.mark.parametrize("length", [1, 15, 16, 40])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_missing_is_filled_with_zeros_and_goes_again_on_the_way_back(length, parts):
    torch.manual_seed(0)
    x = torch.randint(-99, 99, (3, parts * length, 5)).float()
    z = hadamard.rotated(x, 1, 16, SIGNS_OF_16, parts)
    assert z.shape == (3, hadamard.filled_length(parts * length, 16, parts), 5)
    # Whole numbers, and a factor of 1/4: all is exact, but for the sign of a zero.
    assert torch.equal(hadamard.rotated_back(z, 1, 16, SIGNS_OF_16, parts, parts * length), x)
    filled = F.pad(x.unflatten(1, (parts, length)), (0, 0, 0, -length % 16)).double()
    blocks = filled.unflatten(2, (-1, 16))
    expected = torch.einsum("apbic,ij->apbjc", blocks, matrix(16, SIGNS_OF_16)).flatten(1, 3)
    assert torch.equal(z.double(), expected)


SHAPES = [
    ((1,), None),
    ((77,), None),
    ((7, 100), None),
    ((100, 37), None),
    ((64, 300), (1, 0)),
    ((3, 40, 5, 5), (0, 2, 3, 1)),
    ((40, 3, 5), (2, 1, 0)),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("shape", "order"), SHAPES)
@pytest.mark.parametrize("every_other", [False, True])
def test_the_engines_give_the_same_bits_in_the_same_layout(size, shape, order, every_other):
    torch.manual_seed(size)
    x = torch.randn(shape) * 10.0 ** torch.randint(-8, 8, shape)
    x[..., 0] = math.inf
    if order:  # of memory
        x = x.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])
    x = x[..., ::2] if every_other else x
    signs = hadamard.signs_from(Key(size), size)
    for dim in range(x.ndim):
        filled = hadamard.filled_length(x.shape[dim], size)
        eager, fused = (hadamard.rotated(x, dim, size, signs, 1, backend) for backend in ("eager", "fused"))
        assert eager.shape[dim] == filled
        assert torch.equal(eager.nan_to_num(7.0), fused.nan_to_num(7.0))
        assert torch.equal(eager.isnan(), fused.isnan())
        assert eager.stride() == fused.stride()
        back = [hadamard.rotated_back(fused, dim, size, signs, 1, filled, backend) for backend in ("eager", "fused")]
        assert torch.equal(*(z.nan_to_num(7.0) for z in back))
    if x.shape[-1] % size == 0:
        assert hadamard.rotated(x, x.ndim - 1, size).stride() == torch.empty_like(x).stride()


def test_signs_of_transformer_engine():
    assert "".join("+" if sign > 0 else "-" for sign in SIGNS_OF_16) == "+++-+------+-+--"
    assert hadamard.fixed_signs(0, 16) == hadamard.fixed_signs(9, 16) == SIGNS_OF_16
    assert hadamard.fixed_signs(0, 32) != hadamard.fixed_signs(9, 32)
    assert hadamard.fixed_signs(0, 32) == hadamard.fixed_signs(0, 32)


def test_signs_are_fair():
    signs = [sign for key in range(2000) for sign in hadamard.signs_from(Key(key), 256)]
    assert set(signs) == {1, -1}
    assert abs(sum(signs)) < 5 * math.sqrt(len(signs))  # a false alarm in 10**6
    by_place = torch.tensor(signs).view(2000, 256).sum(0)
    assert by_place.abs().max() < 6.5 * math.sqrt(2000)
    neighbours = torch.tensor(signs).view(2000, 256)
    assert (neighbours[:, 1:] * neighbours[:, :-1]).sum().abs() < 5 * math.sqrt(2000 * 255)


def test_gradients_are_those_of_the_matrix():
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    signs = SIGNS_OF_16
    assert torch.autograd.gradcheck(lambda x: hadamard.rotated(x, 1, 16, signs), x)
    assert torch.autograd.gradgradcheck(lambda x: hadamard.rotated(x, 1, 16, signs) ** 2, x)
    batch = torch.randn(4, 3, 20)
    each = torch.stack([hadamard.rotated(sample, 1, 16, signs) for sample in batch])
    assert equal_bits([torch.vmap(lambda x: hadamard.rotated(x, 1, 16, signs))(batch)], [each])
    last = torch.vmap(lambda x: hadamard.rotated(x, 0, 16, signs), in_dims=1)(batch[0])
    assert equal_bits([last], [hadamard.rotated(batch[0].t(), 1, 16, signs)])


# Products


def results(model, inputs, error=None):
    """The result, and the gradients with respect to inputs and parameters."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = model(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.ones_like(y) if error is None else error)
    return [y.detach(), *(x.grad for x in inputs), *(p.grad for p in model.parameters())]


class Calls(nn.Module):
    def __init__(self, function, parameter=None):
        super().__init__()
        self.function = function
        if parameter is not None:
            self.w = nn.Parameter(parameter)

    def forward(self, *x):
        return self.function(*x, self.w) if hasattr(self, "w") else self.function(*x)


def _random(*shape):
    return torch.randn(*shape)


FUNCTIONS = {
    "matmul": (lambda: Calls(torch.matmul), [(5, 7), (7, 6)]),
    "matmul, rows": (lambda: Calls(torch.matmul), [(2, 3, 5, 7), (7, 6)]),
    "bmm": (lambda: Calls(torch.bmm), [(3, 5, 7), (3, 7, 6)]),
    "mv": (lambda: Calls(torch.mv), [(5, 7), (7,)]),
    "dot": (lambda: Calls(torch.dot), [(7,), (7,)]),
    "inner": (lambda: Calls(torch.inner), [(2, 7), (3, 4, 7)]),
    "tensordot": (lambda: Calls(lambda a, b: torch.tensordot(a, b, ([0, 2], [1, 0]))), [(3, 4, 5), (5, 3, 2)]),
    "einsum": (lambda: Calls(lambda a, b: torch.einsum("bqhd,bkhd->bhqk", a, b)), [(2, 5, 3, 7), (2, 4, 3, 7)]),
    "einsum, two sums": (lambda: Calls(lambda a, b: torch.einsum("bij,jic->cb", a, b)), [(2, 5, 3), (3, 5, 4)]),
    "einsum, a weight": (lambda: Calls(lambda a, w: torch.einsum("bi,oi->bo", a, w), _random(6, 9)), [(5, 9)]),
    "addmm": (lambda: Calls(torch.addmm), [(5, 6), (5, 7), (7, 6)]),
    "bilinear": (lambda: nn.Bilinear(5, 7, 4), [(6, 5), (6, 7)]),
    "attention": (lambda: Calls(F.scaled_dot_product_attention), [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)]),
    "multi-head attention": (lambda: nn.MultiheadAttention(12, 3, batch_first=True), [(2, 5, 12)] * 3),
    "lstm": (lambda: nn.LSTM(5, 7, 2, bidirectional=True), [(4, 3, 5)]),
    "gru": (lambda: nn.GRU(5, 7), [(4, 3, 5)]),
    "lstm cell": (lambda: nn.LSTMCell(5, 7), [(3, 5)]),
}
KINDS = [*LAYERS, *FUNCTIONS]


def kind_of(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    if name in LAYERS:
        layer, x = layer_and_input(name)
        return layer, [x]
    torch.manual_seed(0)
    make, shapes = FUNCTIONS[name]
    return make(), [torch.randn(shape) for shape in shapes]


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference, against the largest number of each tensor."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


REFERENCES = {"dgrad.weights": "forward.weights", "wgrad.inputs": "forward.inputs", "wgrad.errors": "dgrad.errors"}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("transform", ["hadamard16:fixed", "hadamard8:random", "hadamard2"])
@pytest.mark.parametrize("references", [{}, REFERENCES], ids=["", "references"])
def test_without_rounding_a_product_is_what_it_was(name, transform, references):
    """Each number of z = x H / sqrt(N) has log2 N + 1 roundings, so the products' errors are a few times float32's."""
    if name == "lstm cell" and references:
        references = {"dgrad.weights": "forward.weights"}
    model, inputs = kind_of(name)
    plain = results(copy.deepcopy(model), inputs)
    sites = references if name in LAYERS else {k: v for k, v in references.items() if "errors" not in k}
    if name not in LAYERS and "w" not in dict(model.named_parameters()):
        sites = {}
    got = results(lp.quantize_model(copy.deepcopy(model), transform=transform, **sites), inputs)
    assert difference(got, plain) < 64 * torch.finfo(torch.float32).eps
    if name in ("linear", "conv2d", "bmm", "lstm"):
        assert not equal_bits(got, plain)  # it was there


def H(x, dim, size=16, signs=SIGNS_OF_16):
    return hadamard.rotated(x.detach(), dim, size, signs)


def q(x, fmt, dim=-1):
    return lp.quantize(x.detach(), fmt, dim=dim)


def test_linear_by_its_formulas():
    """Lengths that are no multiples of 16, and blocks of 32 that are cut after the filling."""
    torch.manual_seed(1)
    layer, fmt = nn.Linear(40, 24), "mxfp8_e4m3"
    x, e = torch.randn(2, 9, 40, requires_grad=True), torch.randn(2, 9, 24)
    model = lp.quantize_model(copy.deepcopy(layer), products=fmt, transform="hadamard16:fixed")
    y = model(x)
    y.backward(e)
    rows, errors, w = x.detach().flatten(0, 1), e.flatten(0, 1), layer.weight
    y_rows = F.linear(q(H(rows, 1), fmt, 1), q(H(w, 1), fmt, 1), layer.bias)
    assert equal_bits([y.detach().flatten(0, 1)], [y_rows.detach()])
    assert equal_bits([x.grad.flatten(0, 1)], [q(H(errors, 1), fmt, 1) @ q(H(w, 0), fmt, 0)])
    assert equal_bits([model.weight.grad], [q(H(errors, 0), fmt, 0).t() @ q(H(rows, 0), fmt, 0)])
    assert equal_bits([model.bias.grad], [errors.sum(0)])


def test_only_the_product_that_is_named():
    torch.manual_seed(1)
    layer, fmt, e, x = nn.Linear(32, 32, bias=False), "mxfp4", torch.randn(32, 32), torch.randn(32, 32)
    for transform in (
        "wgrad=hadamard16:fixed",
        {"wgrad": "hadamard16:fixed"},
        ["hadamard32", "wgrad=hadamard16:fixed"],
    ):
        model = lp.quantize_model(copy.deepcopy(layer), products=fmt, transform=transform)
        y, _, dw = results(model, [x], e)
        assert equal_bits([dw], [q(H(e, 0), fmt, 0).t() @ q(H(x, 0), fmt, 0)])
        same = equal_bits([y], [F.linear(q(x, fmt), q(layer.weight, fmt)).detach()])
        assert same == (not isinstance(transform, list))


def test_a_reference_into_a_transformed_product_is_rotated_back():
    """As Quartet does: forward in the space of one transform, backward in that and along another one besides."""
    torch.manual_seed(1)
    layer, x, e = nn.Linear(48, 64, bias=False), torch.randn(32, 48), torch.randn(32, 64)
    sites = {"forward.inputs": "mxfp4", "forward.weights": "mxfp6_e2m3", "dgrad.errors": "mxfp8_e4m3"}
    sites |= {
        "dgrad.weights": "forward.weights>mxfp8_e5m2",
        "wgrad.inputs": "forward.inputs",
        "wgrad.errors": "bfloat16",
    }
    model = lp.quantize_model(layer, transform=["forward=hadamard32", "dgrad=hadamard16:fixed"], **sites)
    y, dx, dw = results(model, [x], e)
    read_x, read_w = q(H(x, 1, 32, None), "mxfp4"), q(H(layer.weight, 1, 32, None), "mxfp6_e2m3")
    assert read_x.shape == (32, 64)  # filled
    assert equal_bits([y], [F.linear(read_x, read_w)])
    dx_rotated = q(H(e, 1), "mxfp8_e4m3") @ q(H(read_w, 0), "mxfp8_e5m2", 0)
    assert equal_bits([dx], [hadamard.rotated_back(dx_rotated, 1, 32, None, 1, 48)])
    dw_rotated = q(e, "bfloat16").t() @ read_x
    assert equal_bits([dw], [hadamard.rotated_back(dw_rotated, 1, 32, None, 1, 48)])


def test_an_error_that_refers_to_a_transformed_product():
    torch.manual_seed(1)
    layer, x, e = nn.Linear(48, 40, bias=False), torch.randn(32, 48), torch.randn(32, 40)
    sites = {"dgrad.errors": "mxfp8_e4m3", "wgrad.errors": "dgrad.errors"}
    model = lp.quantize_model(layer, transform="dgrad=hadamard16:fixed", **sites)
    _, dx, dw = results(model, [x], e)
    read = q(H(e, 1), "mxfp8_e4m3")
    assert equal_bits([dx], [read @ H(layer.weight, 0)])
    assert equal_bits([dw], [hadamard.rotated_back(read.t() @ x, 0, 16, SIGNS_OF_16, 1, 40)])


def test_what_saturates_with_the_scale_quest_has_no_gradient():
    torch.manual_seed(1)
    fmt = "float4_e2m1fn@32@quest"
    layer, x, e = nn.Linear(64, 32, bias=False), torch.randn(32, 64), torch.randn(32, 32)
    x[:, 3] *= 10
    sites = {"forward.inputs": fmt, "forward.weights": fmt}

    def mask(z):
        groups = z.double().unflatten(-1, (-1, 32))
        deviation = (groups.square().mean(-1, keepdim=True) - groups.mean(-1, keepdim=True) ** 2).sqrt()
        scale = 2.0 ** (deviation * (2.92247856 / 6) + 1e-8).log2().floor()
        return ((groups / scale).abs() < 6).float().flatten(-2)

    w = layer.weight.detach()
    model = lp.quantize_model(copy.deepcopy(layer), **sites)
    _, dx, dw = results(model, [x], e)
    assert 0 < (mask(x) == 0).sum() < x.numel()
    assert equal_bits([dx, dw], [(e @ w) * mask(x), (e.t() @ x) * mask(w)])
    references = {"dgrad.weights": "forward.weights", "wgrad.inputs": "forward.inputs"}
    model = lp.quantize_model(copy.deepcopy(layer), transform="forward=hadamard32", **sites, **references)
    _, dx, dw = results(model, [x], e)
    z, zw = H(x, 1, 32, None), H(w, 1, 32, None)
    back = [(e @ q(zw, fmt)) * mask(z), (e.t() @ q(z, fmt)) * mask(zw)]
    assert equal_bits([dx, dw], [H(rotated, 1, 32, None) for rotated in back])  # H is its own inverse
    model = lp.quantize_model(copy.deepcopy(layer), transform="forward=hadamard32", **sites)
    _, dx, _ = results(model, [x], e)
    assert equal_bits([dx], [H(H(e @ w, 1, 32, None) * mask(z), 1, 32, None)])


def test_the_result_of_a_transform_may_be_bfloat16():
    torch.manual_seed(1)
    layer, x, e = nn.Linear(32, 16, bias=False), torch.randn(48, 32), torch.randn(48, 16)
    model = lp.quantize_model(layer, transform="wgrad=hadamard16:fixed:bfloat16", **{"wgrad.inputs": "mxfp4"})
    dw = results(model, [x], e)[2]
    z, ze = (H(t, 0).bfloat16().float() for t in (x, e))
    assert equal_bits([dw], [ze.t() @ q(z, "mxfp4", 0)])


# Random signs


def seen_signs(model, x, backward=1):
    """The signs of each transform of a run through a model, in order."""
    seen, signs_from = [], hadamard.signs_from

    def noted(key, size):
        seen.append(signs_from(key, size))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hadamard, "signs_from", noted)
        y = model(x)
        for _ in range(backward):
            y.sum().backward(retain_graph=True)
    return seen


def test_random_signs_are_one_for_both_operands_and_others_each_time():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    lp.quantize_model(model, transform="hadamard64:random", products="float8", seed=5)
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.0), model)
    x = torch.randn(64, 64, requires_grad=True)
    seen = seen_signs(model, x, backward=2)
    optimizer.step()
    seen += seen_signs(model, x)
    # Two layers, three products, of which the two of the way back twice; then a step with all three.
    assert len(seen) == 2 * 2 * (1 + 2 * 2 + 3)
    assert seen[::2] == seen[1::2]  # both operands
    assert len(set(seen)) == len(seen) // 2  # by step, layer, product, and backward pass
    fresh = lp.quantize_model(nn.Sequential(nn.Linear(64, 64)), transform="hadamard64:random", seed=5)
    again = lp.quantize_model(nn.Sequential(nn.Linear(64, 64)), transform="hadamard64:random", seed=5)
    assert seen_signs(fresh, x) == seen_signs(again, x) != seen_signs(again, x)


def test_attentions_two_gradients_have_signs_of_their_own():
    model = lp.quantize_model(Calls(torch.bmm), transform="wgrad=hadamard64:random", seed=5)
    a, b = torch.randn(2, 64, 64, requires_grad=True), torch.randn(2, 64, 64, requires_grad=True)
    seen, signs_from = [], hadamard.signs_from
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hadamard, "signs_from", lambda key, size: seen.append(signs_from(key, size)) or seen[-1])
        model(a, b).sum().backward()
    assert len(seen) == 4
    assert len(set(seen)) == 2


def trained(model, steps, state=None, recomputed=False):
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    if state is not None:
        saved = torch.load(io.BytesIO(state), weights_only=False)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(24, 20)
        optimizer.zero_grad()
        y = checkpoint(model, x, use_reentrant=False) if recomputed else model(x)
        y.square().mean().backward()
        optimizer.step()
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    return list(model.state_dict().values()), buffer.getvalue()


def fresh(seed=1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 8))
    sites = {"products": "mxfp4:stochastic", "dgrad.weights": "forward.weights>mxfp4:stochastic"}
    return lp.quantize_model(model, seed=seed, transform=["hadamard16:random", "forward=hadamard32:fixed"], **sites)


def test_a_resumed_run_has_its_bits():
    whole, _ = trained(fresh(), range(6))
    _, state = trained(fresh(), range(3))
    resumed, _ = trained(fresh(), range(3, 6), state)
    assert equal_bits(whole, resumed)
    assert not equal_bits(whole, trained(fresh(seed=2), range(6))[0])


def test_what_is_computed_again_has_the_same_bits():
    assert equal_bits(trained(fresh(), range(3))[0], trained(fresh(), range(3), recomputed=True)[0])


def test_gradients_of_gradients():
    torch.manual_seed(0)
    layer, x = nn.Linear(20, 12), torch.randn(5, 20, requires_grad=True)
    plain, rounded = copy.deepcopy(layer), lp.quantize_model(layer, transform="hadamard16:random", products="e8m23")

    def second(model):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *model.parameters()])

    assert difference(list(second(rounded)), list(second(plain))) < 64 * torch.finfo(torch.float32).eps


def test_vmap_transforms_each_sample_as_alone():
    torch.manual_seed(0)
    model = lp.quantize_model(nn.Linear(20, 12), transform="hadamard16:fixed", products="float8")
    batch = torch.randn(3, 5, 20)
    each = torch.stack([model(x) for x in batch])
    # The matrix product of a batch may add in another order.
    assert torch.allclose(torch.vmap(model)(batch), each, rtol=1e-6, atol=1e-6)


# Types of two bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", ["float8", "mxfp8_e4m3", "nvfp4", "float8_e4m3fn@tensor"])
def test_two_byte_operands_are_widened_and_the_result_is_of_their_type(dtype, fmt):
    torch.manual_seed(0)
    a, b = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((3, 5, 32), (3, 32, 6)))
    model = lp.quantize_model(Calls(torch.bmm), products=fmt, transform="wgrad=hadamard16:fixed")
    y = model(a, b)
    e = torch.randn_like(y)
    y.backward(e)
    wide_a, wide_b = (x.detach().float().requires_grad_() for x in (a, b))
    again = lp.quantize_model(Calls(torch.bmm), products=fmt, transform="wgrad=hadamard16:fixed")
    wide = again(wide_a, wide_b)
    wide.backward(e.float())
    assert y.dtype == a.grad.dtype == b.grad.dtype == dtype
    assert equal_bits([y.detach(), a.grad, b.grad], [x.to(dtype) for x in (wide.detach(), wide_a.grad, wide_b.grad)])


def test_two_types_are_torchs_own_error():
    model = lp.quantize_model(Calls(torch.matmul), products="float8")
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(2, 3), torch.randn(3, 2).bfloat16())


# Words


@pytest.mark.parametrize(
    "text",
    ["hadamard2", "hadamard256:random", "hadamard16:fixed", "hadamard16:fixed:bfloat16", "hadamard32:bfloat16"],
)
def test_texts(text):
    assert str(transform_named(text)) == text
    assert transform_named(text) == transform_named(str(transform_named(text)))


def test_what_they_mean():
    assert transform_named("none") is None
    assert transforms_of("hadamard16") == dict.fromkeys(("forward", "dgrad", "wgrad"), Transform(16))
    assert transforms_of(["hadamard16:fixed", "dgrad=none", "forward=hadamard8"]) == {
        "forward": Transform(8),
        "wgrad": Transform(16, Signs.FIXED),
    }
    assert transforms_of({"wgrad": Transform(16), "forward": None, "dgrad": "none"}) == {"wgrad": Transform(16)}
    assert transforms_of("wgrad=hadamard16,forward=hadamard2") == {"forward": Transform(2), "wgrad": Transform(16)}
    assert transforms_of(None) == transforms_of([]) == transforms_of("none") == {}
    assert [transform_named(text).draws for text in ("hadamard16", "hadamard16:fixed", "hadamard8:fixed")] == [
        False,
        False,
        True,
    ]
    assert Fraction(1, 4) == Fraction(1 / math.sqrt(16))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hadamard3", "given hadamard3"),
        ("hadamard512", "given hadamard512"),
        ("hadamrd16", "did you mean hadamard16"),
        ("hadamard16:fxied", "did you mean hadamard16:fixed"),
        ("wgrd=hadamard16", "did you mean wgrad"),
        ("hadamard16:random:float8", "given hadamard16:random:float8"),
        ({"backward": "none"}, "given backward"),
        ("", "given ''"),
    ],
)
def test_bad_ones_are_named(spec, message):
    with pytest.raises(lp.SettingError, match=message):
        lp.quantize_model(nn.Linear(2, 2), transform=spec)


def test_other_types():
    for spec in (16, [16], {"wgrad": 16}):
        with pytest.raises(TypeError, match="transform"):
            lp.quantize_model(nn.Linear(2, 2), transform=spec)
    with pytest.raises(lp.SettingError, match="hadamard7"):
        Transform(7)


# What is said


def test_print_and_coverage_show_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) @ x.mT

    model = lp.quantize_model(Block(), products="float8", transform="wgrad=hadamard16:fixed")
    x = torch.zeros(2, 4, requires_grad=True)
    coverage = lp.coverage(model, x)
    rows = {(row.module, row.tensor): row for row in coverage.rows}
    assert rows["layer", "wgrad.inputs"].transform == "hadamard16:fixed"
    assert rows["layer", "wgrad.inputs"].rule == "float8:nearest"
    assert rows["layer", "forward.inputs"].transform == ""
    assert "float8:nearest with hadamard16:fixed" in str(coverage)
    model(x)
    assert "wgrad=hadamard16:fixed" in repr(model.layer)
    assert "wgrad.errors=float8:nearest with hadamard16:fixed" in repr(model)


def test_layers_that_are_left_alone_are_not_transformed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    plain, x = copy.deepcopy(model), torch.randn(5, 20)
    layers = {"1": None, "2": {"products": None}}
    lp.quantize_model(model, products="float8", transform="hadamard16:random", layers=layers)
    for n, same in enumerate([False, True, True, False]):
        assert equal_bits([model[n](x)], [plain[n](x)]) == same
    chosen = lp.quantize_model(copy.deepcopy(plain), transform="hadamard16:random", layers=["0"])
    assert [equal_bits([chosen[n](x)], [plain[n](x)]) for n in (0, 1)] == [False, True]


def test_a_transform_that_reaches_nothing_is_an_error():
    model = lp.quantize_model(Calls(torch.bmm), transform="dgrad=hadamard16")
    a = torch.zeros(1, 2, 2, requires_grad=True)
    model(a, a)
    with pytest.raises(lp.SettingError, match=r"transform: given dgrad=hadamard16.*forward, wgrad"):
        model.low_precision.check_step()
    with pytest.raises(lp.SettingError, match=r"transform: given forward=hadamard16.*none"):
        lp.quantize_model(nn.Sequential(nn.ReLU()), transform="forward=hadamard16")(a)
    lp.quantize_model(Calls(torch.bmm), transform="hadamard16")(a, a)  # all that there are: it has some
    with pytest.raises(lp.SettingError, match="backend qtorch: transform"):
        lp.quantize_model(nn.Linear(2, 2), transform="hadamard16", backend="qtorch")
    with pytest.raises(ValueError, match="rounded already"):
        lp.quantize_model(lp.quantize_model(nn.Linear(2, 2), weights="float8"), transform="hadamard16")
