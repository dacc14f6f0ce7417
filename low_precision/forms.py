"""Bilinear functions of two tensors: how a product and its two gradients are computed, and over what each sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Reading(NamedTuple):
    """How a product reads an operand, by dimensions: `over` which it sums, and which count matrices of their own.

    The others are the lines of the matrix; along a line lies what is summed. parts: the dimension `over` holds so many
    sums, one after the other, as those of a convolution's groups. are_mixed: whether the operand's first dimension is
    no longer one of rows of the batch, because a transform has mixed them.
    """

    over: tuple[int, ...]
    batch: tuple[int, ...] = ()
    parts: int = 1
    are_mixed: bool = False


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

    def as_matrices(self, a: Tensor, b: Tensor) -> tuple[Form, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """The same product, each of whose three sums goes over one dimension, its factors, and y of its result."""
        ...


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

    def as_matrices(self, x: Tensor, w: Tensor) -> tuple[Form, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        return self, *_rows_as_one(x, w)


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
        return Reading((1,), parts=self.groups), self._reading_of_weight(0 if self.transposed else 1)

    def readings_a(self, error: Tensor, w: Tensor) -> tuple[Reading, Reading]:
        return Reading((1,), parts=self.groups), self._reading_of_weight(1 if self.transposed else 0)

    def readings_b(self, error: Tensor, x: Tensor) -> tuple[Reading, Reading]:
        return Reading((0,)), Reading((0,))

    def as_matrices(self, x: Tensor, w: Tensor) -> tuple[Form, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        return self, x, w, _as_it_is

    def _reading_of_weight(self, over: int) -> Reading:
        return Reading((over,), parts=1 if over else self.groups)  # the second dimension is that of one group

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

    def as_matrices(self, a: Tensor, b: Tensor) -> tuple[Form, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        return (self, a, b, _as_it_is) if self.matrices else (self, *_rows_as_one(a, b))

    def _along(self, x: Tensor, over: int) -> Reading:
        return Reading((x.ndim + over,), tuple(range(self.matrices)))

    def _along_rows(self, x: Tensor) -> Reading:
        return Reading(tuple(range(self.matrices, x.ndim - 1)), tuple(range(self.matrices)))


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _rows_as_one(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """a as one matrix, whose leading dimensions are all rows; b; and what gives a result those dimensions again."""
    leading = a.shape[:-1]
    return _as_rows(a), b, lambda y: y.reshape(*leading, y.shape[-1])


def _as_it_is(y: Tensor) -> Tensor:
    return y
