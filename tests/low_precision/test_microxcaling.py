"""The operands of products against Microsoft's microxcaling, which emulates MX formats: numbers that it computed.

microxcaling.json says from which commit, with which settings and how they were made. Where it is said, we differ.
"""

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_helpers import equal_bits

import low_precision as lp
from low_precision.clock import Clock
from low_precision.formats import BLOCKS
from low_precision.forms import Matmul
from low_precision.products import Operand, Operands, Product, round_operand
from low_precision.rules import OPERANDS, rule_of
from low_precision.scheme import Scheme

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = {
    "fp8_e4m3": "mxfp8_e4m3",
    "fp8_e5m2": "mxfp8_e5m2",
    "fp6_e3m2": "mxfp6_e3m2",
    "fp6_e2m3": "mxfp6_e2m3",
    "fp4_e2m1": "mxfp4",
    "int8": "mxint8",
}


def read(value):
    """The file's content, with tensors for the texts of their bits."""
    if not isinstance(value, dict):
        return value
    if value.keys() != {"shape", "bits"}:
        return {key: read(one) for key, one in value.items()}
    bits = [int(text.ljust(8, "0"), 16) for text in value["bits"].split()]
    return torch.tensor(bits, dtype=torch.uint32).view(torch.float32).reshape(value["shape"])


FILE = read(json.loads((Path(__file__).parent / "microxcaling.json").read_text()))
LINES, LAYERS, MATMULS, DIFFERENCES = (FILE[part] for part in ("lines", "layers", "matmul", "differences"))
by_format = pytest.mark.parametrize("fmt", OURS)


def equal(ours: Tensor, theirs: Tensor) -> bool:
    return equal_bits([ours.contiguous()], [theirs.contiguous()])


def back(layer: nn.Module, x: Tensor, error: Tensor) -> dict[str, Tensor]:
    """The output, y, and the gradients, by name."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(error)
    return {"y": y.detach(), "dx": x.grad, **{f"d{name}": p.grad for name, p in layer.named_parameters()}}


def layer_of(vector: dict, fmt: str, rounding: str = "nearest") -> nn.Module:
    layer = getattr(nn, vector["kind"])(**vector["settings"])
    layer.load_state_dict({"weight": vector["weight"], "bias": vector["bias"]})
    return lp.quantize_model(layer, **{"products": f"{OURS[fmt]}:{rounding}"})


def linear(weight: Tensor, fmt: str) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.load_state_dict({"weight": weight})
    return lp.quantize_model(layer, **{"products": OURS[fmt]})


@pytest.mark.parametrize(("name", "fmt"), [(name, fmt) for name in LAYERS for fmt in LAYERS[name]["results"]])
def test_layers(name, fmt):
    """Same bits: y, and the gradients of input, weight and bias.

    microxcaling's convolutions round ties away from zero, whatever rounding its settings ask for.
    """
    vector = LAYERS[name]
    layer = layer_of(vector, fmt, "nearest" if vector["kind"] == "Linear" else "nearest_away")
    ours = back(layer, vector["x"], vector["errors"])
    theirs = vector["results"][fmt]
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize(("name", "fmt"), [(name, fmt) for name in MATMULS for fmt in MATMULS[name]["results"]])
def test_matmul(name, fmt):
    """Same bits of y and both gradients; leading dimensions count matrices of their own."""
    vector = MATMULS[name]
    a, b = (vector[key].clone().requires_grad_() for key in "ab")
    scheme, clock = Scheme(dict.fromkeys(OPERANDS, rule_of(OURS[fmt]))), Clock()
    quantizers = [scheme.quantizer(site, "matmul", clock) for site in OPERANDS]
    rounds = [
        Operand(lambda x, reading, turn, quantizer=quantizer: round_operand(quantizer, x, reading, 0, 0, 0, turn))
        for quantizer in quantizers
    ]
    pairs = [tuple(rounds[i : i + 2]) for i in (0, 2, 4)]
    y = Product.apply(a, b, None, Matmul(a.ndim - 2), Operands(*pairs), itertools.count())
    y.backward(vector["errors"])
    theirs = vector["results"][fmt]
    assert [key for key, x in (("y", y), ("da", a.grad), ("db", b.grad)) if not equal(x, theirs[key])] == []


def operand(site: str, lines: Tensor, fmt: str) -> Tensor:
    """The lines as a Linear layer reads them at that site: the other factor is the identity."""
    one, columns = torch.eye(lines.shape[1]), lines.t().contiguous()
    run = partial(_run, fmt)
    match site:
        case "forward.inputs":
            return run(lines, one)["y"]
        case "forward.weights":
            return run(one, lines)["y"].t()
        case "dgrad.errors":
            return run(torch.zeros_like(lines), one, lines)["dx"]
        case "dgrad.weights":
            return run(torch.zeros_like(columns), columns, one)["dx"].t()
        case "wgrad.errors":
            return run(one, torch.zeros_like(lines), columns)["dweight"]
        case _:
            return run(columns, torch.zeros_like(columns), one)["dweight"].t()


def _run(fmt: str, x: Tensor, weight: Tensor, error: Tensor | None = None) -> dict[str, Tensor]:
    error = torch.zeros(len(x), len(weight)) if error is None else error
    return back(linear(weight, fmt), x, error)


@by_format
@pytest.mark.parametrize("site", OPERANDS)
def test_hard_numbers_in_each_operand(site, fmt):
    """Zeros, ties, numbers beyond both ends of the element and of its scale, blocks that are shorter: the same bits."""
    ours, theirs = operand(site, LINES["x"], fmt), LINES["linear"][fmt]
    assert [name for name, a, b in zip(LINES["names"], ours, theirs, strict=True) if not equal(a, b)] == []


@by_format
def test_hard_numbers_in_a_convolution(fmt):
    """As in Linear, but with ties away from zero, which makes a difference for these."""
    size = LINES["x"].shape[1]
    vector = {"kind": "Conv1d", "settings": {"in_channels": size, "out_channels": size, "kernel_size": 1}}
    vector |= {"weight": torch.eye(size).unsqueeze(2), "bias": torch.zeros(size)}
    layers = (layer_of(vector, fmt, rounding) for rounding in ("nearest_away", "nearest"))
    away, even = (layer(LINES["x"].unsqueeze(2)).detach().squeeze(2) for layer in layers)
    assert equal(away, LINES["convolution"][fmt])
    assert equal(even, LINES["linear"][fmt])
    assert not equal(away, even)


# Where we differ


@by_format
def test_their_scale_is_one_step_too_large_just_below_a_power_of_two(fmt):
    """They take the logarithm of the block's largest number in float32, which rounds it up to the power of two."""
    vector = DIFFERENCES["largest below a power of two"]
    x, theirs = vector["x"], vector["linear"][fmt]
    assert x[:32].abs().max() == x[3] == torch.nextafter(torch.tensor(1024.0), torch.tensor(0.0))
    at_power = x.clone()
    at_power[3] = 1024
    assert equal(operand("forward.inputs", at_power.unsqueeze(0), fmt)[0], theirs)
    ours = operand("forward.inputs", x.unsqueeze(0), fmt)[0]
    element = BLOCKS[OURS[fmt]].element
    assert ours[3] == element.largest * 512 / _power_below(element.largest)
    assert theirs[3] == 1024 > ours[3]


