"""Fixed point, block floating point, Microscaling and NVFP4 against their peers and exact fractions."""

import math
import shutil
from fractions import Fraction

import gfloat
import gfloat.formats
import numpy as np
import oracles
import pytest
import torch

from low_precision.blocks import NAN_BITS
from low_precision.formats import BLOCKS, format_named
from low_precision.rounding import FewBits, Rounding
from low_precision.tensor import quantize

COMPILER = shutil.which("c++") or shutil.which("g++")
MODES = {
    "nearest": gfloat.RoundMode.TiesToEven,
    "nearest_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
}
MX = {
    "mxfp8_e4m3": gfloat.formats.format_info_mxfp8_e4m3,
    "mxfp8_e5m2": gfloat.formats.format_info_mxfp8_e5m2,
    "mxfp6_e3m2": gfloat.formats.format_info_mxfp6_e3m2,
    "mxfp6_e2m3": gfloat.formats.format_info_mxfp6_e2m3,
    "mxfp4": gfloat.formats.format_info_mxfp4_e2m1,
    "mxint8": gfloat.formats.format_info_mxint8,
}


def random(*shape: int, spread: float = 3.0, seed: int = 0) -> np.ndarray:
    """Normal numbers whose rows and blocks differ in size."""
    generator = np.random.default_rng(seed)
    size = np.exp2(np.round(generator.normal(0, spread, (*shape[:-1], -(-shape[-1] // 16))))).repeat(16, -1)
    return (generator.standard_normal(shape) * size[..., : shape[-1]]).astype(np.float32)


def ours(x: np.ndarray, name: str, rounding="nearest", key=None, dim=-1) -> np.ndarray:
    return quantize(torch.from_numpy(x), name, rounding, key, dim=dim).numpy()


# Fixed point


@pytest.mark.parametrize(
    "name", ["fixed8.4", "fixed8.4s", "fixed2.0", "fixed4.6", "fixed16.12", "fixed25.20", "fixed3.126"]
)
@pytest.mark.parametrize("rounding", list(MODES))
def test_fixed_point_is_multiples_between_bounds(name, rounding):
    word, fraction = (int(part) for part in name.removeprefix("fixed").removesuffix("s").split("."))
    lowest = -(2 ** (word - 1)) + name.endswith("s")
    highest = 2 ** (word - 1) - 1
    n = np.random.default_rng(1).integers(4 * lowest, 4 * highest, 500)
    x = np.concatenate([np.ldexp(n / 4, -fraction), np.ldexp(n / 3, -fraction), [1e-40, -1e-40]]).astype(np.float32)
    with np.errstate(over="ignore"):
        exact = [Fraction(float(v)) * 2**fraction for v in x]
    expected = []
    for v in exact:
        below = math.floor(v)
        above = below + (v != below)
        toward_zero, away = (below, above) if v > 0 else (above, below)
        middle = v - below == Fraction(1, 2)
        nearest = below if v - below < Fraction(1, 2) else above
        even = below if below % 2 == 0 else above
        result = {
            "nearest": even if middle else nearest,
            "nearest_away": away if middle else nearest,
            "toward_zero": toward_zero,
            "up": above,
            "down": below,
        }[rounding]
        expected.append(math.ldexp(max(lowest, min(highest, result)), -fraction))
    rounded = ours(x, name, rounding)
    assert rounded.tolist() == expected
    assert not np.signbit(rounded[rounded == 0]).any()


def test_fixed_points_special_values():
    x = np.float32([math.nan, math.inf, -math.inf, 1e38, -1e38, 0.0, -0.0])
    assert ours(x, "fixed8.4").tolist()[1:] == [7.9375, -8.0, 7.9375, -8.0, 0.0, 0.0]
    assert ours(x, "fixed8.4s").tolist()[1:] == [7.9375, -7.9375, 7.9375, -7.9375, 0.0, 0.0]
    assert np.isnan(ours(x, "fixed8.4")[0])


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="qtorch compiles C++")
@pytest.mark.parametrize(
    ("word", "fraction", "symmetric"), [(8, 4, False), (8, 4, True), (16, 12, False), (16, 8, True)]
)
def test_fixed_point_is_qtorchs(word, fraction, symmetric):
    from qtorch.quant import fixed_point_quantize

    x = torch.from_numpy(random(20_000, seed=2)) * 4
    x = x[(x * 2.0**fraction * 2) % 2 != 1]  # ties: qtorch's go up, ours to even
    theirs = fixed_point_quantize(x, word, fraction, symmetric=symmetric, rounding="nearest")
    mine = quantize(x, f"fixed{word}.{fraction}{'s' * symmetric}")
    assert torch.equal(mine, theirs)
    assert (mine.abs() >= 2.0 ** (word - fraction - 1) - 1).any()  # some of them saturate


# Blocks


def floor_log2(x: float) -> int:
    return math.frexp(x)[1] - 1


def rounded_in_block(block: np.ndarray, element, rounding: Rounding, emax: int) -> list[float]:
    """A block rounded with a shared power of two, in exact arithmetic."""
    amax = max((abs(float(v)) for v in block), default=0.0)
    scale = Fraction(2) ** max(-127, floor_log2(amax) - emax) if amax else Fraction(1)
    results = []
    for v in map(float, block):
        exact = Fraction(v) / scale
        if exact:
            result = oracles.round_exactly(exact, element, rounding)[0]
            result = max(Fraction(element.lowest), min(Fraction(element.largest), result)) * scale
        else:
            result = Fraction(0)
        results.append(float(result))
    return results


@pytest.mark.parametrize("name", [n for n in BLOCKS if n != "nvfp4"])
@pytest.mark.parametrize("rounding", list(MODES))
def test_microscaling_against_exact_arithmetic(name, rounding):
    fmt = format_named(name)
    emax = {"mxfp8_e4m3": 8, "mxfp8_e5m2": 15, "mxfp6_e3m2": 4, "mxfp6_e2m3": 2, "mxfp4": 2, "mxint8": 0}[name]
    for x in (random(3, 100), random(2, 70, spread=30.0, seed=5), random(2, 64, seed=6) * np.float32(1e-37)):
        expected = [
            value
            for row in x
            for start in range(0, len(row), 32)
            for value in rounded_in_block(row[start : start + 32], fmt.element, Rounding(rounding), emax)
        ]
        assert ours(x, name, rounding).ravel().tolist() == expected


@pytest.mark.parametrize("name", list(MX))
@pytest.mark.parametrize("rounding", list(MODES))
def test_microscaling_is_gfloats(name, rounding):
    x = random(40, 32, seed=3)
    if name == "mxint8":  # gfloat's INT8 has -2, which the specification leaves open: here the range is symmetric
        x = np.abs(x)
    for row in x:
        with np.errstate(all="ignore"):
            theirs = gfloat.quantize_block(MX[name], row.astype(np.float64), gfloat.compute_scale_amax, MODES[rounding])
        mine = ours(row[None], name, rounding)[0]
        assert np.array_equal(mine, theirs.astype(np.float32)), (mine, theirs)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="qtorch compiles C++")
@pytest.mark.parametrize("word", [3, 8, 12])
@pytest.mark.parametrize(("suffix", "dim"), [("", -1), ("_row", 0), ("_column", 1)])
def test_block_floating_point_is_qtorchs(word, suffix, dim):
    from qtorch.quant import block_quantize

    x = torch.from_numpy(random(30, 40, seed=4))
    others = {-1: (0, 1), 0: (1,), 1: (0,)}[dim]  # the dimensions that share an exponent
    place = torch.exp2(torch.frexp(x.abs().amax(others, keepdim=True))[1] - 1.0 - (word - 2))  # a block's last place
    # Ties go up there, to even here. And it adds 6 * 2**exponent first, which rounds too: next to ties, to ties.
    ties = (x / place % 1 - 0.5).abs() < 2.0 ** (word - 22)
    theirs = block_quantize(x, word, dim, "nearest")
    mine = quantize(x, f"bfp{word}{suffix}")
    compared = ~ties
    assert compared.float().mean() > 0.99
    assert torch.equal(mine[compared], theirs[compared])


def floor_log2_exactly(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def scale_exactly(amax: Fraction, fmt) -> Fraction:
    """BlockFormat's scale of a block, a power of two."""
    if amax == 0:
        return Fraction(1)
    return Fraction(2) ** min(max(floor_log2_exactly(amax) - floor_log2(fmt.element.largest), -127), 127)


def extremes(dtype: type) -> list[np.ndarray]:
    """Rows of 32 numbers from one end of the type to the other, whose blocks hold both, or one of them alone."""
    generator, limits = np.random.default_rng(12), np.finfo(dtype)
    low, high = math.frexp(float(limits.smallest_subnormal))[1], math.frexp(float(limits.max))[1]
    ranges = [(low, high), (low, low + 9), (high - 9, high), (-150, -100), (100, 128)]
    rows = [generator.integers(*(end + 1 for end in some), size=32) for some in ranges]
    rows += [
        np.where(np.arange(32) % 2, rows[1], generator.integers(-20, 20, 32)),
        np.where(np.arange(32) % 2, *rows[1:3]),
    ]
    with np.errstate(over="ignore", under="ignore"):
        rows = [
            np.ldexp(generator.uniform(0.5, 1, 32) * generator.choice([-1, 1], 32), row).astype(dtype) for row in rows
        ]
    rows = [np.clip(row, -limits.max, limits.max) for row in rows]
    alone = np.zeros(32, dtype)
    alone[3], alone[20], rows[3][5] = limits.smallest_subnormal, -limits.smallest_subnormal, limits.max
    return [*rows, alone]


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "mxint8", "bfp3", "bfp8", "bfp24"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_extreme_blocks_against_exact_arithmetic(name, dtype):
    """Quotients that are no numbers of float64 too: upwards, the smallest number becomes the smallest element."""
    fmt = format_named(name)
    size = fmt.block if isinstance(fmt.block, int) else 32
    for row in extremes(dtype):
        exact = [Fraction(float(x)) for x in row]
        scales = [scale_exactly(max(map(abs, exact[start : start + size])), fmt) for start in range(0, 32, size)]
        for rounding in MODES:
            expected = []
            for place, x in enumerate(exact):
                quotient = x / scales[place // size]
                if 0 < abs(quotient) < Fraction(2) ** -1000:  # the oracle asks for a number of float64
                    quotient = Fraction(2) ** -1000 * (1 if quotient > 0 else -1)
                element = oracles.round_exactly(quotient, fmt.element, Rounding(rounding))[0]
                limit = Fraction(fmt.element.largest)
                expected.append(float(max(-limit, min(limit, element)) * scales[place // size]))
            for backend in ("eager", "fused"):
                rounded = quantize(torch.from_numpy(row.copy()), name, rounding, backend=backend)
                assert rounded.tolist() == expected, (row, rounding, backend)


def test_the_smallest_number_upwards_is_the_smallest_element():
    x = torch.tensor([1024.0, 5e-324], dtype=torch.float64)
    assert quantize(x, "mxfp8_e4m3", "up").tolist() == [1024.0, 2.0**-7]
    assert quantize(-x, "mxfp8_e4m3", "down").tolist() == [-1024.0, -(2.0**-7)]
    for rounding in ("nearest", "toward_zero", "down", "stochastic", "stochastic:8", "stochastic:8:half"):
        assert quantize(x, "mxfp8_e4m3", rounding, 3).tolist() == [1024.0, 0.0]


@pytest.mark.parametrize("name", [*BLOCKS, "bfp8", "bfp8_row", "bfp8_column", "bfp24"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_infinities_saturate_and_nan_has_the_same_bits(name, dtype):
    """In every engine, at every place: torch's conversions to two bytes treat the last few numbers otherwise."""
    if name == "nvfp4" and dtype.itemsize == 2:
        return
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    x = torch.from_numpy(random(37, 33, seed=13)).to(dtype)
    x[::2, ::3], x[::3, 1::5] = math.nan, -math.nan
    x[5, 7], x[6, 8] = math.inf, -math.inf
    slow, quick = (quantize(x, name, backend=backend) for backend in ("eager", "fused"))
    assert torch.equal(slow.view(whole), quick.view(whole))
    assert slow[5, 7] > torch.finfo(dtype).max * 0.7 or dtype == torch.float64  # whose largest scale is 2**127
    assert slow[6, 8] == -slow[5, 7]
    assert not slow.isinf().any()
    not_numbers = slow.view(whole)[x.isnan()]
    if dtype.itemsize > 2:
        assert torch.equal(not_numbers, torch.where(x.signbit(), -1, torch.iinfo(whole).max).to(whole)[x.isnan()])
    else:
        assert (not_numbers == NAN_BITS[dtype]).all()


@pytest.mark.parametrize("name", [*BLOCKS, "bfp8", "bfp8_row", "bfp8_column"])
def test_special_values_in_blocks(name):
    x = torch.from_numpy(random(3, 64))
    x[1, 3:5] = 0.0
    expected = quantize(x, name)
    x[1, 3] = math.nan
    x[1, 4] = -0.0
    rounded = quantize(x, name)
    assert rounded[1, 3].isnan()
    assert rounded[1, 4] == 0
    others = torch.ones_like(x, dtype=torch.bool)
    others[1, 3:5] = False
    assert torch.equal(rounded[others], expected[others])
    x[1, 5] = -math.inf
    saturated = quantize(x, name)
    assert saturated[1, 5] < -1e38
    assert saturated[1, 5].isfinite()
    assert quantize(torch.zeros(2, 40), name).abs().sum() == 0
    assert quantize(torch.zeros(0, 40), name).shape == (0, 40)
    assert float(quantize(torch.tensor(1.0), name)) == pytest.approx(1.0, rel=1 / 16)  # nvfp4: its scale is rounded
    with pytest.raises(ValueError, match="infinity"):
        quantize(x, name, overflow="infinity")


@pytest.mark.parametrize("name", [*BLOCKS, "bfp8", "bfp8_row", "bfp8_column", "fixed8.4", "fixed16.12"])
@pytest.mark.parametrize("rounding", [*Rounding, FewBits(4)], ids=str)
def test_rounding_twice_is_rounding_once(name, rounding):
    """Its own values do not move: they are the format's, and so is their scale."""
    x = torch.from_numpy(random(20, 100, seed=9))
    once = quantize(x, name, rounding, 3)
    if name == "nvfp4":  # its scales follow from values that have moved
        return
    moved = once != quantize(once, name, rounding, 4)
    if "fixed" in name:
        assert not moved.any()
    # What was rounded up to the next power of two makes its block's scale larger: only those blocks may move.
    assert moved.float().mean() < 0.25


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_blocks_run_along_a_dimension(dim):
    x = torch.from_numpy(random(40, 33, 5, seed=10))
    along = quantize(x.movedim(dim, -1).contiguous(), "mxfp8_e4m3", dim=-1).movedim(-1, dim)
    assert torch.equal(quantize(x, "mxfp8_e4m3", dim=dim), along)
    with pytest.raises(IndexError):
        quantize(x, "mxfp8_e4m3", dim=3)


@pytest.mark.parametrize(
    "name", ["e5m23", "e2m23@8@e8m0", "e5m23@tensor@e8m0", "e2m22@8@e8m0", "e3m23@flat8@e8m0_ceil"]
)
@pytest.mark.parametrize("rounding", ["nearest", "nearest_away", "up", "stochastic", "stochastic:4:half"])
def test_elements_with_as_many_digits_as_float32(name, rounding):
    for x in (torch.from_numpy(random(9, 20)), torch.tensor(-1.59)):
        eager, fused = (quantize(x, name, rounding, 3, backend=backend) for backend in ("eager", "fused"))
        assert torch.equal(eager, fused)
        assert torch.allclose(fused, x, rtol=2**-20, atol=2**-14 * float(x.abs().max()))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "mxint8", "nvfp4", "bfp8"])
def test_stochastic_rounding_in_blocks_keeps_the_mean(name):
    x = torch.from_numpy(random(4, 64, seed=11))
    low, high = quantize(x, name, "down").double(), quantize(x, name, "up").double()
    repeats = 400
    total = sum(quantize(x, name, "stochastic", key).double() for key in range(repeats))
    gap = high - low
    inside = (x.double() >= low) & (x.double() <= high) & (gap > 0)  # not what saturates
    z = (total / repeats - x.double())[inside] / (gap[inside] / 2 / math.sqrt(repeats))
    assert inside.float().mean() > 0.8
    assert z.abs().max() < 5.5
