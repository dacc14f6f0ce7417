"""Train in low precision: `python main.py --dataset boston --precision float8`.

Exit status: 0, a diverged run included; 1 for a failure on the way; 2 for a wrong argument; 130 and 143 when it is
interrupted (Ctrl-C) or terminated.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import signal
import sys
from dataclasses import fields
from typing import Any, NoReturn

import formats
from config import RECIPES, Config, ConfigError, flag, shown, with_recipe

GROUPS = {
    "data": "what is learned from",
    "training": "what learns, and how",
    "rounding": "what is rounded, and how",
    "records": "where the record goes",
}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """argparse's own complaints: a flag without its value, a value where none is taken."""
        name, _, what = message.removeprefix("argument ").partition(": ")
        if what == "expected one argument":
            kinds = {flag(f.name): f.metadata["kind"].allowed for f in fields(Config)}
            allowed = kinds.get(name, ", ".join(RECIPES))
            raise ConfigError(f"{name}: given nothing, allowed: {allowed} ({name}=VALUE where VALUE begins with -)")
        raise ConfigError(f"{name}: {what.replace('ignored explicit argument', 'given')}, allowed: no value")


def parser() -> Parser:
    """A flag for each field of Config; their values are checked there."""
    made = Parser(
        prog="main.py",
        description="Train a model while its numbers are rounded to a low-precision format; record what came of it.",
        epilog=f"Formats: {formats.FORMAT_NAMES}. Sites: {', '.join(formats.SITES)}.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: made.add_argument_group(f"{name}: {text}") for name, text in GROUPS.items()}
    for f in fields(Config):
        about = f.metadata
        text = f"{about['help']}. {about['kind'].allowed} [default: {about['default']}]".replace("%", "%%")
        action = "append" if f.name == "site" else "store"
        metavar = "SITE=FORMAT[:ROUNDING]" if f.name == "site" else f.name.upper()
        groups[about["group"]].add_argument(flag(f.name), action=action, metavar=metavar, help=text, dest=f.name)
    groups["rounding"].add_argument(
        "--recipe", metavar="RECIPE", help=f"a named set of flags; explicit ones win over it. {', '.join(RECIPES)}"
    )
    made.add_argument("--list-formats", action="store_true", help="print the table of formats and exit")
    made.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return made


def configure(argv: list[str]) -> tuple[Config | None, bool]:
    """The run that the arguments ask for, None for the table of formats; and whether to show tracebacks."""
    made = parser()
    given, unknown = made.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word, made._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise ConfigError(f"given {shown(word)}, allowed: a known flag ({hint})")
    settings: dict[str, Any] = vars(given)
    debug = settings.pop("debug", False)
    if settings.pop("list_formats", False):
        return None, debug
    recipe = settings.pop("recipe", None)
    merged = with_recipe(recipe, settings)
    try:
        return Config.make(**merged), debug
    except ConfigError as error:
        if str(error).partition(":")[0] in map(flag, merged.keys() - settings.keys()):
            raise ConfigError(f"{error}; --recipe {recipe} gives it") from None
        raise


def report(result: Any) -> str:
    """What is printed at the end: how it ended, the last metrics, where the record lies."""
    summary = result.summary
    ended = summary["status"]
    if ended == "diverged":
        ended = f"diverged: a loss at step {summary['diverged_step']} is not finite"
    lines = [
        f"{summary['name']}: {ended} ({summary['epochs']} epochs, {summary['steps']} steps, {summary['seconds']} s)"
    ]
    for name, value in summary.items():
        if name.startswith(("training_", "testing_")):
            lines.append(f"  {name:26} {value:.6g}")
    lines.append(f"record: {result.folder}")
    return "\n".join([*lines, *result.notes])


def _terminate(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(number)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        config, debug = configure(argv)
        if config is None:
            print(formats.table())
            return 0
        signal.signal(signal.SIGTERM, _terminate)
        import train  # torch: not before the arguments are right

        print(report(train.run(config, command=shlex.join(["python", "main.py", *argv]))))
        return 0
    except ConfigError as error:
        print(f"main.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except Exception as error:
        if debug:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        print(f"main.py: error: {said} (--debug shows where)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
