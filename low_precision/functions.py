"""The functions of torch whose products are rounded: a row of FUNCTIONS for each of their names in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from low_precision import attention, recurrent, torch_private
from low_precision.calls import Call
from low_precision.contraction import Contraction, letters, parsed, simplified
from low_precision.forms import Convolution, Linear, Matmul


class Row(NamedTuple):
    """name: under which its products are rounded and told. compute: its result, from the call and its arguments."""

    name: str
    compute: Callable[..., Any]


# Layers' own functions.


def _linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.ndim == 1 and bias is None:  # of one output, whose dimension torch leaves out
        return call.product(input, weight.unsqueeze(0), None, Linear()).squeeze(-1)
    return call.product(input, weight, bias, Linear())


def _convolve(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, form: Convolution) -> Tensor:
    """x: (samples, channels, *pixels), or of one image (channels, *pixels)."""
    channels = 1 - weight.ndim
    x, weight = call.inputs(x, channels), call.inputs(weight, channels)
    is_one_image = x.ndim == weight.ndim - 1
    y = call.multiply(call.function, x.unsqueeze(0) if is_one_image else x, weight, bias, form)
    return call.activations(y.squeeze(0) if is_one_image else y, channels)


def _convolution(dimensions: int) -> Callable[..., Tensor]:
    def convolution(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> Tensor:
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
        form = Convolution(steps, around, spread, False, (0,) * dimensions, groups)
        return _convolve(call, input, weight, bias, form)

    return convolution


def _transposed(dimensions: int) -> Callable[..., Tensor]:
    def transposed(
        call: Call,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        dilation: int | tuple[int, ...] = 1,
    ) -> Tensor:
        steps, around, spread = (_each(value, dimensions) for value in (stride, padding, dilation))
        form = Convolution(steps, around, spread, True, _each(output_padding, dimensions), groups)
        return _convolve(call, input, weight, bias, form)

    return transposed


def _each(value: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def _bilinear(call: Call, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[r, o] = sum over i, j of x1[r, i] W[o, i, j] x2[r, j]: x1 W, and its product with x2."""
    x1, x2, w = call.inputs(input1), call.inputs(input2), call.inputs(weight)
    if not call.has_operands:
        call.note_kernel(call.function, ["inputs", "weights"], x1, w)
        call.note_kernel(call.function, ["inputs", "inputs"], None, x2)
        return call.activations(call.native(x1, x2, w, bias))
    rows1, rows2 = x1.reshape(-1, x1.shape[-1]), x2.reshape(-1, x2.shape[-1])
    half = call.multiply(call.function, rows1, w, None, Contraction("ri", "oij", "roj"))
    y = call.multiply(call.function, half, rows2, bias, Contraction("roj", "rj", "ro"))
    return call.activations(y.reshape(*x1.shape[:-1], len(w)))


# Products of matrices.


