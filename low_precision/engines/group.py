"""Rounding a group of at most GROUP float32 numbers: what engines/eager.py says, in loops without branches.

LLVM turns such loops into vector instructions. For most groups a loop of few instructions is right, and a first look at
the largest and smallest magnitude finds the others:

    fast     all between the format's smallest normal and largest value, or zero: cut the same bits off all
    nearest  to nearest, almost any format: below the smallest normal value, the processor's addition rounds
    small    stochastic, of most formats, not above the largest value: below the smallest normal one, further bits go
    general  any value: the number of bits to cut off depends on the value
    deep     after these, stochastic, for values so small that further random words decide

`mode` (a place in MODES) and `infinity` (whether overflow follows IEEE 754; otherwise it saturates) are constants of
the kernel that is compiled, so what they rule out costs nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir
from numba import float32, int32, int64, njit, types, uint32

from low_precision.engines.operations import (
    KeyWords,
    add,
    and_,
    as_bits,
    as_float,
    inlined,
    instruction,
    key_words,
    load,
    mul,
    or_,
    sar,
    shl,
    shr,
    store,
    sub,
    word,
    xor,
)
from low_precision.engines.parameters import (
    DOWN,
    FEW_BITS,
    NEAREST,
    NEAREST_AWAY,
    STOCHASTIC,
    TOWARD_ZERO,
    UP,
)

GROUP = 256  # numbers
_DEEP_GROUP = 32
_UNDECIDED = 0x7FFFFFFF  # what `_small` leaves to `_deep`
SIGN, MAGNITUDE, INFINITY = 0x80000000, 0x7FFFFFFF, 0x7F800000


class Group(NamedTuple):
    """Numbers that lie one after the other in memory."""

    source: int  # the address of the first one
    target: int  # the address where the first result goes
    size: int
    first: int  # the row-major index of the first one, as uint32
    offsets: int  # 0 where the others' follow it; else the address of uint32: by how much each is higher


class Noise(NamedTuple):
    """The random words of a block of 2**32 elements, and what key_words needs for still further ones."""

    rounding: KeyWords  # draw 0, which rounds
    further: KeyWords  # draw 1
    key: int
    block: int


@instruction
def group_buffer(typing_context):
    """int64 (): the address of room for a group, on the stack."""

    def generate(context, builder, signature, arguments):
        i32, i64 = ir.IntType(32), ir.IntType(64)
        with builder.goto_entry_block():
            buffer = builder.alloca(ir.ArrayType(i32, GROUP))
        return builder.ptrtoint(buffer, i64)

    return types.int64(), generate


@inlined
def noise_of(key, block):
    """The Noise of that block of 2**32 elements; key: noise.Key.value."""
    return Noise(rounding=key_words(key, block, 0), further=key_words(key, block, 1), key=key, block=block)


# Of single numbers


@inlined
def _index(group, i):
    """The row-major index of the i-th number."""
    return add(group.first, load(group.offsets, i) if group.offsets else uint32(i))


@inlined
def _few_of(noise, drop, fmt):
    """FewBits: the top bits of the `drop` random ones, and half of the last of them with half_offset."""
    unused = sub(max(drop, fmt.random_bits), fmt.random_bits)
    return or_(shl(shr(noise, unused), unused), and_(shr(shl(1, unused), 1), fmt.half_offset))


@inlined
def _finished(mode, infinity, bits, result, fmt):
    """The result with its sign, after overflow and for special values."""
    magnitude, negative = and_(bits, MAGNITUDE), sar(bits, 31)
    limit = add(fmt.largest, and_(negative, sub(fmt.largest_negative, fmt.largest)))
    if infinity:
        beyond = uint32(INFINITY)
        if mode == TOWARD_ZERO:
            beyond = limit
        if mode == UP:
            beyond = limit if negative else uint32(INFINITY)
        if mode == DOWN:
            beyond = uint32(INFINITY) if negative else limit
        result = beyond if result > limit else result
        result = uint32(INFINITY) if magnitude == uint32(INFINITY) else result
    else:
        result = min(result, limit)
    result = uint32(MAGNITUDE) if magnitude > uint32(INFINITY) else result
    sign = and_(bits, SIGN)
    sign = and_(sign, fmt.signed_zero) if result == uint32(0) else sign
    return or_(result, sign)


@inlined
def _times(whole, place):
    """The bits of whole * place, of a whole number and the bits of a float32 number."""
    return as_bits(float32(int32(whole)) * as_float(place))


@inlined
def _smallest(fmt):
    """The format's smallest value above zero, a normal number of float32 unless same_bias."""
    return shl(sub(add(fmt.lowest_level, 1), fmt.mantissa), 23)


