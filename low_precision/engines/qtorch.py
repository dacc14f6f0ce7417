"""qtorch itself, for comparison: its quantizers, its optimizer, and its number formats to and from ours.

Importing qtorch.quant compiles its C++ the first time (a C++ compiler and ninja needed). Its stochastic rounding takes
no key and on the CPU no seed; NaN and infinity become the largest finite number: that is how qtorch is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import qtorch
import torch

from low_precision.errors import SettingError
from low_precision.formats import FLOAT32, NAMED, AnyFormat, BlockFormat, Format, format_named
from low_precision.rounding import FewBits, Overflow, Rounding
from low_precision.rules import Rule
from low_precision.tables import Table

ROUNDINGS = (Rounding.NEAREST, Rounding.STOCHASTIC)


def to_qtorch(format: AnyFormat) -> qtorch.number.Number:
    """qtorch's number of the same values. ValueError where it has none."""
    if isinstance(format, Table):
        raise ValueError(f"{format.name} is no number of qtorch's, which has no tables")
    if isinstance(format, BlockFormat):
        dims, element = {"tensor": -1, "row": 0, "column": 1}, format.element
        fits = format.block in dims and format.scaling.kind == "e8m0"
        if not fits or isinstance(element, Table) or element.exponent_bits:
            raise ValueError(f"{format.name} is no qtorch.BlockFloatingPoint, which knows tensors, rows and columns")
        return qtorch.BlockFloatingPoint(element.mantissa_bits + 2, dims[str(format.block)])
    if format.exponent_bits == 0:
        fraction = format.bias + format.mantissa_bits - 1
        if fraction < 1:
            raise ValueError(f"{format.name} is no qtorch.FixedPoint, which has a bit behind the point")
        return qtorch.FixedPoint(format.mantissa_bits + 2, fraction, symmetric=not format.twos_complement)
    finite = format.largest == 2.0 ** (2 ** (format.exponent_bits - 1)) * (2 - 2.0**-format.mantissa_bits)
    if not finite or format.bias != 2 ** (format.exponent_bits - 1) - 1 or format.mantissa_bits == 0:
        raise ValueError(f"{format.name} is no qtorch.FloatingPoint, whose top exponent holds numbers")
    return qtorch.FloatingPoint(exp=format.exponent_bits, man=format.mantissa_bits)


def from_qtorch(number: qtorch.number.Number) -> AnyFormat:
    """The format of the same values: a named one where there is one, else "qtorch_eXmY".

    ValueError where none is: for an exponent of 8 bits, fixed point without clamping, blocks along another dimension.
    """
    if isinstance(number, qtorch.FixedPoint):
        if not number.clamp:
            raise ValueError(f"given {number} without clamping, allowed: clamp=True")
        return format_named(f"fixed{number.wl}.{number.fl}{'s' if number.symmetric else ''}")
    if isinstance(number, qtorch.BlockFloatingPoint):
        names = {-1: "", 0: "_row", 1: "_column"}
        if number.dim not in names:
            raise ValueError(f"given {number}, allowed: dim -1, 0 or 1")
        return format_named(f"bfp{number.wl}{names[number.dim]}")
    if not isinstance(number, qtorch.FloatingPoint):
        raise ValueError(f"given {number}, allowed: a qtorch number")
    for format in NAMED.values():
        if (format.exponent_bits, format.mantissa_bits) == (number.exp, number.man) and format.source.startswith(
            "qtorch"
        ):
            return format
    if number.exp > 7:  # the top exponent of 8 bits holds numbers in qtorch, and none in float32
        raise ValueError(f"given {number}, allowed: at most 7 bits of exponent, so that its values are float32 numbers")
    bias = 2 ** (number.exp - 1) - 1
    largest = 2.0 ** (bias + 1) * (2 - 2.0**-number.man)
    name = f"qtorch_e{number.exp}m{number.man}"
    return Format(name, number.exp, number.man, bias, largest, False, False, True, "qtorch.FloatingPoint")


@cache
def _quantizer(format: AnyFormat, rounding: Rounding | FewBits) -> Any:
    if rounding not in ROUNDINGS:
        raise SettingError("backend qtorch: rounding", str(rounding), "nearest, stochastic")
    from qtorch.quant import quantizer  # compiles: not before it is needed

    return quantizer(forward_number=to_qtorch(format), forward_rounding=rounding.value)


def quantize(x: torch.Tensor, fmt: AnyFormat, rounding: Rounding | FewBits, overflow: Overflow) -> torch.Tensor:
    """qtorch's rounding of float32 `x`, without a key; overflow always saturates."""
    if overflow is not Overflow.SATURATE:
        raise SettingError("backend qtorch: overflow", overflow.value, "saturate")
    rounded: torch.Tensor = _quantizer(fmt, rounding)(x.contiguous())
    return rounded.view(x.shape)


def optim_lp(optimizer: torch.optim.Optimizer, rules: dict[str, Rule], loss_scale: float) -> torch.optim.Optimizer:
    """qtorch.optim.OptimLP around SGD or Adam, which divides the loss scale out before it rounds the gradients."""
    from qtorch.optim import OptimLP

    def quantizer(site: str) -> Any:
        rule = rules.get(site)
        return None if rule is None or rule.format == FLOAT32 else _quantizer(rule.format, rule.rounding)

    made = OptimLP(
        optimizer,
        weight_quant=quantizer("weights"),
        grad_quant=quantizer("gradients"),
        momentum_quant=quantizer("momentum"),
        acc_quant=quantizer("accumulator"),
        grad_scaling=1 / loss_scale,
    )
    if made.acc_quant:  # which OptimLP leaves out of every state_dict
        masters = list(made.weight_acc.values())

        def load(_: Any, state: dict[str, Any]) -> None:
            for master, saved in zip(masters, state["accumulator"], strict=True):
                master.data.copy_(saved)

        optimizer.register_state_dict_post_hook(lambda _, state: state | {"accumulator": masters})
        optimizer.register_load_state_dict_pre_hook(load)
    wrapped: torch.optim.Optimizer = made
    return wrapped
