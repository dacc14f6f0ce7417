"""Rounding one float32 number, without branches: what engines/eager.py says, for the loops of group.py and lanes.py.

`bits` are those of the number, `fmt` its `Parameters`, `mode` a place in MODES. LLVM takes out of a loop what is the
same for all numbers.
"""

from __future__ import annotations

from typing import Any

from numba import float32, int32, uint32

from low_precision.engines.operations import (
    add,
    and_,
    as_bits,
    as_float,
    inlined,
    or_,
    sar,
    shl,
    shr,
    sub,
    word,
    xor,
)
from low_precision.engines.parameters import (
    DOWN,
    FEW_BITS,
    INFINITE,
    NEAREST,
    NEAREST_AWAY,
    PROPAGATE,
    SATURATE,
    STOCHASTIC,
    TO_ODD,
    TOWARD_ZERO,
    UP,
    Parameters,
)

SIGN, MAGNITUDE, INFINITY = 0x80000000, 0x7FFFFFFF, 0x7F800000
UNDECIDED = 0x7FFFFFFF  # what `small_one` leaves to group.deep_group
_ONE = 0x3F800000  # the bits of 1.0


@inlined
def few_of(noise, drop, significand, fmt):
    """FewBits: the top bits of the `drop` random ones, and what is added below them: half of the last of them with
    half_offset, with `even` what rounds the significand, a number whose lowest `drop` bits are cut off, to them.
    """
    unused = sub(max(drop, fmt.random_bits), fmt.random_bits)
    one = shl(1, unused)
    even = and_(shr(add(sub(one, 1), and_(shr(significand, unused), 1)), 1), fmt.even)
    return or_(shl(shr(noise, unused), unused), or_(and_(shr(one, 1), fmt.half_offset), even))


@inlined
def finished(mode, overflow, bits, result, fmt):
    """The result with its sign, after overflow and for special values: eager._finished."""
    magnitude, negative = and_(bits, MAGNITUDE), sar(bits, 31)
    limit = add(fmt.largest, and_(negative, sub(fmt.largest_negative, fmt.largest)))
    below_zero = and_(negative, fmt.unsigned)  # a mask: a negative number of an unsigned format
    if overflow == INFINITE:
        infinite = or_(INFINITY, and_(below_zero, sub(MAGNITUDE, INFINITY)))  # a NaN below zero
        beyond = infinite
        if mode == TOWARD_ZERO:
            beyond = limit
        if mode == UP:
            beyond = limit if negative else infinite
        if mode == DOWN:
            beyond = infinite if negative else limit
        if mode == TO_ODD:
            beyond = limit if and_(fmt.ends_odd, xor(below_zero, 0xFFFFFFFF)) else infinite
        result = beyond if result > limit else result
        result = infinite if magnitude == uint32(INFINITY) else result
    else:
        result = min(result, limit)
    if overflow == PROPAGATE:
        infinite = and_(INFINITY, xor(below_zero, 0xFFFFFFFF))
        result = infinite if magnitude == uint32(INFINITY) else result
    result = uint32(MAGNITUDE) if magnitude > uint32(INFINITY) else result
    sign = and_(bits, SIGN)
    sign = and_(sign, fmt.signed_zero) if result == uint32(0) else sign
    return or_(result, sign)


@inlined
def saturated(bits, magnitude, fmt):
    """The rounded magnitude with its sign, after overflow, that of a block's number."""
    return finished(NEAREST, SATURATE, bits, magnitude, fmt)


@inlined
def _times(whole, place):
    """The bits of whole * place, of a whole number and the bits of a float32 number."""
    return as_bits(float32(int32(whole)) * as_float(place))


@inlined
def smallest_of(fmt):
    """The format's smallest value above zero, a normal number of float32 unless same_bias."""
    return shl(sub(add(fmt.lowest_level, 1), fmt.mantissa), 23)


@inlined
def begins_with(zeros, random_word):
    """1 or 0: whether the word's first `zeros` bits are zero, all of them from 32 on. Nobody needs it for 0."""
    return uint32(shr(random_word, sub(32, min(max(zeros, uint32(1)), uint32(32)))) == uint32(0))


@inlined
def is_deep(bits, fmt):
    """1 or 0. Zero counts too: it stays zero. `and` would be a branch, and no loop with one is made of vectors."""
    return uint32(and_(bits, MAGNITUDE) < fmt.deep_below)


@inlined
def zeros_of(magnitude, fmt):
    """eager._round_deep: the significand, and how many further random bits must be zero."""
    scale = sub(max(shr(magnitude, 23), uint32(1)), 1)
    significand = sub(magnitude, shl(scale, 23))
    zeros = sub(add(sub(max(scale, fmt.lowest_level), scale), fmt.normal_drop), 24)
    missing = sub(150, shr(as_bits(float32(int32(significand))), 23))  # leading zeros of a subnormal number's
    missing = uint32(0) if significand == uint32(0) else missing
    return shl(significand, missing), add(zeros, missing)


@inlined
def nearest_one(overflow, bits, fmt):
    """A number of any value, for formats with 1 to 21 mantissa bits whose bias is not float32's."""
    cut = sub(shl(1, fmt.normal_drop), 1)
    kept, half_below, smallest_normal = xor(cut, 0xFFFFFFFF), shr(cut, 1), shl(add(fmt.lowest_level, 1), 23)
    # 1.5 * 2**23 last places of the subnormal values: what is added to it has no digit below.
    above = as_float(or_(shl(add(sub(fmt.lowest_level, fmt.mantissa), 24), 23), 0x400000))
    magnitude = and_(bits, MAGNITUDE)
    normal = and_(add(add(magnitude, and_(shr(magnitude, fmt.normal_drop), 1)), half_below), kept)
    small = as_bits((as_float(magnitude) + above) - above)
    result = small if magnitude < smallest_normal else normal
    return finished(NEAREST, overflow, bits, result, fmt)


