"""Formats that are tables of values: the values themselves, and rounding, in exact fractions."""

import bisect
import hashlib
import math
import random
import statistics
import struct
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction

import numpy as np
import pytest
import torch

import low_precision as lp
from low_precision import tables
from low_precision.engines import eager, fused
from low_precision.errors import SettingError
from low_precision.formats import BlockFormat, format_named
from low_precision.noise import LOW_WORD, Key, words
from low_precision.rounding import FewBits, Overflow, Rounding, is_random
from low_precision.rules import rule_of, site_line
from low_precision.tables import Table
from settings.config import Config, ConfigError

KEY = Key(11)
OWN = {
    "two": Table("two", (-1.0, 1.0), ""),
    "three": Table("three", (-3.0, -1.0, 2.0), "", first_code=-1),
    "far apart": Table(
        "far apart", (-(2.0**127), -(2.0**-149), 0.0, 2.0**-149, 2.0**-126, 1.0, 1 + 2.0**-23, 2.0**127), ""
    ),
    "above zero": Table("above zero", (0.5, 0.75, 1.5, 7.0), ""),
    "below zero": Table("below zero", (-8.0, -7.5, -0.25), ""),
}
NAMES = [*OWN, "nf4", "dynamic8", "dynamic8u", "posit8_table", "hif8"]
ROUNDINGS = [*Rounding, FewBits(1), FewBits(6), FewBits(6, half_offset=True), FewBits(6, even=True), FewBits(23)]


def of_name(name):
    return OWN.get(name) or format_named(name)


# Values


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("dynamic8", "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        ("dynamic8u", "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ],
)
def test_the_values_of_8_bit_adam(name, digest):
    """bitsandbytes' create_dynamic_map(signed, 7, 8), made with torch 2.13 on a CPU."""
    assert hashlib.sha256(struct.pack("<256f", *format_named(name).values)).hexdigest() == digest


def test_the_values_of_nf4_are_quantiles_of_the_normal_distribution():
    """QLoRA, section 3: the quantiles of 8 and of 9 probabilities from 1/2 outwards, over the largest of them."""
    end = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    upper = [statistics.NormalDist().inv_cdf(end + (0.5 - end) * i / 8) for i in range(8)]
    lower = [-statistics.NormalDist().inv_cdf(end + (0.5 - end) * i / 7) for i in range(7)]
    expected = sorted(value / upper[0] for value in [*upper, *lower, 0.0])
    # The published constants were computed in float32: they have about six digits of these.
    assert format_named("nf4").values == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("name", "width"), [("posit8_table", 8), ("posit16_table", 16)])
def test_the_values_of_posits(name, width):
    """Standard for Posit Arithmetic (2022), 3: with the formula that takes a whole code, for negative ones too."""
    table = format_named(name)
    assert len(table.values) == 2**width - 1
    for code in range(-(2 ** (width - 1)) + 1, 2 ** (width - 1), 1 if width == 8 else 37):
        assert table.values[code - table.first_code] == posit(code, width), code
    assert (table.largest, table.lowest) == (2.0 ** (4 * width - 8), -(2.0 ** (4 * width - 8)))
    assert table.values[1 - table.first_code] == 2.0 ** -(4 * width - 8)


def posit(code, width):
    """((1 - 3 s) + f) * 2**((1 - 2 s) * (4 r + e + s)), of sign, regime, exponent and fraction."""
    if code == 0:
        return 0.0
    bits = [(code >> (width - 1 - i)) & 1 for i in range(width)]
    sign, rest = bits[0], bits[1:]
    run = next((i for i, bit in enumerate(rest) if bit != rest[0]), len(rest))
    regime = -run if rest[0] == 0 else run - 1
    rest = rest[run + 1 :] + [0] * width
    exponent, digits = 2 * rest[0] + rest[1], rest[2:]
    fraction = sum(Fraction(bit, 2 ** (i + 1)) for i, bit in enumerate(digits))
    return float((1 - 3 * sign + fraction) * Fraction(2) ** ((1 - 2 * sign) * (4 * regime + exponent + sign)))


def test_the_values_of_hif8():
    """Table 1 of arXiv:2409.16626: dot, exponent, mantissa of each code; 0x80 is NaN, 0x6f and 0xef are infinities."""
    values = []
    for code in set(range(256)) - {0x80, 0x6F, 0xEF}:
        low = code & 0x7F
        for first, dot_bits, exponent_bits in ((0x60, 2, 4), (0x40, 2, 3), (0x20, 2, 2), (0x10, 3, 1), (0x08, 4, 0)):
            if low >= first:
                mantissa_bits = 7 - dot_bits - exponent_bits
                field = (low - first) >> mantissa_bits
                sign, magnitude = divmod(field, 2 ** (exponent_bits - 1)) if exponent_bits else (0, 0)
                exponent = (magnitude + 2 ** (exponent_bits - 1)) * (-1) ** sign if exponent_bits else 0
                mantissa = low % 2**mantissa_bits / 2**mantissa_bits
                value = (1 + mantissa) * 2.0**exponent
                break
        else:
            value = 2.0 ** (low - 23) if low else 0.0
        values.append(-value if code & 0x80 else value)
    assert tuple(sorted(values)) == format_named("hif8").values


