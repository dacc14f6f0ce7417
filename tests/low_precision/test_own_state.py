"""Our own saved state is taken as it is, in every format: a resumed run is the run that was left alone.

And what others write is not: weights are rounded before somebody computes with them, or it is an error.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import FLOAT8, batch, equal_bits, holds, nearest, small

from low_precision import stored
from low_precision.formats import BLOCKS, NAMED, format_named
from low_precision.optimizer import EXTRA_STATE
from low_precision.tensor import quantize
from low_precision.wrap import quantize_model, quantize_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = [*NAMED, *BLOCKS, "e3m4", "e2m0", "fixed8.4", "fixed16.12s", "bfp8", "bfp8_row", "bfp8_column", "bfp4"]
WITH_SCALES = ["nvfp4", "mxfp4", "bfp8_row", "bfp8_column"]
SCALES = [
    *("float8_e4m3fn@tensor", "float8_e5m2@column", "float8_e4m3fn@2x8", "float8_e4m3fn@flat16@pow2"),
    *("float8_e4m3fn@tensor@delayed3", "float8_e5m2@tensor@delayed2recent+1", "float4_e2m1fn@2x4@float8_e4m3fn"),
    *("float4_e2m1fn@16@quest", "float4_e2m1fn@8@headroom", "float8_e4m3fn@8@e8m0_even", "float8_e4m3fn@8@e8m0_rceil"),
    *("float8_e4m3fn@flat16@expand", "int8@row", "dynamic8@flat16", "nf4@8@e8m0", "binary6p3ue@8@e8m0"),
]


class Shapes(nn.Module):
    """Parameters of every shape: of no dimension, one, two, three and four, zeros, lines that are no multiple of 16."""

    def __init__(self):
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(12, 19)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.zeros = nn.Parameter(torch.zeros(5))
        self.cube = nn.Parameter(torch.randn(2, 3, 17))

    def forward(self, x):
        y = self.linear(self.convolution(x).flatten(1)).tanh() * self.gain
        return y.square().mean() + 0.1 * self.zeros.sum() + (self.cube * 0.1).square().sum()


def made(sites, adam, momentum):
    torch.manual_seed(0)
    model = quantize_model(Shapes(), seed=1, **sites)
    parameters = model.parameters()
    optimizer = torch.optim.Adam(parameters, 0.01) if adam else torch.optim.SGD(parameters, 0.05, 0.9)
    return model, quantize_optimizer(optimizer, model, momentum=momentum)


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(6, 2, 4, 4)).backward()
        optimizer.step()


def state(model, optimizer):
    extra = optimizer.state_dict()[EXTRA_STATE]
    moments = [x for held in optimizer.state.values() for _, x in sorted(held.items()) if torch.is_tensor(x)]
    kept = [x for site in ("accumulator", "compensation") for x in extra[site].values()]
    return [x.detach().clone() for x in (*model.parameters(), *moments, *kept)]


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    return file.getvalue()


def scheme(kind, fmt, rounding):
    behind = {"weights": {}, "accumulator": {"accumulator": fmt}, "compensation": {"compensation": fmt}}[kind]
    return {"weights": fmt, "rounding": rounding, **behind}


def check_resuming(kind, fmt, rounding, adam):
    sites = scheme(kind, fmt, rounding)
    model, optimizer = made(sites, adam, fmt)
    train(model, optimizer, range(2))
    file = saved(model, optimizer)
    then = state(model, optimizer)
    train(model, optimizer, range(2, 4))
    expected = state(model, optimizer)
    for optimizer_first in (False, True):
        model, optimizer = made(sites, adam, fmt)
        of_model, of_optimizer = torch.load(io.BytesIO(file), weights_only=True)  # torch goes on in what it loaded
        loads = [(model, of_model), (optimizer, of_optimizer)]
        for target, values in reversed(loads) if optimizer_first else loads:
            target.load_state_dict(values)
            model.eval()
            with torch.no_grad():
                model(torch.ones(2, 2, 4, 4))
            model.train()
        assert equal_bits(state(model, optimizer), then)
        for target, values in loads:  # once more, in the same process
            target.load_state_dict(values)
        assert equal_bits(state(model, optimizer), then)
        train(model, optimizer, range(2, 4))
        assert equal_bits(state(model, optimizer), expected)


KINDS = ["weights", "accumulator", "compensation"]
OF_KINDS = [(fmt, kind) for fmt in [*WITH_SCALES, "float8_e4m3fn@tensor@delayed3"] for kind in KINDS]


@pytest.mark.parametrize(("fmt", "kind"), [*OF_KINDS, *((fmt, "weights") for fmt in SCALES if "delayed3" not in fmt)])
def test_a_resumed_run_in_a_format_with_scales_is_the_run_that_was_left_alone(fmt, kind):
    check_resuming(kind, fmt, "stochastic", adam=fmt == "nvfp4")
    check_resuming(kind, fmt, "nearest", adam=False)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_resumed_run_is_the_run_that_was_left_alone(fmt):
    check_resuming("accumulator", fmt, "stochastic", adam=True)


@pytest.mark.slow
@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero", "stochastic:4:half"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fmt", [*FORMATS, *SCALES])
def test_every_resumed_run_is_the_run_that_was_left_alone(fmt, kind, rounding, adam):
    if kind != "compensation" or fmt != "float32":
        check_resuming(kind, fmt, rounding, adam)


@pytest.mark.parametrize("fmt", ["float8_e4m3fn@flat16@expand", "float8_e4m3fn@tensor@delayed3", "nvfp4"])
def test_a_copied_pair_goes_on_with_the_same_bits(fmt):
    pair = made(scheme("weights", fmt, "stochastic"), False, fmt)
    train(*pair, range(2))
    twin, loaded = copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))
    train(*pair, range(2, 4))
    for other in (twin, loaded):
        train(*other, range(2, 4))
        assert equal_bits(state(*other), state(*pair))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_an_evaluation_replaces_move_no_delayed_scale(kind):
    fmt = "float8_e4m3fn@tensor@delayed3"
    (model, optimizer), pair = (made(scheme(kind, fmt, "nearest"), False, fmt) for _ in range(2))
    for step in range(4):
        train(model, optimizer, [step])
        train(*pair, [step])
        weights = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model.load_state_dict({name: 1e3 * torch.randn_like(x) for name, x in weights.items()})
            model.eval()(torch.ones(2, 2, 4, 4))
            model.load_state_dict(weights)
            model(torch.ones(2, 2, 4, 4))
            model.train()
    assert equal_bits(state(model, optimizer), state(*pair))


def no_gradient_step(model, optimizer):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()


ZERO = [(fmt, rounding) for fmt in FORMATS for rounding in ("nearest", "toward_zero", "stochastic")]
ZERO += [(fmt, "stochastic") for fmt in SCALES]


@pytest.mark.parametrize(("fmt", "rounding"), ZERO)
def test_a_gradient_of_zero_moves_no_weight(fmt, rounding):
    """An accumulator between two numbers of the weights' format is rounded stochastically anew at each step."""
    kinds = ["weights", "compensation"] if rounding == "stochastic" else KINDS
    for kind in kinds[: None if fmt != "float32" else -1]:
        model, optimizer = made(scheme(kind, fmt, rounding), False, fmt)
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(2):
            no_gradient_step(model, optimizer)
        assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True)), kind


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
def test_rows_without_a_gradient_stay_while_others_grow_and_come_back_from_a_file(rounding):
    """The largest magnitude of the tensor, from which NVFP4's scales follow, doubles many times."""
    torch.manual_seed(0)

    model = nn.Embedding(8, 32)
    with torch.no_grad():
        model.weight[:4] *= 1e-4
    model = quantize_model(model, weights="nvfp4", rounding=rounding, seed=1)
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), 0.3), model)
    before = model.weight.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        (-0.5 * model(torch.arange(4, 8)).square().sum()).backward()
        optimizer.step()
        other = quantize_model(nn.Embedding(8, 32), weights="nvfp4", rounding=rounding, seed=1)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.weight, model.weight)
    assert torch.equal(model.weight[:4], before[:4])
    assert float(model.weight.detach().abs().max()) > 16 * float(before.abs().max())


