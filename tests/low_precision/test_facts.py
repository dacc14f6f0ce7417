"""What is said of formats, against those who know it: ml_dtypes, gfloat, P3109's value tables, exact fractions."""

import hashlib
import json
import math
import struct
from fractions import Fraction
from functools import partial
from pathlib import Path

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat.formats import format_info_p3109
from gfloat.types import Domain, Signedness

from low_precision import facts, p3109
from low_precision.errors import SettingError
from low_precision.facts import Gap, Side
from low_precision.formats import format_named
from low_precision.noise import Key
from low_precision.rounding import FewBits, Rounding, rounding_named
from low_precision.tables import Table
from low_precision.tensor import quantize as quantize_by_any

DIGESTS = json.loads((Path(__file__).parent / "p3109.json").read_text())["digests"]
SMALL = [name for name in DIGESTS if int(name.removeprefix("binary").split("p")[0]) <= 10]
NARROW = ["binary12p4ue", "binary16p8se", "binary16p11se", "binary16p5sf", "binary16p16uf"]
ML_DTYPES = ["bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz"]
ML_DTYPES += ["float6_e3m2fn", "float6_e2m3fn", "float4_e2m1fn"]
ROUNDINGS = [mode.value for mode in Rounding] + [
    "stochastic:1",
    "stochastic:3",
    "stochastic:3:half",
    "stochastic:3:even",
]
quantize = partial(quantize_by_any, backend="eager")  # which needs no time to start
ODD_TABLE = Table("odd_table", (-3.0, -0.5, 0.25, 2.0, 2.5), "")  # no zero, other values on the other side


def finite(numbers) -> list[float]:
    return sorted({float(number) + 0.0 for number in numbers if math.isfinite(number)})


@pytest.mark.parametrize("name", ML_DTYPES)
def test_values_are_those_of_ml_dtypes(name):
    fmt = format_named(name)
    codes = np.arange(2 ** facts.width(fmt), dtype=np.uint16 if name == "bfloat16" else np.uint8)
    assert list(facts.values(fmt)) == finite(codes.view(getattr(ml_dtypes, name)).astype(np.float64))


def test_values_of_half_precision_are_those_of_numpy():
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    assert list(facts.values(format_named("fp16"))) == finite(numbers)


def coded(values: tuple[float, ...], name: str) -> list[float]:
    """By their codes, as P3109 has them: the signed ones' NaN stands where a negative zero would."""
    parts = p3109.parts_of(name)
    above = [value for value in values if value >= 0] + [math.inf] * parts.is_extended
    if not parts.is_signed:
        return [*above, math.nan]
    return [*above, math.nan, *(-value for value in above[1:])]


@pytest.mark.parametrize("name", SMALL + NARROW)
def test_values_are_those_of_the_tables_of_p3109(name):
    values = coded(facts.values(format_named(name)), name)
    numbers = b"".join(struct.pack(">d", value) for value in values)
    assert hashlib.sha256(numbers).hexdigest()[:16] == DIGESTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DIGESTS if name not in SMALL + NARROW])
def test_values_of_all_others_of_p3109(name):
    test_values_are_those_of_the_tables_of_p3109(name)


@pytest.mark.parametrize("name", ["binary8p3se", "binary8p4uf", "binary6p2ue", "binary10p5sf"])
def test_values_are_those_of_gfloat(name):
    parts = p3109.parts_of(name)
    width = facts.width(format_named(name))
    sign = Signedness.Signed if parts.is_signed else Signedness.Unsigned
    info = format_info_p3109(width, parts.precision, sign, Domain.Extended if parts.is_extended else Domain.Finite)
    numbers = [gfloat.decode_float(info, code).fval for code in range(2**width)]
    assert list(facts.values(format_named(name))) == finite(numbers)


def by_hand(name: str) -> set[Fraction]:
    """Every code of eXmY and of qtorch's floats; whole numbers times the spacing of fixed point."""
    if name.startswith(("fixed", "int")):
        word, _, fraction = name.removeprefix("fixed").removeprefix("int").rstrip("s").partition(".")
        most = 2 ** (int(word) - 1)
        lowest = -most + (name.endswith("s") or name.startswith("int"))
        return {Fraction(n, 2 ** int(fraction or 0)) for n in range(lowest, most)}
    ours = {"float8": (5, 2), "float16": (6, 9)}
    exponents, digits = ours.get(name) or map(int, name[1:].split("m"))
    bias = 2 ** (exponents - 1) - 1
    made = set()
    for exponent in range(2**exponents - (name not in ours)):
        for mantissa in range(2**digits):
            hidden = Fraction(mantissa, 2**digits) + (exponent > 0)
            made.add(hidden * Fraction(2) ** (max(exponent, 1) - bias))
    return made | {-value for value in made}


