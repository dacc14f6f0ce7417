"""The site `elementwise`: the results of functions that have no product, and their gradients."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from low_precision import torch_private
from low_precision.calls import Call, Frame
from low_precision.names import computes, name_of


def compute(
    frame: Frame,
    function: Callable[..., Any],
    mode: TorchFunctionMode,
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> Any:
    """The function's result, rounded, in place where the function works in place."""
    operands = [x for x in flat((*arguments, *named.values())) if isinstance(x, Tensor) and x.is_floating_point()]
    # Without such an operand it makes constants, or draws.
    if not operands or not computes(function):
        return function(*arguments, **named)
    call = Call(frame, name_of(function), function, mode)
    infinite = _brings_infinity(operands, (*arguments, *named.values()))
    if named.get("out") is not None:
        result = function(*arguments, **named)
        with torch.no_grad():
            for written in flat([result]):
                written.copy_(call.elementwise(written.detach(), infinite=infinite))
        return result
    flag = _in_place_flag(function)
    if _works_in_place(function, flag, arguments, named) and isinstance(arguments[0], Tensor):
        written = arguments[0]
        # The derivative may read what is written: so it is computed beside it, and written once.
        arguments, named = _out_of_place(flag, (written.clone(), *arguments[1:]), named)
        written.copy_(call.elementwise(function(*arguments, **named), infinite=infinite))
        return written
    memories = {torch_private.memory_of(x) for x in operands} - {None}
    return _each(function(*arguments, **named), call, infinite, memories)


def _each(result: Any, call: Call, infinite: Tensor, memories: set[int | None], part: str = "") -> Any:
    """The result, or the parts of it, rounded; views of operands are left alone."""
    if isinstance(result, Tensor):
        if torch_private.memory_of(result) in memories:
            return result
        return call.elementwise(result, part, infinite)
    if isinstance(result, tuple | list):
        parts = [_each(x, call, infinite, memories, f"{part}[{n}]") for n, x in enumerate(result)]
        is_named_tuple = isinstance(result, tuple) and hasattr(result, "_fields")
        return type(result)(*parts) if is_named_tuple else type(result)(parts)
    return result


def _brings_infinity(operands: list[Tensor], arguments: tuple[Any, ...]) -> Tensor:
    """bool (): whether an operand holds an infinity, as a mask does: in the result it stays one."""
    if any(isinstance(x, float) and x in (float("inf"), -float("inf")) for x in flat(arguments)):
        return torch.ones((), dtype=torch.bool, device=operands[0].device)
    return functools.reduce(torch.logical_or, [x.detach().isinf().any() for x in operands])


def flat(values: Any) -> list[Any]:
    """The values, those of tuples and lists one by one."""
    one_by_one = []
    for value in values:
        one_by_one.extend(flat(value) if isinstance(value, tuple | list) else [value])
    return one_by_one


@functools.cache
def _in_place_flag(function: Callable[..., Any]) -> int | None:
    """Which argument of a function in Python is called `inplace`."""
    if not inspect.isfunction(function):
        return None
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:  # of a wrapped one, as `x **= 2` is, torch does not tell
        return None
    return names.index("inplace") if "inplace" in names else None


def _works_in_place(
    function: Callable[..., Any], flag: int | None, arguments: tuple[Any, ...], named: dict[str, Any]
) -> bool:
    name = getattr(function, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    return bool(named.get("inplace") or (flag is not None and len(arguments) > flag and arguments[flag]))


def _out_of_place(
    flag: int | None, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if flag is not None and len(arguments) > flag:
        return (*arguments[:flag], False, *arguments[flag + 1 :]), named
    return arguments, {name: value for name, value in named.items() if name != "inplace"}