@pytest.mark.parametrize("how", ["another format", "a plain optimizer's"])
@pytest.mark.parametrize("adam", [False, True])
def test_a_state_of_others_is_rounded(how, adam):
    sites = {"weights": "float8"}
    model, optimizer = made(sites, adam, "e8m12" if how == "another format" else None)
    if how != "another format":
        optimizer = (torch.optim.Adam if adam else lambda p, lr: torch.optim.SGD(p, lr, 0.9))(model.parameters(), 0.01)
    train(model, optimizer, range(2))
    theirs = copy.deepcopy(optimizer.state_dict())
    _, ours = made(sites, adam, "float8")
    ours.load_state_dict(copy.deepcopy(theirs))
    compared = 0
    for i, held in enumerate(ours.state.values()):
        for name, x in held.items():
            if name != "step" and torch.is_tensor(x):
                assert torch.equal(x, nearest(theirs["state"][i][name], FLOAT8))
                compared += not holds(theirs["state"][i][name], FLOAT8)
    assert compared


# What is recognised as stored

E2M1 = [Fraction(v) for v in (0.5, 1, 1.5, 2, 3, 4, 6)]
DIGITS = [Fraction(8 + n, 8) for n in range(8)]  # of a scale of E4M3; its power of two is one of the tensor's as well


