"""Attention: torch's numbers without rounding, and its two products with rounded operands."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import ReadRounded, equal_bits, holds

import low_precision as lp
from low_precision.formats import format_named

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = dict.fromkeys(("products", "inputs", "activations", "errors", "elementwise"), "e8m23")
BATCH, HEADS, QUERIES, KEYS, FEATURES = 2, 4, 5, 7, 40
CAUSAL = torch.ones(QUERIES, KEYS).tril().bool()
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": CAUSAL},
    "float": {"attn_mask": torch.zeros(QUERIES, KEYS).masked_fill(~CAUSAL, -math.inf)},
    "bias": {"attn_mask": torch.randn(1, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(3))},
    "scale": {"scale": 0.3},
}


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **self.settings)


def operands(heads: int = HEADS) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(BATCH, HEADS, QUERIES, FEATURES), (BATCH, heads, KEYS, FEATURES), (BATCH, heads, KEYS, 33)]
    return [torch.randn(shape) for shape in shapes]


def results(model: nn.Module, read: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in read]
    y = model(*leaves)
    y.sin().sum().backward()
    return [y.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("heads", [HEADS, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_without_rounding_it_is_torchs(mask, heads):
    settings = MASKS[mask] | ({"enable_gqa": True} if heads != HEADS else {})
    expected = results(Attention(**settings), operands(heads))
    rounded = lp.quantize_model(Attention(**settings), **ALL)
    for a, b in zip(results(rounded, operands(heads)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_query_that_may_look_at_nothing():
    mask = CAUSAL.clone()
    mask[2] = False
    settings = {"attn_mask": mask}
    expected = results(Attention(**settings), operands())
    for a, b in zip(results(lp.quantize_model(Attention(**settings), **ALL), operands()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_drops_and_scales():
    torch.manual_seed(0)
    model = lp.quantize_model(Attention(dropout_p=0.5), **ALL)
    q, k = torch.zeros(1, 1, 4000, 8), torch.zeros(1, 1, 8, 8)  # equal weights, 1/8 each
    y = model(q, k, torch.eye(8)[None, None])
    assert set(y.flatten().tolist()) == {0.0, 0.25}
    assert abs((y > 0).float().mean() - 0.5) < 5 * 0.5 / math.sqrt(y.numel())


def q(x, fmt, dim=-1):
    return lp.quantize(x.detach(), fmt, dim=dim)


@pytest.mark.parametrize("fmt", ["float8", "mxfp4", "nvfp4"])
def test_by_its_formulas(fmt):
    """Groups of numbers that share a scale run along features, along keys and along queries."""
    leaves = [x.clone().requires_grad_() for x in operands()]
    query, key, value = leaves
    scores = ReadRounded.apply(query, key.mT, fmt) * (1 / math.sqrt(FEATURES))
    weights = scores.masked_fill(~CAUSAL, -math.inf).softmax(-1)
    expected = ReadRounded.apply(weights, value, fmt)
    expected.sin().sum().backward()
    y, *gradients = results(lp.quantize_model(Attention(is_causal=True), products=fmt), operands())
    assert equal_bits([y, *gradients], [expected, *(x.grad for x in leaves)])


def test_scores_and_weights_are_elementwise_and_the_result_an_activation():
    fmt = {"elementwise": "float8", "activations": "bfloat16", "inputs": "float16"}
    query, key, value = (q(x, "float16") for x in operands())
    scores = q((query @ key.mT) * (1 / math.sqrt(FEATURES)), "float8")
    expected = q(q(scores.softmax(-1), "float8") @ value, "bfloat16")
    assert torch.equal(lp.quantize_model(Attention(), **fmt)(*operands()), expected)


HEADED = {
    "one tensor": {},
    "key and value of other sizes": {"kdim": 6, "vdim": 10},
    "no bias": {"bias": False},
    "bias of key and value": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "batch first": {"batch_first": True},
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", ["no", "padding", "causal", "both"])
@pytest.mark.parametrize("settings", HEADED)
def test_multi_head_attention_without_rounding_is_torchs(settings, masked, need_weights):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, **HEADED[settings])
    shape = (3, 5) if settings == "batch first" else (5, 3)
    x = torch.randn(*shape, 8)
    key = torch.randn(*shape, HEADED[settings].get("kdim", 8))
    value = torch.randn(*shape, HEADED[settings].get("vdim", 8))
    masks = {}
    if masked in ("padding", "both"):
        masks["key_padding_mask"] = torch.tensor([[False] * 4 + [True]] * 3)
    if masked in ("causal", "both"):
        masks["attn_mask"] = torch.ones(5, 5).triu(1).bool()
    rounded = lp.quantize_model(copy.deepcopy(plain), **ALL)
    for training in (True, False):
        leaves = [[part.clone().requires_grad_() for part in (x, key, value)] for _ in range(2)]
        pairs = []
        for model, read in zip((plain, rounded), leaves, strict=True):
            model.zero_grad()
            y, weights = model.train(training)(*read, need_weights=need_weights, **masks)
            y.sin().sum().backward()
            pairs.append([y, *([weights] if need_weights else []), *(p.grad for p in (*read, *model.parameters()))])
        torch.testing.assert_close(*pairs[::-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_multi_head_attention_names_its_products(need_weights, masked):
    model = lp.quantize_model(nn.MultiheadAttention(8, 2), products="float8", elementwise="float8")
    x = torch.randn(5, 3, 8)
    mask = torch.ones(5, 5).triu(1).bool() if masked else None
    _, weights = model(x, x, x, need_weights=need_weights, attn_mask=mask, average_attn_weights=False)
    names = {row.function for row in lp.coverage(model).rows if row.tensor == "forward.inputs"}
    assert names == {"linear", "scores", "values", "linear.1"}
    if need_weights:
        assert holds(weights, format_named("float8"))
        if masked:  # though its infinities went through a format without any
            assert not weights.triu(1).any()


def test_a_transformer_layer_trains_with_rounded_products():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    lp.quantize_model(model, products="mxfp8_e4m3", rounding="stochastic", seed=1)
    optimizer = lp.quantize_optimizer(torch.optim.Adam(model.parameters(), 1e-2), model)
    x = torch.randn(4, 5, 16)
    padded = torch.tensor([[False] * 4 + [True]] * 4)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x, src_key_padding_mask=padded) - x.flip(-1))[:, :4].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    with torch.no_grad():
        assert model(x, src_key_padding_mask=padded)[:, :4].isfinite().all()
