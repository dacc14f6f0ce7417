"""Clipping of gradients: what is longer than a limit is shortened to it, and how long they were is measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lab.metrics import Metrics


class Clipping:
    """Shortens the gradients of these parameters together, by torch's clip_grad_norm_.

    The norms are summed on the device until the next evaluation; those that are not finite do not count.
    """

    def __init__(self, limit: float, parameters: Iterable[Tensor], device: torch.device) -> None:
        self._limit, self._parameters, self._device = limit, list(parameters), device
        self.reset()

    def reset(self) -> None:
        """Forgets the steps until here."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=self._device)  # norms, steps, steps that were clipped

    def clip(self) -> None:
        """Between the backward pass, once its loss scale is divided out, and the step. Not of one that is skipped."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._limit)
        finite = norm.isfinite()
        self._sums += torch.stack([norm.masked_fill(~finite, 0.0), finite, finite & (norm > self._limit)]).double()

    def values(self) -> Metrics:
        """The mean norm before it was clipped, and the share of the steps that were; None where no step counts."""
        norms, steps, clipped = self._sums.tolist()
        return {"gradient_norm": norms / steps if steps else None, "clipped": clipped / steps if steps else None}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])
