"""Deterministic rounding against independent oracles: bit for bit, -0.0 unlike 0.0."""

import math
import shutil

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import oracles
import pytest
import torch

from low_precision.errors import SettingError
from low_precision.formats import NAMED, Format, format_named
from low_precision.rounding import Overflow, Rounding
from low_precision.tensor import quantize

SMALL = [name for name, fmt in NAMED.items() if fmt.exponent_bits + fmt.mantissa_bits <= 8]
ANY = ["e2m0", "e3m0", "e8m0", "e2m1", "e2m23", "e4m1", "e7m3", "e8m3", "e8m23", "e8m22", "e5m23", "e3m16"]
DIRECTED = [Rounding.NEAREST, Rounding.NEAREST_AWAY, Rounding.TOWARD_ZERO, Rounding.UP, Rounding.DOWN]


def rounded(x, fmt, rounding=Rounding.NEAREST, overflow=Overflow.SATURATE):
    return quantize(torch.from_numpy(np.array(x, dtype=np.float32)), fmt, rounding, overflow=overflow).numpy()


def float32_bits(seed: int, n: int = 200_000) -> np.ndarray:
    """Every kind of float32: uniform bit patterns, so all exponents, subnormals, infinities and NaNs."""
    return np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32).view(np.float32)


def disagreement(x, ours, theirs) -> str:
    wrong = np.flatnonzero(~oracles.same_bits(ours, theirs))
    return f"{len(wrong)} of {len(x)}: " + ", ".join(f"{x[i]!r} -> {ours[i]!r}, not {theirs[i]!r}" for i in wrong[:5])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("rounding", list(Rounding))
def test_a_value_of_the_format_never_moves(name, rounding):
    points = np.float32(oracles.values(NAMED[name]))
    x = np.concatenate([points, -points[0 if NAMED[name].has_negative_zero else 1 :]])
    ours = quantize(torch.from_numpy(x), name, rounding, key=3).numpy()
    assert oracles.same_bits(ours, x).all(), disagreement(x, ours, x)


@pytest.mark.parametrize("name", [*SMALL, "e3m3", "e2m1", "e4m1", "e7m3"])
@pytest.mark.parametrize("rounding", DIRECTED)
def test_small_formats_whole_against_exact_arithmetic(name, rounding):
    fmt = format_named(name)
    x = oracles.around(oracles.values(fmt))
    largest = math.inf if not math.isfinite(fmt.largest) else fmt.largest
    expected = []
    for value in map(float, x):
        if math.isnan(value) or math.isinf(value):
            expected.append(math.copysign(largest, value) if math.isinf(value) else value)
            continue
        result = float(oracles.round_exactly(value, fmt, rounding)[0])
        result = math.copysign(min(abs(result), largest), value)
        expected.append(0.0 if result == 0 and not fmt.has_negative_zero else result)
    ours = rounded(x, fmt, rounding)
    assert oracles.same_bits(ours, expected).all(), disagreement(x, ours, np.float32(expected))


@pytest.mark.parametrize("name", ["fp16", "float16", "tf32", "bfloat16", *(a for a in ANY if not a.endswith("m0"))])
@pytest.mark.parametrize("rounding", DIRECTED)
def test_wide_formats_against_exact_arithmetic(name, rounding):
    fmt = format_named(name)
    random = np.random.default_rng(5)
    near = np.ldexp(random.uniform(1, 2, 1000), random.integers(-4 - fmt.bias - fmt.mantissa_bits, fmt.bias, 1000))
    few = np.ldexp(random.integers(1, 2**12, 1000), random.integers(-160, 100, 1000))  # with many ties among them
    x = np.concatenate([float32_bits(6, 2000), near.astype(np.float32), few.astype(np.float32)])
    x = x[np.isfinite(x)]
    expected = [
        math.copysign(min(abs(float(oracles.round_exactly(v, fmt, rounding)[0])), fmt.largest), v)
        for v in map(float, x)
    ]
    ours = rounded(x, fmt, rounding)
    assert oracles.same_bits(ours, expected).all(), disagreement(x, ours, np.float32(expected))


def formats_of_ones_own(count: int, seed: int) -> list[Format]:
    """Any that Format takes: at the edges of its limits, and in between."""
    random, made = np.random.default_rng(seed), []
    while len(made) < count:
        exponent_bits, mantissa_bits = int(random.integers(0, 9)), int(random.integers(1, 24))
        edges = (-126, 127 - mantissa_bits, 127, 2 ** max(exponent_bits - 1, 0) - 1, int(random.integers(-50, 100)))
        bias = edges[random.integers(len(edges))]
        exponent = int(random.integers(1 - bias, 127)) if bias > -126 else 127
        largest = math.ldexp(int(random.integers(1, 2 ** (mantissa_bits + 1))), exponent - mantissa_bits)
        more_below = bool(random.integers(2))
        widths = exponent_bits, mantissa_bits, bias, largest
        try:
            made.append(Format("own", *widths, False, True, not more_below, "", twos_complement=more_below))
        except SettingError:
            continue
    return made


