"""The layers whose inputs, activations and errors are rounded, and the hooks that do it. A layer type is a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from low_precision import torch_private
from low_precision.loss_scale import OverflowWatch
from low_precision.rules import AROUND_LAYERS, SITES, Rule, is_there
from low_precision.scheme import BatchPart, Clock, Quantizer, Scheme
from low_precision.tensor import Round
from low_precision.torch_private import untraced


@dataclass(frozen=True)
class LayerType:
    """What rounding has to know of a kind of layer.

    block_dim: along which dimension of its input and its output the blocks of a BlockFormat run, counted from the end:
    the features, or the channels of images with a batch dimension or without.
    """

    block_dim: int


LAYER_TYPES: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType(-1),
    nn.Conv1d: LayerType(-2),
    nn.Conv2d: LayerType(-3),
    nn.Conv3d: LayerType(-4),
}


def type_of(module: nn.Module) -> LayerType | None:
    """The row of its type, or of the first type that it is derived from; None for what is not such a layer."""
    return next((row for kind, row in LAYER_TYPES.items() if isinstance(module, kind)), None)


class LayerRounding(nn.Module):
    """The roundings of one layer, as a child of it, so that print(model) shows them.

    It shows those of the layer's parameters too, though `Weights` and the optimizer's hooks do them. A module that is
    none of LAYER_TYPES has no others.
    """

    def __init__(
        self,
        scheme: Scheme,
        rules: dict[str, Rule],
        name: str,
        layer: nn.Module,
        clock: Clock,
        overflow: OverflowWatch,
        part: BatchPart,
    ) -> None:
        """rules: those to show; the optimizer's come later, into the same dict. name: the layer's in its model."""
        super().__init__()
        kind = type_of(layer)
        self._rules, self._name, self._is_layer = rules, name, kind is not None
        self._block_dim = kind.block_dim if kind else -1
        self.inputs = scheme.quantizer("inputs", name, clock)
        self.activations = scheme.quantizer("activations", name, clock)
        self.input_errors = scheme.quantizer("errors", f"{name}.input", clock)
        self.output_errors = scheme.quantizer("errors", f"{name}.output", clock)
        self.clock, self.overflow, self.part = clock, overflow, part

    def shown(self) -> dict[str, Rule]:
        """The rules that reach this layer, in the order of SITES."""
        rules = {site: self._rules[site] for site in SITES if site in self._rules}
        reached = {site: rule for site, rule in rules.items() if is_there(site, rule)}
        return {site: rule for site, rule in reached.items() if self._is_layer or site not in AROUND_LAYERS}

    def extra_repr(self) -> str:
        return ", ".join(f"{site}={rule}" for site, rule in self.shown().items())

    # Not traced by torch.compile, to which step and call are constants: it would compile anew for each of them.
    @untraced
    def before(
        self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The layer's forward pre-hook: rounds what it reads."""
        x = arguments[0] if arguments else named["input"]
        replica = _replica(layer, x)
        self.clock.calls[self._name, self.training, replica] += 1
        private_error = self.input_errors is not None and self._has_private_error(layer)
        x = self._round(x, self.inputs, self.input_errors, replica, private_error=private_error)
        return ((x, *arguments[1:]), named) if arguments else ((), named | {"input": x})

    @untraced
    def after(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """The layer's forward hook: rounds what it gives."""
        hooks = torch_private.forward_hooks(layer)
        private = hooks is not None and hooks[0] == self.after and _is_new(layer, output)
        y = self._round(output, self.activations, self.output_errors, _replica(layer, output), private_value=private)
        return y if self.activations or y is output else y.clone()  # an in-place ReLU is refused on the view of Round

    def _round(
        self,
        x: Tensor,
        value: Quantizer | None,
        error: Quantizer | None,
        replica: int,
        private_value: bool = False,
        private_error: bool = False,
    ) -> Tensor:
        """`x` rounded by `value`, and its gradient by `error` when it comes.

        private_value, private_error: nobody else sees the tensor, or the gradient, which is then rounded in place.
        """
        if not (value or (error and x.requires_grad)):
            return x
        # Each of training and evaluation, and each replica, has calls of its own, so that none takes another's noise.
        passes = self.clock.calls[self._name, self.training, replica]
        call = 2 * (passes - 1) + self.training + (replica << 32)
        first_row = self.part.first_row(len(x)) if self.training and self.part.rows_before else 0
        dim = self._block_dim
        round_value = partial(value, call=call, dim=dim, first_row=first_row) if value else None
        round_error = None
        if error:
            rounded = partial(error, call=call, dim=dim, first_row=first_row)
            round_error = partial(self._round_error, error, rounded, private_error)
        if not private_value:
            return Round.apply(x, round_value, round_error)  # type: ignore[no-any-return, no-untyped-call]
        if round_value:
            round_value(x.detach(), out=x.detach())
        if round_error and x.requires_grad:
            x.register_hook(round_error)  # type: ignore[no-untyped-call]
        return x

    def _round_error(
        self, error: Quantizer, rounded: Callable[..., Tensor], private_error: bool, gradient: Tensor
    ) -> Tensor:
        if self.overflow.active:
            self.overflow.note(error.beyond(gradient))
        return rounded(gradient, out=gradient if private_error and not gradient.requires_grad else None)

    def _has_private_error(self, layer: nn.Module) -> bool:
        """Whether torch's own operation alone reads the rounded input and makes its gradient, and no hook sees either.

        Our own forward hook aside, that is: another one would be given the input, and could compute with it.
        """
        if torch_private.hooks_on_all_modules() or torch_private.has_backward_hooks(layer):
            return False
        hooks = torch_private.forward_hooks(layer)
        if torch_private.transforms_are_active() or hooks is None or len(hooks) > 1:
            return False
        return _has_torchs_forward(layer) and torch_private.is_last_pre_hook(layer, self.before)


def _has_torchs_forward(layer: nn.Module) -> bool:
    return type(layer) in LAYER_TYPES and "forward" not in vars(layer)


def _is_new(layer: nn.Module, output: Tensor) -> bool:
    """Whether a layer's own operation made the output and nobody else can have seen it: it can be rounded in place."""
    if torch_private.transforms_are_active() or torch_private.hooks_on_all_modules():
        return False
    if output.grad_fn is None:  # autograd does not tell how the output was made, but torch's own layers make a new one
        return _has_torchs_forward(layer)
    return torch_private.is_made_by_a_layer(output)


def _replica(layer: nn.Module, x: Tensor) -> int:
    """Which of DataParallel's replicas the layer is: they run at once, one a device, and each needs its own noise."""
    return (x.device.index or 0) if torch_private.is_replica(layer) else 0
