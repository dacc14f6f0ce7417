"""Moments in 8 bits beside torchao and bitsandbytes: codes of groups, and steps of AdamW (bench/optimizer_states.py).

They keep a group's largest magnitude and divide by it; our scale is its reciprocal (or the element's largest value over
it), by which numbers are multiplied. So what a code stands for may differ in its last bits.
"""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from state_inputs import SETTINGS, STEPS, TIES, gradient, groups, start

import low_precision as lp
from low_precision.formats import format_named

pytestmark = pytest.mark.usefixtures("one_thread")

MADE = json.loads((Path(__file__).parent / "moments.json").read_text())
DYNAMIC = ("dynamic8@flat256", "dynamic8u@flat256")
FLOAT8 = ("float8_e4m3fn@flat256", "float8_e4m3fn@flat256")


def unpacked(text, dtype):
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype)


def values_of(rule):
    """By code."""
    if rule in DYNAMIC:
        return np.array(format_named(rule).element.values, np.float32)
    return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def decoded(kept, rule):
    """Another project's numbers, (groups, 256)."""
    codes, scales = unpacked(kept["codes"], np.uint8), unpacked(kept["scales"], np.float32)
    return values_of(rule)[codes].reshape(-1, 256).astype(np.float64) * scales[:, None]


def have_other_codes(ours, kept, rule):
    """Of which numbers, bool (groups, 256). Equal codes give equal numbers, but for three float32 roundings."""
    theirs = decoded(kept, rule)
    return abs(ours.double().numpy().reshape(-1, 256) - theirs) > 4e-7 * abs(theirs) + 1e-44


@pytest.mark.parametrize(
    ("name", "rules"), [("torchao", DYNAMIC), ("torchao float8", FLOAT8), ("bitsandbytes", DYNAMIC)]
)
@pytest.mark.parametrize("unsigned", [False, True])
def test_codes_of_groups(name, rules, unsigned):
    """Of a number in the middle of two values, the code may be the other one: ours is the even one, torchao's the upper
    one, bitsandbytes' the lower one.
    """
    x, kept, rule = groups(unsigned), MADE["groups"][f"{name} {'un' * unsigned}signed"], rules[unsigned]
    are_others = have_other_codes(lp.quantize(x, rule), kept, rule)
    if "float8" not in name:
        values = torch.tensor(values_of(rule)).double()
        is_middle = x[TIES, 1:].double() == (values[1:] + values[:-1]) / 2
        place = torch.arange(255)  # of the lower value, of each middle
        goes_elsewhere = is_middle & (place % 2 == (0 if name == "torchao" else 1))
        assert goes_elsewhere.sum() > 50
        is_odd = goes_elsewhere != torch.from_numpy(are_others[TIES, 1:])
        assert is_odd.sum() <= 1  # a number that is a middle to them, whose distances are rounded to float32
        assert not is_middle[is_odd].any()
        are_others[TIES] = False
    assert not are_others.any()


@pytest.mark.parametrize(
    ("name", "rules"),
    [("torchao AdamW8bit", DYNAMIC), ("torchao AdamWFp8", FLOAT8), ("bitsandbytes AdamW8bit", DYNAMIC)],
)
def test_steps_of_adamw(name, rules):
    """torch's AdamW with our sites, beside their own optimizers: the codes of both moments, and the parameter."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(start())
    lp.quantize_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    lp.quantize_optimizer(
        optimizer, model, **dict(zip(("momentum.exp_avg", "momentum.exp_avg_sq"), rules, strict=True))
    )
    plain = torch.nn.Parameter(start())
    unrounded = torch.optim.AdamW([plain], **SETTINGS)
    for n in range(1, STEPS[-1] + 1):
        model.weight.grad, plain.grad = gradient(n), gradient(n)
        optimizer.step()
        unrounded.step()
        if n not in STEPS:
            continue
        kept = MADE["steps"][name][str(n)]
        first, second = (
            have_other_codes(optimizer.state[model.weight][state], kept[letter], rule).sum()
            for state, letter, rule in zip(("exp_avg", "exp_avg_sq"), "mv", rules, strict=True)
        )
        assert (first, second) == (0, 0)
        p = unpacked(kept["p"], np.float32)
        assert abs(model.weight.detach().flatten()[::20].numpy() - p).max() < 1e-6
        if n > 1:  # the first step reads what was not rounded yet
            assert abs(plain.detach().flatten()[::20].numpy() - p).max() > 0.2
