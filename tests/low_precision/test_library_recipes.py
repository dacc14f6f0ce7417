"""Recipes around a model: what each row says, which products it reaches, and what is passed beside it."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import low_precision as lp
from low_precision.errors import SettingError
from low_precision.noted import NOT_ROUNDED
from low_precision.recipe import Recipe
from low_precision.recipes import RECIPES, recipe_of
from low_precision.rules import OPERANDS, site_line
from low_precision.transforms import transform_named

OF_OPERANDS = [name for name, row in RECIPES.items() if row.operands]
OF_STATES = [name for name, row in RECIPES.items() if set(row.rules) & {"momentum.exp_avg", "momentum.exp_avg_sq"}]

# The table of the sources, written here by hand: forward x and w, dgrad e and w, wgrad e and x. "=": what the forward
# product (of e, dgrad) read; ">": that, rounded again; "": as it is stored.
E4M3, E5M2, FP4 = "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"
HEADROOM = f"{FP4}@32@headroom"
BY_HAND = {
    "te-current": [f"{E4M3}@tensor", f"{E4M3}@tensor", f"{E5M2}@tensor", "=", "=", "="],
    "te-delayed": [*[f"{E4M3}@tensor@delayed1024"] * 2, f"{E5M2}@tensor@delayed1024", "=", "=", "="],
    "ao-tensorwise": [f"{E4M3}@tensor", f"{E4M3}@tensor", f"{E5M2}@tensor", "=", "=", "="],
    "ao-rowwise": [f"{E4M3}@row@pow2"] * 6,
    "ao-rowwise-gw-hp": [*[f"{E4M3}@row@pow2"] * 3, f"{E4M3}@tensor@pow2", "", ""],
    "deepseek": [f"{E4M3}@128", f"{E4M3}@128x128", f"{E4M3}@128", "=", f"{E4M3}@128", f"{E4M3}@128"],
    "mxfp8": [f"{E4M3}@32@e8m0_rceil"] * 6,
    "nvfp4": ["nvfp4", f"{FP4}@16x16@{E4M3}", "nvfp4:stochastic:8", "=", "nvfp4:stochastic:8", "nvfp4"],
    "mxfp4-rht": ["", "", *[f"{HEADROOM}:stochastic"] * 4],
    "quartet": [*[f"{FP4}@32@quest"] * 2, HEADROOM, f">{HEADROOM}", HEADROOM, f">{HEADROOM}"],
    "quartet-sr": [
        *[f"{FP4}@32@quest"] * 2,
        f"{HEADROOM}:stochastic",
        f">{HEADROOM}:stochastic",
        f"{HEADROOM}:stochastic",
        f">{HEADROOM}:stochastic",
    ],
    "int8": ["int8@row"] * 6,
    "switchback": ["int8@row", "int8@tensor", "int8@row", "=", "", ""],
    "jetfire": ["int8@32x32", "int8@32x32", "int8@32x32:stochastic", "=", "=", "="],
    "unit-scaling": [*["float8_e4m3fnuz:stochastic"] * 2, "float8_e5m2fnuz:stochastic", "=", "=", "="],
}
QUARTET = {"forward": "hadamard32", "dgrad": "hadamard32:random", "wgrad": "hadamard32:random"}
TRANSFORMS = {
    "nvfp4": {"wgrad": "hadamard16:fixed:bfloat16"},
    "mxfp4-rht": {"dgrad": "hadamard64:random", "wgrad": "hadamard64:random"},
    "quartet": QUARTET,
    "quartet-sr": QUARTET,
}
NAMED = {"dgrad.weights": "forward.weights", "wgrad.errors": "dgrad.errors", "wgrad.inputs": "forward.inputs"}


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 33))


def conv(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5))


class Attends(nn.Module):
    """One head of attention between two projections, and a product of two inputs besides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.free = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        q, k, v = self.project(x).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed) @ self.free + (x @ x.mT) @ x


CASES = [*((mlp, name) for name in OF_OPERANDS), *((conv, name) for name in ("nvfp4", "quartet", "jetfire"))]
WITH_MODELS = pytest.mark.parametrize(("make", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))


