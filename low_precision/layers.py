"""The layers whose inputs, activations and errors are rounded, and the hooks that do it. A layer type is a row here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from low_precision import loss_scale, torch_private
from low_precision.clock import Clock, Time
from low_precision.functions import LayerOperands, LayerProducts
from low_precision.rules import AROUND_LAYERS, OPERANDS, Rule, effective
from low_precision.scheme import Quantizer, Scheme
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
    nn.ConvTranspose1d: LayerType(-2),
    nn.ConvTranspose2d: LayerType(-3),
    nn.ConvTranspose3d: LayerType(-4),
}


def type_of(module: nn.Module) -> LayerType | None:
    """The row of its type, or of the first type that it is derived from; None for what is not such a layer."""
    if isinstance(module, _NEVER_CALLED):
        return None
    return next((row for kind, row in LAYER_TYPES.items() if isinstance(module, kind)), None)


# The output layer of nn.MultiheadAttention: attention reads its parameters and multiplies by them itself.
_NEVER_CALLED = nn.modules.linear.NonDynamicallyQuantizableLinear


class LayerRounding(nn.Module):
    """The roundings of one layer, as a child of it, so that print(model) shows them.

    It shows those of the layer's parameters too, though `Weights` and the optimizer's hooks do them. A module that is
    none of LAYER_TYPES has no others.
    """

    def __init__(self, scheme: Scheme, rules: dict[str, Rule], name: str, layer: nn.Module, clock: Clock) -> None:
        """rules: those to show; the optimizer's come later, into the same dict. name: the layer's in its model."""
        super().__init__()
        kind = type_of(layer)
        self._rules, self.name, self._is_layer = rules, name, kind is not None
        self._block_dim = kind.block_dim if kind else -1
        self.inputs = scheme.quantizer("inputs", name, clock)
        self.activations = scheme.quantizer("activations", name, clock)
        self.input_errors = scheme.quantizer("errors", f"{name}.input", clock)
        self.output_errors = scheme.quantizer("errors", f"{name}.output", clock)
        self._operands = LayerOperands(scheme, name, clock)
        self.clock = clock
        self.not_called = False  # in the model's first forward pass: print(model) says so

    def shown(self) -> dict[str, Rule]:
        """The rules that reach this layer, in the order of SITES; momentum.NAME comes after momentum."""
        reached = effective(self._rules)
        return {
            site: rule for site, rule in reached.items() if self._is_layer or site not in (*AROUND_LAYERS, *OPERANDS)
        }

    def extra_repr(self) -> str:
        sites = ", ".join(f"{site}={rule}" for site, rule in self.shown().items())
        return f"{sites}; not called in the first pass" if self.not_called and self._is_layer else sites

    # Not traced by torch.compile, to which step and call are constants: it would compile anew for each of them.
    @untraced
    def before(
        self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The layer's forward pre-hook: rounds what it reads."""
        time = self.clock.now()
        if time.paused:
            return arguments, named
        x = arguments[0] if arguments else named["input"]
        replica = replica_of(layer, x)
        time.calls[self.name, self.training, replica] += 1
        private_error = self.input_errors is not None and self._has_private_error(layer)
        x = self._round(x, self.inputs, self.input_errors, time, replica, private_error=private_error)
        if self._operands.are_rounded:
            self._begin_products(x, time, replica)
        return ((x, *arguments[1:]), named) if arguments else ((), named | {"input": x})

    def _begin_products(self, x: Tensor, time: Time, replica: int) -> None:
        passes = time.calls[self.name, self.training, replica]
        call = place_of(x, time, passes, self.training, replica, self._block_dim).call
        LayerProducts(self._operands, call, time, self.training).begin()

    @untraced
    def end_products(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        """The layer's forward hook that comes first, and after an error too."""
        LayerProducts.end(self._operands)

    @untraced
    def after(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """The layer's forward hook: rounds what it gives."""
        time = self.clock.now()
        if time.paused:
            return output
        hooks = torch_private.forward_hooks(layer)
        first = [hook for hook in hooks or () if hook != self.end_products][:1]
        private = first == [self.after] and not self._operands.are_rounded and _is_new(layer, output)
        replica = replica_of(layer, output)
        y = self._round(output, self.activations, self.output_errors, time, replica, private_value=private)
        return y if self.activations or y is output else y.clone()  # an in-place ReLU is refused on the view of Round

    def _round(
        self,
        x: Tensor,
        value: Quantizer | None,
        error: Quantizer | None,
        time: Time,
        replica: int,
        private_value: bool = False,
        private_error: bool = False,
    ) -> Tensor:
        if not (value or (error and x.requires_grad)):
            return x
        passes = time.calls[self.name, self.training, replica]
        where = place_of(x, time, passes, self.training, replica, self._block_dim)
        return round_flowing(x, value, error, time, where, private_value, private_error)

    def _has_private_error(self, layer: nn.Module) -> bool:
        """Whether torch's own operation alone reads the rounded input and makes its gradient, and no hook sees either.

        Our own forward hook aside, that is: another one would be given the input, and could compute with it.
        """
        if torch_private.hooks_on_all_modules() or torch_private.has_backward_hooks(layer):
            return False
        hooks = torch_private.forward_hooks(layer)
        if _is_watched() or hooks is None or len(hooks) > 1:
            return False
        return _has_torchs_forward(layer) and torch_private.is_last_pre_hook(layer, self.before)


class Place(NamedTuple):
    """Which rounding of a tensor that flows through a model it is: what Quantizer.__call__ has to know of it."""

    call: int
    step: int
    dim: int
    first_row: int


def place_of(x: Tensor, time: Time, passes: int, training: bool, replica: int, dim: int) -> Place:
    """passes: how many forward passes there were, with this one. dim: along which groups of numbers run."""
    # Each of training and evaluation, each replica and each process has calls of its own, so that none takes another's
    # noise.
    call = 2 * (passes - 1) + training + (replica << 32) + (time.rank << 48)
    first_row = time.part.first_row(len(x)) if training and time.part.rows_before else 0
    return Place(call, time.step, dim, first_row)


def round_flowing(
    x: Tensor,
    value: Quantizer | None,
    error: Quantizer | None,
    time: Time,
    place: Place,
    private_value: bool = False,
    private_error: bool = False,
) -> Tensor:
    """`x` rounded by `value`, and its gradient by `error` when it comes; either may be None.

    private_value, private_error: nobody else sees the tensor, or the gradient, which is then rounded in place.
    """
    call, step, dim, first_row = place
    round_value = partial(value, call=call, step=step, dim=dim, first_row=first_row) if value else None
    round_error = None
    if error and x.requires_grad:
        backward_passes = time.backward_passes((*error.names, place.call))
        round_error = partial(_round_error, error, place, backward_passes, private_error)
    if not private_value:
        return Round.apply(x, round_value, round_error)  # type: ignore[no-any-return, no-untyped-call]
    if round_value:
        round_value(x.detach(), out=x.detach())
    if round_error:
        x.register_hook(round_error)  # type: ignore[no-untyped-call]
    return x


def _round_error(
    error: Quantizer, place: Place, backward_passes: Iterator[int], private: bool, gradient: Tensor
) -> Tensor:
    poison = loss_scale.note_error(error, gradient)
    out = gradient if private and not gradient.requires_grad else None
    rounded = error(gradient, **place._asdict(), out=out, backward_pass=next(backward_passes))
    return rounded if poison is None else rounded.masked_fill(poison, float("nan"))


def _is_watched() -> bool:
    """Whether a transform or a mode of torch may see each operation, and so each tensor."""
    return torch_private.transforms_are_active() or torch_private.dispatch_modes_are_active()


def _has_torchs_forward(layer: nn.Module) -> bool:
    return type(layer) in LAYER_TYPES and "forward" not in vars(layer)


def _is_new(layer: nn.Module, output: Tensor) -> bool:
    """Whether a layer's own operation made the output and nobody else can have seen it: it can be rounded in place."""
    if _is_watched() or torch_private.hooks_on_all_modules():
        return False
    if output.grad_fn is None:  # autograd does not tell how the output was made, but torch's own layers make a new one
        return _has_torchs_forward(layer)
    return torch_private.is_made_by_a_layer(output)


def replica_of(layer: nn.Module, x: Tensor) -> int:
    """Which of DataParallel's replicas the layer is: they run at once, one a device, and each needs its own noise."""
    return (x.device.index or 0) if torch_private.is_replica(layer) else 0
