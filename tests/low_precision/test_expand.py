"""Range expansion against COAT's formulas, told once more number by number, and what happens at their edges."""

import math

import numpy as np
import pytest
import torch
from training_helpers import equal_bits

import low_precision as lp

FMT = "float8_e4m3fn@flat128@expand"
INF, NAN = math.inf, math.nan
f32 = np.float32


def element(x) -> float:
    return float(torch.tensor(float(np.clip(x, -448, 448))).to(torch.float8_e4m3fn).float())


def told(group: list[float]) -> list[float]:
    """One group, in numpy's float32; powers and logarithms in float64."""
    largest = max((abs(z) for z in group), default=0.0)
    smallest = min((abs(z) for z in group if z), default=0.0)
    a, b = f32(np.float64(largest) + 1e-30), f32(np.float64(smallest) + 1e-30)
    c = np.sqrt(a) * np.sqrt(b)
    k = f32(1)
    if a > b:
        k = f32(math.floor(f32(math.log2(448 * 448 / 2)) / f32(math.log2(float(a / b))) * 16) / 16)
    s = f32(math.pow(a / c, k)) / f32(448)
    values = []
    for z in group:
        q = element(math.copysign(f32(math.pow(f32(abs(z)) / c, k)), z) / s)
        root = f32(math.pow(f32(abs(q)) * s, f32(1) / k))
        values.append(math.copysign(float(root * c), q))
    return values


def groups():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(14, 128, generator=generator)
    x[0] *= 1e-6
    x[1] = x[1].square()  # as a second moment
    x[2] = (x[2] * 8).exp2()
    x[3] *= 1e18
    x[4, 7:40] = 0.0
    x[5] = x[5].sign() * 0.37  # all of one magnitude
    x[6] = 0.0
    x[7] = 1e-38 * x[7].square()
    x[8, ::2] *= 2.0**-60
    x[9, 1:] = 0.0
    x[10] = 1.0 + 2.0**-23 * (x[10] > 0)  # as near as two numbers can be
    x[11, 0], x[11, 1] = -0.0, 0.0
    x[12] = torch.linspace(-3, 3, 128)
    x[13] = x[13].abs().clamp(min=1e-3)
    return x


def test_each_group_is_what_the_formulas_say():
    x = groups()
    ours = lp.quantize(x, FMT)
    expected = torch.tensor([told(group) for group in x.tolist()], dtype=torch.float64).float()
    assert equal_bits([ours], [expected])


def test_groups_are_cut_from_the_flattened_tensor_and_the_last_one_is_shorter():
    x = groups()[:5].reshape(-1)[:600].reshape(20, 30)
    flat = x.flatten().tolist()
    expected = [value for i in range(0, 600, 128) for value in told(flat[i : i + 128])]
    assert equal_bits([lp.quantize(x, FMT).flatten()], [torch.tensor(expected)])
    assert equal_bits([lp.quantize(x.t(), FMT)], [lp.quantize(x.t().contiguous(), FMT)])


def test_a_group_is_spread_over_the_elements_range():
    """By half of 448 squared, but for what k is cut to sixteenths."""
    x = torch.rand(128, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1  # a ratio of 10: k is 5
    ratio = float(x.max() / x.min())
    k = math.floor(math.log2(448**2 / 2) / math.log2(ratio) * 16) / 16
    assert 4 < k < 6
    errors = {name: (lp.quantize(x, f"float8_e4m3fn@flat128{name}") / x - 1).abs() for name in ("", "@expand")}
    assert float(errors[""].max()) > 0.04  # of four digits, half of an eighth, and less
    is_normal = x > 1.02 * x.max() * (2.0**-6 / 448) ** (1 / k)  # below, the elements lie further apart
    assert int(is_normal.sum()) > 100
    assert float(errors["@expand"][is_normal].max()) < 1.05 / 16 / k
    assert float(errors["@expand"].max()) < 0.05


def test_the_mean_error_of_moments_is_smaller_by_half_and_more():
    """COAT measures 1.6 times."""
    x = torch.randn(512, 128, generator=torch.Generator().manual_seed(1))
    moments = torch.stack([x, x.square()])
    plain, expanded = (
        ((lp.quantize(moments, f"float8_e4m3fn@flat128{name}") - moments) / moments).square().mean().sqrt()
        for name in ("", "@expand")
    )
    assert float(plain / expanded) > 1.5


def test_special_values():
    x = groups()[:1].repeat(3, 1)
    x[0, 5], x[1, 6], x[2] = NAN, -INF, NAN
    y = lp.quantize(x, FMT)
    assert y[0, 5].isnan()
    without = torch.cat([x[0, :5], x[0, 6:]])
    assert torch.equal(torch.cat([y[0, :5], y[0, 6:]]), lp.quantize(without, FMT))
    largest = torch.finfo(torch.float32).max
    assert torch.equal(y[1], lp.quantize(x[1].clamp(-largest, largest), FMT))
    assert float(y[1, 6]) <= -0.9 * largest
    assert y[1].isfinite().all()
    assert y[2].isnan().all()
    assert equal_bits([lp.quantize(torch.tensor([-0.0, 0.0]), FMT)], [torch.tensor([-0.0, 0.0])])
    assert float(lp.quantize(torch.tensor([0.3]), FMT)) == pytest.approx(0.3, rel=1e-6)
    tiny = torch.tensor([1e-45, 3e38, -2.0])
    assert lp.quantize(tiny, FMT).isfinite().all()


@pytest.mark.parametrize("name", ["tf32", "bfloat16", "float16", "binary8p1ue"])
def test_powers_beyond_float32_are_its_largest_number(name):
    """Of an element that reaches far, where all magnitudes lie close together."""
    x = 1.0 + torch.arange(128) % 3 * 2.0**-23
    for factor in (1.0, 2.0**-100, 2.0**100):
        rounded = lp.quantize(x * factor, f"{name}@flat128@expand")
        assert rounded.isfinite().all()
        assert float(rounded.max()) == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("rounding", ["stochastic", "toward_zero", "stochastic:4"])
def test_every_rounding_goes_to_a_neighbour(rounding):
    x = groups()[12:]
    low, high = lp.quantize(x, FMT, "down"), lp.quantize(x, FMT, "up")
    y = lp.quantize(x, FMT, rounding, key=3)
    assert ((y == low) | (y == high)).all()
    assert equal_bits([y], [lp.quantize(x, FMT, rounding, key=3)])
    assert (rounding == "toward_zero") != bool((lp.quantize(x, FMT, rounding, key=4) != y).any())


@pytest.mark.parametrize("backend", ["auto", "fused", "eager"])
def test_engines_and_types(backend):
    x = groups()
    expected = lp.quantize(x, FMT, "stochastic", key=1, backend="eager")
    assert equal_bits([lp.quantize(x, FMT, "stochastic", key=1, backend=backend)], [expected])
    assert torch.equal(lp.quantize(x.double(), FMT, "stochastic", key=1, backend=backend), expected.double())


def test_without_its_own_engine_flushing_of_subnormals_does_not_matter():
    x = groups()
    expected = lp.quantize(x, FMT)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor does not flush")
        assert equal_bits([lp.quantize(x, FMT)], [expected])
    finally:
        torch.set_flush_denormal(False)
