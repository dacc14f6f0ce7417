"""Formats that are no more than a table: any sorted set of values. No torch here: `main.py --help` loads this file.

A named one is a row of `NAMED`; table:FILE reads one from a text file. engines/table.py rounds to them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from low_precision.errors import SettingError, shown, wrong_type

FILE = "table:"  # what the name of a table from a file begins with
_MOST_VALUES = 2**16
_LARGEST_FLOAT32 = 2.0**127 * (2 - 2.0**-23)


@dataclass(frozen=True)
class Table:
    """The numbers that are `values`, and no others.

    name: what is printed; give a table of your own a name that no other format has.
    values: in order, float32 numbers, 2 to 65,536 of them, each once. There is one zero, if any.
    first_code: the code of the lowest value; the next value has the next code. Ties go to even codes, and rounding to
    odd to odd ones.
    A NaN stays NaN, and what is beyond the ends becomes the end. SettingError for anything else.
    """

    name: str
    values: tuple[float, ...]
    source: str
    first_code: int = 0
    has_infinity: bool = False  # always

    def __post_init__(self) -> None:
        if not isinstance(self.values, tuple):
            raise wrong_type("table: values", self.values, "a tuple of numbers")
        if not (isinstance(self.name, str) and self.name):
            raise SettingError("table: name", shown(self.name, repr), "a text")
        name = f"table {shown(self.name)}"
        if not 2 <= len(self.values) <= _MOST_VALUES:
            raise SettingError(f"{name}: values", f"{len(self.values)} of them", f"2 .. {_MOST_VALUES} numbers")
        for value in self.values:
            if not _is_float32(value):
                raise SettingError(f"{name}: values", shown(value, repr), "finite float32 numbers")
        for low, high in itertools.pairwise(self.values):
            if not low < high:
                raise SettingError(f"{name}: values", f"{high!r} after {low!r}", "numbers in order, each once")
        code, most = self.first_code, _MOST_VALUES
        if isinstance(code, bool) or not isinstance(code, int) or not -most <= code <= most:
            raise SettingError(f"{name}: first_code", shown(code, repr), f"a whole number, -{most} .. {most}")
        if self.has_infinity is not False:
            raise SettingError(f"{name}: has_infinity", shown(self.has_infinity, repr), "False")
        object.__setattr__(self, "values", tuple(float(value) + 0.0 for value in self.values))  # no negative zero

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    @property
    def largest(self) -> float:
        return self.values[-1]

    @property
    def lowest(self) -> float:
        return self.values[0]

    @property
    def bits(self) -> str:
        """How many values there are: how many bits hold them is another question."""
        return f"{len(self.values)} values"

    @functools.cached_property
    def digest(self) -> str:
        """Of the values: what tells a table from another one of the same name, as a file of which may change."""
        return hashlib.blake2b(struct.pack(f"<{len(self.values)}f", *self.values), digest_size=8).hexdigest()


def _is_float32(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _LARGEST_FLOAT32 and _float32(value) == value  # no NaN


def _float32(value: float) -> float:
    """Rounded to float32, as one operation on such numbers is where `value` is its exact or correctly rounded result:
    double rounding does no harm there (Figueroa 1995).
    """
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


# Named tables

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _dynamic(signed: bool) -> list[float]:
    """8-bit Adam's values: in each of 7 decades the middles of equal cells between 0.1 and 1; 0, and 1.

    In float32, in the order of the operations that make bitsandbytes' table.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        cells = 2 ** (decade if signed else decade + 1)
        ends, power = _linspace(0.1, 1.0, cells + 1), _float32(10.0 ** (decade - 6))
        middles = [_float32(_float32(low + high) / 2) for low, high in itertools.pairwise(ends)]
        positive = [_float32(middle * power) for middle in middles]
        values += [*positive, *(-value for value in positive)] if signed else positive
    return sorted(values)


