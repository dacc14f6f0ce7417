"""Formats that share scales beside projects that train with them: torchao, TransformerEngine, Quartet and mxfp4-llm.

oracles.json holds digests of what they make of forty layers (bench/oracles.py says how). The formats told plainly in
oracle_rounding.py have those digests, and ours has every bit of the plain telling. Where a peer differs, DIFFERENCES
says where and why.
"""

from __future__ import annotations

import fnmatch
import functools
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracle_inputs import NAMES, as_bfloat16, cut, digest, from_text, layer, layer_digest, matrices, places
from oracle_rounding import SIGNS, as_kept, hadamard, told, transformed
from run_helpers import ROOT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import low_precision as lp
from bench.oracles import table
from low_precision.formats import format_named

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = json.loads((Path(__file__).parent / "oracles.json").read_text())
PEERS = {peer: content for peer, content in FILE.items() if peer != "layers"}
NVFP4, RAGGED = "NVFP4 with the transform", "blocks of 128, the last ones shorter"

# peer, its recipe, layers (patterns) and why it makes other numbers of them than the plain telling
TINY = "subnormal in float32", "near the smallest normal"
DIFFERENCES = (
    ("torchao", "float8 *", ("near 2[*][*]-60", *TINY), "an amax below 1e-12 counts as 1e-12"),
    ("torchao", "float8 row*", ("largest just above 7 [*] 2[*][*]k",), "its power of two is a rounded logarithm's"),
    ("torchao", "MX *", TINY, "scales of 2**-127 are decoded so, but encoded as 2**-126, or with rceil as 1"),
    ("torchao", "MX * rceil", ("largest just above 7 [*] 2[*][*]k",), "its power of two is a rounded logarithm's"),
    ("torchao", "blocks of 128", ("near 2[*][*]-60", *TINY), "an amax below 1e-12 counts as 1e-12"),
    ("torchao", "NVFP4Tensor", ("*",), "amax / 6 / scale in this order, and block scales are at least 2**-6"),
    ("torchao", "int8", ("*",), "multiplies by 1 / (amax / 127), rounded twice, not by 127 / amax"),
    ("torchao-checkout", "MX * even", ("near float32's largest",), "an amax that rounds to infinity: NaN"),
    ("*", NVFP4, ("near float32's largest",), "the transform's sums overflow to infinities"),
    ("quartet", "forward*", ("*",), "ties go toward zero; above 2**64 the squares overflow float32"),
    ("quartet", "backward*", ("*",), "ties go toward zero; divides by 4/3 of a power of two, rounded; as the next"),
    ("tseng", "*", ("largest just below 2[*][*]k",), "its power of two is a rounded logarithm's"),
    ("tseng", "*", ("near float32's largest",), "three times a number overflows"),
)


class Expected(NamedTuple):
    """What a peer made of one operand of all layers."""

    peer: str
    recipe: str
    site: str
    kind: str  # how it keeps scales: see as_kept
    digests: list[str]


def by_rule() -> dict[tuple[str, str], list[Expected]]:
    """All operands by their rule, and by what is done to the layer before: "", "cut", "bfloat16"."""
    found = defaultdict(list)
    for peer, content in PEERS.items():
        for recipe, row in content["recipes"].items():
            before = "bfloat16" if recipe == NVFP4 else "cut" if recipe == RAGGED else ""
            for site, operand in row["operands"].items():
                rule, _, kind = operand["rule"].partition(" ")
                found[rule, before].append(Expected(peer, recipe, site, kind, operand["digests"]))
    return found


BY_RULE = by_rule()


@functools.cache
def operands(name: str, before: str) -> dict[str, np.ndarray]:
    """The six matrices of a layer, as the products read them before they round."""
    tensors = cut(layer(name)) if before == "cut" else layer(name)
    if before != "bfloat16":
        return matrices(tensors)
    read = matrices({tensor: as_bfloat16(numbers) for tensor, numbers in tensors.items()})
    return {site: transformed(x) if site.startswith("wgrad") else x for site, x in read.items()}


def differs(peer: str, recipe: str, name: str) -> bool:
    return name in PEERS[peer]["recipes"][recipe]["differ"]


def equal(ours: Tensor, other: np.ndarray) -> bool:
    return np.array_equal(ours.numpy().view(np.uint32), other.view(np.uint32))


def test_layers_are_those_that_the_peers_were_given():
    assert {name: layer_digest(name) for name in NAMES} == FILE["layers"]
    assert len(NAMES) == len(set(NAMES)) == 40


@pytest.mark.parametrize(("rule", "before"), BY_RULE, ids=lambda value: value or "float32")
def test_equal_to_peers(rule: str, before: str):
    """The plain telling has a peer's digests, and both engines, in turn, the bits of the plain telling."""
    expected = BY_RULE[rule, before]
    format_named(rule)
    for place, name in enumerate(NAMES):
        read = operands(name, before)
        for site in {one.site for one in expected}:
            plain, group = told(read[site], rule), rule.split("@")[1]
            for one in expected:
                if one.site == site and not differs(one.peer, one.recipe, name):
                    assert digest(*as_kept(plain, one.kind), group) == one.digests[place], (one[:3], name)
            engine = ("eager", "auto")[place % 2]
            assert equal(lp.quantize(torch.from_numpy(read[site]), rule, backend=engine), plain.values), (site, name)


def test_every_difference_has_its_reason():
    """DIFFERENCES covers what the file says, and no line of it is idle."""
    used = set()
    for peer, content in PEERS.items():
        for recipe, row in content["recipes"].items():
            for name in row["differ"]:
                reasons = [
                    line
                    for line in DIFFERENCES
                    if fnmatch.fnmatchcase(peer, line[0])
                    and fnmatch.fnmatchcase(recipe, line[1])
                    and any(fnmatch.fnmatchcase(name, pattern) for pattern in line[2])
                ]
                assert reasons, (peer, recipe, name)
                used.update(reasons)
    assert used == set(DIFFERENCES)


