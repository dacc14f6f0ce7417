"""gpt and vit: nanoGPT's numbers, what reads what, sizes, initial weights, options; and each product is reached."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import low_precision as lp
import models
from low_precision.errors import SettingError
from settings.models import BLOCK_MODELS, HEADS

SMALL = {"layers": 2, "heads": 2, "width": 8}
X, Y = torch.tensor([[0, 3, 1, 4, 4, 2], [2, 2, 0, 1, 3, 3]]), torch.tensor([[3, 1, 4, 4, 2, 0], [2, 0, 1, 3, 3, 4]])
# What nanoGPT's code (commit 3adf61e, PyTorch 2.13 on a CPU) gives for the weights of `by_formula`.
LAST_LOGITS = [1.753136, -1.2451751, -1.39079, 1.649895, 0.9106705]
LOSS = 1.9352912902832031
GRADIENT_NORMS = {
    "embedding.weight": 1.3864369,
    "positions.weight": 1.0884206,
    "blocks.0.norm1.weight": 0.07401932,
    "blocks.0.attention.queries_keys_values.weight": 0.95456922,
    "blocks.0.attention.output.weight": 1.7631094,
    "blocks.0.norm2.weight": 0.092923149,
    "blocks.0.mlp.up.weight": 1.8302026,
    "blocks.0.mlp.down.weight": 0.91660619,
    "blocks.1.norm1.weight": 0.097212471,
    "blocks.1.attention.queries_keys_values.weight": 0.50436753,
    "blocks.1.attention.output.weight": 0.80991238,
    "blocks.1.norm2.weight": 0.040497169,
    "blocks.1.mlp.up.weight": 0.49831539,
    "blocks.1.mlp.down.weight": 0.93410665,
    "norm.weight": 0.37523818,
}
# In float64 the logits are 1.6e-6 from these, the largest being 2.8: another order of sums in float32 moves them by as
# much again. Ten times that lets no wrong formula through.
RELATIVE, ABSOLUTE = 1e-5, 1.6e-5


@torch.no_grad()
def by_formula(model: nn.Module) -> nn.Module:
    """Weights that everybody can compute: of the k-th parameter, half the sine of element + 10 k; norms around 1."""
    for k, p in enumerate(model.parameters()):
        values = 0.5 * torch.sin(torch.arange(p.numel(), dtype=torch.float64) + 10 * k)
        p.copy_(values.view(p.shape) + (p.dim() == 1))
    return model


def test_gpt_computes_what_nanogpt_does():
    model = by_formula(models.build("gpt", (6,), 5, 0, SMALL))
    logits = model(X)
    assert logits[1, -1].tolist() == pytest.approx(LAST_LOGITS, rel=RELATIVE, abs=ABSOLUTE)
    loss = F.cross_entropy(logits.flatten(0, 1), Y.flatten())
    assert float(loss.detach()) == pytest.approx(LOSS, rel=RELATIVE)
    loss.backward()
    norms = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
    assert norms == pytest.approx(GRADIENT_NORMS, rel=RELATIVE, abs=ABSOLUTE)


@pytest.mark.parametrize(
    ("options", "context", "expected"),
    [({}, 64, 804_096), ({"layers": 6, "heads": 6, "width": 384}, 256, 10_745_088)],
)
def test_sizes_are_nanogpts(options, context, expected):
    model = models.build("gpt", (context,), 65, 0, options)
    width, layers = options.get("width", 128), options.get("layers", 4)
    by_hand = (65 + context + 1) * width + layers * (12 * width**2 + 2 * width)
    assert sum(p.numel() for p in model.parameters()) == by_hand == expected


def test_a_token_reads_none_that_comes_later():
    model = models.build("gpt", (16,), 7, 0, SMALL).eval()
    x = torch.randint(7, (1, 16), generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[0, 9] = (other[0, 9] + 1) % 7
    same = (model(x) == model(other)).all(2)[0].tolist()
    assert same == [True] * 9 + [False] * 7
    assert torch.allclose(model(x[:, :5]), model(x)[:, :5], atol=1e-6)  # a shorter text is read alike


def test_the_head_is_the_embedding():
    model = models.build("gpt", (8,), 5, 0)
    assert model.head.weight is model.embedding.weight
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


def test_initial_weights():
    """N(0, 0.02), what is added to the path 1 / sqrt(2 layers) of that, norms 1: by deviations, to 5 of their own."""
    model = models.build("gpt", (64,), 65, 3)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert bool((p == 1).all()), name
            continue
        deviation = 0.02 / math.sqrt(8) if name.endswith(("attention.output.weight", "mlp.down.weight")) else 0.02
        assert abs(float(p.detach().std()) / deviation - 1) < 5 / math.sqrt(2 * p.numel()), name
        assert abs(float(p.detach().mean())) < 5 * deviation / math.sqrt(p.numel()), name
    again = models.build("gpt", (64,), 65, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_dropout_is_for_training_alone():
    model = models.build("gpt", (6,), 5, 0, SMALL | {"dropout": 0.5})
    plain = models.build("gpt", (6,), 5, 0, SMALL)
    assert torch.equal(model.eval()(X), plain.eval()(X))
    assert not torch.equal(model.train()(X), model(X))


def test_vit_reads_patches_in_any_order_by_their_positions():
    """Without its convolution: patches cut and multiplied by hand; patches that change places with their positions."""
    model = models.build("vit", (3, 8, 8), 4, 0, SMALL | {"patch": 4}).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    cut = [x[:, :, i : i + 4, j : j + 4].flatten(1) for i in (0, 4) for j in (0, 4)]  # row by row
    y = torch.stack(cut, 1) @ model.patches.weight.flatten(1).T + model.patches.bias
    y = model.norm(model.blocks(y + model.positions.weight)).mean(1)
    assert torch.allclose(model(x), model.head(y), atol=1e-6)
    with torch.no_grad():
        model.positions.weight.copy_(model.positions.weight[[1, 0, 2, 3]])
    swapped = torch.cat([torch.cat([x[:, :, :4, 4:], x[:, :, :4, :4]], 3), x[:, :, 4:]], 2)
    assert torch.allclose(model(swapped), model.head(y), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gpt", {"heads": 3}, "given heads=3, allowed: a divisor of width=128"),
        ("gpt", {"layers": 0}, "given layers=0, allowed: a whole number >= 1"),
        ("gpt", {"layers": 1.5}, "given layers=1.5, allowed: a whole number"),
        (
            "gpt",
            {"heds": 2},
            "given heds (did you mean heads?), allowed: layers, heads, width, context, dropout (gpt's)",
        ),
        ("gpt", {"dropout": 1}, "given dropout=1, allowed: a number, 0 <= p < 1"),
        ("gpt", {"context": 8}, "given context=8, allowed: that of the text, whose samples have the shape (16,)"),
        ("vit", {"patch": 3}, "given patch=3, allowed: a divisor of the sides of an image, 8 and 8"),
        ("linear", {"width": 3}, "given width, allowed: none (linear has no options)"),
    ],
)
def test_wrong_options(name, options, words):
    shape = (1, 8, 8) if name == "vit" else (16,)
    with pytest.raises(SettingError) as error:
        models.build(name, shape, 5, 0, options)
    assert str(error.value) == f"model_options: {words}"


def test_a_whole_number_is_a_number_too():
    assert models.build("gpt", (16,), 5, 0, {"dropout": 0, "context": 16}).dropout.p == 0.0
    assert models.build("mlp", (3,), 2, 0, {"width": 7}).hidden1.out_features == 7


def test_the_table_names_the_heads_and_the_blocks():
    for name, head in HEADS.items():
        shape = (16,) if name == "gpt" else (3, 8, 8)
        modules = dict(models.build(name, shape, 5, 0).named_modules())
        assert isinstance(modules[head], nn.Linear)
        assert modules[head].out_features == 5
        assert ("blocks.0" in modules) == (name in BLOCK_MODELS)


@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_every_product_of_a_transformer_is_reached(name):
    """Four products with a weight a block, two of attention, the head's and the patches'; with a recipe the former."""
    shape, x = ((6,), X) if name == "gpt" else ((3, 8, 8), torch.randn(2, 3, 8, 8))
    model = lp.quantize_model(models.build(name, shape, 5, 0, SMALL), products="float8", activations="float8", seed=1)
    reached = lp.coverage(model, x)
    outside = 1 if name == "gpt" else 2
    assert sum(row.times for row in reached.rows if row.tensor == "forward.weights") == 4 * 2 + outside
    assert sum(row.times for row in reached.rows if row.tensor == "activations") == 5 * 2 + outside
    assert [row for row in reached.not_rounded if row.tensor != "elementwise"] == []
    model = lp.quantize_model(models.build(name, shape, 5, 0, SMALL), recipe="nvfp4", seed=1)
    rows = [row for row in lp.coverage(model, x).rows if row.tensor == "forward.weights"]
    assert sum(row.times for row in rows) == 4 * 2 + outside
    assert {row.rule for row in rows} == {"float4_e2m1fn@16x16@float8_e4m3fn:nearest"}


def test_what_is_not_rounded_has_a_name():
    """An embedding computes no product, and is called by no function of another name."""
    model = lp.quantize_model(models.build("gpt", (6,), 5, 0, SMALL), recipe="mxfp8", seed=1)
    said = lp.coverage(model, X).sentence()
    assert "results of embedding, add (5), layer_norm (5), products (11), gelu (2)" in said