def _linspace(start: float, end: float, count: int) -> list[float]:
    """So many float32 numbers from start to end, as torch.linspace makes them: the first half from the start on, the
    second from the end back, a product and a sum rounded once.
    """
    start, end = _float32(start), _float32(end)
    step = _float32(_float32(end - start) / (count - 1))
    near_start = [_float32(start + step * place) for place in range(count // 2)]
    return [*near_start, *(_float32(end - step * (count - 1 - place)) for place in range(count // 2, count))]


def _posit(width: int) -> list[float]:
    """All values of a posit of that many bits with two exponent bits, but NaR."""
    positive = [_posit_value(code, width) for code in range(1, 2 ** (width - 1))]
    return [*(-value for value in reversed(positive)), 0.0, *positive]


def _posit_value(code: int, width: int) -> float:
    """The value of a positive posit's code: a run of equal bits, its end, two bits of exponent, the fraction; bits that
    there is no room for are zero.
    """
    bits = f"{code:0{width - 1}b}"
    run = len(bits) - len(bits.lstrip(bits[0]))
    regime = run - 1 if bits[0] == "1" else -run
    rest = bits[run + 1 :]
    exponent, fraction = rest[:2].ljust(2, "0"), rest[2:]
    significand = 1 + int(fraction, 2) / 2 ** len(fraction) if fraction else 1.0
    return math.ldexp(significand, 4 * regime + int(exponent, 2))


def _hif8() -> list[float]:
    """HiFloat8's finite values: the larger the exponent's magnitude, the more bits it takes from the mantissa; below
    them seven powers of two. 2**15 * 1.5 is its infinity.
    """
    positive = [2.0**exponent for exponent in range(-22, -15)]
    for exponent in range(-15, 16):
        digits = 3 if abs(exponent) < 4 else 2 if abs(exponent) < 8 else 1
        positive += [math.ldexp(2**digits + place, exponent - digits) for place in range(2**digits)]
    positive.remove(2.0**15 * 1.5)
    return [*(-value for value in reversed(positive)), 0.0, *positive]


class _Row(NamedTuple):
    make: Callable[[], tuple[float, ...] | list[float]]
    about: str
    source: str
    codes_from_zero: bool = False  # the code of zero is 0, and negative values have negative codes


_DETTMERS = "Dettmers et al. 2021, arXiv:2110.02861; bitsandbytes"
_POSIT = "Standard for Posit Arithmetic (2022)"
_HIF8 = "Luo et al. 2024, arXiv:2409.16626"
NAMED: dict[str, _Row] = {
    "nf4": _Row(
        lambda: _NF4,
        "QLoRA's NormalFloat, 16 values from -1 to 1",
        "Dettmers et al. 2023, arXiv:2305.14314; bitsandbytes",
    ),
    "dynamic8": _Row(lambda: _dynamic(True), "8-bit Adam's first moment, 256 values from -0.993 to 1", _DETTMERS),
    "dynamic8u": _Row(lambda: _dynamic(False), "8-bit Adam's second moment, 256 values from 0 to 1", _DETTMERS),
    "posit8_table": _Row(lambda: _posit(8), "posit8, 255 values to 2**24, rounded by value", _POSIT, True),
    "posit16_table": _Row(lambda: _posit(16), "posit16, 65,535 values to 2**56, rounded by value", _POSIT, True),
    "hif8": _Row(_hif8, "HiFloat8, finite values to 2**15, rounded by value", _HIF8, True),
}


def named(name: str) -> Table | None:
    """The table of that name, or of the file that a name table:FILE names; None for other names.

    FILE: numbers with white space between them, in any order; # begins a comment. SettingError for a file that cannot
    be read, or holds anything else. It is read once, and again when it has changed.
    """
    if name in NAMED:
        return _made(name)
    if not name.startswith(FILE):
        return None
    path = name.removeprefix(FILE)
    if not path or set(path) & set(":@,;"):
        raise SettingError("format", shown(name), f"{FILE}FILE, a path without : @ , ;")
    try:
        about = os.stat(path)
        return _read(name, path, about.st_mtime_ns, about.st_size)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, SettingError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no text"
        raise SettingError("format", shown(name), f"{FILE}FILE, a text file of numbers", note=f" ({reason})") from None


@functools.cache
def _made(name: str) -> Table:
    row = NAMED[name]
    values = tuple(row.make())
    return Table(name, values, row.source, -values.index(0.0) if row.codes_from_zero else 0)


@functools.lru_cache(maxsize=64)
def _read(name: str, path: str, changed: int, size: int) -> Table:
    """changed, size: of the file, so that another content is another table."""
    allowed = f"{FILE}FILE, a text file of 2 .. {_MOST_VALUES} finite numbers"
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    numbers = set()
    for place, line in enumerate(lines, 1):
        for word in line.partition("#")[0].split():
            number = _number(word)
            if number is None:
                note = f" (line {place} has {shown(word)}, which is no float32 number)"
                raise SettingError("format", shown(name), allowed, note=note)
            numbers.add(number)
    if not 2 <= len(numbers) <= _MOST_VALUES:
        raise SettingError("format", shown(name), allowed, note=f" (it has {len(numbers)})")
    return Table(name, tuple(sorted(numbers)), f"the file {path}")


def _number(word: str) -> float | None:
    """The float32 number nearest to the one that is written; None for what is none, or beyond float32."""
    try:
        number = float(word)
        return _float32(number) + 0.0 if math.isfinite(number) else None
    except (ValueError, OverflowError):
        return None


def listing() -> list[str]:
    """The named tables and how to name a file, one a line, for `--list-formats`."""
    lines = [f"{name:14}  a table: {row.about}" for name, row in NAMED.items()]
    return [*lines, f"{FILE}FILE      the numbers in a text file, white space between them, # begins a comment"]
