"""Which modules of a model say when they run, so that functions they call are rounded, or noted under their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from low_precision import by_layer
from low_precision.calls import ModelRun, ModuleRounding
from low_precision.clock import Clock
from low_precision.layers import LAYER_TYPES, LayerRounding, type_of
from low_precision.running import ModuleHooks, needs_frame
from low_precision.scheme import Scheme


class Frames:
    """The hooks of one model by which its modules say when they run."""

    def __init__(self, model: nn.Module, scheme: Scheme, layers: list[str] | None, clock: Clock, run: ModelRun) -> None:
        """layers: patterns of the modules that are rounded."""
        self._model, self._scheme, self._layers, self._clock, self._run = model, scheme, layers, clock, run
        self._framed: list[nn.Module] = []  # those that say so in each pass
        self._root: ModuleHooks | None = None  # the model's own, where it has one
        self._passing: list[Any] = []  # hooks by which others do so during one pass

    def register(self, everywhere: bool = False) -> list[Any]:
        """Registers the hooks where they are needed and not there yet, and returns them.

        everywhere: for all modules, so that what they call is noted under their names.
        """
        hooks: list[Any] = []
        known = set(map(id, self._framed))
        # Those that lines leave alone too: what they call is not their container's.
        for name, module in by_layer.select(self._model, self._layers).items():
            if id(module) in known or isinstance(module, LayerRounding):
                continue
            scheme, kind = self._scheme.of(name), type_of(module)
            rounding = ModuleRounding(
                scheme, name, self._clock, self._run, kind is not None, type(module) in LAYER_TYPES
            )
            if everywhere or needs_frame(module, rounding):
                if not everywhere:
                    self._framed.append(module)
                frame = ModuleHooks(rounding)
                self._root = frame if module is self._model else self._root
                hooks.append(module.register_forward_pre_hook(frame.begin, prepend=True))
                hooks.append(module.register_forward_hook(frame.end, always_call=True))
        return hooks

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside, each module says when it runs."""
        for hook in self._passing:  # of a pass that was interrupted
            hook.remove()
        hooks = self._passing = self.register(everywhere=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self, arguments: tuple[Any, ...]) -> None:
        """Where `everywhere` begins in a hook of the model: it runs, and the hook that says so came too late for it."""
        if self._root and not any(module is self._model for module in self._framed):
            self._root.begin(self._model, arguments)

    def end(self) -> None:
        """Where `everywhere` has ended in a hook of the model: nobody says any more that it runs."""
        if self._root and not any(module is self._model for module in self._framed):
            self._root.end(self._model, (), None)
