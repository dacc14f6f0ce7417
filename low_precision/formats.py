"""The table of formats, and those whose numbers share a scale. No torch here: `main.py --help` loads this file.

A format is frozen data; an engine (engines/) does the rounding. A new format is one row of `NAMED`.

Three kinds: floating point (`Format`), fixed point (a `Format` too: nothing but subnormals and the binade above them,
which have one spacing), and formats whose numbers share a scale block by block (`BlockFormat`).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from low_precision import p3109, tables
from low_precision.errors import SettingError, shown, wrong_type
from low_precision.format_names import NOTES, nearest_format
from low_precision.number_formats import (
    LARGEST_FLOAT32,
    check_field,
    finite,
    fixed,
    ieee,
    is_text,
    of_p3109,
)
from low_precision.number_formats import Format as Format
from low_precision.scales import (
    DELAYED,
    GROUP_NAMES,
    LINES,
    SCALE_NAMES,
    SCALES,
    TWO_LEVEL,
    Scaling,
    group_lines,
    group_named,
    group_sizes,
    is_group,
    scaling_named,
)
from low_precision.tables import Table as Table


@dataclass(frozen=True)
class BlockFormat:
    """Numbers of `element`, in groups that share a scale; the scale follows from the group's largest magnitude.

    name: what is printed; give a format of your own a name that no other format has.
    element: the Format or Table of a number once it is scaled, one that reaches 1, has no twos_complement, and whose
    values are float32 numbers. Beyond element.largest it saturates.
    block: which numbers share a scale. A whole number, 1 .. 2**24: so many along a dimension, the last block of a line
    shorter. "MxN": M of such lines, neighbours along the dimension before, by N along. "flatN": N of the tensor
    flattened. "tensor": all. "row", "column": all with one index in the first, in the second dimension.
    scale: how it is found: a Scaling; None for Scaling("e8m0"), a power of two; FLOAT32 for Scaling("float32"), amax /
    element.largest; another Format for two levels, as NVFP4 has them: the group's is a number of that format, the
    tensor's one of float32. blocks.py has the arithmetic.
    NaN does not count for amax and stays NaN; infinities count as the largest finite value of the tensor's type.
    SettingError for anything else. OCP's FP8 with one float32 scale for each tensor is

        BlockFormat("scaled_e4m3", format_named("float8_e4m3fn"), "tensor", FLOAT32, "")
    """

    name: str
    element: Format | Table
    block: int | str
    scale: Scaling | Format | None
    source: str
    has_infinity: bool = False  # always: a scale reaches everything finite

    def __post_init__(self) -> None:
        check = functools.partial(check_field, "block format", self)
        check("name", "a text", is_text)
        allowed = "a Format or a Table of float32 numbers that reaches 1, without twos_complement"
        check("element", allowed, _is_element)
        check("block", GROUP_NAMES, is_group, known=LINES)
        check("scale", "a Scaling, None for a power of two, or a Format", lambda s: s is None or _is_scale(s))
        reach = "a Format whose largest value times the element's is a float32 number"
        check("scale", reach, lambda _: self._largest_product() <= LARGEST_FLOAT32)
        one_line = "another one than quest and expand, which take groups of one line"
        check("scale", one_line, lambda _: self.scaling.kind not in ("quest", "expand") or group_lines(self.block) == 1)
        if self.scaling.kind == DELAYED:
            check("block", "tensor, of which a delayed scale is one", lambda block: block == "tensor")
        if isinstance(self.element, Table):
            check("scale", "one that asks for no digits of a Table", lambda _: self.scaling.kind != "e8m0_even")
        check("has_infinity", "False", lambda there: there is False)

    def _largest_product(self) -> float:
        return self.element.largest * (self.scale_format.largest if self.scale_format else 1.0)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def scaling(self) -> Scaling:
        """How the scale is found, in one word for all that `scale` may be."""
        if isinstance(self.scale, Scaling):
            return self.scale
        if self.scale is None:
            return Scaling("e8m0")
        return Scaling("float32") if self.scale == FLOAT32 else Scaling(TWO_LEVEL, self.scale)

    @property
    def scale_format(self) -> Format | None:
        """With two levels, the format of a group's scale."""
        element = self.scaling.element
        assert element is None or isinstance(element, Format)
        return element

    @functools.cached_property
    def sizes(self) -> tuple[int, int] | None:
        """How many lines a group has, and how many numbers of each; None where it is a row, a column or the tensor."""
        return group_sizes(self.block)

    @property
    def is_flat(self) -> bool:
        return isinstance(self.block, str) and self.block.startswith("flat")

    @property
    def bits(self) -> str:
        """Of an element, and how far its scale reaches."""
        return f"{self.element.bits} per {self.block}"


def _is_scale(value: Any) -> bool:
    if isinstance(value, Scaling):
        return value.is_known and (value.element is None or isinstance(value.element, Format))
    return isinstance(value, Format) and value.smallest_subnormal <= 1 <= value.largest


