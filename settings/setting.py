"""How a setting is declared: a field of a dataclass that carries all that its flag needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from settings.kinds import Kind


def of_group(group: str) -> Callable[..., Any]:
    """What declares the settings of one group of flags."""

    def setting(default: Any, kind: Kind, text: str, *, default_text: str | None = None) -> Any:
        """kind: what it may be. text: the flag's help. default_text: the default for people, where that says more."""
        shown = default_text if default_text is not None else str(default)
        return field(default=default, metadata={"group": group, "kind": kind, "help": text, "default": shown})

    return setting
