"""One call of a function with products, or of another one that computes numbers, inside a module that is rounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from low_precision import torch_private
from low_precision.clock import Clock, Time
from low_precision.flow import Place, place_of, round_flowing
from low_precision.formats import BlockFormat
from low_precision.forms import Convolution, Form, Linear
from low_precision.noted import Caller, Notes
from low_precision.operands import ProductCall, role
from low_precision.products import Product
from low_precision.rounding import Overflow
from low_precision.rules import AROUND_LAYERS, ELEMENTWISE, OPERANDS, Reference
from low_precision.scheme import Quantizer, Scheme

# The functions that layers of torch multiply by.
OWN_FUNCTIONS = frozenset(["linear", *(f"conv{name}{n}d" for name in ("", "_transpose") for n in (1, 2, 3))])


class ModuleRounding:
    """What rounds the functions that one module calls; and, where it is a layer, the operands of its own products."""

    def __init__(self, scheme: Scheme, name: str, clock: Clock, run: ModelRun, is_layer: bool, is_torchs: bool) -> None:
        """scheme: of this module. name: its full name. is_layer: whether hooks round what it reads and gives.

        is_torchs: whether the layer is of one of torch's own types, which call one function.
        """
        self.scheme, self.name, self.clock, self.run, self.is_layer = scheme, name, clock, run, is_layer
        references = (isinstance(scheme.rules.get(site), Reference) for site in OPERANDS)
        self.has_operands = self._has(OPERANDS) or any(references) or bool(scheme.transforms)
        self.has_elementwise = self._has((ELEMENTWISE,))
        self.has_products = self.has_operands or self._has(AROUND_LAYERS)
        self.is_plain_layer = is_layer and is_torchs and not self.has_operands  # hooks do all that there is to do
        self._quantizers: dict[tuple[str, str], Quantizer | None] = {}

    def _has(self, sites: tuple[str, ...]) -> bool:
        return any(self.scheme.quantizer(site, "", self.clock) for site in sites)

    def quantizer(self, site: str, tensor: str) -> Quantizer | None:
        """What rounds that tensor at that site; None where it stays as it is."""
        key = site, tensor
        if key not in self._quantizers:
            self._quantizers[key] = self.scheme.quantizer(site, tensor, self.clock)
        return self._quantizers[key]


class ModelRun:
    """What the calls of one model share: whose memory is a parameter's, and where calls are noted."""

    def __init__(self, model: nn.Module) -> None:
        self.notes: Notes | None = None
        self._model = model
        self._addresses: set[int] | None = None  # of the parameters' memory; None: not looked up in this forward pass

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"notes": None, "_addresses": None}  # a copy has memory of its own

    def begin(self) -> None:
        """A forward pass begins: parameters may have other memory by now."""
        self._addresses = None

    def is_weight(self, x: Tensor, module: nn.Module) -> bool:
        """Whether a tensor is a parameter or a view of one. module: that reads it; a replica has its own ones."""
        if isinstance(x, nn.Parameter):
            return True
        addresses = self._addresses  # another thread may forget them meanwhile
        if addresses is None:
            addresses = {
                address for p in self._model.parameters() if (address := torch_private.memory_of(p)) is not None
            }
            self._addresses = addresses
        address = torch_private.memory_of(x)
        if address in addresses:
            return True
        if address is None or not torch_private.is_replica(module):
            return False
        return any(isinstance(v, Tensor) and torch_private.memory_of(v) == address for v in vars(module).values())