def test_hif8_to_nearest_away_is_its_own_rounding():
    """Values that Huawei's conversion gives (hif8_t.cc of its graph engine): ties away from zero."""
    pairs = {0x3F488490: 0x1D, 0x3CFDC71F: 0x54, 0x43411133: 0x4E, 0x46868FE7: 0x6C, 0x35B14F67: 0x03, 0x3E2040ED: 0x3A}
    decode = {0x1D: 1.625 / 2, 0x54: 2.0**-5, 0x4E: 192.0, 0x6C: 2.0**14, 0x03: 2.0**-20, 0x3A: 0.15625}
    x = torch.tensor(list(pairs), dtype=torch.int32).view(torch.float32)
    assert lp.quantize(x, "hif8", "nearest_away").tolist() == [decode[code] for code in pairs.values()]


# Rounding


def expected(x, table, rounding, word, dtype):
    """What x, a float, becomes. word: 64 random bits, of which float32 numbers have the first 32."""
    if math.isnan(x):
        return math.nan
    values = table.values
    x = min(max(x, values[0]), values[-1])
    place = bisect.bisect_right(values, x) - 1
    if values[place] == x:
        return values[place]
    low, high, exact = values[place], values[place + 1], Fraction(x)
    if is_random(rounding):
        base, other = (high, low) if high <= 0 else (low, high)
        share = abs(x - base) / (high - low)
        bits = rounding.bits if isinstance(rounding, FewBits) else 32 if dtype == torch.float32 else 53
        drawn = word >> (64 - bits)
        multiple = share * 2.0**bits
        if isinstance(rounding, FewBits) and rounding.even:
            whole = round(multiple)
        else:
            whole = math.floor(multiple + (0.5 if isinstance(rounding, FewBits) and rounding.half_offset else 0))
        return other if whole + drawn >= 2**bits else base
    code_above = table.first_code + place + 1
    above = {
        Rounding.UP: True,
        Rounding.DOWN: False,
        Rounding.TOWARD_ZERO: abs(high) < abs(low),
        Rounding.TO_ODD: code_above % 2 == 1,
    }.get(rounding)
    if above is None:
        twice = 2 * exact - Fraction(low) - Fraction(high)
        tie = code_above % 2 == 0 if rounding is Rounding.NEAREST else abs(high) >= abs(low)
        above = twice > 0 or (twice == 0 and tie)
    return high if above else low


def points(table, dtype):
    """Values, midpoints, what is beside both, anything between, what is beyond, and special values."""
    rng = random.Random(5)
    kind = np.float32 if dtype == torch.float32 else np.float64
    values = list(table.values) if len(table.values) < 40 else sorted(rng.sample(table.values, 30))
    low, high = np.array(values[:-1]), np.array(values[1:])
    pairs = [place for place in range(len(table.values) - 1) if len(table.values) < 40 or rng.random() < 0.1]
    ends = [(table.values[place], table.values[place + 1]) for place in pairs]
    between = [a + (b - a) * rng.random() for a, b in ends for _ in range(3)]
    middles = [a / 2 + b / 2 for a, b in ends]
    near = np.array([*low, *high, *middles], kind)
    with np.errstate(over="ignore"):
        x = np.concatenate(
            [
                near,
                np.nextafter(near, kind(-np.inf)),
                np.nextafter(near, kind(np.inf)),
                np.array(between, kind),
                np.array([0.0, -0.0, 1e-45, -1e-45, 1e-300, 1.7, -1e9, 1e39, np.inf, -np.inf, np.nan], kind),
            ]
        )
    return torch.from_numpy(x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding_is_exact(name, dtype):
    table = of_name(name)
    x = points(table, dtype)
    high, low = (words(KEY, 0, len(x), draw=draw).to(torch.int64) & 0xFFFFFFFF for draw in (0, LOW_WORD))
    random_words = [(h << 32) | i for h, i in zip(high.tolist(), low.tolist(), strict=True)]
    for rounding in ROUNDINGS:
        key = KEY if is_random(rounding) else None
        result = eager.quantize(x, table, rounding, Overflow.SATURATE, key)
        right = [expected(v, table, rounding, w, dtype) for v, w in zip(x.tolist(), random_words, strict=True)]
        right = torch.tensor(right, dtype=dtype)
        wrong = ~((result == right) | (result.isnan() & right.isnan()))
        assert not wrong.any(), (rounding, x[wrong][:3], result[wrong][:3], right[wrong][:3])
        assert not (result.signbit() & (result == 0)).any()  # there is one zero


def same(a, b):
    whole = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.itemsize]
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.view(whole), b.view(whole))