def train(model: nn.Module, optimizer, x: torch.Tensor, steps: int = 3) -> list[torch.Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        optimizer.loss_scale.scale(loss).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def trained(sites: dict, of_optimizer: dict | None = None, model=mlp, optimizer=torch.optim.SGD) -> list[torch.Tensor]:
    made = lp.quantize_model(model(), seed=5, **sites)
    torch.manual_seed(1)
    x = torch.randn(24, 48) if model is mlp else torch.randn(6, 3, 8, 8)
    stepped = lp.quantize_optimizer(optimizer(made.parameters(), lr=0.01), made, **(of_optimizer or {}))
    return train(made, stepped, x)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(one, other, strict=True))


# The rows


def test_each_row_is_its_sources_table():
    assert set(BY_HAND) == set(OF_OPERANDS)
    for name, cells in BY_HAND.items():
        wanted = {
            site: f"{NAMED[site]}{cell.removeprefix('=')}" if cell[0] in "=>" else cell
            for site, cell in zip(OPERANDS, cells, strict=True)
            if cell
        }
        assert RECIPES[name].by_operand == wanted, name
        assert RECIPES[name].transforms == TRANSFORMS.get(name, {}), name


@pytest.mark.parametrize("name", RECIPES)
def test_each_row_can_be_read_and_says_where_it_is_from(name):
    row = RECIPES[name]
    assert row.name == name
    assert row.about
    assert row.source
    assert row.follows
    for site, text in row.rules.items():
        assert site_line(str(site_line(f"{site}={text}"))) == site_line(f"{site}={text}")
    for text in row.transforms.values():
        assert str(transform_named(text)) == text
    for text in row.wider_sites:
        assert site_line(text).leaves_alone
    if row.operands:
        assert row.claim
        assert "contradicted by" in row.claim
        assert not row.sites
    assert max(map(len, str(row).splitlines()[1:])) <= 118
    assert row.about in str(row)
    assert row.source.split()[0] in str(row)


def test_the_rows_need_no_torch():
    code = "import sys, low_precision as lp; assert lp.RECIPES['nvfp4'].operands; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# What a recipe reaches


@WITH_MODELS
def test_every_operand_is_in_the_coverage(make, name):
    model = lp.quantize_model(make(), recipe=name, seed=0)
    x = torch.randn(24, 48) if make is mlp else torch.randn(6, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = [row for row in lp.coverage(model, x.requires_grad_()).rows if row.tensor in OPERANDS]
    rules = {site: str(site_line(f"{site}={text}").rule) for site, text in RECIPES[name].by_operand.items()}
    assert {row.tensor for row in rows} == set(OPERANDS)
    for row in rows:
        assert row.rule == rules.get(row.tensor, NOT_ROUNDED), row


@WITH_MODELS
def test_it_is_the_same_as_its_rules_passed_one_by_one(make, name):
    row = RECIPES[name]
    alone = {site: f"{text}" for site, text in row.by_operand.items()}
    passed = trained(alone | {"transform": row.transforms}, model=make)
    assert same(trained({"recipe": name}, model=make), passed)
    assert not same(trained({}, model=make), passed)


@pytest.mark.parametrize("name", ["nvfp4", "te-current", "quartet", "int8"])
def test_products_of_two_inputs_stay_as_they_are(name):
    x = torch.randn(4, 8, 16, requires_grad=True)
    model = lp.quantize_model(Attends(), recipe=name, seed=0)
    rows = [row for row in lp.coverage(model, x).rows if row.tensor in OPERANDS]
    rounded = {row.function for row in rows if row.rule != NOT_ROUNDED}
    assert rounded == {"", "matmul"}  # the two layers, and the product with a parameter
    left = {row.function for row in rows if row.rule == NOT_ROUNDED} - rounded
    assert left == {"scaled_dot_product_attention:scores", "matmul.1", "matmul.2"} or left == {
        "scores",
        "values",
        "matmul.1",
        "matmul.2",
    }
    # With the layers and the parameter's product left alone, nothing is rounded at all: the bits are torch's own.
    plain = Attends()
    bare = lp.quantize_model(
        copy.deepcopy(plain), recipe=name, layers={"project": None, "out": None, "": {"products": None}}
    )
    assert torch.equal(bare(x), plain(x))


def test_a_model_of_one_layer_has_no_dgrad_and_a_model_without_weights_is_refused():
    for name in ("switchback", "mxfp4-rht", "nvfp4"):
        model = lp.quantize_model(nn.Linear(8, 4), recipe=name)
        train(model, lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model), torch.randn(4, 8))

    class Squares(nn.Module):
        def forward(self, x):
            return x @ x.mT

    with pytest.raises(SettingError, match=r"forward\.inputs"):
        lp.quantize_model(Squares(), recipe="nvfp4")(torch.randn(4, 8))


