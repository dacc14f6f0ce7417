"""Where a run's record goes: the local files that are its result, always. wandb_run.py puts wandb beside them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from lab.files import append, read, to_json, write_whole
from lab.step_lines import FILES, LinesFile

CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")  # the newest, and the one before it
REPLACING = ("complete", "diverged")  # the runs that ended by themselves; "interrupted" and "failed" replace nothing


def _lock(file) -> bool:
    """Lock an open file until it is closed or its process is gone; False where there are no locks.

    BlockingIOError if another process has it locked.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(errno.EWOULDBLOCK, "in use by another process", os.path.dirname(file.name)) from None
    except (ImportError, OSError):  # Windows; a file system without locks
        return False
    return True


def summary_of(folder: Path) -> dict:
    """The summary of the run recorded in `folder`; empty while it goes on, after a kill, and for what is no record."""
    try:
        summary = json.loads(read(folder / "summary.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def status(folder: Path) -> str | None:
    """How the run recorded in `folder` ended; None while it goes on, after a kill, and for what is no record."""
    return summary_of(folder).get("status")


def unfinished(output_dir: str | os.PathLike, name: str) -> list[tuple[Path, int]]:
    """The records of that name that --resume can go on with, and the number of their evaluations: the furthest first.

    With none of them, and last, those that have no checkpoint yet and begin anew.
    """
    records = []
    for folder in [Path(output_dir) / name, *siblings(Path(output_dir) / name, "partial")]:
        if (folder.name == name and status(folder) in REPLACING) or not (folder / "config.json").is_file():
            continue
        lines = 0
        try:
            with open(folder / "metrics.jsonl", "r+b") as file:
                _lock(file)
                if any((folder / checkpoint).is_file() for checkpoint in CHECKPOINTS):
                    lines = read(folder / "metrics.jsonl").count(b"\n")
        except FileNotFoundError:  # killed at its very beginning
            pass
        except OSError:  # in use, or nothing to write to
            continue
        records.append((folder, lines))
    return sorted(records, key=lambda record: -record[1])


def siblings(final: Path, kind: str) -> list[Path]:
    """The folders NAME.KIND-PID beside NAME."""
    if not final.parent.is_dir():
        return []
    return [path for path in final.parent.iterdir() if path.name.startswith(f"{final.name}.{kind}-")]


class NoRecord:
    """What a process has that writes nothing, as another one does."""

    folder, notes = Path(os.devnull), ()

    def evaluation(self, metrics: dict[str, float | int | None]) -> None: ...

    def lines(self, name: str, rows: list[dict]) -> None: ...

    def lines_before(self, name: str) -> Iterable[dict]:
        return ()

    def checkpoint(self, data: bytes) -> None: ...

    def finish(self, summary: dict) -> Path:
        return self.folder


class Record:
    """The files of one run. They grow in `folder`, at first OUTPUT_DIR/NAME.partial-PID; `finish` puts it in its place.

    output_dir: created if it is not there. name: NAME-HASH. config: anything that is JSON. files: of lines by step.
    OSError, in the system's own words, wherever something cannot be written (a full disk, no permission).
    notes: lines for the user. What is in the files is kept in memory too: a folder that vanishes is written anew.
    """

    def __init__(self, output_dir: str | os.PathLike, name: str, config: dict, files: Sequence[LinesFile] = ()) -> None:
        output_dir = Path(output_dir)
        self._final = output_dir / name
        self._begin(config, files)
        self._created = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
        output_dir.mkdir(parents=True, exist_ok=True)
        for free in self._partial_names():
            with contextlib.suppress(FileExistsError):
                free.mkdir()
                self.folder = free
                break
        try:
            self._fill()
        except BaseException:
            self._remove()
            raise

    @classmethod
    def resume(
        cls,
        folder: Path,
        config: dict,
        history: list[dict],
        checkpoint: tuple[str, bytes] | None,
        files: Sequence[LinesFile] = (),
    ) -> Record:
        """Go on with the record in `folder`, whose metrics are those of `history` from now on.

        checkpoint: the name and the bytes of the one from which the run goes on. While the run lasts, the folder is a
        NAME.partial-PID, as that of every run. BlockingIOError if a process has it in use.
        """
        record = cls.__new__(cls)
        record._final = folder.with_name(re.sub(r"\.(partial|old)-[0-9]+(-[0-9]+)?$", "", folder.name))
        record._begin(config, files)
        record._created = None
        record._lines = [to_json(line).encode() for line in history]
        record.folder = folder
        if folder == record._final:  # which no process writes to
            record.folder = folder.rename(next(free for free in record._partial_names() if not free.exists()))
        try:
            if status(record.folder) in REPLACING and folder == record._final:
                raise BlockingIOError(errno.EWOULDBLOCK, "finished by another process just now", str(folder))
            record._take_over(checkpoint)
        except BaseException:
            if record.folder != folder:
                record.folder.rename(folder)
            raise
        return record

    def _begin(self, config: dict, files: Sequence[LinesFile]) -> None:
        self.notes: list[str] = []
        self._files = {file.name: file for file in files}
        self._config = to_json(config, indent=2)
        self._lines: list[bytes] = []  # of metrics.jsonl
        self._checkpoint: bytes | None = None

    def _partial_names(self):
        for attempt in itertools.count():
            yield self._final.with_name(f"{self._final.name}.partial-{os.getpid()}{f'-{attempt}' if attempt else ''}")

    def _fill(self) -> None:
        """Write config.json, and metrics.jsonl and its like as far as they go."""
        write_whole(self.folder / "config.json", self._config)
        self._metrics = open(self.folder / "metrics.jsonl", "a+b", buffering=0)  # noqa: SIM115 - open till `finish`
        _lock(self._metrics)  # while it lasts, everybody knows that the folder is in use
        for line in self._lines:
            self._append(line)
        for file in self._files.values():
            file.fill(self.folder)

    def _take_over(self, checkpoint: tuple[str, bytes] | None) -> None:
        metrics = self.folder / "metrics.jsonl"
        if metrics.is_symlink() or metrics.exists():
            read(metrics)  # refuses what is no plain file
        self._metrics = open(metrics, "a+b", buffering=0)  # noqa: SIM115 - open till `finish`
        try:
            _lock(self._metrics)
            if not self._is_there():
                raise FileNotFoundError(errno.ENOENT, "deleted by another process just now", str(self.folder))
            for leftover in self.folder.glob(".*.tmp"):  # of a killed process
                with contextlib.suppress(OSError):
                    leftover.unlink()
            (self.folder / "summary.json").unlink(missing_ok=True)
            if checkpoint:
                name, self._checkpoint = checkpoint
                if name != CHECKPOINTS[0]:  # the other one is not whole, and must not become the one before the next
                    os.replace(self.folder / name, self.folder / CHECKPOINTS[0])
            write_whole(self.folder / "config.json", self._config)
            for name in FILES:
                if name in self._files:
                    self._files[name].fill(self.folder)
                else:  # which nobody asks for any more, and which would end here
                    (self.folder / name).unlink(missing_ok=True)
            self._metrics.seek(0)
            kept = b"".join(self._lines)
            if self._metrics.read(len(kept)) == kept:  # what came after the checkpoint comes again
                self._metrics.truncate(len(kept))
            else:
                self._metrics.truncate(0)
                for line in self._lines:
                    self._append(line)
        except BaseException:
            self._metrics.close()
            raise

    def evaluation(self, metrics: dict[str, float | int | None]) -> None:
        """Append one line to metrics.jsonl. At any moment, a kill -9 included, the file holds whole lines only."""
        self._restore()
        line = to_json(metrics).encode()
        self._append(line)
        self._lines.append(line)

    def lines(self, name: str, rows: list[dict]) -> None:
        """Append lines to the file of that name."""
        if rows:
            self._restore()
            self._files[name].add(self.folder, rows)

    def lines_before(self, name: str) -> Iterable[dict]:
        """The lines of that file that are there already."""
        return self._files[name].rows()

    def _append(self, line: bytes) -> None:
        append(self._metrics, line)

    def checkpoint(self, data: bytes) -> None:
        """Replace checkpoint.pt, whole or not at all; the one before it stays as checkpoint.previous.pt."""
        self._restore()
        newest, previous = (self.folder / name for name in CHECKPOINTS)
        write_whole(newest, data, previous)
        self._checkpoint = data

    def _is_there(self) -> bool:
        """Whether the metrics that we write are still those in the folder."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._metrics.fileno()), os.stat(self.folder / "metrics.jsonl"))
        return False

    def _restore(self) -> None:
        """Write everything anew if somebody has deleted or moved the folder."""
        if self._is_there():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics.close()
        self._fill()
        if self._checkpoint:
            write_whole(self.folder / CHECKPOINTS[0], self._checkpoint)
        self.notes.append(f"the record's folder vanished while the run went on: written anew, {self.folder}")

    def finish(self, summary: dict) -> Path:
        """Write summary.json, put the folder in its place OUTPUT_DIR/NAME, and return where it lies.

        summary["status"] "complete" or "diverged" replaces an older record of that name. Between its two renames the
        older record is NAME.old-PID and the new one still NAME.partial-PID, both whole. Afterwards the older one is
        deleted, with whatever killed or interrupted runs left under the same name and no process has in use.
        Any other status replaces nothing: where the place is taken, the folder stays NAME.partial-PID. "failed" before
        the first evaluation or checkpoint leaves nothing: the path returned then does not exist.
        """
        empty = not self._lines and self._checkpoint is None
        if summary["status"] == "failed" and empty and self._created is not None:
            self._metrics.close()
            self._remove()
            return self.folder
        self._restore()
        write_whole(self.folder / "summary.json", to_json(summary, indent=2))
        os.fsync(self._metrics)
        if os.name == "nt":
            self._metrics.close()  # Windows renames no folder with an open file in it
        if summary["status"] in REPLACING:
            (self.folder / CHECKPOINTS[1]).unlink(missing_ok=True)
            self._replace()
            self._clean()
        else:
            for older in siblings(self._final, "old"):  # a replacement was cut short: it gets its place back
                with contextlib.suppress(OSError):
                    os.rename(older, self._final)
            with contextlib.suppress(OSError):  # somebody takes the place at the same moment
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
        for older in siblings(self._final, "old"):  # the record that is in place now has replaced them all
            shutil.rmtree(older, ignore_errors=True)
        for partial in siblings(self._final, "partial"):
            with contextlib.suppress(OSError), open(partial / "metrics.jsonl", "r+b") as file:
                if _lock(file):
                    shutil.rmtree(partial, ignore_errors=True)

    def _remove(self) -> None:
        """Undo what __init__ made, with the folders above it unless something else is in them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in self._created:  # the innermost first
                path.rmdir()
