"""The functions of torch whose products are rounded, and what sees a layer call them.

A layer multiplies by calling a function, torch.nn.functional.linear or a convolution. While the layer runs, a
TorchFunctionMode of torch stands between the two, and computes the product with rounded operands.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from low_precision import loss_scale
from low_precision.clock import Clock, Time
from low_precision.products import Convolution, Form, Linear, Operands, Product, Reading, Rounds, round_operand
from low_precision.rules import OPERANDS
from low_precision.scheme import Quantizer, Scheme
from low_precision.torch_private import untraced

# (the arguments of a function) -> the factors, bias and form of its product
_Factors = tuple[Tensor, Tensor, Tensor | None, Form]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Factors:
    return input, weight, bias, Linear()


def _convolution(dimensions: int) -> Callable[..., _Factors]:
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> _Factors:
        steps, spread = _each(stride, dimensions), _each(dilation, dimensions)
        if padding == "valid":
            padding = 0
        if isinstance(padding, str):  # "same"; where it is not the same on both sides, the input is padded before
            totals = [d * (size - 1) for d, size in zip(spread, weight.shape[2:], strict=True)]
            odd = [total % 2 for total in totals]
            if any(odd):
                input = F.pad(input, [side for extra in reversed(odd) for side in (0, extra)])
            padding = tuple(total // 2 for total in totals)
        around = _each(padding, dimensions)
        return input, weight, bias, Convolution(steps, around, spread, False, (0,) * dimensions, groups)

    return convolution


def _transposed(dimensions: int) -> Callable[..., _Factors]:
    def transposed(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        dilation: int | tuple[int, ...] = 1,
    ) -> _Factors:
        steps, around, spread = (_each(value, dimensions) for value in (stride, padding, dilation))
        form = Convolution(steps, around, spread, True, _each(output_padding, dimensions), groups)
        return input, weight, bias, form

    return transposed


def _each(value: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


FUNCTIONS: dict[Callable[..., Any], Callable[..., _Factors]] = {F.linear: _linear}
for _dimensions in (1, 2, 3):
    FUNCTIONS[getattr(F, f"conv{_dimensions}d")] = _convolution(_dimensions)
    FUNCTIONS[getattr(F, f"conv_transpose{_dimensions}d")] = _transposed(_dimensions)


class LayerOperands:
    """What rounds the operands of a layer's products, one after the other, by site."""

    def __init__(self, scheme: Scheme, name: str, clock: Clock) -> None:
        """name: the layer's in its model."""
        self._scheme, self._name, self._clock = scheme, name, clock
        self._of_product: list[dict[str, Quantizer]] = []
        self.are_rounded = bool(self.quantizers(0))

    def quantizers(self, number: int) -> dict[str, Quantizer]:
        """Those of the layer's product of that number: each has noise of its own."""
        while len(self._of_product) <= number:
            tensor = f"{self._name}:{len(self._of_product)}" if self._of_product else self._name
            made = {site: self._scheme.quantizer(site, tensor, self._clock) for site in OPERANDS}
            self._of_product.append({site: quantizer for site, quantizer in made.items() if quantizer})
        return self._of_product[number]


class LayerProducts(TorchFunctionMode):
    """Computes the products of one call of a layer with rounded operands, while it is active."""

    def __init__(self, operands: LayerOperands, call: int, time: Time, training: bool) -> None:
        """call: which forward pass of the layer it is, as Quantizer takes it."""
        super().__init__()
        self._of_layer, self._call, self._time, self._training = operands, call, time, training
        self._products = 0  # that the layer has computed

    def begin(self) -> None:
        """From now on this thread's calls go through this, until `end`."""
        _running.layers.append(self)
        self.__enter__()  # type: ignore[no-untyped-call]

    @staticmethod
    def end(operands: LayerOperands) -> None:
        """Ends the layer with these operands, if it is the one that this thread began last."""
        if _running.layers and _running.layers[-1]._of_layer is operands:
            _running.layers.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:
        factors_of = FUNCTIONS.get(function)
        if factors_of is None:
            return function(*arguments, **(named or {}))
        return self._multiply(*factors_of(*arguments, **(named or {})))

    @untraced
    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
        autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        if autocast:  # the product is computed in float32, and its result is of autocast's type
            x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
        batch = x.unsqueeze(0) if isinstance(form, Convolution) and x.ndim == weight.ndim - 1 else x  # of one image
        number, self._products = self._products, self._products + 1
        operands, passes = self._operands(number, batch)
        y: Tensor = Product.apply(batch, weight, bias, form, operands, passes)  # type: ignore[no-untyped-call]
        y = y if batch is x else y.squeeze(0)
        return y.to(autocast) if autocast else y

    def _operands(self, number: int, x: Tensor) -> tuple[Operands, Iterator[int]]:
        """Those of the layer's product of that number, with the input x, and a count of its backward passes."""
        time, part = self._time, self._time.part
        first_row = part.first_row(len(x)) if self._training and part.rows_before else 0
        rounds: dict[str, Rounds] = {}
        for site, quantizer in self._of_layer.quantizers(number).items():
            rows_before = 0 if site.endswith(".weights") else first_row
            rounds[site] = _rounds(quantizer, self._call, time.step, rows_before, is_error=site.endswith(".errors"))
        passes = time.backward_passes(
            ("products", *next(iter(self._of_layer.quantizers(number).values())).names, self._call)
        )
        return Operands(*(rounds.get(site) for site in OPERANDS)), passes


class _Running(threading.local):
    """The layers with rounded products that this thread is in, the innermost last."""

    def __init__(self) -> None:
        self.layers: list[LayerProducts] = []


_running = _Running()


def _rounds(quantizer: Quantizer, call: int, step: int, first_row: int, is_error: bool) -> Rounds:
    """products.round_operand for one operand of one product. is_error: whether a dynamic loss scale looks at it."""

    def rounds(operand: Tensor, reading: Reading, turn: int) -> Tensor:
        poison = loss_scale.note_error(quantizer, operand) if is_error else None
        rounded = round_operand(quantizer, operand, reading, call, step, first_row, turn)
        return rounded if poison is None else rounded.masked_fill(poison, float("nan"))

    return rounds
