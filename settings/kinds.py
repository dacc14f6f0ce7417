"""What a setting may be: each kind takes a flag's text or a value. No torch here."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from data import DATASETS, FILE_FORMS, spec_of
from low_precision.errors import SettingError, nearest, shown
from low_precision.formats import FORMAT_NAMES, format_named
from low_precision.recipe import is_recipe_name
from low_precision.rounding import ROUNDING_NAMES, rounding_named
from low_precision.rules import (
    ALL_SITES,
    LINE_FORM,
    OPERANDS,
    PRODUCTS,
    SITES,
    check_site,
    in_order,
    is_site,
    site_line,
)
from low_precision.transforms import ALLOWED as transforms_allowed
from low_precision.transforms import product_transforms, texts_of, transforms_of
from low_precision.tried import ALLOWED as tried_allowed
from low_precision.tried import tried_named
from sources.named_file import FORMS, named_file


@dataclass(frozen=True)
class Kind:
    """What a setting may be.

    allowed: that in words. convert: takes a flag's text or a value, gives the value, or raises ValueError; a
    SettingError where it knows the nearest known word. One that names no setting may say more exactly than `allowed`
    what was wrong, and what is allowed there; else these are empty.
    """

    allowed: str
    convert: Callable[[Any], Any]


def whole(low: int, high: int | None = None) -> Kind:
    """A whole number from `low` on, up to `high` where there is such a limit."""

    def convert(value: Any) -> int:
        n = int(value) if isinstance(value, str) else value
        if isinstance(n, bool) or not isinstance(n, int) or n < low or (high and n > high):
            raise ValueError
        return n

    return Kind(f"a whole number >= {low}" if high is None else f"a whole number, {low} .. {high}", convert)


def number(allowed: str, inside: Callable[[float], bool]) -> Kind:
    """A finite number for which `inside` holds."""

    def convert(value: Any) -> float:
        if isinstance(value, bool):
            raise ValueError
        x = float(value)
        if not (math.isfinite(x) and inside(x)):
            raise ValueError
        return x

    return Kind(allowed, convert)


def one_of(*names: str) -> Kind:
    """One of these names."""
    allowed = ", ".join(names)

    def convert(value: Any) -> str:
        if value not in names:
            raise SettingError(None, shown(value), allowed, nearest(value, names))
        return value

    return Kind(allowed, convert)


def or_none(kind: Kind) -> Kind:
    """That, or None."""
    return Kind(kind.allowed, lambda value: None if value is None else kind.convert(value))


def text(value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def switch(value: Any) -> bool:
    """On or off."""
    known = {True: True, False: False, "true": True, "false": False, "True": True, "False": False}
    if isinstance(value, bool | str) and value in known:
        return known[value]
    raise ValueError


def dataset_name(value: Any) -> str:
    """A data set's name, or that of a file with one, its ~ expanded."""
    try:
        spec_of(text(value))
    except SettingError as error:
        raise SettingError(None, error.value, error.allowed, error.nearest) from None
    return value if value in DATASETS else os.path.expanduser(value)


def name_or_function(names: Iterable[str], table: tuple[str, str] | None = None) -> Kind:
    """One of these names, or FILE.py:FUNCTION, its ~ expanded.

    table: a module and a table in it, whose names are allowed too where the module is loaded: it needs torch.
    """
    allowed = ", ".join((*names, FORMS[".py"]))

    def convert(value: Any) -> str:
        if value in names:
            return value
        added = getattr(sys.modules.get(table[0]), table[1], {}) if table else {}
        if value in added:
            return value
        file = named_file(text(value))
        if file is None or file.suffix != ".py":
            more = "".join(f", {name}" for name in added if name not in names)
            raise SettingError(None, shown(value), allowed + more, nearest(value, (*names, *added)))
        return os.path.expanduser(value)

    return Kind(allowed, convert)


def betas(value: Any) -> tuple[float, float]:
    """Two numbers, from "0.9,0.95" or a sequence of them."""
    numbers = tuple(map(_BETA.convert, value.split(",") if isinstance(value, str) else value))
    if len(numbers) != 2:
        raise ValueError
    return numbers


def folder(value: Any) -> str:
    """A folder's path, its ~ expanded."""
    return os.path.expanduser(text(value))


def format_name(value: Any) -> str:
    """A format's name, of an alias that of its format."""
    return format_named(text(value)).name


def rounding_name(value: Any) -> str:
    """A rounding's name."""
    return str(rounding_named(text(value)))


def loss_scale(value: Any) -> float | str:
    """A factor, or "dynamic"."""
    if isinstance(value, str) and nearest(value, ("dynamic",)) and value != "dynamic":
        raise SettingError(None, "", "", "dynamic")
    return value if value == "dynamic" else FACTOR.convert(value)