@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize("rounding", DIRECTED)
def test_formats_of_ones_own_against_exact_arithmetic(rounding, backend):
    for fmt in formats_of_ones_own(60, seed=12):
        random = np.random.default_rng(13)
        lowest = min(max(-149, 1 - fmt.bias - fmt.mantissa_bits - 3), 100)
        near = np.ldexp(random.uniform(1, 2, 40), random.integers(lowest, 127, 40)).astype(np.float32)
        ties = np.ldexp(random.integers(1, 2**11, 40), random.integers(lowest, min(lowest + 60, 116), 40))
        limits = [fmt.largest, -fmt.lowest, fmt.smallest_normal, fmt.smallest_subnormal / 2]
        x = np.concatenate([near, ties.astype(np.float32), np.float32(limits)])
        x = np.concatenate([x, np.nextafter(x, np.float32(0)), -x])
        expected = []
        for value in map(float, x):
            limit = fmt.largest if value > 0 else -fmt.lowest
            result = math.copysign(min(abs(float(oracles.round_exactly(value, fmt, rounding)[0])), limit), value)
            expected.append(0.0 if result == 0 and not fmt.has_negative_zero else result)
        ours = quantize(torch.from_numpy(x), fmt, rounding, backend=backend).numpy()
        assert oracles.same_bits(ours, expected).all(), (vars(fmt), disagreement(x, ours, np.float32(expected)))


@pytest.mark.parametrize("name", [*(n for n in SMALL if hasattr(ml_dtypes, n)), "bfloat16", "fp16"])
def test_nearest_against_ml_dtypes(name):
    fmt = NAMED[name]
    dtype = np.float16 if name == "fp16" else getattr(ml_dtypes, name)
    x = float32_bits(1)
    normal = np.random.default_rng(2).standard_normal(200_000).astype(np.float32)
    x = np.concatenate([x, normal * np.float32(min(fmt.largest / 8, 1e37))])
    if fmt.mantissa_bits <= 3:
        x = np.concatenate([x, oracles.around(oracles.values(fmt))])
    # Without an infinity, what lies beyond is ml_dtypes' own choice there, and ours here.
    x = x[~np.isnan(x)] if fmt.has_infinity else x[np.abs(x) <= fmt.largest]
    with np.errstate(over="ignore"):
        theirs = x.astype(dtype).astype(np.float32)
    overflow = Overflow.INFINITY if fmt.has_infinity else Overflow.SATURATE
    ours = rounded(x, fmt, overflow=overflow)
    assert oracles.same_bits(ours, theirs).all(), disagreement(x, ours, theirs)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float8_e5m2", torch.float8_e5m2),
        ("float8_e4m3fn", torch.float8_e4m3fn),
        ("float8_e5m2fnuz", torch.float8_e5m2fnuz),
        ("float8_e4m3fnuz", torch.float8_e4m3fnuz),
    ],
)
def test_nearest_against_torch_casts(name, dtype):
    x = float32_bits(3)
    x = x[np.abs(x) <= NAMED[name].largest]
    theirs = torch.from_numpy(x).to(dtype).float().numpy()
    ours = rounded(x, name)
    assert oracles.same_bits(ours, theirs).all(), disagreement(x, ours, theirs)


GFLOAT_MODES = {
    Rounding.NEAREST: gfloat.RoundMode.TiesToEven,
    Rounding.NEAREST_AWAY: gfloat.RoundMode.TiesToAway,
    Rounding.TOWARD_ZERO: gfloat.RoundMode.TowardZero,
    Rounding.UP: gfloat.RoundMode.TowardPositive,
    Rounding.DOWN: gfloat.RoundMode.TowardNegative,
}
GFLOAT_FORMATS = {
    "float8_e5m2": gfloat.formats.format_info_ocp_e5m2,
    "float8_e4m3fn": gfloat.formats.format_info_ocp_e4m3,
    "float6_e3m2fn": gfloat.formats.format_info_ocp_e3m2,
    "float6_e2m3fn": gfloat.formats.format_info_ocp_e2m3,
    "float4_e2m1fn": gfloat.formats.format_info_ocp_e2m1,
    "fp16": gfloat.formats.format_info_binary16,
    "bfloat16": gfloat.formats.format_info_bfloat16,
}