# What is passed beside it


def test_what_is_passed_wins_over_the_recipe():
    def rules(**sites) -> dict[str, str]:
        model = lp.quantize_model(mlp(), recipe="nvfp4", **sites)
        return {site: str(rule) for site, rule in model.low_precision.scheme.rules.items()}

    as_it_is = rules()
    assert as_it_is == {
        site: str(site_line(f"{site}={text}").rule) for site, text in RECIPES["nvfp4"].by_operand.items()
    }
    assert rules(**{"wgrad.errors": "nvfp4"}) == as_it_is | {"wgrad.errors": "nvfp4:nearest"}
    assert rules(**{"products": "mxfp4"}) == dict.fromkeys(OPERANDS, "mxfp4:nearest")
    both = rules(**{"products": "mxfp4", "dgrad.errors": "float32"})
    assert both == {site: "mxfp4:nearest" for site in OPERANDS if site != "dgrad.errors"} | {
        site: text for site, text in both.items() if site == "dgrad.errors"
    }
    assert rules(inputs="bfloat16")["inputs"] == "bfloat16:nearest"
    assert rules(rounding="stochastic") == as_it_is  # of the rules that are passed


def test_a_transform_wins_over_the_recipes_of_that_product():
    def transforms(**passed) -> dict[str, str]:
        model = lp.quantize_model(mlp(), recipe="quartet", **passed)
        return {product: str(one) for product, one in model.low_precision.scheme.transforms.items()}

    as_it_is = transforms()
    assert as_it_is == RECIPES["quartet"].transforms
    assert transforms(transform="none") == {}
    assert transforms(transform={"wgrad": "none"}) == {p: t for p, t in as_it_is.items() if p != "wgrad"}
    assert transforms(transform="wgrad=hadamard64") == as_it_is | {"wgrad": "hadamard64"}
    assert transforms(transform=["wgrad=none", "dgrad=none"]) == {"forward": "hadamard32"}


def test_the_optimizer_takes_what_it_is_not_given_from_the_recipe():
    model = lp.quantize_model(mlp(), recipe="ocp-fp8")
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert optimizer.loss_scale.value == 1024
    assert str(optimizer.low_precision.scheme.rules["gradients"]) == "float8_e5m2:nearest"
    model = lp.quantize_model(mlp(), recipe="ocp-fp8")
    optimizer = lp.quantize_optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, gradients="bfloat16", loss_scale=1.0
    )
    assert optimizer.loss_scale.value == 1
    assert str(optimizer.low_precision.scheme.rules["gradients"]) == "bfloat16:nearest"


@pytest.mark.parametrize("name", OF_STATES)
def test_a_recipe_of_states_is_for_the_optimizer(name):
    model = lp.quantize_model(mlp(), recipe=name)
    optimizer = lp.quantize_optimizer(torch.optim.AdamW(model.parameters()), model)
    rules = optimizer.low_precision.scheme.rules
    wanted = {site: str(site_line(f"{site}={text}").rule) for site, text in RECIPES[name].rules.items()}
    assert {site: str(rule) for site, rule in rules.items()} == wanted
    other = lp.quantize_model(mlp(), recipe=name)
    sgd = lp.quantize_optimizer(torch.optim.SGD(other.parameters()), other)
    with pytest.raises(SettingError, match=r"momentum\.exp_avg"):  # SGD keeps no such state
        train(other, sgd, torch.randn(4, 48))