def float32(x):
    """A fraction within float32's normal range, to nearest, ties to even."""
    exponent = math.frexp(float(x))[1]
    last = Fraction(2) ** (exponent - 24)
    return round(x / last) * last


def is_stored_by_hand(line):
    """Whether each group of 16 consists of numbers of E2M1, times a scale of E4M3, times a float32 number."""
    exact = [abs(Fraction(v)) for v in line]
    groups = [sorted({v for v in exact[i : i + 16] if v}) for i in range(0, len(exact), 16)]

    def is_under(group, scale, tensor):
        return all(any(float32(q * scale * tensor) == v for q in E2M1) for v in group)

    def tensors(largest, q, scale):
        middle = float32(largest / q / scale)
        return [middle * (1 + n * Fraction(2) ** -24) for n in range(-6, 7)]

    return all(
        not group
        or any(
            is_under(group, scale, float32(tensor))
            for q in E2M1
            for scale in DIGITS
            for tensor in tensors(group[-1], q, scale)
        )
        for group in groups
    )


def test_what_is_recognised_as_stored_is_what_exact_fractions_say():
    generator = torch.Generator().manual_seed(0)

    def pick(values, n=1):
        return torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)]

    answers = []
    for _ in range(24):
        line = pick([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], 24) * pick([1.0, -1.0], 24)
        line[:16] *= pick([1.0, 1.0, 1.0, 1.0, 9 / 8, 2.0], 16) if pick([0.0, 1.0]) else 1.0
        line[16:] *= pick([2.0**-3, 13 * 2.0**-6, 11 / 8])
        line[16:] *= torch.rand((), generator=generator)  # of two float32 roundings, this is the second one
        if pick([0.0, 0.0, 1.0]):
            line[16 + int(pick([0, 3, 7]))] *= 1 + 2.0**-22
        answers.append(stored.is_stored(line[None], BLOCKS["nvfp4"]))
        assert answers[-1] == is_stored_by_hand(line.tolist()), line
    assert 5 < sum(answers) < 20


