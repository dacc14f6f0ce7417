"""What the loops of the fused engine are written with: single instructions of the processor, and random words.

numba widens whole numbers of 32 bits to 64 with each operation, which halves what a vector instruction does. So the
loops of 32 bits use the operations below, each of which is one instruction of LLVM's and stays at 32 bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit, types, uint32, uint64
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.ccallback import CFunc
from numba.core.serialize import dumps
from numba.extending import intrinsic

from low_precision import noise
from low_precision.engines.tasks import CannotCompile, Task, because, field_names
from low_precision.noise import GAMMA, MIX_MULTIPLIERS, MIX_SHIFTS, MULTIPLIERS, SHIFTS

_I32, _I64, _FLOAT, _DOUBLE = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()


def _sources() -> str:
    """A digest of all files that machine code of the loops is made of: those in this folder, and noise.py."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(noise.__file__)]
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


_DIGEST = _sources()


def kernel(function: Callable[[int], None]) -> CFunc:
    """Compiles a function of one argument, the address of a task, or takes what was compiled from numba's cache.

    numba caches machine code by the function's name, and compiles it again when the function's own file has changed,
    but not when a file has from which that imports. So the digest of all these files becomes a part of the name.
    Where there is no place for a cache, the function is compiled without. CannotCompile where that fails.
    """
    function.__qualname__ += f"-{_DIGEST}"
    signature = ((types.int64,), types.void)
    compiled = _Kernel(function, signature, locals={}, options={"error_model": "numpy", "boundscheck": False})
    try:
        compiled.enable_caching()
    except Exception as error:  # numba finds no folder that it can write to
        _warn_of_cache(error)
    try:
        compiled.compile()
    except Exception as error:
        raise CannotCompile("fused", because(error)) from error
    return compiled


class _Kernel(CFunc):
    """numba.cfunc's class, with a cache that may fail."""

    def enable_caching(self) -> None:
        self._cache = _Cache(self.__wrapped__)


class _CheckedCode(CompileResultCacheImpl):
    """Machine code as numba stores it, with a digest: damaged code would end the process, not raise an error."""

    def reduce(self, compiled: Any) -> tuple[bytes, bytes]:
        code = dumps(super().reduce(compiled))
        return _digest(code), code

    def rebuild(self, target_context: Any, stored: tuple[bytes, bytes]) -> Any:
        digest, code = stored
        if _digest(code) != digest:
            raise ValueError("its digest is another one")
        return super().rebuild(target_context, pickle.loads(code))


class _Cache(FunctionCache):
    """numba's cache of one function. What fails in it costs a compilation, and not the run."""

    _impl_class = _CheckedCode

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(signature, target_context)
        except Exception as error:  # a file that is cut off or damaged can raise anything
            _warn_of_cache(error)
            with contextlib.suppress(Exception):
                self.flush()  # so that it is made anew
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        try:
            super().save_overload(signature, compiled)
        except Exception as error:  # a full disk, a folder that is gone or cannot be written to any more
            _warn_of_cache(error)


def _digest(code: bytes) -> bytes:
    return hashlib.blake2b(code, digest_size=16).digest()


_has_warned = False


