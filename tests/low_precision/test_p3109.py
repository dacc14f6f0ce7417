"""IEEE P3109's formats, written down again from the report in exact fractions; its value tables, as digests of them
(bench/p3109.py); and gfloat.
"""

import hashlib
import json
import math
import re
import struct
from fractions import Fraction
from functools import cache
from pathlib import Path

import gfloat
import numpy as np
import pytest
import torch
from gfloat.formats import format_info_p3109
from gfloat.types import Domain, RoundMode, Signedness

from low_precision.engines import eager
from low_precision.errors import SettingError
from low_precision.formats import format_named
from low_precision.noise import Key, words
from low_precision.rounding import FewBits, Overflow, Rounding, is_random
from low_precision.tensor import quantize

DIGESTS = json.loads((Path(__file__).parent / "p3109.json").read_text())["digests"]
SMALL = [name for name in DIGESTS if re.match("binary[3-8]p", name)]
# Beside them: with float32's smallest numbers as values, with float64 numbers alone, with float64's smallest ones.
WIDE = ["binary9p2se", "binary9p9uf", "binary12p4ue", "binary16p8se", "binary16p9uf", "binary16p11se", "binary16p16uf"]
WIDER = ["binary10p1se", "binary12p3uf", "binary13p3sf", "binary12p1sf", "binary16p6ue", "binary16p5se"]
KEY = Key(31)


@cache
def parts(name):
    """K, P, whether signed, whether extended, the bias."""
    width, precision, sign, domain = re.fullmatch(r"binary(\d+)p(\d+)([su])([ef])", name).groups()
    width, precision, signed = int(width), int(precision), sign == "s"
    return width, precision, signed, domain == "e", 2 ** (width - precision - 1 if signed else width - precision)


def decoded(name, code):
    """The report's Decode: a Fraction, an infinity or a NaN."""
    width, precision, signed, extended, bias = parts(name)
    not_a_number = 2 ** (width - 1) if signed else 2**width - 1
    infinite = not_a_number - 1
    if code == not_a_number:
        return math.nan
    if signed and code > not_a_number:
        return -decoded(name, code - not_a_number)
    if extended and code == infinite:
        return math.inf
    exponent, mantissa = divmod(code, 2 ** (precision - 1))
    if precision == 1:
        return Fraction(2) ** (code - bias) if code else Fraction(0)
    scale = Fraction(2) ** (1 - precision)
    if exponent == 0:
        return mantissa * scale * Fraction(2) ** (1 - bias)
    return (1 + mantissa * scale) * Fraction(2) ** (exponent - bias)


@cache
def positive(name):
    """The finite values from 0 on, in order, as float64 numbers."""
    width, _, signed, _, _ = parts(name)
    values = [decoded(name, code) for code in range(2 ** (width - 1) if signed else 2**width)]
    return [float(value) for value in values if isinstance(value, Fraction)]


@pytest.mark.parametrize("name", SMALL + WIDE + WIDER)
def test_values_are_those_of_the_groups_tables(name):
    """Each value stays, each neighbour of it comes back to it, and between two there is no third."""
    width, _, signed, extended, bias = parts(name)
    values = [float(decoded(name, code)) for code in range(2**width)]
    numbers = b"".join(struct.pack(">d", math.nan if math.isnan(value) else value) for value in values)
    assert hashlib.sha256(numbers).hexdigest()[:16] == DIGESTS[name]
    fmt, points = format_named(name), torch.tensor(positive(name), dtype=torch.float64)
    assert (fmt.largest, fmt.lowest) == (points[-1], -points[-1] if signed else 0)
    assert (fmt.signed, fmt.has_infinity, fmt.has_nan, fmt.has_negative_zero) == (signed, extended, True, False)
    assert fmt.bias == bias
    assert fmt.bits == f"{int(signed)}-{fmt.exponent_bits}-{fmt.mantissa_bits}"
    assert int(signed) + fmt.exponent_bits + fmt.mantissa_bits == width
    for x in (points, points.float()) if fmt.fits_float32 else (points,):
        assert torch.equal(quantize(x, fmt), x)
        after, before = (torch.nextafter(x, torch.tensor(end, dtype=x.dtype)) for end in (math.inf, 0.0))
        assert torch.equal(quantize(after, fmt, "down"), x)
        assert torch.equal(quantize(before[1:], fmt, "up"), x[1:])
        assert torch.equal(quantize(after[:-1], fmt, "up"), x[1:])
        if signed:
            assert torch.equal(quantize(-after, fmt, "up"), -x + 0.0)


# The report's Project: RoundToPrecision, then Saturate


def code_is_even(whole, exponent, name):
    _, precision, _, _, bias = parts(name)
    return whole % 2 == 0 if precision > 1 else whole == 0 or (exponent + bias) % 2 == 0