@by_format
def test_they_round_up_what_is_just_below_half_of_the_smallest(fmt):
    """They add 1/2 and round down, and the sum is rounded up to 1 in float32."""
    vector = DIFFERENCES["just below half of the smallest"]
    x, theirs = vector["x"], vector["linear"][fmt]
    element = BLOCKS[OURS[fmt]].element
    place = 1 + list(OURS).index(fmt)
    ours = operand("forward.inputs", x.unsqueeze(0), fmt)[0]
    assert ours[place] == 0
    assert theirs[place] == element.smallest_subnormal / _power_below(element.largest)
    others = torch.arange(len(x)) != place
    assert equal(ours[others], theirs[others])


def _power_below(number: float) -> float:
    return 2.0 ** (torch.tensor(number).frexp()[1].item() - 1)


@by_format
def test_an_infinity_makes_their_whole_block_not_a_number(fmt):
    """Ours saturates: it stands for the largest number of float32."""
    vector = DIFFERENCES["an infinity"]
    assert vector["sum"][fmt].isnan().all()
    x = vector["x"]
    ours = linear(torch.ones(1, len(x)), fmt)(x.unsqueeze(0))
    assert ours.isfinite().all()
    assert ours > 2.0**127


@pytest.mark.parametrize("fmt", DIFFERENCES["sequences of 3 rows"]["dweight"])
def test_their_groups_of_rows_end_with_each_sequence(fmt):
    """In the gradient of Linear's weight. Our rows are those of all leading dimensions, one after the other.

    In blocks of 32 there is no difference where a sequence is a multiple of 32.
    """
    vector = DIFFERENCES["sequences of 3 rows"]
    x, error, theirs = vector["x"], vector["errors"], vector["dweight"][fmt]
    layer = linear(vector["weight"], fmt)
    ours = back(layer, x, error)["dweight"]
    by_sequence = sum(back(linear(vector["weight"], fmt), x[i], error[i])["dweight"] for i in range(len(x)))
    assert equal(by_sequence, theirs)
    assert not equal(ours, theirs)
    assert equal(ours, back(linear(vector["weight"], fmt), x.flatten(0, 1), error.flatten(0, 1))["dweight"])
