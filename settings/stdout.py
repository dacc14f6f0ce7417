"""What a script of this project prints."""

from __future__ import annotations

import os
import sys


def show(text: str) -> None:
    """What was asked for, on stdout; whoever reads it may stop when that is enough (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails at its end