def test_small_states_stay_in_float32():
    def states(**passed) -> list[torch.Tensor]:
        model = lp.quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), recipe="adam8bit")
        optimizer = lp.quantize_optimizer(torch.optim.Adam(model.parameters()), model, **passed)
        torch.manual_seed(0)
        train(model, optimizer, torch.randn(16, 64), steps=1)
        return [optimizer.state[p]["exp_avg_sq"] for p in model.parameters()]

    def codes(state: torch.Tensor) -> int:
        return max(len(part.unique()) for part in state.flatten().split(256))

    large, *small = states()
    assert codes(large) <= 256
    torch.manual_seed(0)
    assert all(len(state.unique()) > 0.9 * state.numel() for state in small if state.numel() > 8)
    assert codes(states(smallest_state=0)[2]) < 256


# A recipe of one's own


def test_a_recipe_of_ones_own(monkeypatch):
    mine = lp.Recipe("mine", "MXFP4 forward", "an idea", operands={"products": "float8", "forward.inputs": "mxfp4"})
    by_row = trained({"recipe": mine})
    assert same(by_row, trained({"products": "float8", "forward.inputs": "mxfp4"}))
    monkeypatch.setitem(lp.RECIPES, "mine", mine)
    assert same(by_row, trained({"recipe": "mine"}))
    assert "forward.inputs   mxfp4" in str(mine)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipe_of("nvpf4"), r"recipe: given nvpf4 \(did you mean nvfp4\?\), allowed: te-current, "),
        (lambda: lp.quantize_model(mlp(), recipe="te-curent"), r"did you mean te-current\?"),
        (lambda: Recipe("a b", "", ""), "recipe: name: given a b, allowed: letters"),
        (lambda: Recipe("../a", "", ""), "recipe: name: given ../a, allowed: letters"),
        (
            lambda: Recipe("a", "", "", operands={"forward.input": "float8"}),
            r"recipe a: operands: given forward.input \(did you mean forward.inputs\?\)",
        ),
        (lambda: Recipe("a", "", "", states={"weights": "float8"}), "recipe a: states: given weights, allowed"),
        (lambda: Recipe("a", "", "", sites={"gradients": "float8"}), "recipe a: sites: given gradients, allowed"),
        (
            lambda: lp.quantize_model(mlp(), recipe=Recipe("a", "", "", operands={"products": "flaot8"})),
            r"recipe a: forward.inputs: format: given flaot8 \(did you mean float8\?\)",
        ),
        (
            lambda: lp.quantize_model(mlp(), recipe=Recipe("a", "", "", transforms={"wgrad": "hadamard3"})),
            "recipe a: transform: given wgrad=hadamard3",
        ),
    ],
)
def test_wrong_ones_are_named_in_one_line(make, message):
    with pytest.raises(SettingError, match=message) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1


def test_a_recipe_is_a_name_or_a_row():
    with pytest.raises(TypeError, match="recipe: given 3, allowed: a recipe's name, or a Recipe"):
        lp.quantize_model(mlp(), recipe=3)
    with pytest.raises(TypeError, match="recipe a: operands: given 'float8'"):
        Recipe("a", "", "", operands="float8")


def test_a_recipe_without_a_product_that_it_reaches_says_why():
    class Scores(nn.Module):
        def forward(self, x):
            return x @ x.mT

    with pytest.raises(SettingError, match=r"forward.inputs, allowed: .* \(a recipe rounds products with a weight"):
        lp.quantize_model(nn.Sequential(nn.LayerNorm(4), Scores()), recipe="nvfp4")(torch.randn(2, 4))


def test_what_a_transform_alone_rounds_is_said():
    """nvfp4's transform rounds to bfloat16, where no operand has a rule too."""
    model = lp.quantize_model(nn.Linear(16, 8), recipe="nvfp4", products="float32")
    rows = {row.tensor: row.shown for row in lp.coverage(model, torch.randn(4, 16)).rows}
    assert rows["wgrad.inputs"] == rows["wgrad.errors"] == "bfloat16:nearest with hadamard16:fixed:bfloat16"
    assert rows["forward.inputs"] == NOT_ROUNDED
    plain = lp.quantize_model(nn.Linear(16, 8), recipe="nvfp4", products="float32", transform="none")
    assert {row.rule for row in lp.coverage(plain, torch.randn(4, 16)).rows} == {NOT_ROUNDED}
