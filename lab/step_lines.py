"""Files of a record beside metrics.jsonl: JSON lines that each have the step they are of, in the order of the steps.

A run has those that its settings ask for. What is in them decides nothing of the run. No torch here: sweep.py asks
whether they are there.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lab.files import append, read, to_json, write_whole
from low_precision.errors import SettingError
from settings.config import Config

Row = dict[str, Any]
WandbKeys = tuple[dict[str, float | int | None], dict[str, dict[str, Any]]]  # numbers, and histograms

LAYERS, SHADOW = "layers.jsonl", "shadow.jsonl"
# A file is a row: its name, and whether a run of these settings has it.
FILES: dict[str, Callable[[Config], bool]] = {LAYERS: lambda config: config.watch > 0, SHADOW: lambda c: c.shadow}
_DIGITS = 9  # of what is written: more than a sum of float32 numbers has


def asked_for(config: Config) -> list[str]:
    """The names of the files that a run of these settings leaves."""
    return [name for name, is_asked in FILES.items() if is_asked(config)]


def lacking(folder: Path, config: Config) -> list[str]:
    """Those of the files asked for that are not in the folder of a record, or lack what was to be tried."""
    return [name for name in asked_for(config) if not (folder / name).is_file() or not _has_tried(folder, config)]


def _has_tried(folder: Path, config: Config) -> bool:
    """Whether the run of a record has tried all that these settings want tried."""
    if not config.watch_also:
        return True
    try:
        recorded = Config.from_json((folder / "config.json").read_text())
    except (OSError, ValueError, SettingError):
        return False
    return set(config.watch_also) <= set(recorded.watch_also)


class LinesFile:
    """One such file as it grows: whole lines, and a copy of all of them for a folder that vanishes."""

    def __init__(self, name: str, lines: bytes = b"") -> None:
        self.name = name
        self._written = [zlib.compress(lines)] if lines else []

    @classmethod
    def resumed(cls, folder: Path, name: str, step: int) -> LinesFile:
        """With the lines in `folder` of the steps up to this one; those after it come again."""
        try:
            lines = read(folder / name).splitlines(keepends=True)
        except FileNotFoundError:  # nobody has asked for it until now
            lines = []
        return cls(name, b"".join(line for line in lines if _step_of(line) <= step))

    def fill(self, folder: Path) -> None:
        """Writes the file anew, whole or not at all."""
        write_whole(folder / self.name, b"".join(map(zlib.decompress, self._written)))

    def add(self, folder: Path, rows: Iterable[Row]) -> None:
        """Adds lines at the end, all of them or none."""
        lines = "".join(to_json(_shortened(row)) for row in rows).encode()
        if not lines:
            return
        with open(folder / self.name, "ab", buffering=0) as file:
            append(file, lines)
            os.fsync(file.fileno())
        self._written.append(zlib.compress(lines))

    def rows(self) -> Iterable[Row]:
        """All of them."""
        for written in self._written:
            yield from map(json.loads, zlib.decompress(written).splitlines())


class StepLines:
    """The lines of one file, from where they are made to the record and to wandb.

    take: gives the rows since the last time. wandb_keys: of the rows of one step.
    """

    def __init__(
        self, name: str, take: Callable[[], list[Row]], wandb_keys: Callable[[Iterable[Row]], WandbKeys]
    ) -> None:
        self.name, self._take, self._wandb_keys = name, take, wandb_keys
        self._newest: list[Row] = []  # of the last step that was seen, until wandb has them

    def take(self) -> list[Row]:
        """The rows since the last time."""
        rows = self._take()
        self.saw([row for row in rows if row["step"] == rows[-1]["step"]])
        return rows

    def saw(self, rows: list[Row]) -> None:
        """The rows of the last step that was seen, if any was."""
        self._newest = rows or self._newest

    def for_wandb(self) -> WandbKeys:
        """The last rows that were seen, once."""
        newest, self._newest = self._newest, []
        return self._wandb_keys(newest)


def by_evaluation(rows: Iterable[Row], steps: int) -> dict[int, list[Row]]:
    """The rows of the last step before each evaluation that has some. steps: from one of them to the next."""
    newest: dict[int, list[Row]] = {}
    for row in rows:
        number = (row["step"] - 1) // steps + 1
        if number not in newest or newest[number][0]["step"] < row["step"]:
            newest[number] = []
        newest[number].append(row)
    return newest


def _step_of(line: bytes) -> float:
    """The step of a line; infinite of half a line, as a killed process may leave one."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _shortened(row: Row) -> Row:
    return {name: float(f"{x:.{_DIGITS}g}") if isinstance(x, float) else x for name, x in row.items()}
