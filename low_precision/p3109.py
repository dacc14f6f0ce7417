"""IEEE P3109's formats by their names, binaryKpP{s,u}{e,f}, as formulas. No torch here.

K is the number of bits, P the precision (with the hidden bit). s, u: signed or unsigned; e, f: extended, with
infinities, or finite. There is one zero and one NaN. With P = 1 there are no subnormals: code c is 2**(c - bias).
Source: IEEE P3109, Interim Report on Binary Floating-point Formats for Machine Learning 4.0, 2026-06-26: a draft.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from low_precision.errors import SettingError, shown

SOURCE = "IEEE P3109, Interim Report 4.0 (a draft)"
FORM = "binaryKpP{s|u}{e|f}"
RANGES = "3<=K<=16, s: 0<P<K, at least K-11, u: 0<P<=K, at least K-10"
_LARGEST_BIAS = 1024  # beyond it, values are no float64 numbers


class Parts(NamedTuple):
    """What formats.Format needs to know of one of these formats."""

    exponent_bits: int
    precision: int
    bias: int
    largest: float
    is_extended: bool
    is_signed: bool


def parts_of(name: str) -> Parts | None:
    """Those of a name "binary8p3se"; None for other names. SettingError for one whose K and P do not go together, or
    whose values are no float64 numbers.
    """
    match = re.fullmatch("binary([1-9][0-9]?)p([1-9][0-9]?)([su])([ef])", name)
    if match is None:
        return None
    width, precision, is_signed, is_extended = int(match[1]), int(match[2]), match[3] == "s", match[4] == "e"
    bias = 2 ** (width - precision - is_signed) if precision + is_signed <= width else 0
    if not (3 <= width <= 16 and 0 < bias <= _LARGEST_BIAS):
        note = "; its values are no float64 numbers" if 3 <= width <= 16 and bias > _LARGEST_BIAS else ""
        raise SettingError("format", shown(name), f"{FORM} with {RANGES}", note=note)
    # Codes go up to the NaN of an unsigned format or to the sign bit of a signed one; the infinity is the one before.
    largest_code = 2 ** (width - is_signed) - 1 - (not is_signed) - is_extended
    exponent, mantissa = divmod(largest_code, 2 ** (precision - 1))
    significand = mantissa + 2 ** (precision - 1) * (exponent > 0)
    largest = math.ldexp(significand, max(exponent, 1) - bias - (precision - 1))
    return Parts(width - is_signed - (precision - 1), precision, bias, largest, is_extended, is_signed)


def elsewhere(letters: str) -> str | None:
    """Ours for other writings of a name, in small letters and digits alone: P3109's own, gfloat's p3109_k8p3se, and
    names without the last letters, which were those of signed and extended formats. None for other words.
    """
    match = re.fullmatch("(?:p3109k?|binary|p3109binary)([1-9][0-9]?)p([1-9][0-9]?)([su]?)([ef]?)", letters)
    if match is None:
        return None
    name = f"binary{match[1]}p{match[2]}{match[3] or 's'}{match[4] or 'e'}"
    try:
        return name if parts_of(name) else None
    except SettingError:
        return None
