"""Every kind of tensor and every mode of torch in which quantize() can be called: what is right, and what is refused.

`python front_door.py DRAWS FILE` calls it with so many random combinations, always the same ones, in a process of its
own, because what goes wrong here may end the interpreter. FILE says what it is about to try.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensor_kinds import OUTS, PLAIN, REFUSED, REFUSED_OUTS, UNUSUAL, WITHOUT_NUMBERS, with_one_more
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parent.parent))  # after PYTHONPATH, which may name another checkout to compare
from low_precision.engines import choice
from low_precision.noise import Key
from low_precision.tensor import quantize

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, *HALVES)
# A kernel is compiled for each rounding: those that other tests need anyway.
ROUNDINGS = ("nearest", "up", "stochastic", "stochastic:8:half")
ELEMENTS = ("float8", "float8_e5m2", "float8_e4m3fn", "fp16", "bfloat16", "tf32", "float32", "fixed8.4", "e8m3")
BLOCKS = ("mxfp8_e4m3", "mxfp4", "mxint8", "nvfp4", "bfp8", "bfp8_row", "bfp8_column", "bfp24")
ENGINES = {"eager": "eager", "fused": "fused", "auto, before": "auto", "auto, after": "auto"}  # it has loaded `fused`
SHAPES = ((12,), (4, 40), (3, 5, 7), (2, 3, 4, 5), (33,), (1, 1), (2, 40, 3, 3), ())
# Words of errors that are torch's or Python's, and not ours.
NOT_OURS = ("internal", "please file", "data pointer", "could not run", "aten::", "has no attribute", "batching rule")
KINDS = PLAIN | UNUSUAL | WITHOUT_NUMBERS | REFUSED


# Modes: contexts in which quantize is called, and functions that call it


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def flushing():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "none": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "flushing": flushing,
    "a mode of functions": SeenFunctions,
    "a mode of operations": Seen,
    "counting": lambda: FlopCounterMode(display=False),
    "fake": FakeTensorMode,
    "meta by a context": lambda: torch.device("meta"),
    "meta by default": lambda: default_device("meta"),
    "cpu by default": lambda: default_device("cpu"),
    "float16 by default": lambda: default_dtype(torch.float16),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
}
Rounds = Callable[[Tensor], Tensor]


def by_grad(rounds: Rounds, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.grad(lambda v: (lambda y: (y.sum(), y))(rounds(v)), has_aux=True)(x)[::-1]


def by_dual_numbers(rounds: Rounds, x: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(rounds(forward_ad.make_dual(x.detach(), torch.ones_like(x))))


# They give what comes out, and a gradient or a tangent where they make one, which is 1.
TRANSFORMS: dict[str, Callable[[Rounds, Tensor], Tensor | tuple[Tensor, Tensor]]] = {
    "vmap": lambda rounds, x: torch.vmap(rounds)(x),
    "vmap of the last": lambda rounds, x: torch.vmap(rounds, in_dims=-1, out_dims=-1)(x),
    "vmap of vmap": lambda rounds, x: torch.vmap(torch.vmap(rounds) if x.ndim > 1 else rounds)(x),
    "vmap of grad": lambda rounds, x: torch.vmap(functools.partial(by_grad, rounds))(x),
    "grad": by_grad,
    "jvp": lambda rounds, x: torch.func.jvp(rounds, (x,), (torch.ones_like(x),)),
    "dual numbers": by_dual_numbers,
    "of a tensor from outside": lambda rounds, x: torch.func.grad(lambda v: (v, rounds(x)), has_aux=True)(x.sum())[1],
}
TRACERS: dict[str, Callable[[Rounds, Tensor], Tensor]] = {
    "functionalize": lambda rounds, x: torch.func.functionalize(rounds)(x),
    "jit.trace": lambda rounds, x: torch.jit.trace(lambda v: rounds(v), torch.zeros_like(x), check_trace=False)(x),
    "make_fx": lambda rounds, x: make_fx(rounds)(torch.zeros_like(x))(x),
    "make_fx, before dispatch": lambda rounds, x: make_fx(rounds, pre_dispatch=True)(torch.zeros_like(x))(x),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call."""

    kind: str
    mode: str
    out: str
    engine: str
    format: str
    rounding: str
    overflow: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int
    seed: int

    def numbers(self) -> Tensor:
        """Of many sizes, with special values; contiguous."""
        g = torch.Generator("cpu").manual_seed(self.seed)
        x = torch.randn(self.shape, generator=g, dtype=torch.float32, device="cpu")
        size = torch.randint(-30, 30, self.shape, generator=g, device="cpu")
        x = x * torch.exp2(size.double() * (1, 0, 4)[self.seed % 3])
        if self.seed % 4 == 1 and x.numel() > 9:
            x.view(-1)[:5] = torch.tensor([np.nan, np.inf, -np.inf, -0.0, 1e-42], dtype=x.dtype, device="cpu")
        return x.to(self.dtype)

    def round(self, x: Any, backend: str, out: Any = None) -> Tensor:
        key = Key(self.seed * 2**40 + 3, self.seed % 2)
        return quantize(
            x, self.format, self.rounding, key, dim=self.dim, overflow=self.overflow, backend=backend, out=out
        )

    def expected(self, x: Tensor) -> Tensor:
        """What comes of plain numbers, sample by sample where the mode says so."""
        rounds = functools.partial(self.round, backend="eager")
        if self.mode == "vmap of the last":
            return torch.stack([rounds(sample.contiguous()) for sample in x.unbind(-1)], -1)
        if self.mode == "vmap of vmap" and x.ndim > 1:
            return torch.stack([torch.stack([rounds(sample) for sample in row]) for row in x])
        if self.mode.startswith("vmap"):
            return torch.stack([rounds(sample) for sample in x])
        return rounds(x)

    def must_work(self) -> bool:
        """Whether it may not be refused, provided that the format goes with the type, and `dim` with the shape."""
        own_operations = self.kind in ("marked", "logged", "fake") or self.out == "out marked"
        own_operations &= self.mode == "fake" or (self.kind == "logged" and self.out == "out marked")
        if self.kind in REFUSED or self.mode in TRACERS or own_operations:
            return False
        allowed = {"of a gradient": "no_grad", "out of inference mode": "inference_mode"}
        if self.out in allowed:
            return False if self.kind in WITHOUT_NUMBERS else self.mode == allowed[self.out]
        return self.out in OUTS

    def makes_sense(self) -> bool:
        """Whether torch itself can get as far as to call quantize."""
        if self.mode in CONTEXTS:
            if self.out == "shifted":
                return self.kind == "contiguous"
            if self.out in ("x", "detached"):
                repeats = self.kind in ("expanded", "overlapping", "zeros without memory", "read-only")
                trained = self.kind in ("parameter", "requires a gradient", "of inference mode")
                return self.kind in PLAIN | UNUSUAL and not repeats and not trained
            if self.kind in WITHOUT_NUMBERS:
                return self.out not in ("out negated", "out marked")
            return self.out == "none" or self.kind in PLAIN | UNUSUAL
        not_there = {"empty", "long"} | ({"expanded", "overlapping"} if self.mode in ("jvp", "dual numbers") else set())
        return self.out == "none" and self.kind in PLAIN.keys() - not_there and self.shape != ()