def _matmul(call: Call, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    a, b = call.inputs(input), call.inputs(other)
    return _written(out, call.activations(_product(call, a, b)))


def _strict(compute: Callable[..., Tensor], first: int, second: int) -> Callable[..., Tensor]:
    """The same for tensors of so many dimensions alone; others are torch's own error."""

    def strict(call: Call, input: Tensor, other: Tensor, **named: Any) -> Tensor:
        if (input.ndim, other.ndim) != (first, second) or (first == 3 and len(input) != len(other)):
            return call.native(input, other, **named)  # type: ignore[no-any-return]
        return compute(call, input, other, **named)

    return strict


def _matmul_reflected(call: Call, self: Tensor, other: Tensor) -> Tensor:
    return _matmul(call, other, self)


def _product(call: Call, a: Tensor, b: Tensor, name: str | None = None) -> Tensor:
    """a b, as torch.matmul has it. name: of the product; the function's unless given."""
    name = name or call.function
    if a.ndim == 0 or b.ndim == 0:
        return torch.matmul(a, b)  # torch's own error
    if a.ndim >= 2 and b.ndim == 2:
        return call.multiply(name, a, b, None, Matmul(0))
    if a.ndim > 2 and b.ndim > 2:
        shape = torch_private.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        wide_a, wide_b = a.expand(*shape, *a.shape[-2:]), b.expand(*shape, *b.shape[-2:])
        return call.multiply(name, wide_a, wide_b, None, Matmul(len(shape)))
    # A vector, or one matrix before several.
    of_a = letters(a.ndim - 1) + "k"
    of_b = "k" if b.ndim == 1 else letters(b.ndim - 2, 20) + "k" + "z"
    y = of_a[:-1] if b.ndim == 1 else of_b[:-2] + of_a[:-1] + "z"
    return call.multiply(name, a, b, None, Contraction(of_a, of_b, y, torch.matmul))


def _inner(call: Call, input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    if input.ndim == 0 or other.ndim == 0:
        return call.native(input, other, out=out)  # type: ignore[no-any-return]
    a, b = call.inputs(input), call.inputs(other)
    of_a, of_b = letters(a.ndim - 1), letters(b.ndim - 1, 26)
    form = Contraction(f"{of_a}z", f"{of_b}z", of_a + of_b, torch.inner)
    return _written(out, call.activations(call.multiply(call.function, a, b, None, form)))


def _vecdot(call: Call, x: Tensor, y: Tensor, *, dim: int = -1, out: Tensor | None = None) -> Tensor:
    if x.is_complex() or y.is_complex():  # torch takes the conjugate of x; nothing of complex numbers is rounded
        return call.native(x, y, dim=dim, out=out)  # type: ignore[no-any-return]
    a, b = torch.broadcast_tensors(call.inputs(x), call.inputs(y))  # type: ignore[no-untyped-call]
    names = letters(a.ndim)
    place = dim % a.ndim
    form = Contraction(names, names, names[:place] + names[place + 1 :])
    return _written(out, call.activations(call.multiply(call.function, a, b, None, form)))


def _tensordot(
    call: Call, a: Tensor, b: Tensor, dims: int | list[list[int]] | Tensor = 2, out: Tensor | None = None
) -> Tensor:
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        summed_a, summed_b = list(range(a.ndim - dims, a.ndim)), list(range(dims))
    else:
        summed_a, summed_b = ([d % x.ndim for d in list(which)] for which, x in zip(dims, (a, b), strict=True))
    x, y = call.inputs(a), call.inputs(b)
    of_a, of_b = list(letters(a.ndim)), list(letters(b.ndim, 26))
    for d, e in zip(summed_a, summed_b, strict=True):
        of_b[e] = of_a[d]
        if x.shape[d] != y.shape[e]:  # one of them is 1, and broadcast: the sum is the other's alone, as in torch
            x = x.sum(d, keepdim=True) if y.shape[e] == 1 else x
            y = y.sum(e, keepdim=True) if x.shape[d] == 1 else y
    result = [letter for letter in of_a if letter not in of_b] + [letter for letter in of_b if letter not in of_a]
    multiply = lambda p, q: torch.tensordot(p, q, (summed_a, summed_b))  # noqa: E731
    form = Contraction("".join(of_a), "".join(of_b), "".join(result), multiply)
    return _written(out, call.activations(call.multiply(call.function, x, y, None, form)))


def _einsum(call: Call, *arguments: Any) -> Tensor:
    """Of more than two operands, one product after the other from the left; only the last result is an activation."""
    equation, operands = _equation(arguments)
    try:
        terms, result = parsed(equation, operands)
    except ValueError:
        return call.native(*arguments)  # type: ignore[no-any-return]
    if len(operands) < 2:  # no product
        return call.elementwise(call.native(*arguments))
    sizes: dict[str, int] = {}
    for term, x in zip(terms, operands, strict=True):
        for letter, size in zip(term, x.shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    read = [call.inputs(x) for x in operands]
    y, of_y = read[0], terms[0]
    for n in range(1, len(read)):
        later = "".join([*terms[n + 1 :], result])
        y, of_y = simplified(y, of_y, terms[n] + later, sizes)
        x, of_x = simplified(read[n], terms[n], of_y + later, sizes)
        y, of_y = simplified(y, of_y, of_x + later, sizes)
        kept = [letter for letter in dict.fromkeys(of_y + of_x) if letter in later]
        ordered = [letter for letter in result if letter in kept] if n == len(read) - 1 else kept
        y = call.multiply(call.function, y, x, None, Contraction(of_y, of_x, "".join(ordered)))
        of_y = "".join(ordered)
    return call.activations(y)


def _equation(arguments: tuple[Any, ...]) -> tuple[str, list[Tensor]]:
    """The equation and the operands of a call of torch.einsum, in each of its spellings."""
    if isinstance(arguments[0], str):
        operands = arguments[1] if len(arguments) == 2 and isinstance(arguments[1], list | tuple) else arguments[1:]
        return arguments[0], list(operands)
    written = [
        "".join("..." if place is Ellipsis else letters(1, place) for place in places) for places in _lists(arguments)
    ]
    operands = list(arguments[: len(arguments) // 2 * 2 : 2])
    left = ",".join(written[: len(operands)])
    return (f"{left}->{written[-1]}" if len(arguments) % 2 else left), operands


def _lists(arguments: tuple[Any, ...]) -> Iterator[Any]:
    yield from arguments[1::2]
    if len(arguments) % 2:
        yield arguments[-1]


def _adding(multiply: Callable[[Call, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """addmm and its like: beta * input + alpha * (a b). The sum is in float32, before `activations`."""

    def adding(
        call: Call,
        input: Tensor,
        first: Tensor,
        second: Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
        out: Tensor | None = None,
    ) -> Tensor:
        y = multiply(call, call.inputs(first), call.inputs(second))
        y = y if alpha == 1 else alpha * y
        if beta != 0:
            added = input if beta == 1 else beta * input
            y = call.activations((added + y).to(y.dtype), infinite=added)  # under autocast, of its type
        else:
            y = call.activations(y)
        return _written(out, y)

    return adding


def _sum_of_products(call: Call, a: Tensor, b: Tensor) -> Tensor:
    form = Contraction("bmk", "bkn", "mn")
    return call.multiply(call.function, a, b, None, form)


def _chain(call: Call, *matrices: Any, out: Tensor | None = None) -> Tensor:
    """One product after the other, from the left."""
    factors = list(matrices[0]) if isinstance(matrices[0], list | tuple) else list(matrices)
    read = [call.inputs(x) for x in factors]
    y = read[0]
    for x in read[1:]:
        y = _product(call, y, x)
    return _written(out, call.activations(y))


def _grouped_mm(
    call: Call,
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The experts of a mixture: a product for each group of rows, which end at `offs`, or for each matrix."""
    jagged = mat_a.ndim == 2 and mat_b.ndim == 3 and offs is not None and bias is None
    if not (jagged or (mat_a.ndim == mat_b.ndim == 3 and bias is None)):
        call.note_unreached()
        return call.native(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)  # type: ignore[no-any-return]
    a, b = call.inputs(mat_a), call.inputs(mat_b)
    if offs is None or not jagged:
        y = call.multiply(call.function, a, b, None, Matmul(1))
    else:
        ends = offs.tolist()
        rows = [end - start for start, end in zip([0, *ends], [*ends, len(a)], strict=False)]
        groups = a.split(rows)  # type: ignore[no-untyped-call]
        pairs = zip(groups[:-1], b, strict=True)
        products = [call.multiply(call.function, of_a, of_b, None, Matmul(0)) for of_a, of_b in pairs]
        y = torch.cat([*products, a.new_zeros(rows[-1], b.shape[-1])])
    y = call.activations(y)
    return y if out_dtype is None else y.to(out_dtype)


def _recurrent(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer or cell: told anew where something of it is rounded."""

    def recurrent_call(call: Call, *arguments: Any, **named: Any) -> Any:
        if not call.is_rounded:
            return call.native(*arguments, **named)
        result = compute(call, *arguments, **named)
        kind = arguments[0].device.type
        if call.function != "lstm" or not torch.is_autocast_enabled(kind):
            return result
        return tuple(x.to(torch.get_autocast_dtype(kind)) for x in result)  # c too, as torch has it

    return recurrent_call


def _in_place(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function that writes its result to its first argument."""

    def written(call: Call, input: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return input.copy_(compute(call, input.clone(), *arguments, **named))

    return written


def _named(compute: Callable[..., Tensor], **names: str) -> Callable[..., Tensor]:
    """The same for a function of torch that calls its arguments by other names. names: ours by torch's."""

    def computed(call: Call, *arguments: Any, **named: Any) -> Tensor:
        return compute(call, *arguments, **{names.get(name, name): value for name, value in named.items()})

    return computed


def _written(out: Tensor | None, y: Tensor) -> Tensor:
    if out is None:
        return y
    if out.shape != y.shape:
        out.resize_(y.shape)
    return out.copy_(y)


# The table.

FUNCTIONS: dict[Callable[..., Any], Row] = {}


def _add(name: str, compute: Callable[..., Any], *homes: Any, spelled: str | None = None) -> None:
    """A row for the function of that name, or spelled another way, in each of these places of torch that has it."""
    for home in homes:
        function = getattr(home, spelled or name, None)
        if function is not None:
            FUNCTIONS[function] = Row(name, compute)


_add("linear", _linear, F)
for _n in (1, 2, 3):
    _add(f"conv{_n}d", _convolution(_n), F, torch)
    _add(f"conv_transpose{_n}d", _transposed(_n), F, torch)
_add("bilinear", _bilinear, F, torch)
_add("matmul", _matmul, torch, Tensor)
for _name, _other, _dims in (
    ("mm", "mat2", (2, 2)),
    ("bmm", "mat2", (3, 3)),
    ("mv", "vec", (2, 1)),
    ("dot", "tensor", (1, 1)),
):
    _add(_name, _named(_strict(_matmul, *_dims), **{_other: "other"}), torch, Tensor)
_add("matmul", _matmul, torch.linalg)
_add("matmul", _matmul, Tensor, spelled="__matmul__")
_add("matmul", _matmul_reflected, Tensor, spelled="__rmatmul__")
_add("inner", _inner, torch, Tensor)
_add("vecdot", _vecdot, torch.linalg)
_add("tensordot", _tensordot, torch)
_add("einsum", _einsum, torch)
for _name, _compute in {
    "addmm": _named(_adding(_product), mat1="first", mat2="second"),
    "addmv": _named(_adding(_product), mat="first", vec="second"),
    "baddbmm": _named(_adding(_product), batch1="first", batch2="second"),
    "addbmm": _named(_adding(_sum_of_products), batch1="first", batch2="second"),
}.items():
    _add(_name, _compute, torch, Tensor)
    _add(_name, _in_place(_compute), Tensor, torch, spelled=f"{_name}_")
_add("multi_dot", lambda call, tensors, *, out=None: _chain(call, tensors, out=out), torch.linalg)
_add("chain_matmul", _chain, torch)
_add("grouped_mm", _grouped_mm, F)
FUNCTIONS |= {function: Row("grouped_mm", _grouped_mm) for function in torch_private.grouped_products()}
_add("scaled_dot_product_attention", attention.scaled_dot_product_attention, F)
_add("multi_head_attention_forward", attention.multi_head_attention_forward, F)
for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
    _add(_name, _recurrent(getattr(recurrent, _name)), torch)
