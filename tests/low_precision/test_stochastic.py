"""Stochastic rounding: the probability is (x - a) / (b - a), exactly, and depends on (key, index) alone."""

import math

import numpy as np
import oracles
import pytest
import torch

from low_precision.engines import eager
from low_precision.formats import NAMED, format_named
from low_precision.noise import Key, words
from low_precision.rounding import Rounding
from low_precision.tensor import quantize

N = 400_000


def up_share(x: float, fmt, key: int, n: int = N) -> tuple[float, float, float]:
    """(share rounded to the upper neighbour, lower neighbour, upper neighbour) of n copies of x."""
    ours = quantize(torch.full((n,), x), fmt, "stochastic", key=key).double().numpy()
    _, low, high = oracles.round_exactly(x, fmt, Rounding.DOWN)
    assert set(np.unique(ours)) <= {float(low), float(high)}
    return float((ours == float(high)).mean()), low, high


@pytest.mark.parametrize("name", ["float8", "float16", "float8_e4m3fn", "bfloat16", "float4_e2m1fn", "e3m0", "e8m3"])
@pytest.mark.parametrize("sign", [1, -1])
def test_probability(name, sign):
    fmt = format_named(name)
    random = np.random.default_rng(12)
    normal = [fmt.smallest_normal * 2.0**e * random.uniform(1, 2) for e in (0, 1, 3)]
    subnormal = [fmt.smallest_subnormal * random.uniform(0, 2**fmt.mantissa_bits) for _ in range(3)]
    small = [fmt.smallest_subnormal * p for p in (0.5, 0.25, 0.01, 0.001)]
    for i, x in enumerate([*normal, *subnormal, *small]):
        x = sign * float(np.float32(min(x, fmt.largest * 0.99)))
        share, low, high = up_share(x, fmt, key=100 + i)
        if low == high:
            continue
        p = float((oracles.Fraction(x) - low) / (high - low))
        assert abs(share - p) * N < 5.5 * math.sqrt(N * p * (1 - p)) + 1


def test_far_below_the_smallest_value_every_bit_counts():
    """2**-30 of float8's smallest value and less: a probability that 32 bits do not hold."""
    fmt, key = NAMED["float8"], Key(77)
    n = 2**22
    for below in (15, 17, 18):
        x = math.ldexp(1.5, -16 - below)
        ours = quantize(torch.full((n,), x), fmt, "stochastic", key=key)
        ups = int((ours > 0).sum())
        p = math.ldexp(1.5, -below)
        assert abs(ups - n * p) < 5 * math.sqrt(n * p) + 1, (below, ups, n * p)
        assert ups > 0


def test_far_values_follow_the_words():
    """Such a value is rounded up where enough further bits are zero: sought here, as it is rare."""
    fmt, key, n = NAMED["float8"], Key(78), 2**21
    first, further = words(key, 0, n), words(key, 0, n, draw=1)
    sought = (first >= 0) & (further >= 0) & (further < 2**14)  # the word below the significand; 18 zero bits or more
    index = int(sought.nonzero()[0])
    there = 32 - int(further[index]).bit_length()

    def up(zeros: int) -> bool:  # how many zero bits the value asks for
        x = torch.full((index + 1,), math.ldexp(2**24 - 1, -16 - 24 - zeros))
        return bool(quantize(x, fmt, "stochastic", key=key)[index] == fmt.smallest_subnormal)

    assert all(up(zeros) for zeros in range(7, there + 1))
    assert not any(up(zeros) for zeros in range(there + 1, 40))


def test_more_zeros_than_a_word_holds(monkeypatch):
    """drop - 24 > 32: the second further word decides, where the first one is zero. Found by making words ourselves."""
    rounded = torch.ones(2, dtype=torch.int32)
    word = torch.zeros(2, dtype=torch.int32)
    significand = torch.full((2,), 2**23, dtype=torch.int32)
    drop = torch.tensor([33, 93], dtype=torch.int32)
    calls = []

    def zeros_then_one(index, parts):
        calls.append(len(index))
        return torch.zeros_like(index) if len(calls) < 3 else torch.full_like(index, 1 << 10)

    monkeypatch.setattr(eager, "hash_words", zeros_then_one)
    eager._round_deep(rounded, word, significand, drop, eager._SINGLE, Key(1), 0)
    # drop 33: 9 zero bits, in the first word. drop 93: 69 zero bits, two words and 5 bits of the third, all zero.
    assert calls == [2, 1, 1]
    assert rounded.tolist() == [1, 1]


