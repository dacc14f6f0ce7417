"""Files from the internet: downloaded once, checked, kept, and continued where a download was interrupted."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Remote:
    """A file: its name here, its checksum, and where it comes from."""

    name: str
    checksum: str  # "algorithm:hex", as pooch writes it
    urls: tuple[str, ...]  # the official address first, then mirrors, in the order in which they are tried


def folder_of(data_dir: str | Path | None) -> Path:
    """Where downloads are kept: in `data_dir`, or None: in the user's cache folder."""
    if data_dir is None:
        import pooch

        data_dir = pooch.os_cache("low_precision_ml")
    return Path(data_dir).expanduser()


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Of runs that start together, one is in here and the others wait. OSError where no file can be made."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f"{name}.lock"
    lock.touch()  # OSError; FileLock would try for ever in a folder like /proc
    with FileLock(lock):
        yield


def fetch(folder: Path, file: Remote, progress: bool = True) -> Path:
    """Where `file` lies in `folder`: downloaded unless a file of its name is there, whatever is in that."""
    path = folder / file.name
    if not path.is_file():
        with locked(folder, file.name):
            if not path.is_file():
                download(folder, file, progress)
    return path


def has_checksum(raw: bytes, file: Remote) -> bool:
    """Whether these are the bytes of `file`."""
    algorithm, _, expected = file.checksum.partition(":")
    return hashlib.new(algorithm, raw, usedforsecurity=False).hexdigest() == expected


def download(folder: Path, file: Remote, progress: bool = True) -> None:
    """Download `file` into `folder`, from the first of its addresses that delivers what has its checksum.

    What has arrived waits in a part file for the rest, from any address, in this run or a later one. The whole gets the
    file's name if its checksum is right, and is deleted if not. progress: a bar, where stderr is a terminal.
    ConnectionError, in one line, when no address delivered.
    """
    import pooch
    from requests import HTTPError, RequestException

    part = folder / f"{file.name}.part"

    def continue_part(url: str, output: str, _pooch: object) -> None:
        with open(part, "ab") as opened:

            def start_anew(response, **_) -> None:
                if response.status_code == 200:  # the whole file, whatever was asked for
                    opened.truncate(0)

            begun = opened.tell()
            downloader = pooch.HTTPDownloader(
                progressbar=progress and sys.stderr.isatty(),
                chunk_size=1 << 14,  # bytes: the most that an interruption loses
                headers={"Accept-Encoding": "identity"} | ({"Range": f"bytes={begun}-"} if begun else {}),
                hooks={"response": start_anew},
            )
            try:
                downloader(url, opened, None)
            except HTTPError as error:
                if error.response.status_code != 416:  # 416: nothing comes after the part; the checksum decides
                    raise
        os.replace(part, output)

    failures = []
    for url in file.urls:
        for _ in range(2):
            continued = part.exists() and part.stat().st_size > 0
            try:
                pooch.retrieve(url, file.checksum, fname=file.name, path=folder, downloader=continue_part)
                return
            except RequestException as error:
                failures.append(f"{url}: {getattr(error.response, 'status_code', type(error).__name__)}")
                break
            except ValueError:  # pooch's. The part is gone: it may have been bad before this address continued it
                failures.append(f"{url}: wrong checksum")
                if not continued:
                    break
    advice = "run again to continue, or put the file into a folder and name that with --data-dir"
    raise ConnectionError(f"{file.name} could not be downloaded ({', '.join(failures)}); {advice}")