@pytest.mark.parametrize(
    "rounding", ["nearest", "nearest_away", "toward_zero", "up", "down", "stochastic", "stochastic:2:half"]
)
def test_what_was_rounded_is_recognised_and_random_numbers_are_not(rounding):
    torch.manual_seed(0)
    nvfp4 = BLOCKS["nvfp4"]
    for key in range(24):
        exponent = torch.randint(-20, 20, (6, 1)).float() * (key % 4) if key % 3 else torch.full((6, 1), 2.0 * key)
        x = torch.randn(6, 37) * torch.exp2(exponent - (150 if key % 6 == 0 else 0))
        x[0] = 0 if key % 7 == 0 else x[0]
        assert stored.is_stored(quantize(x, nvfp4, rounding, key=key, dim=1), nvfp4), key
        with torch.device("meta" if key % 2 else "cpu"):  # another default device changes nothing
            assert key % 6 == 0 or not stored.is_stored(x, nvfp4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_recognised(bad):
    x = torch.ones(2, 16)
    assert stored.is_stored(x, BLOCKS["nvfp4"])
    x[1, 3] = bad
    assert not stored.is_stored(x, BLOCKS["nvfp4"])


@pytest.mark.parametrize("fmt", [*FORMATS, *(fmt for fmt in SCALES if "delayed" not in fmt)])
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero", "stochastic"])
def test_only_formats_that_say_so_move_when_they_are_rounded_again(fmt, rounding):
    torch.manual_seed(0)
    x = torch.randn(64, 48)
    once = quantize(x, fmt, rounding, key=1)
    again = quantize(once, fmt, rounding, key=2)
    if not stored.moves_again(format_named(fmt)):
        assert torch.equal(once, again)
    elif rounding == "stochastic" and any(word in fmt for word in ("nvfp4", "quest", "headroom", "expand", "even")):
        assert not torch.equal(once, again)  # else there would be nothing to take care of


# Weights that somebody else uses, or writes


class UsesWeightsOfOthers(nn.Module):
    def __init__(self):
        super().__init__()
        self.root = nn.Parameter(torch.randn(8))
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.list = nn.ParameterList([nn.Parameter(torch.randn(8, 8))])
        self.dict = nn.ParameterDict({"a": nn.Parameter(torch.randn(8, 8))})
        self.attention, self.never_called = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, tokens):
        x = self.embedding(tokens) @ self.list[0] @ self.dict["a"] + self.root
        x = F.linear(self.attention(x, x, x)[0], self.never_called.weight, self.never_called.bias)
        return self.head(x)


def test_weights_that_a_parent_uses_are_rounded_before_it_does():
    torch.manual_seed(0)
    model = quantize_model(UsesWeightsOfOthers(), weights="float8")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)  # that knows nothing of rounding
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(10)).square().mean().backward()
        optimizer.step()
    assert not all(holds(p, FLOAT8) for p in model.parameters())
    model(torch.arange(10))
    assert all(holds(p, FLOAT8) for p in model.parameters())
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("kept", ["accumulator", "compensation"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_forgotten_quantize_optimizer_is_an_error_where_something_would_be_lost(kept, copied):
    model = quantize_model(small(), weights="float8", **{kept: "float32"})
    model = copy.deepcopy(model) if copied else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(batch()[0]).square().mean().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=f"and not their {kept}.*quantize_optimizer"):
        model(batch()[0])


@pytest.mark.parametrize("kept", [{}, {"accumulator": "float32"}, {"compensation": "float32"}])
def test_a_frozen_part_may_follow_the_other_in_training(kept):
    """A target network, as of BYOL or DQN, which no optimizer moves: nothing was forgotten."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"online": nn.Linear(8, 8), "target": nn.Linear(8, 8).requires_grad_(False)})
    model.forward = lambda x: model["online"](x) - model["target"](x)
    quantize_model(model, weights="float8", **kept)
    optimizer = quantize_optimizer(torch.optim.SGD(model["online"].parameters(), 0.1), model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            model["target"].weight.lerp_(model["online"].weight, 0.1)
    model(torch.ones(2, 8))
    assert holds(model["target"].weight, FLOAT8)