@pytest.mark.parametrize("rounding", DIRECTED)
@pytest.mark.parametrize("name", GFLOAT_FORMATS)
@pytest.mark.parametrize("overflow", [Overflow.SATURATE, Overflow.INFINITY])
def test_against_gfloat(name, rounding, overflow):
    fmt, info = NAMED[name], GFLOAT_FORMATS[name]
    if overflow is Overflow.INFINITY and not fmt.has_infinity:
        with pytest.raises(ValueError, match="no infinity"):
            rounded([1.0], name, rounding, overflow)
        return
    x = oracles.around(oracles.values(fmt)[-60:]) if fmt.mantissa_bits > 3 else oracles.around(oracles.values(fmt))
    x = x[~np.isnan(x)]
    saturate = overflow is Overflow.SATURATE
    theirs = np.float32([gfloat.round_float(info, float(v), GFLOAT_MODES[rounding], saturate) for v in x])
    ours = rounded(x, name, rounding, overflow)
    assert oracles.same_bits(ours, theirs).all(), disagreement(x, ours, theirs)


def gfloat_ieee(name: str) -> gfloat.FormatInfo:
    """gfloat's description of an IEEE-like format, from its widths alone."""
    exponent_bits, mantissa_bits = map(int, name[1:].split("m"))
    return gfloat.FormatInfo(
        name=name,
        k=1 + exponent_bits + mantissa_bits,
        precision=1 + mantissa_bits,
        bias=2 ** (exponent_bits - 1) - 1,
        is_signed=True,
        domain=gfloat.Domain.Extended,
        has_nz=True,
        num_high_nans=2**mantissa_bits - 1,
        has_subnormals=True,
        is_twos_complement=False,
    )


@pytest.mark.parametrize("name", ["e2m0", "e3m0", "e8m0"])
def test_without_a_mantissa_ties_go_to_the_even_code(name):
    """Half of the smallest value among them, which goes to zero."""
    fmt, info = format_named(name), gfloat_ieee(name)
    ties = np.float32([fmt.smallest_subnormal * by for by in (0.5, 1.5, 3.0, 6.0, 12.0)])
    x = np.concatenate([ties, -ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e38))])
    theirs = np.float32([gfloat.round_float(info, float(v), gfloat.RoundMode.TiesToEven, True) for v in x])
    ours = rounded(x, fmt)
    assert oracles.same_bits(ours, theirs).all(), disagreement(x, ours, theirs)


@pytest.mark.parametrize("rounding", DIRECTED)
@pytest.mark.parametrize("name", ANY)
def test_any_width_against_gfloat(name, rounding):
    """Formats without mantissa bits among them, where the tie goes to the even code."""
    fmt, info = format_named(name), gfloat_ieee(name)
    random = np.random.default_rng(8)
    ties = np.ldexp(random.integers(1, 64, 300).astype(np.float64), random.integers(-150, 122, 300)).astype(np.float32)
    x = np.concatenate([float32_bits(9, 500), ties, -ties])
    x = x[np.isfinite(x)]
    theirs = np.float32([gfloat.round_float(info, float(v), GFLOAT_MODES[rounding], True) for v in x])
    ours = rounded(x, fmt, rounding)
    assert oracles.same_bits(ours, theirs).all(), disagreement(x, ours, theirs)


@pytest.mark.parametrize("name", [*NAMED, *ANY])
@pytest.mark.parametrize("rounding", list(Rounding))
def test_special_values(name, rounding):
    fmt = format_named(name)
    x = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 3.4e38, -3.4e38])
    ours = quantize(x, fmt, rounding, key=1)
    assert ours[:2].isnan().all()
    if name == "float32":
        assert ours[2:].tolist() == x[2:].tolist()
    else:
        assert ours[2:4].tolist() == [fmt.largest, -fmt.largest]
        assert ours.abs()[2:].max() <= fmt.largest
    zeros = quantize(torch.tensor([0.0, -0.0]), fmt, rounding, key=1)
    assert zeros.tolist() == [0, 0]
    assert zeros.signbit().tolist() == [False, fmt.has_negative_zero]


@pytest.mark.parametrize("name", [n for n in [*NAMED, *ANY] if format_named(n).has_infinity and n != "float32"])
def test_overflow_to_infinity(name):
    """IEEE 754-2019, 7.4: what each rounding makes of a value too large."""
    fmt = format_named(name)
    huge = float(np.float32(3.4028235e38))
    x = torch.tensor([huge, -huge, math.inf, -math.inf])
    beyond = huge > fmt.largest
    for rounding, finite in {
        Rounding.NEAREST: (math.inf, -math.inf),
        Rounding.NEAREST_AWAY: (math.inf, -math.inf),
        Rounding.TOWARD_ZERO: (fmt.largest, -fmt.largest),
        Rounding.UP: (math.inf, -fmt.largest),
        Rounding.DOWN: (fmt.largest, -math.inf),
        # IEEE 754's infinity has an even code; without a mantissa the largest value has one too.
        Rounding.TO_ODD: (fmt.largest, -fmt.largest) if fmt.mantissa_bits else (math.inf, -math.inf),
    }.items():
        ours = quantize(x, fmt, rounding, overflow="infinity").tolist()
        assert ours[:2] == (list(finite) if beyond else [huge, -huge])
        assert ours[2:] == [math.inf, -math.inf]