CASES = st.builds(
    Case,
    kind=st.sampled_from([*PLAIN, *UNUSUAL] * 3 + [*WITHOUT_NUMBERS, *REFUSED]),
    mode=st.sampled_from([*CONTEXTS, *TRANSFORMS] * 2 + [*TRACERS]),
    out=st.sampled_from(["none"] * 20 + [*OUTS] * 3 + [*REFUSED_OUTS]),
    engine=st.sampled_from(sorted(ENGINES)),
    format=st.sampled_from(ELEMENTS + BLOCKS),
    rounding=st.sampled_from(ROUNDINGS),
    overflow=st.sampled_from(["saturate"] * 4 + ["infinity"]),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    dim=st.sampled_from((-1, -1, -1, 0, 0, 1)),
    seed=st.integers(0, 1000),
).filter(Case.makes_sense)


def plain(x: Tensor) -> Tensor:
    """Its numbers: contiguous, in memory of their own."""
    return x.detach().as_subclass(Tensor).resolve_neg().clone(memory_format=torch.contiguous_format)


def bits(x: Tensor) -> Tensor:
    return plain(x).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def made(case: Case) -> Any:
    """The tensor of the case."""
    x = case.numbers()
    return with_one_more(x) if case.out == "shifted" else KINDS[case.kind](x)


def called(case: Case, engine: str) -> tuple[Any, Any, Exception | None]:
    """x, what came of it, and the error in place of that."""
    x = made(case)
    out = (OUTS | REFUSED_OUTS)[case.out](x)
    choice._spent = {"auto, before": 0.0, "auto, after": choice.LOAD_SECONDS}.get(engine, 0.0)
    rounds = functools.partial(case.round, backend=ENGINES[engine], out=out)
    try:
        if case.mode in CONTEXTS:
            with CONTEXTS[case.mode]():
                result = rounds(x)
        else:
            result = (TRANSFORMS | TRACERS)[case.mode](rounds, x)
            if isinstance(result, tuple):
                result, slope = result
                assert (slope == 1).all(), case
        assert out is None or result is out, case
    except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError) as error:
        return x, None, error
    return x, result, None


def check(case: Case) -> str:
    """The right values, or a refusal of ours, the same whichever engine is in use."""
    x, result, error = called(case, case.engine)
    if error is not None:
        text = str(error)
        assert text, case
        assert "\n" not in text, (case, text)
        assert not any(word in text.lower() for word in NOT_OURS), (case, text)
        _, _, with_eager = called(case, "eager")
        assert (type(with_eager), str(with_eager)) == (type(error), text), (case, text, str(with_eager))
        if case.must_work():  # then it is the numbers that are wrong
            numbers = case.numbers() if case.kind in WITHOUT_NUMBERS else plain(made(case))
            try:
                case.expected(numbers)
            except (TypeError, IndexError, ValueError):
                return "refused"
            raise AssertionError((case, text))
        return "refused"
    if case.kind in WITHOUT_NUMBERS:
        assert (type(result), result.shape, result.dtype, result.device) == (type(x), x.shape, x.dtype, x.device), case
        return "without numbers"
    assert case.kind not in REFUSED, case
    before = plain(made(case))  # x may be overwritten
    expected = case.expected(before)
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape), case
    if result.is_neg():  # torch negates what is written to it, a NaN too
        assert torch.equal(result.isnan(), expected.isnan()), case
        result, expected = result.nan_to_num(0.0), expected.nan_to_num(0.0)
    assert torch.equal(bits(result), bits(expected)), (case, before, plain(result), expected)
    return "rounded"


def main(draws: int, file: Path) -> None:
    counts: dict[str, int] = {}

    @settings(
        max_examples=draws,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES)
    def draw(case: Case) -> None:
        file.write_text(repr(case))
        came = check(case)
        counts[came] = counts.get(came, 0) + 1

    draw()
    print(json.dumps(counts))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    main(int(sys.argv[1]), Path(sys.argv[2]))