@pytest.mark.parametrize("name", [*NAMES, "posit16_table"])
def test_fused_is_eager(name):
    table = of_name(name)
    g = torch.Generator().manual_seed(2)
    x = points(table, torch.float32)
    any_bits = torch.randint(-(2**31), 2**31 - 1, (40_000,), dtype=torch.int32, generator=g).view(torch.float32)
    x = torch.cat([x, any_bits, torch.randn(40_000, generator=g)])
    for rounding in ROUNDINGS:
        key = Key(2**63 + 7) if is_random(rounding) else None
        results = [engine.quantize(x, table, rounding, Overflow.SATURATE, key) for engine in (eager, fused)]
        assert same(*results), rounding
        assert not (results[0].signbit() & (results[0] == 0)).any()


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC], ids=str)
def test_layouts_types_and_places(rounding):
    """Elements count in row-major order, whatever the memory; half precision where that type has all values."""
    table, key = format_named("hif8"), KEY if is_random(rounding) else None
    x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(3))
    whole = eager.quantize(x, table, rounding, Overflow.SATURATE, key)
    for view in (
        x.to(memory_format=torch.channels_last),
        x.bfloat16().float().transpose(0, 3),
        x[:, ::2],
        x.repeat_interleave(2, -1)[..., ::2],  # flattened, it is a view that has gaps
        x[1, 2, 3, 4],
    ):
        first, second = (engine.quantize(view, table, rounding, Overflow.SATURATE, key) for engine in (eager, fused))
        assert same(first, second)
        assert torch.equal(first, eager.quantize(view.contiguous(), table, rounding, Overflow.SATURATE, key))
    assert torch.equal(lp.quantize(x, table, rounding, key, backend="fused"), whole)
    half = lp.quantize(x.bfloat16(), "hif8", rounding, key)
    assert torch.equal(half.float(), lp.quantize(x.bfloat16().float(), "hif8", rounding, key))
    with pytest.raises(TypeError, match=r"nf4: given torch\.bfloat16, allowed: a torch\.float32 tensor"):
        lp.quantize(x.bfloat16(), "nf4")
    later = Key(KEY.value, first_row=3)
    rest = [engine.quantize(x[3:], table, rounding, Overflow.SATURATE, key and later) for engine in (eager, fused)]
    assert same(*rest)
    assert torch.equal(rest[0], whole[3:])


