"""The matrix products of a layer, each of whose operands is rounded as that product reads it.

A layer y = x W^T has three products. The forward one multiplies the inputs x by the weights W and sums over the layer's
inputs: y[r, o] = sum over i of x[r, i] W[o, i]. On the way back comes e, the gradient with respect to y, which this
field calls the errors. The second product, dgrad, makes the gradient with respect to x and sums over the layer's
outputs: dx[r, i] = sum over o of e[r, o] W[o, i]. The third, wgrad, makes the gradient with respect to W and sums over
the rows, which are all that the layer treats alike: dW[o, i] = sum over r of e[r, o] x[r, i]. So each of x, W and e is
read by two products, and each product reads two of them: six operands.

A machine with low-precision multipliers rounds what a product reads, when it reads it. The same tensor may be rounded
twice in different ways, because numbers that share a scale lie along the sum of the product: x in groups of features
for the forward product, and in groups of rows for wgrad. What is rounded is the tensor as it is stored, unless the
operand refers to another one: then it is what that product read. Before both operands of a product are rounded, they
may be multiplied by an orthogonal matrix along its sum, which changes nothing else (transforms.py). The products
themselves are computed by PyTorch, in float32.

A factor counts as weights where it is a parameter, and as inputs otherwise. On the way back an error meets the other
factor: a weight makes the product dgrad, an input wgrad. So a product of two inputs, as in attention, has two wgrads.

Here a product is a bilinear function of two tensors: its `Form` (forms.py) tells how it is computed, how its two
gradients are, and over which dimensions each of the three sums. Rounding passes gradients straight through, so what the
way back does can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from low_precision import hadamard
from low_precision.formats import BlockFormat
from low_precision.forms import Form, Reading
from low_precision.scheme import Quantizer
from low_precision.tensor import Round
from low_precision.torch_private import transforms_are_active, untraced

Rounds = Callable[..., Tensor]  # (operand, reading, how many backward passes there were before) -> rounded


class Operand(NamedTuple):
    """How one operand is read.

    rounds: what rounds it; None: it is read as it is. is_reference: it is what another product of the three read of the
    same tensor, which `rounds` rounds again. mask: (numbers, reading) -> 1 where the gradient passes, 0 where not.
    """

    rounds: Rounds | None = None
    is_reference: bool = False
    mask: Callable[[Tensor, Reading], Tensor] | None = None


class Rotation(NamedTuple):
    """A transform of both operands of a product: hadamard.rotated by `size` numbers.

    signs: by the backward passes before. rounds: what rounds the result, or None. backend: the engine.
    """

    size: int
    signs: Callable[[int], hadamard.Sign | None]
    rounds: Callable[[Tensor], Tensor] | None
    backend: str = "auto"

    def of(self, x: Tensor, reading: Reading, turn: int) -> tuple[Tensor, Reading]:
        """The operand, transformed, and how the product reads that. It sums over one dimension."""
        z = _straight(self.rounds, self.turned(x, reading, turn))
        return z, reading._replace(are_mixed=reading.are_mixed or reading.over == (0,))

    def turned(self, x: Tensor, reading: Reading, turn: int) -> Tensor:
        """`of` without rounding."""
        (dim,) = reading.over
        return hadamard.rotated(x, dim, self.size, self.signs(turn), reading.parts, self.backend)

    def back(self, z: Tensor, reading: Reading, turn: int, length: int) -> Tensor:
        """The inverse along that dimension, which was so long."""
        (dim,) = reading.over
        return hadamard.rotated_back(z, dim, self.size, self.signs(turn), reading.parts, length, self.backend)


_STORED = Operand()  # the stored tensor as it is
# (gradient with respect to which factor, None: forward; how many backward passes there were before; result; what makes
# the result of unrounded operands)
Tell = Callable[[int | None, int, Tensor, Callable[[], Tensor]], None]


class Operands(NamedTuple):
    """How the six operands of one product y = f(a, b) are read.

    errors: the error where the gradient with respect to a is made, and to b. others: what it meets there, b and a.
    rotation, rotations: of the forward product, and of the two that make these gradients. tell: who listens.
    """

    forward: tuple[Operand, Operand] = (_STORED, _STORED)
    errors: tuple[Operand, Operand] = (_STORED, _STORED)
    others: tuple[Operand, Operand] = (_STORED, _STORED)
    rotation: Rotation | None = None
    rotations: tuple[Rotation | None, Rotation | None] = (None, None)
    tell: Tell | None = None


class Product(torch.autograd.Function):
    """y = f(a, b) + bias, with rounded operands; see the top of this file. Product.apply(a, b, bias, form, operands,
    backward_passes), of which bias may be None.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, bias: Tensor | None, form: Form, operands: Operands, backward_passes: Iterator[int]
    ) -> Tensor:
        readings = form.readings_forward(a, b)
        rotation, (of_a, of_b) = operands.rotation, operands.forward
        read = _read(of_a, a, readings[0], rotation, 0), _read(of_b, b, readings[1], rotation, 0)
        with in_float32(a.device):
            y = form.forward(*read, bias)
        if operands.tell is not None:
            with in_float32(a.device):  # the product alone, without its bias
                rounded = y if bias is None else form.forward(*read, None)
                operands.tell(None, 0, rounded, lambda: form.forward(a, b, None))
        # .data, or in a transform a copy: einsum's result is a view, on which autograd refuses in-place functions.
        return y.clone() if transforms_are_active() else y.data

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, _, ctx.form, ctx.operands, ctx.backward_passes = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    @untraced
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        way_back = _WayBack(ctx.form, ctx.operands, (a, b), error, next(ctx.backward_passes))
        gradient_a = way_back.gradient(0) if ctx.needs_input_grad[0] else None
        gradient_b = way_back.gradient(1) if ctx.needs_input_grad[1] else None
        gradient_bias = ctx.form.gradient_bias(error, a, b) if ctx.needs_input_grad[2] else None
        return gradient_a, gradient_b, gradient_bias, None, None, None


