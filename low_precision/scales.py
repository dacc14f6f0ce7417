"""How a group of numbers finds the scale that they share: the words for it. blocks.py has the arithmetic.

In a format's name, ELEMENT@GROUP[@SCALE], GROUP says which numbers share a scale, and SCALE how it follows from them.
A new scale is a row of `SCALES` and a function in blocks.py. No torch here: `main.py --help` loads this file.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from low_precision.errors import SettingError, nearest, shown

SCALES = {  # what each does with s, by which a number is multiplied before it is rounded to the element
    "float32": "s = largest / amax in float32; the number is its element divided by s",
    "pow2": "that s, rounded down to a power of two",
    "e8m0": "a power of two, 1/s = 2**(floor(log2(amax)) - floor(log2(largest))): OCP Microscaling's",
    "e8m0_ceil": "the same with ceil(log2(amax))",
    "e8m0_rceil": "the smallest power of two 1/s that is not below amax / largest",
    "e8m0_even": "as e8m0, after amax is rounded to as many digits as the element has, ties upwards",
    "headroom": "3/4 of e8m0's s, so that no number saturates",
    "quest": "a power of two from the group's standard deviation, which saturates some: QuEST's",
    "expand": "each group is raised to a power first, so that it fills the element's range: COAT's",
}
POWERS = ("e8m0", "e8m0_ceil", "e8m0_rceil", "e8m0_even")  # a power of two, and every step exact
TWO_LEVEL, DELAYED = "two_level", "delayed"  # whose texts are an element's name, and delayedN[recent][+M]
SCALE_NAMES = f"{', '.join(SCALES)}, delayedN[recent][+M], or an element's name for a scale of its own format"

LINES = ("tensor", "row", "column")
LONGEST_BLOCK = 2**24  # a shorter line of a tensor is filled up to a whole block: memory
GROUP_NAMES = f"{', '.join(LINES)}, N, MxN or flatN (1 .. {LONGEST_BLOCK} numbers)"
_LONGEST_HISTORY, _LARGEST_MARGIN = 2**16, 32


class Named(Protocol):
    """A formats.Format, which this file cannot import: its name is all that is asked of it here."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Scaling:
    """How a scale follows from the numbers that share it. str() gives its text in a rule.

    kind: one of SCALES; "two_level": the group's scale is a number of the format `element`, and the tensor has a
    float32 scale besides (NVFP4); "delayed": from the largest of the last `history` steps, of the newest alone with
    `recent`, with a factor 2**-margin.
    """

    kind: str
    element: Named | None = None
    history: int = 0
    recent: bool = False
    margin: int = 0

    def __str__(self) -> str:
        if self.element is not None:
            return self.element.name
        if self.kind != DELAYED:
            return self.kind
        return f"delayed{self.history}{'recent' * self.recent}{f'+{self.margin}' * bool(self.margin)}"

    @property
    def is_known(self) -> bool:
        """Whether it is one of those kinds, with what that kind has and nothing besides."""
        if self.kind == DELAYED:
            is_whole = type(self.history) is int and type(self.recent) is bool and type(self.margin) is int
            is_in_range = is_whole and 1 <= self.history <= _LONGEST_HISTORY and 0 <= self.margin <= _LARGEST_MARGIN
            return is_in_range and self.element is None
        has_nothing = (self.history, self.recent, self.margin) == (0, False, 0)
        return has_nothing and self.kind in (SCALES if self.element is None else (TWO_LEVEL,))

    @functools.cached_property
    def is_power(self) -> bool:
        """Whether it is a power of two that is found and applied without any rounding, as in OCP's Microscaling."""
        return self.kind in POWERS


def scaling_named(text: str, element_named: Callable[[str], Named]) -> Scaling:
    """The scaling of that text; SettingError, with the nearest known word. element_named: of a scale's own format."""
    if text in SCALES:
        return Scaling(text)
    if text.startswith(DELAYED):
        match = re.fullmatch(r"delayed([1-9][0-9]{0,5})(recent)?(?:\+([1-9][0-9]?))?", text)
        if match and int(match[1]) <= _LONGEST_HISTORY and int(match[3] or 0) <= _LARGEST_MARGIN:
            return Scaling(DELAYED, history=int(match[1]), recent=bool(match[2]), margin=int(match[3] or 0))
        allowed = f"delayedN[recent][+M], N 1 .. {_LONGEST_HISTORY} steps, M 1 .. {_LARGEST_MARGIN}"
        raise SettingError("scale", shown(text), allowed)
    near = nearest(text, (*SCALES, "delayed16"))
    try:
        element = element_named(text)
    except SettingError as error:
        raise SettingError("scale", shown(text), SCALE_NAMES, near or error.nearest, error.note) from None
    return Scaling(TWO_LEVEL, element)


def group_named(text: str) -> int | str:
    """The group of that text, as BlockFormat.block has it; SettingError."""
    if is_group(block := int(text) if re.fullmatch("[1-9][0-9]{0,7}", text) else text):
        return block
    raise SettingError("group", shown(text), GROUP_NAMES, nearest(text, LINES))


def is_group(block: object) -> bool:
    """Whether BlockFormat.block may be that."""
    if isinstance(block, str):
        return block in LINES or _sizes(block) is not None
    return isinstance(block, int) and not isinstance(block, bool) and 1 <= block <= LONGEST_BLOCK


def group_sizes(block: int | str) -> tuple[int, int] | None:
    """Of N, MxN and flatN, how many lines a group has and how many numbers of each; None of a word of LINES."""
    return (1, block) if isinstance(block, int) else _sizes(block)


def group_lines(block: int | str) -> int:
    """How many lines a group has, a row, a column or the tensor being one."""
    sizes = group_sizes(block)
    return 1 if sizes is None else sizes[0]


@functools.cache
def _sizes(block: str) -> tuple[int, int] | None:
    number = "([1-9][0-9]{0,7})"
    if match := re.fullmatch(f"flat{number}", block):
        sizes = 1, int(match[1])
    elif match := re.fullmatch(f"{number}x{number}", block):
        sizes = int(match[1]), int(match[2])
    else:
        return None
    return sizes if sizes[0] * sizes[1] <= LONGEST_BLOCK else None