def _is_element(value: Any) -> bool:
    """With scales from 2**-127 to 2**127, an element that reaches 1 reaches all of float32."""
    if isinstance(value, Table):
        return value.largest >= 1
    if not isinstance(value, Format) or value.twos_complement or not value.fits_float32:
        return False
    return value.smallest_subnormal <= 1 <= value.largest


_OCP8 = "OCP 8-bit Floating Point Specification (OFP8) 1.0, table 1"
_OCPMX = "OCP Microscaling Formats (MX) 1.0, section 5.3"
_FNUZ = "Noune et al. 2022, arXiv:2206.02915; ml_dtypes"

FLOAT32 = ieee("float32", 8, 23, "IEEE 754-2019, table 3.5: no rounding at all, the baseline")

NAMED: dict[str, Format] = {
    f.name: f
    for f in (
        FLOAT32,
        finite("float8", 5, 2, "qtorch.FloatingPoint(exp=5, man=2), arXiv:1910.04540"),
        finite("float16", 6, 9, "qtorch.FloatingPoint(exp=6, man=9), arXiv:1910.04540"),
        ieee("fp16", 5, 10, "IEEE 754-2019, table 3.5, binary16"),
        ieee("bfloat16", 8, 7, "Kalamkar et al. 2019, arXiv:1905.12322"),
        ieee("tf32", 8, 10, "NVIDIA A100 Tensor Core GPU Architecture, 2020"),
        ieee("float8_e5m2", 5, 2, _OCP8),
        Format("float8_e4m3fn", 4, 3, 7, 448.0, False, True, True, _OCP8),
        Format("float8_e5m2fnuz", 5, 2, 16, 57344.0, False, True, False, _FNUZ),
        Format("float8_e4m3fnuz", 4, 3, 8, 240.0, False, True, False, _FNUZ),
        finite("float6_e3m2fn", 3, 2, _OCPMX),
        finite("float6_e2m3fn", 2, 3, _OCPMX),
        finite("float4_e2m1fn", 2, 1, _OCPMX),
    )
}
_INT8 = fixed(8, 6, symmetric=True, name="fixed8.6s", source=f"{_OCPMX}, INT8")
_NVFP4 = "NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149, as TransformerEngine computes it"

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
_GROUPED = "ELEMENT@GROUP[@SCALE]"
_ANY = (
    f"{_IEEE_LIKE}, {p3109.FORM} (IEEE P3109, 3<=K<=16), fixedW.F[s] (2<=W<=25, 0<=F<=126), intW (2<=W<=24),"
    f" {tables.FILE}FILE, bfpW[_row|_column] (2<=W<=24), {_GROUPED} (as float8_e4m3fn@128x128@pow2)"
)
_NOT_IEEE = {"float16": "float16 (qtorch's 1-6-9; IEEE half is fp16)"}
_NAMES = [_NOT_IEEE.get(name, name) for name in [*NAMED, *tables.NAMED, *BLOCKS, *ALIASES]]
FORMAT_NAMES = f"{', '.join(_NAMES)}, or {_ANY}"


AnyElement = Format | Table
AnyFormat = Format | Table | BlockFormat


def format_named(name: AnyFormat | str) -> AnyFormat:
    """The format of that name: a row of `NAMED`, `BLOCKS` or `tables.NAMED`, an alias, or one of any width.

    eXmY: IEEE-like, of X and Y bits. binaryKpP{s,u}{e,f}: IEEE P3109's. fixedW.F: fixed point of W bits, F of them (or
    more than all) behind the point; s: symmetric. intW: whole numbers of W bits, symmetric. table:FILE: the numbers in
    a text file. bfpW: W bits and one exponent for the tensor, for each row (index of the first dimension) or for each
    column (index of the second). ELEMENT@GROUP[@SCALE]: numbers of a format in groups that share a scale (float32
    unless given); what has a name of its own comes with that one. A format stands for itself. SettingError, with the
    nearest known name, for any other name, TypeError for another type.
    """
    if isinstance(name, str):
        # What a file says may change, so a name with one in it is looked up each time.
        return _format_named.__wrapped__(name) if name.startswith(tables.FILE) else _format_named(name)
    if isinstance(name, Format | Table | BlockFormat):
        return name
    near = _nearest(name) if shown(name).startswith("torch.") else None
    raise wrong_type("format", name, f"a Format, a Table, a BlockFormat, or a name: {FORMAT_NAMES}", near)


