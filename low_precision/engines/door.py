"""The door of the engines: which tensors they read and write as plain memory, and what is refused.

The compiled engines take the address of a tensor's numbers, behind torch's back. That is right for a strided tensor of
torch's own class with numbers in memory, while nobody watches torch's operations. All others go the way of
tensor.quantize that fits them, or are refused here, whichever engine is in use: the same answer always.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from low_precision import torch_private
from low_precision.errors import SettingError

PLAIN_TYPES = frozenset((Tensor, nn.Parameter))
_STRIDED = torch.strided


def is_plain(x: Tensor) -> bool:
    """Whether the tensor is of torch's own class, strided, and all its numbers are in memory, with an address.

    Not so where there are none. In one expression, because each rounding of a small tensor asks.
    """
    try:
        return (
            type(x) in PLAIN_TYPES
            and x.layout is _STRIDED
            and not x.is_nested
            and not x.is_neg()  # what it reads is negated
            and x.data_ptr() != 0  # freed, or zeros that nobody has written, or a stand-in for another tensor
            and x.untyped_storage().nbytes() - x.storage_offset() * x.itemsize
            >= (x.nbytes if x.is_contiguous() else _bytes_to_the_last(x))  # else a part of it was freed
        )
    except RuntimeError:  # it has no address: a tensor of a transform
        return False


def is_readable(x: Tensor) -> bool:
    """Whether the numbers of a tensor of torch's own class are as they are in memory, or on a device of another kind,
    whose memory nobody reads behind torch's back.
    """
    return is_plain(x) or x.numel() == 0 or x.device.type not in ("cpu", "cuda")


def _bytes_to_the_last(x: Tensor) -> int:
    """How far the tensor's last number in memory ends from its first."""
    last = 0
    for size, stride in zip(x.shape, x.stride(), strict=True):
        last += (size - 1) * stride
    return (last + 1) * x.itemsize


def is_open(x: Tensor, out: Tensor | None) -> bool:
    """Whether an engine may read x, and write to `out`, as plain memory now, and no operation of torch is missed."""
    return is_plain(x) and (out is None or out is x or is_plain(out)) and not torch_private.somebody_watches()


def check(x: Tensor, out: Tensor | None) -> None:
    """An error in one line for what is not rounded at all, whichever engine is in use.

    TypeError for what is no tensor, or no strided one. ValueError for a tensor whose memory was freed, which torch
    itself would read from. RuntimeError while torch.jit.trace or make_fx are at work.
    """
    tracer = torch_private.tracer()
    if tracer:
        raise RuntimeError(
            f"quantize: given a call that {tracer} records, allowed: calls that are not recorded, because what is "
            "recorded would round other numbers as it has rounded these"
        )
    _check_kind(x, "x")
    if out is not None:
        _check_kind(out, "out")
        if torch_private.is_fake(out) != torch_private.is_fake(x):
            raise TypeError("quantize: given x and out of which one has no numbers, allowed: both with or both without")


def _check_kind(x: Tensor, name: str) -> None:
    allowed = "a torch.float32 tensor, strided, with its numbers in memory"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: given {type(x).__name__}, allowed: {allowed}")
    if isinstance(x, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise TypeError(f"{name}: given a parameter without a shape, allowed: {allowed}")
    with operations_of(x):
        layout, is_nested, is_short = x.layout, x.is_nested, False
        if layout is torch.strided and not is_nested and not torch_private.is_fake(x):
            is_short = _ends_before_its_numbers(x)
    if is_nested:
        raise TypeError(f"{name}: given a nested tensor, allowed: {allowed}, such as those that it is made of")
    if layout is not torch.strided:
        raise TypeError(f"{name}: given a tensor of the layout {layout}, allowed: {allowed} (use x.to_dense())")
    # Such a class, as DTensor, may make a copy where torch makes a view, and what is written to that is lost.
    if name == "x" and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not torch_private.is_fake(x):
        raise TypeError(f"x: given a {type(x).__name__}, which has a __torch_dispatch__ of its own, allowed: {allowed}")
    if is_short:
        raise ValueError(f"{name}: given a tensor whose memory was freed, allowed: {allowed}")


def _ends_before_its_numbers(x: Tensor) -> bool:
    """Whether the memory that the tensor is a view of is smaller than that. Not where torch does not show it."""
    try:
        end = _bytes_to_the_last(x) + x.storage_offset() * x.itemsize
        return x.numel() > 0 and x.untyped_storage().nbytes() < end
    except NotImplementedError:  # a tensor of a transform, or of a device of its own kind
        return False


@contextlib.contextmanager
def operations_of(x: Tensor) -> Iterator[None]:
    """TypeError where the class of the tensor does something of its own that fails within."""
    try:
        yield
    except Exception as error:
        if type(x) in PLAIN_TYPES:
            raise
        name = type(x).__name__
        raise TypeError(
            f"x: given a tensor of the class {name}, whose operations cannot round it, allowed: a torch.Tensor"
        ) from error


def plain(x: Tensor) -> Tensor:
    """The same numbers in memory of their own, for a tensor that torch negates when it is read, and the like.

    ValueError where torch does not have them in memory.
    """
    try:
        copy = x.resolve_neg() if x.is_neg() else x.clone()
        reason = None
    except RuntimeError as error:  # it is of a transform that has ended
        copy, reason = x, error
    if is_plain(copy):
        return copy
    raise SettingError("x", "a tensor that stands for another one", "one with its numbers in memory") from reason


def written(out: Tensor, rounded: Tensor) -> Tensor:
    """`out`, with these numbers written to it by torch."""
    try:
        out.copy_(rounded.detach())
    except Exception as error:  # of a class or a mode of somebody else's
        raise SettingError("out", "a tensor that torch cannot write to here", "one of the same kind as x") from error
    return out


def check_target(x: Tensor, out: Tensor) -> None:
    """ValueError for an `out` that is not as x, or of which it is not sure what comes of writing to it."""
    if out is not x and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise SettingError("out", _described(out), f"{_described(x)}, as x")
    if out.requires_grad and torch.is_grad_enabled():
        raise SettingError("out", "a tensor that requires a gradient", "its detach(), or a call in torch.no_grad()")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise SettingError("out", "a tensor of inference mode", "a call in torch.inference_mode()")
    if not out.is_contiguous() and _repeats_a_place(out):
        raise SettingError("out", "a tensor with several elements in one place of memory", "its clone()")


def _described(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def _repeats_a_place(x: Tensor) -> bool:
    """Whether two elements of the tensor lie in one place of memory, as in one that was expanded."""
    if x.numel() == 0:
        return False
    sizes = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    reached, in_order = 0, True  # by the dimensions of smaller strides
    for stride, size in sizes:
        in_order &= stride > reached
        reached += (size - 1) * stride
    if in_order or x.numel() > reached + 1:
        return not in_order
    places = torch.zeros((), dtype=torch.int64, device="cpu")  # strides as nobody has them: look at each place
    for stride, size in sizes:
        places = places.unsqueeze(-1) + stride * torch.arange(size, dtype=torch.int64, device="cpu")
    return bool((places.flatten().sort().values.diff() == 0).any())


def are_apart(x: Tensor, out: Tensor) -> bool:
    """Whether an engine may write to `out` while it reads `x`: they are in one place, or share no memory."""
    if x is out:
        return True
    start, out_start = x.data_ptr(), out.data_ptr()
    if start == out_start and x.stride() == out.stride():
        return True
    return start + _bytes_to_the_last(x) <= out_start or out_start + _bytes_to_the_last(out) <= start
