"""Formats: what their rows say, what their names are, and what a format of one's own may be."""

import copy
import math
import pickle
from dataclasses import replace

import ml_dtypes
import numpy as np
import oracles
import pytest
import torch

from low_precision import formats
from low_precision.engines.parameters import parameters
from low_precision.errors import SettingError
from low_precision.format_names import ELSEWHERE
from low_precision.formats import BLOCKS, FLOAT32, NAMED, BlockFormat, Format, format_named
from low_precision.rounding import Rounding
from low_precision.tensor import quantize

ML_DTYPES = [
    "bfloat16",
    "float8_e5m2",
    "float8_e4m3fn",
    "float8_e5m2fnuz",
    "float8_e4m3fnuz",
    "float6_e3m2fn",
    "float6_e2m3fn",
    "float4_e2m1fn",
]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_rows_agree_with_ml_dtypes(name):
    fmt, dtype = NAMED[name], getattr(ml_dtypes, name)
    there = ml_dtypes.finfo(dtype)
    assert fmt.largest == float(there.max)
    assert fmt.smallest_normal == float(there.smallest_normal)
    assert fmt.smallest_subnormal == float(there.smallest_subnormal)
    assert 2 * fmt.unit_roundoff == float(there.eps)
    width = 1 + fmt.exponent_bits + fmt.mantissa_bits
    codes = np.arange(2**width, dtype=np.uint16 if width == 16 else np.uint8).view(dtype).astype(np.float32)
    assert fmt.has_infinity == bool(np.isinf(codes).any())
    assert fmt.has_nan == bool(np.isnan(codes).any())
    assert fmt.has_negative_zero == bool((np.signbit(codes) & (codes == 0)).any())


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), ("fp16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_rows_agree_with_torch(name, dtype):
    fmt, there = NAMED[name], torch.finfo(dtype)
    assert (fmt.largest, fmt.smallest_normal) == (there.max, there.smallest_normal)
    assert 2 * fmt.unit_roundoff == there.eps


def test_the_experiments_formats():
    # qtorch's FloatingPoint(exp=5, man=2) and FloatingPoint(exp=6, man=9): the top exponent holds numbers.
    assert NAMED["float8"].bits == "1-5-2"
    assert NAMED["float8"].largest == 114688
    assert NAMED["float16"].bits == "1-6-9"
    assert NAMED["float16"].largest == 2.0**32 * (2 - 2.0**-9)
    assert not NAMED["float8"].has_infinity
    assert not NAMED["float16"].has_infinity


@pytest.mark.parametrize(
    ("name", "like"), [("e5m10", "fp16"), ("e8m7", "bfloat16"), ("e8m10", "tf32"), ("e5m2", "float8_e5m2")]
)
def test_any_other_format_is_ieee_like(name, like):
    made, named = format_named(name), NAMED[like]
    assert made.name == name
    for fact in ("bits", "bias", "largest", "has_infinity", "has_nan", "has_negative_zero"):
        assert getattr(made, fact) == getattr(named, fact)


def test_half_is_fp16():
    assert format_named("half") is NAMED["fp16"]


@pytest.mark.parametrize("name", ["float9", "e1m2", "e9m2", "e5m24", "e5m02", "E5M2", "e5m", "", "float8 "])
def test_unknown_names_say_what_is_allowed(name):
    with pytest.raises(ValueError, match=r"allowed: float32, .*eXmY"):
        format_named(name)


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean float8_e4m3fn"):
        format_named("float8_e4m3")


def test_table_lists_every_format():
    lines = formats.table().splitlines()
    for name, fmt in NAMED.items():
        row = next(line for line in lines if line.split()[0] == name)
        assert row.split()[1] == fmt.bits


def test_the_table_says_which_names_mislead():
    text = formats.table()
    for words in ("float16 is qtorch's format, not IEEE half", "OCP's E4M3, which ends at 448, is float8_e4m3fn"):
        assert words in " ".join(text.split())
    assert (format_named("e4m3").largest, NAMED["float8_e4m3fn"].largest) == (240, 448)
    e5m2, ocp = format_named("e5m2"), NAMED["float8_e5m2"]
    assert replace(e5m2, name=ocp.name, source=ocp.source) == ocp


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("float8_e4m3", "float8_e4m3fn"),
        ("e4m3fn", "float8_e4m3fn"),
        ("E4M3", "float8_e4m3fn"),
        ("fp8", "float8_e4m3fn"),
        ("FP8-E4M3", "float8_e4m3fn"),
        ("f8E4M3FN", "float8_e4m3fn"),
        ("torch.float8_e4m3fn", "float8_e4m3fn"),
        ("fp8_e5m2", "float8_e5m2"),
        ("E5M2", "float8_e5m2"),
        ("f8E5M2FNUZ", "float8_e5m2fnuz"),
        ("f16", "fp16"),
        ("FP16", "fp16"),
        ("float16_ieee", "fp16"),
        ("binary16", "fp16"),
        ("torch.float16", "fp16"),
        ("np.float16", "fp16"),
        ("Float16", "float16"),
        ("bf16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("fp32", "float32"),
        ("TF-32", "tf32"),
        ("fp4", "float4_e2m1fn"),
        ("float4_e2m1fn_x2", "float4_e2m1fn"),
        ("float6_e2m3", "float6_e2m3fn"),
        ("MXFP8", "mxfp8_e4m3"),
        ("mxfp4_e2m1", "mxfp4"),
        ("float8_e3m4", "e3m4"),
        ("E5M10", "e5m10"),
        ("e5m24", None),
        ("float64", None),
        ("float8_e8m0fnu", None),
        ("\u04354m3", None),  # its first letter is Cyrillic
    ],
)
def test_names_of_other_projects_lead_to_ours(name, ours):
    with pytest.raises(SettingError) as caught:
        format_named(name)
    assert caught.value.nearest == ours
    assert (ours == "fp16") == ("IEEE half is fp16" in caught.value.note)
    assert (ours == "float8_e4m3fn") == ("e4m3 is IEEE-like, up to 240" in caught.value.note)


