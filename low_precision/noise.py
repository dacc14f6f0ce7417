"""The bits of stochastic rounding: a pure function of (key, element index), the same for every engine.

word(key, index) is 32 bits: the index, mixed by a 32-bit hash of three multiplications, Wellons' triple32
(https://nullprogram.com/blog/2018/07/31/), with a 32-bit word of the key XORed in before each of them. With the first
alone, two keys would have the same words in another order; with the first two, some pairs of streams still share
more words than chance gives (up to 29 of 65,536, where 1 is expected). Two multiplications (lowbias32, keyed alike)
fail TestU01's SmallCrush. The key's words come from splitmix64's finalizer (Steele, Lea and Flood 2014) over a hash of
what the stream is for.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch

from low_precision import torch_private

LOW_WORD = 2**31  # the draw of the low words of 64-bit ones

# The engines that have their own `word` and `mix64` read these numbers here.
SHIFTS, MULTIPLIERS = (17, 11, 15, 14), (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)  # triple32's
MIX_SHIFTS, MIX_MULTIPLIERS = (30, 27, 31), (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64's finalizer
GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment, 2**64 over the golden ratio

_MASK64 = 2**64 - 1
_SHIFT_0, _SHIFT_1, _SHIFT_2 = MIX_SHIFTS  # names of their own: mix64 is called for each rounding of a run
_MULTIPLIER_0, _MULTIPLIER_1 = MIX_MULTIPLIERS


def mix64(z: int) -> int:
    """splitmix64's finalizer: a bijection of 64 bits in which every input bit reaches every output bit."""
    z = ((z ^ (z >> _SHIFT_0)) * _MULTIPLIER_0) & _MASK64
    z = ((z ^ (z >> _SHIFT_1)) * _MULTIPLIER_1) & _MASK64
    return z ^ (z >> _SHIFT_2)


@dataclass(frozen=True)
class Key:
    """Names one stream of random words. `value` is a whole number below 2**64; equal keys, equal words.

    first_row: how many rows, by its first dimension, of a larger tensor come before the one that is rounded: its
    elements take the words that they would take there.
    """

    value: int
    first_row: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not 0 <= self.value <= _MASK64:
            raise ValueError(f"key: given {self.value!r}, allowed: a whole number, 0 <= key < 2**64")

    @classmethod
    def of(cls, *parts: int | str) -> Key:
        """The key of these parts, in this order: Key.of(seed, "weights", "layer1.weight")."""
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest, "little"))

    def fold(self, number: int) -> Key:
        """A further key, one for each whole `number` >= 0: a step, a call."""
        return Key(mix64((self.value + GAMMA * (number + 1)) & _MASK64), self.first_row)

    def first_element(self, rows: int, elements: int) -> int:
        """The index of the first of so many elements in so many rows."""
        return self.first_row * elements // max(rows, 1)

    def parts(self, block: int = 0, draw: int = 0) -> tuple[int, int, int]:
        """The three 32-bit words that enter the hash, for elements [block * 2**32, (block + 1) * 2**32).

        `draw` 0 is the word that rounds; 1, 2, ... are further words of the same elements (eager.py, `_round_deep`).
        """
        start = (self.value + GAMMA * (1 + block + (draw << 32))) & _MASK64
        mixed, more = mix64(start), mix64(start ^ _MASK64)
        return mixed & 0xFFFFFFFF, mixed >> 32, more & 0xFFFFFFFF


def _signed(word: int) -> int:
    """The int32 of the same bits: torch computes with int32, where uint32 has no shifts."""
    return word - 2**32 if word >= 2**31 else word


_SIGNED_MULTIPLIERS = tuple(_signed(word) for word in MULTIPLIERS)
_MASKS = tuple(2 ** (32 - shift) - 1 for shift in SHIFTS)  # of the bits that a shift without the sign leaves


@lru_cache(maxsize=4)
def _counter(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def words(key: Key, start: int, count: int, device: torch.device | str = "cpu", draw: int = 0) -> torch.Tensor:
    """Words of elements [start, start + count): int32 (count,), uniform over all 2**32 bit patterns.

    The range must not cross a multiple of 2**32 (ValueError).
    """
    block, low = divmod(start, 2**32)
    if low + count > 2**32:
        raise ValueError(f"elements [{start}, {start + count}) cross a multiple of 2**32")
    # What is made while somebody watches torch's operations may be a tensor of theirs, which nobody else must get.
    counter = _counter.__wrapped__ if torch_private.somebody_watches() else _counter
    return hash_words(counter(count, torch.device(device)) + _signed(low), key.parts(block, draw))


def hash_words(index: torch.Tensor, parts: tuple[int, int, int]) -> torch.Tensor:
    """word(key, index) for the low 32 bits of the indices, int32 of any shape, which is overwritten.

    int32 products wrap; `>>` keeps the sign, so the bits that it shifts in are masked away.
    """
    x = index
    for part, shift, mask, multiplier in zip(parts, SHIFTS, _MASKS, _SIGNED_MULTIPLIERS, strict=False):
        x.bitwise_xor_(_signed(part))
        x.bitwise_xor_((x >> shift).bitwise_and_(mask)).mul_(multiplier)
    return x.bitwise_xor_((x >> SHIFTS[3]).bitwise_and_(_MASKS[3]))
