"""Groups that share a scale, and each way to find it, against a few lines of numpy in float32 and peers' casts."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch

import low_precision as lp
from low_precision import blocks
from low_precision.errors import SettingError
from low_precision.formats import FLOAT32, BlockFormat, format_named
from low_precision.scales import SCALES, Scaling
from low_precision.tensor import quantize

F = np.float32
ELEMENTS = {
    "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, 448),
    "float8_e5m2": (ml_dtypes.float8_e5m2, 57344),
    "float4_e2m1fn": (ml_dtypes.float4_e2m1fn, 6),
    "float6_e2m3fn": (ml_dtypes.float6_e2m3fn, 7.5),
}
FOUND = [scale for scale in SCALES if scale != "expand"]


def cast(z: np.ndarray, element: str) -> np.ndarray:
    """To nearest, by ml_dtypes; beyond the largest value, that one."""
    if element == "fixed8.0s":
        return np.rint(z).clip(-127, 127).astype(F)
    dtype, largest = ELEMENTS[element]
    return z.clip(-largest, largest).astype(dtype).astype(F)


def power(exponent: int) -> np.float32:
    return F(math.ldexp(1.0, min(max(exponent, -127), 127)))


def exponent_of(amax: np.float32) -> int:
    return math.frexp(float(amax))[1] - 1


def by_hand(group: np.ndarray, element: str, scale: str) -> np.ndarray:
    """One group's numbers, as the sources have the scale: RNE of x * s or x / s, and back."""
    largest = F(127 if element == "fixed8.0s" else ELEMENTS[element][1])
    digits = {"float8_e4m3fn": 3, "float8_e5m2": 2, "float4_e2m1fn": 1, "float6_e2m3fn": 3, "fixed8.0s": 6}[element]
    amax = np.abs(group).max()
    if amax == 0:
        return group
    top = exponent_of(largest)
    if scale in ("float32", "pow2"):
        s = largest / amax
        s = power(exponent_of(s)) if scale == "pow2" else s
        return cast(group * s, element) / s
    if scale == "quest":
        z = group.astype(np.float64)
        deviation = math.sqrt(max((z * z).mean() - z.mean() ** 2, 0))
        s = power(exponent_of(deviation * (2.92247856 / float(largest)) + 1e-8))
    elif scale == "headroom":
        s = power(exponent_of(amax) - top)
        return cast(group * F(0.75) / s, element) * s / F(0.75)
    elif scale == "e8m0":
        s = power(exponent_of(amax) - top)
    elif scale == "e8m0_ceil":
        s = power(math.ceil(math.log2(float(amax))) - top)
    elif scale == "e8m0_rceil":
        s = power(math.ceil(math.log2(float(amax) / float(largest))))
    else:  # e8m0_even: amax to as many digits as the element has, half up
        step = math.ldexp(1.0, exponent_of(amax) - digits)
        s = power(exponent_of(F(math.floor(float(amax) / step + 0.5) * step)) - top)
    return cast(group / s, element) * s


def nvfp4_by_hand(groups: list[np.ndarray]) -> list[np.ndarray]:
    """TransformerEngine's two levels, operation by operation in float32."""
    amax = max(np.abs(group).max() for group in groups)
    s_enc = F(1) if amax == 0 else min(F(2688) / amax, np.finfo(F).max)
    s_dec, m = F(1) / s_enc, s_enc * (F(1) / F(6))
    results = []
    for group in groups:
        scale = cast(np.minimum(np.abs(group).max() * m, F(448)), "float8_e4m3fn")
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            s_b = np.minimum(F(1) / F(scale * s_dec), np.finfo(F).max)
            q = cast(F(group * s_b), "float4_e2m1fn")
        results.append(F(q * scale) * s_dec)
    return results


