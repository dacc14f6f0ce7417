"""Rounding to a table of values (tables.Table), in plain PyTorch, on any device: a part of the eager engine.

Where the rounding takes no random bits, each gap between two values has a threshold: the smallest number, of the type
that holds the numbers, that becomes the upper one. Which value a number becomes is how many thresholds do not lie above
it, so only comparisons decide, and they are exact.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from low_precision.noise import LOW_WORD, Key, words
from low_precision.rounding import AnyRounding, FewBits, Rounding, is_random
from low_precision.tables import Table

_CPU_BLOCK = 2**17  # numbers at a time: the temporaries of a block stay in the cache
_GPU_BLOCK = 2**24
_DIGITS = {torch.float32: 32, torch.float64: 53}  # how many random bits `stochastic` takes


def round_table(flat: Tensor, table: Table, rounding: AnyRounding, key: Key | None, first: int) -> Tensor:
    """flat: float32 or float64, contiguous (n,), its elements counted from `first` on -> new tensor, same.

    Beyond the ends is the end, and NaN stays NaN, with all its bits set, as in engines/eager.py.

    Stochastic: of the gap [a, b] around x let o be the end nearer to zero (a where zero lies between them), and p =
    |x - o| / (b - a), its three operations in float64. x becomes the other end where floor(p * 2**R) + r >= 2**R, with
    r of R random bits: 32 for float32 numbers, 53 for float64 ones, which begin with those. FewBits: its own R, and p
    rounded as it says.
    """
    rounded = torch.empty_like(flat)
    size = _CPU_BLOCK if flat.device.type == "cpu" else _GPU_BLOCK
    start = 0
    while start < len(flat):
        index = first + start
        stop = min(start + size, start + 2**32 - index % 2**32, len(flat))  # what `words` can give
        block = flat[start:stop]
        if is_random(rounding):
            assert key is not None
            result = _stochastic(block, table, rounding, key, index)
        else:
            places = torch.searchsorted(thresholds(table, rounding, flat.dtype, flat.device), block, right=True)
            result = values(table, flat.dtype, flat.device)[places]
        whole = torch.int64 if flat.dtype == torch.float64 else torch.int32
        all_bits = torch.iinfo(whole).max
        rounded[start:stop].view(whole).copy_(
            torch.where(block.isnan(), block.view(whole) | all_bits, result.view(whole))
        )
        start = stop
    return rounded


def _stochastic(x: Tensor, table: Table, rounding: AnyRounding, key: Key, index: int) -> Tensor:
    of_table = values(table, x.dtype, x.device)
    x = x.clamp(table.lowest, table.largest)  # of a NaN nobody reads the result
    below = torch.searchsorted(of_table[1:-1], x, right=True)
    low, high = of_table[below], of_table[below + 1]
    from_low = high > 0
    base, other = torch.where(from_low, low, high), torch.where(from_low, high, low)
    share = (x.double() - base.double()).abs() / (high.double() - low.double())
    up = reached(share, _bits(x.dtype, rounding), rounding) + _drawn(x, rounding, key, index)
    return torch.where(up >= 2 ** _bits(x.dtype, rounding), other, base)


def _bits(dtype: torch.dtype, rounding: AnyRounding) -> int:
    return rounding.bits if isinstance(rounding, FewBits) else _DIGITS[dtype]


def reached(share: Tensor, bits: int, rounding: AnyRounding) -> Tensor:
    """What a share of a gap, float64, 0 .. 1, counts for beside so many random bits: int64, 0 .. 2**bits."""
    multiple = share.nan_to_num() * 2.0**bits
    if isinstance(rounding, FewBits) and rounding.half_offset:
        multiple = multiple + 0.5
    whole = multiple.round() if isinstance(rounding, FewBits) and rounding.even else multiple.floor()
    return whole.to(torch.int64)


def _drawn(x: Tensor, rounding: AnyRounding, key: Key, index: int) -> Tensor:
    """The top random bits of each number's word: int64."""
    bits = _bits(x.dtype, rounding)
    word = words(key, index, len(x), x.device).to(torch.int64) & 0xFFFFFFFF
    if bits <= 32:
        return word >> (32 - bits)
    low = words(key, index, len(x), x.device, LOW_WORD).to(torch.int64) & 0xFFFFFFFF
    return (word << (bits - 32)) | (low >> (64 - bits))


@functools.lru_cache(maxsize=64)
def values(table: Table, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values, in order."""
    return torch.tensor(table.values, dtype=dtype, device=device)


@functools.lru_cache(maxsize=256)
def thresholds(table: Table, rounding: AnyRounding, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One a gap: the smallest number of the type that becomes the upper end, by a rounding that is not random."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    of_table = np.array(table.values, np.float64)
    low, high = of_table[:-1], of_table[1:]
    upper_is_odd = (table.first_code + np.arange(1, len(of_table))) % 2 == 1
    upper_is_nearer_zero = np.abs(high) < np.abs(low)
    if rounding in (Rounding.NEAREST, Rounding.NEAREST_AWAY):
        tie_goes_up = ~upper_is_nearer_zero if rounding is Rounding.NEAREST_AWAY else ~upper_is_odd
        # The sum of both ends is total + rest, exactly; its half is compared with the nearest number of the type.
        total = low + high
        rest = (low - (total - (total - low))) + (high - (total - low))
        middle = (total / 2).astype(kind)
        beyond = 2 * middle.astype(np.float64) - total  # exact
        is_at = (beyond > rest) | ((beyond == rest) & tie_goes_up)
        found = np.where(is_at, middle, np.nextafter(middle, kind(np.inf)))
    else:
        goes_up = {
            Rounding.UP: np.ones_like(upper_is_odd),
            Rounding.DOWN: np.zeros_like(upper_is_odd),
            Rounding.TOWARD_ZERO: upper_is_nearer_zero,
            Rounding.TO_ODD: upper_is_odd,
        }[rounding]  # type: ignore[index]
        low, high = low.astype(kind), high.astype(kind)
        found = np.where(goes_up, np.nextafter(low, kind(np.inf)), high)
    return torch.from_numpy(found).to(device)
