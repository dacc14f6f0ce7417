"""How the files of a record are written and read: whole or not at all, and never what is no plain file."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
from pathlib import Path


def write_whole(path: str | os.PathLike, data: str | bytes, previous: str | os.PathLike | None = None) -> None:
    """Write `data` (str: as UTF-8) to `path`, whole or not at all; an older file stays until the new one is on disk.

    previous: where the older file goes then, if anywhere.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise


def _name(error: BaseException, path: str | os.PathLike) -> None:
    """Add the file to an error that the system reports without one, as a write on a full disk."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def to_json(value, indent: int | None = None) -> str:
    """Strict JSON and a line end: NaN and the infinities, which JSON does not have, become null."""

    def finite(value):
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False) + "\n"


def read(path: Path) -> bytes:
    """The bytes of a file of a record. OSError for what is no plain file: a record may be a stranger's."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return path.read_bytes()


def append(file: io.RawIOBase | io.FileIO, data: bytes) -> None:
    """Writes `data` at the end of an unbuffered file: all of it, or nothing and OSError."""
    size, rest = file.seek(0, os.SEEK_END), memoryview(data)
    try:
        while rest:  # a disk that takes only a part of it says why when asked to take the rest
            rest = rest[file.write(rest) :]
    except BaseException as error:
        file.truncate(size)
        _name(error, file.name)
        raise
