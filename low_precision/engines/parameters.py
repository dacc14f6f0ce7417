"""What an engine's inner loop has to know of a format and a rounding: whole numbers, the same for every engine."""

from __future__ import annotations

import struct
from functools import lru_cache

from low_precision.formats import FewBits, Format, Rounding

MODES = ("nearest", "nearest_away", "toward_zero", "up", "down", "stochastic", "few")  # Rounding's values, and FewBits


@lru_cache(maxsize=1024)
def parameters(fmt: Format, rounding: Rounding | FewBits) -> dict[str, int]:
    """By name. Magnitudes: the bits of a float32 without its sign. Masks: all 32 bits, or none.

    mode: a place in MODES. always, lowest_level, mantissa: as in eager.py. composed: whether the format's bias is
    float32's. fast_from: the smallest magnitude above zero from which on all values lose the same bits, 0 where none
    should be treated so. deep_below: below it, stochastic rounding takes more than one word. largest, lowest: the
    largest magnitude of a positive and of a negative number. signed_zero: a mask. few, half: FewBits.bits, and a mask
    for half_offset. exponents: what takes a block's exponent to its lowest level.
    """
    few = isinstance(rounding, FewBits)
    always, lowest_level = 23 - fmt.mantissa_bits, 127 - fmt.bias
    composed = fmt.bias == 127
    fast = fmt.has_negative_zero and 0 < fmt.mantissa_bits < 23
    deep = lowest_level + always - 30  # the scale from which on one word is enough
    return {
        "mode": MODES.index("few" if few else rounding.value),
        "always": always,
        "lowest_level": lowest_level,
        "mantissa": fmt.mantissa_bits,
        "composed": int(composed),
        "fast_from": (1 if composed else (lowest_level + 1) << 23) if fast else 0,
        "deep_below": (deep + 1) << 23 if deep > 0 else 0,
        "largest": bits(fmt.largest),
        "lowest": bits(-fmt.lowest),
        "signed_zero": 0xFFFFFFFF if fmt.has_negative_zero else 0,
        "few": rounding.bits if few else 0,
        "half": 0xFFFFFFFF if few and rounding.half_offset else 0,
        "exponents": fmt.bias + (bits(fmt.largest) >> 23) - 127,
    }


@lru_cache(maxsize=1024)
def wide_parameters(fmt: Format, rounding: Rounding | FewBits) -> dict[str, int]:
    """The same of float64 numbers and their bits, for engines/loops64.py."""
    few = isinstance(rounding, FewBits)
    return {
        "mode": MODES.index("few" if few else rounding.value),
        "always": 52 - fmt.mantissa_bits,
        "lowest_level": 1023 - fmt.bias,
        "mantissa": fmt.mantissa_bits,
        "largest": bits64(fmt.largest),
        "lowest": bits64(-fmt.lowest),
        "signed_zero": -1 if fmt.has_negative_zero else 0,
        "few": rounding.bits if few else 0,
        "half": -1 if few and rounding.half_offset else 0,
    }


def bits64(value: float) -> int:
    """Those of a float64 number."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def bits(value: float) -> int:
    """Those of a float32 number >= 0."""
    return struct.unpack("<I", struct.pack("<f", value))[0]
