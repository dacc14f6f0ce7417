"""What is tried on the tensors of a run without being in use: its names. No torch here. what_if.py tries it."""

from __future__ import annotations

from low_precision.errors import SettingError, nearest, shown
from low_precision.recipe import Recipe
from low_precision.recipes import RECIPES
from low_precision.rules import rule_of

FORM = "FORMAT[:ROUNDING] or recipe:NAME"
ALLOWED = f"{FORM}, NAME one of {', '.join(RECIPES)}"
_RECIPE = "recipe:"


def tried_named(text: str) -> str:
    """The full name of what is tried: "FORMAT:ROUNDING" or "recipe:NAME". SettingError, ValueError for another type."""
    if not isinstance(text, str) or not text:
        raise ValueError
    recipe = recipe_tried(text)
    return str(rule_of(text)) if recipe is None else text


def recipe_tried(text: str) -> Recipe | None:
    """The recipe of that name; None for a rule. SettingError for a recipe that there is not."""
    if not text.startswith(_RECIPE):
        return None
    name = text.removeprefix(_RECIPE)
    if name not in RECIPES:
        near = nearest(name, RECIPES)
        raise SettingError("recipe", shown(text), ", ".join(RECIPES), near and f"{_RECIPE}{near}")
    return RECIPES[name]
