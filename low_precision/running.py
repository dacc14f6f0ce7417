"""Which module is running, and the mode of torch that sees the functions it calls.

A module multiplies by calling a function: torch.nn.functional.linear, a convolution, `@`. While a rounded model runs, a
TorchFunctionMode of torch stands between the two. Hooks of each module put a frame on this thread's stack, so that the
mode knows who calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from low_precision import attention, clock, elementwise, torch_private
from low_precision.calls import Call, Frame, ModuleRounding
from low_precision.flow import replica_of
from low_precision.functions import FUNCTIONS
from low_precision.names import multiplies
from low_precision.torch_private import untraced


class FunctionMode(TorchFunctionMode):
    """Hands the calls of functions over to what rounds them: one for each thread, active while modules run."""

    def __init__(self) -> None:
        super().__init__()
        self.sees_all = False  # functions without products too

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:
        if self.sees_all or function in FUNCTIONS:
            return _call(function, arguments, named or {})
        return function(*arguments, **(named or {}))


class _Thread(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []  # the modules that run, the innermost last
        self.mode = FunctionMode()
        self.is_active = False  # the mode
        self.is_lent = False  # it is off the stack while a layer runs
        self.hidden = 0  # inside so many blocks of `hidden`
        self.is_tried = False  # the call that runs: what it calls is a part of it


_thread = _Thread()


@untraced  # to torch.compile, step and call would be constants: it would compile anew for each of them
def _call(function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The function's result, computed and rounded as the module that runs has it."""
    frame = _innermost()
    if frame is None:
        return function(*arguments, **named)
    watcher = frame.rounding.clock.watcher
    if watcher is None or not watcher.tries or _thread.is_tried or function not in FUNCTIONS:
        return _called(frame, function, arguments, named)
    ended = watcher.try_call(frame, function, arguments, named)  # before the call, which may work in place
    _thread.is_tried = True
    try:
        result = _called(frame, function, arguments, named)
    finally:
        _thread.is_tried = False
    ended(result)
    return result