@pytest.mark.parametrize(
    "name",
    [
        "float8",
        "float16",
        "int2",
        "int4",
        "int8",
        "int16",
        "fixed8.4",
        "fixed8.4s",
        "fixed6.9",
        "fixed2.0",
        "fixed16.126",
    ]
    + [f"e{x}m{y}" for x in range(2, 9) for y in range(8) if x + y < 12]
    + ["e2m13", "e5m10", "e8m7"],
)
def test_values_are_those_of_every_code(name):
    fmt = format_named(name)
    assert [Fraction(value) for value in facts.values(fmt)] == sorted(by_hand(name))
    assert facts.count(fmt) == len(by_hand(name))


@pytest.mark.parametrize("name", ["nf4", "dynamic8", "dynamic8u", "posit8_table", "hif8"])
def test_values_of_tables_are_the_tables(name):
    table = format_named(name)
    assert facts.values(table) == table.values
    assert 2 ** facts.width(table) >= len(table.values) > 2 ** (facts.width(table) - 1)


def test_wide_formats_are_counted_alone():
    assert facts.count(format_named("float32")) == 2**32 - 2 * 2**23 - 1  # without infinities, NaNs and -0
    assert facts.count(format_named("fixed25.3")) == 2**25
    with pytest.raises(SettingError, match="tf32, allowed: one of at most 16 bits"):
        facts.values(format_named("tf32"))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "fixed8.4", "binary8p1ue", "e2m5", "int8", "binary6p3sf", "e4m0"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_counted_agrees_with_what_is_listed(name, rounding, monkeypatch):
    """Wide formats go another way, on which narrow ones can go too."""
    fmt, rounding = format_named(name), rounding_named(rounding)
    listed = facts.side(fmt)
    monkeypatch.setattr(facts, "MOST_BITS", 1)
    counted = facts.side.__wrapped__(fmt)
    assert counted.values is None
    for one, other in zip(facts.binades(listed, rounding), facts.binades(counted, rounding), strict=True):
        assert (one.exponent, one.number) == (other.exponent, other.number)
        assert math.isclose(one.error, other.error, rel_tol=1e-12), one


# Errors: every number of a fine grid, rounded by the engine


