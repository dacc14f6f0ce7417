"""Text as numbers, character by character; a text file of the user's own. No torch here."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from low_precision.errors import SettingError, shown


def read(path: Path) -> str:
    """What is in the file, UTF-8, a byte order mark left out, line ends as they are.

    SettingError for the setting "dataset", one line: a file that cannot be read, is empty, or is no such text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SettingError("dataset", f"{shown(path)} ({error.strerror})", "a file that can be read") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{shown(path)}, in which byte {error.start + 1} of {len(raw)} is 0x{raw[error.start]:02x}"
        raise SettingError("dataset", where, "a text in UTF-8") from None
    if not text:
        raise SettingError("dataset", f"{shown(path)}, which is empty", "a text")
    return text


def encoded(text: str) -> tuple[str, np.ndarray]:
    """The characters of a text, each once and in the order of their code points, and the text as places among them.

    The places are int64 (len(text),).
    """
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    there = np.zeros(0x110000, dtype=bool)  # by code point
    there[codes] = True
    places = np.cumsum(there) - 1
    return "".join(map(chr, np.flatnonzero(there))), places[codes].astype(np.int64, copy=False)
