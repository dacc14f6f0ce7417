"""What other people's models showed: a test for each mend, without their libraries."""

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
