"""The Hadamard transform of a tensor along one dimension, in blocks of N numbers, by additions in one defined order.

z = x diag(s) H / sqrt(N) for each block x of N numbers; see transforms.py. A product with the matrix would be summed in
an order that depends on the BLAS, the number of threads and the device. The fast transform (Fino and Algazi 1976) has
one order: log2 N steps, of which the step h = 1, 2, 4, ... replaces x_i and x_(i+h) by their sum and their difference,
wherever i has no bit h; then one multiplication by the float of 1 / sqrt(N). So all devices give the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from low_precision.engines import choice, door
from low_precision.noise import Key
from low_precision.transforms import SIGNS_OF_16

Sign = tuple[int, ...]  # +1 or -1 for each number of a block


def signs_from(key: Key, size: int) -> Sign:
    """So many signs, each from one bit of the words of a key, 64 of one word."""
    words = [key.fold(number).value for number in range(-(-size // 64))]
    return tuple(1 - 2 * (words[i // 64] >> (i % 64) & 1) for i in range(size))


def fixed_signs(seed: int, size: int) -> Sign:
    """Those of all layers, products and steps: TransformerEngine's for N = 16, and of other sizes the seed's."""
    return SIGNS_OF_16 if size == len(SIGNS_OF_16) else signs_from(Key.of(seed, "transform", "fixed", size), size)


def rotated(x: Tensor, dim: int, size: int, signs: Sign | None = None, parts: int = 1, backend: str = "auto") -> Tensor:
    """z = x diag(s) H / sqrt(N) in each block of `size` numbers along `dim`: a new tensor, filled with zeros to blocks.

    parts: the dimension holds so many sums, one after the other, each of which is filled and begins with a block.
    float32 or float64 of any shape, in memory as x is. Gradients are those of the matrix. Infinite numbers and NaN make
    their block NaN or infinite, as sums do. backend: the engine; all of them give the same bits.
    """
    return _apply(_filled(x, dim, size, parts), dim, size, signs, False, backend)


def rotated_back(
    z: Tensor, dim: int, size: int, signs: Sign | None, parts: int, length: int, backend: str = "auto"
) -> Tensor:
    """The inverse of `rotated`, x = z H^T diag(s) / sqrt(N). length: of that dimension before it was filled."""
    x = _apply(z, dim, size, signs, True, backend)
    if x.shape[dim] == length:
        return x
    return _apart(x, dim, parts).narrow(dim + 1, 0, length // parts).flatten(dim, dim + 1)


def filled_length(length: int, size: int, parts: int = 1) -> int:
    """Of a dimension of that length, once each of its sums is filled with zeros to blocks."""
    return parts * (-(-(length // parts) // size) * size)


def _filled(x: Tensor, dim: int, size: int, parts: int) -> Tensor:
    missing = -(x.shape[dim] // parts) % size
    if not missing:
        return x
    apart = _apart(x, dim, parts)
    zeros = apart.new_zeros(*apart.shape[: dim + 1], missing, *apart.shape[dim + 2 :])
    return torch.cat([apart, zeros], dim + 1).flatten(dim, dim + 1)


def _apart(x: Tensor, dim: int, parts: int) -> Tensor:
    """The sums that lie in one dimension, apart: that dimension becomes (parts, length of each)."""
    return x.reshape(*x.shape[:dim], parts, x.shape[dim] // parts, *x.shape[dim + 1 :])


def _apply(x: Tensor, dim: int, size: int, signs: Sign | None, back: bool, backend: str) -> Tensor:
    return _Rotation.apply(x, dim, size, signs, back, backend)  # type: ignore[no-any-return, no-untyped-call]


class _Rotation(torch.autograd.Function):
    """Of a tensor whose blocks are whole. back: by the inverse."""

    @staticmethod
    def forward(x: Tensor, dim: int, size: int, signs: Sign | None, back: bool, backend: str) -> Tensor:
        return _rotate(x, dim, size, signs, back, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.dim, ctx.size, ctx.signs, ctx.back, ctx.backend = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        # The matrix is orthogonal: its transpose, by which a gradient goes back, is its inverse.
        rotated = _apply(gradient, ctx.dim, ctx.size, ctx.signs, not ctx.back, ctx.backend)
        return rotated, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], x: Tensor, dim: int, *others: Any) -> tuple[Tensor, int]:
        return _apply(x.movedim(in_dims[0], 0), dim + 1, *others), 0


def _rotate(x: Tensor, dim: int, size: int, signs: Sign | None, back: bool, backend: str) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    factor = 1 / math.sqrt(size)
    if x.is_cpu and x.dtype == torch.float32 and door.is_open(x, None) and (loops := choice.loops(backend)):
        ones, of_signs = [1.0] * size, [float(sign) for sign in signs or [1] * size]
        before, after = (ones, [sign * factor for sign in of_signs]) if back else (of_signs, [factor] * size)
        return loops.rotate(x.detach(), dim, size, before, after)  # type: ignore[no-any-return]
    # Blocks that lie across the memory have sums of whole lines; others are laid across it, in memory of their own.
    after_it = x.shape[dim + 1 :].numel()
    across = after_it >= size
    z = x.reshape(-1, size, after_it) if across else x.movedim(dim, -1).reshape(1, -1, size).mT
    by_sign = _signs(signs, x) if signs else None
    z = z.clone(memory_format=torch.contiguous_format) if back or by_sign is None else (z * by_sign).contiguous()
    z = _butterfly(z, size).mul_(factor)
    if back and by_sign is not None:
        z.mul_(by_sign)
    z = z.view(x.shape) if across else z.mT.reshape(x.movedim(dim, -1).shape).movedim(-1, dim)
    result = torch.empty_like(x)  # in memory as x is: that decides which kernel of torch computes the product
    return z if z.stride() == result.stride() else result.copy_(z)


def _butterfly(z: Tensor, size: int) -> Tensor:
    """The sums of the fast transform along the middle one of three dimensions, of contiguous numbers, in place."""
    step, other = 1, torch.empty_like(z)
    while step < size:
        shape = len(z), size // (2 * step), 2, -1
        first, second = z.view(shape).unbind(2)
        sums, differences = other.view(shape).unbind(2)
        torch.add(first, second, out=sums)
        torch.sub(first, second, out=differences)
        z, other, step = other, z, 2 * step
    return z


def _signs(signs: Sign, like: Tensor) -> Tensor:
    """(N, 1), of that tensor's type and device."""
    column = torch.tensor(signs, dtype=like.dtype, device="cpu").unsqueeze(1)
    if like.is_cuda:  # from pinned memory nobody waits for the copy
        return column.pin_memory().to(like.device, non_blocking=True)
    return column.to(like.device)
