"""What this library reads of torch that torch does not document: all of it is in this file.

Another version of torch may lack a name. Then each function here falls back to an answer that is right and costs some
speed: "somebody may watch", so that nothing is rounded in place, or "this may be traced".
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

P = ParamSpec("P")
R = TypeVar("R")

# torch's names for the backward passes of a linear or convolution layer's own operation. None of them reads the result
# of that operation, so the result may be overwritten.
_LAYER_BACKWARDS = ("ConvolutionBackward0", "AddmmBackward0", "MmBackward0")
_another = itertools.count(start=-1, step=-1)  # numbers that are no versions


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.disable(function), which imports torch's compiler: here, only where it is at work."""
    disable = getattr(torch, "_disable_dynamo", None)
    if disable is None:
        return torch.compiler.disable(function)  # type: ignore[no-any-return, no-untyped-call]
    disabled = disable(function)  # imports the compiler at its first call

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        return (disabled if torch.compiler.is_compiling() else function)(*arguments, **named)

    return call


def forget_compiled() -> None:
    """torch.compiler.reset(), where the compiler is loaded: what is compiled already would not see new hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def transforms_are_active() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...) may be at work, whose tensors have no memory of their own."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return True if ask is None else bool(ask())


def hooks_on_all_modules() -> bool:
    """Whether hooks may be registered that see what every module reads, gives, or gets as a gradient."""
    forward = getattr(_module, "_global_forward_hooks", True)
    backward = getattr(_module, "_global_backward_hooks", True)
    return bool(forward) or bool(backward)


def forward_hooks(layer: nn.Module) -> list[Callable[..., Any]] | None:
    """The layer's forward hooks, in the order of their calls; None where torch does not tell."""
    table = getattr(layer, "_forward_hooks", None)
    return None if table is None else list(table.values())


def is_last_pre_hook(layer: nn.Module, hook: Callable[..., Any]) -> bool:
    """Whether no forward pre-hook of the layer comes after `hook`; False where torch does not tell."""
    table = getattr(layer, "_forward_pre_hooks", None)
    return bool(table and next(reversed(table.values())) == hook)


def has_backward_hooks(layer: nn.Module) -> bool:
    """Whether hooks may see the gradients of the layer's input or output."""
    return bool(getattr(layer, "_backward_hooks", True))


def is_made_by_a_layer(output: Tensor) -> bool:
    """Whether autograd says that the operation of a linear or convolution layer made this tensor."""
    return type(output.grad_fn).__name__ in _LAYER_BACKWARDS


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters by name, without those of its children; None for one that is registered as none."""
    table = getattr(module, "_parameters", None)
    return dict(module.named_parameters(recurse=False, remove_duplicate=False)) if table is None else table


def version_of(tensor: Tensor) -> tuple[int, int]:
    """A pair that changes when somebody writes to the tensor in place, or gives it other memory.

    Where torch does not count the writes, it is another pair at each call, so that the numbers have to be compared.
    """
    if tensor.is_inference():
        return tensor.data_ptr(), 0
    version = getattr(tensor, "_version", None)
    return tensor.data_ptr(), next(_another) if version is None else version


def is_replica(layer: nn.Module) -> bool:
    """Whether the layer is one of those that nn.DataParallel makes of its module for each device."""
    return bool(getattr(layer, "_is_replica", False))


def inside_compiled(model: nn.Module) -> nn.Module | None:
    """The module that torch.compile has wrapped; None where `model` is not such a wrapper."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None
