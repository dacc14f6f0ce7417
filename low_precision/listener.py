"""Who may listen to what one model rounds: a clock's `watcher`. This one hears nothing; watcher.Watcher does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from low_precision.rules import Rule


class Rounder(Protocol):
    """What rounds one named tensor: scheme.Quantizer."""

    names: tuple[str, str]  # of the site and the tensor
    site: str  # as it is shown: of an optimizer's state with its name
    rule: Rule


class Kept(Protocol):
    """The weights of a model, and what stands behind them: weights.Weights."""

    masters: dict[Tensor, Tensor]
    lost: dict[Tensor, Tensor]

    def rounder(self, site: str, p: Tensor) -> Rounder | None: ...


class Listener:
    """Hears of roundings, products and updates; what it does with them changes nothing."""

    @property
    def is_on(self) -> bool:
        """Whether it listens in this step; of the optimizer's steps it hears in any case."""
        return False

    @property
    def tries(self) -> bool:
        """Whether what is multiplied in this step is tried with other rules too."""
        return False

    def begin_part(self) -> None:
        """Another part of the step's batch passes now: its roundings are not those of an earlier part again."""

    def before(self, rounder: Rounder, x: Tensor, in_place: bool, *number: object) -> Tensor | None:
        """x as it is before it is rounded, to be passed to `rounded`; None where that is not wanted.

        number: what tells this rounding apart from others by the same rounder in this step.
        """
        return None

    def rounded(
        self, rounder: Rounder, x: Tensor, rounded: Tensor, dim: int, scale: Tensor | None, also: str = ""
    ) -> None:
        """x was rounded. dim, scale: as quantize() takes them. also: what is tried, where it is not in use."""

    def product(
        self,
        site: str,
        layer: str,
        number: tuple[object, ...],
        result: Tensor,
        exact: Callable[[], Tensor],
        also: str = "",
    ) -> None:
        """A product of rounded operands was computed. site: forward, dgrad or wgrad. exact: of unrounded operands."""

    def found(self, weights: Kept, parameters: Sequence[Tensor]) -> None:
        """An optimizer is about to find these parameters."""

    def update(self, weights: Kept, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Inside, what an optimizer made of these parameters is taken over."""
        return nullcontext()

    def tried_update(self, rounder: Rounder, also: str, sums: Tensor) -> None:
        """What would have become of an update, as losses.of_update gives it."""

    def begin(self, step: int) -> None:
        """From now on all is of that step."""

    def end_step(self) -> None:
        """The optimizer has stepped."""

    def try_call(
        self, frame: Any, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Callable[[Any], None]:
        """A module is about to call a function with products. Returns what is to be called with its result."""
        return lambda result: None

    def try_gradients(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """The gradients before they are rounded."""

    def try_states(self, optimizer: torch.optim.Optimizer) -> None:
        """What an optimizer remembers after its step, before that is rounded."""
