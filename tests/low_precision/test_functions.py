"""The functions that a rounded model calls: what each product reads, against the products written out."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_helpers import equal_bits

import low_precision as lp
from low_precision.clock import BatchPart
from low_precision.noise import Key
from low_precision.rules import OPERANDS

pytestmark = pytest.mark.usefixtures("one_thread")

N = 40  # more than a block of 32
OFFSETS = torch.tensor([16, N], dtype=torch.int32)


class Calls(nn.Module):
    """Computes something of what it reads and of a weight."""

    def __init__(self, compute):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, N))
        self.compute = compute

    def forward(self, x):
        return self.compute(x, self.weight)


FUNCTIONS = {
    "@": lambda x, w: x @ w,
    "reflected": lambda x, w: w.__rmatmul__(x),
    "matmul": torch.matmul,
    "linalg.matmul": torch.linalg.matmul,
    "matmul, rows of rows": lambda x, w: torch.matmul(x.view(4, 10, N), w),
    "matmul, weight first": lambda x, w: w @ x.view(2, N, N // 2),
    "matmul, broadcast": lambda x, w: torch.matmul(x.view(4, 1, 10, N), torch.stack([w, 2 * w])),
    "matmul, a vector": lambda x, w: x @ w[0],
    "matmul, a vector first": lambda x, w: x[0] @ w,
    "mm": torch.mm,
    "mm of inputs": lambda x, w: torch.mm(x * w, x),
    "mv": lambda x, w: torch.mv(x, w[1]),
    "dot": lambda x, w: torch.dot(x[0], w[1]),
    "vecdot": lambda x, w: torch.linalg.vecdot(x, w, dim=0),
    "inner": torch.inner,
    "bmm": lambda x, w: torch.bmm(x.view(4, 10, N), w.expand(4, N, N)),
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "tensordot, both": lambda x, w: torch.tensordot(x, w, ([0, 1], [1, 0])),
    "addmm": lambda x, w: torch.addmm(x[0], x, w, beta=0.5, alpha=2.0),
    "addmm_": lambda x, w: torch.zeros(N, N).addmm_(x, w),
    "addmm, beta of zero": lambda x, w: torch.addmm(torch.full((N, N), torch.nan), x, w, beta=0),
    "addmv": lambda x, w: torch.addmv(x[0], x, w[1]),
    "addbmm": lambda x, w: torch.addbmm(w, torch.stack([x, 2 * x]), torch.stack([w, w])),
    "baddbmm": lambda x, w: torch.baddbmm(x[None], x[None], w[None]),
    "einsum": lambda x, w: torch.einsum("ij,jk->ik", x, w),
    "einsum, implicit": lambda x, w: torch.einsum("ij,jk", x, w),
    "einsum, a list": lambda x, w: torch.einsum("ij,jk->ki", [x, w]),
    "einsum, by numbers": lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [2, 0]),
    "einsum, heads": lambda x, w: torch.einsum("qhd,khd->hqk", x.view(N, 4, 10), w.view(N, 4, 10)),
    "einsum, ellipsis": lambda x, w: torch.einsum("...j,jk->...k", x.view(4, 10, N), w),
    "einsum, three": lambda x, w: torch.einsum("ij,jk,kl->l", x, w, w),
    "einsum, diagonal": lambda x, w: torch.einsum("ii,ij->j", x, w),
    "einsum, broadcast": lambda x, w: torch.einsum("ij,kj->ik", x[:, :1], w),
    "einsum, a sum of one": lambda x, w: torch.einsum("ij,kl->l", x + 1, w),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w, x]),
    "chain_matmul": lambda x, w: torch.chain_matmul(x, w),
    "linear": F.linear,
    "linear with a bias": lambda x, w: F.linear(x, w, w[0]),
    "bilinear": lambda x, w: F.bilinear(x, x[:, :8], torch.stack([w[:, :8], w[:, 8:16]]), w[0, :2]),
    "conv1d": lambda x, w: F.conv1d(x.view(2, 20, N), w.view(10, 20, 8)),
    "conv2d, one image": lambda x, w: F.conv2d(x.view(16, 10, 10), w.view(25, 16, 2, 2), padding="same"),
    "conv_transpose2d": lambda x, w: F.conv_transpose2d(x.view(1, 16, 10, 10), w.view(16, 4, 5, 5), stride=2),
}
FUNCTIONS |= {
    "grouped_mm": lambda x, w: F.grouped_mm(x, w.view(2, N // 2, N).mT.contiguous(), offs=OFFSETS),
    "grouped_mm, matrices": lambda x, w: F.grouped_mm(x.view(2, 20, N), w.view(2, N, N // 2)),
    "attention": lambda x, w: F.scaled_dot_product_attention(x.view(2, 20, N), w.view(2, 20, N), 2 * w.view(2, 20, N)),
    "attention, causal": lambda x, w: F.scaled_dot_product_attention(x[None], w[None], x[None], is_causal=True),
    "attention, grouped": lambda x, w: F.scaled_dot_product_attention(
        x.view(1, 4, 10, N), w.view(1, 2, 20, N), x.view(1, 2, 20, N), enable_gqa=True, scale=0.1
    ),
}


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients with respect to input and weight."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    generator = torch.Generator().manual_seed(2)
    (y * torch.randn(y.shape, generator=generator)).sum().backward()
    return [y.detach(), x.grad, model.weight.grad]


def model_and_input(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Calls(FUNCTIONS[name]), torch.randn(N, N)


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("sites", [("products",), ("inputs", "activations", "errors"), ("products", "elementwise")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rounding_that_rounds_nothing_changes_nothing(name, sites):
    """e8m23 is float32 by another name: what is left is the order of float32 sums."""
    model, x = model_and_input(name)
    if "elementwise" in sites:
        compute = model.compute
        model.compute = lambda x, w: compute(x * 1.5, w)
    expected = results(copy.deepcopy(model), x)
    rounded = lp.quantize_model(model, **dict.fromkeys(sites, "e8m23"))
    for y, plain in zip(results(rounded, x), expected, strict=True):
        # Of a sum of 40 x 40 products, each rounded to 24 bits.
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=float(plain.abs().max()) * 1600 * 2**-24)


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("fmt", ["float8", "mxfp8_e4m3"])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "einsum, a sum of one"])  # all but cancels
def test_all_results_change_and_none_is_far_off(name, fmt):
    model, x = model_and_input(name)
    expected = results(copy.deepcopy(model), x)
    for site in ("products", "inputs"):
        rounded = lp.quantize_model(copy.deepcopy(model), **{site: fmt})
        for n, (y, plain) in enumerate(zip(results(rounded, x), expected, strict=True)):
            assert (site == "inputs" and n) or not torch.equal(y, plain)
            cosine = F.cosine_similarity(y.flatten(), plain.flatten(), 0)
            assert cosine > 0.9 or y.ndim == 0


def q(x: torch.Tensor, fmt: str, dim: int = -1) -> torch.Tensor:
    return lp.quantize(x.detach(), fmt, dim=dim)


def there_and_back(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The output, its error, and the gradients with respect to input and weight."""
    x = x.clone().requires_grad_()
    y = model(x)
    error = torch.randn_like(y)
    y.backward(error)
    return y.detach(), error, x.grad, model.weight.grad


