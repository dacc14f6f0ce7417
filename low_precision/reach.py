"""What the rounding of a model does not reach: refused, or said in one sentence."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from low_precision.layers import LAYER_TYPES, type_of
from low_precision.rules import OPERANDS, PRODUCTS
from low_precision.torch_private import parameters_of

# Layers of torch with matrix products that are not rounded.
_UNREACHED_TYPES = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
    nn.MultiheadAttention,
)
# Functions of torch with matrix products, by name; in place they have an underscore at the end.
_PRODUCTS = frozenset(
    [
        *("linear", "bilinear", "conv1d", "conv2d", "conv3d", "convolution", "conv_tbc"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        *("matmul", "mm", "mv", "dot", "vdot", "inner", "bmm", "chain_matmul"),
        *("addmm", "addmv", "addbmm", "baddbmm", "multi_dot", "vecdot", "tensordot", "einsum", "rmatmul"),
        *("grouped_mm", "scaled_mm", "scaled_grouped_mm", "foreach_mm", "int_mm", "linear_cross_entropy"),
        *("sparse_mm", "sparse_addmm", "smm", "spmm", "dsmm", "hsmm", "hspmm", "saddmm", "sspaddmm"),
        *("scaled_dot_product_attention", "multi_head_attention_forward"),
        *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    ]
)
_SHOWN = 3  # names of modules of one kind


def computed_weights(module: nn.Module) -> list[str]:
    """The names of a module's tensors that it computes from parameters before each forward pass.

    So torch.nn.utils.parametrize does, and what is built on it, and the older weight_norm and spectral_norm. Pruning,
    which multiplies by 0 or 1, is left out: numbers of a format stay such numbers.
    """
    parametrized = getattr(module, "parametrizations", None)
    names = list(parametrized) if isinstance(parametrized, nn.ModuleDict) else []
    parameters = parameters_of(module)
    for name in vars(module):
        weight_norm = f"{name}_g" in parameters and f"{name}_v" in parameters
        spectral_norm = f"{name}_orig" in parameters and f"{name}_mask" not in dict(module.named_buffers(recurse=False))
        if weight_norm or spectral_norm:
            names.append(name)
    return names


class Place(NamedTuple):
    """Products that are not rounded: those of a layer, or of a function that a module calls."""

    function: str | None
    module: nn.Module
    name: str  # of the module in its model; empty for the model itself


def unreached(modules: Mapping[str, nn.Module]) -> list[Place]:
    """Of these modules, by name, the layers with products around which nothing is rounded."""
    return [Place(None, module, name) for name, module in modules.items() if isinstance(module, _UNREACHED_TYPES)]


def described(name: str, module: nn.Module) -> str:
    """A module as the user knows it: its name in the model, and its type."""
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def warn(sites: Iterable[str], places: Iterable[Place], has_layers: bool, selected: bool = False) -> None:
    """One sentence that says what these sites do not reach. has_layers: whether they reach anything.

    selected: whether layers= leaves a part of the model out.
    """
    kinds = ", ".join(kind.__name__ for kind in LAYER_TYPES)
    nothing = f"reach nothing: {'what layers= selects' if selected else 'the model'} has no {kinds}"
    where = f"are rounded around {kinds} alone" if has_layers else nothing
    text = f"{_named(sites)} {where}" + (f"; not rounded: {_listed(places)}" if places else "")
    warnings.warn(text, stacklevel=2)


def warn_compiled(sites: Iterable[str]) -> None:
    """One sentence for a model that is compiled before anybody has listened to it."""
    kinds = ", ".join(kind.__name__ for kind in LAYER_TYPES)
    text = (
        f"{_named(sites)} are rounded around {kinds} alone; in a compiled model, products of other layers and of "
        "functions are not looked for: call it once before torch.compile to have them named"
    )
    warnings.warn(text, stacklevel=2)


def _named(sites: Iterable[str]) -> str:
    names = list(sites)
    if set(OPERANDS) <= set(names):
        names = [*(name for name in names if name not in OPERANDS), PRODUCTS]
    return ", ".join(names)


def _listed(places: Iterable[Place]) -> str:
    """The places, those of one function and one type of module together, a few names of each."""
    groups: dict[tuple[str | None, str], list[str]] = {}
    for function, module, name in places:
        groups.setdefault((function, type(module).__name__), []).append(name)
    texts = []
    for (function, kind), names in groups.items():
        shown = ", ".join(name for name in names[:_SHOWN] if name) + (", ..." if len(names) > _SHOWN else "")
        modules = f"{len(names)} {kind} ({shown})" if len(names) > 1 else f"{shown} ({kind})" if shown else kind
        texts.append(f"{function} in {modules}" if function else modules)
    return ", ".join(texts)


class Listener(TorchFunctionMode):
    """Notes the products that run outside the layers that are rounded, from when it is made until `end`."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        """modules: those that are rounded, by name. What is in layers of _UNREACHED_TYPES is known already."""
        super().__init__()
        known = {id(part) for place in unreached(modules) for part in place.module.modules()}
        self._names = {id(module): name for name, module in modules.items() if id(module) not in known}
        self.places: dict[tuple[str, str], Place] = {}  # by function and name of the module
        self.__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:
        if not torch.compiler.is_compiling():  # a compiled part of the model is not looked into
            # Of linalg_vecdot, mm.default (in torch.ops), _grouped_mm, __matmul__ and addmm_ the word that counts.
            name = getattr(function, "__name__", "").partition(".")[0].removeprefix("linalg_").strip("_")
            if name in _PRODUCTS:
                self._note(name, [*arguments[1:2], *(named or {}).values()])
        return function(*arguments, **(named or {}))

    def end(self) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _note(self, function: str, factors: list[Any]) -> None:
        """Notes the function, and the innermost module that calls it, where its products are not rounded.

        factors: what may be the weight of the function.
        """
        frame: FrameType | None = inspect.currentframe()
        while frame is not None and not isinstance(frame.f_locals.get("self"), nn.Module):
            frame = frame.f_back
        if frame is None:
            return
        module: nn.Module = frame.f_locals["self"]
        name = self._names.get(id(module))
        if name is None or _is_its_product(module, function, factors):
            return
        self.places[function, name] = Place(function, module, name)


def _is_its_product(module: nn.Module, function: str, factors: list[Any]) -> bool:
    """Whether this is the product of a layer that is rounded: one of torch's own, or with the weight of its own."""
    if type_of(module) is None:
        return False
    own = {id(p) for p in parameters_of(module).values()}
    is_layers = function == "linear" or function.startswith("conv")
    return type(module) in LAYER_TYPES or (is_layers and any(id(factor) in own for factor in factors))