class _WayBack:
    """One backward pass through a product: the gradients with respect to its factors, 0 and 1."""

    def __init__(
        self, form: Form, operands: Operands, factors: tuple[Tensor, Tensor], error: Tensor, turn: int
    ) -> None:
        """turn: how many backward passes there were before."""
        self._form, self._operands, self._factors, self._error, self._turn = form, operands, factors, error, turn
        self._forward = form.readings_forward(*factors)
        self._readings = form.readings_a(error, factors[1]), form.readings_b(error, factors[0])

    def gradient(self, of: int) -> Tensor:
        """With respect to that factor."""
        operands, rotation, other = self._operands, self._operands.rotations[of], 1 - of
        reading_of_error, reading_of_other = self._readings[of]
        # Where an operand is what another product read, and that was transformed, so is this product's result: along
        # the sum of that other product, in which the factor has the same place.
        turned: list[tuple[Rotation, Reading, int]] = []
        error, met = self._error, self._factors[other]
        if operands.errors[of].is_reference:
            # Rounding is a function of tensor and key: the same numbers once more, and nothing to keep until now.
            error, of_named = self._read_error(other)
            reading_of_error = reading_of_error._replace(are_mixed=of_named.are_mixed)
            if named := operands.rotations[other]:
                turned.append((named, self._readings[other][1], self._turn))
        if operands.others[of].is_reference:
            met = _read(operands.forward[other], met, self._forward[other], operands.rotation, 0)
            if operands.rotation:
                turned.append((operands.rotation, self._forward[of], 0))
        read = (
            _read(operands.errors[of], error, reading_of_error, rotation, self._turn),
            _read(operands.others[of], met, reading_of_other, rotation, self._turn),
        )
        multiply = self._form.gradient_b if of else self._form.gradient_a
        with in_float32(error.device):
            gradient = multiply(*read, self._shaped(of, turned))
        if operands.forward[of].mask:
            gradient = self._masked(gradient, of, turned)
        for rotation, reading, turn in turned:
            gradient = rotation.back(gradient, reading, turn, self._factors[of].shape[reading.over[0]])
        if operands.tell is not None:
            with in_float32(gradient.device):
                exact = partial(multiply, self._error, self._factors[other], self._factors[of])
                operands.tell(of, self._turn, gradient, exact)
        return gradient

    def _shaped(self, of: int, turned: list[tuple[Rotation, Reading, int]]) -> Tensor:
        """A tensor with the shape of the product's result: the factor's, filled where it was transformed."""
        factor = self._factors[of]
        if not turned:
            return factor
        shape = list(factor.shape)
        for rotation, reading, _ in turned:
            (dim,) = reading.over
            shape[dim] = hadamard.filled_length(shape[dim], rotation.size, reading.parts)
        return factor.new_empty(shape)

    def _masked(self, gradient: Tensor, of: int, turned: list[tuple[Rotation, Reading, int]]) -> Tensor:
        """The gradient where the forward product's operand lets it pass, in the space in which that was rounded."""
        operands, factor, reading = self._operands, self._factors[of].detach(), self._forward[of]
        mask = operands.forward[of].mask
        assert mask is not None
        if operands.rotation is None:
            return gradient * mask(factor, reading)
        numbers, reading = operands.rotation.of(factor, reading, 0)
        if not operands.others[of].is_reference:
            gradient = operands.rotation.turned(gradient, reading, 0)
            turned.append((operands.rotation, reading, 0))
        return gradient * mask(numbers, reading)

    def _read_error(self, of: int) -> tuple[Tensor, Reading]:
        """The error as the product reads it that makes the gradient with respect to that factor."""
        rotation, reading = self._operands.rotations[of], self._readings[of][0]
        read = _read(self._operands.errors[of], self._error, reading, rotation, self._turn)
        return read, reading._replace(are_mixed=rotation is not None and reading.over[:1] == (0,))


@contextmanager
def in_float32(device: torch.device) -> Iterator[None]:
    """Inside, products are computed in float32: not by autocast, nor in TF32 or bfloat16 as torch may be told to."""
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    try:
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        if convolutions and device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)
        if convolutions and device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = convolutions


