"""What a number format is, and the kinds that are formulas. No torch here: `main.py --help` loads this file.

A format is frozen data; an engine (engines/) does the rounding. The table of formats is in formats.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from low_precision import p3109
from low_precision.errors import SettingError, nearest, shown
from low_precision.scales import Scaling

LARGEST_FLOAT32 = 2.0**127 * (2 - 2.0**-23)


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with subnormals, a sign bit unless unsigned, `exponent_bits` and `mantissa_bits`.

    Its finite values are n * smallest_subnormal for whole n below 2**(mantissa_bits + 1), and
    m * 2**(e - mantissa_bits) for whole m in [2**mantissa_bits, 2**(mantissa_bits + 1)), e >= 1 - bias, up to
    `largest`; and their negatives. All of them are float32 values too, or with more than 8 exponent_bits float64 ones,
    and then float64 tensors alone are rounded to it: SettingError for a format with others.
    A format of your own is one more Format. Its name is what is printed, so give it one that no other format has.
    """

    name: str
    exponent_bits: int  # 1 .. 11; 0: fixed point
    mantissa_bits: int  # 0 .. 23, the hidden bit not counted
    bias: int  # -126 .. 150 - mantissa_bits; with more than 8 exponent_bits .. 1075 - mantissa_bits
    largest: float  # the largest finite value
    has_infinity: bool
    has_nan: bool
    has_negative_zero: bool
    source: str
    twos_complement: bool = False  # whether one more negative value lies beyond -largest, as in fixed point
    signed: bool = True  # False: no value is negative, and what is becomes 0

    def __post_init__(self) -> None:
        check = functools.partial(check_field, "format", self)
        check("name", "a text", is_text)
        check("exponent_bits", "a whole number, 0 .. 11", lambda bits: is_whole(bits, 0, 11))
        check("mantissa_bits", "a whole number, 0 .. 23", lambda bits: is_whole(bits, 0, 23))
        carrier, last, limit = ("float32", 149, 128) if self.fits_float32 else ("float64", 1074, 1024)
        most = last + 1 - self.mantissa_bits  # the smallest spacing is a number of the carrier
        allowed = f"a whole number, -126 .. {most}: all values are {carrier} numbers"
        check("bias", allowed, lambda bias: is_whole(bias, -126, most))
        for name in ("has_infinity", "has_nan", "has_negative_zero", "twos_complement", "signed"):
            check(name, "True, False", lambda value: isinstance(value, bool))
        check("has_negative_zero", "False in an unsigned format", lambda there: self.signed or not there)
        beyond = (2**self.exponent_bits if self.exponent_bits else 2) - self.bias  # the exponent beyond its bits
        highest = math.ldexp(1 - 2.0 ** -(self.mantissa_bits + 1), min(beyond, limit))
        allowed = f"one of the format's values, {self.smallest_subnormal:.7g} .. {highest:.7g}"
        check("largest", allowed, lambda largest: self._is_value(largest, highest))
        allowed = "False, or one spacing for all values: largest below 2 * smallest_normal, and signed"
        check("twos_complement", allowed, lambda there: not there or (self.signed and self._has_one_spacing()))

    def _is_value(self, number: Any, highest: float) -> bool:
        """Whether it is one of the values above zero that the format has up to `highest`."""
        if isinstance(number, bool) or not isinstance(number, int | float):
            return False
        if not self.smallest_subnormal <= number <= highest:
            return False
        exponent = max(math.frexp(number)[1] - 1, 1 - self.bias)
        spacings = math.ldexp(number, self.mantissa_bits - exponent)
        return spacings == int(spacings)

    def _has_one_spacing(self) -> bool:
        return self.largest < 2 * self.smallest_normal and -self.lowest <= LARGEST_FLOAT32

    def __hash__(self) -> int:
        return hash(self.name)  # a dataclass's own, of all fields, took a tenth of rounding a small tensor

    def __str__(self) -> str:
        return self.name

    @property
    def lowest(self) -> float:
        """The most negative finite value; 0 of an unsigned format."""
        if not self.signed:
            return 0.0
        return -self.largest - (self.smallest_subnormal if self.twos_complement else 0.0)

    @property
    def bits(self) -> str:
        """Sign, exponent and mantissa bits, as in "1-5-2"; of fixed point, sign and all others."""
        sign = int(self.signed)
        if self.exponent_bits:
            return f"{sign}-{self.exponent_bits}-{self.mantissa_bits}"
        return f"{sign}-{self.mantissa_bits + 1}"

    @property
    def fits_float32(self) -> bool:
        """Whether all values are float32 numbers; else they are float64 ones, and only such tensors are rounded to it.

        Wider exponents than float32's are what makes the difference, so this looks at nothing else.
        """
        return self.exponent_bits <= 8

    @property
    def needs_float64(self) -> bool:
        """Whether engines round float32 numbers to it as float64 ones: the spacing of its smallest values is no normal
        number of float32, and they are not float32's own.
        """
        return self.bias > 127 - self.mantissa_bits and self.bias != 127

    @property
    def ends_odd(self) -> bool:
        """Whether the code of `largest` is odd: then rounding to odd does not go beyond it."""
        exponent = max(math.frexp(self.largest)[1] - 1, 1 - self.bias)
        if self.mantissa_bits == 0:  # the code is the exponent
            return (exponent + self.bias) % 2 == 1
        return math.ldexp(self.largest, self.mantissa_bits - exponent) % 2 == 1

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest value above zero, and the spacing of all values below 2 * smallest_normal."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def unit_roundoff(self) -> float:
        """The largest relative error of rounding to nearest in the normal range (Higham 2002, 2.1)."""
        return 2.0 ** -(self.mantissa_bits + 1)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def check_field(
    what: str, made: _Named, field: str, allowed: str, is_right: Callable[[Any], bool], known: tuple[str, ...] = ()
) -> None:
    """SettingError where the field is not right. known: the words among what is allowed."""
    value = getattr(made, field)
    if not is_right(value):
        near = nearest(value, known) if isinstance(value, str) else None
        name = f" {shown(made.name)}" if is_text(made.name) else ""
        text = str(value) if isinstance(value, Scaling) else shown(value, repr)
        raise SettingError(f"{what}{name}: {field}", text, allowed, near)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def ieee(name: str, exponent_bits: int, mantissa_bits: int, source: str) -> Format:
    """IEEE 754 conventions: the top exponent holds infinities and, where there is a mantissa, NaNs."""
    bias = 2 ** (exponent_bits - 1) - 1
    largest = 2.0**bias * (2 - 2.0**-mantissa_bits)
    return Format(name, exponent_bits, mantissa_bits, bias, largest, True, mantissa_bits > 0, True, source)


def finite(name: str, exponent_bits: int, mantissa_bits: int, source: str) -> Format:
    """No infinity and no NaN: the top exponent holds numbers."""
    bias = 2 ** (exponent_bits - 1) - 1
    largest = 2.0 ** (bias + 1) * (2 - 2.0**-mantissa_bits)
    return Format(name, exponent_bits, mantissa_bits, bias, largest, False, False, True, source)


def fixed(word: int, fraction: int, *, symmetric: bool, name: str, source: str) -> Format:
    """n * 2**-fraction for whole n of `word` bits in two's complement; symmetric: without the most negative one."""
    bias = 3 - word + fraction
    largest = (2 ** (word - 1) - 1) * 2.0**-fraction
    return Format(name, 0, word - 2, bias, largest, False, False, False, source, twos_complement=not symmetric)


def of_p3109(name: str, parts: p3109.Parts) -> Format:
    return Format(
        name,
        parts.exponent_bits,
        parts.precision - 1,
        parts.bias,
        parts.largest,
        parts.is_extended,
        True,
        False,
        f"{p3109.SOURCE}, {name}",
        signed=parts.is_signed,
    )
