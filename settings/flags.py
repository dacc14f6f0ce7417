"""The command line of main.py and sweep.py: a flag for each field of Config, and the command of a Config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from low_precision import formats
from low_precision.errors import nearest, shown
from low_precision.recipe import Recipe
from low_precision.rules import LINE_FORM, SITE_NAMES
from low_precision.transforms import FORM as TRANSFORM_FORM
from low_precision.tried import FORM as TRIED_FORM
from settings.config import Config, ConfigError, flag
from settings.kinds import SWITCH
from settings.recipes import NONE, RECIPES, settings_of, with_recipe

GROUPS = {
    "data": "what is learned from",
    "training": "what learns, and how",
    "rounding": "what is rounded, and how",
    "records": "where the record goes",
}
RESUMABLE = "the folder of a record"
REPEATABLE = ("site", "transform", "watch_also")  # the flags that may be given several times
TABLES = ("list_formats", "list_recipes")  # the flags that print a table instead of a run


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as a ConfigError."""

    def error(self, message: str) -> NoReturn:
        """argparse's own complaints: a flag without its value, a value where none is taken."""
        name, _, what = message.removeprefix("argument ").partition(": ")
        if what == "expected one argument":
            allowed = {flag(f.name): f.metadata["kind"].allowed for f in fields(Config)}
            allowed |= {"--recipe": ", ".join((*RECIPES, NONE)), "--resume": RESUMABLE}
            note = f" ({name}=VALUE where VALUE begins with -)"
            raise ConfigError(name, "nothing", allowed.get(name, "a value"), note=note)
        raise ConfigError(name, what.removeprefix("ignored explicit argument "), "no value")

    def values(self, argv: Sequence[str]) -> dict[str, Any]:
        """What the arguments set, by the names of the fields; ConfigError for a flag that is not known."""
        known, unknown = self.parse_known_args(argv)
        if unknown:
            word = unknown[0].partition("=")[0]
            near = nearest(word, self._option_string_actions)
            raise ConfigError(None, shown(word), "a known flag" + ("" if near else " (see --help)"), near)
        settings = vars(known)
        if {"steps", "epochs"} <= settings.keys():  # the default number of epochs, which Config would not notice
            text = f"none with --epochs {shown(settings['epochs'])}: one of them says how long"
            raise ConfigError("--steps", shown(settings["steps"]), text)
        return settings


def parser() -> Parser:
    """A flag for each field of Config, whose values are checked there, and the flags beside them."""
    made = Parser(
        prog="main.py",
        description="Train a model while its numbers are rounded to a low-precision format; record what came of it.",
        epilog=f"Formats: {formats.FORMAT_NAMES}. Sites: {SITE_NAMES}.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: made.add_argument_group(f"{name}: {text}") for name, text in GROUPS.items()}
    for f in fields(Config):
        if f.name == "recipe":  # of which the flag gives the rules too
            continue
        about = f.metadata
        if about["kind"] is SWITCH:
            groups[about["group"]].add_argument(flag(f.name), action="store_true", help=about["help"], dest=f.name)
            continue
        text = f"{about['help']}. {about['kind'].allowed} [default: {about['default']}]".replace("%", "%%")
        action = "append" if f.name in REPEATABLE else "store"
        metavar = {"site": LINE_FORM, "transform": TRANSFORM_FORM, "watch_also": TRIED_FORM}.get(f.name, f.name.upper())
        groups[about["group"]].add_argument(flag(f.name), action=action, metavar=metavar, help=text, dest=f.name)
    groups["rounding"].add_argument(
        "--recipe",
        metavar="RECIPE",
        help=f"rules of the field, see --list-recipes; explicit flags win over it. {', '.join((*RECIPES, NONE))}"
        " [default: none]",
    )
    groups["records"].add_argument(
        "--resume",
        metavar="FOLDER",
        help="go on with the unfinished run recorded there; its settings come from there, and flags that would change"
        f" its result are refused. {RESUMABLE}",
    )
    made.add_argument("--list-formats", action="store_true", help="print the table of formats and exit")
    made.add_argument("--list-recipes", action="store_true", help="print the recipes, each with its source, and exit")
    made.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return made


def config_of(flags: Sequence[str]) -> Config:
    """The run that these flags alone ask for, a recipe among them or not. ConfigError for what is none."""
    settings = parser().values(flags)
    for name in ("resume", "debug", *TABLES):
        if name in settings:
            raise ConfigError(flag(name), "it", "the flags of a run alone")
    return Config.make(**with_recipe(settings.pop("recipe", None), settings))


def flags_of(config: Config, without: Sequence[str] = ()) -> list[str]:
    """The flags that ask for this run: those that differ from their defaults, but for the fields `without`.

    config_of(flags_of(config)) == config, where a recipe has the rules that it had when the run was made.
    """
    words: list[str] = []
    recipe = None if "recipe" in without else RECIPES.get(config.recipe or "")
    defaults: dict[str, Any] = {f.name: f.default for f in fields(Config)}
    if recipe:  # else it was a row of another process, whose rules are all here
        defaults |= settings_of(recipe) | dict.fromkeys(REPEATABLE, ()) | {"recipe": None}
    for f in fields(Config):
        value = getattr(config, f.name)
        if f.name in REPEATABLE and recipe:
            value = _beside(recipe, f.name, value)
        if value == defaults[f.name] or f.name in without:
            continue
        if isinstance(value, bool):  # a switch, which is off by default
            words.append(flag(f.name))
            continue
        if f.name in REPEATABLE:
            texts = list(value)
        elif isinstance(value, tuple):
            texts = [",".join(map(str, value)) or "none"]
        else:
            texts = [str(value)]
        for text in texts:
            # argparse takes a value that begins with a minus sign only in this form.
            words += [f"{flag(f.name)}={text}"] if text.startswith("-") else [flag(f.name), text]
    return words


def _beside(recipe: Recipe, name: str, texts: tuple[str, ...]) -> tuple[str, ...]:
    """What has to be said beside a recipe so that a repeatable flag has these texts."""
    of_recipe = with_recipe(recipe, {}).get(name, ())
    if of_recipe and not texts:
        return (NONE,)  # no transform at all
    others = tuple(text for text in texts if text not in of_recipe)
    return others if with_recipe(recipe, {name: others} if others else {}).get(name, ()) == texts else texts
