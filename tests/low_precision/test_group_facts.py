"""What is said of groups that share a scale, against `quantize` itself and against exact fractions."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from low_precision import facts, group_facts
from low_precision.errors import SettingError
from low_precision.formats import format_named
from low_precision.group_facts import group
from low_precision.rounding import Rounding
from low_precision.rules import rule_of
from low_precision.tensor import quantize

E2M1 = "float4_e2m1fn"
POWERS = ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "bfp8"]
POWERS += [f"{E2M1}@32@{scale}" for scale in ("e8m0_ceil", "e8m0_rceil", "e8m0_even")]
OTHERS = ["float8_e4m3fn@tensor", "float8_e4m3fn@128x128@pow2", "int8@row", "nf4@64", "dynamic8u@flat256", "nvfp4"]
OTHERS += [f"{E2M1}@32@headroom", "posit8_table@16@pow2", "binary6p3ue@column"]
AMAX = [1.0, 1.3, 1.75, 1.9999, 6.0, 3.1e-5, 2.0**-140, 3e38]


def by_quantize(rule, numbers) -> torch.Tensor:
    """The numbers as a group of their own: its format, with the tensor as the group."""
    fmt = rule.format
    if fmt.scale_format is None:
        fmt = replace(fmt, name=f"{fmt.name} of a tensor", block="tensor")
    else:
        fmt = replace(fmt, name=f"{fmt.name} of so many", block=len(numbers))
    return quantize(torch.as_tensor(numbers, dtype=torch.float32), fmt, rule.rounding, 5, backend="eager")


@pytest.mark.parametrize("amax", AMAX)
@pytest.mark.parametrize("name", POWERS + OTHERS)
def test_a_group_holds_what_quantize_makes(name, amax):
    """All values that come out of a fine grid from 0 to amax, and no others: each comes out for itself."""
    rule = rule_of(name)
    told = group(rule, amax)
    amax = float(torch.tensor(amax))
    grid = amax * torch.arange(1, 4097, dtype=torch.float64) / 4096
    values = torch.tensor(told.line.values, dtype=torch.float64)
    numbers = torch.cat([grid, values[values <= amax]]).float()
    rounded = by_quantize(rule, torch.cat([torch.tensor([amax]), numbers]))
    assert float(rounded[0]) == told.becomes
    assert set(rounded.tolist()) - {0.0} == set(told.line.values)
    assert (told.line.smallest(), told.line.last) == (
        min(told.line.values, default=0),
        max(told.line.values, default=0),
    )


@pytest.mark.parametrize("rounding", ["nearest", "up", "down", "to_odd"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "nvfp4", "int8@row", "nf4@64", f"{E2M1}@32@headroom"])
def test_errors_of_a_group(name, rounding):
    rule = rule_of(f"{name}:{rounding}")
    for amax in (1.0, 1.3, 1.9):
        for one in group(rule, amax).binades(rule.rounding):
            low, high = math.ldexp(1.0, one.exponent), min(math.ldexp(2.0, one.exponent), amax)
            grid = (low + (high - low) * torch.arange(2048, dtype=torch.float64) / 2048).float()
            rounded = by_quantize(rule, torch.cat([torch.tensor([amax]), grid]))[1:]
            worst = float(((rounded.double() - grid.double()).abs() / grid.double()).max())
            assert worst <= one.error * (1 + 1e-6) + 1e-6, (amax, one)
            assert worst >= one.error * (1 - 3e-2) - 1e-6, (amax, one)


def test_stochastic_rounding_of_a_group():
    """The expected error is that of the element's gaps, times the scale; the values go beyond amax."""
    rule = rule_of("mxfp4:stochastic")
    told = group(rule, 1.25)
    assert (told.scale, told.becomes) == (0.25, 1.0)  # to nearest, where 5 is in the middle of 4 and 6
    assert told.line.values == (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5)
    rounded = by_quantize(rule, [1.25] * 1000)
    assert set(rounded.tolist()) == {1.0, 1.5}
    middle = told.binades(rule.rounding)[-2]
    assert (middle.exponent, middle.number) == (-1, 2)
    assert math.isclose(middle.error, 2 * 2 * (math.sqrt(3) - math.sqrt(2)) ** 2 / 2)


@pytest.mark.parametrize("amax", [Fraction(1), Fraction(5, 4), Fraction(7, 4), Fraction(3, 2**40)])
def test_scales_in_exact_fractions(amax):
    floor = math.frexp(float(amax))[1] - 1
    assert group(rule_of("mxfp4"), float(amax)).scale == Fraction(2) ** (floor - 2)
    assert group(rule_of("mxfp8_e4m3"), float(amax)).scale == Fraction(2) ** (floor - 8)
    assert group(rule_of(f"{E2M1}@32@headroom"), float(amax)).scale == pytest.approx(
        float(Fraction(4, 3) * Fraction(2) ** (floor - 2)), rel=1e-7
    )
    assert group(rule_of("float8_e4m3fn@tensor"), float(amax)).scale == pytest.approx(float(amax / 448), rel=1e-7)


