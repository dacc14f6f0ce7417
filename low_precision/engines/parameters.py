"""What an engine's inner loop has to know of a format and a rounding: whole numbers, the same for every engine."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from low_precision.formats import Format
from low_precision.rounding import AnyRounding, FewBits, Overflow

# Rounding's values, and FewBits; those from STOCHASTIC on take random bits.
MODES = ("nearest", "nearest_away", "toward_zero", "up", "down", "to_odd", "stochastic", "few")
NEAREST, NEAREST_AWAY, TOWARD_ZERO, UP, DOWN, TO_ODD, STOCHASTIC, FEW_BITS = range(len(MODES))  # their places
SATURATE, PROPAGATE, INFINITE = range(3)  # what a kernel knows of overflow


def mode_of(rounding: AnyRounding) -> int:
    """The rounding's place in MODES."""
    return FEW_BITS if isinstance(rounding, FewBits) else MODES.index(rounding.value)


def overflow_of(overflow: Overflow, fmt: Format) -> int:
    """SATURATE, PROPAGATE or INFINITE. Where a format has no infinity, none can be propagated."""
    if overflow is Overflow.INFINITY:
        return INFINITE
    return PROPAGATE if overflow is Overflow.PROPAGATE and fmt.has_infinity else SATURATE


class Parameters(NamedTuple):
    """Of float32 numbers. Magnitudes: the bits of one without its sign. Masks: all 32 bits, or none.

    A kernel reads them from memory by these names, so their order is the order there.
    """

    normal_drop: int  # how many bits the mantissa of every normal value of the format loses
    lowest_level: int  # the exponent, as in float32's bits, whose last place all smaller numbers have too, less 1
    mantissa: int  # the format's bits
    same_bias: int  # 1 where the format's bias is float32's: its last place may be no normal number of float32
    fast_from: int  # the smallest magnitude above zero from which on all numbers lose the same bits; 0: never look
    deep_below: int  # the magnitude below which stochastic rounding takes more than one word
    largest: int  # the largest magnitude of a positive number
    largest_negative: int  # and of a negative one
    signed_zero: int  # a mask: whether there is a negative zero
    random_bits: int  # FewBits.bits
    half_offset: int  # a mask: FewBits.half_offset
    even: int  # a mask: FewBits.even
    unsigned: int  # a mask
    ends_odd: int  # a mask: Format.ends_odd
    levels_below: int  # of a block's element: how far its lowest level lies below the exponent of the block's largest
    type_largest: int  # the largest magnitude of the tensor's type, for which infinities stand in a block
    addend: int  # blocks.addend, for 23 digits

    def of_block(self, largest_in: int) -> Parameters | None:
        """Those of a block's numbers, not divided by their scale: `loops.blocks` does the same. self: the element's.

        largest_in: the largest magnitude in the block. None: so close to float32's smallest or largest numbers that the
        block must be left to another engine.
        """
        exponent = ((largest_in or bits(1.0)) + self.addend) >> 23
        lowest_level = exponent - self.levels_below
        if lowest_level + self.normal_drop < 31 or exponent == 255:
            return None
        largest = self.largest + ((exponent - (self.largest >> 23)) << 23)
        return self._replace(
            lowest_level=lowest_level,
            largest=largest,
            largest_negative=largest & ~self.unsigned,
            same_bias=0,
            fast_from=(lowest_level + 1) << 23 if self.signed_zero and 0 < self.mantissa < 23 else 0,
            deep_below=(lowest_level + self.normal_drop - 29) << 23,
        )


@lru_cache(maxsize=1024)
def parameters(fmt: Format, rounding: AnyRounding, type_largest: float = 0.0, addend: int = 0) -> Parameters:
    """What a kernel of float32 numbers reads. type_largest, addend: see Parameters; of blocks alone."""
    normal_drop, lowest_level = 23 - fmt.mantissa_bits, 127 - fmt.bias
    same_bias = fmt.bias == 127
    may_be_fast = fmt.has_negative_zero and 0 < fmt.mantissa_bits < 23
    enough = lowest_level + normal_drop - 30  # the exponent, less 1, from which on one random word is enough
    return Parameters(
        normal_drop=normal_drop,
        lowest_level=lowest_level,
        mantissa=fmt.mantissa_bits,
        same_bias=int(same_bias),
        fast_from=(1 if same_bias else (lowest_level + 1) << 23) if may_be_fast else 0,
        deep_below=(enough + 1) << 23 if enough > 0 else 0,
        largest=bits(fmt.largest),
        largest_negative=bits(abs(fmt.lowest)),
        signed_zero=0xFFFFFFFF if fmt.has_negative_zero else 0,
        random_bits=rounding.bits if isinstance(rounding, FewBits) else 0,
        half_offset=0xFFFFFFFF if isinstance(rounding, FewBits) and rounding.half_offset else 0,
        even=0xFFFFFFFF if isinstance(rounding, FewBits) and rounding.even else 0,
        unsigned=0 if fmt.signed else 0xFFFFFFFF,
        ends_odd=0xFFFFFFFF if fmt.ends_odd else 0,
        levels_below=fmt.bias + (bits(fmt.largest) >> 23) - 127,
        type_largest=bits(type_largest),
        addend=addend,
    )


class Parameters64(NamedTuple):
    """The same of float64 numbers and their bits, for engines/loops64.py. Masks: all 64 bits (-1), or none."""

    normal_drop: int
    lowest_level: int
    mantissa: int
    largest: int
    largest_negative: int
    signed_zero: int
    random_bits: int
    half_offset: int
    even: int
    unsigned: int
    ends_odd: int


@lru_cache(maxsize=1024)
def parameters64(fmt: Format, rounding: AnyRounding) -> Parameters64:
    """What a kernel of float64 numbers reads."""
    return Parameters64(
        normal_drop=52 - fmt.mantissa_bits,
        lowest_level=1023 - fmt.bias,
        mantissa=fmt.mantissa_bits,
        largest=bits64(fmt.largest),
        largest_negative=bits64(abs(fmt.lowest)),
        signed_zero=-1 if fmt.has_negative_zero else 0,
        random_bits=rounding.bits if isinstance(rounding, FewBits) else 0,
        half_offset=-1 if isinstance(rounding, FewBits) and rounding.half_offset else 0,
        even=-1 if isinstance(rounding, FewBits) and rounding.even else 0,
        unsigned=0 if fmt.signed else -1,
        ends_odd=-1 if fmt.ends_odd else 0,
    )


def bits64(value: float) -> int:
    """Those of a float64 number."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def bits(value: float) -> int:
    """Those of a float32 number >= 0."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
