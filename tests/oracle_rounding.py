"""Formats that share scales, told plainly in numpy: no code of ours, none of a peer's. One rounding an operation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from oracle_inputs import Array, as_bfloat16, from_groups, in_groups, matrices

_LARGEST = np.finfo(np.float32).max
_ELEMENTS = {  # exponent bits, mantissa bits, bias, largest value
    "float8_e4m3fn": (4, 3, 7, 448.0),
    "float8_e5m2": (5, 2, 15, 57344.0),
    "float6_e3m2fn": (3, 2, 3, 28.0),
    "float6_e2m3fn": (2, 3, 1, 7.5),
    "float4_e2m1fn": (2, 1, 1, 6.0),
}


class Told(NamedTuple):
    """Matrices of codes and values; scales, one for each group: what a number is multiplied by, or 1/s of powers."""

    codes: Array
    scales: Array
    values: Array


def magnitudes(element: str) -> Array:
    """Every value of the element that is not negative, by its code."""
    if element.startswith("int"):
        return np.arange(2.0 ** (int(element[3:]) - 1), dtype=np.float32)
    exponent_bits, mantissa_bits, bias, largest = _ELEMENTS[element]
    code = np.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
    fraction = np.where(exponent > 0, mantissa + 2**mantissa_bits, mantissa)
    value = np.ldexp(fraction.astype(np.float32), np.maximum(exponent, 1) - bias - mantissa_bits)
    return value[value <= largest]


def nearest(numbers: Array, element: str) -> Array:
    """The nearest value; of two, that with the even code; beyond the largest, the largest. The sign stays."""
    values = magnitudes(element)
    middles = (values[1:] + values[:-1]) / 2  # float32 numbers
    size = np.abs(numbers)
    code = np.searchsorted(middles, size)  # how many middles are smaller
    is_tie = np.append(middles, np.float32(np.inf))[code] == size
    rounded = np.copysign(values[code + (is_tie & (code % 2 == 1))], numbers)
    return rounded + np.float32(0) if element.startswith("int") else rounded  # whole numbers have one zero


@np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore")
def told(matrix: Array, rule: str) -> Told:
    """What becomes of a float32 matrix by the rule ELEMENT@GROUP@SCALE.

    A value beyond float32's largest, as 448 * 2**120 is, becomes that: peers that decode in float32 have an infinity.
    """
    element, group, scale = [*rule.split("@"), "float32"][:3]
    x = in_groups(matrix, group)
    amax = np.abs(x).max(1, keepdims=True)
    largest = magnitudes(element)[-1]
    if scale == "float8_e4m3fn":
        codes, s, values = _two_levels(x, amax)
    elif scale.startswith("e8m0"):
        s = np.ldexp(1.0, _power(amax, largest, scale).clip(-127, 127)).astype(np.float32)
        codes = nearest(x / s, element)  # exact, but for what is far below the element's smallest value
        values = codes * s
    else:
        s = _multiplier(x, amax, largest, scale)
        codes = nearest(x * s, element)
        values = codes / s
    values = values.clip(-_LARGEST, _LARGEST)
    return Told(from_groups(codes, matrix.shape, group), s.reshape(-1), from_groups(values, matrix.shape, group))


def _multiplier(x: Array, amax: Array, largest: np.float32, scale: str) -> Array:
    if scale == "headroom":
        return np.float32(0.75) * np.ldexp(np.float32(1), -_power(amax, largest, "e8m0").clip(-127, 127))
    if scale == "quest":
        return np.ldexp(np.float32(1), -_quest(x).clip(-127, 127))
    s = np.where(amax == 0, np.float32(1), np.minimum(largest / amax, _LARGEST))
    return (s.view(np.uint32) & 0xFF800000).view(np.float32) if scale == "pow2" else s


def _power(amax: Array, largest: np.float32, scale: str) -> np.ndarray:
    """The exponent of the scale; large and negative of zeros."""
    emax = int(np.frexp(largest)[1]) - 1
    if scale == "e8m0_rceil":
        mantissa, exponent = np.frexp(amax.astype(np.float64) / largest)
    elif scale == "e8m0_even":
        digits = {448.0: 3, 57344.0: 2, 28.0: 2, 7.5: 3, 6.0: 1}[float(largest)]
        half = np.ldexp(np.float64(1), np.frexp(amax)[1] - digits - 2)
        mantissa, exponent = np.frexp(amax + half)
    else:
        mantissa, exponent = np.frexp(amax.astype(np.float64))
    up = (mantissa > 0.5) if scale in ("e8m0_ceil", "e8m0_rceil") else np.zeros_like(mantissa, bool)
    power = exponent - 1 + up - (0 if scale == "e8m0_rceil" else emax)
    return np.where(amax == 0, -127, power)


def _quest(x: Array) -> np.ndarray:
    """The exponent of QuEST's scale of e2m1, a power of two below 2.92247856 / 6 deviations."""
    x = x.astype(np.float64)
    deviation = np.sqrt(np.maximum((x * x).mean(1, keepdims=True) - x.mean(1, keepdims=True) ** 2, 0))
    return np.floor(np.log2(deviation * (2.92247856 / 6) + 1e-8)).astype(np.int64)


