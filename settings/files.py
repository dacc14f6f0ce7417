"""People's own files in the settings of a run: from where they are taken, and what they are called in a record.

A Config has the names as they were given, so that the hash of a run is the same in every checkout; what the files hold
is in the fingerprint (lab/fingerprint.py). Beside them it has the folder from which relative ones are taken, so that a
run is resumed from anywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import sources.named_file
from sources.named_file import named_file


def folder_to_record(files_dir: str | None, names: Iterable[str]) -> str | None:
    """The folder, whole, from which relative files among these names are taken; where there are none, as given."""
    files = [file for name in names if (file := named_file(name))]
    if all(file.path.is_absolute() for file in files):
        return files_dir
    return os.path.abspath(files_dir or os.getcwd())


def placed(name: str, files_dir: str | None) -> str:
    """The same name, a relative FILE in it taken from that folder; as it is where that is the current one."""
    if files_dir is None or os.path.abspath(files_dir) == os.getcwd():
        return name
    return sources.named_file.placed(name, files_dir)


def label(name: str) -> str:
    """What a data set is called in the names of records: short for a file, and what no file system minds."""
    file = named_file(name)
    return file.label if file else re.sub(r"[^\w.-]+", "-", name)
