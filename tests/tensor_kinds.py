"""Every kind of tensor that quantize() may be given, made of plain numbers: those to round, and those to write to."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

# Each is a function of numbers that are contiguous and in memory of their own.


class Marked(Tensor):
    """A class of a user's own that changes nothing."""


class Logged(Tensor):
    """One that sees each function of torch."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Stubborn(Tensor):
    """One that can do nothing."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"INTERNAL: {func}\nis not done here")


class Wrapped(Tensor):
    """One without memory, whose operations another tensor does."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapped, func(*args, **kwargs))


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def sliced(x: Tensor) -> Tensor:
    return torch.stack([x, -x], -1)[..., 0]


def offset(x: Tensor) -> Tensor:
    return torch.cat([torch.ones(7, dtype=x.dtype, device="cpu"), x.flatten()])[7:].view(x.shape)


def memory_mapped(x: Tensor) -> Tensor:
    with tempfile.NamedTemporaryFile() as file:
        mapped = torch.from_file(file.name, shared=True, size=max(x.numel(), 1), dtype=x.dtype, device="cpu")
        return mapped[: x.numel()].view(x.shape).copy_(x)


def read_only(x: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:
        return x.clone()
    numbers = x.numpy().copy()
    numbers.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it could be written to
        return torch.from_numpy(numbers)


def negated(x: Tensor) -> Tensor:
    """What torch negates when it is read."""
    return torch.complex(x, -x).conj().imag if x.dtype in (torch.float32, torch.float64) else torch._neg_view(-x)


def imaginary(x: Tensor) -> Tensor:
    return torch.complex(x, x).imag if x.dtype in (torch.float32, torch.float64) else x.clone()


def made_in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def fake(x: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(x)


def freed(x: Tensor, view: Callable[[Tensor], Tensor] = lambda x: x, left: int = 0) -> Tensor:
    view_of_it = view(x)
    view_of_it.untyped_storage().resize_(left)
    return view_of_it


def nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([x.flatten()[:2], x.flatten()], layout=layout, device="cpu")


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x.clone(),
    "permuted": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim else x.clone(),
    "channels_last": channels_last,
    "sliced": sliced,
    "offset": offset,
    "expanded": lambda x: x.unsqueeze(0).expand(3, *x.shape),
    "overlapping": lambda x: x.flatten().unfold(0, min(4, x.numel()), 1),
    "empty": lambda x: x.new_empty((0, *x.shape), device="cpu"),
    "parameter": lambda x: nn.Parameter(x.clone()),
    "requires a gradient": lambda x: x.clone().requires_grad_() * 1,
    "shared": lambda x: x.clone().share_memory_(),
    "memory-mapped": memory_mapped,
    "read-only": read_only,
    "imaginary": imaginary,
    "long": lambda x: x.flatten().repeat(1 + 70_000 // x.numel()),  # threads share a block of the tensor
}
UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": negated,
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device="cpu"),
    "of inference mode": made_in_inference_mode,
    "copied when written to": lambda x: torch._lazy_clone(x),
    "marked": lambda x: x.clone().as_subclass(Marked),
    "logged": lambda x: x.clone().as_subclass(Logged),
}
WITHOUT_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {"meta": lambda x: x.to("meta"), "fake": fake}
REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "freed": lambda x: freed(x.clone()),
    "freed, strided": lambda x: freed(x.clone(), sliced, left=1),
    "freed, offset": lambda x: freed(x.clone(), offset),
    "freed in part": lambda x: freed(x.clone(), lambda x: x.repeat(2, *[1] * x.ndim)[1:], left=x.nbytes),
    "functional": lambda x: torch._to_functional_tensor(x),
    "nested": lambda x: nested(x, torch.strided),
    "jagged": lambda x: nested(x, torch.jagged),
    "sparse": lambda x: x.flatten()[None].to_sparse(),
    "sparse rows": lambda x: x.flatten()[None].to_sparse_csr(),
    "mkldnn": lambda x: torch.ones((2, 3), dtype=torch.float32, device="cpu").to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float().nan_to_num(0), 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64).conj(),
    "integers": lambda x: torch.ones_like(x, dtype=torch.int64),
    "wrapped": lambda x: Wrapped(x.clone()),
    "stubborn": lambda x: x.clone().as_subclass(Stubborn),
    "uninitialized": lambda x: nn.UninitializedParameter(dtype=x.dtype, device="cpu"),
    "list": lambda x: [1.0],
    "array": lambda x: x.double().numpy(),
}


# Tensors to write to


def alike(x: Tensor, filled_with: float = 0.0) -> Tensor:
    """Another tensor, contiguous."""
    made = torch.full(x.shape, filled_with, dtype=x.dtype, device=x.device)
    return made if type(x) is not FakeTensor else x.fake_mode.from_tensor(made)


def with_one_more(x: Tensor) -> Tensor:
    """The same, in memory that has place for one number more."""
    return torch.cat([x.flatten(), x.new_ones(1)])[:-1].view(x.shape)


def shifted(x: Tensor) -> Tensor:
    """What lies one number further in the memory of x, a tensor `with_one_more`."""
    return x.as_strided(x.shape, x.stride(), x.storage_offset() + 1)


OUTS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda x: None,
    "new": alike,
    "x": lambda x: x,
    "detached": lambda x: x.detach(),
    "shifted": shifted,
    "strided": lambda x: torch.stack([alike(x), alike(x)], -1)[..., 1],
    "out negated": lambda x: torch._neg_view(alike(x)),
    "out marked": lambda x: alike(x).as_subclass(Marked),
}
REFUSED_OUTS: dict[str, Callable[[Tensor], Any]] = {
    "repeated": lambda x: torch.empty((1,) * x.ndim, dtype=x.dtype, device=x.device).expand(x.shape),
    "of a gradient": lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device, requires_grad=True),
    "out of inference mode": lambda x: made_in_inference_mode(torch.empty(x.shape, dtype=x.dtype, device=x.device)),
    "another shape": lambda x: torch.empty((2, *x.shape), dtype=x.dtype, device=x.device),
    "another dtype": lambda x: torch.empty(x.shape, dtype=torch.int32, device=x.device),
    "out meta": lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu" if x.is_meta else "meta"),
    "out sparse": lambda x: torch.zeros((2, 2), dtype=x.dtype, device="cpu").to_sparse(),
    "out freed": lambda x: freed(torch.ones(x.shape, dtype=x.dtype, device="cpu")),
    "out list": lambda x: [1.0],
}
