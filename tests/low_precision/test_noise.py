"""The random bits: their values are fixed, they are uniform, and streams do not resemble each other.

Tolerances: |z| < 5 for a single normal statistic (a false alarm in 10**6), wider by a Bonferroni factor for many.
"""

import math

import numpy as np
import pytest
import torch

from low_precision.noise import Key, hash_words, words

M = 2**32 - 1


def word(parts, index):
    """The definition, in whole numbers of Python's own, or in arrays of uint64."""
    x = (index ^ parts[0]) & M
    x = (x ^ x >> 17) * 0xED5AD4BB & M
    x ^= parts[1]
    x = (x ^ x >> 11) * 0xAC4C1B51 & M
    x ^= parts[2]
    x = (x ^ x >> 15) * 0x31848BAB & M
    return x ^ x >> 14


def unsigned(t):
    return t.numpy().view(np.uint32)


def test_values_are_fixed():
    # Any change here changes every stochastic result ever recorded.
    index = torch.tensor([0, 1, 2, 12345, 2**31 - 1, -1], dtype=torch.int32)
    ours = [f"{w:08x}" for w in unsigned(hash_words(index.clone(), (0x89ABCDEF, 0x01234567, 0xFEDCBA98)))]
    assert ours == ["e4074d5c", "c8fffdd9", "358acdc3", "b9d78330", "e18b7e03", "c6f81d40"]
    assert Key(7).parts() == (0x59320DD7, 0x63CBE1E4, 0xAB415EE4)
    assert Key.of(42, "weights", "linear.weight").value == 0x64D7D565A88650AB
    assert Key(7).fold(3).value == 0x953AEB70673E29CB


@pytest.mark.parametrize("start", [0, 5, 2**31 - 2, 2**32 - 4, 2**32, 2**33 + 7])
def test_words_are_their_definition(start):
    key = Key(0xDEADBEEF12345678)
    ours = words(key, start, 4)
    assert ours.dtype == torch.int32
    parts = key.parts(start >> 32)
    assert unsigned(ours).tolist() == [word(parts, (start + i) & M) for i in range(4)]


def test_a_range_is_the_same_in_pieces():
    key = Key(3)
    whole = words(key, 0, 1000)
    assert torch.equal(whole, torch.cat([words(key, 0, 17), words(key, 17, 483), words(key, 500, 500)]))


def test_a_range_across_two_to_the_32_is_refused():
    with pytest.raises(ValueError, match="cross"):
        words(Key(1), 2**32 - 1, 2)


@pytest.mark.parametrize("value", [-1, 2**64, 1.0, "7", True])
def test_key_must_be_a_whole_number_of_64_bits(value):
    with pytest.raises(ValueError, match="key"):
        Key(value)


def test_further_draws_and_blocks_are_other_streams():
    key = Key(9)
    streams = [words(key, 0, 4096), words(key, 2**32, 4096), words(key, 0, 4096, draw=1), words(key.fold(0), 0, 4096)]
    for i, a in enumerate(streams):
        for b in streams[i + 1 :]:
            assert (a == b).sum() < 3


def test_keys_of_other_parts_differ():
    seen = {
        Key.of(seed, site, tensor).fold(step).fold(call).value
        for seed in range(4)
        for site in ("weights", "errors")
        for tensor in ("a", "a.input", "b")
        for step in range(20)
        for call in range(4)
    }
    assert len(seen) == 4 * 2 * 3 * 20 * 4
    assert Key.of(1, "ab", "c") != Key.of(1, "a", "bc")


N = 2**20


@pytest.mark.parametrize("key", [Key(0), Key(1), Key(2**64 - 1), Key.of(42, "weights", "linear.weight")])
def test_uniform_within_a_stream(key):
    w = unsigned(words(key, 0, N))
    ones = np.unpackbits(w.view(np.uint8)).reshape(N, 32).sum(0)
    assert np.abs(ones - N / 2).max() < 5.7 * math.sqrt(N / 4)  # 32 bits
    for shift in (24, 16, 8, 0):
        counts = np.bincount((w >> shift) & 255, minlength=256)
        assert chi_square_z(counts, N / 256) < 5.2
    for lag in (1, 2, 3, 16, 64, 1024):  # pairs of top nibbles
        pairs = (w[:-lag] >> 28) * 16 + (w[lag:] >> 28)
        assert chi_square_z(np.bincount(pairs, minlength=256), (N - lag) / 256) < 5.5


