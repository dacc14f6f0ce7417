"""Where a run's record goes: the local files that are its result, always. wandb_run.py puts wandb beside them."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import math
import os
import shutil
from pathlib import Path

REPLACING = ("complete", "diverged")  # the runs that ended by themselves; "interrupted" and "failed" replace nothing


def write_whole(path: str | os.PathLike, data: str | bytes) -> None:
    """Write `data` (str: as UTF-8) to `path`, whole or not at all; an older file stays until the new one is on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _to_json(value, indent: int | None = None) -> str:
    """Strict JSON and a line end: NaN and the infinities, which JSON does not have, become null."""

    def finite(value):
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False) + "\n"


def _lock(file) -> bool:
    """Lock an open file until it is closed or its process is gone. False: in use, or no locks on this file system."""
    with contextlib.suppress(ImportError, OSError):  # ImportError: Windows, where leftovers stay
        import fcntl

        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
    return False


class Record:
    """The files of one run. They grow in `folder`, at first OUTPUT_DIR/NAME.partial-PID; `finish` puts it in its place.

    output_dir: created if it is not there. name: NAME-HASH. config: anything that is JSON.
    OSError, in the system's own words, wherever something cannot be written (a full disk, no permission).
    """

    def __init__(self, output_dir: str | os.PathLike, name: str, config: dict):
        output_dir = Path(output_dir)
        self._final = output_dir / name
        self._created = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
        output_dir.mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count():
            self.folder = output_dir / f"{name}.partial-{os.getpid()}{f'-{attempt}' if attempt else ''}"
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir()
                break
        try:
            write_whole(self.folder / "config.json", _to_json(config, indent=2))
            self._metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 - open till `finish`
            _lock(self._metrics)  # while it lasts, everybody knows that the folder is in use
        except BaseException:
            self._remove()
            raise

    def epoch(self, metrics: dict[str, float | int | None]) -> None:
        """Append one line to metrics.jsonl. At any moment, a kill -9 included, the file holds whole lines only."""
        line = _to_json(metrics).encode()
        size = self._metrics.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that takes only a part of it says why when asked to take the rest
                line = line[self._metrics.write(line) :]
        except BaseException:
            self._metrics.truncate(size)
            raise

    def checkpoint(self, state: dict) -> None:
        """Replace checkpoint.pt by `state` (anything that torch.save takes), whole or not at all."""
        import torch

        buffer = io.BytesIO()  # torch.save into a file turns a full disk into a RuntimeError
        torch.save(state, buffer)
        write_whole(self.folder / "checkpoint.pt", buffer.getbuffer())

    def finish(self, summary: dict) -> Path:
        """Write summary.json, put the folder in its place OUTPUT_DIR/NAME, and return where it lies.

        summary["status"] "complete" or "diverged" replaces an older record of that name. Between its two renames the
        older record is NAME.old-PID and the new one still NAME.partial-PID, both whole. Afterwards the older one is
        deleted, with whatever killed or interrupted runs left under the same name and no process has in use.
        Any other status replaces nothing: where the place is taken, the folder stays NAME.partial-PID. "failed" before
        the first epoch leaves nothing: the path returned then does not exist.
        """
        if summary["status"] == "failed" and not self._metrics.seek(0, os.SEEK_END):
            self._metrics.close()
            self._remove()
            return self.folder
        write_whole(self.folder / "summary.json", _to_json(summary, indent=2))
        os.fsync(self._metrics)
        if os.name == "nt":
            self._metrics.close()  # Windows renames no folder with an open file in it
        if summary["status"] in REPLACING:
            self._replace()
            self._clean()
        else:
            for older in self._siblings("old"):  # a replacement was cut short: the older record gets its place back
                with contextlib.suppress(OSError):
                    os.rename(older, self._final)
            if not self._final.exists():
                self.folder = self.folder.rename(self._final)
        self._metrics.close()
        return self.folder

    def _replace(self) -> None:
        """Move the folder into its place. What lies there, or is put there at the same moment, steps aside first."""
        for attempt in itertools.count():
            try:
                self.folder = self.folder.rename(self._final)  # OSError where a folder with files in it lies
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 100:
                    raise
            aside = self._final.with_name(f"{self._final.name}.old-{os.getpid()}-{attempt}")
            with contextlib.suppress(OSError):  # another process was faster, or the next attempt says what is wrong
                self._final.rename(aside)

    def _clean(self) -> None:
        for older in self._siblings("old"):  # the record that is in place now has replaced them all
            shutil.rmtree(older, ignore_errors=True)
        for partial in self._siblings("partial"):
            with contextlib.suppress(OSError), open(partial / "metrics.jsonl", "r+b") as file:
                if _lock(file):
                    shutil.rmtree(partial, ignore_errors=True)

    def _siblings(self, kind: str) -> list[Path]:
        return [path for path in self._final.parent.iterdir() if path.name.startswith(f"{self._final.name}.{kind}-")]

    def _remove(self) -> None:
        """Undo what __init__ made, with the folders above it unless something else is in them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in self._created:  # the innermost first
                path.rmdir()