@pytest.mark.parametrize("fmt", ["float8", "e3m1", "mxfp8_e4m3", "mxfp4", "nvfp4", "bfp8"])
def test_a_product_with_a_weight_by_its_formulas(fmt):
    """x W of a function: along features, along outputs, along rows; all leading dimensions are rows."""
    torch.manual_seed(1)
    model = lp.quantize_model(Calls(lambda x, w: x @ w[:, :33]), products=fmt)
    x, w = torch.randn(4, 20, N), model.weight[:, :33].detach()
    y, e, dx, dw = there_and_back(model, x)
    rows, errors = x.flatten(0, 1), e.flatten(0, 1)
    assert equal_bits([y], [q(x, fmt) @ q(w, fmt, 0)])
    assert equal_bits([dx], [q(e, fmt) @ q(w, fmt, 1).t()])
    assert equal_bits([dw[:, :33]], [q(rows, fmt, 0).t() @ q(errors, fmt, 0)])


@pytest.mark.parametrize("fmt", ["float8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("spelling", ["matmul", "bmm", "einsum"])
def test_a_product_of_two_inputs_by_its_formulas(fmt, spelling):
    """Both gradients are wgrad; matrices of a batch are each their own."""
    torch.manual_seed(1)
    compute = {
        "matmul": lambda a, b: a @ b,
        "bmm": torch.bmm,
        "einsum": lambda a, b: torch.einsum("bmk,bkn->bmn", a, b),
    }[spelling]
    model = lp.quantize_model(Calls(lambda x, w: compute(x[:, :36], x[:, 36:].mT.reshape(3, N, -1))), products=fmt)
    x = torch.randn(3, 70, N)
    y, e, dx, _ = there_and_back(model, x)
    a, b = x[:, :36], x[:, 36:].mT.reshape(3, N, -1)
    assert equal_bits([y], [q(a, fmt) @ q(b, fmt, 1)])
    assert equal_bits([dx[:, :36].contiguous()], [q(e, fmt) @ q(b, fmt, 2).mT])
    db = q(a, fmt, 1).mT @ q(e, fmt, 1)
    assert equal_bits([dx[:, 36:].contiguous()], [db.reshape(3, N, 34).mT.reshape(3, 34, N)])


def test_stored_sites_of_a_function():
    """inputs, activations, and the gradients with respect to both; a weight is not read as an input."""
    torch.manual_seed(1)
    model = lp.quantize_model(Calls(torch.matmul), inputs="float8", activations="e5m1", errors="e4m1")
    x = torch.randn(4, N)
    y, e, dx, dw = there_and_back(model, x)
    w = model.weight.detach()
    errors = q(e, "e4m1")
    assert equal_bits([y], [q(q(x, "float8") @ w, "e5m1")])
    assert equal_bits([dx], [q(errors @ w.t(), "e4m1")])
    assert equal_bits([dw], [q(x, "float8").t() @ errors])


def test_the_bias_of_addmm_is_added_in_float32():
    torch.manual_seed(1)
    model = lp.quantize_model(Calls(lambda x, w: torch.addmm(w[0], x, w)), products="float8", activations="bfloat16")
    x = torch.randn(4, N)
    w = model.weight.detach()
    assert torch.equal(model(x), q(q(x, "float8") @ q(w, "float8") + w[0], "bfloat16"))


WEIGHTS = {
    "a parameter": lambda x, w: x @ w,
    "a view": lambda x, w: x @ w.t()[:, :8],
    "an expanded view": lambda x, w: torch.bmm(x[None].expand(2, 4, N), w.expand(2, N, N)),
    "first": lambda x, w: w @ x.t(),
    "second of linear": lambda x, w: F.linear(x, w * 2),
}


@pytest.mark.parametrize("how", WEIGHTS)
def test_what_is_a_weight(how):
    """A parameter's memory, or the second argument of linear; else an input."""
    model = lp.quantize_model(Calls(WEIGHTS[how]), **{"forward.weights": "float8"})
    model(torch.randn(4, N))
    rows = lp.coverage(model).rows
    assert [row.tensor for row in rows if row.rule == "float8:nearest"] == ["forward.weights"]


def test_a_computed_factor_is_an_input():
    model = lp.quantize_model(Calls(lambda x, w: x @ (w * 2)), **{"forward.inputs": "float8"})
    x = torch.randn(4, N)
    assert torch.equal(model(x), q(x, "float8") @ q(model.weight * 2, "float8"))


class Network(nn.Module):
    """Layers and functions, some several times in one module."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.norm = (
            nn.Linear(N, N),
            Calls(FUNCTIONS["matmul"]),
            nn.LayerNorm(N, elementwise_affine=False),
        )

    def forward(self, x):
        h = self.norm(F.gelu(self.first(x)))
        h = self.norm(h + self.inner(self.inner(h)) @ self.inner.weight)
        scores = (h @ h.mT).softmax(-1)
        return F.scaled_dot_product_attention(h[None], h[None], scores @ h[None], dropout_p=0.1)


INPUT = torch.randn(6, N, generator=torch.Generator().manual_seed(1))
SCHEMES = {
    "float8": {"products": "float8", "inputs": "float8", "activations": "float8", "errors": "float8"},
    "mxfp8": {"products": "mxfp8_e4m3", "elementwise": "bfloat16"},
}


def trained(model, optimizer, forward=None, steps=3) -> list[torch.Tensor]:
    torch.manual_seed(5)  # of the dropout
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model if forward is None else forward)(INPUT.clone().requires_grad_()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.detach().clone() for p in model.parameters())]


def rounded_network(name: str, **settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = lp.quantize_model(Network(), **SCHEMES[name], **settings, rounding="stochastic", seed=3)
    return model, lp.quantize_optimizer(torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), model)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    "how", ["eager", "fused", "reentrant", "not reentrant", "a part", "threads", "copy", "pickle", "replica"]
)
def test_the_same_bits_however_it_is_computed(name, how):
    expected = trained(*rounded_network(name))
    model, optimizer = rounded_network(name, **({"backend": how} if how in ("eager", "fused") else {}))
    forward = None
    if how in ("reentrant", "not reentrant"):
        forward = lambda x: checkpoint(model, x, use_reentrant=how == "reentrant")  # noqa: E731
    if how == "a part":  # a function of the module's own, whose calls are the module's
        compute = FUNCTIONS["matmul"]
        model.inner.compute = lambda x, w: checkpoint(compute, x, w, use_reentrant=False)
    if how == "threads":
        torch.set_num_threads(2)
    if how == "copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    if how == "pickle":
        model.inner.compute = torch.matmul
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    if how == "replica":
        forward = nn.DataParallel(model)
    assert equal_bits(trained(model, optimizer, forward), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_the_same_bits_compiled(name):
    expected = trained(*rounded_network(name))
    model, optimizer = rounded_network(name)
    with pytest.warns(UserWarning, match="call it once before torch.compile"):
        compiled = trained(model, optimizer, torch.compile(model, backend="eager"))
    assert equal_bits(compiled, expected)


PARTED = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": torch.matmul,
    "attention": lambda x, w: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
    "gelu": lambda x, w: F.gelu(x * 1.5),
}


@pytest.mark.parametrize("name", PARTED)
def test_the_noise_of_a_row_is_that_of_its_place_in_the_whole_batch(name):
    """However many processes share the batch. Of the weights' gradient, the operands are the same, and not the sum."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, N)
    scheme = {"products": "float8:stochastic", "inputs": "e5m3:stochastic", "elementwise": "e5m3:stochastic"}
    scheme = {"elementwise": "float8:stochastic"} if name == "gelu" else scheme
    if name in ("linear", "matmul"):
        del scheme["elementwise"]

    def there_and_back_in(parts: int) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = lp.quantize_model(Calls(PARTED[name]), **scheme, seed=1)
        outputs, gradients, of_weight = [], [], []
        for n, rows in enumerate(x.chunk(parts)):
            model.low_precision.clock.part = BatchPart(len(rows), n * len(rows))
            model.low_precision.clock.calls.clear()  # another process
            rows = rows.clone().requires_grad_()
            y = model(rows)
            y.backward(torch.ones_like(y) * 0.3)
            outputs.append(y.detach())
            gradients.append(rows.grad)
            of_weight.append(model.weight.grad if model.weight.grad is not None else torch.zeros(1))
            model.weight.grad = None
        return [torch.cat(outputs), torch.cat(gradients), torch.stack(of_weight).sum(0)]

    (y, dx, dw), (y_whole, dx_whole, dw_whole) = there_and_back_in(4), there_and_back_in(1)
    assert equal_bits([y, dx], [y_whole, dx_whole])
    torch.testing.assert_close(dw, dw_whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_resumed_run_goes_on_with_the_same_bits(name):
    model, optimizer = rounded_network(name)
    trained(model, optimizer)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = trained(model, optimizer)
    model, optimizer = rounded_network(name)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert equal_bits(trained(model, optimizer), expected)


@pytest.mark.parametrize("site", ["inputs", "activations", "forward.inputs", "forward.weights"])
def test_each_call_has_noise_of_its_own(site):
    """Of calls in one pass, of passes, of training and evaluation, of backward passes."""
    fmt = "float8:stochastic"
    model = Calls(lambda x, w: torch.stack([x @ w, x @ w]))
    nn.init.constant_(model.weight, 1.1)
    lp.quantize_model(model, **{site: fmt}, seed=1)
    x = torch.full((N, N), 1.1)
    seen = [*model(x), *model(x), *model.eval()(x)]
    assert not any(torch.equal(a, b) for n, a in enumerate(seen) for b in seen[:n])


def test_noise_follows_from_seed_site_and_name():
    """Stochastic rounding by hand, with the keys that docs/sites.md tells."""
    torch.manual_seed(1)
    model = nn.Sequential(Calls(torch.matmul))
    x = torch.randn(4, N)
    lp.quantize_model(model, products="float8:stochastic", seed=7)
    y, e, dx, dw = there_and_back_of(model, x)

    def read(tensor, site, factor):
        key = Key.of(7, site, f"0:matmul[{factor}]").fold(0).fold(1)  # step 0, the first call in training
        return lp.quantize(tensor.detach(), "float8", "stochastic", key)

    w = model[0].weight.detach()
    assert equal_bits([y], [read(x, "forward.inputs", 0) @ read(w, "forward.weights", 1)])
    assert equal_bits([dx], [read(e, "dgrad.errors", 0) @ read(w, "dgrad.weights", 1).t()])
    assert equal_bits([dw], [read(x, "wgrad.inputs", 0).t() @ read(e, "wgrad.errors", 1)])


def there_and_back_of(model: nn.Sequential, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    y = model(x)
    error = torch.randn_like(y)
    y.backward(error)
    return y.detach(), error, x.grad, model[0].weight.grad


def test_functional_call_with_other_weights():
    model = lp.quantize_model(Calls(torch.matmul), **{"forward.weights": "float8"})
    other = torch.randn(N, N)
    x = torch.randn(4, N)
    y = torch.func.functional_call(model, {"weight": other}, (x,))
    assert torch.equal(y, x @ q(other, "float8"))


def test_vmap_takes_each_sample_as_alone():
    model = lp.quantize_model(Calls(lambda x, w: (x @ w) @ x.mT), products="float8", activations="float8")
    x = torch.randn(5, 4, N)
    assert torch.equal(torch.vmap(model)(x), torch.stack([model(sample) for sample in x]))


def test_double_backward():
    torch.manual_seed(0)
    model = Calls(lambda x, w: F.scaled_dot_product_attention(x[None], (x @ w)[None], x[None]))

    def second(model: nn.Module) -> list[torch.Tensor]:
        x = INPUT.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return [x.grad, model.weight.grad]

    # torch's own fused attention has no second derivative: it is compared with the plain way.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = second(copy.deepcopy(model))
    for a, b in zip(second(lp.quantize_model(model, products="e8m23")), expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_autocast_gives_its_own_type_from_a_float32_product():
    model = lp.quantize_model(Calls(torch.matmul), products="float8")
    x = torch.randn(4, N)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert torch.equal(y, expected.bfloat16())


def test_whole_numbers_and_what_else_is_no_float_are_left_alone():
    def compute(x, w):
        counts = torch.ones(2, 3, dtype=torch.int64) @ torch.ones(3, 2, dtype=torch.int64)
        waves = torch.ones(2, 2, dtype=torch.complex64) @ torch.ones(2, 2, dtype=torch.complex64)
        return x @ w + counts.sum() + waves.real.sum()

    model = lp.quantize_model(Calls(compute), products="float8", inputs="float8", elementwise="bfloat16")
    assert model(torch.randn(4, N)).isfinite().all()


def test_functions_outside_of_the_model_are_left_alone():
    model = lp.quantize_model(Calls(lambda x, w: x @ w + x), products="float4_e2m1fn", elementwise="float4_e2m1fn")
    a = torch.full((2, 2), 1.1)
    expected = a @ a
    model(torch.randn(4, N))
    assert torch.equal(a @ a, expected)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(4, 3))
    assert torch.equal(a @ a, expected)


def test_an_interrupted_pass_leaves_nothing_behind():
    """No hook of torch sees a KeyboardInterrupt."""

    def interrupted(x, w):
        raise KeyboardInterrupt

    model = lp.quantize_model(nn.Sequential(Calls(torch.matmul), Calls(interrupted)), products="float4_e2m1fn")
    a = torch.full((2, 2), 1.1)
    expected = a @ a
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(4, N))
    assert torch.equal(a @ a, expected)


def test_inside_unquantized_nothing_is_rounded():
    model = lp.quantize_model(Calls(torch.matmul), products="float8", elementwise="float8")
    x = torch.randn(4, N)
    with lp.unquantized(model):
        assert torch.equal(model(x), x @ model.weight)


def test_remove_takes_the_functions_back():
    model, x = Calls(torch.matmul), torch.randn(4, N)
    expected = model(x)
    lp.quantize_model(model, products="float8")
    assert not torch.equal(model(x), expected)
    lp.remove(model)
    assert torch.equal(model(x), expected)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_model_inside_the_pass_of_another_has_its_own_rules():
    torch.manual_seed(0)
    x = torch.randn(4, N)
    inner = lp.quantize_model(Calls(torch.matmul), products="float8")
    outer = lp.quantize_model(Calls(lambda x, w: inner(x) @ w), products="e4m1")
    expected = q(x, "float8") @ q(inner.weight, "float8")
    assert torch.equal(outer(x), q(expected, "e4m1") @ q(outer.weight, "e4m1"))


def test_every_operand_site_alone_changes_its_own_product():
    model, x = model_and_input("@")
    plain = there_and_back_seeded(copy.deepcopy(model), x)
    for site in OPERANDS:
        rounded = there_and_back_seeded(lp.quantize_model(copy.deepcopy(model), **{site: "float8"}), x)
        same = [torch.equal(a, b) for a, b in zip(rounded, plain, strict=True)]
        product = site.partition(".")[0]
        assert same == [product != "forward", product != "dgrad", product != "wgrad"], site


def there_and_back_seeded(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(2)
    y, _, dx, dw = there_and_back(model, x)
    return [y, dx, dw]