def chi_square_z(counts, expected):
    """The chi-square statistic of a uniform histogram, as a standard normal one (Wilson and Hilferty 1931)."""
    k = len(counts) - 1
    chi = float(((counts - expected) ** 2 / expected).sum())
    return abs(((chi / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k)))


def streams(kind, n, count):
    """Keys as a run uses them, n words each: neighbours in step, in call, in tensor, in seed, in a plain number."""
    keys = {
        "step": lambda i: Key.of(42, "errors", "a").fold(i).fold(0),
        "call": lambda i: Key.of(42, "errors", "a").fold(7).fold(i),
        "tensor": lambda i: Key.of(42, "errors", f"layer{i}"),
        "seed": lambda i: Key.of(i, "errors", "a"),
        "number": lambda i: Key(i),
        "high": lambda i: Key(i << 44),
    }[kind]
    parts = np.array([keys(i).parts() for i in range(count)], dtype=np.uint64)
    streams = word(parts.T[:, :, None], np.arange(n, dtype=np.uint64)).astype(np.uint32)
    for i in (0, count - 1):  # `words` itself takes seconds for thousands of keys
        assert np.array_equal(streams[i], unsigned(words(keys(i), 0, n)))
    return streams


KINDS = ["step", "call", "tensor", "seed", "number", "high"]


@pytest.mark.parametrize("kind", KINDS)
def test_streams_do_not_correlate(kind):
    """Top bits of every two of 64 streams, at the same index, at lags, and at XORed indices."""
    n, count = 2**14, 64
    w = streams(kind, n, count)
    signs = np.where(w >> 31, 1.0, -1.0)
    pairs = ~np.eye(count, dtype=bool)
    for moved in [
        signs,
        np.roll(signs, 1, 1),
        np.roll(signs, 2, 1),
        signs[:, np.arange(n) ^ 1],
        signs[:, np.arange(n) ^ 4096],
    ]:
        z = (signs @ moved.T / math.sqrt(n))[pairs]
        assert np.abs(z).max() < 6.2  # 5 * 4032 statistics
        assert abs(z.std() - 1) < 6 / math.sqrt(len(z))


@pytest.mark.parametrize("kind", KINDS)
def test_streams_share_no_numbers(kind):
    """The trap of a key that is only XORed into the index: the same numbers in another order."""
    n, count = 2**14, 32
    sets = [set(row.tolist()) for row in streams(kind, n, count)]
    shared = [len(sets[i] & sets[j]) for i in range(count) for j in range(i)]
    expected = n * n / 2**32  # 1/16 of a number
    assert sum(shared) < len(shared) * expected + 6 * math.sqrt(len(shared) * expected) + 6
    assert max(shared) <= 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 13, 64])
def test_uniform_across_short_streams(kind, n):
    """Many small tensors in a row: the first words of thousands of keys."""
    w = streams(kind, n, 2**15 // n).ravel()
    for shift in (24, 0):
        assert chi_square_z(np.bincount((w >> shift) & 255, minlength=256), len(w) / 256) < 5.2
    joint = (w[:-1] >> 28) * 16 + (w[1:] >> 28)
    assert chi_square_z(np.bincount(joint, minlength=256), (len(w) - 1) / 256) < 5.2


def test_every_key_bit_reaches_every_bit():
    """Avalanche: one bit of a plain key flipped flips each output bit in half of the words."""
    n = 4096
    base = unsigned(words(Key(0x0123456789ABCDEF), 0, n))
    for bit in range(64):
        flipped = base ^ unsigned(words(Key(0x0123456789ABCDEF ^ 1 << bit), 0, n))
        share = np.unpackbits(flipped.view(np.uint8)).reshape(n, 32).sum(0)
        assert np.abs(share - n / 2).max() < 6.2 * math.sqrt(n / 4)  # 2048 statistics
