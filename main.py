"""Train in low precision: `python main.py --dataset boston --precision float8`.

Exit status: 0, a diverged run included; 1 for a failure on the way; 2 for a wrong argument; 130, 143 and 129 when it is
interrupted (Ctrl-C), terminated, or left by its terminal.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from lab import console
from lab import record as track
from low_precision import formats
from settings import recipes
from settings.config import Config, ConfigError, flag, shown
from settings.recipes import RECIPES, with_recipe

GROUPS = {
    "data": "what is learned from",
    "training": "what learns, and how",
    "rounding": "what is rounded, and how",
    "records": "where the record goes",
}


RESUMABLE = "the folder of a record"


@dataclass(frozen=True)
class Options:
    """What the arguments ask for beside the run itself.

    resume: the folder of the record to go on with. table: what to print instead of a run.
    """

    debug: bool = False
    resume: Path | None = None
    table: Callable[[], str] | None = None


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """argparse's own complaints: a flag without its value, a value where none is taken."""
        name, _, what = message.removeprefix("argument ").partition(": ")
        if what == "expected one argument":
            kinds = {flag(f.name): f.metadata["kind"].allowed for f in fields(Config)}
            allowed = (kinds | {"--recipe": ", ".join(RECIPES), "--resume": RESUMABLE})[name]
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


def configure(argv: list[str]) -> tuple[Config | None, Options]:
    """The run that the arguments ask for, None where they ask for a table; and their options."""
    made = parser()
    given, unknown = made.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word, made._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise ConfigError(f"given {shown(word)}, allowed: a known flag ({hint})")
    settings: dict[str, Any] = vars(given)
    debug = settings.pop("debug", False)
    tables = {"list_formats": formats.table, "list_recipes": recipes.table}
    asked = [table for name, table in tables.items() if settings.pop(name, False)]
    if asked:
        return None, Options(debug, table=asked[0])
    recipe, resume = settings.pop("recipe", None), settings.pop("resume", None)
    merged = with_recipe(recipe, settings)
    try:
        if resume is not None:
            config, folder = _to_resume(resume, merged)
            return config, Options(debug, folder)
        return Config.make(**merged), Options(debug)
    except ConfigError as error:
        if str(error).partition(":")[0] in map(flag, merged.keys() - settings.keys()):
            raise ConfigError(f"{error}; --recipe {recipe} gives it") from None
        raise


def _to_resume(given: str, settings: dict[str, Any]) -> tuple[Config, Path]:
    """The run whose record `given` names, and the folder in which it lies.

    settings: explicit ones, over the recorded ones; ConfigError for those that would change the result.
    """
    folder, refused = Path(given), f"--resume: given {shown(given)}, allowed: {RESUMABLE}"
    if folder.is_symlink() or not folder.name:
        folder = folder.resolve()
    if not folder.is_dir():  # killed: it still has its name of while it ran
        found = track.unfinished(folder.parent, folder.name)
        if not found:
            going = [f"{path} is in use" for path in track.siblings(folder, "partial")]
            raise ConfigError(refused + (f" that no process writes to ({', '.join(going)})" if going else ""))
        folder = found[0][0]
    try:
        recorded = Config.from_json(track.read(folder / "config.json").decode())
    except FileNotFoundError:
        raise ConfigError(f"{refused} (there is no config.json in {folder})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{refused} ({folder / 'config.json'}: {error})") from None
    asked = Config.make(**asdict(recorded) | settings)
    if differences := asked.differences(recorded):
        own = "the run's own settings, and those that change no result"
        raise ConfigError(f"--resume: given {folder} and {'; '.join(differences)}; allowed: {own}")
    if "output_dir" in settings and os.path.abspath(asked.output_dir) != os.path.abspath(folder.parent):
        raise ConfigError(
            f"--output-dir: given {shown(asked.output_dir)}, allowed: {folder.parent}, where the record is"
        )
    return replace(asked, output_dir=str(folder.parent)), folder


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
        if name.startswith(("training_", "testing_", "averaged_")):
            lines.append(f"  {name:26} {value:.6g}")
    lines.append(f"record: {result.folder}")
    return "\n".join([*lines, *result.notes])


def _offer(config: Config) -> None:
    """A line about an unfinished run of this configuration."""
    for folder, epochs in track.unfinished(config.output_dir, config.folder_name)[:1]:
        if not epochs:
            return
        done = f"{epochs} of {config.epochs} epochs are in {folder}"
        command = f"python main.py --resume {shlex.quote(str(folder))}"
        console.say(f"unfinished before: {done}; to go on with it: {command}; this starts anew")


def _terminate(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(number)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    debug, first = "--debug" in argv, os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a folder's name may be no text
    try:
        config, options = configure(argv)
        debug, resume = options.debug, options.resume
        if config is None:
            print(options.table())
            return 0
        if resume and resume.name == config.folder_name and (ended := track.status(resume)) in track.REPLACING:
            print(f"{config.name}: {ended}, nothing is left to do\nrecord: {resume}")
            return 0
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:  # nohup
                signal.signal(getattr(signal, name), _terminate)
        if first and not resume:
            _offer(config)
        import train  # torch: not before the arguments are right

        result = train.run(config, shlex.join(["python", "main.py", *argv]), resume)
        if first:
            print(report(result))
        return 0
    except ConfigError as error:
        if first:
            console.say(f"main.py: error: {error}")
        return 2
    except KeyboardInterrupt as stop:
        where, *others = getattr(stop, "__notes__", ["before it began"])
        if first:
            console.say(*others, f"interrupted: {where}")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except Exception as error:
        if debug:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        where, *others = getattr(error, "__notes__", [""])
        console.say(*others, f"main.py: error: {said}{'; ' * bool(where)}{where} (--debug shows where)")
        return 1


if __name__ == "__main__":
    sys.exit(main())