@inlined
def small_one(bits, index, noise, fmt, deep):
    """A number stochastically, where `nearest_one` might be used to nearest: its magnitude, which may be beyond the
    largest value.

    deep: whether it may lie below deep_below. A further word decides then, as in group.deep_group, but for those for
    which it is not enough: they become UNDECIDED, and group.deep_group must do them.
    """
    cut = sub(shl(1, fmt.normal_drop), 1)
    kept, smallest_normal, smallest = xor(cut, 0xFFFFFFFF), shl(add(fmt.lowest_level, 1), 23), smallest_of(fmt)
    drop_of_zero = add(add(fmt.normal_drop, fmt.lowest_level), 1)
    magnitude = and_(bits, MAGNITUDE)
    random_word = word(index, noise.rounding)
    normal = and_(add(magnitude, shr(random_word, sub(32, fmt.normal_drop))), kept)
    significand = or_(and_(magnitude, 0x7FFFFF), 0x800000)
    whole_drop = sub(drop_of_zero, shr(magnitude, 23))
    drop = min(whole_drop, uint32(30))
    if not deep:
        significand = significand if magnitude else uint32(0)
    below = _times(shr(add(significand, shr(shr(random_word, 1), sub(31, drop))), drop), smallest)
    result = below if magnitude < smallest_normal else normal
    if deep:
        zeros, further_word = sub(whole_drop, 24), word(index, noise.further)
        too_few = uint32(zeros > uint32(32))  # random bits; for subnormal numbers, whose significand is wrong, too
        all_zero = begins_with(zeros, further_word)
        up = and_(all_zero, or_(too_few, uint32(shr(random_word, 8) < significand)))
        deep_result = uint32(UNDECIDED) if too_few else smallest
        deep_result = deep_result if up else uint32(0)
        result = deep_result if magnitude < fmt.deep_below else result
    return result


@inlined
def general_one(mode, overflow, bits, index, noise, fmt):
    """A number of any value, but for group.deep_group."""
    magnitude = and_(bits, MAGNITUDE)
    scale = sub(max(shr(magnitude, 23), uint32(1)), 1)
    significand = sub(magnitude, shl(scale, 23))
    level = max(scale, fmt.lowest_level)
    whole_drop = add(sub(level, scale), fmt.normal_drop)
    drop = min(whole_drop, uint32(30))
    below = sub(shl(1, drop), 1)
    added = uint32(0)
    if mode in (NEAREST, TO_ODD):
        last = shr(significand, drop)
        if fmt.mantissa == uint32(0):  # without a mantissa, the code is the exponent
            last = add(last, sub(level, fmt.lowest_level))
        last = and_(last, 1)
        # To odd: from an even code up to the next one, unless nothing is cut off.
        added = shr(add(below, last), 1) if mode == NEAREST else and_(below, sub(last, 1))
    elif mode == NEAREST_AWAY:
        added = shr(add(below, 1), 1)
    elif mode == UP:
        added = and_(below, xor(sar(bits, 31), 0xFFFFFFFF))
    elif mode == DOWN:
        added = and_(below, sar(bits, 31))
    elif mode >= STOCHASTIC:
        added = shr(shr(word(index, noise.rounding), 1), sub(31, drop))
        if mode == FEW_BITS:
            # What is shifted out is less than all random bits, and counts for ties alone, as one bit.
            too_far = min(sub(whole_drop, drop), uint32(31))
            reached = shr(significand, too_far)
            significand = or_(reached, and_(uint32(shl(reached, too_far) != significand), fmt.even))
            added = few_of(added, drop, significand, fmt)
    rounded = shr(add(significand, added), drop)
    result = _times(rounded, shl(sub(add(level, 1), fmt.mantissa), 23))
    if fmt.same_bias:  # that place may be no normal number: compose the bits
        result = add(shl(rounded, drop), shl(scale, 23))
    return finished(mode, overflow, bits, result, fmt)


# Of blocks whose scale is a power of two


@inlined
def exponent_of_block(largest, element):
    """The exponent, as in float32's bits, that decides a block's scale; that of 1 where there are but zeros."""
    return shr(add(min(largest, element.type_largest) if largest else uint32(_ONE), element.addend), 23)


@inlined
def of_block(element, lowest_level, exponent):
    """Parameters.of_block: the element's parameters with its bias and its largest value moved by the block's scale."""
    largest = add(element.largest, shl(sub(exponent, shr(element.largest, 23)), 23))
    zero: Any = uint32(0)
    fast_from = zero
    if element.signed_zero and element.mantissa and element.normal_drop:
        fast_from = shl(add(lowest_level, 1), 23)
    return Parameters(
        normal_drop=element.normal_drop,
        lowest_level=lowest_level,
        mantissa=element.mantissa,
        same_bias=zero,
        fast_from=fast_from,
        deep_below=shl(sub(add(lowest_level, element.normal_drop), 29), 23),
        largest=largest,
        largest_negative=and_(largest, xor(element.unsigned, 0xFFFFFFFF)),
        signed_zero=element.signed_zero,
        random_bits=element.random_bits,
        half_offset=element.half_offset,
        even=element.even,
        unsigned=element.unsigned,
        ends_odd=element.ends_odd,
        levels_below=element.levels_below,
        type_largest=element.type_largest,
        addend=element.addend,
    )
