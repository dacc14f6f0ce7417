"""What a number format is, and the table of formats. No torch here: `main.py --help` loads this file.

A format is frozen data; an engine (engines/) does the rounding. A new format is one row of `NAMED`.

Three kinds: floating point (`Format`), fixed point (a `Format` too: nothing but subnormals and the binade above them,
which have one spacing), and formats whose numbers share a scale block by block (`BlockFormat`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from low_precision.errors import SettingError, nearest, shown, wrong_type
from low_precision.format_names import NOTES, nearest_format

_LARGEST_FLOAT32 = 2.0**127 * (2 - 2.0**-23)
_LONGEST_BLOCK = 2**24  # a shorter line of a tensor is filled up to a whole block: memory


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with subnormals, 1 sign bit, `exponent_bits` and `mantissa_bits`.

    Its finite values are n * smallest_subnormal for whole n below 2**(mantissa_bits + 1), and
    m * 2**(e - mantissa_bits) for whole m in [2**mantissa_bits, 2**(mantissa_bits + 1)), e >= 1 - bias, up to
    `largest`; and their negatives. All of them are float32 values too: SettingError for a format with others.
    A format of your own is one more Format. Its name is what is printed, so give it one that no other format has.
    """

    name: str
    exponent_bits: int  # 1 .. 8; 0: fixed point
    mantissa_bits: int  # 0 .. 23, the hidden bit not counted
    bias: int  # -126 .. 127 - mantissa_bits, or 127, which is float32's
    largest: float  # the largest finite value
    has_infinity: bool
    has_nan: bool
    has_negative_zero: bool
    source: str
    twos_complement: bool = False  # whether one more negative value lies beyond -largest, as in fixed point

    def __post_init__(self) -> None:
        check = functools.partial(_check, "format", self)
        check("name", "a text", _is_text)
        check("exponent_bits", "a whole number, 0 .. 8", lambda bits: _is_whole(bits, 0, 8))
        check("mantissa_bits", "a whole number, 0 .. 23", lambda bits: _is_whole(bits, 0, 23))
        # A smaller spacing than 2**-126 is no normal number of float32; engines round to it by float32's own exponents.
        most = 127 - self.mantissa_bits
        allowed = f"a whole number, -126 .. {most}, or 127: all values are float32 numbers"
        check("bias", allowed, lambda bias: _is_whole(bias, -126, most) or _is_whole(bias, 127, 127))
        for name in ("has_infinity", "has_nan", "has_negative_zero", "twos_complement"):
            check(name, "True, False", lambda value: isinstance(value, bool))
        highest = 2.0 ** ((2**self.exponent_bits if self.exponent_bits else 2) - self.bias)  # what is beyond its bits
        highest = min(highest * (1 - 2.0 ** -(self.mantissa_bits + 1)), _LARGEST_FLOAT32)
        allowed = f"one of the format's values, {self.smallest_subnormal:.7g} .. {highest:.7g}"
        check("largest", allowed, lambda largest: self._is_value(largest, highest))
        allowed = "False, or one spacing for all values: largest below 2 * smallest_normal"
        check("twos_complement", allowed, lambda there: not there or self._has_one_spacing())

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
        return self.largest < 2 * self.smallest_normal and -self.lowest <= _LARGEST_FLOAT32

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

    name: what is printed; give a format of your own a name that no other format has.
    element: the Format of a number that is divided by its scale, one that reaches 1 and has no twos_complement. Beyond
    element.largest it saturates.
    block: which numbers share a scale. A whole number, 1 .. 2**24: so many along a dimension, the last block of a line
    shorter. "tensor": all. "row", "column": all with one index in the first, in the second dimension.
    scale: how a scale is held.
    - None, a power of two: 2**(floor(log2(amax)) - floor(log2(element.largest))), from 2**-127 to 2**127 (E8M0).
    - a Format: amax / element.largest, rounded to nearest in `scale`, times a power of two for the whole tensor, the
      smallest one for which no block's scale is beyond `scale.largest`.
    NaN does not count for amax and stays NaN; infinities count as the largest finite value of the tensor's type.
    SettingError for anything else. OCP's FP8 with one float32 scale for each tensor, an input of its layer, is

        BlockFormat("scaled_e4m3", format_named("float8_e4m3fn"), "tensor", format_named("float32"), "")
    """

    name: str
    element: Format
    block: int | str
    scale: Format | None
    source: str
    has_infinity: bool = False  # always: a scale reaches everything finite

    def __post_init__(self) -> None:
        check = functools.partial(_check, "block format", self)
        check("name", "a text", _is_text)
        check("element", "a Format that reaches 1, without twos_complement", _is_element)
        lines = ("tensor", "row", "column")
        check(
            "block",
            f"{', '.join(lines)}, or a whole number, 1 .. {_LONGEST_BLOCK}",
            lambda block: block in lines if isinstance(block, str) else _is_whole(block, 1, _LONGEST_BLOCK),
            known=lines,
        )
        check("scale", "None, for a power of two, or a Format", lambda s: s is None or isinstance(s, Format))
        check("has_infinity", "False", lambda there: there is False)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> str:
        """Of an element, and how far its scale reaches."""
        return f"{self.element.bits} per {self.block}"


def _check(
    what: str, made: AnyFormat, field: str, allowed: str, is_right: Callable[[Any], bool], known: tuple[str, ...] = ()
) -> None:
    """SettingError where the field is not right. known: the words among what is allowed."""
    value = getattr(made, field)
    if not is_right(value):
        near = nearest(value, known) if isinstance(value, str) else None
        name = f" {shown(made.name)}" if _is_text(made.name) else ""
        raise SettingError(f"{what}{name}: {field}", shown(value, repr), allowed, near)


def _is_element(value: Any) -> bool:
    """With scales from 2**-127 to 2**127, an element that reaches 1 reaches all of float32."""
    return isinstance(value, Format) and value.smallest_subnormal <= 1 <= value.largest and not value.twos_complement


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


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
_IEEE_LIKE = "eXmY (IEEE-like, 2<=X<=8, 0<=Y<=23; so e4m3 ends at 240: OCP's is float8_e4m3fn)"
_ANY = f"{_IEEE_LIKE}, fixedW.F[s] (2<=W<=25, 0<=F<=126), bfpW[_row|_column] (2<=W<=24)"
_NOT_IEEE = {"float16": "float16 (qtorch's 1-6-9; IEEE half is fp16)"}
FORMAT_NAMES = f"{', '.join(_NOT_IEEE.get(name, name) for name in [*NAMED, *BLOCKS, *ALIASES])}, or {_ANY}"


AnyFormat = Format | BlockFormat


def format_named(name: AnyFormat | str) -> AnyFormat:
    """The format of that name: a row of `NAMED` or `BLOCKS`, an alias, or one of any width.

    eXmY: IEEE-like, of X and Y bits. fixedW.F: fixed point of W bits, F of them (or more than all) behind the point; s:
    symmetric. bfpW: W bits and one exponent for the tensor, for each row (index of the first dimension) or for each
    column (index of the second). A format stands for itself. SettingError, with the nearest known name, for any other
    name, TypeError for another type.
    """
    if isinstance(name, str):
        return _format_named(name)
    if isinstance(name, Format | BlockFormat):
        return name
    near = _nearest(name) if shown(name).startswith("torch.") else None
    raise wrong_type("format", name, f"a Format, a BlockFormat, or a name: {FORMAT_NAMES}", near)


@functools.cache
def _format_named(name: str) -> AnyFormat:
    name = ALIASES.get(name, name)
    if name in NAMED or name in BLOCKS:
        return NAMED.get(name) or BLOCKS[name]
    number = "(0|[1-9][0-9]{0,2})"
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
    near = _nearest(name)
    raise SettingError("format", shown(name), FORMAT_NAMES, near, NOTES.get(near or "", ""))


def _nearest(name: object) -> str | None:
    return nearest_format(shown(name), [*NAMED, *BLOCKS, *ALIASES])


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
        "float32 is not rounded; half is fp16. float16 is qtorch's format, not IEEE half, which is fp16",
        "eXmY            any other floating point, IEEE-like (inf nan -0), 2<=X<=8, 0<=Y<=23. So e4m3 ends at 240:",
        "                OCP's E4M3, which ends at 448, is float8_e4m3fn; e5m2 has the numbers of float8_e5m2",
        "fixedW.F        fixed point: W bits, F behind the point; fixedW.Fs: symmetric. 2<=W<=25, 0<=F<=126",
        "bfpW            block floating point: W bits, one exponent per tensor; bfpW_row, bfpW_column. 2<=W<=24",
    ]
    for b in BLOCKS.values():
        scale = "a power of two" if b.scale is None else f"in {b.scale}, and a power of two per tensor"
        lines.append(f"{b.name:14}  {b.element.name}, each block of {b.block} with a scale: {scale}")
    return "\n".join(lines)