def test_each_of_those_names_is_none_of_ours_and_leads_to_one():
    for name, ours in ELSEWHERE.items():
        assert ours is None or ours in {*NAMED, *BLOCKS}
        assert name in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1") or name not in {*NAMED, *BLOCKS}


def test_torchs_types_are_no_formats_but_lead_to_one():
    for dtype, ours in {torch.float16: "fp16", torch.bfloat16: "bfloat16", torch.float8_e5m2: "float8_e5m2"}.items():
        with pytest.raises(TypeError, match=rf"given {dtype} \(did you mean {ours}\?\), allowed: a Format"):
            format_named(dtype)


# Formats of one's own

ROW = {
    "name": "own",
    "exponent_bits": 4,
    "mantissa_bits": 3,
    "bias": 7,
    "largest": 448.0,
    "has_infinity": False,
    "has_nan": True,
    "has_negative_zero": True,
    "source": "",
}
FIXED = ROW | {"exponent_bits": 0, "mantissa_bits": 6, "bias": 1, "largest": 127 / 64}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": None}, "name"),
        ({"name": 8}, "name"),
        ({"exponent_bits": 12}, "exponent_bits"),
        ({"exponent_bits": -1}, "exponent_bits"),
        ({"exponent_bits": 4.0}, "exponent_bits"),
        ({"exponent_bits": "4"}, "exponent_bits"),
        ({"exponent_bits": True}, "exponent_bits"),
        ({"mantissa_bits": 24}, "mantissa_bits"),
        ({"mantissa_bits": -1}, "mantissa_bits"),
        ({"mantissa_bits": None}, "mantissa_bits"),
        ({"bias": 148}, "bias"),  # spacing 2**-150
        ({"exponent_bits": 11, "bias": 1073}, "bias"),  # spacing 2**-1075
        ({"bias": -127}, "bias"),
        ({"bias": 7.5}, "bias"),
        ({"bias": 10**400}, "bias"),
        ({"largest": 0.0}, "largest"),
        ({"largest": -448.0}, "largest"),
        ({"largest": math.nan}, "largest"),
        ({"largest": math.inf}, "largest"),
        ({"largest": 449.0}, "largest"),  # between two values
        ({"largest": 512.0}, "largest"),  # beyond what the exponent holds
        ({"largest": 2.0**-10}, "largest"),  # half of the smallest value
        ({"largest": 5e-324}, "largest"),
        ({"largest": 2**128}, "largest"),
        ({"largest": "448"}, "largest"),
        ({"largest": True}, "largest"),
        ({"exponent_bits": 8, "mantissa_bits": 7, "bias": 127, "largest": 2.0**128 * (2 - 2.0**-7)}, "largest"),
        ({"has_infinity": 1}, "has_infinity"),
        ({"has_nan": None}, "has_nan"),
        ({"has_negative_zero": "no"}, "has_negative_zero"),
        ({"signed": None}, "signed"),
        ({"signed": False}, "has_negative_zero"),
        (FIXED | {"signed": False, "has_negative_zero": False, "twos_complement": True}, "twos_complement"),
        ({"twos_complement": 1}, "twos_complement"),
        ({"twos_complement": True}, "twos_complement"),  # -448 - 2**-9 is no value
    ],
)
def test_a_format_that_no_engine_could_round_to_is_refused(fields, field):
    with pytest.raises(SettingError) as caught:
        Format(**ROW | fields)
    assert str(caught.value.setting).endswith(f": {field}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"largest": 448},
        {"largest": 480.0},
        {"largest": 2.0**-9},
        {"bias": 124, "largest": 2.0**-110},
        {"bias": 127, "largest": 2.0**-112},
        {"bias": -112, "largest": 2.0**127 * 1.875},
        {"exponent_bits": 1, "bias": 0, "largest": 3.75},
        {"exponent_bits": 8, "bias": -126, "largest": 2.0**127},
        {"bias": 125, "largest": 2.0**-110},  # subnormal numbers of float32
        {"bias": 147, "largest": 2.0**-145 * 1.5},
        {"exponent_bits": 8, "bias": 130, "largest": 2.0**-100},
        FIXED,
        FIXED | {"twos_complement": True, "has_negative_zero": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("rounding", list(Rounding))
def test_the_values_of_a_format_of_ones_own_never_move(fields, rounding):
    """And what lies beyond becomes the largest: in both types that numbers are computed in."""
    fmt = Format(**ROW | fields)
    values = oracles.values(fmt)[1:]
    x = torch.tensor([*values, *(-value for value in values), fmt.lowest], dtype=torch.float64)
    for numbers in (x, x.float()):
        assert torch.equal(quantize(numbers, fmt, rounding, key=1), numbers)
        beyond = torch.tensor([math.inf, -math.inf], dtype=numbers.dtype)
        assert quantize(beyond, fmt, rounding, key=1).tolist() == [fmt.largest, fmt.lowest]


BLOCK = {"name": "own", "element": NAMED["float8_e4m3fn"], "block": 4, "scale": None, "source": ""}


@pytest.mark.parametrize(
    ("fields", "field", "near"),
    [
        ({"name": ""}, "name", None),
        ({"element": "float8"}, "element", None),
        ({"element": BLOCKS["mxfp4"]}, "element", None),
        ({"element": None}, "element", None),
        ({"element": format_named("fixed8.8s")}, "element", None),  # ends below 1
        ({"element": format_named("fixed8.6")}, "element", None),  # two's complement
        ({"block": 0}, "block", None),
        ({"block": -1}, "block", None),
        ({"block": 2.5}, "block", None),
        ({"block": 32.0}, "block", None),
        ({"block": True}, "block", None),
        ({"block": None}, "block", None),
        ({"block": 2**40}, "block", None),
        ({"block": "32"}, "block", None),
        ({"block": "colum"}, "block", "column"),
        ({"block": "Row"}, "block", "row"),
        ({"block": (1, 32)}, "block", None),
        ({"scale": "float32"}, "scale", None),
        ({"scale": BLOCKS["mxfp4"]}, "scale", None),
        ({"scale": 2}, "scale", None),
        ({"has_infinity": True}, "has_infinity", None),
    ],
)
def test_a_block_format_is_checked_when_it_is_made(fields, field, near):
    with pytest.raises(SettingError) as caught:
        BlockFormat(**BLOCK | fields)
    assert str(caught.value.setting).endswith(f": {field}")
    assert caught.value.nearest == near
    assert len(str(caught.value).splitlines()) == 1


def scaled_by_torch(x: torch.Tensor, dtype: torch.dtype, largest: float, lines: tuple[int, ...]) -> torch.Tensor:
    """Torch's own cast of numbers that are multiplied by a float32 scale, and back."""
    scale = x.new_tensor(largest) / x.abs().amax(lines, keepdim=True)
    return (x * scale).clamp(-largest, largest).to(dtype).float() / scale


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("block", "lines"), [("tensor", (0, 1)), ("row", (1,)), ("column", (0,)), (16, None)])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_fp8_with_float32_scales_is_torchs_scaled_cast(dtype, block, lines, backend):
    element = NAMED[str(dtype).removeprefix("torch.")]
    fmt = BlockFormat("scaled", element, block, FLOAT32, "")
    generator = torch.Generator().manual_seed(1)
    for size in (1e-20, 1.0, 1e20):
        x = torch.randn(64, 48, generator=generator) * size * torch.rand(64, 1, generator=generator)
        if lines is None:
            expected = scaled_by_torch(x.view(-1, 16), dtype, element.largest, (1,)).view(x.shape)
        else:
            expected = scaled_by_torch(x, dtype, element.largest, lines)
        assert torch.equal(quantize(x, fmt, backend=backend), expected)


ELEMENTS = ["float8", "float16", "fp16", "float8_e5m2", "float8_e4m3fn", "e4m3", "e2m3", "fixed8.6s", "fixed12.3s"]


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("block", [1, 5, 64, "tensor", "row", "column"])
def test_blocks_of_any_element_and_length(element, block):
    """With a scale of a power of two as BlockFormat's docstring has it, and with others alike in both engines."""
    element_format = format_named(element)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 11, generator=generator) * torch.randn(7, 1, generator=generator).mul(8).exp()
    power = BlockFormat("own", element_format, block, None, "")
    lines = {"tensor": x.reshape(1, -1), "row": x, "column": x.T}.get(block, x)
    size = block if isinstance(block, int) else lines.shape[1]
    expected = torch.empty_like(lines)
    for start in range(0, lines.shape[1], size):
        part = lines[:, start : start + size].double()
        exponents = part.abs().amax(1, keepdim=True).log2().floor() - math.floor(math.log2(element_format.largest))
        expected[:, start : start + size] = quantize(part / 2**exponents, element_format) * 2**exponents
    expected = expected.T if block == "column" else expected.view(x.shape)
    scaled = [BlockFormat("own", element_format, block, format_named(scale), "") for scale in ("float8_e4m3fn", "fp16")]
    for fmt in (power, *scaled):
        eager, fused = (quantize(x, fmt, backend=backend) for backend in ("eager", "fused"))
        assert torch.equal(eager, fused)
        assert fmt is not power or torch.equal(eager, expected)


