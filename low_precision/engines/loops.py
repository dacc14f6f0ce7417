"""The loops of the fused engine, compiled by numba for the processor at hand: what engines/eager.py says, in one pass.

Everything is arithmetic of 32-bit whole numbers, written with the operations below: numba's own widen to 64 bits. Loops
without branches, which LLVM turns into vector instructions, over groups of GROUP elements. For most groups a loop of
few instructions is right, and a first look at the largest and smallest magnitude finds the others:

    fast     all between the format's smallest normal and largest value, or zero: cut the same bits off all
    nearest  to nearest, almost any format: below the smallest normal value, the processor's addition rounds
    small    stochastic, of most formats, not above the largest value: below the smallest normal one, further bits go
    general  any value: the number of bits to cut off depends on the value
    deep     after these, stochastic, for values so small that further random words decide

Addresses and counts are whole numbers of the caller's, who answers for them; nothing here allocates or raises.

A kernel is a C function of one argument: the address of a task, int64 numbers that say what to do (the kernel's
docstring says which). The work is in pieces, and any number of threads may call the kernel with the same task: each
takes the next piece until none is left.
"""

from __future__ import annotations

from functools import cache

from llvmlite import ir
from numba import cfunc, float32, int32, int64, njit, types, uint32, uint64
from numba.extending import intrinsic

from low_precision.engines.parameters import MODES

GROUP = 256  # elements
_DEEP_GROUP = 32
_UNDECIDED = 0x7FFFFFFF  # what `_small` leaves to `_deep`
KERNEL = {"error_model": "numpy", "boundscheck": False, "cache": True}
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_SIGN, _MAGNITUDE, _INFINITY = 0x80000000, 0x7FFFFFFF, 0x7F800000
_NEAREST, _AWAY, _ZERO, _UP, _DOWN, _STOCHASTIC, _FEW = range(len(MODES))


def _operation(name):
    """uint32 (uint32, uint32): the LLVM instruction of that name."""

    @intrinsic
    def operation(typing_context, x, y):
        def generate(context, builder, signature, arguments):
            return getattr(builder, name)(*arguments)

        return types.uint32(types.uint32, types.uint32), generate

    return operation


_add, _sub, _mul = _operation("add"), _operation("sub"), _operation("mul")
_and, _or, _xor = _operation("and_"), _operation("or_"), _operation("xor")
_shl, _shr, _sar = _operation("shl"), _operation("lshr"), _operation("ashr")  # _sar: the sign comes in


@intrinsic
def as_float(typing_context, x):
    return types.float32(types.uint32), lambda c, builder, s, arguments: builder.bitcast(arguments[0], ir.FloatType())


@intrinsic
def as_bits(typing_context, x):
    return types.uint32(types.float32), lambda c, builder, s, arguments: builder.bitcast(arguments[0], _I32)


@intrinsic
def load(typing_context, address, i):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I32.as_pointer())
        return builder.load(builder.gep(pointer, [arguments[1]]))

    return types.uint32(types.int64, types.int64), generate


