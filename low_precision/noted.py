"""What one forward pass of a model called: each product with its operands, and each other function; as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from low_precision.names import computes, multiplies, name_of
from low_precision.rules import ELEMENTWISE, Rule, is_there
from low_precision.torch_private import memory_of
from low_precision.transforms import Transform

NOT_ROUNDED = "not rounded"
_HEAD = ("module", "function", "tensor", "rule", "times")


class Row(NamedTuple):
    """One tensor of a product or of another function, and how it is rounded.

    module: its full name, "" for the model itself. kind: the module's type. function: the name of the product or
    function in the module, "" for a layer's own product. tensor: an operand site; activations or elementwise for
    results. rule: FORMAT:ROUNDING, an operand that it refers to, or "not rounded". times: how many such tensors there
    were. transform: what an operand is multiplied by before it is rounded, "" for nothing.
    """

    module: str
    kind: str
    function: str
    tensor: str
    rule: str
    times: int
    transform: str = ""

    @property
    def shown(self) -> str:
        """The rule, and the transform before it."""
        return f"{self.rule} with {self.transform}" if self.transform else self.rule


class Caller(NamedTuple):
    """The module that calls: its full name, its type's name, the rules of its sites, and its products' transforms."""

    module: str
    kind: str
    rules: Mapping[str, Rule]
    transforms: Mapping[str, Transform] = MappingProxyType({})


class Notes:
    """The notes of one forward pass."""

    def __init__(self) -> None:
        # By the fields of a Row, with no times.
        self._counts: Counter[Row] = Counter()
        self.modules: set[str] = set()  # that were called
        self.reached: dict[str, set[str]] = {}  # sites that there was something for, with the modules where it was
        self.unreached: dict[tuple[str, str, str], None] = {}  # (function, module, kind) whose products are not rounded

    def rows(self) -> list[Row]:
        """In the order in which they were called first."""
        return [row._replace(times=times) for row, times in self._counts.items()]

    def shown(self, module: str) -> list[str]:
        """The functions that a module called with their rules, "matmul: forward.inputs=float8:nearest, ..."."""
        rules: dict[str, dict[str, str]] = {}
        for row in self.rows():
            if row.module == module and row.function and (row.rule != NOT_ROUNDED or row.transform):
                rules.setdefault(row.function, {})[row.tensor] = row.shown
        functions: dict[str, list[str]] = {}
        for function, of_function in rules.items():
            text = ", ".join(f"{tensor}={rule}" for tensor, rule in of_function.items())
            functions.setdefault(text, []).append(function)
        return [f"{', '.join(names)}: {text}" for text, names in functions.items()]

    def product(
        self,
        caller: Caller,
        name: str,
        roles: Sequence[str],
        stored: Sequence[str | None],
        need_gradients: Sequence[bool],
        is_kernel: bool = False,
        is_left: bool = False,
    ) -> None:
        """A product whose operands have sites. name: its full one. roles: of its factors, inputs or weights.

        stored: the sites at which the factors were rounded when they were made. is_kernel: what the product reads is
        inside of a kernel of torch, where no operand is rounded. is_left: the rules of operands are not for it.
        """
        is_bare = is_kernel or is_left
        for role, site in zip(roles, stored, strict=True):
            self._reach(caller, role, *(() if is_left else (f"forward.{role}",)))
            self._add(caller, name, f"forward.{role}", site, is_bare)
        for other, needs_gradient in enumerate(need_gradients, start=-1):  # the error meets the other factor
            if needs_gradient:
                product = "dgrad" if roles[other] == "weights" else "wgrad"
                sites = f"{product}.errors", f"{product}.{roles[other]}"
                self._reach(caller, "errors", *(() if is_left else sites))
                self._add(caller, name, sites[0], "errors", is_bare)
                self._add(caller, name, sites[1], stored[other], is_bare)

    def result(self, caller: Caller, name: str, site: str) -> None:
        """The result of a call, or an inner part of it, that its site rounds."""
        self._reach(caller, site)
        self._add(caller, name, site)

    def function(
        self, caller: Caller, function: Callable[..., Any], operands: Iterable[Any], results: Iterable[Any]
    ) -> None:
        """A function that is left alone: its products, if it has any, and its results are not rounded."""
        name = name_of(function)
        if multiplies(function):
            self.unreached[name, caller.module, caller.kind] = None
            self._add(Caller(caller.module, caller.kind, {}), name, "forward.inputs")
        elif computes(function):
            memories = {memory_of(x) for x in _floating(operands)}
            # What shares an operand's memory is a view of it, or was written there; without operands it is a constant.
            in_place = getattr(function, "__name__", "").endswith("_")
            if memories and any(in_place or memory_of(y) not in memories for y in _floating(results)):
                self._reach(caller, ELEMENTWISE)
                self._add(Caller(caller.module, caller.kind, {}), name, ELEMENTWISE)

    def _reach(self, caller: Caller, *sites: str) -> None:
        for site in sites:
            self.reached.setdefault(site, set()).add(caller.module)

    def _add(self, caller: Caller, name: str, tensor: str, stored: str | None = None, is_kernel: bool = False) -> None:
        sites = [site for site in (None if is_kernel else tensor, stored) if site in caller.rules]
        rules = [caller.rules[site] for site in sites if site is not None and is_there(site, caller.rules[site])]
        rest = name.removeprefix(caller.module)
        # A module may be named e or d, and what it calls embedding or dropout.
        function = name if rest[:1].isalnum() or rest[:1] == "_" else rest.removeprefix(":")
        transform = None if is_kernel else caller.transforms.get(tensor.partition(".")[0])
        unruled = "bfloat16:nearest" if transform and transform.bfloat16 else NOT_ROUNDED
        rule = str(rules[0]) if rules else unruled
        row = Row(caller.module, caller.kind, function, tensor, rule, 0, str(transform or ""))
        self._counts[row] += 1


def _floating(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]


@dataclass(frozen=True)
class Coverage:
    """The products and functions of one forward pass, and how each of their tensors is rounded. str() is a table."""

    rows: tuple[Row, ...]

    @property
    def not_rounded(self) -> tuple[Row, ...]:
        """The rows of what stays in float32."""
        return tuple(row for row in self.rows if row.rule == NOT_ROUNDED)

    def sentence(self) -> str:
        """What stays in float32, in one line: products by operand, and other functions by name; "" for nothing."""
        products: Counter[str] = Counter()
        functions: Counter[str] = Counter()
        for row in self.not_rounded:
            if row.tensor == ELEMENTWISE:
                functions[_base(row.function) or row.kind.lower()] += row.times  # a layer by its kind
            elif row.tensor == "activations":
                functions["products"] += row.times
            else:
                products[row.tensor] += row.times
        of_products = "" if not products else f"operands of products: {_counted(products)}"
        of_functions = "" if not functions else f"results of {_counted(functions)}"
        return "; ".join(filter(None, (of_products, of_functions)))

    def __str__(self) -> str:
        lines = [_HEAD]
        for row in self.rows:
            name = f"{row.module or '(the model)'} ({row.kind})"
            lines.append((name, row.function or "-", row.tensor, row.shown, str(row.times)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _base(function: str) -> str:
    """Without its number among the calls of one module, or the part of it."""
    return function.partition(".")[0].partition(":")[0].partition("[")[0]


def _counted(names: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in names.items())
