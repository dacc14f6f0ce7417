"""Recipes: named sets of settings that people of the field know. A new one is a row of RECIPES."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from low_precision.errors import nearest
from settings.config import flag, refused


@dataclass(frozen=True)
class Recipe:
    """A named set of settings; explicit flags win over them. about: what is rounded where."""

    about: str
    source: str
    settings: dict[str, Any]


RECIPES = {
    "published": Recipe(
        "the model's output and its gradient alone, scalers fitted before the split",
        "the original experiments of this project",
        {"quantize": "activations,errors", "scale_on": "all"},
    ),
    "qtorch-tutorial": Recipe(
        "1-5-2 to nearest everywhere, momentum and an accumulator in 1-6-9 stochastically, loss scale 1000",
        "Wang et al. 2018, arXiv:1812.08011, as in QPyTorch's CIFAR10_Low_Precision_Training_Example.ipynb",
        {
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
    ),
    "ocp-fp8": Recipe(
        "E4M3 weights, inputs and activations, E5M2 errors and gradients, a float32 master copy of the weights; one"
        " loss scale in place of a scale for each tensor",
        "Micikevicius et al. 2022, arXiv:2209.05433",
        {
            "precision": "float8_e4m3fn",
            "rounding": "nearest",
            "quantize": "weights,inputs,activations",
            "site": ("errors=float8_e5m2", "gradients=float8_e5m2", "accumulator=float32"),
            "loss_scale": 1024.0,
        },
    ),
    "bfloat16": Recipe(
        "bfloat16 to nearest everywhere, without a master copy",
        "Zamirai et al. 2020, arXiv:2010.06192: its baseline, nearest rounding",
        {"precision": "bfloat16", "rounding": "nearest", "quantize": "all"},
    ),
    "bfloat16-stochastic": Recipe(
        "bfloat16 to nearest, the weights stochastically",
        "Zamirai et al. 2020, arXiv:2010.06192: stochastic rounding of the weight updates",
        {"precision": "bfloat16", "rounding": "nearest", "quantize": "all", "site": ("weights=bfloat16:stochastic",)},
    ),
    "bfloat16-kahan": Recipe(
        "bfloat16 to nearest everywhere, and what the weights' rounding cuts off is added to the next update",
        "Zamirai et al. 2020, arXiv:2010.06192: Kahan summation of the weight updates",
        {"precision": "bfloat16", "rounding": "nearest", "quantize": "all", "site": ("compensation=bfloat16",)},
    ),
    "swalp": Recipe(
        "8-bit block floating point, stochastically, everywhere, and the weights of the last half of the epochs"
        " averaged in float32",
        "Yang et al. 2019, arXiv:1904.11943",
        {
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
    ),
}


def table() -> str:
    """What `--list-recipes` prints."""
    lines = ["Explicit flags win over a recipe's."]
    for name, recipe in RECIPES.items():
        lines += ["", f"{name}: {recipe.about}", f"  {recipe.source}"]
        lines += [
            f"  {flag(key)} {shlex.quote(text)}" for key, value in recipe.settings.items() for text in _texts(value)
        ]
    return "\n".join(lines)


def _texts(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, tuple) else [str(value)]


def with_recipe(recipe: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's settings, with the explicit ones over them; of `site`, those for the same site.

    ConfigError for a recipe that does not exist.
    """
    if recipe is None:
        return dict(settings)
    if recipe not in RECIPES:
        raise refused("recipe", recipe, ", ".join(RECIPES), nearest(recipe, RECIPES))
    from_recipe = RECIPES[recipe].settings
    merged = {**from_recipe, **settings}
    if "site" in settings and "site" in from_recipe:
        explicit = [settings["site"]] if isinstance(settings["site"], str) else settings["site"]
        sites = {text.partition("=")[0] for text in explicit}
        kept = [text for text in from_recipe["site"] if text.partition("=")[0] not in sites]
        merged["site"] = (*kept, *explicit)
    return merged
