import ml_dtypes
import numpy as np
import pytest
import torch

from low_precision import formats
from low_precision.formats import NAMED, format_named

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