@inlined
def _begins_with(zeros, random_word):
    """1 or 0: whether the word's first `zeros` bits are zero, all of them from 32 on. Nobody needs it for 0."""
    return uint32(shr(random_word, sub(32, min(max(zeros, uint32(1)), uint32(32)))) == uint32(0))


@inlined
def _is_deep(bits, fmt):
    """1 or 0. Zero counts too: it stays zero. `and` would be a branch, and no loop with one is made of vectors."""
    return uint32(and_(bits, MAGNITUDE) < fmt.deep_below)


@inlined
def _zeros(magnitude, fmt):
    """eager._round_deep: the significand, and how many further random bits must be zero."""
    scale = sub(max(shr(magnitude, 23), uint32(1)), 1)
    significand = sub(magnitude, shl(scale, 23))
    zeros = sub(add(sub(max(scale, fmt.lowest_level), scale), fmt.normal_drop), 24)
    missing = sub(150, shr(as_bits(float32(int32(significand))), 23))  # leading zeros of a subnormal number's
    missing = uint32(0) if significand == uint32(0) else missing
    return shl(significand, missing), add(zeros, missing)


# Of groups


# The one loop that numba itself puts where it is called: LLVM makes no vectors of it once it has seen it alone.
@njit(inline="always")
def largest_in(address, size):
    """The largest magnitude of so many numbers, NaNs aside; infinities count."""
    largest = uint32(0)
    for i in range(size):
        magnitude = and_(load(address, i), MAGNITUDE)
        largest = max(largest, uint32(0) if magnitude > uint32(INFINITY) else magnitude)
    return largest


@inlined
def _fast(mode, group, noise, fmt):
    """A group whose values all lose the same bits, and do not overflow."""
    cut = sub(shl(1, fmt.normal_drop), 1)
    kept, half_below = xor(cut, 0xFFFFFFFF), shr(cut, 1)
    for i in range(group.size):
        bits = load(group.source, i)
        if mode == NEAREST:
            bits = add(add(bits, and_(shr(bits, fmt.normal_drop), 1)), half_below)
        elif mode == NEAREST_AWAY:
            bits = add(add(bits, half_below), 1)
        elif mode == UP:
            bits = add(bits, and_(cut, xor(sar(bits, 31), 0xFFFFFFFF)))
        elif mode == DOWN:
            bits = add(bits, and_(cut, sar(bits, 31)))
        elif mode >= STOCHASTIC:
            random_bits = shr(word(_index(group, i), noise.rounding), sub(32, fmt.normal_drop))
            bits = add(bits, _few_of(random_bits, fmt.normal_drop, fmt) if mode == FEW_BITS else random_bits)
        store(group.target, i, and_(bits, kept))


@inlined
def _nearest(infinity, group, fmt):
    """A group of any values, for formats with 1 to 21 mantissa bits whose bias is not float32's."""
    cut = sub(shl(1, fmt.normal_drop), 1)
    kept, half_below, smallest_normal = xor(cut, 0xFFFFFFFF), shr(cut, 1), shl(add(fmt.lowest_level, 1), 23)
    # 1.5 * 2**23 last places of the subnormal values: what is added to it has no digit below.
    above = as_float(or_(shl(add(sub(fmt.lowest_level, fmt.mantissa), 24), 23), 0x400000))
    for i in range(group.size):
        bits = load(group.source, i)
        magnitude = and_(bits, MAGNITUDE)
        normal = and_(add(add(magnitude, and_(shr(magnitude, fmt.normal_drop), 1)), half_below), kept)
        small = as_bits((as_float(magnitude) + above) - above)
        result = small if magnitude < smallest_normal else normal
        store(group.target, i, _finished(NEAREST, infinity, bits, result, fmt))