@functools.cache
def _format_named(name: str) -> AnyFormat:
    name = ALIASES.get(name, name)
    if name in NAMED or name in BLOCKS:
        return NAMED.get(name) or BLOCKS[name]
    number = "(0|[1-9][0-9]{0,2})"
    match = re.fullmatch(rf"e([2-8])m{number}", name)
    if match and int(match[2]) <= 23:
        return ieee(name, int(match[1]), int(match[2]), "IEEE 754-2019, 3.3, any other width")
    match = re.fullmatch(rf"fixed{number}\.{number}(s?)", name)
    if match and 2 <= int(match[1]) <= 25 and int(match[2]) <= 126:
        source = "qtorch.FixedPoint, arXiv:1910.04540; Gupta et al. 2015, arXiv:1502.02551"
        return fixed(int(match[1]), int(match[2]), symmetric=bool(match[3]), name=name, source=source)
    if (match := re.fullmatch(f"int{number}", name)) and 2 <= int(match[1]) <= 24:
        source = "whole numbers, as many on either side of 0"
        return fixed(int(match[1]), 0, symmetric=True, name=name, source=source)
    if parts := p3109.parts_of(name):
        return of_p3109(name, parts)
    match = re.fullmatch(rf"bfp{number}(_row|_column|)", name)
    if match and 2 <= int(match[1]) <= 24:
        return _block_floating_point(int(match[1]), match[2].removeprefix("_") or "tensor")
    if "@" not in name and (table := tables.named(name)):
        return table
    if "@" in name:
        return _grouped_named(name)
    near = _nearest(name)
    raise SettingError("format", shown(name), FORMAT_NAMES, near, NOTES.get(near or "", ""))


def _block_floating_point(word: int, block: str) -> BlockFormat:
    source = "qtorch.BlockFloatingPoint, arXiv:1910.04540"
    element = fixed(word, word - 2, symmetric=True, name=f"fixed{word}.{word - 2}s", source=source)
    return BlockFormat(f"bfp{word}" + f"_{block}" * (block != "tensor"), element, block, None, source)


def _grouped_named(name: str) -> BlockFormat:
    """The format of a name ELEMENT@GROUP[@SCALE]; one that has a name of its own is that one."""
    element_name, group, *scale = name.split("@")
    if len(scale) > 1:
        raise SettingError("format", shown(name), _GROUPED)
    element = _element_named(element_name)
    if not _is_element(element) or element == FLOAT32:
        raise SettingError("format", shown(name), f"{_GROUPED}, ELEMENT a format below float32 that reaches 1")
    block, scaling = group_named(group), scaling_named(scale[0] if scale else "float32", _scale_format_named)
    if scaling.kind == DELAYED and block != "tensor":
        raise SettingError("format", shown(name), f"{element}@tensor@{scaling}: a delayed scale is one for the tensor")
    parts = (element.name, block, scaling)
    if parts in (named := {(b.element.name, b.block, b.scaling): b for b in BLOCKS.values()}):
        return named[parts]
    word = element.mantissa_bits + 2 if isinstance(element, Format) else 0
    if scaling.kind == "e8m0" and block in LINES and element.name == f"fixed{word}.{word - 2}s":
        return _block_floating_point(word, str(block))
    name = f"{element}@{block}" + f"@{scaling}" * (scaling.kind != "float32")
    return BlockFormat(name, element, block, scaling, f"{element.source}; {SCALES.get(scaling.kind, scaling)}")


def _element_named(name: str) -> Format | Table:
    fmt = format_named(name)
    if isinstance(fmt, BlockFormat):
        raise SettingError("format", shown(name), f"a format without a scale of its own ({_GROUPED})")
    return fmt


def _scale_format_named(name: str) -> Format:
    fmt = _element_named(name)
    if not isinstance(fmt, Format):
        raise SettingError("format", shown(name), f"a format that is no table ({_GROUPED})")
    return fmt


def digest_of_file(format: AnyFormat) -> str | None:
    """Of the values that a format, or its element, has from a file: its name alone does not say which they are."""
    element = format.element if isinstance(format, BlockFormat) else format
    return element.digest if isinstance(element, Table) and element.name.startswith(tables.FILE) else None


def _nearest(name: object) -> str | None:
    return nearest_format(shown(name), [*NAMED, *BLOCKS, *tables.NAMED, *ALIASES])


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
        "intW            whole numbers of W bits, as many on either side of 0. 2<=W<=24",
        f"{p3109.FORM}  IEEE P3109 of K bits, P of precision, signed or unsigned, extended (inf) or finite. 3<=K<=16",
        *tables.listing(),
        "bfpW            block floating point: W bits, one exponent per tensor; bfpW_row, bfpW_column. 2<=W<=24",
    ]
    lines.append(
        f"{_GROUPED}: numbers of any format above in groups that share a scale, as float8_e4m3fn@128x128@pow2:"
    )
    lines += [f"  GROUP   {GROUP_NAMES}", f"  SCALE   {SCALE_NAMES} [default: float32]"]
    for b in BLOCKS.values():
        scale = "a power of two" if b.scaling.is_power else f"in {b.scaling}, and one in float32 per tensor"
        lines.append(f"{b.name:14}  {b.element.name}, each block of {b.block} with a scale: {scale}")
    return "\n".join(lines)
