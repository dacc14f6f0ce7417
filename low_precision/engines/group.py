"""Rounding a group of at most GROUP float32 numbers: what engines/eager.py says, in loops without branches.

LLVM turns such loops into vector instructions. For most groups a loop of few instructions is right, and a first look at
the largest and smallest magnitude finds the others:

    fast     all between the format's smallest normal and largest value, or zero: cut the same bits off all
    nearest  to nearest, almost any format: below the smallest normal value, the processor's addition rounds
    small    stochastic, of most formats, not above the largest value: below the smallest normal one, further bits go
    general  any value: the number of bits to cut off depends on the value
    deep     after these, stochastic, for values so small that further random words decide

`mode` (a place in MODES) and `overflow` (SATURATE, PROPAGATE or INFINITE) are constants of the kernel that is compiled,
so what they rule out costs nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir
from numba import int32, int64, njit, types, uint32

from low_precision.engines.number import (
    INFINITY,
    MAGNITUDE,
    SIGN,
    UNDECIDED,
    begins_with,
    few_of,
    finished,
    general_one,
    is_deep,
    nearest_one,
    small_one,
    smallest_of,
    zeros_of,
)
from low_precision.engines.operations import (
    KeyWords,
    add,
    and_,
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
from low_precision.engines.parameters import DOWN, FEW_BITS, NEAREST, NEAREST_AWAY, STOCHASTIC, TO_ODD, UP

GROUP = 256  # numbers
_DEEP_GROUP = 32


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


def room_for(numbers):
    """int64 (): the address of room for so many numbers of 32 bits, on the stack."""

    @instruction
    def room(typing_context):
        def generate(context, builder, signature, arguments):
            i32, i64 = ir.IntType(32), ir.IntType(64)
            with builder.goto_entry_block():
                buffer = builder.alloca(ir.ArrayType(i32, numbers))
                buffer.align = 64  # a vector's
            return builder.ptrtoint(buffer, i64)

        return types.int64(), generate

    return room


group_buffer = room_for(GROUP)


@inlined
def noise_of(key, block):
    """The Noise of that block of 2**32 elements; key: noise.Key.value."""
    return Noise(rounding=key_words(key, block, 0), further=key_words(key, block, 1), key=key, block=block)


@inlined
def _index(group, i):
    """The row-major index of the i-th number."""
    return add(group.first, load(group.offsets, i) if group.offsets else uint32(i))


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
        elif mode == TO_ODD:
            bits = add(bits, and_(cut, sub(and_(shr(bits, fmt.normal_drop), 1), 1)))
        elif mode >= STOCHASTIC:
            random_bits = shr(word(_index(group, i), noise.rounding), sub(32, fmt.normal_drop))
            bits = add(bits, few_of(random_bits, fmt.normal_drop, bits, fmt) if mode == FEW_BITS else random_bits)
        store(group.target, i, and_(bits, kept))


@inlined
def _nearest(overflow, group, fmt):
    """See nearest_one."""
    for i in range(group.size):
        store(group.target, i, nearest_one(overflow, load(group.source, i), fmt))


@inlined
def _small(group, noise, fmt, deep):
    """See small_one; none lies above the largest value. Returns whether some are undecided."""
    undecided = uint32(0)
    for i in range(group.size):
        bits = load(group.source, i)
        result = small_one(bits, _index(group, i), noise, fmt, deep)
        undecided = or_(undecided, uint32(result == uint32(UNDECIDED)))
        store(group.target, i, or_(result, and_(bits, SIGN)))
    return undecided


@inlined
def _general(mode, overflow, group, noise, fmt):
    """See general_one."""
    for i in range(group.size):
        store(group.target, i, general_one(mode, overflow, load(group.source, i), _index(group, i), noise, fmt))


@inlined
def deep_group(overflow, group, noise, fmt):
    """Rounds what lies far below the smallest value of the format again, as eager._round_deep does.

    Most of it becomes zero, since a further word has bits that are not: so that one is looked at first.
    """
    some = uint32(0)
    for i in range(group.size):
        bits, before = load(group.source, i), load(group.target, i)
        _, zeros = zeros_of(and_(bits, MAGNITUDE), fmt)
        all_zero = begins_with(zeros, word(_index(group, i), noise.further))
        deep = is_deep(bits, fmt)
        some = or_(some, and_(all_zero, deep))
        store(group.target, i, and_(and_(bits, SIGN), fmt.signed_zero) if deep else before)
    if not some:
        return
    undecided = uint32(0)
    for i in range(group.size):
        bits, before = load(group.source, i), load(group.target, i)
        significand, zeros = zeros_of(and_(bits, MAGNITUDE), fmt)
        index = _index(group, i)
        below_significand = uint32(shr(word(index, noise.rounding), 8) < significand)
        all_zero = begins_with(zeros, word(index, noise.further))
        up, deep = and_(below_significand, all_zero), is_deep(bits, fmt)
        undecided = or_(undecided, and_(and_(deep, up), uint32(zeros > uint32(32))))
        value = finished(STOCHASTIC, overflow, bits, mul(up, smallest_of(fmt)), fmt)
        store(group.target, i, value if deep else before)
    if undecided:
        for i in range(group.size):
            bits = load(group.source, i)
            _, zeros = zeros_of(and_(bits, MAGNITUDE), fmt)
            if is_deep(bits, fmt) and zeros > uint32(32) and and_(load(group.target, i), MAGNITUDE) != uint32(0):
                left, draw, up = int64(zeros) - 32, 2, True
                while up and left > 0:
                    random_word = word(_index(group, i), key_words(noise.key, noise.block, draw))
                    up = shr(random_word, sub(32, uint32(min(left, 32)))) == uint32(0)
                    left -= 32
                    draw += 1
                if not up:
                    store(group.target, i, and_(and_(bits, SIGN), fmt.signed_zero))


@inlined
def round_group(mode, overflow, group, noise, fmt, buffer):
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
    # Vector instructions must not write to what they read, and `deep_group` reads the group again.
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
        _nearest(overflow, buffered, fmt)
    elif not (deep and highest < int32(sub(fmt.deep_below, 1))):
        _general(mode, overflow, buffered, noise, fmt)
    if deep:
        for start in range(0, size, _DEEP_GROUP):  # a few values like that in every group are common, more are not
            some = min(_DEEP_GROUP, size - start)
            smallest, largest_written = uint32(0xFFFFFFFF), uint32(0)
            for i in range(start, start + some):
                smallest = min(smallest, and_(load(source, i), MAGNITUDE))
                largest_written = max(largest_written, and_(load(written, i), MAGNITUDE))
            if smallest < fmt.deep_below and (not small or largest_written == uint32(UNDECIDED)):
                place = 4 * start
                part = Group(
                    source=source + place,
                    target=buffer + place,
                    size=some,
                    first=first if offsets else add(first, uint32(start)),
                    offsets=offsets + place if offsets else 0,
                )
                deep_group(overflow, part, noise, fmt)
    if written == buffer:
        for i in range(size):
            store(target, i, load(buffer, i))
