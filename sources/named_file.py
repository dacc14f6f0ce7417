"""The names of people's own files: FILE.py:FUNCTION, FILE.csv:TARGET[:classes] and FILE.txt. No torch here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

FORMS = {".py": "FILE.py:FUNCTION", ".csv": "FILE.csv:TARGET[:classes]", ".txt": "FILE.txt"}
# A suffix in capitals, as other systems write it, is the same kind of file.
_NAME = re.compile(
    r"(?P<path>.*?[^/\\](?P<suffix>\.py|(?i:\.csv))):(?P<part>.*)|(?P<text>.*[^/\\](?i:\.txt))", re.DOTALL
)
_LABEL = 40  # characters


@dataclass(frozen=True)
class NamedFile:
    """A name, taken apart. part: FUNCTION, TARGET, or "" of a text; as_classes: whether :classes stands behind it."""

    path: Path
    suffix: str
    part: str = ""
    as_classes: bool = False

    def __str__(self) -> str:
        return ":".join(
            [str(self.path), *([self.part] if self.part else []), *(["classes"] if self.as_classes else [])]
        )

    @property
    def label(self) -> str:
        """A short name for records, of letters, digits and marks that no file system minds: FILE-PART."""
        words = [self.path.stem, *([self.part] if self.part else [])]
        return re.sub(r"[^\w.-]+", "-", "-".join(words)).strip("-.")[:_LABEL] or "file"


def named_file(name: str) -> NamedFile | None:
    """What a name says; None for one that is no file's, as the name of a row in a table."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    if match["text"]:
        return NamedFile(Path(name), ".txt")
    part, as_classes, suffix = match["part"], False, match["suffix"].lower()
    if suffix == ".csv" and part.endswith(":classes"):
        part, as_classes = part.removesuffix(":classes"), True
    return NamedFile(Path(match["path"]), suffix, part, as_classes) if part else None


def placed(name: str, folder: str | os.PathLike[str]) -> str:
    """The same name, with a relative FILE taken from that folder."""
    file = named_file(name)
    return name if file is None else str(replace(file, path=Path(folder) / file.path))