def _warn_of_cache(error: BaseException) -> None:
    """A warning, once a process, that compiled code is not cached."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        text = (
            f"low_precision: numba's cache of compiled loops fails ({because(error)}); they are compiled anew, some "
            "seconds in each process, until it works (the environment variable NUMBA_CACHE_DIR names its folder)"
        )
        warnings.warn(text, stacklevel=2)


# A function of one's own that becomes part of the loop which calls it, so that nothing stands in the way of vector
# instructions. LLVM puts it there: numba's own inline="always" does the same to its intermediate code, by copies that
# made compiling a kernel take 6 seconds instead of 1.
inlined = njit(forceinline=True, error_model="numpy")


def instruction(generator: Callable[..., Any]) -> Any:
    """What may be called in a loop, from a function that says its type and makes its LLVM instructions."""
    return intrinsic(generator)


def _operation(name):
    """uint32 (uint32, uint32): the LLVM instruction of that name."""

    @instruction
    def operation(typing_context, x, y):
        def generate(context, builder, signature, arguments):
            return getattr(builder, name)(*arguments)

        return types.uint32(types.uint32, types.uint32), generate

    return operation


add, sub, mul = _operation("add"), _operation("sub"), _operation("mul")
and_, or_, xor = _operation("and_"), _operation("or_"), _operation("xor")
shl, shr, sar = _operation("shl"), _operation("lshr"), _operation("ashr")  # sar: copies of the sign come in


def _bitcast(source, target, llvm_type):
    """target (source): the same bits as another type."""

    @instruction
    def cast(typing_context, x):
        return target(source), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], llvm_type)

    return cast


as_float, as_bits = _bitcast(types.uint32, types.float32, _FLOAT), _bitcast(types.float32, types.uint32, _I32)
as_double, as_bits64 = _bitcast(types.int64, types.float64, _DOUBLE), _bitcast(types.float64, types.int64, _I64)


def _load(number_type, llvm_type):
    """number_type (int64 address, int64 i): the i-th number from an address on."""

    @instruction
    def load(typing_context, address, i):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], llvm_type.as_pointer())
            return builder.load(builder.gep(pointer, [arguments[1]]))

        return number_type(types.int64, types.int64), generate

    return load


def _store(number_type, llvm_type):
    """void (int64 address, int64 i, number_type): puts a number in the i-th place from an address on."""

    @instruction
    def store(typing_context, address, i, value):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], llvm_type.as_pointer())
            builder.store(arguments[2], builder.gep(pointer, [arguments[1]]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, number_type), generate

    return store


load, store = _load(types.uint32, _I32), _store(types.uint32, _I32)
load64, store64 = _load(types.int64, _I64), _store(types.int64, _I64)


# The names of LLVM's functions below are those of its versions with typed pointers. Later ones take them too.


def _prefetch(to_write):
    """void (int64 address): asks for that place of memory, which is read, or written, soon. Any address will do."""

    @instruction
    def prefetch(typing_context, address):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], _I32.as_pointer())
            function_type = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
            function = builder.module.declare_intrinsic("llvm.prefetch.p0i32", fnty=function_type)
            builder.call(function, [pointer, _I32(to_write), _I32(3), _I32(1)])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return prefetch


prefetch_to_read, prefetch_to_write = _prefetch(0), _prefetch(1)


# Of vectors, where a loop is so short that LLVM would make no vector instructions of it.

VECTOR = 16  # numbers


def _vector(numbers):
    return ir.Constant(ir.VectorType(_I32, VECTOR), [ir.Constant(_I32, number) for number in numbers])


def all_of(builder, value, vector_type):
    """A vector whose numbers are all the same."""
    vector = builder.insert_element(ir.Constant(vector_type, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(vector, vector, _vector([0] * VECTOR))


def _all(builder, value):
    return all_of(builder, value, ir.VectorType(_I32, VECTOR))


def _magnitudes(builder, address, size=None):
    """A vector of those of float32 numbers, zeros in place of NaNs. size: how many there are; the others are zeros."""
    vector_type, flags = ir.VectorType(_I32, VECTOR), ir.VectorType(ir.IntType(1), VECTOR)
    pointer = builder.inttoptr(address, vector_type.as_pointer())
    if size is None:
        bits = builder.load(pointer, align=4)
    else:
        there = builder.icmp_unsigned("<", _vector(range(VECTOR)), _all(builder, builder.trunc(size, _I32)))
        read_type = ir.FunctionType(vector_type, [vector_type.as_pointer(), _I32, flags, vector_type])
        read = builder.module.declare_intrinsic("llvm.masked.load.v16i32.p0v16i32", fnty=read_type)
        bits = builder.call(read, [pointer, _I32(4), there, _vector([0] * VECTOR)])
    magnitudes = builder.and_(bits, _vector([0x7FFFFFFF] * VECTOR))
    is_nan = builder.icmp_unsigned(">", magnitudes, _vector([0x7F800000] * VECTOR))
    return builder.select(is_nan, _vector([0] * VECTOR), magnitudes)


def _larger(builder, x, y):
    return builder.select(builder.icmp_unsigned(">", x, y), x, y)


def _largest_everywhere(builder, vector):
    """A vector whose numbers are all the largest of this one's."""
    for distance in (8, 4, 2, 1):
        others = builder.shuffle_vector(vector, vector, _vector([i ^ distance for i in range(VECTOR)]))
        vector = _larger(builder, vector, others)
    return vector


def _put(builder, address, vector):
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=4)


