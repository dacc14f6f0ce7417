"""Functions that torch.compile leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def untraced(function: Callable) -> Callable:
    """torch.compiler.disable(function), which imports torch's compiler: here, only where it is at work."""
    disabled = torch._disable_dynamo(function)  # imports at its first call

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return (disabled if torch.compiler.is_compiling() else function)(*arguments, **named)

    return call