def _read(operand: Operand, x: Tensor, reading: Reading, rotation: Rotation | None, turn: int) -> Tensor:
    """The operand as the product reads it; its gradient passes straight through what rounds it."""
    if rotation:
        x, reading = rotation.of(x, reading, turn)
    rounds = operand.rounds
    return _straight(None if rounds is None else lambda x: rounds(x, reading, turn), x)


def _straight(rounds: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    """The rounded tensor, whose gradient is that of the tensor."""
    if rounds is None:
        return x
    if x.requires_grad and torch.is_grad_enabled():
        return Round.apply(x, rounds, None)  # type: ignore[no-any-return, no-untyped-call]
    return rounds(x)


def round_operand(
    quantizer: Quantizer, operand: Tensor, reading: Reading, call: int, step: int, first_row: int, turn: int
) -> Tensor:
    """The operand, rounded, with groups of numbers that share a scale along the sum; the same shape.

    call, step: as Quantizer takes them. first_row: how many rows, by the operand's first dimension, of the whole batch
    come before those of this process; 0 for weights. turn: how many backward passes there were before.
    """
    format = quantizer.rule.format
    if operand.numel() == 0:
        return operand
    if reading.are_mixed:  # no row is one of the batch: the noise is each process's own
        first_row, turn = 0, turn + (first_row << 16)
    if operand.ndim == 0:
        return round_operand(quantizer, operand.reshape(1), Reading(()), call, step, first_row, turn).reshape(())
    if not isinstance(format, BlockFormat) or format.block == "tensor" or format.is_flat:
        return quantizer(operand, call, step, first_row=first_row, backward_pass=turn)
    if format.sizes is not None and format.sizes[0] == 1:
        return _in_groups(quantizer, operand, reading, call, step, first_row, turn)
    lines = [d for d in range(operand.ndim) if d not in reading.over and d not in reading.batch]
    order = [*reading.batch, *lines, *reading.over]
    moved = operand.permute(order)
    matrices = moved.shape[: len(reading.batch)].numel()
    summed = moved.shape[len(order) - len(reading.over) :].numel()
    if format.sizes is not None:  # MxN: lines beside each other share a scale, in each matrix
        return _in_tiles(quantizer, operand, moved.reshape(matrices, -1, summed), order, call, step, first_row, turn)
    if order[0] == 0 and format.block != "column":
        rows_before = first_row * (operand.numel() // summed) // max(len(operand), 1)
    else:  # groups span the rows: they are each process's own, and so is their noise
        rows_before, turn = 0, turn + (first_row << 16)
    if format.block == "column":  # one scale for each index of the sum, in each matrix
        by_row = quantizer.with_format(replace(format, block="row"))
        columns = moved.reshape(matrices, -1, summed).mT
        rounded = by_row(columns.reshape(matrices * summed, -1), call, step, dim=1, backward_pass=turn)
        rounded = rounded.reshape(columns.shape).mT
    else:
        rows = moved.reshape(-1, summed)
        rounded = quantizer(rows, call, step, dim=1, first_row=rows_before, backward_pass=turn)
    result = rounded.reshape(moved.shape).permute([order.index(d) for d in range(operand.ndim)])
    return _in_layout_of(operand, result)


def _in_groups(
    quantizer: Quantizer, operand: Tensor, reading: Reading, call: int, step: int, first_row: int, turn: int
) -> Tensor:
    """round_operand for groups of so many numbers along the sum."""
    over = reading.over or (operand.ndim,)  # of a sum of one number, a dimension of its own
    if over[0] == 0:  # groups span the rows: they are each process's own, and so is their noise
        first_row, turn = 0, turn + (first_row << 16)
    # The dimensions of a sum are neighbours, and become one: without a copy where they are one in memory.
    summed = operand.unsqueeze(-1) if not reading.over else operand
    summed = summed.flatten(over[0], over[-1]) if len(over) > 1 else summed
    rounded = quantizer(summed, call, step, dim=over[0], first_row=first_row, backward_pass=turn).view(operand.shape)
    return _in_layout_of(operand, rounded)


def _in_tiles(
    quantizer: Quantizer,
    operand: Tensor,
    matrices: Tensor,
    order: list[int],
    call: int,
    step: int,
    first_row: int,
    turn: int,
) -> Tensor:
    """round_operand for groups of MxN. matrices: the operand as (matrices, lines, sum), its dimensions in `order`."""
    x = matrices[0] if len(matrices) == 1 else matrices
    if order[0] == 0:
        rows_before = first_row * len(x) // max(len(operand), 1)
    else:  # groups span the rows: they are each process's own, and so is their noise
        rows_before, turn = 0, turn + (first_row << 16)
    rounded = quantizer(x, call, step, dim=x.ndim - 1, first_row=rows_before, backward_pass=turn)
    moved = rounded.reshape([operand.shape[d] for d in order])
    return _in_layout_of(operand, moved.permute([order.index(d) for d in range(operand.ndim)]))


def _in_layout_of(operand: Tensor, rounded: Tensor) -> Tensor:
    """That layout decides that of the product's result, and which kernel of torch computes it."""
    return rounded if rounded.stride() == operand.stride() else torch.empty_like(operand).copy_(rounded)