def sites(value: Any) -> tuple[str, ...]:
    """The chosen sites in the order of a step, from "all", "none", "weights,errors" or a sequence of names."""
    if value in ("all", "none"):
        return ALL_SITES if value == "all" else ()
    chosen = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
    known = (*SITES, *OPERANDS, PRODUCTS, "all", "none")
    for name in chosen:
        if not is_site(name) and (near := nearest(name, known)) in ("all", "none"):
            raise SettingError(None, "", "", near)
        check_site(name)
    if len(set(chosen)) < len(chosen):
        raise ValueError
    names = [site for name in chosen for site in (OPERANDS if name == PRODUCTS else [name])]
    return tuple(in_order(set(names)))


def overrides(value: Any) -> tuple[str, ...]:
    """[PATTERN/]SITE=FORMAT[:ROUNDING], one or a sequence of them, each left side once.

    Patterns have no comma and no semicolon, which stand between the values of a sweep.
    """
    texts = (value,) if isinstance(value, str) else tuple(value)
    lines = [_one_of_several(text, site_line) for text in texts]
    left_sides = [line.left_side for line in lines]
    if twice := [left for number, left in enumerate(left_sides) if left in left_sides[:number]]:
        raise SettingError(None, "", "", note=f" ({twice[0]} stands there twice)")
    if marked := [line.left_side for line in lines if set(",;") & set(line.pattern or "")]:
        raise SettingError(None, "", "", note=f" (the pattern of {marked[0]} has a comma or a semicolon)")
    return texts


def tried(value: Any) -> tuple[str, ...]:
    """FORMAT[:ROUNDING] or recipe:NAME, one or a sequence of them, each once; one without a rounding gets nearest."""
    texts = tuple(map(tried_named, (value,) if isinstance(value, str) else value))
    if twice := [text for number, text in enumerate(texts) if text in texts[:number]]:
        raise SettingError(None, shown(value), "", note=f" ({twice[0]} stands there twice)")
    return texts


def transforms(value: Any) -> tuple[str, ...]:
    """[PRODUCT=]TRANSFORM, one or a sequence of them, each left side once; "none" and nothing else: none at all."""
    texts = texts_of(value)
    left_sides = [text.rpartition("=")[0] for text in texts if _one_of_several(text, product_transforms)]
    if twice := [left for number, left in enumerate(left_sides) if left in left_sides[:number]]:
        name = twice[0] or "one without a PRODUCT"
        raise SettingError(None, "", "", note=f" ({name} stands there twice)")
    return texts if transforms_of(texts) else ()


def _one_of_several(text: Any, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of one text of a flag that takes several; a SettingError says which one is wrong, and why."""
    try:
        return read(text)
    except SettingError as error:
        part = "" if error.setting in ("site", "transform") else f"{LINE_FORM} with the {error.setting} "
        raise SettingError(None, shown(text), f"{part}{error.allowed}", error.nearest, error.note) from None


def patterns(value: Any) -> tuple[str, ...]:
    """Name patterns, at least one, from "stage1.*,fc" or a sequence of them; none that no flag could name."""
    chosen = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
    if not chosen or any(not pattern or pattern != pattern.strip() or "," in pattern for pattern in chosen):
        raise ValueError
    return chosen


def recipe_name(value: Any) -> str:
    """A recipe's name, of one that is known today or of another one."""
    if not is_recipe_name(value):
        raise ValueError
    return str(value)


def interval(value: Any) -> str:
    """How often: "5" for epochs, "90s", "10m" or "2h"; see `epochs_or_seconds`."""
    epochs_or_seconds(str(value))
    return str(value)


def epochs_or_seconds(every: str) -> tuple[int | None, float | None]:
    """What an interval says: a number of epochs or one of seconds, the other None. ValueError for what is none."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smh]?)", every)
    if not match or float(match[1]) == 0 or ("." in match[1] and not match[2]):
        raise ValueError
    if not match[2]:
        return int(match[1]), None
    return None, float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


SEED = whole(0, 2**32 - 1)
# Up to 1e30: float32 ends at 3.4e38, and beyond it torch fails instead of diverging.
POSITIVE = number("a number > 0, up to 1e30", lambda x: 0 < x <= 1e30)
NOT_NEGATIVE = number("a number >= 0, up to 1e30", lambda x: 0 <= x <= 1e30)
_BETA = number("a number, 0 <= x < 1", lambda x: 0 <= x < 1)
BETAS = Kind("two numbers A,B, each 0 <= x < 1", betas)
FACTOR = number("a number, 1e-30 .. 1e30", lambda x: 1e-30 <= x <= 1e30)
DATASET = Kind(", ".join((*DATASETS, *FILE_FORMS)), dataset_name)
FORMAT = Kind(FORMAT_NAMES, format_name)
ROUNDING = Kind(ROUNDING_NAMES, rounding_name)
TRANSFORM = Kind(transforms_allowed, transforms)
TRIED = Kind(tried_allowed, tried)
SWITCH = Kind("true or false", switch)
FOLDER = Kind("a folder", folder)
NAME = Kind("a name", text)
RECIPE = Kind("a recipe's name", recipe_name)
