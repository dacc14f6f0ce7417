"""What passes between a run and whoever watches it: progress goes out, the wish to stop comes in."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

from settings.config import Config

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal, ten lines a run apart
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def say(*lines: str) -> None:
    """Lines on stderr; nobody has to be there to read them (`2>&1 | head`, a terminal that was closed)."""
    try:
        print("\n".join(lines), file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # else Python fails at its end, with what could not be said


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
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: somebody's who is not Python
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


class Progress:
    """A bar on a terminal, a line now and then elsewhere (and where a terminal says it has no columns); on stderr."""

    def __init__(self, config: Config, steps: int, done: int, quiet: bool = False) -> None:
        """steps: in an epoch. done: steps of a run that goes on. quiet: nothing at all."""
        self.quiet = quiet
        self.epochs = config.epochs
        total = config.epochs * steps
        bar = (
            not quiet
            and sys.stderr.isatty()
            and os.get_terminal_size(sys.stderr.fileno()).columns > 0
            and config.epochs > 0
        )
        self.bar = None
        if bar:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc=config.name, unit="step", leave=False)
        self.said = time.monotonic()

    def step(self) -> None:
        if self.bar:
            with contextlib.suppress(OSError):
                self.bar.update()

    def epoch(self, metrics: dict[str, float | int | None]) -> None:
        if self.quiet:
            return
        shown = {name: value for name, value in metrics.items() if name.endswith(("_mse", "_loss", "_accuracy"))}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self.bar:
            self.bar.set_postfix_str(text, refresh=False)
            return
        epoch, now = metrics["epoch"], time.monotonic()
        tenth = epoch * 10 // self.epochs > (epoch - 1) * 10 // self.epochs
        if tenth or now - self.said > LINE_SECONDS:
            say(f"epoch {epoch}/{self.epochs}  {text}")
            self.said = now

    def close(self) -> None:
        if self.bar:
            with contextlib.suppress(OSError):
                self.bar.close()
