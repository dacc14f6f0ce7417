"""A CSV file of the user's own as arrays: numbers in columns, and one column that is to be predicted. No torch here.

What is wrong in a file is a SettingError: one line with the line of the file, the column, what stands there and what is
allowed.
"""

from __future__ import annotations

import csv
import io
import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from low_precision.errors import SettingError, nearest, shown

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # float() takes 1_000, nan and infinity too
_MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-"}
_MOST_LISTED = 20  # names of columns
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def read(path: Path, target: str, as_classes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The columns but for `target`, float64 (n, d), and the target: float64 (n,), or classes int64 (n,).

    The first line has the names of the columns. A target of numbers is for regression; one of text, or any with
    as_classes, is classes, which are numbered in the order of their values or texts. Text is UTF-8; quotes and line
    ends are those of any CSV file, and empty lines are skipped.
    SettingError for the setting "dataset": one line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SettingError("dataset", f"{shown(path)} ({error.strerror})", "a file that can be read") from None
    try:
        return _read(raw, target, as_classes)
    except SettingError as error:  # which of the lines is wrong: of which file is known here
        raise SettingError("dataset", f"{path}{error.value}", error.allowed, error.nearest, error.note) from None


@lru_cache(maxsize=4)  # a sweep reads the same file for each of its runs; nobody writes to the arrays
def _read(raw: bytes, target: str, as_classes: bool) -> tuple[np.ndarray, np.ndarray]:
    names, numbered = _table(_text(raw))
    if target not in names:
        what = f", which has no column {shown(target, repr)}"
        listed = ", ".join(names[:_MOST_LISTED]) + (", ..." if len(names) > _MOST_LISTED else "")
        raise _wrong(what, f"FILE.csv:TARGET[:classes], TARGET one of {listed}", nearest(target, names))
    if len(names) == 1:
        raise _wrong(f", whose only column is {target}", "a column to predict it from")
    if len(numbered) < 2:
        raise _wrong(f" of {len(numbered)} rows", "at least 2")
    column = names.index(target)
    targets = _targets(target, [(line, row.pop(column)) for line, row in numbered], as_classes)
    names.remove(target)
    features = [[_number(cell, line, name) for name, cell in zip(names, row, strict=True)] for line, row in numbered]
    return np.array(features), targets


def _wrong(what: str, allowed: str, near: str | None = None, note: str = "") -> SettingError:
    """what: behind the file's name."""
    return SettingError(None, what, allowed, near, note)


def _cell(line: int, name: str, cell: str) -> str:
    there = "nothing" if not cell.strip() else shown(cell, repr)
    return f", line {line}, column {name}: {there}"


def _text(raw: bytes) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:1000]:
        raise _wrong(" in UTF-16, or with no text in it", "text in UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _wrong(f", line {line}: the byte {raw[error.start]:#04x}", "text in UTF-8") from None


def _table(text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of the columns, and each row with the number of its line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    numbered = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                numbered.append((reader.line_num, row))
    except csv.Error as error:
        raise _wrong(f", line {reader.line_num}: {error}", "a CSV file") from None
    if not numbered:
        raise _wrong(", which is empty", "a line of names, and rows below it")
    (line, head), *numbered = numbered
    names = [name.strip() for name in head]
    for separator, what in _SEPARATORS.items():
        if len(names) == 1 and separator in names[0]:
            raise _wrong(f", whose columns are separated by {what}", "columns separated by commas")
    for place, name in enumerate(names):
        if not name or name in names[:place]:
            what = f"column {place + 1} has no name" if not name else f"{name} stands there twice"
            note = "" if name or place else " (pandas writes its index there: to_csv(index=False))"
            raise _wrong(f", line {line}: {what}", "a name for each column, each once", note=note)
    for line, row in numbered:
        if len(row) != len(names):
            raise _wrong(f", line {line}: {len(row)} values", f"{len(names)}, as there are names in the first line")
    return names, numbered


def _number(cell: str, line: int, name: str) -> float:
    cell = cell.strip()
    if _NUMBER.fullmatch(cell) and math.isfinite(value := float(cell)):
        return value
    note = "" if cell.lower() not in _MISSING else " (what is missing must be filled in, or its row left out)"
    raise _wrong(_cell(line, name, cell), "a finite number", note=note)


def _targets(name: str, cells: list[tuple[int, str]], as_classes: bool) -> np.ndarray:
    for line, cell in cells:
        if not cell.strip():
            raise _wrong(_cell(line, name, cell), "a target in every row")
    numeric = [_NUMBER.fullmatch(cell.strip()) is not None for _, cell in cells]
    if all(numeric):
        numbers = [_number(cell, line, name) for line, cell in cells]
        if not as_classes:
            if min(numbers) == max(numbers):
                raise _wrong(f", column {name}: {shown(cells[0][1])} in every row", "a target that differs")
            return np.array(numbers)
        return _classes(name, numbers)
    if any(numeric) and not as_classes:
        (line, number), (other, text) = cells[numeric.index(True)], cells[numeric.index(False)]
        what = f", column {name}: {shown(number)} in line {line}, but {shown(text, repr)} in line {other}"
        raise _wrong(what, "numbers, or text", note=f" (FILE.csv:{name}:classes makes a class of each)")
    return _classes(name, [cell.strip() for _, cell in cells])


def _classes(name: str, values: list[float] | list[str]) -> np.ndarray:
    classes, numbers = np.unique(np.array(values), return_inverse=True)
    if len(classes) == 1:
        raise _wrong(f", column {name}: {shown(values[0])} in every row", "a target that differs")
    if 2 * len(classes) > len(values):
        what = f", column {name}: {len(classes)} classes in {len(values)} rows"
        raise _wrong(what, "classes of two rows on average, at least")
    return numbers.astype(np.int64)