@pytest.mark.parametrize("beside", [1e-9, 1e-3, 1.0, 1e9])
@pytest.mark.parametrize("name", ["float8", "float16", "float8_e4m3fnuz", "e7m2"])
def test_where_the_further_word_is_zero_the_engines_agree(name, beside):
    """Which happens once in 2**32 elements: sought here, so that a third word decides. beside: what else is there."""
    fmt, ups, asked = format_named(name), 0, 0
    for value in range(40):
        key = Key.of("third word", name, value)
        index = oracles.index_of_word(0, key.parts(draw=1))
        first = min(max(index - 300, 0), 2**32 - 700)
        place = index - first
        assert int(words(key, first, 700, draw=1)[place]) == 0
        x = torch.randn(700, generator=torch.Generator().manual_seed(value)) * beside
        for zeros in (7, 31, 32, 33, 34, 36, 40, 70):
            x[place] = math.ldexp(fmt.smallest_subnormal * (2**24 - 1), -24 - zeros)
            eager, fused = (
                quantize(x, fmt, "stochastic", Key(key.value, first), backend=backend) for backend in ("eager", "fused")
            )
            assert torch.equal(eager.view(torch.int32), fused.view(torch.int32))
            if zeros == 33:
                asked, ups = asked + 1, ups + bool(fused[place])
    assert abs(ups - asked / 2) < 5 * math.sqrt(asked / 4)


def test_a_tie_goes_either_way():
    share, _, _ = up_share(1.125, NAMED["float8"], key=5)
    assert abs(share - 0.5) * N < 5 * math.sqrt(N / 4)


def test_mean_is_kept():
    """E[round(x)] = x: over many keys, the mean of a rounded tensor comes back to it."""
    x = torch.from_numpy(np.random.default_rng(13).standard_normal(1000).astype(np.float32))
    fmt, repeats = NAMED["float8"], 400
    total = sum(quantize(x, fmt, "stochastic", key=Key.of("mean", i)).double() for i in range(repeats))
    last = 2.0 ** (torch.frexp(x.double().abs())[1] - 1).clamp(min=-14) / 4
    z = (total / repeats - x.double()) / (last / 2 / math.sqrt(repeats))  # deviation at most half a last place
    assert z.abs().max() < 5.5


def test_a_key_is_needed():
    with pytest.raises(ValueError, match="needs a key"):
        quantize(torch.ones(3), "float8", "stochastic")


def test_same_key_same_bits_other_key_others():
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    first = quantize(x, "float8", "stochastic", key=7)
    torch.manual_seed(5)
    assert torch.equal(first, quantize(x, "float8", "stochastic", key=Key(7)))
    assert not torch.equal(first, quantize(x, "float8", "stochastic", key=8))


def test_layout_threads_and_blocks_change_nothing(monkeypatch):
    x = torch.randn(4, 6, 50, 70, generator=torch.Generator().manual_seed(2)) * 1e-3
    expected = quantize(x, "float8", "stochastic", key=3)
    inside_out = quantize(x.to(memory_format=torch.channels_last), "float8", "stochastic", key=3)
    assert inside_out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(expected, inside_out)
    padded = torch.zeros(4, 6, 50, 140)
    padded[..., ::2] = x
    assert torch.equal(expected, quantize(padded[..., ::2], "float8", "stochastic", key=3))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(expected, quantize(x, "float8", "stochastic", key=3))
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(eager, "_CPU_BLOCK", 1024)
    assert torch.equal(expected, quantize(x, "float8", "stochastic", key=3))


def test_signs_share_the_magnitudes_noise():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(quantize(x, "float8", "stochastic", key=4), -quantize(-x, "float8", "stochastic", key=4))
