"""Products of two tensors in index notation: einsum, and what is one by another name."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from low_precision.forms import Form, Matmul, Reading


@dataclass(frozen=True)
class Contraction:
    """y = einsum("a,b->y"), a letter for each dimension of a, b and y.

    Each letter stands in two of the three, or in all of them; in each of the three products the letters that both
    operands have and the result has not are summed, and those that all three have count matrices of their own.
    multiply: another function of torch that computes y from a and b; torch.einsum without one.
    """

    a: str
    b: str
    y: str
    multiply: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        y = self.multiply(a, b) if self.multiply else torch.einsum(f"{self.a},{self.b}->{self.y}", a, b)
        return y if bias is None else y + bias

    def gradient_a(self, error: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return torch.einsum(f"{self.y},{self.b}->{self.a}", error, b)

    def gradient_b(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum(f"{self.y},{self.a}->{self.b}", error, a)

    def gradient_bias(self, error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return error

    def readings_forward(self, a: Tensor, b: Tensor) -> tuple[Reading, Reading]:
        return self._readings(self.a, self.b, self.y)

    def readings_a(self, error: Tensor, b: Tensor) -> tuple[Reading, Reading]:
        return self._readings(self.y, self.b, self.a)

    def readings_b(self, error: Tensor, a: Tensor) -> tuple[Reading, Reading]:
        return self._readings(self.y, self.a, self.b)

    def as_matrices(self, a: Tensor, b: Tensor) -> tuple[Form, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """matmul of matrices whose rows, columns and sums are each one dimension."""
        batch = [letter for letter in self.a if letter in self.b and letter in self.y]
        summed = [letter for letter in self.a if letter in self.b and letter not in self.y]
        rows = [letter for letter in self.a if letter not in self.b]
        columns = [letter for letter in self.b if letter not in self.a]
        sizes = dict(zip(self.a + self.b, (*a.shape, *b.shape), strict=True))
        count = {name: math.prod(sizes[letter] for letter in name) for name in map(tuple, (rows, columns, summed))}
        matrices = [math.prod(sizes[letter] for letter in batch)] if batch else []

        def matrix(x: Tensor, names: str, *order: list[str]) -> Tensor:
            moved = x.permute([names.index(letter) for letter in (*batch, *order[0], *order[1])])
            return moved.reshape(*matrices, *(count[tuple(part)] for part in order))

        def result(y: Tensor) -> Tensor:
            order = [*batch, *rows, *columns]
            return y.reshape([sizes[letter] for letter in order]).permute([order.index(letter) for letter in self.y])

        return Matmul(len(matrices)), matrix(a, self.a, rows, summed), matrix(b, self.b, summed, columns), result

    @staticmethod
    def _readings(first: str, second: str, result: str) -> tuple[Reading, Reading]:
        def reading(letters: str, other: str) -> Reading:
            shared = [d for d, letter in enumerate(letters) if letter in other]
            over = tuple(d for d in shared if letters[d] not in result)
            return Reading(over, tuple(d for d in shared if d not in over))

        return reading(first, second), reading(second, first)


def letters(count: int, start: int = 0) -> str:
    """So many letters of index notation, from that one on."""
    return string.ascii_letters[start : start + count]


def parsed(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str]:
    """The letters of each operand of torch.einsum and of its result, an ellipsis written out.

    ValueError for what is no equation of these operands, which torch refuses in its own words.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        raise ValueError(equation)
    free = [letter for letter in string.ascii_letters if letter not in equation]
    # What "..." stands for, aligned at its end, as dimensions are in broadcasting.
    hidden = [x.ndim - len(term.replace("...", "")) for term, x in zip(terms, operands, strict=True)]
    longest = max((n for term, n in zip(terms, hidden, strict=True) if "..." in term), default=0)
    dots = "".join(free[:longest])
    written = []
    for term, n in zip(terms, hidden, strict=True):
        if n < 0 or (n and "..." not in term):
            raise ValueError(equation)
        written.append(term.replace("...", dots[longest - n :], 1))
    result = right.replace("...", dots, 1)
    if not all(letter in string.ascii_letters for letter in "".join([*written, result])):
        raise ValueError(equation)
    if len(set(result)) < len(result) or not set(result) <= set("".join(written)):
        raise ValueError(equation)
    for term, x in zip(written, operands, strict=True):
        if len(set(zip(term, x.shape, strict=True))) > len(set(term)):  # a diagonal of what is no square
            raise ValueError(equation)
    if arrow:
        return written, result
    counts = Counter("".join(terms).replace(".", ""))
    return written, dots + "".join(sorted(letter for letter, n in counts.items() if n == 1))


def simplified(x: Tensor, term: str, others: str, sizes: dict[str, int]) -> tuple[Tensor, str]:
    """The operand and its letters, each once, and none that is in no other term or is broadcast there.

    others: the letters of all other terms and of the result. sizes: of each letter over all operands.
    """
    for letter in dict.fromkeys(term):
        while term.count(letter) > 1:  # a diagonal, which is laid at the end
            first = term.index(letter)
            second = term.index(letter, first + 1)
            x = x.diagonal(0, first, second)
            term = "".join(one for d, one in enumerate(term) if d not in (first, second)) + letter
    for letter in term:
        place = term.index(letter)
        if letter not in others:
            x = x.sum(place)
        elif x.shape[place] == 1 and sizes[letter] != 1:
            x = x.squeeze(place)
        else:
            continue
        term = term.replace(letter, "")
    return x, term