def _two_levels(x: Array, amax: Array) -> tuple[Array, Array, Array]:
    """NVFP4, in the order of TransformerEngine's float32 operations."""
    s_enc = np.minimum(np.float32(2688) / amax.max(), _LARGEST)
    s_enc = np.float32(1) if amax.max() == 0 or s_enc == 0 else s_enc
    multiplier = np.float32(s_enc * (np.float32(1) / np.float32(6)))
    s = nearest(np.minimum(amax * multiplier, np.float32(448)), "float8_e4m3fn")
    s_dec = np.float32(1) / s_enc
    s_b = np.minimum(np.float32(1) / (s * s_dec), _LARGEST)
    codes = nearest(np.clip(x * s_b, np.float32(-6), np.float32(6)), "float4_e2m1fn")
    return codes, s, codes * s * s_dec


def as_kept(operand: Told, kind: str) -> tuple[Array, Array]:
    """Codes and scales as a peer keeps them. kind: "", "reciprocal" of scales, or "decoded" values without scales."""
    if kind == "decoded":
        return operand.values, np.ones_like(operand.scales)
    return operand.codes, np.float32(1) / operand.scales if kind == "reciprocal" else operand.scales


def differing(ours: tuple[Array, Array], theirs: tuple[Array, Array], group: str) -> tuple[int, int]:
    """Of how many numbers the codes differ, as bits, and how many scales; a group of zeros may have any."""
    codes = ours[0].view(np.uint32) != np.ascontiguousarray(theirs[0]).view(np.uint32)
    both_zero = ((in_groups(ours[0], group) == 0) & (in_groups(theirs[0], group) == 0)).all(1)
    scales = (ours[1].view(np.uint32) != np.ascontiguousarray(theirs[1]).view(np.uint32)) & ~both_zero
    return int(codes.sum()), int(scales.sum())


SIGNS = "+++-+------+-+--"
"""TransformerEngine's signs of the transform of NVFP4's wgrad, from its file reference_nvfp4.py."""


def hadamard(size: int) -> np.ndarray:
    """Sylvester's, of ones: float64."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


def transformed(matrix: Array) -> Array:
    """Each 16 numbers of a line times their signs and H / 4, added exactly, rounded to bfloat16 once."""
    signs = np.array([1.0 if sign == "+" else -1.0 for sign in SIGNS])
    exact = (matrix.astype(np.float64).reshape(-1, 16) @ (signs[:, None] * hadamard(16) / 4)).reshape(matrix.shape)
    return bfloat16_of(exact)


def bfloat16_of(x: np.ndarray) -> Array:
    """float64 numbers rounded to bfloat16's once: to float32 with an odd last bit first, where that is not exact."""
    with np.errstate(over="ignore"):
        single = x.astype(np.float32)
    bits = single.view(np.uint32)
    toward_zero = np.where(np.abs(single.astype(np.float64)) > np.abs(x), bits - 1, bits)
    return as_bfloat16(np.where(single == x, bits, toward_zero | 1).astype(np.uint32).view(np.float32))


def told_operand(tensors: dict[str, Array], site: str, rule: str, *, is_nvfp4: bool) -> Told:
    """An operand of a layer by a rule; is_nvfp4: of a layer in bfloat16, with the transform before wgrad."""
    if is_nvfp4:
        tensors = {name: as_bfloat16(tensor) for name, tensor in tensors.items()}
    matrix = matrices(tensors)[site]
    return told(transformed(matrix) if is_nvfp4 and site.startswith("wgrad") else matrix, rule)
