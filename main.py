"""Train in low precision: `python main.py --dataset boston --precision float8`.

Exit status: 0, a diverged run included; 1 for a failure on the way; 2 for a wrong argument; 130, 143 and 129 when it is
interrupted (Ctrl-C), terminated, or left by its terminal.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lab.console import command, in_a_line, say, warnings_in_a_line
from lab.record import REPLACING, status
from lab.resume import RunEnded, offer, to_resume
from low_precision import formats
from low_precision.errors import SettingError
from settings import recipes
from settings.config import Config, ConfigError, flag
from settings.flags import parser
from settings.recipes import with_recipe
from settings.stdout import show


@dataclass(frozen=True)
class Options:
    """What the arguments ask for beside the run itself.

    resume: the folder of the record to go on with. table: what to print instead of a run.
    """

    debug: bool = False
    resume: Path | None = None
    table: Callable[[], str] | None = None


def configure(argv: list[str]) -> tuple[Config | None, Options]:
    """The run that the arguments ask for, None where they ask for a table; and their options."""
    settings = parser().values(argv)
    debug = settings.pop("debug", False)
    tables = {"list_formats": formats.table, "list_recipes": recipes.table}
    asked = [table for name, table in tables.items() if settings.pop(name, False)]
    if asked:
        return None, Options(debug, table=asked[0])
    recipe, resume = settings.pop("recipe", None), settings.pop("resume", None)
    merged = with_recipe(recipe, settings)
    try:
        if resume is not None:
            config, folder = to_resume(resume, merged)
            return config, Options(debug, folder)
        return Config.make(**merged), Options(debug)
    except ConfigError as error:
        if error.setting in map(flag, merged.keys() - settings.keys()):
            error.note += f"; --recipe {recipe} gives it"
        raise


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
            show(options.table() if options.table else "")
            return 0
        if resume and resume.name == config.folder_name and (ended := status(resume)) in REPLACING:
            print(f"{config.name}: {ended}, nothing is left to do\nrecord: {resume}")
            return 0
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:  # nohup
                signal.signal(getattr(signal, name), _terminate)
        if first and not resume:
            offer(config)
        import train  # torch: not before the arguments are right
        from lab.session import report

        with warnings_in_a_line():
            result = train.run(config, command("main.py", *argv), resume)
        if first:
            show(report(result))
        return 0
    except SettingError as error:  # of the library, where only the model could tell: a site that reaches nothing
        if first:
            say(f"main.py: error: {ConfigError.of(error)}")
        return 2
    except KeyboardInterrupt as stop:
        if first:
            ended = RunEnded.of(stop)
            say(*(ended.notes if ended else []), f"interrupted: {ended or 'before it began'}")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except Exception as error:
        if debug:
            raise
        ended = RunEnded.of(error)
        where = f"; {ended}" if ended else ""
        say(*(ended.notes if ended else []), f"main.py: error: {in_a_line(error)}{where} (--debug shows where)")
        return 1


if __name__ == "__main__":
    sys.exit(main())