@intrinsic
def store(typing_context, address, i, value):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I32.as_pointer())
        builder.store(arguments[2], builder.gep(pointer, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.uint32), generate


@intrinsic
def field(typing_context, task, i):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.load(builder.gep(pointer, [arguments[1]]))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def next_piece(typing_context, task):
    """The number in the task's first field, which is one higher afterwards, whoever else does so at the same time."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, _I64(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def mark(typing_context, task):
    """Puts 1 into the task's second field."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        builder.store_atomic(_I64(1), builder.gep(pointer, [_I64(1)]), "monotonic", 8)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _group_buffer(typing_context):
    """The address of room for a group, on the stack."""

    def generate(context, builder, signature, arguments):
        with builder.goto_entry_block():
            buffer = builder.alloca(ir.ArrayType(_I32, GROUP))
        return builder.ptrtoint(buffer, _I64)

    return types.int64(), generate


@njit(inline="always")
def word(index, k0, k1, k2):
    """noise.word: k0, k1, k2 are the key's words after `_mixed`, which saves three operations each time."""
    x = _mul(_xor(_xor(index, _shr(index, 17)), k0), 0xED5AD4BB)
    x = _mul(_xor(_xor(x, _shr(x, 11)), k1), 0xAC4C1B51)
    x = _mul(_xor(_xor(x, _shr(x, 15)), k2), 0x31848BAB)
    return _xor(x, _shr(x, 14))


@njit(inline="always")
def _mixed(part, shift):
    """(x ^ part) ^ (x ^ part) >> shift = x ^ x >> shift ^ _mixed(part, shift)."""
    return _xor(uint32(part), _shr(uint32(part), shift))


@njit(inline="always")
def _index(first, table, i):
    """The row-major index of the i-th element in memory: the next one, or where `table` says, an address of uint32."""
    return _add(first, load(table, i) if table else uint32(i))


@njit(inline="always")
def _few_of(noise, drop, few, half):
    """FewBits: the top `few` of the `drop` random bits, and half of their last place where `half` is all ones."""
    unused = _sub(max(drop, few), few)
    return _or(_shl(_shr(noise, unused), unused), _and(_shr(_shl(1, unused), 1), half))


@njit(inline="always")
def _finished(infinity, mode, bits, result, largest, lowest, signed_zero):
    """The result with its sign, after overflow and for special values."""
    magnitude, negative = _and(bits, _MAGNITUDE), _sar(bits, 31)
    limit = _add(largest, _and(negative, _sub(lowest, largest)))
    if infinity:
        beyond = uint32(_INFINITY)
        if mode == _ZERO:
            beyond = limit
        if mode == _UP:
            beyond = limit if negative else uint32(_INFINITY)
        if mode == _DOWN:
            beyond = uint32(_INFINITY) if negative else limit
        result = beyond if result > limit else result
        result = uint32(_INFINITY) if magnitude == uint32(_INFINITY) else result
    else:
        result = min(result, limit)
    result = uint32(_MAGNITUDE) if magnitude > uint32(_INFINITY) else result
    sign = _and(bits, _SIGN)
    sign = _and(sign, signed_zero) if result == uint32(0) else sign
    return _or(result, sign)


@njit(inline="always")
def _fast(mode, source, target, size, index, table, k0, k1, k2, always, few, half):
    """A group whose values all lose the same `always` bits, and do not overflow."""
    cut = _sub(_shl(1, always), 1)
    kept, half_below = _xor(cut, 0xFFFFFFFF), _shr(cut, 1)
    for i in range(size):
        bits = load(source, i)
        if mode == _NEAREST:
            bits = _add(_add(bits, _and(_shr(bits, always), 1)), half_below)
        elif mode == _AWAY:
            bits = _add(_add(bits, half_below), 1)
        elif mode == _UP:
            bits = _add(bits, _and(cut, _xor(_sar(bits, 31), 0xFFFFFFFF)))
        elif mode == _DOWN:
            bits = _add(bits, _and(cut, _sar(bits, 31)))
        elif mode >= _STOCHASTIC:
            noise = _shr(word(_index(index, table, i), k0, k1, k2), _sub(32, always))
            bits = _add(bits, _few_of(noise, always, few, half) if mode == _FEW else noise)
        store(target, i, _and(bits, kept))


@njit(inline="always")
def _nearest(infinity, source, target, size, always, lowest_level, mantissa, largest, lowest, signed_zero):
    """A group of any values, for formats with 1 to 21 mantissa bits whose bias is not float32's."""
    cut = _sub(_shl(1, always), 1)
    kept, half_below, smallest_normal = _xor(cut, 0xFFFFFFFF), _shr(cut, 1), _shl(_add(lowest_level, 1), 23)
    # 1.5 * 2**23 last places of the subnormal values: what is added to it has no digit below.
    above = as_float(_or(_shl(_add(_sub(lowest_level, mantissa), 24), 23), 0x400000))
    for i in range(size):
        bits = load(source, i)
        magnitude = _and(bits, _MAGNITUDE)
        normal = _and(_add(_add(magnitude, _and(_shr(magnitude, always), 1)), half_below), kept)
        small = as_bits((as_float(magnitude) + above) - above)
        result = small if magnitude < smallest_normal else normal
        store(target, i, _finished(infinity, _NEAREST, bits, result, largest, lowest, signed_zero))


@njit(inline="always")
def _begins_with(zeros, word):
    """1 or 0: whether the word's first `zeros` bits are zero, all of them from 32 on. Nobody needs it for 0."""
    return uint32(_shr(word, _sub(32, min(max(zeros, uint32(1)), uint32(32)))) == uint32(0))


@njit(inline="always")
def _small(
    source, target, size, index, table, k0, k1, k2, f0, f1, f2, always, lowest_level, smallest, deep_below, deep
):  # fmt: skip
    """A group stochastically, where `_nearest` might be used to nearest, and none lies above the largest value.

    deep: whether some lie below deep_below. Their further word decides, as in `_deep`, but for those for which it is
    not enough: they become _UNDECIDED, and `_deep` must do them. Returns whether there are such.
    """
    cut = _sub(_shl(1, always), 1)
    kept, smallest_normal = _xor(cut, 0xFFFFFFFF), _shl(_add(lowest_level, 1), 23)
    drop_of_zero, undecided = _add(_add(always, lowest_level), 1), uint32(0)
    for i in range(size):
        bits = load(source, i)
        magnitude = _and(bits, _MAGNITUDE)
        place = _index(index, table, i)
        noise = word(place, k0, k1, k2)
        normal = _and(_add(magnitude, _shr(noise, _sub(32, always))), kept)
        significand = _or(_and(magnitude, 0x7FFFFF), 0x800000)
        whole_drop = _sub(drop_of_zero, _shr(magnitude, 23))
        drop = min(whole_drop, uint32(30))
        if not deep:
            significand = significand if magnitude else uint32(0)
        below = as_bits(_mul_floats(_shr(_add(significand, _shr(_shr(noise, 1), _sub(31, drop))), drop), smallest))
        result = below if magnitude < smallest_normal else normal
        if deep:
            zeros, further = _sub(whole_drop, 24), word(place, f0, f1, f2)
            too_few = uint32(zeros > uint32(32))  # random bits; for subnormal numbers, whose significand is wrong, too
            all_zero = _begins_with(zeros, further)
            up = _and(all_zero, _or(too_few, uint32(_shr(noise, 8) < significand)))
            far = uint32(_UNDECIDED) if too_few else smallest
            far = far if up else uint32(0)
            result = far if magnitude < deep_below else result
            undecided = _or(undecided, uint32(result == uint32(_UNDECIDED)))
        store(target, i, _or(result, _and(bits, _SIGN)))
    return undecided


@njit(inline="always")
def _general(
    mode, infinity, source, target, size, index, table, k0, k1, k2, always, lowest_level, mantissa, composed,
    largest, lowest, signed_zero, few, half,
):  # fmt: skip
    """A group of any values, but for `_deep`."""
    for i in range(size):
        bits = load(source, i)
        magnitude = _and(bits, _MAGNITUDE)
        scale = _sub(max(_shr(magnitude, 23), uint32(1)), 1)
        significand = _sub(magnitude, _shl(scale, 23))
        level = max(scale, lowest_level)
        whole_drop = _add(_sub(level, scale), always)
        drop = min(whole_drop, uint32(30))
        below = _sub(_shl(1, drop), 1)
        added = uint32(0)
        if mode == _NEAREST:
            last = _shr(significand, drop)
            if mantissa == uint32(0):  # without a mantissa, the code is the exponent
                last = _add(last, _sub(level, lowest_level))
            added = _shr(_add(below, _and(last, 1)), 1)
        elif mode == _AWAY:
            added = _shr(_add(below, 1), 1)
        elif mode == _UP:
            added = _and(below, _xor(_sar(bits, 31), 0xFFFFFFFF))
        elif mode == _DOWN:
            added = _and(below, _sar(bits, 31))
        elif mode >= _STOCHASTIC:
            noise = word(_index(index, table, i), k0, k1, k2)
            added = _shr(_shr(noise, 1), _sub(31, drop))
            if mode == _FEW:
                added = _few_of(added, drop, few, half)
                significand = _shr(significand, min(_sub(whole_drop, drop), uint32(31)))
        rounded = _shr(_add(significand, added), drop)
        place = _shl(_sub(_add(level, 1), mantissa), 23)  # the last place, a normal number unless `composed`
        result = as_bits(_mul_floats(rounded, place))
        if composed:
            result = _add(_shl(rounded, drop), _shl(scale, 23))
        store(target, i, _finished(infinity, mode, bits, result, largest, lowest, signed_zero))


@njit(inline="always")
def _mul_floats(whole, place):
    return float32(int32(whole)) * as_float(place)


@njit(inline="always")
def _is_deep(bits, below):
    """1 or 0. Zero counts too: it stays zero. `and` would be a branch, and no loop with one is made of vectors."""
    return uint32(_and(bits, _MAGNITUDE) < below)


@njit(inline="always")
def _zeros(magnitude, lowest_level, always):
    """eager._round_deep: the significand, and how many further random bits must be zero."""
    scale = _sub(max(_shr(magnitude, 23), uint32(1)), 1)
    significand = _sub(magnitude, _shl(scale, 23))
    zeros = _sub(_add(_sub(max(scale, lowest_level), scale), always), 24)
    missing = _sub(150, _shr(as_bits(float32(int32(significand))), 23))  # leading zeros of a subnormal number's
    missing = uint32(0) if significand == uint32(0) else missing
    return _shl(significand, missing), _add(zeros, missing)


@njit(inline="always")
def _deep(
    source, target, size, index, table, k0, k1, k2, f0, f1, f2, always, lowest_level, smallest, below, signed_zero,
    key, block,
):  # fmt: skip
    """Rounds what lies far below the smallest value of the format again, as eager._round_deep does.

    Most of it becomes zero, since a further word has bits that are not: so that one is looked at first.
    """
    some = uint32(0)
    for i in range(size):
        bits, old = load(source, i), load(target, i)
        _, zeros = _zeros(_and(bits, _MAGNITUDE), lowest_level, always)
        further = word(_index(index, table, i), f0, f1, f2)
        all_zero = _begins_with(zeros, further)
        deep = _is_deep(bits, below)
        some = _or(some, _and(all_zero, deep))
        store(target, i, _and(_and(bits, _SIGN), signed_zero) if deep else old)
    if not some:
        return
    undecided = uint32(0)
    for i in range(size):
        bits, old = load(source, i), load(target, i)
        significand, zeros = _zeros(_and(bits, _MAGNITUDE), lowest_level, always)
        place = _index(index, table, i)
        below_significand = uint32(_shr(word(place, k0, k1, k2), 8) < significand)
        all_zero = _begins_with(zeros, word(place, f0, f1, f2))
        up, deep = _and(below_significand, all_zero), _is_deep(bits, below)
        undecided = _or(undecided, _and(_and(deep, up), uint32(zeros > uint32(32))))
        value = _or(_mul(up, smallest), _and(bits, _SIGN))
        value = _and(value, signed_zero) if value == uint32(_SIGN) else value
        store(target, i, value if deep else old)
    if undecided:
        for i in range(size):
            bits = load(source, i)
            _, zeros = _zeros(_and(bits, _MAGNITUDE), lowest_level, always)
            if _is_deep(bits, below) and zeros > uint32(32) and _and(load(target, i), _MAGNITUDE) != uint32(0):
                left, draw, up = int64(zeros) - 32, 2, True
                while up and left > 0:
                    g0, g1, g2 = words_of(key, block, draw)
                    up = _shr(word(_index(index, table, i), g0, g1, g2), _sub(32, uint32(min(left, 32)))) == uint32(0)
                    left -= 32
                    draw += 1
                if not up:
                    store(target, i, _and(_and(bits, _SIGN), signed_zero))


@njit(inline="always")
def _mix64(z):
    """noise.mix64."""
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    return z ^ (z >> uint64(31))


@njit
def words_of(key, block, draw):
    """noise.Key(key).parts(block, draw), each `_mixed`."""
    start = uint64(key) + uint64(0x9E3779B97F4A7C15) * (uint64(1) + uint64(block) + (uint64(draw) << uint64(32)))
    mixed, more = _mix64(start), _mix64(start ^ uint64(0xFFFFFFFFFFFFFFFF))
    k0, k1, k2 = uint32(mixed), uint32(mixed >> uint64(32)), uint32(more)
    return _mixed(k0, 17), _mixed(k1, 11), _mixed(k2, 15)


@njit(inline="always")
def _group(
    mode, infinity, group, result, size, index, table, k0, k1, k2, f0, f1, f2, key, block, always, lowest_level,
    mantissa, composed, fast_from, deep_below, largest, lowest, signed_zero, few, half, buffer,
):  # fmt: skip
    """Rounds at most GROUP numbers at `group` into `result`."""
    highest, smallest = int32(-1), uint32(0xFFFFFFFF)
    for i in range(size):
        less_one = _sub(_and(load(group, i), _MAGNITUDE), 1)  # of zero: the smallest int32, the largest uint32
        highest, smallest = max(highest, int32(less_one)), min(smallest, less_one)
    # Where `_nearest` may be used: its constant must be a normal number, and fall within float32's.
    plain = not composed and uint32(_sub(mantissa, 1)) < uint32(21) and _sub(lowest_level, mantissa) < uint32(230)
    fast = fast_from and smallest >= _sub(fast_from, 1) and highest < int32(largest)
    deep = mode == _STOCHASTIC and not fast and deep_below != uint32(0) and smallest < _sub(deep_below, 1)
    # Vector instructions must not write to what they read, and `_deep` reads the group again.
    written = buffer if deep or group == result else result
    small = mode == _STOCHASTIC and plain and signed_zero and highest < int32(largest)
    small = small and _add(lowest_level, always) > uint32(55)  # so that float32's subnormal numbers are `too_few`
    smallest_value = _shl(_sub(_add(lowest_level, 1), mantissa), 23)
    if fast:
        _fast(mode, group, written, size, index, table, k0, k1, k2, always, few, half)
    elif small and deep:
        deep = uint32(0) != _small(
            group, written, size, index, table, k0, k1, k2, f0, f1, f2, always, lowest_level, smallest_value,
            deep_below, True,
        )  # fmt: skip
    elif small:
        _small(
            group, written, size, index, table, k0, k1, k2, f0, f1, f2, always, lowest_level, smallest_value,
            deep_below, False,
        )  # fmt: skip
    elif mode == _NEAREST and plain:
        _nearest(infinity, group, written, size, always, lowest_level, mantissa, largest, lowest, signed_zero)
    elif not (deep and highest < int32(_sub(deep_below, 1))):
        _general(
            mode, infinity, group, written, size, index, table, k0, k1, k2, always, lowest_level, mantissa, composed,
            largest, lowest, signed_zero, few, half,
        )  # fmt: skip
    if deep:
        for start in range(0, size, _DEEP_GROUP):  # a few values like that in every group are common, more are not
            some = min(_DEEP_GROUP, size - start)
            smallest, largest_written = uint32(0xFFFFFFFF), uint32(0)
            for i in range(start, start + some):
                smallest = min(smallest, _and(load(group, i), _MAGNITUDE))
                largest_written = max(largest_written, _and(load(written, i), _MAGNITUDE))
            if smallest < deep_below and (not small or largest_written == uint32(_UNDECIDED)):
                place = 4 * start
                _deep(
                    group + place, buffer + place, some, index if table else _add(index, uint32(start)),
                    table + place if table else 0, k0, k1, k2, f0, f1, f2, always, lowest_level, smallest_value,
                    deep_below, signed_zero, key, block,
                )  # fmt: skip
    if written == buffer:
        for i in range(size):
            store(result, i, load(buffer, i))


# What a kernel reads at `parameters`, as uint32, in this order: see engines/parameters.py; and of a block, the largest
# magnitude of the tensor's type.
PARAMETERS = (
    *("always", "lowest_level", "mantissa", "composed", "fast_from", "deep_below", "largest", "lowest", "signed_zero"),
    *("few", "half", "exponents", "type_largest"),
)


# A task begins with the number of the next piece and a place for what a kernel has to say, both 0 at first, the number
# of pieces, source, target, key and the address of the parameters.
@cache
def flat(mode: int, infinity: bool):
    """The kernel that rounds `count` float32 numbers at the address `source` into `target`, which may be the same.

    mode: a place in MODES. infinity: whether overflow follows IEEE 754; otherwise it saturates. Further fields of the
    task: count; first, the index of the first number; size, how many of them are a piece. No piece may cross an index
    that is a multiple of 2**32.
    """

    @cfunc("void(int64)", **KERNEL)
    def kernel(task):
        pieces, source, target, key = field(task, 2), field(task, 3), field(task, 4), field(task, 5)
        parameters, count, first, size = field(task, 6), field(task, 7), field(task, 8), field(task, 9)
        always, lowest_level, mantissa = load(parameters, 0), load(parameters, 1), load(parameters, 2)
        composed, fast_from, deep_below = load(parameters, 3), load(parameters, 4), load(parameters, 5)
        largest, lowest, signed_zero = load(parameters, 6), load(parameters, 7), load(parameters, 8)
        few, half, buffer = load(parameters, 9), load(parameters, 10), _group_buffer()
        piece = next_piece(task)
        while piece < pieces:
            begin, end = piece * size, min((piece + 1) * size, count)
            block = (first + begin) >> 32
            k0, k1, k2 = words_of(key, block, 0)
            f0, f1, f2 = words_of(key, block, 1)
            for start in range(begin, end, GROUP):
                _group(
                    mode, infinity, source + 4 * start, target + 4 * start, min(GROUP, end - start),
                    uint32(first + start), 0, k0, k1, k2, f0, f1, f2, key, block, always, lowest_level, mantissa,
                    composed, fast_from, deep_below, largest, lowest, signed_zero, few, half, buffer,
                )  # fmt: skip
            piece = next_piece(task)

    return kernel


@cache
def channels_last(mode: int, infinity: bool):
    """As `flat`, for images that lie pixel by pixel, their elements counted channel by channel, at most 2**32.

    Further fields: units of the whole task; size, how many of them are a piece; channels; pixels of an image; table;
    first, the index of the first element. A unit is max(1, GROUP // channels) pixels, the last of an image fewer.
    table: address of uint32, for each of GROUP elements in memory how far its index lies from the unit's first one.
    """

    @cfunc("void(int64)", **KERNEL)
    def kernel(task):
        pieces, source, target, key = field(task, 2), field(task, 3), field(task, 4), field(task, 5)
        parameters, all_units, size = field(task, 6), field(task, 7), field(task, 8)
        channels, pixels, table, first = field(task, 9), field(task, 10), field(task, 11), field(task, 12)
        k0, k1, k2 = words_of(key, 0, 0)
        f0, f1, f2 = words_of(key, 0, 1)
        always, lowest_level, mantissa = load(parameters, 0), load(parameters, 1), load(parameters, 2)
        composed, fast_from, deep_below = load(parameters, 3), load(parameters, 4), load(parameters, 5)
        largest, lowest, signed_zero = load(parameters, 6), load(parameters, 7), load(parameters, 8)
        few, half, buffer = load(parameters, 9), load(parameters, 10), _group_buffer()
        unit = max(1, GROUP // channels)
        units = (pixels + unit - 1) // unit  # of an image
        piece = next_piece(task)
        while piece < pieces:
            for number in range(piece * size, min((piece + 1) * size, all_units)):
                image, pixel = number // units, number % units * unit
                elements = min(unit, pixels - pixel) * channels
                for start in range(0, elements, GROUP):  # several only where there are more channels than GROUP
                    place = 4 * ((image * pixels + pixel) * channels + start)
                    _group(
                        mode, infinity, source + place, target + place, min(GROUP, elements - start),
                        uint32(first + image * pixels * channels + pixel + start * pixels), table, k0, k1, k2, f0, f1,
                        f2, key, 0, always, lowest_level, mantissa, composed, fast_from, deep_below, largest, lowest,
                        signed_zero, few, half, buffer,
                    )  # fmt: skip
            piece = next_piece(task)

    return kernel


@cache
def blocks(mode: int):
    """As `flat`, for blocks of `length` numbers that have a power of two as scale (formats.BlockFormat), at most 2**32.

    Further fields: how many blocks; size, how many of them are a piece; length; first, the index of the first number.
    The second field is 1 afterwards where
    there was a block so close to float32's smallest numbers that it must be left to another engine; `target` is then
    of no use.
    """

    @cfunc("void(int64)", **KERNEL)
    def kernel(task):
        pieces, source, target, key = field(task, 2), field(task, 3), field(task, 4), field(task, 5)
        parameters, count, size, length = field(task, 6), field(task, 7), field(task, 8), field(task, 9)
        first = field(task, 10)
        k0, k1, k2 = words_of(key, 0, 0)
        f0, f1, f2 = words_of(key, 0, 1)
        always, mantissa = load(parameters, 0), load(parameters, 2)
        element_largest, signed_zero = load(parameters, 6), load(parameters, 8)
        few, half, buffer = load(parameters, 9), load(parameters, 10), _group_buffer()
        exponents, type_largest = load(parameters, 11), load(parameters, 12)
        highest_exponent = _shr(element_largest, 23)
        piece = next_piece(task)
        while piece < pieces:
            for number in range(piece * size, min((piece + 1) * size, count)):
                begin = source + 4 * number * length
                amax = uint32(0)
                for i in range(length):
                    magnitude = _and(load(begin, i), _MAGNITUDE)
                    amax = max(amax, uint32(0) if magnitude > uint32(_INFINITY) else magnitude)
                amax = min(amax, type_largest) if amax else uint32(0x3F800000)
                exponent = _shr(amax, 23)
                # The element's format, its bias and its largest value moved by the scale.
                lowest_level = _sub(exponent, exponents)
                if int32(lowest_level) + int32(always) < 31:
                    mark(task)
                    return
                largest = _add(element_largest, _shl(_sub(exponent, highest_exponent), 23))
                fast_from = uint32(0)
                if signed_zero and mantissa:
                    fast_from = _shl(_add(lowest_level, 1), 23)
                deep_below = _shl(_sub(_add(lowest_level, always), 29), 23)
                for start in range(0, length, GROUP):
                    place = 4 * (number * length + start)
                    _group(
                        mode, False, source + place, target + place, min(GROUP, length - start),
                        uint32(first + number * length + start), 0, k0, k1, k2, f0, f1, f2, key, 0, always,
                        lowest_level, mantissa, uint32(0), fast_from, deep_below, largest, largest, signed_zero, few,
                        half, buffer,
                    )  # fmt: skip
            piece = next_piece(task)

    return kernel
