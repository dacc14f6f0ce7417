"""How a tensor is cut into the blocks of a BlockFormat, and the scale of each block: the same for every engine."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from low_precision.formats import BlockFormat


def rows(x: Tensor, fmt: BlockFormat, dim: int) -> Tensor:
    """The blocks of `x`: contiguous (blocks, elements of a block), zeros where the last block of a line is shorter.

    Blocks of so many elements run along `dim`, in row-major order of the other dimensions. Else each block is a row
    (all that has one index in the first dimension), a column (in the second), or the tensor; a tensor without such a
    dimension is one block. IndexError for a `dim` that there is not.
    """
    if x.ndim == 0:
        return x.reshape(1, 1)
    if fmt.block == "tensor" or (fmt.block == "column" and x.ndim < 2):
        return x.reshape(1, -1).contiguous()  # of every other number, reshape makes a view
    if fmt.block in ("row", "column"):
        line = x if fmt.block == "row" else x.movedim(1, 0)
        return line.reshape(line.shape[0], -1).contiguous()
    line, size = x.movedim(dim, -1), int(fmt.block)
    length = line.shape[-1]
    if length % size:
        line = torch.nn.functional.pad(line, (0, -length % size))
    return line.reshape(-1, size).contiguous()


def restore(blocks: Tensor, like: Tensor, fmt: BlockFormat, dim: int) -> Tensor:
    """The tensor of which these are the rows, with the shape and the layout of `like`."""
    if like.ndim == 0 or fmt.block in ("tensor", "row") or (fmt.block == "column" and like.ndim < 2):
        line = blocks.reshape(like.shape)
    elif fmt.block == "column":
        line = blocks.reshape(like.movedim(1, 0).shape).movedim(0, 1)
    else:
        shape, size = like.movedim(dim, -1).shape, int(fmt.block)
        padded = -(-shape[-1] // size) * size
        line = blocks.reshape(*shape[:-1], padded)[..., : shape[-1]].movedim(-1, dim)
    return line if line.stride() == like.stride() else torch.empty_like(like).copy_(line)


def maxima(blocks: Tensor, type_largest: float) -> Tensor:
    """The largest magnitude of each row, NaNs aside: (blocks, elements of a block) -> (blocks, 1).

    type_largest: the largest finite value of the tensor's type, for which infinities stand.
    """
    if blocks.numel() == 0:
        return blocks.new_zeros(len(blocks), 1)
    return blocks.abs().nan_to_num_(nan=0.0, posinf=type_largest).amax(1, keepdim=True)


def scales(largest_in: Tensor, fmt: BlockFormat, type_largest: float) -> Tensor:
    """The scale of each block, from the largest magnitude in it; see BlockFormat. 1 where there is nothing but zeros.

    (blocks, 1) -> float64 (blocks, 1). type_largest: the largest finite value of the tensor's type.
    """
    if largest_in.numel() == 0:
        return largest_in.double()
    largest_in = largest_in.double()
    if fmt.scale is None:
        places = (math.frexp(fmt.element.largest)[1] - 1) << 52
        scale = (_power_below(largest_in) - places).clamp_(_SMALLEST_SCALE, _LARGEST_SCALE).view(torch.float64)
    else:
        wanted = largest_in.clamp(max=counted(type_largest)) / fmt.element.largest
        tensor = tensor_scale(float(largest_in.amax()), fmt, type_largest)
        wanted = (wanted / tensor).clamp(fmt.scale.smallest_subnormal, fmt.scale.largest)
        normal = wanted.clamp(min=fmt.scale.smallest_normal)
        step = (_power_below(normal) - (fmt.scale.mantissa_bits << 52)).view(torch.float64)
        scale = (wanted / step).round() * step * tensor  # ties to even
    return scale.masked_fill(largest_in == 0, 1.0)


def _power_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above each of these float64 numbers, as its bits in int64: 0 below 2**-1022.

    By bits, because torch.ldexp computes in the default dtype, which a script may change.
    """
    return x.view(torch.int64) & _EXPONENT


_EXPONENT = 0x7FF << 52  # of float64
_SMALLEST_SCALE, _LARGEST_SCALE = (1023 - 127) << 52, (1023 + 127) << 52  # 2**-127 and 2**127


def narrowed(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 or float64 numbers that `dtype` holds, as that type, with the same bits whoever converts them.

    torch's conversions to and from two bytes give a NaN now these bits, now those, by its place in memory. Here it has
    those that torch gives most of them, whatever its sign was.
    """
    narrow = numbers.to(dtype)
    if dtype.itemsize > 2 or not may_have_nan(numbers):
        return narrow
    return narrow.view(torch.int16).masked_fill(numbers.isnan(), NAN_BITS[dtype]).view(dtype)


NAN_BITS = {torch.float16: 0x7FFF, torch.bfloat16: -1}  # in int16


def may_have_nan(numbers: Tensor) -> bool:
    """Whether there may be a NaN among them; on the CPU, where nobody waits for the answer, by their sum."""
    return not numbers.is_cpu or math.isnan(float(numbers.sum()))


def reached(numbers: Tensor, fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    """The rounded numbers of blocks, those of infinities within the type's values.

    They became the element's largest value times the scale. Where the element has more digits than the type, that may
    be beyond the type's largest value, which then is on the block's grid, and stands for it.
    """
    if dtype.itemsize > 2 or 2.0**-fmt.element.mantissa_bits >= torch.finfo(dtype).eps:
        return numbers
    return numbers.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)


def counted(type_largest: float) -> float:
    """The largest magnitude that a scale of NVFP4 follows: element.largest times it, rounded up by at most 1/16, must
    stay finite.
    """
    return type_largest * (15 / 16)


def tensor_scale(largest_in: float, fmt: BlockFormat, type_largest: float) -> float:
    """The tensor's own scale, a power of two, where a block's is a number of a format; largest_in: of all elements."""
    assert fmt.scale is not None
    wanted = min(largest_in, counted(type_largest)) / fmt.element.largest / fmt.scale.largest
    mantissa, exponent = math.frexp(max(wanted, 2.0**-130))  # not 0, which float64's smallest numbers would become
    exponent -= mantissa <= 0.5  # the smallest power of two not below
    return math.ldexp(1.0, min(max(exponent, -120), 127))  # all products of a value, a scale and this: float32 numbers
