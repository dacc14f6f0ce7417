"""Stochastic rounding with few random bits: gfloat's two variants bit by bit, and the bias that the papers state."""

import math

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch

from low_precision.noise import Key, words
from low_precision.rounding import FewBits, Rounding, is_random, rounding_named
from low_precision.tensor import quantize

VARIANTS = {False: gfloat.RoundMode.StochasticFastest, True: gfloat.RoundMode.StochasticFast}


@pytest.mark.parametrize("bits", [1, 2, 5, 11, 23])
@pytest.mark.parametrize("half", [False, True])
def test_each_element_is_gfloats(bits, half):
    info, fmt, key = gfloat.formats.format_info_ocp_e5m2, "float8_e5m2", Key(9)
    generator = np.random.default_rng(bits)
    x = np.ldexp(generator.uniform(1, 2, 3000), generator.integers(-26, 15, 3000)).astype(np.float32)
    x *= generator.choice([-1, 1], 3000)
    random_bits = words(key, 0, len(x)).numpy().view(np.uint32) >> (32 - bits)
    theirs = [
        gfloat.round_float(info, float(v), VARIANTS[half], True, int(r), bits)
        for v, r in zip(x, random_bits, strict=True)
    ]
    ours = quantize(torch.from_numpy(x), fmt, FewBits(bits, half), key)
    assert ours.tolist() == theirs


@pytest.mark.parametrize("bits", [1, 3, 6])
@pytest.mark.parametrize("half", [False, True])
def test_bias(bits, half):
    """Over all values of a gap, 2**-(bits + 1) of it toward zero when cut off, none with the half offset."""
    n = 2**20  # inside the gap [1, 1.25) of float8, evenly
    offset = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x = (1 + offset / 4).float()
    ups = (quantize(x, "float8", FewBits(bits, half), 3) == 1.25).double()
    bias = float((ups - offset).mean())
    expected = 0.0 if half else -(2.0 ** -(bits + 1))
    # The probability is that of the value's step: var(up) summed over all, at most n / 4.
    assert abs(bias - expected) < 5 * math.sqrt(0.25 / n) + 2.0**-20


def test_many_bits_are_nearly_all():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    exact, few = (quantize(x, "float8", rounding, 3) for rounding in ("stochastic", "stochastic:23"))
    assert torch.equal(exact, few)  # in the normal range, 21 bits are all that count


def test_names():
    assert rounding_named("stochastic") is Rounding.STOCHASTIC
    assert rounding_named("stochastic:8") == FewBits(8)
    assert rounding_named("stochastic:8:half") == FewBits(8, True)
    for rounding in [*Rounding, FewBits(1), FewBits(23, True)]:
        assert rounding_named(str(rounding)) == rounding
    assert [str(r) for r in (*Rounding, FewBits(2)) if is_random(r)] == ["stochastic", "stochastic:2"]


@pytest.mark.parametrize(
    "name", ["stochastic:0", "stochastic:24", "stochastic:8:", "stochastic:8:quarter", "stochastic:", "x"]
)
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"allowed: nearest, .*stochastic:R"):
        rounding_named(name)


def test_a_key_is_needed():
    with pytest.raises(ValueError, match="needs a key"):
        quantize(torch.ones(3), "float8", "stochastic:4")
