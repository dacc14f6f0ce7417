"""What a number format is, and how a number is rounded to it. No torch here: `main.py --help` loads this file.

A format is frozen data; an engine (kernels/) does the rounding. A new format is one row of `NAMED`.
"""

from __future__ import annotations

import difflib
import enum
import re
from dataclasses import dataclass

# Where a training step rounds, in the order in which one step passes them (README, "Sites").
SITES = ("weights", "inputs", "activations", "errors", "gradients", "momentum", "accumulator")


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with subnormals, 1 sign bit, `exponent_bits` and `mantissa_bits`.

    Its finite values are n * smallest_subnormal for whole n below 2**(mantissa_bits + 1), and
    m * 2**(e - mantissa_bits) for whole m in [2**mantissa_bits, 2**(mantissa_bits + 1)), e >= 1 - bias, up to
    `largest`; and their negatives. All of them are float32 values too.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int  # the hidden bit not counted
    bias: int
    largest: float  # the largest finite value
    has_infinity: bool
    has_nan: bool
    has_negative_zero: bool
    source: str

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> str:
        """Sign, exponent and mantissa bits, as in "1-5-2"."""
        return f"1-{self.exponent_bits}-{self.mantissa_bits}"

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


class Rounding(enum.Enum):
    """Which neighbour a value between two neighbours of the format becomes. A value of the format never moves."""

    NEAREST = "nearest"  # ties to the neighbour whose code is even (IEEE 754-2019, 4.3.1)
    NEAREST_AWAY = "nearest_away"  # ties to the larger in magnitude
    TOWARD_ZERO = "toward_zero"  # no ties: the smaller in magnitude
    UP = "up"  # no ties: the larger
    DOWN = "down"  # no ties: the smaller
    STOCHASTIC = "stochastic"  # x in (a, b) becomes b with probability (x - a) / (b - a) (Croci et al. 2022)


class Overflow(enum.Enum):
    """What a value beyond the largest finite one becomes."""

    SATURATE = "saturate"  # the largest finite value with its sign; infinities too
    INFINITY = "infinity"  # infinity, except where a directed rounding leads back to `largest` (IEEE 754-2019, 7.4)


@dataclass(frozen=True)
class Rule:
    """How one site is rounded."""

    format: Format
    rounding: Rounding

    def __str__(self) -> str:
        return self.format.name if self.format == FLOAT32 else f"{self.format.name}:{self.rounding.value}"


def _ieee(name: str, exponent_bits: int, mantissa_bits: int, source: str) -> Format:
    """IEEE 754 conventions: the top exponent holds infinities and, where there is a mantissa, NaNs."""
    bias = 2 ** (exponent_bits - 1) - 1
    largest = 2.0**bias * (2 - 2.0**-mantissa_bits)
    return Format(name, exponent_bits, mantissa_bits, bias, largest, True, mantissa_bits > 0, True, source)


def _finite(name: str, exponent_bits: int, mantissa_bits: int, source: str) -> Format:
    """No infinity and no NaN: the top exponent holds numbers."""
    bias = 2 ** (exponent_bits - 1) - 1
    largest = 2.0 ** (bias + 1) * (2 - 2.0**-mantissa_bits)
    return Format(name, exponent_bits, mantissa_bits, bias, largest, False, False, True, source)


_OCP8 = "OCP 8-bit Floating Point Specification (OFP8) 1.0, table 1"
_OCPMX = "OCP Microscaling Formats (MX) 1.0, section 5.3"
_FNUZ = "Noune et al. 2022, arXiv:2206.02915; ml_dtypes"

FLOAT32 = _ieee("float32", 8, 23, "IEEE 754-2019, table 3.5: no rounding at all, the baseline")

NAMED: dict[str, Format] = {
    f.name: f
    for f in (
        FLOAT32,
        _finite("float8", 5, 2, "qtorch.FloatingPoint(exp=5, man=2), arXiv:1910.04540"),
        _finite("float16", 6, 9, "qtorch.FloatingPoint(exp=6, man=9), arXiv:1910.04540"),
        _ieee("fp16", 5, 10, "IEEE 754-2019, table 3.5, binary16"),
        _ieee("bfloat16", 8, 7, "Kalamkar et al. 2019, arXiv:1905.12322"),
        _ieee("tf32", 8, 10, "NVIDIA A100 Tensor Core GPU Architecture, 2020"),
        _ieee("float8_e5m2", 5, 2, _OCP8),
        Format("float8_e4m3fn", 4, 3, 7, 448.0, False, True, True, _OCP8),
        Format("float8_e5m2fnuz", 5, 2, 16, 57344.0, False, True, False, _FNUZ),
        Format("float8_e4m3fnuz", 4, 3, 8, 240.0, False, True, False, _FNUZ),
        _finite("float6_e3m2fn", 3, 2, _OCPMX),
        _finite("float6_e2m3fn", 2, 3, _OCPMX),
        _finite("float4_e2m1fn", 2, 1, _OCPMX),
    )
}
ALIASES = {"half": "fp16"}
FORMAT_NAMES = f"{', '.join([*NAMED, *ALIASES])}, or eXmY (2<=X<=8, 0<=Y<=23)"


def format_named(name: str) -> Format:
    """The format of that name: a row of `NAMED`, an alias, or eXmY, the IEEE-like format of X and Y bits.

    ValueError, with the nearest known name, for any other.
    """
    name = ALIASES.get(name, name)
    if name in NAMED:
        return NAMED[name]
    match = re.fullmatch(r"e([2-8])m(0|[1-9]\d?)", name)
    if match and int(match[2]) <= 23:
        return _ieee(name, int(match[1]), int(match[2]), "IEEE 754-2019, 3.3, any other width")
    near = difflib.get_close_matches(name, [*NAMED, *ALIASES], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"no format {name!r}{hint}; allowed: {FORMAT_NAMES}")


def rule_of(spec: Rule | Format | str, rounding: Rounding | str = Rounding.NEAREST) -> Rule:
    """The rule that `spec` says: a rule, a format, or a text "FORMAT[:ROUNDING]"; `rounding` where it names none.

    ValueError for an unknown name, TypeError for another type.
    """
    if isinstance(spec, Rule):
        return spec
    if isinstance(spec, Format):
        return Rule(spec, Rounding(rounding))
    if not isinstance(spec, str):
        raise TypeError(f"given {spec!r}, allowed: FORMAT[:ROUNDING], a Format or a Rule")
    name, colon, own = spec.partition(":")
    if colon and own not in (known := [r.value for r in Rounding]):
        raise ValueError(f"no rounding {own!r}; allowed: {', '.join(known)}")
    return Rule(format_named(name), Rounding(own if colon else rounding))


def table() -> str:
    """The named formats, one a line: what `--list-formats` prints."""
    rows = [("format", "bits", "largest", "smallest normal", "smallest subnormal", "unit roundoff", "has")]
    for f in NAMED.values():
        has = [
            word for word, there in (("inf", f.has_infinity), ("nan", f.has_nan), ("-0", f.has_negative_zero)) if there
        ]
        numbers = (f.largest, f.smallest_normal, f.smallest_subnormal, f.unit_roundoff)
        rows.append((f.name, f.bits, *(f"{number:.7g}" for number in numbers), " ".join(has)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("eXmY (2<=X<=8, 0<=Y<=23): any other, IEEE-like (inf, nan, -0). half is fp16. float32 is not rounded.")
    return "\n".join(lines)
