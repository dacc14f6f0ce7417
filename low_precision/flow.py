"""Rounding a tensor that flows through a model, and its gradient when it comes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from low_precision import loss_scale, torch_private
from low_precision.clock import Time
from low_precision.scheme import Quantizer
from low_precision.tensor import Round


class Place(NamedTuple):
    """Which rounding of a tensor that flows through a model it is: what Quantizer.__call__ has to know of it."""

    call: int
    step: int
    dim: int
    first_row: int
    notes: bool = True  # whether delayed scales learn of the tensor: in a training pass


def place_of(x: Tensor, time: Time, passes: int, training: bool, replica: int, dim: int) -> Place:
    """passes: how many forward passes there were, with this one. dim: along which groups of numbers run."""
    # Each of training and evaluation, each replica and each process has calls of its own, so that none takes another's
    # noise.
    call = 2 * (passes - 1) + training + (replica << 32) + (time.rank << 48)
    first_row = time.part.first_row(len(x)) if training and time.part.rows_before else 0
    return Place(call, time.step, dim, first_row, training and torch.is_grad_enabled())


def round_flowing(
    x: Tensor,
    value: Quantizer | None,
    error: Quantizer | None,
    time: Time,
    place: Place,
    private_value: bool = False,
    private_error: bool = False,
) -> Tensor:
    """`x` rounded by `value`, and its gradient by `error` when it comes; either may be None.

    private_value, private_error: nobody else sees the tensor, or the gradient, which is then rounded in place.
    """
    call, step, dim, first_row, notes = place
    value, error = value and value.noting(notes), error and error.noting(notes)
    round_value = partial(value, call=call, step=step, dim=dim, first_row=first_row) if value else None
    round_error = None
    if error and x.requires_grad:
        backward_passes = time.backward_passes((*error.names, place.call))
        round_error = partial(_round_error, error, place, backward_passes, private_error)
    if not private_value:
        return Round.apply(x, round_value, round_error)  # type: ignore[no-any-return, no-untyped-call]
    if round_value:
        round_value(x.detach(), out=x.detach())
    if round_error:
        x.register_hook(round_error)  # type: ignore[no-untyped-call]
    return x


def _round_error(
    error: Quantizer, place: Place, backward_passes: Iterator[int], private: bool, gradient: Tensor
) -> Tensor:
    poison = loss_scale.note_error(error, gradient)
    out = gradient if private and not gradient.requires_grad else None
    call, step, dim, first_row, _ = place
    turn = next(backward_passes)
    rounded = error(gradient, call, step, dim, out=out, first_row=first_row, backward_pass=turn)
    return rounded if poison is None else rounded.masked_fill(poison, float("nan"))


def replica_of(layer: nn.Module, x: Tensor) -> int:
    """Which of DataParallel's replicas the layer is: they run at once, one a device, and each needs its own noise."""
    return (x.device.index or 0) if torch_private.is_replica(layer) else 0