def test_docs_have_the_table():
    text = (ROOT / "docs/recipes.md").read_text()
    assert text.partition("<!-- oracles -->\n")[2].partition("\n<!-- end -->")[0].splitlines() == table(FILE)


def test_transform_is_transformer_engines():
    theirs = PEERS["transformer-engine"]["transform"]
    assert theirs["signs"] == SIGNS
    assert theirs["factor"] == 16**-0.5
    signs = np.array([1 if sign == "+" else -1 for sign in theirs["signs"]])
    matrix = np.array([[1 if sign == "+" else -1 for sign in row] for row in theirs["matrix"]])
    assert np.array_equal(matrix, signs[:, None] * hadamard(16))


# ---------------------------------------------------------------------------------------------------------------------
# Through a layer

# how a layer is rounded, and the peer and its recipe that round so
TO_NEAREST = {"dgrad.errors": "nvfp4:nearest", "wgrad.errors": "nvfp4:nearest"}
LAYERS = (
    ({"recipe": "te-current"}, "transformer-engine", "current scaling"),
    ({"recipe": "ao-tensorwise"}, "torchao", "float8 tensorwise"),
    ({"recipe": "ao-rowwise"}, "torchao", "float8 rowwise"),
    ({"recipe": "ao-rowwise-gw-hp"}, "torchao", "float8 rowwise_with_gw_hp"),
    ({"recipe": "deepseek"}, "torchao", "blocks of 128"),
    ({"recipe": "deepseek"}, "transformer-engine", "blocks of 128, float32 scales"),
    ({"recipe": "mxfp8"}, "transformer-engine", "MXFP8"),
    ({"recipe": "mxfp8"}, "torchao-checkout", "MX float8_e4m3fn rceil"),
    ({"products": "mxfp8_e4m3"}, "torchao-checkout", "MX float8_e4m3fn floor"),
    ({"recipe": "nvfp4", **TO_NEAREST}, "transformer-engine", NVFP4),
)
OF_PRODUCTS = {
    "y": ("forward.inputs", "forward.weights"),
    "dx": ("dgrad.errors", "dgrad.weights"),
    "dw": ("wgrad.errors", "wgrad.inputs"),
}


class Multiplied(TorchDispatchMode):
    """The factors of all matrix products while it is on, as (lines, what is summed) each."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.factors.append((args[0].detach().clone(), args[1].detach().t().clone()))
        return function(*args, **kwargs or {})


def of_layer(tensors: dict[str, np.ndarray], rounding: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What our Linear multiplies, by site, and y, dx and dw."""
    x = torch.from_numpy(tensors["x"]).requires_grad_()
    linear = nn.Linear(x.shape[1], len(tensors["weight"]), bias=False)
    linear.weight.data = torch.from_numpy(tensors["weight"])
    linear = lp.quantize_model(linear, **rounding)
    with Multiplied() as multiplied:
        y = linear(x)
        y.backward(torch.from_numpy(tensors["errors"]))
    products = {"y": y.detach(), "dx": x.grad, "dw": linear.weight.grad}
    read = {}
    for product, factors in zip(products, multiplied.factors, strict=True):
        read |= dict(zip(OF_PRODUCTS[product], factors, strict=True))
    return read, products


@pytest.mark.parametrize(("rounding", "peer", "recipe"), LAYERS, ids=str)
def test_layer(rounding: dict[str, str], peer: str, recipe: str):
    """Operands as a peer's, bit for bit; products as the peer's, but for the order of float32's additions."""
    row = PEERS[peer]["recipes"][recipe]
    rules = {site: operand["rule"].partition(" ")[0] for site, operand in row["operands"].items()}
    before = "bfloat16" if recipe == NVFP4 else ""
    for place, name in enumerate(NAMES):
        if differs(peer, recipe, name):
            continue
        tensors = layer(name)
        if before:
            tensors = {tensor: as_bfloat16(numbers) for tensor, numbers in tensors.items()}
        read, products = of_layer(tensors, rounding)
        for site, unrounded in operands(name, before).items():
            plain = told(unrounded, rules[site]).values if site in rules else unrounded
            ours = read[site].contiguous()
            if before and site.startswith("wgrad"):  # which sign a sum of zero has follows from the order of its parts
                ours, plain = ours + 0.0, plain + np.float32(0)
            assert equal(ours, plain), (site, name)
        for product, (a, b) in OF_PRODUCTS.items() if "products" in row else ():
            sizes = (read[a].double().abs() @ read[b].double().abs().t()).numpy()
            if sizes.max() > np.finfo(np.float32).max:
                continue  # whether it overflows is decided by the order
            some = places(sizes.size)
            result = products[product].numpy().reshape(-1)[some].astype(np.float64)
            theirs = from_text(row["products"][product][place])
            # Higham 2002, 3.1, of both: a product and its n additions are each off by 2**-24 of what was added. Where
            # a peer multiplies by the scales at the end, four more; NVFP4's is a product of two, which may underflow.
            n = read[a].shape[1] + 4
            off = 2 * n * 2.0**-24
            if recipe == NVFP4:
                unrounded = operands(name, before)
                alpha = np.prod([np.abs(unrounded[site]).max().astype(np.float64) for site in (a, b)]) / 2688**2
                off += 2.0**-149 / alpha if alpha else 0
            bound = off * sizes.reshape(-1)[some] + n * 2.0**-149
            assert (np.abs(result - theirs) <= bound).all(), (product, name)