def test_stochastic_rounding_has_the_right_probability():
    x, n = torch.full((100_000,), 0.1), 100_000
    low, high = 0.07958029955625534, 0.16093020141124725
    ups = int((lp.quantize(x, "nf4", "stochastic", key=4) == high).sum())
    p = (float(x[0]) - low) / (high - low)
    assert abs(ups - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_the_gradient_passes_straight_through_and_back_ways_are_rounded():
    x = torch.randn(50, requires_grad=True)
    lp.quantize(x, "nf4", backward="posit8_table").backward(torch.full((50,), 0.3))
    assert torch.equal(x.grad, lp.quantize(torch.full((50,), 0.3), "posit8_table"))


# In groups that share a scale


@pytest.mark.parametrize(
    "name", ["nf4@16", "dynamic8@flat64", "dynamic8u@row", "hif8@4x8@pow2", "posit8_table@32@e8m0"]
)
def test_tables_as_elements(name):
    """A number is the element of x * s, over s; s = largest / amax in float32, or a power of two."""
    fmt = format_named(name)
    assert isinstance(fmt, BlockFormat)
    assert fmt.name == name
    x = torch.randn(24, 40, generator=torch.Generator().manual_seed(6))
    x[3] = 0.0
    for rounding in (Rounding.NEAREST, Rounding.TOWARD_ZERO, Rounding.STOCHASTIC, FewBits(4, even=True)):
        key = KEY if is_random(rounding) else None
        results = [engine.quantize(x, fmt, rounding, Overflow.SATURATE, key) for engine in (eager, fused)]
        assert same(*results)
    rounded = lp.quantize(x, fmt)
    groups = {
        "nf4@16": lambda t: torch.nn.functional.pad(t, (0, 8)).reshape(-1, 16),
        "dynamic8@flat64": lambda t: t.reshape(-1, 64),
        "dynamic8u@row": lambda t: t,
    }
    if name in groups:
        rows, ours = groups[name](x), groups[name](rounded)
        amax = rows.abs().amax(1, keepdim=True)
        scale = torch.where(amax == 0, 1.0, fmt.element.largest / amax)
        values = torch.tensor(fmt.element.values)
        nearest = values[(rows * scale).unsqueeze(-1).sub(values).abs().argmin(-1)]
        assert torch.equal(ours, nearest / scale)


def test_8_bit_adam_rounds_to_the_nearest_of_its_values():
    x = torch.randn(512, generator=torch.Generator().manual_seed(1)).square()
    rounded = lp.quantize(x, "dynamic8u@flat256").view(2, 256)
    amax = x.view(2, 256).amax(1, keepdim=True)
    assert torch.equal(rounded.amax(1, keepdim=True), amax)
    assert ((rounded - x.view(2, 256)).abs() <= amax * 0.0071 / 2 + 1e-7).all()


# Tables of one's own, and files


def test_a_table_says_what_is_wrong_with_it():
    for values, said in {
        (1.0,): "1 of them",
        (1.0, 1.0): "1.0 after 1.0",
        (2.0, 1.0): "in order",
        (0.1, 1.0): "float32",
        (0.0, math.inf): "float32",
        (math.nan, 1.0): "float32",
        (0.0, True): "float32",
        (-0.0, 0.0): "0.0 after -0.0",
    }.items():
        with pytest.raises(SettingError, match=said) as caught:
            Table("own", values, "")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(TypeError, match="a tuple"):
        Table("own", [1.0, 2.0], "")
    for wrong in (0.5, 2**70):
        with pytest.raises(SettingError, match="first_code"):
            Table("own", (0.0, 1.0), "", first_code=wrong)
    assert Table("own", (-1, -0.0, 2), "").values == (-1.0, 0.0, 2.0)
    assert not math.copysign(1, Table("own", (-1, -0.0, 2), "").values[1]) < 0
    with pytest.raises(FrozenInstanceError):
        OWN["two"].values = ()
    assert replace(OWN["two"], first_code=1) != OWN["two"]


def test_a_table_has_no_infinity():
    x = torch.tensor([math.inf, -math.inf, 1e9])
    with pytest.raises(SettingError, match="allowed: saturate, propagate"):
        lp.quantize(x, "nf4", overflow="infinity")
    assert lp.quantize(x, "nf4", overflow="propagate").tolist() == [1.0, -1.0, 1.0]


def test_a_table_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("# mine\n1 -1 0.5 # half\n\n0 1e0 0.1\n-0.0")
    table = format_named("table:own.txt")
    assert table.values == (-1.0, 0.0, float(np.float32(0.1)), 0.5, 1.0)
    assert table.name == str(table) == "table:own.txt"
    assert format_named("table:own.txt") is table
    rule = rule_of("table:own.txt:stochastic:4")
    assert (rule.format, rule.rounding) == (table, FewBits(4))
    assert rule_of(str(rule)) == rule
    assert str(rule_of("table:own.txt@16@pow2")) == "table:own.txt@16@pow2:nearest"
    assert rule_of("table:own.txt@16@pow2:up").format.element == table
    assert str(site_line("head.*/weights=table:own.txt:up")) == "head.*/weights=table:own.txt:up"
    assert lp.quantize(torch.tensor([0.06, -3.0]), "table:own.txt").tolist() == [float(np.float32(0.1)), -1.0]
    (tmp_path / "own.txt").write_text("0 2 4")
    assert format_named("table:own.txt").values == (0.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 two", "line 1 has two"),
        ("1\n2 nan", "line 2 has nan"),
        ("1 1e39", "1e39"),
        ("1", "it has 1"),
        ("# 1 2 3", "it has 0"),
        (b"\xff\xfe1 2", "no text"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_table_is_refused_in_one_line(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "own.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingError, match=said) as caught:
        format_named("table:own.txt")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["table:", "table:a:b", "table:a,b", "table:a;b"])
def test_paths_that_a_rule_cannot_hold(name):
    with pytest.raises(SettingError, match="without : @ , ;"):
        tables.named(name)


def test_a_run_is_another_one_when_the_file_has_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.txt").write_text("0 1 2")
    config = Config(precision="table:own.txt")
    before = config.folder_name
    assert before.startswith("toy-table-own.txt-nearest-42-")
    assert Config.from_json(config.to_json()) == config
    (tmp_path / "own.txt").write_text("0 1 2 # the same")
    assert config.folder_name == before
    (tmp_path / "own.txt").write_text("0 1 3")
    assert config.folder_name != before
    (tmp_path / "own.txt").unlink()
    with pytest.raises(ConfigError, match="No such file"):
        Config(precision="table:own.txt")


def test_a_run_has_float32_numbers():
    with pytest.raises(ConfigError, match=r"--precision: given .*binary12p3se.*float32") as caught:
        Config(precision="binary12p3se")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="--site"):
        Config(precision="float8", site=("head/weights=binary12p3se",))
