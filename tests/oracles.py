"""Independent ways to round: slow, exact, and sharing no code with the engines."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from low_precision.formats import Format
from low_precision.rounding import Rounding


def values(fmt: Format) -> list[float]:
    """Every finite value >= 0 of a small format, in order, by counting its codes."""
    met, code = [], 0
    while True:
        exponent, mantissa = divmod(code, 2**fmt.mantissa_bits)
        if exponent == 0:
            value = math.ldexp(mantissa, 1 - fmt.bias - fmt.mantissa_bits)
        else:
            value = math.ldexp(2**fmt.mantissa_bits + mantissa, exponent - fmt.bias - fmt.mantissa_bits)
        if value > fmt.largest:
            return met
        met.append(value)
        code += 1


def around(points: list[float]) -> np.ndarray:
    """These float32 values, their neighbours, midpoints and the midpoints' neighbours; all of them +-; specials."""
    points = np.array(points, dtype=np.float32)
    middles = ((points[1:].astype(np.float64) + points[:-1]) / 2).astype(np.float32)
    chosen = np.concatenate(
        [points, middles, np.float32([min(float(points[-1]) * by, 3e38) for by in (1.0625, 1.5, 1e9)])]
    )
    chosen = np.concatenate([chosen, np.nextafter(chosen, np.float32(0)), np.nextafter(chosen, np.float32(np.inf))])
    tiny = np.float32([1e-45, 2.9e-39, 1.1754944e-38, 1e-30, 1e-12])
    chosen = np.concatenate([chosen, tiny, np.float32([np.inf])])
    return np.concatenate([chosen, -chosen, np.float32([np.nan])])


def round_exactly(x: float, fmt: Format, rounding: Rounding) -> tuple[Fraction, Fraction, Fraction]:
    """(result, lower neighbour, upper neighbour) of a finite x, overflow not considered, in exact arithmetic."""
    exact = Fraction(x)
    if exact == 0:
        return exact, exact, exact
    exponent = max(math.frexp(x)[1] - 1, 1 - fmt.bias)
    last = Fraction(2) ** (exponent - fmt.mantissa_bits)
    below = math.floor(exact / last)
    if below * last == exact:
        return exact, exact, exact
    low, high = below * last, (below + 1) * last
    nearer_zero, farther = (low, high) if exact > 0 else (high, low)
    if rounding is Rounding.DOWN:
        result = low
    elif rounding is Rounding.UP:
        result = high
    elif rounding is Rounding.TOWARD_ZERO:
        result = nearer_zero
    elif rounding is Rounding.TO_ODD:
        code = round(abs(nearer_zero) / last)  # of the values with this exponent
        if fmt.mantissa_bits == 0 and code:
            code = exponent + fmt.bias
        result = nearer_zero if code % 2 == 1 else farther
    elif abs(exact - low) != abs(exact - high):
        result = low if exact - low < high - exact else high
    elif rounding is Rounding.NEAREST_AWAY:
        result = farther
    else:
        assert fmt.mantissa_bits > 0  # without a mantissa "even" is a matter of the code: gfloat's business
        result = low if below % 2 == 0 else high
    return result, low, high


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two float32 arrays agree: the same bits, or both NaN."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return (a.view(np.int32) == b.view(np.int32)) | (np.isnan(a) & np.isnan(b))


def index_of_word(word: int, parts: tuple[int, int, int]) -> int:
    """The index at which a key with these parts has that random word: noise.hash_words, a bijection, backwards."""

    def unshifted(x: int, shift: int) -> int:
        y = x
        for _ in range(32 // shift):
            y = x ^ (y >> shift)
        return y

    x = unshifted(word, 14)
    for factor, part, shift in ((0x31848BAB, parts[2], 15), (0xAC4C1B51, parts[1], 11), (0xED5AD4BB, parts[0], 17)):
        x = unshifted(x * pow(factor, -1, 2**32) % 2**32, shift) ^ part
    return x
