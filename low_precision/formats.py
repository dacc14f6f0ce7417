"""What a number format is, and the table of formats. No torch here: `main.py --help` loads this file.

A format is frozen data; an engine (engines/) does the rounding. A new format is one row of `NAMED`.

Three kinds: floating point (`Format`), fixed point (a `Format` too: nothing but subnormals and the binade above them,
which have one spacing), and formats whose numbers share a scale block by block (`BlockFormat`).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from low_precision.errors import SettingError, nearest, shown


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
    twos_complement: bool = False  # whether one more negative value lies beyond -largest, as in fixed point

    def __hash__(self) -> int:
        return hash(self.name)  # a dataclass's own, of all fields, took a tenth of rounding a small tensor

    def __str__(self) -> str:
        return self.name

    @property
    def lowest(self) -> float:
        """The most negative finite value."""
        return -self.largest - (self.smallest_subnormal if self.twos_complement else 0.0)

    @property
    def bits(self) -> str:
        """Sign, exponent and mantissa bits, as in "1-5-2"; of fixed point, sign and all others."""
        return f"1-{self.exponent_bits}-{self.mantissa_bits}" if self.exponent_bits else f"1-{self.mantissa_bits + 1}"

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


@dataclass(frozen=True)
class BlockFormat:
    """Numbers of `element`, each times the scale of its block; the scale follows from the block's largest magnitude.

    power of two: 2**(floor(log2(amax)) - floor(log2(element.largest))), from 2**-127 to 2**127 (E8M0).
    otherwise: amax / element.largest, rounded to nearest in `scale`, times a power of two for the whole tensor, the
    smallest one for which no block's scale is beyond `scale.largest`.
    NaN does not count for amax and stays NaN; infinities count as the largest finite value of the tensor's type.
    """

    name: str
    element: Format
    block: int | str  # so many along a dimension, the last block of a line shorter; or "tensor", "row", "column"
    scale: Format | None  # None: a power of two
    source: str
    has_infinity: bool = False

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> str:
        """Of an element, and how far its scale reaches."""
        return f"{self.element.bits} per {self.block}"


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


def _fixed(word: int, fraction: int, *, symmetric: bool, name: str, source: str) -> Format:
    """n * 2**-fraction for whole n of `word` bits in two's complement; symmetric: without the most negative one."""
    bias = 3 - word + fraction
    largest = (2 ** (word - 1) - 1) * 2.0**-fraction
    return Format(name, 0, word - 2, bias, largest, False, False, False, source, twos_complement=not symmetric)


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
_INT8 = _fixed(8, 6, symmetric=True, name="int8", source=f"{_OCPMX}, INT8")
_NVFP4 = "NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149; its tensor's scale a power of two"

BLOCKS: dict[str, BlockFormat] = {
    b.name: b
    for b in (
        BlockFormat("mxfp8_e4m3", NAMED["float8_e4m3fn"], 32, None, _OCPMX),
        BlockFormat("mxfp8_e5m2", NAMED["float8_e5m2"], 32, None, _OCPMX),
        BlockFormat("mxfp6_e3m2", NAMED["float6_e3m2fn"], 32, None, _OCPMX),
        BlockFormat("mxfp6_e2m3", NAMED["float6_e2m3fn"], 32, None, _OCPMX),
        BlockFormat("mxfp4", NAMED["float4_e2m1fn"], 32, None, _OCPMX),
        BlockFormat("mxint8", _INT8, 32, None, _OCPMX),
        BlockFormat("nvfp4", NAMED["float4_e2m1fn"], 16, NAMED["float8_e4m3fn"], _NVFP4),
    )
}
ALIASES = {"half": "fp16"}
_ANY = "eXmY (2<=X<=8, 0<=Y<=23), fixedW.F[s] (2<=W<=25, 0<=F<=126), bfpW[_row|_column] (2<=W<=24)"
FORMAT_NAMES = f"{', '.join([*NAMED, *BLOCKS, *ALIASES])}, or {_ANY}"


AnyFormat = Format | BlockFormat


@functools.cache
def format_named(name: str) -> AnyFormat:
    """The format of that name: a row of `NAMED` or `BLOCKS`, an alias, or one of any width.

    eXmY: IEEE-like, of X and Y bits. fixedW.F: fixed point of W bits, F of them (or more than all) behind the point; s:
    symmetric. bfpW: W bits and one exponent for the tensor, for each row (index of the first dimension) or for each
    column (index of the second). SettingError, with the nearest known name, for any other.
    """
    name = ALIASES.get(name, name)
    if name in NAMED or name in BLOCKS:
        return NAMED.get(name) or BLOCKS[name]
    number = r"(0|[1-9]\d{0,2})"
    match = re.fullmatch(rf"e([2-8])m{number}", name)
    if match and int(match[2]) <= 23:
        return _ieee(name, int(match[1]), int(match[2]), "IEEE 754-2019, 3.3, any other width")
    match = re.fullmatch(rf"fixed{number}\.{number}(s?)", name)
    if match and 2 <= int(match[1]) <= 25 and int(match[2]) <= 126:
        source = "qtorch.FixedPoint, arXiv:1910.04540; Gupta et al. 2015, arXiv:1502.02551"
        return _fixed(int(match[1]), int(match[2]), symmetric=bool(match[3]), name=name, source=source)
    match = re.fullmatch(rf"bfp{number}(_row|_column|)", name)
    if match and 2 <= int(match[1]) <= 24:
        word = int(match[1])
        source = "qtorch.BlockFloatingPoint, arXiv:1910.04540"
        element = _fixed(word, word - 2, symmetric=True, name=f"fixed{word}.{word - 2}s", source=source)
        return BlockFormat(name, element, match[2].removeprefix("_") or "tensor", None, source)
    raise SettingError("format", shown(name), FORMAT_NAMES, nearest(name, [*NAMED, *BLOCKS, *ALIASES]))


def table() -> str:
    """The named formats, one a line: what `--list-formats` prints."""
    rows: list[tuple[str, ...]] = [
        ("format", "bits", "largest", "smallest normal", "smallest subnormal", "unit roundoff", "has")
    ]
    for f in NAMED.values():
        has = [
            word for word, there in (("inf", f.has_infinity), ("nan", f.has_nan), ("-0", f.has_negative_zero)) if there
        ]
        numbers = (f.largest, f.smallest_normal, f.smallest_subnormal, f.unit_roundoff)
        rows.append((f.name, f.bits, *(f"{number:.7g}" for number in numbers), " ".join(has)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        "float32 is not rounded; half is fp16",
        "eXmY            any other floating point, IEEE-like (inf nan -0), 2<=X<=8, 0<=Y<=23",
        "fixedW.F        fixed point: W bits, F behind the point; fixedW.Fs: symmetric. 2<=W<=25, 0<=F<=126",
        "bfpW            block floating point: W bits, one exponent per tensor; bfpW_row, bfpW_column. 2<=W<=24",
    ]
    for b in BLOCKS.values():
        scale = "a power of two" if b.scale is None else f"in {b.scale}, and a power of two per tensor"
        lines.append(f"{b.name:14}  {b.element.name}, each block of {b.block} with a scale: {scale}")
    return "\n".join(lines)