def random(*shape: int, seed: int = 0, spread: float = 4.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    size = np.exp2(np.round(generator.normal(0, spread, (*shape[:-1], -(-shape[-1] // 8))))).repeat(8, -1)
    return (generator.standard_normal(shape) * size[..., : shape[-1]]).astype(F)


def tiles(shape: tuple[int, int], group: str) -> list[tuple[slice, slice]]:
    """The groups of a matrix, lines first."""
    rows, length = shape
    if group in ("tensor", "row", "column"):
        height, width = {"tensor": shape, "row": (1, length), "column": (rows, 1)}[group]
    else:
        height, width = (int(n) for n in group.split("x")) if "x" in group else (1, int(group))
    starts = itertools.product(range(0, rows, height), range(0, length, width))
    return [(slice(row, row + height), slice(place, place + width)) for row, place in starts]


@pytest.mark.parametrize("element", [*ELEMENTS, "fixed8.0s"])
@pytest.mark.parametrize("scale", FOUND)
@pytest.mark.parametrize("group", ["tensor", "row", "column", "16", "7", "4x16", "32x32"])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_scales_against_numpy(element, scale, group, backend):
    if scale == "quest" and "x" in group:  # which stands for one line
        with pytest.raises(SettingError, match="quest"):
            format_named(f"{element}@{group}@{scale}")
        return
    x = random(37, 50)
    if scale == "quest":  # what fills up a shorter group counts
        x = random(40, 56 if group == "7" else 48)
    x[3, 8:24], x[5:9, 16:32] = 0, np.sign(x[5:9, 16:32]) * 1.5
    expected = np.empty_like(x)
    for tile in tiles(x.shape, group):
        expected[tile] = by_hand(x[tile], element, scale)
    rounded = quantize(torch.from_numpy(x), f"{element}@{group}@{scale}", dim=1, backend=backend).numpy()
    assert np.array_equal(rounded, expected)
    along_columns = quantize(torch.from_numpy(x.T.copy()), f"{element}@{group}@{scale}", dim=0, backend=backend).numpy()
    if group in ("tensor", "16", "7", "4x16", "32x32"):
        assert np.array_equal(along_columns.T, expected)


@pytest.mark.parametrize("group", ["16", "16x16"])
@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_nvfp4_is_transformer_engines(group, factor, backend):
    x = random(48, 64, seed=2) * F(factor)
    x[7, 16:32] = 0
    cut = tiles(x.shape, group)
    expected = np.empty_like(x)
    for tile, values in zip(cut, nvfp4_by_hand([x[tile] for tile in cut]), strict=True):
        expected[tile] = values
    rounded = quantize(torch.from_numpy(x), f"float4_e2m1fn@{group}@float8_e4m3fn", dim=1, backend=backend)
    assert np.array_equal(rounded.numpy(), expected)
    assert format_named("float4_e2m1fn@16@float8_e4m3fn") is format_named("nvfp4")


def test_flat_groups_are_those_of_the_tensor_flattened():
    x = torch.from_numpy(random(6, 5, 7))
    for rounding in ("nearest", "stochastic"):
        flat = quantize(x.reshape(-1), "float8_e4m3fn@64", rounding, 3)
        assert torch.equal(quantize(x, "float8_e4m3fn@flat64", rounding, 3), flat.view(6, 5, 7))
        strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert torch.equal(quantize(strided, "float8_e4m3fn@flat64", rounding, 3), flat.view(6, 5, 7))


@pytest.mark.parametrize("name", ["float8_e4m3fn@tensor", "float8_e4m3fn@8", "nvfp4", "float4_e2m1fn@8@headroom"])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_special_values(name, backend):
    """NaN does not count and stays; an infinity counts as the largest float32; a group of zeros stays as it is."""
    x = torch.tensor([1.5, math.nan, -0.0, 3.0, 0.1, -2.5, 1e-44, 0.0] * 2)
    rounded = quantize(x, name, backend=backend)
    clean = quantize(x.nan_to_num(0.0), name, backend=backend)
    assert rounded[1].isnan()
    assert torch.equal(rounded.nan_to_num(0.0), clean)
    assert rounded[2].signbit()
    infinite = quantize(torch.tensor([math.inf, -math.inf, 1.0, 3e38] * 4), name, backend=backend)
    assert infinite.isfinite().all()
    assert infinite[0] > 3e38 * 0.9
    assert infinite[1] == -infinite[0]
    assert not quantize(torch.zeros(16), name, backend=backend).any()
    largest = torch.full((16,), torch.finfo(torch.float32).max)
    assert quantize(largest, name, backend=backend).isfinite().all()
    smallest = torch.full((16,), 2.0**-149)
    assert quantize(smallest, name, backend=backend).isfinite().all()
    assert quantize(torch.tensor(2.5), name, backend=backend) == 2.5 or name != "float8_e4m3fn@tensor"


def test_a_scale_that_would_be_infinite_is_the_largest_number():
    x, fmt = torch.tensor([2.0**-135, -(2.0**-142)]), format_named("float8_e4m3fn@tensor")
    factors = blocks.factors(x.abs().amax().reshape(1, 1), fmt, quantize)
    assert float(factors.encode) == torch.finfo(torch.float32).max
    assert quantize(x, fmt).tolist() == [2.0**-135, 0.0]


@pytest.mark.parametrize("scale", ["e8m0_ceil", "e8m0_rceil", "e8m0_even"])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_what_is_rounded_up_beyond_float32_becomes_its_largest_number(scale, backend):
    x = torch.full((32,), torch.finfo(torch.float32).max)
    rounded = quantize(x, f"float8_e4m3fn@32@{scale}", backend=backend)
    assert torch.equal(rounded, x)


@pytest.mark.parametrize("name", ["float8_e4m3fn@32@pow2", "float4_e2m1fn@32@e8m0_rceil", "float4_e2m1fn@32@quest"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_bytes_hold_what_has_a_power_of_two_as_scale(name, dtype):
    x = torch.from_numpy(random(20, 64)).to(dtype)
    expected = quantize(x.float(), name).to(dtype)
    for backend in ("eager", "fused"):
        assert torch.equal(quantize(x, name, backend=backend), expected)


def test_two_bytes_do_not_hold_other_scales():
    for name in ("nvfp4", "float8_e4m3fn@tensor", "float4_e2m1fn@32@headroom"):
        with pytest.raises(TypeError, match="float32 tensor"):
            quantize(torch.ones(32, dtype=torch.bfloat16), name)


def test_float64_is_computed_in_float64():
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s = x.new_tensor(448) / x.abs().amax(1, keepdim=True)
    expected = quantize(x * s, "float8_e4m3fn") / s
    assert torch.equal(quantize(x, "float8_e4m3fn@row"), expected)


def test_a_given_scale_is_that_of_delayed_scaling():
    x, scale = torch.from_numpy(random(30, 40)), torch.tensor(3.7)
    expected = torch.from_numpy(cast((x * scale).numpy(), "float8_e4m3fn")) / scale
    for backend in ("eager", "fused"):
        rounded = quantize(x, "float8_e4m3fn@tensor@delayed16", scale=scale, backend=backend)
        assert torch.equal(rounded, expected)
    with pytest.raises(SettingError, match="a delayed scale has a model"):
        quantize(x, "float8_e4m3fn@tensor@delayed16")
    with pytest.raises(SettingError, match="scale: "):
        quantize(x, "float8_e4m3fn@tensor", scale=scale)
    with pytest.raises(SettingError, match="scale: "):
        quantize(x, "float8_e4m3fn@tensor@delayed16", scale=scale.double())
    with pytest.raises(TypeError, match=r"scale: given 3\.7, allowed: a float32 tensor \(\)"):
        quantize(x, "float8_e4m3fn@tensor@delayed16", scale=3.7)


@pytest.mark.parametrize("name", ["dynamic8@16@float8_e4m3fn", "dynamic8@4@fp16", "posit8_table@16@fp16", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinity_saturates_in_two_levels(name, dtype):
    """Its group's scale times the tensor's may be beyond the type."""
    x = torch.linspace(-1, 1, 64, dtype=dtype)
    x[3], x[40] = math.inf, -math.inf
    for backend in ("eager", "fused"):
        rounded = quantize(x, name, backend=backend)
        assert rounded.isfinite().all()
        assert rounded[3] > 0.9 * torch.finfo(dtype).max
        assert rounded[40] < -0.9 * torch.finfo(dtype).max


@pytest.mark.parametrize("name", ["nf4@16@pow2", "binary3p1sf@tensor@pow2", "float8_e4m3fn@16@pow2", "nf4@16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinity_saturates_where_the_scale_is_a_subnormal_number(name, dtype):
    x = torch.linspace(-1, 1, 64, dtype=dtype)
    x[3] = math.inf
    largest = torch.finfo(dtype).max
    for backend in ("eager", "fused"):
        rounded = quantize(x, name, backend=backend)
        assert rounded.isfinite().all()
        assert largest / 2 < rounded[3] <= largest


@pytest.mark.parametrize("scale", FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_rounded_stays_as_it_is(scale, dtype):
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf] * 8, dtype=dtype)
    before = x.clone()
    for backend in ("eager", "fused"):
        rounded = quantize(x, f"float8_e4m3fn@32@{scale}", backend=backend)
        assert rounded.isnan().tolist() == before.isnan().tolist()
        assert torch.equal(x.nan_to_num(), before.nan_to_num())
        assert x.isnan().sum() == 8


@pytest.mark.parametrize("name", ["bfloat16", "hif8", "float8_e4m3fn@column@pow2", "mxfp8_e4m3"])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_a_nan_changes_no_memory_format(name, backend):
    x = torch.randn(3, 5, 6, 7, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x[1, 2, 3, 4] = math.nan
    rounded = quantize(x, name, backend=backend)
    assert rounded.is_contiguous(memory_format=torch.channels_last)
    assert rounded.isnan().sum() == 1


NAMES = {
    "float8_e4m3fn@32@e8m0": "mxfp8_e4m3",
    "float4_e2m1fn@16@float8_e4m3fn": "nvfp4",
    "fixed8.6s@tensor@e8m0": "bfp8",
    "fixed8.6s@row@e8m0": "bfp8_row",
    "fixed8.6s@32@e8m0": "mxint8",
    "float8_e4m3fn@tensor@float32": "float8_e4m3fn@tensor",
    "half@flat256": "fp16@flat256",
    "float8_e4m3fn@128x128@pow2": "float8_e4m3fn@128x128@pow2",
    "float8_e4m3fn@tensor@delayed1024recent+2": "float8_e4m3fn@tensor@delayed1024recent+2",
}


@pytest.mark.parametrize(("text", "name"), NAMES.items())
def test_one_format_has_one_name(text, name):
    fmt = format_named(text)
    assert fmt.name == name
    assert format_named(fmt.name) == fmt
    assert str(lp.rule_of(f"{text}:stochastic")) == f"{name}:stochastic"


WRONG = {
    "float8_e4m3fn@33y": ("group", None),
    "float8_e4m3fn@tensr": ("group", "tensor"),
    "float8_e4m3fn@0": ("group", None),
    "float8_e4m3fn@4096x8192": ("group", None),
    "float8_e4m3fn@32@e8m": ("scale", "e8m0"),
    "float8_e4m3fn@32@delayed": ("scale", None),
    "float8_e4m3fn@tensor@delayed0": ("scale", None),
    "float8_e4m3fn@row@delayed16": ("format", None),
    "fp8@32": ("format", "float8_e4m3fn"),
    "mxfp4@32": ("format", None),
    "float32@tensor": ("format", None),
    "fixed8.4@tensor": ("format", None),
    "float8@1@pow2@3": ("format", None),
}


@pytest.mark.parametrize(("text", "error"), WRONG.items())
def test_a_wrong_name_is_one_line(text, error):
    with pytest.raises(SettingError) as caught:
        format_named(text)
    assert (caught.value.setting, caught.value.nearest) == error
    assert len(str(caught.value).splitlines()) == 1


def test_a_format_of_ones_own_says_its_scale():
    e4m3 = format_named("float8_e4m3fn")
    assert BlockFormat("own", e4m3, "tensor", FLOAT32, "").scaling == Scaling("float32")
    assert BlockFormat("own", e4m3, 32, None, "").scaling == Scaling("e8m0")
    x = torch.from_numpy(random(16, 32))
    own = BlockFormat("own", e4m3, "8x16", Scaling("pow2"), "")
    assert torch.equal(quantize(x, own), quantize(x, "float8_e4m3fn@8x16@pow2"))
    scalings = [Scaling("e9m0"), Scaling("e9m0", history=4), Scaling("two_level"), Scaling("float32", e4m3)]
    scalings += [Scaling("delayed", history=history, margin=margin) for history, margin in ((0, 0), (1.5, 0), (4, -2))]
    wrong_fields = [{"block": "8x"}, {"scale": "pow2"}, {"scale": format_named("bfloat16")}]
    wrong_fields += [{"scale": scaling} for scaling in scalings]
    wrong_fields += [{"block": 8, "scale": Scaling("delayed", history=4)}]
    for wrong in wrong_fields:
        fields = {"name": "own", "element": e4m3, "block": 8, "scale": None, "source": ""} | wrong
        with pytest.raises(SettingError, match=f"own: {next(iter(wrong))}"):
            BlockFormat(**fields)
