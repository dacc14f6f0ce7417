"""How the six operands of one call of a product are read: the rules, transforms and noise that each has there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from low_precision import blocks, hadamard, loss_scale
from low_precision.clock import Time
from low_precision.formats import NAMED, BlockFormat
from low_precision.forms import Reading
from low_precision.listener import Listener
from low_precision.noise import Key
from low_precision.products import Operand, Operands, Rotation, Rounds, round_operand
from low_precision.rounding import Rounding
from low_precision.rules import Reference
from low_precision.scheme import Quantizer, Scheme
from low_precision.tensor import quantize
from low_precision.transforms import Signs, Transform


class ProductCall:
    """One call of a product of two factors inside a module."""

    def __init__(
        self,
        scheme: Scheme,
        quantizer: Callable[[str, str], Quantizer | None],
        seed: int,
        time: Time,
        call: int,
        tensors: tuple[str, str],
        factors: tuple[Tensor, Tensor],
        are_weights: tuple[bool, bool],
        training: bool,
        notes: bool,
        watcher: Listener | None,
    ) -> None:
        """scheme: of the module. quantizer: of a site and a tensor. call: as Quantizer takes it. tensors: the names of
        the factors, by which their noise is told apart. notes: whether delayed scales learn of what is rounded.
        watcher: who listens to the product.
        """
        self._scheme, self._quantizer, self._seed, self._time, self._call = scheme, quantizer, seed, time, call
        self._step = time.step  # the way back may come after the optimizer's step
        self._tensors, self._factors, self._are_weights, self._training = tensors, factors, are_weights, training
        self._notes, self._watcher = notes, watcher
        # On the way back the error meets the other factor.
        self._products = "dgrad" if are_weights[1] else "wgrad", "dgrad" if are_weights[0] else "wgrad"

    def operands(self) -> Operands:
        first, second = map(role, self._are_weights)
        of_a, of_b = self._products
        return Operands(
            forward=(self._operand(f"forward.{first}", 0), self._operand(f"forward.{second}", 1)),
            errors=(self._error(f"{of_a}.errors", 0), self._error(f"{of_b}.errors", 1)),
            others=(self._operand(f"{of_a}.{second}", 1), self._operand(f"{of_b}.{first}", 0)),
            rotation=self._rotation("forward", 0),
            rotations=(self._rotation(of_a, 0), self._rotation(of_b, 1)),
            tell=self._tell if self._watcher is not None else None,
        )

    def _tell(self, of: int | None, turn: int, result: Tensor, exact: Callable[[], Tensor]) -> None:
        if self._watcher is not None:
            product = "forward" if of is None else self._products[of]
            self._watcher.product(product, self._tensors[0], (of, self._step, self._call, turn), result, exact)

    def backward_passes(self, name: str) -> Iterator[int]:
        """A count of them. name: of the product."""
        return self._time.backward_passes(("products", name, self._call))

    def _operand(self, site: str, factor: int) -> Operand:
        rule = self._scheme.rules.get(site)
        mask = _mask(self._quantizer(site, self._tensors[factor])) if site.startswith("forward.") else None
        return Operand(self._rounds(site, factor), isinstance(rule, Reference), mask)

    def _error(self, site: str, of: int) -> Operand:
        """The error where the gradient with respect to that factor is made."""
        rule, rounds = self._scheme.rules.get(site), self._rounds(site, of, is_error=True)
        if not isinstance(rule, Reference):
            return Operand(rounds)
        if len(set(self._products)) == 2:
            return Operand(rounds, is_reference=True)
        # A product of two inputs has no dgrad whose numbers could be meant: the rule of that operand is.
        return Operand(_one_after_the_other(self._rounds(rule.operand, of, is_error=True), rounds))

    def _rounds(self, site: str, factor: int, is_error: bool = False) -> Rounds | None:
        quantizer = self._quantizer(site, self._tensors[factor])
        if quantizer is None:
            return None
        part, first_row = self._time.part, 0
        if self._training and part.rows_before and not site.endswith(".weights"):
            # An error has the rows of the batch, whichever gradient it makes.
            rows = self._factors[self._are_weights[0]] if is_error else self._factors[factor]
            first_row = part.first_row(len(rows)) if rows.ndim else 0
        return _rounds(quantizer.noting(self._notes), self._call, self._step, first_row, is_error)

    def _rotation(self, product: str, of: int) -> Rotation | None:
        """The transform of a product. of: to which factor its gradient belongs; two inputs have two of one name."""
        transform = self._scheme.transforms.get(product)
        if transform is None:
            return None
        rounds = _rounds_to_bfloat16(self._scheme) if transform.bfloat16 else None
        signs = self._signs(transform, product, self._tensors[of])
        return Rotation(transform.size, signs, rounds, self._scheme.backend)

    def _signs(self, transform: Transform, product: str, tensor: str) -> Callable[[int], hadamard.Sign | None]:
        size = transform.size
        if transform.signs is not Signs.RANDOM:
            fixed = hadamard.fixed_signs(self._seed, size) if transform.signs is Signs.FIXED else None
            return lambda turn: fixed
        key = Key.of(self._seed, "transform", product, tensor).fold(self._step).fold(self._call)
        return lambda turn: hadamard.signs_from(key.fold(turn) if turn else key, size)


def role(is_weight: bool) -> str:
    """What a factor is called."""
    return "weights" if is_weight else "inputs"


def _rounds(quantizer: Quantizer, call: int, step: int, first_row: int, is_error: bool) -> Rounds:
    """products.round_operand for one operand of one product. is_error: whether a dynamic loss scale looks at it."""

    def rounds(operand: Tensor, reading: Reading, turn: int) -> Tensor:
        poison = loss_scale.note_error(quantizer, operand) if is_error else None
        rounded = round_operand(quantizer, operand, reading, call, step, first_row, turn)
        return rounded if poison is None else rounded.masked_fill(poison, float("nan"))

    return rounds


def _one_after_the_other(first: Rounds | None, second: Rounds | None) -> Rounds | None:
    if first is None or second is None:
        return first or second
    return lambda x, reading, turn: second(first(x, reading, turn), reading, turn)


class _Trust(Quantizer):
    """In the place of a Quantizer whose scale is QuEST's: 1 for each number that is inside of the element's range once
    it is scaled, 0 for one that saturates. What saturates has no gradient. Source: QuEST, arXiv:2502.05003.
    """

    def __call__(self, x: Tensor, *of_noise: object, dim: int | None = None, **more: object) -> Tensor:
        format = self.rule.format
        assert isinstance(format, BlockFormat)
        dim = min(1, x.ndim - 1) if dim is None else dim
        rows = blocks.rows(x, format, dim)
        factors = blocks.quest_factors(rows, format.element, torch.finfo(x.dtype).max)
        inside = (rows * factors.encode).abs() < format.element.largest
        return blocks.restore(inside.to(x.dtype), x, format, dim)


def _mask(quantizer: Quantizer | None) -> Callable[[Tensor, Reading], Tensor] | None:
    """Where the gradient of what it rounds passes; None: everywhere."""
    format = quantizer.rule.format if quantizer else None
    if quantizer is None or not isinstance(format, BlockFormat) or format.scaling.kind != "quest":
        return None
    trust = _Trust(quantizer.rule, quantizer.names, quantizer.clock, quantizer.overflow, quantizer.backend)
    return lambda x, reading: round_operand(trust, x, reading, 0, 0, 0, 0)


def _rounds_to_bfloat16(scheme: Scheme) -> Callable[[Tensor], Tensor]:
    return partial(
        quantize,
        format=NAMED["bfloat16"],
        rounding=Rounding.NEAREST,
        overflow=scheme.overflow,
        backend=scheme.backend,
    )