def test_two_formats_of_one_name_are_told_apart():
    """They have one hash; what is kept of one in a cache must not be taken for the other."""
    one, other = (Format(**ROW | {"largest": largest}) for largest in (448.0, 240.0))
    assert hash(one) == hash(other)
    assert one != other
    assert parameters(one, Rounding.NEAREST) != parameters(other, Rounding.NEAREST)
    for backend in ("eager", "fused"):
        x = torch.tensor([1000.0, 3.3])
        for fmt in (one, other, one):
            assert quantize(x, fmt, backend=backend).tolist() == [fmt.largest, 3.25]
            assert quantize(x.double(), fmt, backend=backend).tolist() == [fmt.largest, 3.25]
            block = BlockFormat("own", fmt, "tensor", FLOAT32, "")
            scale = np.float32(fmt.largest) / np.float32(1000.0)
            assert quantize(x, block, backend=backend)[0] == np.float32(fmt.largest) / scale
    half = torch.tensor([1000.0]).half()
    assert [quantize(half, fmt).item() for fmt in (one, other)] == [448, 240]


def test_a_format_of_ones_own_is_copied_and_pickled():
    for fmt in (Format(**ROW), BlockFormat(**BLOCK)):
        for back in (copy.deepcopy(fmt), pickle.loads(pickle.dumps(fmt))):
            assert back == fmt
            assert hash(back) == hash(fmt)
