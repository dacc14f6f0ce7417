"""What other people's models showed: a test for each mend, without their libraries."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import low_precision as lp

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = dict.fromkeys(("weights", "inputs", "activations", "errors", "elementwise"), "bfloat16")


class Calls(nn.Module):
    """A layer, then a function of what it gives."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(8, 8), function

    def forward(self, x):
        return self.function(self.layer(x))


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_keys_and_values_of_grouped_queries_are_known_as_rounded():
    def attend(x):  # (2, 6, 8) -> 4 heads of queries, 2 of keys and values
        heads = x.view(2, 6, 4, 2).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads[:, :2], heads[:, 2:], enable_gqa=True)

    model = lp.quantize_model(Calls(attend), **EVERYTHING)
    model(normal(2, 6, 8))
    assert lp.coverage(model).not_rounded == ()
    products = [row for row in lp.coverage(model).rows if row.function in ("scores", "values")]
    assert {row.tensor for row in products} >= {"forward.inputs", "wgrad.inputs"}


def test_counts_of_a_histogram_are_not_rounded():
    def tokens_of_experts(x):  # a mixture of experts hands its tokens out by these numbers
        expert = torch.where(torch.arange(72) < 35, 0.0, 1.0) + 0 * x.flatten()
        return torch.histc(expert, bins=2, min=0, max=1)

    model = lp.quantize_model(Calls(tokens_of_experts), elementwise="float8")
    counts = model(normal(9, 8))
    assert counts.tolist() == [35, 37]
    assert lp.quantize(counts, "float8").tolist() == [32, 40]


def test_kernels_of_attention_are_products_that_are_not_rounded():
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    model = lp.quantize_model(Calls(lambda x: 2 * kernel(*[x.view(1, 2, 6, 8)] * 3)[0]), **EVERYTHING)
    with pytest.warns(UserWarning, match="not rounded: scaled_dot_product_flash_attention_for_cpu in Calls"):
        model(normal(12, 8))
    assert [(row.function, row.tensor) for row in lp.coverage(model).not_rounded] == [
        ("scaled_dot_product_flash_attention_for_cpu", "forward.inputs")
    ]


def test_a_format_that_autocast_cannot_hold_is_told_from_inside_an_operator():
    model = lp.quantize_model(Calls(lambda x: x * 0.5), elementwise="float16")
    message = r":mul: quantize to float16: given torch.bfloat16, allowed: a torch.float32 tensor"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
        model(normal(2, 8))


@pytest.mark.parametrize("kept", ["accumulator", "compensation"])
def test_a_weight_that_was_resized_is_refused_where_something_stands_behind_it(kept):
    """As resize_token_embeddings does it."""
    table = nn.Embedding(5, 4)
    lp.quantize_model(table, weights="float8", **{kept: "bfloat16"})
    table.weight.data = torch.ones(7, 4)
    with pytest.raises(RuntimeError, match=r"of shape \(5, 4\) has the shape \(7, 4\) since its model was quantized"):
        table(torch.tensor([6]))