@inlined
def _small(group, noise, fmt, deep):
    """A group stochastically, where `_nearest` might be used to nearest, and none lies above the largest value.

    deep: whether some lie below deep_below. Their further word decides, as in `_deep`, but for those for which it is
    not enough: they become _UNDECIDED, and `_deep` must do them. Returns whether there are such.
    """
    cut = sub(shl(1, fmt.normal_drop), 1)
    kept, smallest_normal, smallest = xor(cut, 0xFFFFFFFF), shl(add(fmt.lowest_level, 1), 23), _smallest(fmt)
    drop_of_zero, undecided = add(add(fmt.normal_drop, fmt.lowest_level), 1), uint32(0)
    for i in range(group.size):
        bits = load(group.source, i)
        magnitude = and_(bits, MAGNITUDE)
        index = _index(group, i)
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
            all_zero = _begins_with(zeros, further_word)
            up = and_(all_zero, or_(too_few, uint32(shr(random_word, 8) < significand)))
            deep_result = uint32(_UNDECIDED) if too_few else smallest
            deep_result = deep_result if up else uint32(0)
            result = deep_result if magnitude < fmt.deep_below else result
            undecided = or_(undecided, uint32(result == uint32(_UNDECIDED)))
        store(group.target, i, or_(result, and_(bits, SIGN)))
    return undecided


@inlined
def _general(mode, infinity, group, noise, fmt):
    """A group of any values, but for `_deep`."""
    for i in range(group.size):
        bits = load(group.source, i)
        magnitude = and_(bits, MAGNITUDE)
        scale = sub(max(shr(magnitude, 23), uint32(1)), 1)
        significand = sub(magnitude, shl(scale, 23))
        level = max(scale, fmt.lowest_level)
        whole_drop = add(sub(level, scale), fmt.normal_drop)
        drop = min(whole_drop, uint32(30))
        below = sub(shl(1, drop), 1)
        added = uint32(0)
        if mode == NEAREST:
            last = shr(significand, drop)
            if fmt.mantissa == uint32(0):  # without a mantissa, the code is the exponent
                last = add(last, sub(level, fmt.lowest_level))
            added = shr(add(below, and_(last, 1)), 1)
        elif mode == NEAREST_AWAY:
            added = shr(add(below, 1), 1)
        elif mode == UP:
            added = and_(below, xor(sar(bits, 31), 0xFFFFFFFF))
        elif mode == DOWN:
            added = and_(below, sar(bits, 31))
        elif mode >= STOCHASTIC:
            added = shr(shr(word(_index(group, i), noise.rounding), 1), sub(31, drop))
            if mode == FEW_BITS:
                added = _few_of(added, drop, fmt)
                significand = shr(significand, min(sub(whole_drop, drop), uint32(31)))
        rounded = shr(add(significand, added), drop)
        result = _times(rounded, shl(sub(add(level, 1), fmt.mantissa), 23))
        if fmt.same_bias:  # that place may be no normal number: compose the bits
            result = add(shl(rounded, drop), shl(scale, 23))
        store(group.target, i, _finished(mode, infinity, bits, result, fmt))


