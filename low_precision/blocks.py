"""How a tensor is cut into the groups of a BlockFormat, and the scale of each group: the same for every engine.

A group is a row of a matrix here. Groups of MxN numbers are M such rows each, which share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from low_precision.formats import BlockFormat, Format
from low_precision.tables import Table


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
    if fmt.sizes is None:
        line = x if fmt.block == "row" else x.movedim(1, 0)
        return line.reshape(line.shape[0], -1).contiguous()
    line, size = x.reshape(-1) if fmt.is_flat else x.movedim(dim, -1), fmt.sizes[1]
    length = line.shape[-1]
    if length % size:
        line = torch.nn.functional.pad(line, (0, -length % size))
    return line.reshape(-1, size).contiguous()


def restore(blocks: Tensor, like: Tensor, fmt: BlockFormat, dim: int) -> Tensor:
    """The tensor of which these are the rows, with the shape and the layout of `like`."""
    if like.ndim == 0 or fmt.block in ("tensor", "row") or (fmt.block == "column" and like.ndim < 2):
        line = blocks.reshape(like.shape)
    elif fmt.sizes is None:
        line = blocks.reshape(like.movedim(1, 0).shape).movedim(0, 1)
    elif fmt.is_flat:
        line = blocks.reshape(-1)[: like.numel()].reshape(like.shape)
    else:
        shape, size = like.movedim(dim, -1).shape, fmt.sizes[1]
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


def shared(of_blocks: Tensor, x: Tensor, fmt: BlockFormat, dim: int) -> Tensor:
    """What each row's group has as its largest, from each row's own: (blocks, 1) -> (blocks, 1). Groups of MxN alone.

    M rows of a group lie beside each other along the dimension before `dim`, for the first dimension along the last.
    """
    if fmt.sizes is None or fmt.sizes[0] == 1 or x.ndim < 2 or x.numel() == 0:
        return of_blocks
    shape = x.movedim(dim, -1).shape
    grid = of_blocks.reshape(*shape[:-1], -1).movedim(-1, dim)
    return shared_grid(grid, fmt, dim).movedim(dim, -1).reshape(-1, 1)


def shared_grid(grid: Tensor, fmt: BlockFormat, dim: int) -> Tensor:
    """The same where the blocks' maxima have the tensor's shape, but for `dim`, along which they are one a block."""
    assert fmt.sizes is not None
    before, lines = dim % grid.ndim - 1, fmt.sizes[0]
    line = grid.movedim(before, -1)
    padded = torch.nn.functional.pad(line, (0, -line.shape[-1] % lines))
    grouped = padded.reshape(*padded.shape[:-1], -1, lines)
    largest = grouped.amax(-1, keepdim=True).expand_as(grouped).reshape(padded.shape)
    return largest[..., : line.shape[-1]].movedim(-1, before)


# Scales that are powers of two, and exact


def powers(largest_in: Tensor, fmt: BlockFormat) -> Tensor:
    """The scale of each block, by which its numbers are divided; see scales.SCALES. 1 where there are but zeros.

    largest_in: the largest magnitudes, of any shape -> float64, the same shape.
    """
    if largest_in.numel() == 0:
        return largest_in.double()
    places = (math.frexp(fmt.element.largest)[1] - 1) << 52
    exponents = (largest_in.double().view(torch.int64) + addend(fmt, 52)) & _EXPONENT
    scale = (exponents - places).clamp_(_SMALLEST_SCALE, _LARGEST_SCALE).view(torch.float64)
    return scale.masked_fill(largest_in == 0, 1.0)


def addend(fmt: BlockFormat, digits: int) -> int:
    """What is added to the bits of amax, a number with so many digits, so that their exponent is that of its scale.

    e8m0 cuts the mantissa off, e8m0_ceil goes up for any that is not 0, e8m0_rceil for one above that of the element's
    largest value, e8m0_even for one that would be rounded up to as many digits as the element has, from half on.
    """
    kind, element = fmt.scaling.kind, fmt.element
    if kind == "e8m0_ceil":
        return (1 << digits) - 1
    if kind == "e8m0_rceil":
        return (1 << digits) - 1 - int((2 * math.frexp(element.largest)[0] - 1) * (1 << digits))
    if kind == "e8m0_even" and isinstance(element, Format) and element.mantissa_bits < digits:
        return 1 << digits - 1 - element.mantissa_bits
    return 0


def _power_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above each of these float64 numbers, as its bits in int64: 0 below 2**-1022.

    By bits, because torch.ldexp computes in the default dtype, which a script may change.
    """
    return x.view(torch.int64) & _EXPONENT


def _power_not_above(x: Tensor) -> Tensor:
    """The same of numbers > 0 as float64, subnormal ones too, which become larger by an exact factor first."""
    up = torch.where(x < 1, x.new_full((), 2.0**64), x.new_ones(()))
    return _power_below(x * up).view(torch.float64) / up


_EXPONENT = 0x7FF << 52  # of float64
_SMALLEST_SCALE, _LARGEST_SCALE = (1023 - 127) << 52, (1023 + 127) << 52  # 2**-127 and 2**127


# Scales by which numbers are multiplied, with float32's rounding


class Factors(NamedTuple):
    """What a block's numbers are multiplied by before they are rounded to the element, and what undoes it.

    All in the tensor's type, float32 or float64, whose rounding each operation has. A number x becomes its element q =
    ELEMENT(x * encode); its value is q / encode, or with two levels (q * decode) * tensor.
    """

    encode: Tensor
    decode: Tensor | None = None  # with two levels: the block's scale, a number of its format
    tensor: Tensor | None = None  # (): the tensor's