@dataclass(eq=False)
class Frame:
    """A module that is running, in one thread."""

    rounding: ModuleRounding
    module: nn.Module
    time: Time
    replica: int
    call_frame: Any  # Python's, of the module's call; None where it cannot be told
    attention: list[str] = field(default_factory=list)  # products to come of attention that is being computed
    own_passes: int = 0  # forward passes of a layer since the last step, with this one
    numbers: Counter[str] = field(default_factory=Counter)  # how often each function was called in this call
    tried: dict[str, Frame] = field(default_factory=dict)  # the same module with other rules, by what is tried

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def caller(self) -> Caller:
        scheme = self.rounding.scheme
        return Caller(self.rounding.name, type(self.module).__name__, scheme.rules, scheme.transforms)

    def copy(self) -> Frame:
        """For a recomputation: the module calls the same functions again from here on."""
        return replace(
            self,
            call_frame=None,
            attention=list(self.attention),
            numbers=Counter(self.numbers),
            tried={name: frame.copy() for name, frame in self.tried.items()},
        )

    def name_of(self, function: str) -> tuple[str, bool]:
        """The full name of the next call of that function, and whether it is the layer's own.

        A layer's first product by its own function is the layer's: hooks round what the layer reads and gives.
        """
        number = self.numbers[function]
        if self.rounding.is_layer and not number and function in OWN_FUNCTIONS:
            return self.rounding.name, True
        return _numbered(self.rounding.name, function, number), False