def rounded_exactly(x, name, rounding, word):
    """x: a float, finite and not zero. word: its random word of 32 bits."""
    _, precision, _, _, bias = parts(name)
    magnitude = abs(Fraction(x))
    exponent = max(math.frexp(x)[1] - 1, 1 - bias) - precision + 1
    significand = magnitude / Fraction(2) ** exponent
    whole = math.floor(significand)
    fraction, even = significand - whole, code_is_even(whole, exponent, name)
    if isinstance(rounding, FewBits):
        bits = rounding.bits
        drawn = word >> (32 - bits)
        if rounding.half_offset:
            away = math.floor(fraction * 2 ** (bits + 1)) + 2 * drawn + 1 >= 2 ** (bits + 1)
        elif rounding.even:
            away = round(fraction * 2**bits) + drawn >= 2**bits  # round() of a Fraction: ties to even
        else:
            away = math.floor(fraction * 2**bits) + drawn >= 2**bits
    else:
        away = {
            Rounding.TOWARD_ZERO: False,
            Rounding.UP: fraction > 0 and x > 0,
            Rounding.DOWN: fraction > 0 and x < 0,
            Rounding.NEAREST_AWAY: fraction >= Fraction(1, 2),
            Rounding.NEAREST: fraction > Fraction(1, 2) or (fraction == Fraction(1, 2) and not even),
            Rounding.TO_ODD: fraction > 0 and even,
        }[rounding]
    return (1 if x > 0 else -1) * (whole + away) * Fraction(2) ** exponent


def saturated(x, name, rounding, overflow):
    """x: a Fraction or an infinity."""
    _, _, signed, extended, _ = parts(name)
    high = positive(name)[-1]
    low = -high if signed else 0.0
    if low <= x <= high:
        return float(x)
    if overflow is Overflow.SATURATE:
        return high if x > 0 else low
    if overflow is Overflow.PROPAGATE:
        if extended and x in (math.inf, -math.inf if signed else math.inf):
            return float(x)
        return high if x > 0 else low
    inward = {Rounding.TOWARD_ZERO: (True, True), Rounding.DOWN: (True, False), Rounding.UP: (False, True)}
    finite = isinstance(x, Fraction)
    if x > 0:
        stays = inward.get(rounding, (False, False))[0] or (rounding is Rounding.TO_ODD and not signed)
        return high if finite and stays else math.inf
    if finite and inward.get(rounding, (False, False))[1]:
        return low
    return -math.inf if signed else math.nan


def projected(x, name, rounding, word, overflows):
    if math.isnan(x) or x == 0:
        return [x + 0.0] * len(overflows)
    exact = x if math.isinf(x) else rounded_exactly(x, name, rounding, word)
    return [saturated(exact, name, rounding, overflow) for overflow in overflows]