def factors(
    largest_in: Tensor, fmt: BlockFormat, to_nearest: Callable[[Tensor, Format], Tensor], scale: Tensor | None = None
) -> Factors:
    """The factors of blocks from their largest magnitudes, of any shape; see scales.SCALES.

    largest_in: float32 or float64, the type in which all is computed; finite, >= 0. to_nearest: how the engine rounds
    numbers to a format. scale: (), what stands still in delayed scaling. Sources: TransformerEngine's kernels of
    quantization and torchao's float8; docs/formats.md says where they differ.
    """
    kind, largest = fmt.scaling.kind, fmt.element.largest
    if kind == "delayed":
        assert scale is not None
        return Factors(scale.to(largest_in.dtype).expand(largest_in.shape))
    if fmt.scale_format is not None:
        return _two_levels(largest_in, fmt.element, fmt.scale_format, to_nearest)
    if kind == "headroom":
        return Factors((0.75 / powers(largest_in, fmt)).to(largest_in.dtype))
    # A number in place of the tensor would be multiplied by the reciprocal, which is rounded too.
    encode = (largest_in.new_full((), largest) / largest_in).clamp_(max=torch.finfo(largest_in.dtype).max)
    if kind == "pow2":
        encode = _power_not_above(encode.double()).to(largest_in.dtype)
    return Factors(encode.masked_fill_(largest_in == 0, 1.0))


def _two_levels(
    largest_in: Tensor, element: Format | Table, scale: Format, to_nearest: Callable[[Tensor, Format], Tensor]
) -> Factors:
    """As TransformerEngine has NVFP4: each operation rounds, so their order decides the last bits."""
    most, one = torch.finfo(largest_in.dtype).max, largest_in.new_ones(())
    amax = largest_in.amax() if largest_in.numel() else one
    tensor_encode = (largest_in.new_full((), element.largest * scale.largest) / amax).clamp(max=most)
    tensor_encode = torch.where((amax == 0) | (tensor_encode == 0), one, tensor_encode)
    tensor_decode = one / tensor_encode
    decode = to_nearest(largest_in * (tensor_encode * (one / one.new_full((), element.largest))), scale)
    encode = (one / (decode * tensor_decode).clamp_(max=most)).clamp_(max=most)  # not 0, which makes infinities NaN
    return Factors(encode, decode, tensor_decode)


def quest_factors(blocks: Tensor, element: Format | Table, type_largest: float) -> Factors:
    """Of QuEST, from all numbers of each block: (blocks, elements of a block), float32 or float64.

    1/s is the largest power of two that is not above the standard deviation, times 2.92247856 / largest, plus 1e-8.
    The sums are float64's, in halves: the same whoever adds them. What fills up a shorter block counts. Source: Quartet
    (arXiv:2505.14669) and its repository.
    """
    numbers = blocks.double().nan_to_num(nan=0.0, posinf=type_largest, neginf=-type_largest)
    count = numbers.new_full((), blocks.shape[1])
    mean, squares = _sum(numbers) / count, _sum(numbers * numbers) / count
    deviation = (squares - mean * mean).clamp_(min=0.0).sqrt()
    bits = _power_below(deviation * quest_factor(element) + 1e-8).clamp(_SMALLEST_SCALE, _LARGEST_SCALE)
    return Factors((1.0 / bits.view(torch.float64)).to(blocks.dtype))


def quest_factor(element: Format | Table) -> float:
    """What the deviation is multiplied by: the largest of 16 values is best for 2.92247856 deviations."""
    return 2.92247856 / element.largest


def _sum(numbers: Tensor) -> Tensor:
    """Of each row: the first half is added to the second one, until one is left. (rows, n) -> (rows, 1)."""
    length = 1 << (numbers.shape[1] - 1).bit_length()
    numbers = torch.nn.functional.pad(numbers, (0, length - numbers.shape[1]))
    while length > 1:
        length //= 2
        numbers = numbers[:, :length] + numbers[:, length:]
    return numbers


def scaled_back(elements: Tensor, factors: Factors) -> Tensor:
    """The values of rounded elements; beyond the type's largest value, that one stands for them."""
    most = torch.finfo(elements.dtype).max
    if factors.decode is None or factors.tensor is None:
        return (elements / factors.encode).clamp_(-most, most)
    return (elements * factors.decode).mul_(factors.tensor).clamp_(-most, most)


def narrowed(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 or float64 numbers that `dtype` holds, as that type, with the same bits whoever converts them.

    torch's conversions to and from two bytes give a NaN now these bits, now those, by its place in memory. Here it has
    those that torch gives most of them, whatever its sign was.
    """
    narrow = numbers.to(dtype)
    if dtype.itemsize > 2 or not may_have_nan(numbers):
        return narrow
    narrow.view(torch.int16).masked_fill_(numbers.isnan(), NAN_BITS[dtype])  # a new tensor might lie in another order
    return narrow


NAN_BITS = {torch.float16: 0x7FFF, torch.bfloat16: -1}  # in int16


def may_have_nan(numbers: Tensor) -> bool:
    """Whether there may be a NaN among them; on the CPU, where nobody waits for the answer, by their sum."""
    return not numbers.is_cpu or math.isnan(float(numbers.sum()))


def with_nans_of(numbers: Tensor, rounded: Tensor) -> Tensor:
    """The rounded numbers, in their type, with NaNs where `numbers` has some: of that sign, and with all other bits."""
    numbers = numbers.to(rounded.dtype)
    whole = torch.int64 if numbers.dtype == torch.float64 else torch.int32
    nans = (numbers.view(whole) | torch.iinfo(whole).max).view(numbers.dtype)
    return torch.where(numbers.isnan(), nans, rounded)


def reached(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The rounded numbers of blocks, within the type's values: its largest stands for what is beyond.

    That is an infinity, which became the element's largest value times the scale, or a number that was rounded up.
    """
    return numbers.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