@instruction
def put_largest(typing_context, target, source, size):
    """void (int64 target, int64 source, int64): the largest magnitude of the first `size` float32 numbers, at most
    VECTOR, from `source` on, into VECTOR places from `target` on; NaNs are zeros.
    """

    def generate(context, builder, signature, arguments):
        target, source, size = arguments
        _put(builder, target, _largest_everywhere(builder, _magnitudes(builder, source, size)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@instruction
def largest_of_vector(typing_context, source):
    """uint32 (int64 source): the largest magnitude of VECTOR float32 numbers, NaNs aside."""

    def generate(context, builder, signature, arguments):
        return builder.extract_element(_largest_everywhere(builder, _magnitudes(builder, arguments[0])), _I32(0))

    return types.uint32(types.int64), generate


@instruction
def put_largest_of_two(typing_context, target, source):
    """void (int64 target, int64 source): as put_largest, of two whole vectors into the places of two."""

    def generate(context, builder, signature, arguments):
        target, source = arguments
        further = _I64(4 * VECTOR)
        halves = _magnitudes(builder, source), _magnitudes(builder, builder.add(source, further))
        largest = _largest_everywhere(builder, _larger(builder, *halves))
        _put(builder, target, largest)
        _put(builder, builder.add(target, further), largest)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@instruction
def fill(typing_context, address, first, step):
    """void (int64 address, uint32, uint32): puts VECTOR numbers into memory: first, first + step, ..."""

    def generate(context, builder, signature, arguments):
        steps = builder.mul(_all(builder, arguments[2]), _vector(range(VECTOR)))
        _put(builder, arguments[0], builder.add(_all(builder, arguments[1]), steps))
        return context.get_dummy_value()

    return types.void(types.int64, types.uint32, types.uint32), generate


def reader(layout: type, number_type: types.Integer = types.int64):
    """layout (int64 address): the numbers from an address on, by the names of the fields of the class `layout`."""
    names = field_names(layout)
    fields = layout if issubclass(layout, tuple) else namedtuple(layout.__name__, names)
    llvm_type = {types.uint32: _I32, types.int64: _I64}[number_type]

    @instruction
    def read(typing_context, address):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], llvm_type.as_pointer())
            numbers = [builder.load(builder.gep(pointer, [_I64(i)])) for i in range(len(names))]
            return context.make_tuple(builder, signature.return_type, numbers)

        return types.NamedUniTuple(number_type, len(names), fields)(types.int64), generate

    return read


def _field(builder, task, name):
    """The address of a field of the task."""
    return builder.inttoptr(builder.add(task, _I64(getattr(Task, name).offset)), _I64.as_pointer())


@instruction
def next_piece(typing_context, task):
    """The number in the task's field `next_piece`, which is one higher afterwards; no two threads get the same."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _field(builder, arguments[0], "next_piece"), _I64(1), "monotonic")

    return types.int64(types.int64), generate


@instruction
def refuse(typing_context, task):
    """Puts 1 into the task's field `refused`."""

    def generate(context, builder, signature, arguments):
        builder.store_atomic(_I64(1), _field(builder, arguments[0], "refused"), "monotonic", 8)
        return context.get_dummy_value()

    return types.void(types.int64), generate


class KeyWords(NamedTuple):
    """The three words of a key that enter noise.word, each `_mixed`, which saves three operations an element."""

    first: int
    second: int
    third: int


@inlined
def word(index, key_words):
    """noise.word: 32 random bits for an element."""
    x = mul(xor(xor(index, shr(index, SHIFTS[0])), key_words.first), MULTIPLIERS[0])
    x = mul(xor(xor(x, shr(x, SHIFTS[1])), key_words.second), MULTIPLIERS[1])
    x = mul(xor(xor(x, shr(x, SHIFTS[2])), key_words.third), MULTIPLIERS[2])
    return xor(x, shr(x, SHIFTS[3]))


@inlined
def _mixed(part, shift):
    """(x ^ part) ^ (x ^ part) >> shift = x ^ x >> shift ^ _mixed(part, shift)."""
    return xor(uint32(part), shr(uint32(part), shift))


@inlined
def _mix64(z):
    """noise.mix64."""
    z = (z ^ (z >> uint64(MIX_SHIFTS[0]))) * uint64(MIX_MULTIPLIERS[0])
    z = (z ^ (z >> uint64(MIX_SHIFTS[1]))) * uint64(MIX_MULTIPLIERS[1])
    return z ^ (z >> uint64(MIX_SHIFTS[2]))


@njit
def key_words(key, block, draw):
    """noise.Key(key).parts(block, draw), each `_mixed`."""
    start = uint64(key) + uint64(GAMMA) * (uint64(1) + uint64(block) + (uint64(draw) << uint64(32)))
    mixed, more = _mix64(start), _mix64(start ^ uint64(0xFFFFFFFFFFFFFFFF))
    return KeyWords(
        first=_mixed(uint32(mixed), SHIFTS[0]),
        second=_mixed(uint32(mixed >> uint64(32)), SHIFTS[1]),
        third=_mixed(uint32(more), SHIFTS[2]),
    )