@inlined
def _deep(group, noise, fmt):
    """Rounds what lies far below the smallest value of the format again, as eager._round_deep does.

    Most of it becomes zero, since a further word has bits that are not: so that one is looked at first.
    """
    some = uint32(0)
    for i in range(group.size):
        bits, before = load(group.source, i), load(group.target, i)
        _, zeros = _zeros(and_(bits, MAGNITUDE), fmt)
        all_zero = _begins_with(zeros, word(_index(group, i), noise.further))
        deep = _is_deep(bits, fmt)
        some = or_(some, and_(all_zero, deep))
        store(group.target, i, and_(and_(bits, SIGN), fmt.signed_zero) if deep else before)
    if not some:
        return
    undecided = uint32(0)
    for i in range(group.size):
        bits, before = load(group.source, i), load(group.target, i)
        significand, zeros = _zeros(and_(bits, MAGNITUDE), fmt)
        index = _index(group, i)
        below_significand = uint32(shr(word(index, noise.rounding), 8) < significand)
        all_zero = _begins_with(zeros, word(index, noise.further))
        up, deep = and_(below_significand, all_zero), _is_deep(bits, fmt)
        undecided = or_(undecided, and_(and_(deep, up), uint32(zeros > uint32(32))))
        value = or_(mul(up, _smallest(fmt)), and_(bits, SIGN))
        value = and_(value, fmt.signed_zero) if value == uint32(SIGN) else value
        store(group.target, i, value if deep else before)
    if undecided:
        for i in range(group.size):
            bits = load(group.source, i)
            _, zeros = _zeros(and_(bits, MAGNITUDE), fmt)
            if _is_deep(bits, fmt) and zeros > uint32(32) and and_(load(group.target, i), MAGNITUDE) != uint32(0):
                left, draw, up = int64(zeros) - 32, 2, True
                while up and left > 0:
                    random_word = word(_index(group, i), key_words(noise.key, noise.block, draw))
                    up = shr(random_word, sub(32, uint32(min(left, 32)))) == uint32(0)
                    left -= 32
                    draw += 1
                if not up:
                    store(group.target, i, and_(and_(bits, SIGN), fmt.signed_zero))


@inlined
def round_group(mode, infinity, group, noise, fmt, buffer):
    """Rounds the group. fmt: its `Parameters`; buffer: group_buffer(), of the kernel that calls this."""
    source, target, size, first, offsets = group
    highest, smallest = int32(-1), uint32(0xFFFFFFFF)
    for i in range(size):
        less_one = sub(and_(load(source, i), MAGNITUDE), 1)  # of zero: the smallest int32, the largest uint32
        highest, smallest = max(highest, int32(less_one)), min(smallest, less_one)
    # Where `_nearest` may be used: its constant must be a normal number, and fall within float32's.
    plain = not fmt.same_bias and uint32(sub(fmt.mantissa, 1)) < uint32(21)
    plain = plain and sub(fmt.lowest_level, fmt.mantissa) < uint32(230)
    within = highest < int32(fmt.largest)
    fast = fmt.fast_from and smallest >= sub(fmt.fast_from, 1) and within
    deep = mode == STOCHASTIC and not fast and fmt.deep_below != uint32(0) and smallest < sub(fmt.deep_below, 1)
    # Vector instructions must not write to what they read, and `_deep` reads the group again.
    written = buffer if deep or source == target else target
    small = mode == STOCHASTIC and plain and fmt.signed_zero and within
    small = small and add(fmt.lowest_level, fmt.normal_drop) > uint32(55)  # so float32's subnormals are `too_few`
    buffered = Group(source=source, target=written, size=size, first=first, offsets=offsets)
    if fast:
        _fast(mode, buffered, noise, fmt)
    elif small and deep:
        deep = uint32(0) != _small(buffered, noise, fmt, True)
    elif small:
        _small(buffered, noise, fmt, False)
    elif mode == NEAREST and plain:
        _nearest(infinity, buffered, fmt)
    elif not (deep and highest < int32(sub(fmt.deep_below, 1))):
        _general(mode, infinity, buffered, noise, fmt)
    if deep:
        for start in range(0, size, _DEEP_GROUP):  # a few values like that in every group are common, more are not
            some = min(_DEEP_GROUP, size - start)
            smallest, largest_written = uint32(0xFFFFFFFF), uint32(0)
            for i in range(start, start + some):
                smallest = min(smallest, and_(load(source, i), MAGNITUDE))
                largest_written = max(largest_written, and_(load(written, i), MAGNITUDE))
            if smallest < fmt.deep_below and (not small or largest_written == uint32(_UNDECIDED)):
                place = 4 * start
                part = Group(
                    source=source + place,
                    target=buffer + place,
                    size=some,
                    first=first if offsets else add(first, uint32(start)),
                    offsets=offsets + place if offsets else 0,
                )
                _deep(part, noise, fmt)
    if written == buffer:
        for i in range(size):
            store(target, i, load(buffer, i))
