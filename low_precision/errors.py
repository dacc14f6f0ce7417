"""Errors that carry what is wrong as fields, so that nobody has to parse their text. No torch here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

MOST_SHOWN = 1000  # characters of a value


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
    lower = shown(word).strip("' ").lower()
    return next((by_lower[name] for name in difflib.get_close_matches(lower, by_lower, n=1)), None)


def shown(value: object, text_of: Callable[[object], str] = str) -> str:
    """A value as text on one line; in quotes where it would not be seen, as an empty text or one with a line end.

    text_of: repr where a number is wanted, so that a text shows its quotes: '8' is not 8.
    """
    try:
        text = text_of(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        text = f"a number of type {type(value).__name__} with more digits than Python writes"
    if len(text) > MOST_SHOWN:
        text = text[:MOST_SHOWN] + "..."
    return text if text and text.isprintable() and text == text.strip() else repr(text)


def wrong_type(setting: str | None, value: object, allowed: str, nearest: str | None = None) -> TypeError:
    """The error for a value of a type that is not allowed, told in one line as a SettingError is."""
    return TypeError(str(SettingError(setting, shown(value, repr), allowed, nearest)))
