"""Forty linear layers' tensors, made of whole numbers alone, so that every machine makes the same bits without torch.

A layer is x (128 rows, 256 inputs), W (128 outputs, 256 inputs) and the errors e (128 rows, 128 outputs): what the
peers of `bench/oracles.py` were given, and what the tests beside their numbers give to ours.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Words = NDArray[np.uint64]

SHAPES = {"x": (128, 256), "weight": (128, 256), "errors": (128, 128)}


def words(name: str, shape: tuple[int, ...]) -> Words:
    """64 bits for each number: SplitMix64 of its place, from a start that the name decides."""
    start = np.uint64(zlib.crc32(name.encode()) << 32)
    with np.errstate(over="ignore"):
        z = (np.arange(int(np.prod(shape)), dtype=np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z ^ (z >> np.uint64(31))).reshape(shape)


def whole(name: str, shape: tuple[int, ...], low: int, high: int) -> NDArray[np.int64]:
    """Whole numbers from low to high - 1."""
    return (words(name, shape) >> np.uint64(16)).astype(np.int64) % (high - low) + low


def scaled(numbers: NDArray[np.int64], exponents: int | NDArray[np.int64]) -> Array:
    """numbers * 2**exponents as float32, rounded once where they are below its normal numbers."""
    return np.ldexp(numbers.astype(np.float64), exponents).astype(np.float32)


def bell(name: str, shape: tuple[int, ...], exponents: int | NDArray[np.int64] = 0) -> Array:
    """Nearly normal numbers of 23 bits, deviation 1.15 * 2**exponents: four whole numbers of 22 bits added."""
    fours = [whole(f"{name} {part}", shape, 0, 2**22) for part in range(4)]
    return scaled(sum(fours) - 2**23 + 2, np.asarray(exponents) - 21)


def signs(name: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return whole(f"{name} sign", shape, 0, 2) * 2 - 1


def diagonal(shape: tuple[int, ...], every: int = 16) -> NDArray[np.bool_]:
    """One place in each group of `every` numbers, whether groups run along rows or columns."""
    row, column = np.indices(shape)
    return (row + column) % every == 5


# ---------------------------------------------------------------------------------------------------------------------
# Random ones: five kinds, four of each.

RANDOM: dict[str, Callable[[str, tuple[int, ...]], Array]] = {
    "normal": bell,
    "columns of their own size": lambda n, s: bell(n, s, whole(f"{n} size", (1, s[1]), -4, 5)),
    "rows of their own size": lambda n, s: bell(n, s, whole(f"{n} size", (s[0], 1), -4, 5)),
    "heavy tails": lambda n, s: bell(n, s, _geometric(n, s)),
    "small, a few columns large": lambda n, s: bell(n, s, np.where(whole(f"{n} size", (1, s[1]), 0, 32) == 0, 3, -7)),
}


def _geometric(name: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """How many of 12 bits are ones before the first zero: half of the numbers are 0, a quarter 1, ..."""
    low = words(f"{name} tail", shape) & np.uint64(0xFFF)
    return sum((low & np.uint64(2**k - 1)) == np.uint64(2**k - 1) for k in range(1, 13)).astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Hard ones.


def _near_largest(name: str, shape: tuple[int, ...]) -> Array:
    return scaled(signs(name, shape) * (2**24 - 2 ** whole(name, shape, 0, 24)), 104)


def _powers(name: str, shape: tuple[int, ...]) -> Array:
    return scaled(signs(name, shape), whole(name, shape, -12, 12))


def _ties_e4m3(name: str, shape: tuple[int, ...]) -> Array:
    """Odd multiples of half a spacing of e4m3, and its largest value in each group of 16, so that scales are 1."""
    ties = scaled(signs(name, shape) * (2 * whole(name, shape, 8, 16) + 1), whole(f"{name} power", shape, -11, 4))
    return np.where(diagonal(shape), np.float32(448), ties)


def _ties_e2m1(name: str, shape: tuple[int, ...]) -> Array:
    ties = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])[whole(name, shape, 0, 7)]
    return np.where(diagonal(shape), np.float32(6), ties * signs(name, shape).astype(np.float32))


def _largest(numerator: int, power: int) -> Callable[[str, tuple[int, ...]], Array]:
    """numerator * 2**power as the largest of each group of 16, times a power of two for each row."""

    def numbers(name: str, shape: tuple[int, ...]) -> Array:
        rows = whole(f"{name} row", (shape[0], 1), -6, 7)
        top = np.broadcast_to(scaled(np.int64([[numerator]]), power + rows), shape)
        others = bell(name, shape, rows - 3)
        return np.where(diagonal(shape), top, others)

    return numbers


def _blocks_of_their_own_size(name: str, shape: tuple[int, ...]) -> Array:
    """Groups of 16, from 1 down to 2**-40: scales of NVFP4 below e4m3's smallest number."""
    size = whole(name, (shape[0], shape[1] // 16), -40, 1)
    return bell(name, shape, np.repeat(size, 16, axis=1))


def _one_outlier(name: str, shape: tuple[int, ...]) -> Array:
    x = bell(name, shape, -8)
    x[17, 33] = 1000
    return x


def _zeros_of_both_signs(name: str, shape: tuple[int, ...]) -> Array:
    zeros = np.where(signs(name, shape) > 0, np.float32(0), np.float32(-0.0))
    return np.where(whole(name, shape, 0, 7) == 0, bell(name, shape), zeros)


def _zero_blocks(name: str, shape: tuple[int, ...]) -> Array:
    x = bell(name, shape)
    x[:64, :64] = 0
    x[100:, 100:] = -0.0
    x[3] = 0
    x[:, 99] = 0
    return x


HARD: dict[str, Callable[[str, tuple[int, ...]], Array]] = {
    "from 2**-20 to 2**20": lambda n, s: bell(n, s, whole(f"{n} size", s, -20, 21)),
    "near 2**-60": lambda n, s: bell(n, s, -60),
    "near 2**120": lambda n, s: bell(n, s, 120),
    "near float32's largest": _near_largest,
    "zeros": lambda n, s: np.zeros(s, np.float32),
    "zeros of both signs": _zeros_of_both_signs,
    "blocks of zeros": _zero_blocks,
    "constant rows": lambda n, s: np.broadcast_to(bell(n, (s[0], 1)), s).copy(),
    "constant columns": lambda n, s: np.broadcast_to(bell(n, (1, s[1])), s).copy(),
    "powers of two": _powers,
    "ties of e4m3": _ties_e4m3,
    "ties of e2m1": _ties_e2m1,
    "subnormal in float32": lambda n, s: scaled(whole(n, s, -(2**20), 2**20), -149),
    "near the smallest normal": lambda n, s: bell(n, s, -126),
    "one outlier": _one_outlier,
    "largest just above 7 * 2**k": _largest(7 * 2**21 + 1, -21),
    "largest 7 * 2**k": _largest(7, 0),
    "largest just below 2**k": _largest(2**24 - 1, -24),
    "blocks of their own size": _blocks_of_their_own_size,
    "whole numbers": lambda n, s: scaled(whole(n, s, -300, 301), 0),
}

NAMES = [f"{kind} {number}" for kind in RANDOM for number in range(1, 5)] + list(HARD)


@functools.cache
def layer(name: str) -> dict[str, Array]:
    """x, weight and errors of that name, not to be changed; the same bits whoever calls."""
    make = HARD.get(name) or RANDOM[name.rpartition(" ")[0]]
    return {tensor: np.ascontiguousarray(make(f"{name}, {tensor}", shape)) for tensor, shape in SHAPES.items()}


def cut(tensors: dict[str, Array]) -> dict[str, Array]:
    """A part of the layer: 100 rows, 200 inputs, 90 outputs."""
    sizes = {"x": (100, 200), "weight": (90, 200), "errors": (100, 90)}
    return {name: np.ascontiguousarray(tensors[name][:rows, :columns]) for name, (rows, columns) in sizes.items()}


def layer_digest(name: str) -> str:
    """The first digits of the SHA-256 of a layer's float32 numbers."""
    return hashlib.sha256(b"".join(tensor.astype("<f4").tobytes() for tensor in layer(name).values())).hexdigest()[:12]


def as_bfloat16(x: Array) -> Array:
    """Rounded to bfloat16's values, ties to even, largest to its largest: by whole numbers."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    rounded = np.where((rounded & 0x7FFFFFFF) >= 0x7F800000, (rounded & 0x80000000) | 0x7F7F0000, rounded)
    return rounded.astype(np.uint32).view(np.float32)


def matrices(tensors: dict[str, Array]) -> dict[str, Array]:
    """The six operands of a linear layer, each as the matrix (lines, what is summed) that its product reads."""
    x, w, e = tensors["x"], tensors["weight"], tensors["errors"]
    read = {
        "forward.inputs": x,
        "forward.weights": w,
        "dgrad.errors": e,
        "dgrad.weights": w.T,
        "wgrad.errors": e.T,
        "wgrad.inputs": x.T,
    }
    return {site: np.ascontiguousarray(matrix) for site, matrix in read.items()}


def in_groups(matrix: Array, group: str) -> Array:
    """The numbers that share a scale, a row for each group, in order; a shorter last group filled with zeros."""
    if group in ("tensor", "row"):
        return matrix.reshape(1 if group == "tensor" else len(matrix), -1)
    lines, numbers = (int(n) for n in (group if "x" in group else f"1x{group}").split("x"))
    filled = np.pad(matrix, [(0, -matrix.shape[0] % lines), (0, -matrix.shape[1] % numbers)])
    squares = filled.reshape(filled.shape[0] // lines, lines, filled.shape[1] // numbers, numbers)
    return squares.swapaxes(1, 2).reshape(-1, lines * numbers)


def from_groups(groups: Array, shape: tuple[int, ...], group: str) -> Array:
    """The matrix of that shape of which these are the groups."""
    if group in ("tensor", "row"):
        return groups.reshape(shape)
    lines, numbers = (int(n) for n in (group if "x" in group else f"1x{group}").split("x"))
    down, across = -(-shape[0] // lines), -(-shape[1] // numbers)
    filled = groups.reshape(down, across, lines, numbers).swapaxes(1, 2).reshape(down * lines, across * numbers)
    return np.ascontiguousarray(filled[: shape[0], : shape[1]])


def digest(codes: Array, scales: Array, group: str) -> str:
    """The first digits of the SHA-256 of an operand's codes and scales, as little-endian float32 numbers.

    codes: the matrix; scales: one of each group. Where all codes are zeros any scale does: it counts as 1.
    """
    scales = np.where((in_groups(codes, group) == 0).all(1), np.float32(1), scales)
    both = np.concatenate([codes.reshape(-1), scales.reshape(-1)]).astype("<f4")
    return hashlib.sha256(both.tobytes()).hexdigest()[:12]


def places(size: int) -> NDArray[np.int64]:
    """Four places, spread over so many numbers: those of a product that are kept."""
    return np.arange(4) * 7919 % size


def sampled(product: Array) -> str:
    """The numbers at those places of the product, row after row, as float32 bits in hexadecimal."""
    return " ".join(f"{bits:08x}" for bits in product.reshape(-1)[places(product.size)].astype("<f4").view("<u4"))


def from_text(text: str) -> Array:
    """The numbers of `sampled`."""
    return np.array([int(bits, 16) for bits in text.split()], np.uint32).view(np.float32)
