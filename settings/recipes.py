"""Recipes as settings: the rules of the library's recipes, and the training flags that some of them set besides."""

from __future__ import annotations

import shlex
from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

from low_precision import recipes
from low_precision.errors import nearest
from low_precision.recipe import Recipe, wrapped
from low_precision.rules import OPERANDS, PRODUCTS, site_line
from low_precision.transforms import texts_of
from settings.config import RULES_FIELDS, Config, flag, refused
from settings.models import BLOCK_MODELS, HEADS

NONE = "none"  # --recipe none: no recipe

PUBLISHED = Recipe(
    "published",
    "the model's output and its gradient alone, scalers fitted before the split",
    "the original experiments of this project",
)
# All that --recipe names. Rows that are added to the library's table are here too.
RECIPES: Mapping[str, Recipe] = ChainMap({PUBLISHED.name: PUBLISHED}, recipes.RECIPES)

# What recipes set besides their rules, by the fields of Config; or, where rules are among it, in place of the row's own
# ones: these recipes are flags and nothing else, and their records are named DATASET-PRECISION-ROUNDING.
FLAGS: dict[str, dict[str, Any]] = {
    "published": {"quantize": "activations,errors", "scale_on": "all"},
    "qtorch-tutorial": {
        "precision": "float8",
        "rounding": "nearest",
        "quantize": "all",
        "site": ("momentum=float16:stochastic", "accumulator=float16:stochastic"),
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "loss_scale": 1000.0,
        "batch_size": 128,
    },
    "ocp-fp8": {
        "precision": "float8_e4m3fn",
        "rounding": "nearest",
        "quantize": "weights,inputs,activations",
        "site": ("errors=float8_e5m2", "gradients=float8_e5m2", "accumulator=float32"),
        "loss_scale": 1024.0,
    },
    "bfloat16": {"precision": "bfloat16", "rounding": "nearest", "quantize": "all"},
    "bfloat16-stochastic": {
        "precision": "bfloat16",
        "rounding": "nearest",
        "quantize": "all",
        "site": ("weights=bfloat16:stochastic",),
    },
    "bfloat16-kahan": {
        "precision": "bfloat16",
        "rounding": "nearest",
        "quantize": "all",
        "site": ("compensation=bfloat16",),
    },
    "collage-plus": {"precision": "bfloat16", "rounding": "nearest", "quantize": "all", "optimizer": "collage"},
    "swalp": {
        "precision": "bfp8_row",
        "rounding": "stochastic",
        "quantize": "all",
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch_size": 128,
        "average_last": 0.5,
    },
    "adam8bit": {"optimizer": "adam"},  # whose states it rounds
    "coat": {"optimizer": "adamw"},
}
_SHIPPED = dict(RECIPES)  # a row that somebody puts in the place of one of them has no flags of ours


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe sets, by the fields of Config: its rules as lines of --site, each with its rounding."""
    flags = FLAGS.get(recipe.name, {}) if _SHIPPED.get(recipe.name, recipe) == recipe else {}
    if flags.keys() & set(RULES_FIELDS):
        return dict(flags)
    settings: dict[str, Any] = {}
    if recipe.operands:
        settings["recipe"] = recipe.name
    if recipe.rules:
        settings["site"] = tuple(str(site_line(f"{site}={text}")) for site, text in recipe.rules.items())
    if recipe.transforms:
        settings["transform"] = tuple(f"{product}={text}" for product, text in recipe.transforms.items())
    for name in ("loss_scale", "smallest_state"):
        if (value := getattr(recipe, name)) != getattr(Config, name):
            settings[name] = value
    return settings | flags


def table() -> str:
    """What `--list-recipes` prints."""
    blocks = " and ".join(BLOCK_MODELS)
    text = (
        "Explicit flags win over a recipe's, one by one: of --site those for the same site, of --transform those for"
        f" the same product. In what stays wider, head and blocks are the names in {blocks}; {_heads()}. In a model of"
        " your own, they stand for its names. --recipe none is no recipe."
    )
    head = "\n".join(line.removeprefix("  ") for line in wrapped(text))
    return "\n\n".join([head, *map(described, RECIPES.values())])


def _heads() -> str:
    """What the last layer is called in the models in which it is not "head"."""
    by_name = {name: [model for model in HEADS if HEADS[model] == name] for name in HEADS.values() if name != "head"}
    return "the head is " + ", ".join(f"{name} in {' and '.join(models)}" for name, models in by_name.items())


def described(recipe: Recipe) -> str:
    """One recipe: its rules, their source, and the flags that it stands for. docs/recipes.md has these texts."""
    settings = settings_of(recipe)
    if recipe.operands:  # whose rules stand there already
        settings = {name: value for name, value in settings.items() if name not in ("recipe", "site", "transform")}
    return "\n".join([str(recipe), *(wrapped(f"flags: {' '.join(_words(settings))}") if settings else ())])


def operands_table() -> str:
    """docs/recipes.md's table of what each operand becomes, in Markdown."""
    head = ["recipe", *(f"`{site}`" for site in OPERANDS)]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for recipe in recipes.RECIPES.values():
        if recipe.operands:
            rules = recipe.by_operand
            cells = [_cell(rules.get(site), recipe.transforms.get(site.partition(".")[0])) for site in OPERANDS]
            rows.append(f"| `{recipe.name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(rule: str | None, transform: str | None) -> str:
    text = f"`{rule}`" if rule else "-"
    return f"{text} after `{transform}`" if transform and rule else text


def _words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a shell reads them."""
    pairs = [(name, text) for name, value in settings.items() for text in _texts(value)]
    return [f"{flag(name)} {shlex.quote(text)}" for name, text in pairs]


def _texts(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, tuple) else [str(value)]


def with_recipe(recipe: Recipe | str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's settings, with the explicit ones over them; of `site` and `transform`, those of one left side.

    None and "none" are no recipe. ConfigError for a recipe that does not exist.
    """
    if recipe is None or recipe == NONE:
        return dict(settings)
    if not isinstance(recipe, Recipe) and recipe not in RECIPES:
        raise refused("recipe", recipe, ", ".join((*RECIPES, NONE)), nearest(recipe, (*RECIPES, NONE)))
    from_recipe = settings_of(recipe if isinstance(recipe, Recipe) else RECIPES[recipe])
    merged = {**from_recipe, **settings}
    for name in ("site", "transform"):
        if name in settings and name in from_recipe:
            explicit = texts_of(settings[name]) if name == "transform" else _several(settings[name])
            merged[name] = (*_not_in(from_recipe[name], explicit), *explicit)
    return merged


def _several(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _not_in(texts: Iterable[str], explicit: Iterable[str]) -> list[str]:
    """The recipe's lines that none of the explicit ones stands over."""
    left = {text.partition("=")[0] if "=" in text else "" for text in explicit}
    left |= set(OPERANDS) if PRODUCTS in left else set()
    return [text for text in texts if text.partition("=")[0] not in left and "" not in left]