class Call:
    """One call of a function. native: the function itself, as torch computes it."""

    def __init__(self, frame: Frame, function: str, native: Callable[..., Any], mode: TorchFunctionMode) -> None:
        """function: its name. mode: that sees the functions which are called."""
        self.frame, self.function, self.native, self.mode = frame, function, native, mode
        self._rounding = frame.rounding
        self.name, self.is_layers = frame.name_of(function)
        frame.numbers[function] += 1
        self._place = self._next_pass(self.name)
        self._read = 0  # operands so far
        self._rounded: Counter[str] = Counter()  # results so far, by name
        self._multiplied = False
        self._notes = self._rounding.run.notes
        self._sites: dict[int | None, str] = {}  # by memory, where the call has rounded a tensor; while it is noted

    def stored_site(self, x: Tensor, factor: int) -> str | None:
        """The site at which a factor was rounded when it was stored; None where it was not."""
        if self.is_layers and not factor:
            return "inputs"
        return "weights" if self.is_weight(x) else self._sites.get(torch_private.memory_of(x))

    def note_kernel(self, name: str, roles: list[str], *factors: Tensor | None) -> None:
        """A product that torch computes inside of a kernel. A factor that is made there is None."""
        if self._notes is not None:
            stored = [None if x is None else self.stored_site(x, n) for n, x in enumerate(factors)]
            needs = [x is not None and x.requires_grad for x in factors]
            full_name = self.name if self.is_layers else f"{self._rounding.name}:{name}"
            is_left = self._rounding.has_operands  # the rules are there, and not for a product of two inputs
            self._notes.product(self.frame.caller, full_name, roles, stored, needs, is_kernel=True, is_left=is_left)

    def note_unreached(self) -> None:
        """Nothing of this call is rounded, though its module has rules."""
        if self._notes is not None:
            self._notes.function(self.frame.caller, self.native, (), ())

    def same(self, original: Tensor, copy: Tensor) -> Tensor:
        """The copy of a tensor that has been rounded already."""
        if self._notes is not None and (site := self._sites.get(torch_private.memory_of(original))):
            self._sites[torch_private.memory_of(copy)] = site
        return copy

    def note_native(self, arguments: Iterable[Any]) -> None:
        """The whole call, of a module where nothing of it is rounded."""
        factors = [x for x in arguments if isinstance(x, Tensor)][:2]
        if len(factors) == 2:
            self.note_kernel(self.function, [role(self.is_weight(x)) for x in factors], *factors)
        if self.is_layers and self._notes is not None:
            self._notes.result(self.frame.caller, self.name, "activations")

    @property
    def has_operands(self) -> bool:
        """Whether operands of products are rounded."""
        return self._rounding.has_operands

    @property
    def is_rounded(self) -> bool:
        """Whether anything of the call is rounded."""
        return self._rounding.has_products or self._rounding.has_elementwise

    def is_retold(self, *factors: Tensor) -> bool:
        """Whether something is rounded inside of what torch computes in one kernel of these factors."""
        return self._rounding.has_elementwise or self._rounds_product(any(self.is_weight(x) for x in factors))

    def _rounds_product(self, has_weight: bool) -> bool:
        """Whether operands are rounded of a product that has a weight, or of one that has none."""
        return self._rounding.has_operands and (has_weight or not self._rounding.scheme.weights_only)

    def _next_pass(self, name: str) -> int:
        """How many passes through what has that name there were since the last step, with this one."""
        frame = self.frame
        if name == self._rounding.name:
            return frame.own_passes
        key = name, frame.training, frame.replica
        frame.time.calls[key] += 1
        return frame.time.calls[key]

    def _place_of(self, x: Tensor, passes: int, dim: int = -1) -> Place:
        return place_of(x, self.frame.time, passes, self.frame.training, self.frame.replica, dim)

    def _quantizer(self, site: str, tensor: str) -> Quantizer | None:
        return self._rounding.quantizer(site, tensor)

    def is_weight(self, x: Tensor) -> bool:
        """Whether its memory is that of a parameter."""
        return self._rounding.run.is_weight(x, self.frame.module)

    # The stored sites.

    def inputs(self, x: Tensor, dim: int = -1) -> Tensor:
        """What the function reads: rounded as `inputs`, its gradient as `errors`; weights are rounded already.

        dim: along which groups of numbers that share a scale run.
        """
        tensor = f"{self.name}[{self._read}]"
        self._read += 1
        if self.is_layers or not x.is_floating_point() or self.is_weight(x):
            return x
        read = self._flow(x, self._quantizer("inputs", tensor), self._quantizer("errors", f"{tensor}.input"), dim)
        if self._notes is not None:
            self._sites[torch_private.memory_of(read)] = "inputs"
        return read

    def activations(self, y: Tensor, dim: int = -1, infinite: Tensor | None = None) -> Tensor:
        """What the function gives: rounded as `activations`, its gradient as `errors`.

        infinite: an operand that was added; its infinities, as a mask has them, stay.
        """
        if not y.is_floating_point():
            return y
        if self._notes is not None:
            self._notes.result(self.frame.caller, self.name, "activations")
        if self.is_layers:
            return y
        tensor = self._another(self.name)
        value, error = self._quantizer("activations", tensor), self._quantizer("errors", f"{tensor}.output")
        rounded = self._flow(y, value, error, dim)
        if value is None and rounded is not y:
            return rounded.clone()  # in-place functions are refused on Round's view
        return rounded if infinite is None or rounded is y else self._with_infinities(y, infinite.isinf(), rounded)

    def elementwise(self, y: Tensor, part: str = "", infinite: Tensor | None = None) -> Tensor:
        """The result of an operation without products, and its gradient where all its readers' have been added.

        part: which of several results of one call it is. infinite: as in `activations`; or bool, where it may be.
        """
        if self._notes is not None and y.is_floating_point():
            self._notes.result(self.frame.caller, f"{self.name}{part}", ELEMENTWISE)
        if not (self._rounding.has_elementwise and y.is_floating_point()):
            return y
        tensor = self._another(f"{self.name}{part}")
        value, error = self._quantizer(ELEMENTWISE, tensor), self._quantizer(ELEMENTWISE, f"{tensor}.error")
        if infinite is not None and infinite.dtype != torch.bool:
            infinite = infinite.isinf()
        if infinite is not None and value is not None and isinstance(value.rule.format, BlockFormat):
            # An infinity would be the largest number of its block, which takes the scale from it.
            rounded = self._flow(y.masked_fill(y.isinf() & infinite, 0.0), value, error, -1)
        else:
            rounded = self._flow(y, value, error, -1)
        if self._notes is not None:
            self._sites[torch_private.memory_of(rounded)] = ELEMENTWISE
        return rounded if infinite is None else self._with_infinities(y, infinite, rounded)

    def _another(self, result: str) -> str:
        """The name of one more result of that name in this call, as recurrent layers have one for each step."""
        number = self._rounded[result]
        self._rounded[result] += 1
        return f"{result}[step {number}]" if number else result

    def _with_infinities(self, y: Tensor, where: Tensor, rounded: Tensor) -> Tensor:
        if self._rounding.scheme.overflow is not Overflow.SATURATE:
            return rounded
        return torch.where(y.isinf() & where, y, rounded)

    def _flow(self, x: Tensor, value: Quantizer | None, error: Quantizer | None, dim: int) -> Tensor:
        if not (value or (error and x.requires_grad)):
            return x
        try:
            return round_flowing(x, value, error, self.frame.time, self._place_of(x, self._place, dim))
        except TypeError as unfit:
            # An operator of torch (x * 2) takes a TypeError to mean that it does not know its operands, and says that.
            raise ValueError(f"{self.name}: {unfit}") from None

    # Products.

    def product(self, a: Tensor, b: Tensor, bias: Tensor | None, form: Form, dim: int = -1) -> Tensor:
        """What a function gives whose only product this is, with all its sites."""
        a, b = self.inputs(a, dim), self.inputs(b, dim)
        return self.activations(self.multiply(self.function, a, b, bias, form), dim)

    def multiply(self, name: str, a: Tensor, b: Tensor, bias: Tensor | None, form: Form) -> Tensor:
        """y = form(a, b) + bias, with rounded operands. name: of the product, among those of the module."""
        if name == self.function and not self._multiplied:
            full_name, passes, self._multiplied = self.name, self._place, True
        else:
            number = self.frame.numbers[name]
            self.frame.numbers[name] += 1
            full_name = _numbered(self._rounding.name, name, number)
            passes = self._next_pass(full_name)
        second_is_weight = isinstance(form, Linear | Convolution) or self.is_weight(b)
        first_is_weight = self.is_weight(a)
        is_real = a.is_floating_point() and b.is_floating_point()
        is_rounded = is_real and self._rounds_product(first_is_weight or second_is_weight)
        if self._notes is not None and (is_real or a.is_complex()):  # complex numbers are not rounded
            roles = [role(first_is_weight), role(second_is_weight)]
            stored = [self.stored_site(a, 0), self.stored_site(b, 1)] if is_real else [None, None]
            needs = [a.requires_grad, b.requires_grad]
            is_left = is_real and self._rounding.has_operands and not is_rounded  # no operand of a recipe's
            self._notes.product(self.frame.caller, full_name, roles, stored, needs, not is_real, is_left)
        if not is_rounded:
            return form.forward(a, b, bias)
        dtype = _type_of_result(a, b, bias)
        if dtype is None:
            return form.forward(a, b, bias)  # torch's own error
        if dtype in HALVES:  # the product is computed in float32, and its result is of that type
            a, b, bias = a.float(), b.float(), None if bias is None else bias.float()
        added, restore = None, None
        if self._rounding.scheme.transforms:
            if not isinstance(form, Linear | Convolution):  # a bias is added to a result of that shape
                bias, added = None, bias
            form, a, b, restore = form.as_matrices(a, b)
        product = self._product_call(full_name, passes, (a, b), (first_is_weight, second_is_weight))
        passes_back = product.backward_passes(full_name)
        y: Tensor = Product.apply(a, b, bias, form, product.operands(), passes_back)  # type: ignore[no-untyped-call]
        y = restore(y) if restore else y
        return (y if added is None else y + added).to(dtype)

    def _product_call(
        self, name: str, passes: int, factors: tuple[Tensor, Tensor], are_weights: tuple[bool, bool]
    ) -> ProductCall:
        # Both factors of one kind have noise of their own; those of a layer have the layer's name alone.
        tensors = (name, name) if self.is_layers else (f"{name}[0]", f"{name}[1]")
        place = self._place_of(factors[0], passes)
        watcher = self._rounding.clock.watcher
        return ProductCall(
            self._rounding.scheme,
            self._quantizer,
            self._rounding.clock.seed,
            self.frame.time,
            place.call,
            tensors,
            factors,
            are_weights,
            self.frame.training,
            place.notes,
            watcher if watcher is not None and watcher.is_on and place.notes else None,
        )


HALVES = (torch.float16, torch.bfloat16)


def _type_of_result(a: Tensor, b: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """The type of the result of torch's own product; None where torch refuses factors of several types."""
    if torch.is_autocast_enabled(a.device.type):
        return torch.get_autocast_dtype(a.device.type)
    is_one = b.dtype == a.dtype and (bias is None or bias.dtype == a.dtype)
    return a.dtype if is_one else None


def _numbered(module: str, function: str, number: int) -> str:
    """The full name of a function that a module calls: the later ones of one call of the module have numbers."""
    return f"{module}:{function}.{number}" if number else f"{module}:{function}"