def call_in(frame: Frame, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The function's result as the module of that frame has it, beside the modules that run."""
    _thread.frames.append(frame)
    try:
        return _called(frame, function, arguments, named)
    finally:
        _thread.frames.pop()


def _called(frame: Frame, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The function's result as that module has it."""
    rounding, notes = frame.rounding, frame.rounding.run.notes
    row = FUNCTIONS.get(function)
    if row is not None and (rounding.has_products or rounding.has_elementwise):
        part = attention.part_of(frame.attention, row.name)
        call = Call(frame, row.name, function, _thread.mode)
        if call.is_layers and not rounding.has_operands:
            if notes is not None:
                call.note_native(elementwise.flat((*arguments, *named.values())))
            return function(*arguments, **named)
        return (part or row.compute)(call, *arguments, **named)
    if row is None and rounding.has_elementwise and not multiplies(function):
        return elementwise.compute(frame, function, _thread.mode, arguments, named)
    result = function(*arguments, **named)
    if notes is not None:
        read = elementwise.flat((*arguments, *named.values()))
        if row is not None:
            Call(frame, row.name, function, _thread.mode).note_native(read)
        else:
            notes.function(frame.caller, function, read, elementwise.flat([result]))
    return result


def _innermost() -> Frame | None:
    """The module that runs, if what it calls is to be rounded."""
    if _thread.hidden or not _thread.frames:
        return None
    _drop_interrupted()
    if not _thread.frames:
        return None
    frame = _thread.frames[-1]
    return None if frame.time.paused else frame


def _drop_interrupted() -> None:
    """Forgets the modules that run no more, though no hook was told, as after Ctrl-C."""
    frames = _thread.frames
    if frames and frames[-1].call_frame is not None and not torch_private.is_running(frames[-1].call_frame):
        frames.clear()


def innermost(module: nn.Module) -> Frame | None:
    """The frame of this module, if it is the innermost that runs."""
    frames = _thread.frames
    return frames[-1] if frames and frames[-1].module is module else None


class ModuleHooks:
    """The hooks of one module that say when it runs."""

    def __init__(self, rounding: ModuleRounding) -> None:
        self.rounding = rounding

    @untraced
    def begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook, the first one."""
        time = self.rounding.clock.now()
        x = next((x for x in arguments if isinstance(x, Tensor)), None)
        replica = 0 if x is None else replica_of(module, x)
        if self.rounding.run.notes is not None:
            self.rounding.run.notes.modules.add(self.rounding.name)
        give_back()
        _drop_interrupted()
        _thread.frames.append(Frame(self.rounding, module, time, replica, torch_private.module_call()))
        if len(_thread.frames) == 1 or _thread.frames[-2].rounding.run is not self.rounding.run:
            self.rounding.run.begin()
        if len(_thread.frames) == 1:
            _activate()
        _look()

    @untraced
    def end(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """A forward hook, called after an error too."""
        give_back()
        # After an error it may be called though `begin` was not.
        if _thread.frames and _thread.frames[-1].module is module:
            _thread.frames.pop()
            if not _thread.frames:
                _deactivate()
            _look()


def _activate() -> None:
    if not _thread.is_active:
        _thread.is_active = True
        torch_private.show_mode(_thread.mode)


def _deactivate() -> None:
    # Another mode may lie above, where a call was interrupted: then this one stays, and sees no module.
    if _thread.is_active and torch_private.hide_mode(_thread.mode):
        _thread.is_active = False


def lend() -> None:
    """A layer runs to whose function hooks do all that there is to do: the mode is off until `give_back`."""
    if _thread.is_active and not _thread.is_lent:
        _thread.is_lent = torch_private.hide_mode(_thread.mode)


def give_back() -> None:
    """Takes `lend` back."""
    if _thread.is_lent:
        _thread.is_lent = False
        torch_private.show_mode(_thread.mode)


def is_seen() -> bool:
    """Whether the mode would see a function that is called now."""
    return _thread.is_active and not _thread.is_lent


# Of the modules of torch, those that call functions with products, beside layers.
_MULTIPLYING = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention)


def needs_frame(module: nn.Module, rounding: ModuleRounding) -> bool:
    """Whether functions that the module calls are rounded, or must not be taken for its container's."""
    if rounding.has_elementwise:
        return True
    if rounding.is_layer:
        return not (rounding.is_plain_layer and rounding.has_products)  # else its hooks do all that there is to do
    is_torchs = type(module).__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)
    return not is_torchs or isinstance(module, _MULTIPLYING)


def _look() -> None:
    """Tells the mode what it has to look at for the innermost module."""
    frames, mode = _thread.frames, _thread.mode
    rounding = frames[-1].rounding if frames else None
    sees_all = rounding is not None and (rounding.has_elementwise or rounding.run.notes is not None)
    if mode.sees_all != sees_all:
        mode.sees_all = sees_all


class hidden:
    """`with hidden():` what runs inside is no part of the model: the mode does not see it."""

    def __enter__(self) -> None:
        _thread.hidden += 1
        self._popped = bool(_thread.frames) and torch_private.hide_mode(_thread.mode)

    def __exit__(self, *error: object) -> None:
        _thread.hidden -= 1
        if self._popped:
            torch_private.show_mode(_thread.mode)


def _noted() -> Callable[[], AbstractContextManager[None]]:
    """For clock.FirstRun: what runs again runs in the modules that run now."""
    frames = [frame.copy() for frame in _thread.frames]

    @contextmanager
    def again() -> Iterator[None]:
        before = _thread.frames
        _thread.frames = [frame.copy() for frame in frames]
        for frame in _thread.frames:
            frame.time = frame.rounding.clock.now()
        was_active = _thread.is_active
        if frames:
            _activate()
        _look()
        try:
            yield
        finally:
            if not was_active:
                _deactivate()
            _thread.frames = before
            _look()

    return again


clock.on_first_run(_noted)
