"""Errors that carry what is wrong as fields, so that nobody has to parse their text. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SettingError(ValueError):
    """A setting that is not allowed, told in one line.

    setting: its name, as its user writes it ("format", "layers", "--layers"), or None where none is meant.
    value: what was given, as text. allowed: what is. nearest: the known word that is most like `value`, or None.
    note: what else there is to say, after a comma or semicolon of its own.
    """

    def __init__(
        self, setting: str | None, value: str, allowed: str, nearest: str | None = None, note: str = ""
    ) -> None:
        super().__init__(setting, value, allowed, nearest, note)  # as they are, so that pickle can make it again
        self.setting, self.value, self.allowed, self.nearest, self.note = setting, value, allowed, nearest, note

    def __str__(self) -> str:
        name = f"{self.setting}: " if self.setting else ""
        hint = f" (did you mean {self.nearest}?)" if self.nearest else ""
        return f"{name}given {self.value}{hint}, allowed: {self.allowed}{self.note}"


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known word that is most like `word`, whatever is a capital in them; None where none is."""
    by_lower = {name.lower(): name for name in known}
    return next((by_lower[name] for name in difflib.get_close_matches(str(word).lower(), by_lower, n=1)), None)


def shown(value: object) -> str:
    """A value as text on one line; in quotes where it would not be seen, as an empty text or one with a line end."""
    text = str(value)
    return text if text and text.isprintable() and text == text.strip() else repr(text)
