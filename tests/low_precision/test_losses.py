"""What a rounding loses, against loops over single numbers in Python."""

import math

import numpy as np
import pytest
import torch

import low_precision as lp
from low_precision import losses
from low_precision.formats import format_named

# The element's largest, smallest normal and smallest number, from the tables of the standards.
E2M1 = {"largest": 6.0, "normal": 1.0}
E4M3 = {"largest": 448.0, "normal": 2.0**-6}
FLOAT8 = {"largest": 114688.0, "normal": 2.0**-14}  # 5 exponent bits, no infinity: 1.75 * 2**16


def numbers(*shape, spread=8.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(spread * torch.randn(shape, generator=generator))
    flat = x.view(-1)
    flat[::17] = 0.0
    return x


def by_hand(x, q, steps, largest, normal):
    """The row of numpy arrays: x before, q after, and what each one's element is multiplied by, all of one shape."""
    counts = dict.fromkeys(("flushed", "subnormal", "saturated", "not_finite"), 0)
    squares = errors = error = magnitudes = amax = 0.0
    exponents = {}
    for before, after, step in zip(x.ravel().tolist(), q.ravel().tolist(), steps.ravel().tolist(), strict=True):
        if not (math.isfinite(before) and math.isfinite(after)):
            counts["not_finite"] += 1
            continue
        counts["flushed"] += before != 0 and after == 0
        counts["subnormal"] += 0 < abs(after) / step < normal * (1 - 1e-6)
        counts["saturated"] += abs(before) / step > largest * (1 + 1e-6)
        squares, magnitudes = squares + before**2, magnitudes + abs(before)
        errors, error = errors + (after - before) ** 2, error + after - before
        amax = max(amax, abs(before))
        if before:
            place = math.frexp(before)[1] - 1
            exponents[place] = exponents.get(place, 0) + 1
    row = {name: count / x.size for name, count in counts.items()}
    row |= {"sqnr_db": 10 * math.log10(squares / errors), "bias": error / magnitudes, "amax": amax}
    return row | {"numbers": x.size}, exponents


def check(x, format, steps, largest, normal, dim=-1, rounding="nearest", scale=None):
    q = lp.quantize(x, format, rounding, key=5, dim=dim, scale=scale)
    row = losses.of_rounding(x, q, format_named(format), dim, scale).row()
    steps = np.broadcast_to(np.asarray(steps, dtype=np.float64), tuple(x.shape))
    wanted, exponents = by_hand(x.double().numpy(), q.double().numpy(), steps, largest, normal)
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    counts = row["exponents"]["counts"]
    assert {row["exponents"]["lowest"] + n: count for n, count in enumerate(counts) if count} == exponents
    return row


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward_zero"])
def test_a_format_without_scales(rounding):
    x = numbers(40, 60, spread=12.0)
    row = check(x, "float8", 1.0, **FLOAT8, rounding=rounding)
    assert min(row["flushed"], row["subnormal"], row["saturated"]) > 0.001
    assert "scale_min" not in row


def test_numbers_that_are_not_finite():
    x = numbers(30, 30)
    x[3, 4], x[5, 6], x[7, 8] = math.nan, math.inf, -math.inf
    assert check(x, "float8_e4m3fn", 1.0, **E4M3)["not_finite"] == 3 / 900


def test_subnormal_float32_numbers_have_their_exponents():
    x = torch.tensor([2.0**-149, 2.0**-130, 1.5 * 2.0**-127, 2.0**-126, 3.0, 0.0])
    row = losses.of_rounding(x, lp.quantize(x, "bfloat16"), format_named("bfloat16")).row()
    wanted = {-149: 1, -130: 1, -127: 1, -126: 1, 1: 1}
    assert {row["exponents"]["lowest"] + n: c for n, c in enumerate(row["exponents"]["counts"]) if c} == wanted


def test_a_layout_that_is_not_contiguous():
    x = numbers(4, 6, 5, 7, spread=12.0).contiguous(memory_format=torch.channels_last)
    check(x, "float8", 1.0, **FLOAT8)
    check(x[:, 1:4, ::2], "float8", 1.0, **FLOAT8)


def powers(x, size, exponent):
    """Of OCP's Microscaling, along the last dimension."""
    steps = np.ones(x.shape)
    for line, of_line in zip(x.reshape(-1, x.shape[-1]), steps.reshape(-1, x.shape[-1]), strict=True):
        for start in range(0, len(line), size):
            amax = np.abs(line[start : start + size]).max()
            of_line[start : start + size] = 2.0 ** (math.frexp(amax)[1] - 1 - exponent) if amax else 1.0
    return steps


def test_groups_under_a_power_of_two():
    x = numbers(12, 75, spread=3.0)  # the last group of a line is shorter
    row = check(x, "mxfp4", powers(x.double().numpy(), 32, 2), **E2M1)
    assert row["saturated"] > 0
    steps = powers(x.double().numpy(), 32, 2)
    assert (row["scale_min"], row["scale_max"]) == (steps.min(), steps.max())
    columns = x.T.contiguous()
    check(columns, "mxfp4", powers(x.double().numpy(), 32, 2).T, **E2M1, dim=0)


def test_two_levels():
    x = numbers(8, 64, spread=2.0)
    groups = np.abs(x.numpy()).reshape(8, 4, 16).max(2)
    encode = np.float32(6.0 * 448.0) / groups.max()
    decode = lp.quantize(torch.tensor(groups * (encode * np.float32(1 / 6))), "float8_e4m3fn").double().numpy()
    steps = np.repeat(decode * float(np.float32(1) / encode), 16, axis=1).reshape(8, 64)
    row = check(x, "nvfp4", steps, **E2M1)
    assert row["scale_max"] == pytest.approx(steps.max(), rel=1e-12)


def test_one_scale_for_a_tensor_a_row_and_a_tile():
    x = numbers(10, 40, spread=3.0)
    magnitudes = np.abs(x.double().numpy())
    row = check(x, "float8_e4m3fn@tensor@float32", magnitudes.max() / 448.0, **E4M3)
    assert row["saturated"] == 0
    assert row["scale_min"] == row["scale_max"]
    assert row["scale_max"] == pytest.approx(magnitudes.max() / 448.0, rel=1e-6)
    check(x, "float8_e4m3fn@row@float32", magnitudes.max(1, keepdims=True) / 448.0, **E4M3)
    tiles = np.repeat(np.repeat(magnitudes.reshape(2, 5, 5, 8).max((1, 3)), 5, 0), 8, 1)
    check(x, "float8_e4m3fn@5x8@float32", tiles / 448.0, **E4M3)


def test_a_delayed_scale():
    x = numbers(20, 20, spread=3.0)
    scale = torch.tensor(448.0 / (float(x.abs().max()) / 4))  # of a tensor that was smaller
    row = check(x, "float8_e4m3fn@tensor@delayed4", 1 / scale.double().numpy(), **E4M3, scale=scale)
    assert row["saturated"] > 0


def test_what_has_no_elements_is_not_counted():
    x = numbers(4, 128).abs()
    row = losses.of_rounding(x, lp.quantize(x, "float8_e4m3fn@128@expand"), format_named("float8_e4m3fn@128@expand"))
    assert (row.row()["subnormal"], row.row()["saturated"]) == (None, None)
    assert "scale_min" not in row.row()
    assert row.row()["sqnr_db"] > 20


def test_tables_and_fixed_point():
    x = numbers(30, 30, spread=1.0)
    check(x, "nf4", 1.0, largest=1.0, normal=0.0)
    q = lp.quantize(x, "fixed8.4")
    row = losses.of_rounding(x, q, format_named("fixed8.4")).row()
    assert row["saturated"] == float(((x > 127 / 16) | (x < -8)).double().mean())
    assert row["subnormal"] == 0


def test_two_parts_add_up():
    x, y = numbers(16, 32, spread=12.0), numbers(8, 32, spread=12.0, seed=1)
    format = format_named("float8")
    of_both = losses.of_rounding(torch.cat([x, y]), lp.quantize(torch.cat([x, y]), format), format).row()
    parts = [losses.of_rounding(z, lp.quantize(z, format), format) for z in (x, y)]
    summed = parts[0].plus(parts[1]).row()
    assert summed["exponents"] == of_both["exponents"]
    assert {n: v for n, v in summed.items() if n != "exponents"} == pytest.approx(
        {n: v for n, v in of_both.items() if n != "exponents"}, rel=1e-12
    )


def test_of_many_numbers_a_part_is_looked_at():
    x = torch.randn(1200, 1200, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 77.0  # amax is that of all
    x[600:] *= 4  # parts lie everywhere
    for name in ("float8", "mxfp4", "float8_e4m3fn@tensor", "float8_e4m3fn@row"):
        format = format_named(name)
        q = lp.quantize(x, format)
        row = losses.of_rounding(x, q, format).row()
        assert 2**16 * 0.8 < row["numbers"] <= 2**17  # whole lines
        assert row["amax"] == 77.0
        n = row["numbers"]
        share = float(((x != 0) & (q == 0)).double().mean())
        assert abs(row["flushed"] - share) <= 6 * math.sqrt(share * (1 - share) / n)
        noise = (q.double() - x.double()).square()
        # Decibels of a ratio of means: its standard error, 4.34 times the two relative ones.
        relative = [float(y.std() / y.mean()) / math.sqrt(n) for y in (x[1:].double().square(), noise[1:])]
        wanted = 10 * math.log10(float(x.double().square().sum() / noise.sum()))
        assert abs(row["sqnr_db"] - wanted) < 6 * 4.34 * math.hypot(*relative)
    y, wanted = lp.quantize(x, "mxfp4"), x
    error = losses.relative(losses.of_product(y, wanted))
    assert error == pytest.approx(float((y - wanted).norm() / wanted.norm()), rel=0.05)


def test_updates_and_products():
    exact = torch.tensor([0.5, 0.0, -0.25, 0.125]).double()
    arrived = torch.tensor([0.5, 0.0, 0.0, 0.25]).double()
    row = losses.update_row(losses.of_update(exact, arrived))
    assert (row["updates"], row["lost_updates"]) == (3, 1 / 3)
    assert row["arrived_norm"] == pytest.approx(math.sqrt((0.25 + 0.0625) / (0.25 + 0.0625 + 0.015625)))
    both = 0.25 + 0.125 * 0.25
    assert row["update_cosine"] == pytest.approx(both / math.sqrt(0.3125 * 0.328125))
    nothing = losses.update_row(losses.of_update(exact, 0 * arrived))
    assert nothing["update_cosine"] is None
    assert nothing["arrived_norm"] == 0.0
    assert losses.update_row(losses.of_update(0 * exact, arrived))["lost_updates"] is None
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    assert losses.relative(losses.of_product(a, b)) == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-5)
    assert losses.relative(losses.of_product(a, 0 * b)) is None


def test_a_group_whose_scale_became_zero():
    """Of two levels, where one group is so far below another that its scale is flushed: all of it is flushed too."""
    x = torch.cat([torch.full((16,), 1e-8), torch.full((16,), 100.0)])
    row = losses.of_rounding(x, lp.quantize(x, "nvfp4"), format_named("nvfp4")).row()
    assert (row["flushed"], row["subnormal"], row["saturated"], row["scale_min"]) == (0.5, 0.0, 0.0, 0.0)
    zeros = torch.zeros(3, 16)
    row = losses.of_rounding(zeros, lp.quantize(zeros, "nvfp4"), format_named("nvfp4")).row()
    assert (row["flushed"], row["subnormal"], row["saturated"], row["sqnr_db"], row["bias"]) == (0, 0, 0, None, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    x = numbers(20, 30, spread=12.0).to(dtype)
    check(x, "float8", 1.0, **FLOAT8)
    check(x, "float8_e4m3fn@row@e8m0", powers(x.double().numpy(), 30, 8), **E4M3)


def test_float64_numbers_whose_squares_are_beyond_float64():
    x = torch.tensor([1e200, -3e250, 1.0], dtype=torch.float64)
    row = losses.of_rounding(x, lp.quantize(x, "float8"), format_named("float8")).row()
    assert (row["saturated"], row["sqnr_db"], row["amax"]) == (2 / 3, None, 3e250)


def test_empty_tensors():
    for name in ("float8", "nvfp4", "float8_e4m3fn@row", "mxfp4"):
        x = torch.zeros(0, 4)
        row = losses.of_rounding(x, x, format_named(name)).row()
        assert (row["numbers"], row["flushed"], row["sqnr_db"]) == (0, 0, None)