def neighbours(x: torch.Tensor, fmt, is_negative: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Below and above, in magnitudes."""
    modes = ("up", "down") if is_negative else ("down", "up")
    signed = -x if is_negative else x
    return tuple(quantize(signed, fmt, mode).abs() for mode in modes)


def expected_errors(x: torch.Tensor, fmt, rounding, is_negative: bool) -> torch.Tensor:
    """Of each x the expected relative error: by Croci's definition, or over all random words of R bits."""
    below, above = neighbours(x, fmt, is_negative)
    gap = above - below
    share = torch.where(gap > 0, (x - below) / gap, 0.0)
    if rounding is Rounding.STOCHASTIC:
        p = share
    else:
        steps = 2**rounding.bits
        words = torch.arange(steps)[:, None]
        if rounding.half_offset:
            p = (share + (words + 0.5) / steps >= 1).double().mean(0)
        elif rounding.even:
            p = (torch.round(share * steps) / steps + words / steps >= 1).double().mean(0)
        else:
            p = (share + words / steps >= 1).double().mean(0)
    return ((1 - p) * (x - below) + p * (above - x)) / x


@pytest.mark.parametrize(
    "name",
    [
        *("float8_e4m3fn", "float4_e2m1fn", "fixed6.2", "int4", "binary6p3ue", "binary5p1sf", "nf4", "posit8_table"),
        "dynamic8",
    ],
)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("is_negative", [False, True], ids=["above", "below"])
def test_errors_by_magnitude(name, rounding, is_negative):
    """The largest error of a grid of 512 numbers, and of numbers near the values, is nearly the one that is told."""
    fmt, rounding = format_named(name), rounding_named(rounding)
    line = facts.side(fmt, is_negative)
    told = facts.binades(line, rounding)
    assert bool(told) == (fmt.lowest < 0 or not is_negative)
    steps = torch.arange(512, dtype=torch.float64) / 512
    values = torch.tensor(list(line.values), dtype=torch.float64)
    near = torch.cat([values * (1 - 2.0**-40), values * (1 + 2.0**-40), values])
    for one in told[:20]:
        low, high = math.ldexp(1.0, one.exponent), min(math.ldexp(2.0, one.exponent), line.last)
        grid = torch.cat([low + (high - low) * steps, near[(near > low) & (near < high)]])
        if isinstance(rounding, FewBits) or rounding is Rounding.STOCHASTIC:
            errors = expected_errors(grid, fmt, rounding, is_negative)
        else:
            result = quantize(-grid if is_negative else grid, fmt, rounding).abs()
            errors = (result - grid).abs() / grid
        assert float(errors.max()) <= one.error * (1 + 1e-9) + 1e-9
        assert float(errors.max()) >= one.error * (1 - 2e-2) - 1e-9
        inside = [value for value in line.values if low <= value < math.ldexp(2.0, one.exponent)]
        assert one.number == len(inside)


def test_errors_in_exact_fractions():
    """Of E4M3: half of a spacing, at the number in the middle; twice the product of the distances over the gap."""
    line = facts.side(format_named("float8_e4m3fn"))
    nearest = facts.binades(line, Rounding.NEAREST)
    assert [one.error for one in nearest] == [
        *(float(Fraction(1, 2 * n + 1)) for n in (0, 1, 2, 4)),
        *([float(Fraction(1, 17))] * 15),
    ]
    assert {one.error for one in facts.binades(line, Rounding.UP)[4:]} == {1 / 8}
    assert {one.error for one in facts.binades(line, Rounding.TOWARD_ZERO)[4:]} == {1 / 9}
    for one, first in zip(facts.binades(line, Rounding.STOCHASTIC)[1:4], (1, 2, 4), strict=True):
        assert math.isclose(one.error, 2 * (math.sqrt(first + 1) - math.sqrt(first)) ** 2)


def test_a_table_without_zero():
    above, below = facts.side(ODD_TABLE), facts.side(ODD_TABLE, is_negative=True)
    assert above == Side(
        (Gap(-0.5, 0.25, False), Gap(0.25, 2.0, True), Gap(2.0, 2.5, False)), -0.5, 2.5, (0.25, 2.0, 2.5)
    )
    assert (below.gaps[0], below.values, below.last) == (Gap(-0.25, 0.5, True), (0.5, 3.0), 3.0)
    for line in (above, below):
        assert facts.zero_up_to(line, Rounding.NEAREST) is None
    assert facts.largest_error(above, Rounding.NEAREST, 4.0, 5.0) == 0.5  # becomes 2.5
    only = facts.side(Table("above_one", (1.0, 2.0), ""))
    assert facts.largest_error(only, Rounding.NEAREST, 0.25, 0.5) == 3.0  # becomes 1
    assert facts.binades(facts.side(Table("below", (-2.0, -1.0), "")), Rounding.NEAREST) == []


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "fixed8.4", "nf4", "binary8p1ue", "posit8_table", "hif8", "dynamic8"]
)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("is_negative", [False, True], ids=["above", "below"])
def test_what_becomes_zero(name, rounding, is_negative):
    fmt, rounding = format_named(name), rounding_named(rounding)
    line = facts.side(fmt, is_negative)
    ends = facts.zero_up_to(line, rounding)

    def met(x: float) -> set[bool]:
        """Whether it became zero, with 64 keys."""
        numbers = torch.full((64,), -x if is_negative else x, dtype=torch.float64)
        return set((quantize(numbers, fmt, rounding, Key(3)) == 0).tolist())

    if not line.gaps:  # an unsigned format's other side
        assert ends is None
        assert met(1.0) == {True}
    elif ends is None:
        assert met(line.smallest() * 2.0**-30) != {True} or rounding is Rounding.STOCHASTIC
    else:
        assert met(ends[0] * (1 - 2.0**-40)) == {True}
        assert (met(ends[0]) == {True}) == ends[1]
        assert met(ends[0] * (1 + 2.0**-40)) != {True}


def test_the_curve_passes_through_the_worst_numbers():
    line = facts.side(format_named("float8_e4m3fn"))
    drawn = facts.curve(line, Rounding.NEAREST)
    assert len(drawn) == 126
    assert drawn[0] == (2.0**-11, 1.0)
    for (x, error), gap in zip(drawn[1:], line.gaps[1:], strict=True):
        assert (x, error) == ((gap.low + gap.high) / 2, (gap.high - gap.low) / (gap.high + gap.low))


def test_of_many_gaps_the_curve_has_the_ends_of_each_power_of_two():
    """The worst error of a gap is that of its middle, in bfloat16 between 2**-9 / (1 + 2**-8) and half of that."""
    drawn = facts.curve(facts.side(format_named("bfloat16")), Rounding.NEAREST)
    assert len(drawn) < 1200
    normal = [(x, error) for x, error in drawn if x > 2.0**-126]
    for first, last in zip(normal[::3], normal[2::3], strict=True):
        power = 2.0 ** math.floor(math.log2(first[0]))
        assert first == (power * (1 + 2.0**-8), 2.0**-8 / (1 + 2.0**-8))
        assert last[0] > power * 1.98
    wide = facts.curve(facts.side(format_named("float32")), Rounding.NEAREST)
    assert min(error for x, error in wide) == pytest.approx(2.0**-25, rel=1e-6)