BY_NAME = {
    "mm": lambda x: torch.mm(input=x, mat2=x),
    "bmm": lambda x: x.view(1, 8, 8).bmm(mat2=x.view(1, 8, 8)),
    "mv": lambda x: torch.mv(input=x, vec=x[0]),
    "dot": lambda x: x[0].dot(tensor=x[1]),
    "matmul": lambda x: x.matmul(other=x),
    "inner": lambda x: torch.inner(input=x, other=x),
    "vecdot": lambda x: torch.linalg.vecdot(x=x, y=x, dim=0),
    "tensordot": lambda x: torch.tensordot(a=x, b=x, dims=1),
    "multi_dot": lambda x: torch.linalg.multi_dot(tensors=[x, x, x]),
    "addmm": lambda x: torch.addmm(input=x, mat1=x, mat2=x, beta=2, alpha=0.5),
    "addmv": lambda x: torch.addmv(input=x[0], mat=x, vec=x[1]),
    "baddbmm": lambda x: x.view(1, 8, 8).baddbmm(batch1=x.view(1, 8, 8), batch2=x.view(1, 8, 8)),
    "addbmm": lambda x: x.addbmm(batch1=x.view(1, 8, 8), batch2=x.view(1, 8, 8)),
    "addmm_": lambda x: x.clone().addmm_(mat1=x, mat2=x),
    "linear": lambda x: F.linear(input=x, weight=x, bias=x[0]),
    "conv1d": lambda x: F.conv1d(input=x.view(1, 8, 8), weight=x.view(8, 8, 1), bias=x[0]),
    "bilinear": lambda x: F.bilinear(input1=x, input2=x, weight=x.view(1, 8, 8)),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_arguments_by_torchs_names(name):
    plain = Calls(BY_NAME[name])
    expected = plain(normal(8, 8))
    rounded = lp.quantize_model(plain, products="e8m23", inputs="e8m23")
    torch.testing.assert_close(rounded(normal(8, 8)), expected)
    assert name.rstrip("_") in {row.function for row in lp.coverage(rounded).rows} or "attention" in name


def test_after_an_interrupted_pass_the_next_one_is_rounded_once():
    def interrupted(x):
        raise KeyboardInterrupt  # no hook of torch sees it

    def attend(x):
        return F.scaled_dot_product_attention(x, x, x)

    settings = {"inputs": "float8:stochastic", "products": "float4_e2m1fn", "seed": 1}
    torch.manual_seed(0)
    expected = lp.quantize_model(Calls(attend), **settings)(normal(8, 8))
    for _ in range(2):
        broken = lp.quantize_model(nn.Sequential(Calls(torch.relu), Calls(interrupted)), products="float8")
        with pytest.raises(KeyboardInterrupt):
            broken(normal(8, 8))
        torch.manual_seed(0)
        model = lp.quantize_model(Calls(attend), **settings)
        assert torch.equal(model(normal(8, 8)), expected)
        assert {row.function for row in lp.coverage(model).rows} >= {"scores", "values"}
        assert "matmul" not in {row.function for row in lp.coverage(model).rows}
        assert torch.overrides._get_current_function_mode_stack() == []


class Weighted(nn.Module):
    """A parameter w (8, 8), and a function of it and of what the model is called with."""

    def __init__(self, function):
        super().__init__()
        self.function, self.w = function, nn.Parameter(normal(8, 8))

    def forward(self, x):
        return self.function(x, self.w)


IN_PLACE = {
    "matmul": lambda x, w: (x @ w).relu_(),
    "linear": lambda x, w: F.linear(x, w).mul_(2),
    "einsum": lambda x, w: torch.einsum("ij,jk->ik", x, w).relu_(),
    "attention": lambda x, w: F.scaled_dot_product_attention(x, x @ w, x).add_(1),
    "vmap": lambda x, w: torch.vmap(lambda row: torch.einsum("j,jk->k", row, w).relu_())(x),
}


@pytest.mark.parametrize("sites", [{"errors": "e8m23"}, {"products": "e8m23"}], ids=["errors", "products"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_what_a_function_gives_can_be_changed_in_place(name, sites):
    def gradient(model):
        model(normal(4, 8)).square().sum().backward()
        return model.w.grad

    expected = gradient(Weighted(IN_PLACE[name]))
    torch.testing.assert_close(gradient(lp.quantize_model(Weighted(IN_PLACE[name]), **sites)), expected)


def test_a_pass_without_gradients_is_no_training_pass():
    """As a warm-up of statistics is one, in training mode."""
    model = lp.quantize_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), **{"dgrad.weights": "float8"})
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with torch.no_grad():
        model(normal(4, 8))
    model(normal(4, 8)).sum().backward()
    optimizer.step()
    assert "dgrad.weights" in {row.tensor for row in lp.coverage(model).rows}


def test_after_an_interrupted_first_pass_the_next_one_is_the_first():
    interruptions = [KeyboardInterrupt()]

    def interrupted(x):
        while interruptions:
            raise interruptions.pop()
        return x

    # The interruption comes before anything is rounded.
    model = lp.quantize_model(nn.Sequential(nn.Identity(), nn.Linear(8, 8)), inputs="float8")
    model[0].forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        model(normal(4, 8))
    model(normal(4, 8))
    assert {row.module for row in lp.coverage(model).rows} == {"1"}
    lp.remove(model)
    assert not model._forward_hooks


def test_a_model_that_calls_itself_is_noted_as_a_whole():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, depth=1):
            return self.layer(self(x, depth - 1)) if depth else x.sin()

    model = lp.quantize_model(Recursive(), inputs="float8")
    model(normal(4, 8))
    assert {(row.module, row.function) for row in lp.coverage(model).rows} == {("layer", ""), ("", "sin")}


def test_a_pass_in_another_thread_does_not_end_the_first_one():
    model = nn.Sequential(nn.Identity(), nn.Linear(8, 8), nn.Linear(8, 8))
    threads = []

    def with_another(x):
        if not threads:
            threads.append(threading.Thread(target=model, args=(normal(4, 8),)))
            threads[0].start()
            threads[0].join()
        return x

    model[0].forward = with_another
    lp.quantize_model(model, inputs="float8")
    model(normal(4, 8))
    rows = [row for row in lp.coverage(model).rows if row.tensor == "forward.inputs"]
    assert [(row.module, row.times) for row in rows] == [("1", 2), ("2", 2)]


def test_a_model_that_gives_nothing_is_noted():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            self.result = self.layer(x)

    model = lp.quantize_model(Keeps(), inputs="float8")
    model(normal(4, 8))
    assert "layer" in {row.module for row in lp.coverage(model).rows}