@pytest.mark.parametrize("name", POWERS + OTHERS + ["float8_e4m3fn@tensor@delayed16"])
def test_what_becomes_of_amax(name):
    """The bounds hold for 3000 magnitudes of 40 powers of two, and are met within a hundredth."""
    rule = rule_of(name)
    low, high = group_facts.change_of_largest(rule)
    generator = torch.Generator().manual_seed(1)
    numbers = torch.ldexp(
        1 + torch.rand(3000, generator=generator), torch.randint(-20, 20, (3000,), generator=generator)
    )
    if rule.format.scaling.kind == "delayed":
        shares = torch.tensor([group_facts.rounded(rule, [one])[0] / one for one in numbers[:200].tolist()])
    else:
        others = torch.full((3000,), 2.0**20) if rule.format.scale_format else numbers
        fmt = replace(rule.format, name="in rows", block="row")
        pairs = torch.stack([numbers, numbers], 1)
        if rule.format.scale_format:
            numbers = torch.ldexp(numbers.frexp()[0], torch.tensor(14))  # within the reach of the scales
            pairs = torch.cat([torch.stack([numbers, numbers], 1), torch.stack([others, others], 1)[:1]])
        shares = (quantize(pairs, fmt, backend="eager")[: len(numbers), 0] / numbers).double()
    assert low * (1 - 1e-4) <= float(shares.min()) <= low * 1.01
    assert high * 0.99 <= float(shares.max()) <= high * (1 + 1e-4)


def test_how_far_scales_reach():
    """OCP's scales go from 2**-127 on, and float32 ends at amax 2**127 * 1.99..., whose scale is 2**(127 - emax)."""
    assert group_facts.reach(rule_of("mxfp4")) == (2.0**-128, 1.5 * 2.0**127)
    assert group_facts.reach(rule_of("mxfp8_e4m3")) == (2.0**-136, 1.75 * 2.0**127)
    assert group_facts.reach(rule_of("mxint8")) == (2.0**-133, 127 / 64 * 2.0**127)
    smallest, largest = group_facts.reach(rule_of("float8_e4m3fn@tensor"))
    assert largest == group_facts.LARGEST
    assert smallest == float(torch.tensor(2.0**-9) / torch.tensor(group_facts.LARGEST))  # the largest factor there is
    assert group_facts.reach(rule_of("float8_e4m3fn@flat128@expand")) is None


def test_two_levels():
    """A group's scale is an E4M3 number: what is not above 2**-10 / 448 of the tensor's largest becomes zeros."""
    rule = rule_of("nvfp4")
    share = group_facts.zero_below(rule)
    assert share == float(Fraction(1, 2**10 * 448))
    assert group_facts.zero_below(rule_of("mxfp4")) is None
    tensor = 448.0 * 2**10
    for amax, is_zero in ((1.0, True), (0.999, True), (1.001, False)):
        assert (group(rule, amax, tensor).becomes == 0) == is_zero
        x = torch.zeros(2, 16)
        x[0, 0], x[1, 0] = amax, tensor
        assert (float(quantize(x, "nvfp4", backend="eager")[0, 0]) == 0) == is_zero
    nothing = group(rule, 0.5, tensor)
    assert (nothing.line.values, nothing.binades(Rounding.NEAREST)) == ((), [])


def test_delayed_scales_follow_the_steps_before():
    rule = rule_of("float8_e4m3fn@tensor@delayed16")
    told = group(rule, 2.0, 1.0)
    assert told.becomes == 1.0  # beyond what the last steps had
    assert told.scale == pytest.approx(1 / 448)
    assert group(rule_of("float8_e4m3fn@tensor@delayed16+1"), 1.0, 1.0).scale == pytest.approx(1 / 224)


def test_a_group_by_its_deviation():
    """QuEST's scale for numbers +s and -s, whose deviation is s: a power of two below 2.92247856 s / largest."""
    rule = rule_of(f"{E2M1}@32@quest")
    for deviation in (1.0, 1.5, 3.0):
        told = group(rule, deviation)
        assert told.scale == 2.0 ** math.floor(math.log2(2.92247856 * deviation / 6))
        assert told.becomes == 6 * told.scale == told.top
    assert group_facts.change_of_largest(rule) is None


def test_a_group_that_is_raised_to_a_power():
    rule = rule_of("float8_e4m3fn@flat128@expand")
    told = group(rule, 1.0)
    assert told.scale == math.floor(16 * math.log2(448**2 / 2) / 8) / 16
    numbers = [x for x, _ in told.samples]
    assert (min(numbers), max(numbers)) == (2.0**-8, 1.0)
    rounded = by_quantize(rule, numbers)
    assert set(rounded.tolist()) == set(told.line.values)
    x = torch.tensor(numbers, dtype=torch.float64)
    for one in told.binades(Rounding.NEAREST):
        inside = (x >= 2.0**one.exponent) & (x < 2.0 ** (one.exponent + 1))
        if inside.any():
            worst = float(((rounded.double() - x).abs() / x)[inside].max())
            assert one.error == pytest.approx(worst, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("mxfp4", 8), ("nvfp4", 8), ("int8@row", 32), ("float8_e4m3fn@flat128@expand", 96), (f"{E2M1}@32@quest", 8)],
)
def test_bits_of_a_scale(name, bits):
    assert group_facts.scale_bits(rule_of(name)) == bits


@pytest.mark.parametrize("amax", [0.0, -1.0, math.nan, math.inf, 1e39])
def test_no_group_has_such_an_amax(amax):
    with pytest.raises(SettingError, match=r"^amax: given "):
        group(rule_of("mxfp4"), amax)


def test_wide_elements():
    told = group(rule_of("int24@row"), 1.0)
    assert told.line.values is None
    assert told.line.number(0.25, 0.5) == pytest.approx((2**23 - 1) / 4, abs=1)
    assert told.binades(Rounding.NEAREST)[-2].error == pytest.approx(0.5 / (2**22), rel=1e-5)
    assert facts.width(format_named("int24")) == 24
