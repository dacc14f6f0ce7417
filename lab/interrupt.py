"""The wish to stop a run: Ctrl-C, SIGTERM and SIGHUP wait until no step is half done."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and no step of it is half done. args[0]: the signal's number."""


class Stop:
    """While it holds, as a context: Ctrl-C, SIGTERM and SIGHUP wait for `check`.

    A second one is a KeyboardInterrupt at once, wherever the run is, and a third ends the process. A signal that was
    ignored (nohup) stays so; outside the main thread, where Python takes no signals, it holds none.
    """

    def __init__(self) -> None:
        self.asked = 0  # how often
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: a handler that is not Python's
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked += 1
        self._number = number if self._number is None else self._number
        if self.asked > 1:
            for held in self._before:
                signal.signal(held, signal.SIG_DFL)
            raise KeyboardInterrupt(number)
        with contextlib.suppress(OSError):  # not print, which may be what was interrupted
            os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once, without\n")

    @property
    def number(self) -> int:
        """The signal that asked; SIGTERM where none did, as another process was asked."""
        return signal.SIGTERM if self._number is None else self._number

    def check(self) -> None:
        """Raises Stopped if that was asked for. Call it where nothing is half done."""
        if self.asked:
            raise Stopped(self.number)
