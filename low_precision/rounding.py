"""How a number is rounded to a format: which neighbour it becomes, and what becomes of one beyond the largest value.

No torch here: `main.py --help` loads this file.
"""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass

from low_precision.errors import SettingError, nearest, shown, wrong_type


class Rounding(enum.Enum):
    """Which neighbour a value between two neighbours of the format becomes. A value of the format never moves."""

    NEAREST = "nearest"  # ties to the neighbour whose code is even (IEEE 754-2019, 4.3.1)
    NEAREST_AWAY = "nearest_away"  # ties to the larger in magnitude
    TOWARD_ZERO = "toward_zero"  # no ties: the smaller in magnitude
    UP = "up"  # no ties: the larger
    DOWN = "down"  # no ties: the smaller
    TO_ODD = "to_odd"  # no ties: the neighbour whose code is odd (P3109; Boldo and Melquiond 2008)
    STOCHASTIC = "stochastic"  # x in (a, b) becomes b with probability (x - a) / (b - a) (Croci et al. 2022)

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class FewBits:
    """Stochastic rounding with `bits` random bits r: up where (x - a) / (b - a) + r * 2**-bits >= 1, in magnitudes.

    So the probability is a multiple of 2**-bits, cut off: on average 2**-(bits + 1) of a gap toward zero. With
    `half_offset`, r + 1/2 stands for r: the probability is rounded to the nearest multiple, and the average error is 0
    (Fitzgibbon and Felix 2025, arXiv:2504.20634; El Arar et al. 2024, arXiv:2408.03069). With `even`, the fraction
    (x - a) / (b - a) is first rounded to the nearest multiple, ties to the even one. P3109 calls the three StochasticA,
    B and C.
    """

    bits: int
    half_offset: bool = False
    even: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= FEW_BITS:
            raise SettingError("random bits", shown(self.bits, repr), f"a whole number, 1 .. {FEW_BITS}")
        if not isinstance(self.half_offset, bool):
            raise SettingError("half_offset", shown(self.half_offset, repr), "True, False")
        if not isinstance(self.even, bool) or (self.even and self.half_offset):
            raise SettingError("even", shown(self.even, repr), "True, False; without half_offset")

    def __str__(self) -> str:
        return f"stochastic:{self.bits}" + (":half" if self.half_offset else ":even" if self.even else "")


AnyRounding = Rounding | FewBits
FEW_BITS = 23  # the most random bits that `stochastic:R` takes: a float32 has no more digits to compare them with
ROUNDING_NAMES = (
    f"{', '.join(mode.value for mode in Rounding)}, or stochastic:R[:half|:even] (1<=R<={FEW_BITS} random bits)"
)


def is_random(rounding: AnyRounding) -> bool:
    """Whether this rounding takes random bits."""
    return rounding is Rounding.STOCHASTIC or isinstance(rounding, FewBits)


def rounding_named(name: AnyRounding | str) -> AnyRounding:
    """The rounding of that name: a value of `Rounding`, or stochastic:R[:half|:even]; what `str()` of it gives.

    A rounding stands for itself. SettingError for any other name, TypeError for another type.
    """
    if isinstance(name, str):
        return _rounding_named(name)
    if isinstance(name, Rounding | FewBits):
        return name
    raise wrong_type("rounding", name, f"{ROUNDING_NAMES}; a Rounding, or FewBits")


@functools.cache
def _rounding_named(name: str) -> AnyRounding:
    match = re.fullmatch(r"stochastic:([1-9][0-9]?)(:half|:even)?", name)
    if match and int(match[1]) <= FEW_BITS:
        return FewBits(int(match[1]), match[2] == ":half", match[2] == ":even")
    known = [mode.value for mode in Rounding]
    if name not in known:
        raise SettingError("rounding", shown(name), ROUNDING_NAMES, nearest(name, known))
    return Rounding(name)


class Overflow(enum.Enum):
    """What a value beyond the largest finite one becomes. P3109 calls them SatFinite, SatPropagate and SatNone."""

    SATURATE = "saturate"  # the largest finite value with its sign; infinities too
    PROPAGATE = "propagate"  # that; but infinities stay, in a format that has them
    # Infinity, except where a directed rounding leads back to `largest` (IEEE 754-2019, 7.4), or one to odd, as P3109
    # has it, where the code of `largest` is odd. In an unsigned format, NaN below zero.
    INFINITY = "infinity"


def overflow_named(name: Overflow | str) -> Overflow:
    """The member of `Overflow` with that value; a member stands for itself.

    SettingError for any other name, TypeError for another type.
    """
    if isinstance(name, Overflow):
        return name
    known = [overflow.value for overflow in Overflow]
    if not isinstance(name, str):
        raise wrong_type("overflow", name, f"{', '.join(known)}; an Overflow")
    if name not in known:
        raise SettingError("overflow", shown(name), ", ".join(known), nearest(name, known))
    return Overflow(name)
