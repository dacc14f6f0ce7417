"""What a person sees of a run on stderr: progress, and lines that work as they stand."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import low_precision
from settings.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from lab.plan import Plan

EVALUATION_SECONDS = 10.0  # where there is no terminal: between two lines of evaluations, tenths of a run aside
STEP_SECONDS = 30.0  # and the longest time without a line, between two evaluations too
REFRESH_SECONDS = 1.0  # on a terminal: between two looks at the loss, each of which waits for the device


def say(*lines: str) -> None:
    """Lines on stderr; nobody has to be there to read them (`2>&1 | head`, a terminal that was closed)."""
    try:
        print("\n".join(lines), file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # else Python fails at its end, with what could not be said


def in_a_line(error: BaseException) -> str:
    """What an error says; of one in a file of the user's own, where that is, first."""
    from sources.python_file import place_of

    text = " ".join(str(error).split())
    if place := place_of(error):
        return f"{place}: {type(error).__name__}{f': {text}' if text else ''}"
    return text or type(error).__name__


@contextlib.contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Inside, what the library warns of is one line on stderr, without the place in its code."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def shown(message: Warning | str, category: type[Warning], filename: str, *where: Any) -> None:
            if category is UserWarning and Path(filename).parent.name == low_precision.__name__:
                say(f"warning: {message}")
            else:
                others(message, category, filename, *where)

        warnings.showwarning = shown
        yield


def command(script: str, *words: str) -> str:
    """The command line that starts a script of this project as this process was started, from the working folder.

    The interpreter is the one that runs: "python" where the shell finds that one under the name.
    """
    interpreter = "python"
    if shutil.which(interpreter) != sys.executable:
        interpreter = _from_here(Path(sys.executable))
        if os.sep not in interpreter:  # a shell would look for it in PATH
            interpreter = sys.executable
    return shlex.join([interpreter, _from_here(Path(__file__).parent.parent / script), *words])


def _from_here(path: Path) -> str:
    """A path as one would write it in the working folder: relative where it lies below."""
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


class Progress:
    """A bar on a terminal, a line now and then elsewhere (and where a terminal says it has no columns); on stderr."""

    def __init__(self, config: Config, plan: Plan, done: int, quiet: bool = False) -> None:
        """done: steps of a run that goes on. quiet: nothing at all."""
        self.quiet, self.epochs, self.plan, self.done = quiet, config.epochs, plan, done
        self.bar = None
        if not quiet and plan.steps > 0 and _columns() > 0:
            from tqdm import tqdm

            self.bar = tqdm(
                total=plan.steps,
                initial=done,
                desc=config.name,
                leave=False,
                dynamic_ncols=True,
                # The metric comes before the bar, so that a narrow terminal shows it and shortens the bar.
                bar_format="{desc}{postfix} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
            )
        self._said = self._looked = time.monotonic()
        self._tested = ""  # the last evaluation's metric, for the bar

    def step(self, loss: Tensor) -> None:
        """A step is done; loss: its training loss, ()."""
        self.done += 1
        if self.quiet:
            return
        now = time.monotonic()
        if self.bar:
            if now - self._looked > REFRESH_SECONDS:
                self._looked = now
                self.bar.set_postfix_str(self._tested or f"training_loss {float(loss):.4g}", refresh=False)
            with contextlib.suppress(OSError):
                self.bar.update()
        elif now - self._said >= STEP_SECONDS:
            self._said = now
            say(f"{self._place_of(self.done)}  loss {float(loss):.4g}")

    def _place_of(self, step: int) -> str:
        if self.plan.by_step:
            return f"step {step}/{self.plan.steps}"
        epoch, number = divmod(step - 1, self.plan.in_epoch)
        return f"epoch {epoch + 1}/{self.epochs}  step {number + 1}/{self.plan.in_epoch}"

    def evaluated(self, metrics: dict[str, float | int | None], number: int) -> None:
        """The evaluation of that number is done, the first one being 1, with these metrics."""
        if self.quiet:
            return
        shown = {name: value for name, value in metrics.items() if name.endswith(("_mse", "_loss", "_accuracy"))}
        texts = {name: f"{name} {'-' if value is None else format(value, '.4g')}" for name, value in shown.items()}
        if self.bar:
            tested = ("testing_accuracy", "testing_mse", "testing_loss")
            self._tested = next((texts[name] for name in tested if name in texts), "")
            self.bar.set_postfix_str(self._tested, refresh=False)
            return
        evaluations, now = self.plan.evaluations, time.monotonic()
        tenth = number * 10 // evaluations > (number - 1) * 10 // evaluations
        if tenth or now - self._said > EVALUATION_SECONDS:
            epoch = f"epoch {number}/{self.epochs}"
            say("  ".join([self._place_of(self.done) if self.plan.by_step else epoch, *texts.values()]))
            self._said = now

    def close(self) -> None:
        if self.bar:
            with contextlib.suppress(OSError):
                self.bar.close()


def _columns() -> int:
    """Of the terminal that stderr is; 0 where it is none."""
    return os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0


def printable(text: str) -> str:
    """The text, with each character that a terminal would obey, but for line ends, as its escape in Python."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
