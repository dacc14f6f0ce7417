"""Loss scaling: a factor on the loss, and the watch for what overflows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from low_precision.errors import SettingError, nearest

INITIAL_SCALE = 65536.0  # torch.amp's numbers, as the growth interval
GROWTH_INTERVAL = 2000  # steps without an overflow, after which the scale is doubled
SMALLEST_SCALE = 2.0**-24


class LossScale:
    """A factor on the loss that keeps small errors above the format's smallest value; divided out before the optimizer.

    scale: a number above 0, or "dynamic": from 65536, halved after a step whose errors or gradients overflow or are
    not finite (that step is skipped), doubled after 2000 steps without (Micikevicius et al. 2018; torch.amp's numbers).
    SettingError for anything else.
    """

    def __init__(self, scale: float | str = 1.0) -> None:
        self.dynamic = scale == "dynamic"
        if isinstance(scale, str):
            if not self.dynamic:
                raise SettingError("loss scale", repr(scale), "a number > 0, or dynamic", nearest(scale, ("dynamic",)))
            scale = INITIAL_SCALE
        elif not (isinstance(scale, int | float) and 0 < scale < float("inf")):
            raise SettingError("loss scale", repr(scale), "a number > 0, or dynamic")
        self.value = float(scale)
        self.clean_steps = 0  # since the scale last moved
        self.skipped = 0

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward() on."""
        return loss if self.value == 1.0 else loss * self.value

    def update(self, overflowed: bool) -> None:
        """Ends one step of dynamic scaling."""
        self.clean_steps = 0 if overflowed else self.clean_steps + 1
        if overflowed:
            self.skipped += 1
            self.value = max(self.value / 2, SMALLEST_SCALE)
        elif self.clean_steps == GROWTH_INTERVAL:
            self.value, self.clean_steps = self.value * 2, 0

    def state_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "clean_steps": self.clean_steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self.value = float(state["value"])
        self.clean_steps, self.skipped = int(state["clean_steps"]), int(state["skipped"])


class OverflowWatch:
    """Whether an error was beyond its format since the last step; looked at only where dynamic loss scaling asks."""

    def __init__(self) -> None:
        self.active = False
        self.over_processes: Callable[[bool], bool] | None = None  # one process's answer -> whether any of them says so
        # bool () by device. Each device has a place of its own: replicas go back in threads of their own.
        self._overflowed: dict[torch.device, Tensor] = {}

    def note(self, overflowed: Tensor) -> None:
        """Adds what was seen of one error, bool (), without waiting for its device."""
        before = self._overflowed.get(overflowed.device)
        self._overflowed[overflowed.device] = overflowed if before is None else before | overflowed

    def take(self, *further: Tensor) -> bool:
        """Whether there was an overflow in any process, or is one in `further`, bool () each; then forgets it."""
        overflowed = any(bool(flag) for flag in (*self._overflowed.values(), *further))
        self._overflowed.clear()
        return self.over_processes(overflowed) if self.over_processes else overflowed
