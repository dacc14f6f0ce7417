"""The matrix products of a layer, each of whose operands is rounded as that product reads it.

A layer y = x W^T has three products. The forward one multiplies the inputs x by the weights W and sums over the layer's
inputs: y[r, o] = sum over i of x[r, i] W[o, i]. On the way back comes e, the gradient with respect to y, which this
field calls the errors. The second product, dgrad, makes the gradient with respect to x and sums over the layer's
outputs: dx[r, i] = sum over o of e[r, o] W[o, i]. The third, wgrad, makes the gradient with respect to W and sums over
the rows, which are all that the layer treats alike: dW[o, i] = sum over r of e[r, o] x[r, i]. So each of x, W and e is
read by two products, and each product reads two of them: six operands.

A machine with low-precision multipliers rounds what a product reads, when it reads it. The same tensor may be rounded
twice in different ways, because numbers that share a scale lie along the sum of the product: x in groups of features
for the forward product, and in groups of rows for wgrad. What is rounded is the tensor as it is stored, and not what
the other product read. The products themselves are computed by PyTorch, in float32.

A factor counts as weights where it is a parameter, and as inputs otherwise. On the way back an error meets the other
factor: a weight makes the product dgrad, an input wgrad. So a product of two inputs, as in attention, has two wgrads.

Here a product is a bilinear function of two tensors: a `Form` tells how it is computed, how its two gradients are, and
over which dimensions each of the three sums. Rounding passes gradients straight through, so what the way back does can
be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from low_precision.formats import BlockFormat
from low_precision.scheme import Quantizer
from low_precision.tensor import Round
from low_precision.torch_private import transforms_are_active, untraced


class Reading(NamedTuple):
    """How a product reads an operand, by dimensions: `over` which it sums, and which count matrices of their own.

    The others are the lines of the matrix; along a line lies what is summed.
    """

    over: tuple[int, ...]
    batch: tuple[int, ...] = ()


class Form(Protocol):
    """A bilinear function y = f(a, b), plus a bias where it has one, and its gradients.

    Each method of three products takes operands that are rounded already. reading_*: how the product whose result that
    is reads its two operands.
    """

    def forward(self, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor: ...

    def gradient_a(self, error: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """a: for its shape alone."""
        ...

    def gradient_b(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """b: for its shape alone."""
        ...

    def gradient_bias(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """a, b: for their shapes alone."""
        ...

    def readings_forward(self, a: Tensor, b: Tensor) -> tuple[Reading, Reading]: ...

    def readings_a(self, error: Tensor, b: Tensor) -> tuple[Reading, Reading]: ...

    def readings_b(self, error: Tensor, a: Tensor) -> tuple[Reading, Reading]: ...


@dataclass(frozen=True)
class Linear:
    """y = x W^T: x (..., inputs), W (outputs, inputs) or (inputs,), y (..., outputs). torch.nn.functional.linear."""

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, w, bias)

    def gradient_a(self, error: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return error @ w

    def gradient_b(self, error: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return _as_rows(error).t() @ _as_rows(x)

    def gradient_bias(self, error: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return _as_rows(error).sum(0)

    def readings_forward(self, x: Tensor, w: Tensor) -> tuple[Reading, Reading]:
        return Reading((x.ndim - 1,)), Reading((1,))

    def readings_a(self, error: Tensor, w: Tensor) -> tuple[Reading, Reading]:
        return Reading((error.ndim - 1,)), Reading((0,))

    def readings_b(self, error: Tensor, x: Tensor) -> tuple[Reading, Reading]:
        return Reading(tuple(range(error.ndim - 1))), Reading(tuple(range(x.ndim - 1)))


@dataclass(frozen=True)
class Convolution:
    """A convolution of images (samples, channels, *pixels), or a transposed one, as torch.nn.functional has them.

    Groups of numbers that share a scale run along channels: those of input and weight in the forward product, the
    layer's outputs in dgrad; in wgrad along the samples of the batch (as microxcaling does it). A sum over a kernel's
    pixels is left to the product.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        name = f"conv_transpose{x.ndim - 2}d" if self.transposed else f"conv{x.ndim - 2}d"
        convolve: Callable[..., Tensor] = getattr(F, name)
        if self.transposed:
            return convolve(x, w, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return convolve(x, w, bias, self.stride, self.padding, self.dilation, self.groups)

    def gradient_a(self, error: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return self._backward(error, x, w, [True, False, False])[0]

    def gradient_b(self, error: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(error, x, w, [False, True, False])[1]

    def gradient_bias(self, error: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(error, x, w, [False, False, True])[2]

    def readings_forward(self, x: Tensor, w: Tensor) -> tuple[Reading, Reading]:
        return Reading((1,)), Reading((0 if self.transposed else 1,))

    def readings_a(self, error: Tensor, w: Tensor) -> tuple[Reading, Reading]:
        return Reading((1,)), Reading((1 if self.transposed else 0,))

    def readings_b(self, error: Tensor, x: Tensor) -> tuple[Reading, Reading]:
        return Reading((0,)), Reading((0,))

    def _settings(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    def _backward(self, error: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        """The gradients with respect to x, w and bias, of which the mask says which are wanted."""
        outputs = [error.shape[1]]
        gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            error, x, w, outputs, *self._settings(), mask
        )
        return gradients


@dataclass(frozen=True)
class Matmul:
    """y = a b: a (..., M, K), b (..., K, N), y (..., M, N).

    matrices: how many leading dimensions all three have, equal ones, which count matrices of their own; with 0, b is
    one matrix, and all leading dimensions of a are rows.
    """

    matrices: int

    def forward(self, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        y = a @ b
        return y if bias is None else y + bias

    def gradient_a(self, error: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return error @ b.mT

    def gradient_b(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a.mT @ error if self.matrices else _as_rows(a).t() @ _as_rows(error)

    def gradient_bias(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return error

    def readings_forward(self, a: Tensor, b: Tensor) -> tuple[Reading, Reading]:
        return self._along(a, -1), self._along(b, -2)

    def readings_a(self, error: Tensor, b: Tensor) -> tuple[Reading, Reading]:
        return self._along(error, -1), self._along(b, -1)

    def readings_b(self, error: Tensor, a: Tensor) -> tuple[Reading, Reading]:
        return self._along_rows(error), self._along_rows(a)

    def _along(self, x: Tensor, over: int) -> Reading:
        return Reading((x.ndim + over,), tuple(range(self.matrices)))

    def _along_rows(self, x: Tensor) -> Reading:
        return Reading(tuple(range(self.matrices, x.ndim - 1)), tuple(range(self.matrices)))


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


Rounds = Callable[..., Tensor]  # (operand, reading, how many backward passes there were before) -> rounded


class Operands(NamedTuple):
    """What rounds the six operands of one product y = f(a, b); None: the stored tensor is read as it is."""

    forward_a: Rounds | None = None
    forward_b: Rounds | None = None
    error_a: Rounds | None = None  # the error, where the gradient with respect to a is made
    other_a: Rounds | None = None  # and b, which it meets there
    error_b: Rounds | None = None
    other_b: Rounds | None = None


class Product(torch.autograd.Function):
    """y = f(a, b) + bias, with rounded operands; see the top of this file. Product.apply(a, b, bias, form, operands,
    backward_passes), of which bias may be None.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, bias: Tensor | None, form: Form, operands: Operands, backward_passes: Iterator[int]
    ) -> Tensor:
        of_a, of_b = form.readings_forward(a, b)
        read = _read(operands.forward_a, a, of_a, 0), _read(operands.forward_b, b, of_b, 0)
        with in_float32(a.device):
            y = form.forward(*read, bias)
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
        form, operands, turn = ctx.form, ctx.operands, next(ctx.backward_passes)
        gradient_a = gradient_b = gradient_bias = None
        if ctx.needs_input_grad[0]:
            of_error, of_b = form.readings_a(error, b)
            read = _read(operands.error_a, error, of_error, turn), _read(operands.other_a, b, of_b, turn)
            with in_float32(a.device):
                gradient_a = form.gradient_a(*read, a)
        if ctx.needs_input_grad[1]:
            of_error, of_a = form.readings_b(error, a)
            read = _read(operands.error_b, error, of_error, turn), _read(operands.other_b, a, of_a, turn)
            with in_float32(a.device):
                gradient_b = form.gradient_b(*read, b)
        if ctx.needs_input_grad[2]:
            gradient_bias = form.gradient_bias(error, a, b)
        return gradient_a, gradient_b, gradient_bias, None, None, None


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


def _read(rounds: Rounds | None, operand: Tensor, reading: Reading, turn: int) -> Tensor:
    """The operand as the product reads it; its gradient passes straight through."""
    if rounds is None:
        return operand
    if operand.requires_grad and torch.is_grad_enabled():
        return Round.apply(operand, lambda x: rounds(x, reading, turn), None)  # type: ignore[no-any-return, no-untyped-call]
    return rounds(operand, reading, turn)


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
    if operand.ndim == 0:
        return round_operand(quantizer, operand.reshape(1), Reading(()), call, step, first_row, turn).reshape(())
    if not isinstance(format, BlockFormat) or format.block == "tensor":
        return quantizer(operand, call, step, first_row=first_row, backward_pass=turn)
    if not isinstance(format.block, str):
        return _in_groups(quantizer, operand, reading, call, step, first_row, turn)
    lines = [d for d in range(operand.ndim) if d not in reading.over and d not in reading.batch]
    order = [*reading.batch, *lines, *reading.over]
    moved = operand.permute(order)
    matrices = moved.shape[: len(reading.batch)].numel()
    summed = moved.shape[len(order) - len(reading.over) :].numel()
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


def _in_layout_of(operand: Tensor, rounded: Tensor) -> Tensor:
    """That layout decides that of the product's result, and which kernel of torch computes it."""
    return rounded if rounded.stride() == operand.stride() else torch.empty_like(operand).copy_(rounded)