def points_of(name, most=60):
    """Values, what is between them, what is beside both, and what is beyond: float32 numbers where those can be."""
    values = positive(name)
    rng = np.random.default_rng(sum(map(ord, name)))
    if len(values) > most:  # the first, the last, and some
        places = rng.choice(len(values) - 1, most // 3, replace=False)
        values = sorted({*values[:8], *values[-8:], *(values[i] for i in places), *(values[i + 1] for i in places)})
    dtype = np.float32 if format_named(name).fits_float32 else np.float64
    with np.errstate(over="ignore"):
        x = np.array(values, dtype)
        middles = (x[1:] / 2 + x[:-1] / 2).astype(dtype)
        between = (x[:-1] + (x[1:] - x[:-1]) * rng.random(len(x) - 1)).astype(dtype)
        beyond = np.array([x[-1] * factor for factor in (1.03, 1.2, 1.5, 2, 4, 1e9)], dtype)
        near = np.concatenate([x, middles, beyond])
        x = np.concatenate([near, between, np.nextafter(near, dtype(0)), np.nextafter(near, dtype(np.inf))])
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.concatenate([x, np.array([tiny, 3 * tiny, np.inf, np.nan], dtype)])
    return torch.from_numpy(np.concatenate([x, -x]))


ROUNDINGS = [r for r in Rounding if r is not Rounding.STOCHASTIC]
ROUNDINGS += [FewBits(3), FewBits(3, half_offset=True), FewBits(3, even=True), FewBits(1, even=True)]


@pytest.mark.parametrize("name", SMALL + WIDE + WIDER)
def test_rounding_and_saturation_are_the_reports(name):
    fmt, x = format_named(name), points_of(name, 36 if parts(name)[0] > 6 else 20)
    overflows = [o for o in Overflow if fmt.has_infinity or o is not Overflow.INFINITY]
    random_words = (words(KEY, 0, len(x)).to(torch.int64) & 0xFFFFFFFF).tolist()
    for rounding in ROUNDINGS:
        expected = [
            projected(number, name, rounding, word, overflows)
            for number, word in zip(x.tolist(), random_words, strict=True)
        ]
        key = KEY if is_random(rounding) else None
        for place, overflow in enumerate(overflows):
            result = eager.quantize(x, fmt, rounding, overflow, key)
            right = torch.tensor([one[place] for one in expected], dtype=x.dtype)
            wrong = ~((result == right) | (result.isnan() & right.isnan()))
            assert not wrong.any(), (rounding, overflow, x[wrong][:3], result[wrong][:3], right[wrong][:3])
            assert not (result.signbit() & (result == 0)).any()  # there is one zero


def gfloat_format(name):
    width, precision, signed, extended, _ = parts(name)
    signedness = Signedness.Signed if signed else Signedness.Unsigned
    return format_info_p3109(width, precision, signedness, Domain.Extended if extended else Domain.Finite)


@pytest.mark.parametrize("name", [n for n in SMALL if parts(n)[0] in (5, 8)])
def test_gfloat_agrees(name):
    """On values, on rounding to nearest, away, up and down, and on stochastic rounding of all three kinds."""
    fmt, info, x = format_named(name), gfloat_format(name), points_of(name, 24)
    width = parts(name)[0]
    values = sorted(v for v in (gfloat.decode_float(info, code).fval for code in range(2**width)) if math.isfinite(v))
    assert [v for v in values if v >= 0] == positive(name)
    x = x[x.isfinite() & ((x >= 0) | fmt.signed)]  # what becomes of negative numbers is the report's business
    random_words = (words(KEY, 0, len(x)).to(torch.int64) & 0xFFFFFFFF).tolist()
    modes = {
        Rounding.NEAREST: RoundMode.TiesToEven,
        Rounding.NEAREST_AWAY: RoundMode.TiesToAway,
        Rounding.UP: RoundMode.TowardPositive,
        Rounding.DOWN: RoundMode.TowardNegative,
        Rounding.TOWARD_ZERO: RoundMode.TowardZero,
        FewBits(4): RoundMode.StochasticFastest,
        FewBits(4, half_offset=True): RoundMode.StochasticFast,
        FewBits(4, even=True): RoundMode.Stochastic,
    }
    for rounding, mode in modes.items():
        bits = {"srnumbits": 4} if isinstance(rounding, FewBits) else {}
        result = eager.quantize(x, fmt, rounding, Overflow.SATURATE, KEY)
        for number, word, ours in zip(x.tolist(), random_words, result.tolist(), strict=True):
            drawn = {"srbits": word >> 28} if bits else {}
            assert ours == gfloat.round_float(info, number, mode, sat=True, **bits, **drawn), (rounding, number)


# Names


def test_other_projects_names_lead_to_ours():
    pairs = {
        "p3109_k8p3se": "binary8p3se",
        "Binary8p3se": "binary8p3se",
        "p3109_k6p4uf": "binary6p4uf",
        "binary8p4": "binary8p4se",
    }
    for name, ours in pairs.items():
        with pytest.raises(SettingError, match=f"did you mean {ours}") as caught:
            format_named(name)
        assert caught.value.nearest == ours


@pytest.mark.parametrize("name", ["binary8p8se", "binary2p1se", "binary17p3se", "binary8p9ue", "binary8p0ue"])
def test_names_of_no_format(name):
    with pytest.raises(SettingError) as caught:
        format_named(name)
    assert len(str(caught.value).splitlines()) == 1


def test_values_beyond_float64_are_refused_in_one_line():
    with pytest.raises(SettingError, match="no float64 numbers") as caught:
        format_named("binary16p1se")
    assert len(str(caught.value).splitlines()) == 1
    known = {f"binary{k}p{p}{s}{d}" for k in range(3, 17) for p in range(1, k + 1) for s in "su" for d in "ef"}
    assert {name for name in known if _is_format(name)} == set(DIGESTS)


def _is_format(name):
    try:
        return format_named(name).name == name
    except SettingError:
        return False


def test_values_that_are_no_float32_numbers_need_float64_tensors():
    with pytest.raises(TypeError, match=r"binary12p3se: given torch\.float32, allowed: a torch\.float64 tensor"):
        quantize(torch.ones(3), "binary12p3se")
    assert quantize(torch.ones(3, dtype=torch.float64), "binary12p3se").dtype == torch.float64
    with pytest.raises(TypeError, match=r"allowed: a torch\.float64"):
        quantize(torch.ones(3, dtype=torch.bfloat16), "binary12p3se")
    tiny = torch.tensor([2.0**-133, 2.0**-127], dtype=torch.bfloat16)  # float32's smallest numbers in two bytes
    assert torch.equal(quantize(tiny, "binary16p8se"), tiny)
    assert quantize(tiny, "binary8p1ue", "down").tolist() == [0.0, 2.0**-127]
