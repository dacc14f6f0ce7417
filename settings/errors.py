"""What is wrong with a setting, by its flag."""

from __future__ import annotations

from typing import Any

from low_precision.errors import SettingError, shown


class ConfigError(SettingError):
    """A setting that is not allowed: one line that names the flag, what was given and what is allowed."""

    @classmethod
    def of(cls, error: SettingError) -> ConfigError:
        """The same of a flag, from what the library says of a setting; what is of a flag already stays."""
        if isinstance(error, cls):
            return error
        name = error.setting and flag(error.setting)
        return cls(name, error.value, error.allowed, error.nearest, error.note)


def refused(name: str, value: Any, allowed: str, nearest_word: str | None = None, note: str = "") -> ConfigError:
    """What is wrong with a setting, by the name of its field."""
    return ConfigError(flag(name), shown_value(value), allowed, nearest_word, note)


def shown_value(value: Any) -> str:
    """A setting's value in one line."""
    return shown(",".join(map(str, value)) if isinstance(value, (list, tuple)) else value)


def flag(name: str) -> str:
    """The command line's name of a field."""
    return "--" + name.replace("_", "-")
