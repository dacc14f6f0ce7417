"""The first forward pass of a model, of training and of evaluation each: noted, and what no site reached is said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from low_precision import reach, torch_private
from low_precision.calls import ModelRun
from low_precision.noted import Notes
from low_precision.rules import ELEMENTWISE, FLOWING
from low_precision.scheme import Scheme

_FORWARD = ("inputs", "activations", ELEMENTWISE, "forward.inputs", "forward.weights")  # what a forward pass reaches


class Listening:
    """Listens to one model."""

    def __init__(self, run: ModelRun) -> None:
        self._run = run
        self.modes: set[bool] = set()  # of training (with gradients), whose next forward pass is noted
        self.notes: dict[bool, Notes] = {}  # by mode of training, of the first forward pass
        self._named: set[tuple[str, str, str]] = set()  # products that a warning has named
        self._is_checked = False  # whether sites of the backward pass were looked for
        self._call: FrameType | None = None  # Python's frame of the forward pass that is noted
        self._hook: Any = None  # at the end of that pass

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_call": None, "_hook": None}

    def start(self) -> None:
        """The model is another one from now on."""
        self.modes, self._is_checked = {True, False}, False

    def give_up(self) -> None:
        """The model is compiled, so nobody can listen."""
        self.modes.clear()
        if not self.notes:
            reach.warn_compiled()

    def first_pass(
        self,
        model: nn.Module,
        sites: list[str],
        scheme: Scheme,
        done: Callable[[Notes, bool], None],
        during: AbstractContextManager[None],
    ) -> bool:
        """Notes the forward pass that begins. At its end, products that are not rounded are named in a warning.

        SettingError there for a site, a line or a transform that there was nothing for. done: called with the notes
        before, and with whether it is the first pass of all. sites: those that round something. during: entered until
        the pass ends.
        False for a pass inside of another first pass, or beside it, which is not noted.
        """
        call = torch_private.module_call()
        if self._call is not None:
            if torch_private.is_running_in_a_thread(self._call):  # this pass is inside of that one, or beside it
                return False
            self._hook.remove()  # that one was interrupted, as by Ctrl-C, and no hook was told
        self._call = call
        training, is_first = model.training and torch.is_grad_enabled(), len(self.modes) == 2
        notes = self._run.notes = self.notes[training] = Notes()
        stack = ExitStack()
        stack.enter_context(during)

        def end(model: nn.Module, arguments: Any, output: Any) -> None:
            if call is not None and torch_private.module_call() is not call:
                return  # another pass, inside of this one or in another thread
            self._run.notes = self._call = None
            self._hook.remove()
            stack.close()
            reach.warn(place for place in notes.unreached if place not in self._named)
            self._named.update(notes.unreached)
            if output is None and sys.exc_info()[0] is not None:  # an error: what comes behind it was not heard
                del self.notes[training]
                return
            done(notes, is_first)
            reach.check(sites, scheme.lines, notes, _FORWARD, scheme.weights_only)
            reach.check_transforms(scheme.transforms, notes, _FORWARD, scheme.weights_only)
            self.modes.discard(training)

        self._hook = model.register_forward_hook(end, always_call=True)
        return True

    def check_backward(self, sites: Callable[[], list[str]], scheme: Scheme) -> None:
        """SettingError, before an optimizer's step, for what there was nothing for in the first training pass."""
        if not self._is_checked and True in self.notes:
            reach.check(sites(), scheme.lines, self.notes[True], FLOWING, scheme.weights_only)
            reach.check_transforms(scheme.transforms, self.notes[True], FLOWING, scheme.weights_only)
            self._is_checked = True

    def shown(self, module: str) -> list[str]:
        """The functions that the module of that name called, with their rules."""
        return list(dict.fromkeys(line for notes in self.notes.values() for line in notes.shown(module)))

    @contextmanager
    def aside(self) -> Iterator[Notes]:
        """The notes of the forward pass that is made inside; it does not count as a first one."""
        modes, self.modes = self.modes, set()
        notes = self._run.notes = Notes()
        try:
            yield notes
        finally:
            self._run.notes, self.modes = None, modes
