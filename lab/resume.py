"""Where a run that ended early goes on: what is said of its record, and which record --resume means. No torch here."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lab.console import command, say
from lab.files import read
from lab.record import siblings, unfinished
from low_precision.errors import shown
from settings.config import Config, ConfigError
from settings.flags import RESUMABLE


@dataclass(frozen=True)
class RunEnded:
    """What an exception that ended a run carries, in the first process: where the record lies, and how to go on.

    folder: None where nothing is recorded. notes: further lines for the user.
    """

    folder: Path | None
    notes: list[str]

    def attach_to(self, error: BaseException) -> None:
        error.run_ended = self  # type: ignore[attr-defined]

    @classmethod
    def of(cls, error: BaseException) -> RunEnded | None:
        """What the exception says of the run that it ended; None where it ended none."""
        return getattr(error, "run_ended", None)

    def __str__(self) -> str:
        if self.folder is None:
            return "nothing is recorded yet"
        return f"recorded so far in {self.folder}; to go on: {command('main.py', '--resume', str(self.folder))}"


def to_resume(text: str, settings: dict[str, Any]) -> tuple[Config, Path]:
    """The run whose record lies in the folder `text`, and that folder.

    settings: explicit ones, over the recorded ones; ConfigError for those that would change the result.
    """
    folder = Path(text).expanduser()
    if folder.is_symlink() or not folder.name:
        folder = folder.resolve()
    if not folder.is_dir():  # killed: it still has its name of while it ran
        records = unfinished(folder.parent, folder.name)
        if not records:
            in_use = [f"{path} is in use" for path in siblings(folder, "partial")]
            note = f" that no process writes to ({', '.join(in_use)})" if in_use else ""
            raise ConfigError("--resume", shown(text), RESUMABLE, note=note)
        folder = records[0][0]
    recorded = _recorded(folder, text)
    config = Config.make(**asdict(recorded) | settings)
    if differences := config.told_differences(recorded):
        value = f"{folder} and {'; '.join(differences)}"
        raise ConfigError("--resume", value, "the run's own settings, and those that change no result")
    if config.shadow and not recorded.shadow:
        raise ConfigError("--shadow", f"{folder}, which began without it", "what the run began with, or no --resume")
    if "output_dir" in settings and os.path.abspath(config.output_dir) != os.path.abspath(folder.parent):
        raise ConfigError("--output-dir", shown(config.output_dir), f"{folder.parent}, where the record is")
    return replace(config, output_dir=str(folder.parent)), folder


def _recorded(folder: Path, text: str) -> Config:
    """The settings of the record in `folder`."""
    try:
        return Config.from_json(read(folder / "config.json").decode())
    except FileNotFoundError:
        note = f" (there is no config.json in {folder})"
    except (ValueError, RecursionError) as error:
        note = f" ({folder / 'config.json'}: {error})"
    raise ConfigError("--resume", shown(text), RESUMABLE, note=note)


def offer(config: Config) -> None:
    """A line about an unfinished run of this configuration, if there is one."""
    for folder, evaluations in unfinished(config.output_dir, config.folder_name)[:1]:
        if evaluations:
            done = f"{evaluations} of {config.epochs} epochs are"
            if config.is_by_step:
                done = "1 evaluation is" if evaluations == 1 else f"{evaluations} evaluations are"
            done += f" in {folder}"
            resume = command("main.py", "--resume", str(folder))
            say(f"unfinished before: {done}; to go on with it: {resume}; this starts anew")