def test_a_model_inside_another_one_knows_its_parameters_by_their_memory_of_now():
    inner = lp.quantize_model(Weighted(lambda x, w: x @ w.data), **{"forward.weights": "float4_e2m1fn"})
    outer = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    outer[1].forward = lambda x: inner(x)  # no child of it: each has its own rules
    lp.quantize_model(outer, inputs="e8m23")
    x = normal(4, 8)
    outer(x)
    inner.w.data = normal(8, 8).flip(0)
    assert torch.equal(outer(x), outer[0](x) @ lp.quantize(inner.w, "float4_e2m1fn"))


def test_a_weight_inside_a_transform_is_a_weight():
    model = lp.quantize_model(
        Weighted(lambda x, w: x @ w), **{"forward.weights": "float8", "dgrad.weights": "float4_e2m1fn"}
    )
    weights, x = {"w": model.w.detach()}, normal(4, 8)

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    of_weights, of_x = torch.func.grad(loss, argnums=(0, 1))(weights, x)
    x.requires_grad_()
    model(x).square().sum().backward()
    assert torch.equal(of_weights["w"], model.w.grad)
    assert torch.equal(of_x, x.grad)


REFUSED = {
    "no such letter": lambda x: torch.einsum("ij,jk->iq", x, x),
    "no square": lambda x: torch.einsum("ii,ij->j", x[:, :4], x),
    "two arrows": lambda x: torch.einsum("ij,jk->ik->", x, x),
    "no letter": lambda x: torch.einsum("1j,jk->k", x, x),
    "two ellipses": lambda x: torch.einsum("......ij,jk->ik", x, x),
    "mm": lambda x: torch.mm(x[None], x),
    "bmm": lambda x: torch.bmm(x[None], x[None].expand(2, 8, 8)),
    "mv": lambda x: torch.mv(x, x),
    "dot": lambda x: torch.dot(x, x),
    "mask and causal": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x > 0, is_causal=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused_in_its_words(name):
    with pytest.raises(RuntimeError) as expected:
        REFUSED[name](normal(8, 8))
    with pytest.raises(RuntimeError) as error:
        lp.quantize_model(Calls(REFUSED[name]), products="float8")(normal(8, 8))
    assert str(error.value) == str(expected.value)


ODD = {
    "a linear layer of one output": lambda x, w: F.linear(x, w[0]),
    "tensordot that broadcasts": lambda x, w: torch.tensordot(x[:, :1], w, 1),
    "tensordot that broadcasts the other one": lambda x, w: torch.tensordot(x, w[:1], 1),
    "complex": lambda x, w: torch.linalg.vecdot(torch.complex(x, x), torch.complex(w, -w)).imag,
    "an in-place power": lambda x, w: (x @ w).pow(1).__ipow__(2),
}


@pytest.mark.parametrize("sites", [{"products": "e8m23"}, {"elementwise": "e8m23", "products": "e8m23"}], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_odd_arguments_give_what_torch_gives(name, sites):
    def compute(x, w):
        return ODD[name](x, w) + (x @ w).sum()  # of complex numbers nothing is rounded

    def both(model):
        y = model(normal(8, 8))
        y.sum().backward()
        return y, model.w.grad

    expected = both(Weighted(compute))
    for ours, torchs in zip(both(lp.quantize_model(Weighted(compute), **sites)), expected, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("sites", [{"products": "e8m23"}, {"inputs": "e8m7"}], ids=str)
@pytest.mark.parametrize("name", ["addmm", "baddbmm", "addbmm"])
def test_sums_of_products_have_the_type_of_autocast(name, sites):
    def add(x, w):
        of_many = x if name == "addmm" else x.view(1, 8, 8)
        return getattr(torch, name)(of_many if name == "baddbmm" else x, of_many, of_many)

    with torch.autocast("cpu", torch.bfloat16):
        assert lp.quantize_model(Weighted(add), **sites)(normal(8, 8)).dtype == torch.bfloat16


def test_print_does_not_say_elementwise_of_a_layer_that_has_none():
    model = lp.quantize_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), inputs="float8", elementwise="bfloat16")
    model(normal(4, 8))
    assert "elementwise" not in repr(model[0])
    assert "elementwise" in repr(model[1])


COUNTED = {
    "complex": lambda x, w: torch.matmul(torch.complex(x, x), torch.complex(w, w)).abs(),
    "whole numbers": lambda x, w: torch.einsum("ij,jk->ik", (9 * x).int(), (9 * w).int()).float(),
}


@pytest.mark.parametrize("name", COUNTED)
def test_coverage_says_no_rule_of_what_is_no_real_number(name):
    model = nn.Sequential(nn.Linear(8, 8), Weighted(COUNTED[name]))
    lp.quantize_model(model, products="float8", activations="float8")(normal(8, 8))
    rows = [row for row in lp.coverage(model).rows if row.module == "1" and row.tensor != "elementwise"]
    assert all(row.rule == "not rounded" for row in rows)
    assert bool(rows) == (name == "complex")