@pytest.mark.parametrize("rounding", list(Rounding))
def test_infinities_are_propagated_where_there_are_some(rounding):
    x = torch.tensor([1e9, -1e9, math.inf, -math.inf])
    for name in ("float8_e5m2", "fp16"):
        largest = format_named(name).largest
        assert quantize(x, name, rounding, 1, overflow="propagate").tolist() == [largest, -largest, math.inf, -math.inf]
    for name in ("float8", "float8_e4m3fn", "fixed8.4", "mxfp8_e4m3"):
        assert torch.equal(quantize(x, name, rounding, 1, overflow="propagate"), quantize(x, name, rounding, 1))


def test_no_double_rounding_below_the_smallest_normal():
    """Just below half the smallest subnormal there is no 1: rounding the mantissa first would make one."""
    half = 2.0**-17  # of float8
    below, above = np.nextafter(np.float32(half), np.float32(0)), np.nextafter(np.float32(half), np.float32(1))
    assert rounded([below, half, above, 3 * half], "float8").tolist() == [0.0, 0.0, 2 * half, 4 * half]


def test_float32_is_left_alone():
    x = float32_bits(4)
    assert oracles.same_bits(rounded(x, "float32"), x).all()


def test_the_processors_flushing_of_subnormals_changes_nothing():
    x = oracles.around(oracles.values(format_named("e8m3"))[:64])
    expected = rounded(x, "e8m3")
    torch.set_flush_denormal(True)
    try:
        flushed = quantize(torch.from_numpy(x), "e8m3", "nearest")
    finally:
        torch.set_flush_denormal(False)
    assert oracles.same_bits(flushed.numpy(), expected).all()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="qtorch compiles C++")
@pytest.mark.parametrize("name", ["float8", "float16"])
def test_nearest_against_qtorch(name):
    """On finite values that are no ties, within range: bit for bit (qtorch loses the sign of zero)."""
    fmt = NAMED[name]
    random = np.random.default_rng(10)
    spread = np.ldexp(random.uniform(1, 2, 500_000), random.integers(-fmt.bias - fmt.mantissa_bits, fmt.bias, 500_000))
    x = np.concatenate([float32_bits(11), (spread * random.choice([-1, 1], 500_000)).astype(np.float32)])
    with np.errstate(invalid="ignore"):
        x = x[np.abs(x) <= fmt.largest]
    away = rounded(x, fmt, Rounding.NEAREST_AWAY)
    ours = rounded(x, fmt)
    tie = away != ours
    theirs = quantize(torch.from_numpy(x), fmt, "nearest", backend="qtorch").numpy()
    # Its double rounding: below the smallest normal it rounds to 24 bits first, then what is then a tie.
    last = np.abs(x.astype(np.float64)) / fmt.smallest_subnormal
    near_tie = np.abs(last % 1 - 0.5) * fmt.smallest_subnormal <= fmt.smallest_normal * 2.0**-24
    doubled = (np.abs(x) < fmt.smallest_normal) & near_tie
    compared = ~tie & ~doubled
    assert compared.mean() > 0.99
    wrong = compared & ~oracles.same_bits(ours + np.float32(0), theirs + np.float32(0))
    assert not wrong.any(), disagreement(x[wrong], ours[wrong], theirs[wrong])


@pytest.mark.parametrize("value", [3, None, b"up", ["up"], torch.float16, True], ids=repr)
@pytest.mark.parametrize("name", ["format", "rounding", "overflow"])
def test_an_argument_of_another_type_is_named(name, value):
    """None of them is taken for a rounding: an unknown one would be rounded down."""
    arguments = {"format": "fp16", "rounding": "nearest", "overflow": "saturate"} | {name: value}
    with pytest.raises(TypeError, match=f"{name}: given .*allowed: "):
        quantize(torch.ones(3), **arguments)


@pytest.mark.parametrize(
    ("name", "word", "near"),
    [("format", "Float8", "float8"), ("rounding", "nearest ", "nearest"), ("overflow", "infinte", "infinity")],
)
def test_an_unknown_word_gets_the_nearest(name, word, near):
    arguments = {"format": "fp16", "rounding": "nearest", "overflow": "saturate"} | {name: word}
    with pytest.raises(SettingError) as caught:
        quantize(torch.ones(3), **arguments)
    assert (caught.value.setting, caught.value.nearest) == (name, near)
