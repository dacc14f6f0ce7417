"""The layers whose inputs, activations and errors are rounded, and the hooks that do it. A layer type is a row here."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from low_precision import torch_private
from low_precision.clock import Clock, Time
from low_precision.flow import place_of, replica_of, round_flowing
from low_precision.rules import AROUND_LAYERS, FLOWING, OPERANDS, Rule, effective
from low_precision.running import ModuleHooks, give_back, hidden, innermost, is_seen, lend
from low_precision.scheme import Quantizer, Scheme
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


class ShownFunctions:
    """In place of a module's extra_repr: what that says, and how the functions that the module calls are rounded."""

    def __init__(self, module: nn.Module, lines: list[str]) -> None:
        self._module, self._lines = module, lines

    def __call__(self) -> str:
        return "\n".join(filter(None, [type(self._module).extra_repr(self._module), *self._lines]))

    @staticmethod
    def show(module: nn.Module, lines: list[str]) -> None:
        """From now on print(module) shows these lines too; none: no more."""
        if isinstance(vars(module).get("extra_repr"), ShownFunctions):
            del module.extra_repr
        if lines and "extra_repr" not in vars(module):
            module.extra_repr = ShownFunctions(module, lines)  # type: ignore[method-assign]


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
        has_operands: bool,
    ) -> None:
        """rules: those to show; the optimizer's come later, into the same dict. name: the layer's in its model.

        has_operands: whether operands of its products are rounded.
        """
        super().__init__()
        kind = type_of(layer)
        self._rules, self.name, self._is_layer = rules, name, kind is not None
        self._block_dim = kind.block_dim if kind else -1
        self.inputs = scheme.quantizer("inputs", name, clock)
        self.activations = scheme.quantizer("activations", name, clock)
        self.input_errors = scheme.quantizer("errors", f"{name}.input", clock)
        self.output_errors = scheme.quantizer("errors", f"{name}.output", clock)
        self.clock = clock
        self._has_operands, self._transforms = has_operands, scheme.transforms if kind else {}
        self.not_called = False  # in the model's first forward pass: print(model) says so

    @property
    def flows(self) -> bool:
        """Whether something that the layer reads or gives is rounded."""
        return self._is_layer and (self._has_operands or any((self.inputs, self.activations, self.input_errors)))

    def shown(self) -> dict[str, Rule]:
        """The rules that reach this layer, in the order of SITES; momentum.NAME comes after momentum."""
        reached = effective(self._rules)
        around = {*AROUND_LAYERS, *OPERANDS} if self._is_layer else set()  # a layer is one product, and nothing else
        return {site: rule for site, rule in reached.items() if site in around or site not in FLOWING}

    def extra_repr(self) -> str:
        sites = ", ".join(f"{site}={rule}" for site, rule in (*self.shown().items(), *self._transforms.items()))
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
        frame = innermost(layer)
        if frame is not None:
            frame.own_passes = time.calls[self.name, self.training, replica]
        private_error = self.input_errors is not None and self._has_private_error(layer)
        if frame is None:  # hooks do all that there is to do
            lend()
        with hidden() if is_seen() else nullcontext():
            x = self._round(x, self.inputs, self.input_errors, time, replica, private_error=private_error)
        return ((x, *arguments[1:]), named) if arguments else ((), named | {"input": x})

    @untraced
    def after(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor | None) -> Tensor | None:
        """The layer's forward hook: rounds what it gives. After an error, that is None."""
        time = self.clock.now()
        try:
            if time.paused or output is None:
                return output
            hooks = self._foreign_hooks(layer)
            is_first = hooks is not None and hooks[:1] == [self.after]
            private = is_first and not self._has_operands and _is_new(layer, output)
            replica = replica_of(layer, output)
            with hidden() if is_seen() else nullcontext():
                y = self._round(output, self.activations, self.output_errors, time, replica, private_value=private)
                # An in-place ReLU is refused on the view that Round makes.
                return y if self.activations or y is output else y.clone()
        finally:
            give_back()

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
        hooks = self._foreign_hooks(layer)
        if _is_watched() or hooks is None or len(hooks) > 1:
            return False
        return _has_torchs_forward(layer) and torch_private.is_last_pre_hook(layer, self.before)

    def _foreign_hooks(self, layer: nn.Module) -> list[Any] | None:
        """The layer's forward hooks without the one that says that it ran; None where torch does not tell."""
        hooks = torch_private.forward_hooks(layer)
        if hooks is None or len(hooks) == 1:
            return hooks
        return [hook for hook in hooks if getattr(hook, "__func__", None) is not ModuleHooks.end]


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
