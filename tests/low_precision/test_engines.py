"""Every engine gives the bits of the readable one, whatever the numbers, the layout, the type and the threads."""

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import oracles
import pytest
import torch

from low_precision.engines import eager, fused, loops, tasks, threads
from low_precision.formats import FLOAT32, NAMED, format_named
from low_precision.noise import Key
from low_precision.rounding import FewBits, Overflow, Rounding, is_random
from low_precision.tensor import quantize

FIXED = ["fixed8.4", "fixed8.4s", "fixed16.12", "fixed2.0", "fixed3.5", "fixed25.126"]
FORMATS = [*(n for n in NAMED if n != "float32"), "e2m0", "e3m0", "e8m0", "e8m3", "e2m23", "e8m22", "e8m23", *FIXED]
P3109 = ["binary8p3se", "binary8p1ue", "binary4p1sf", "binary8p4uf", "binary16p8se", "binary9p9ue"]
FORMATS += P3109
WIDE = ["binary8p3ue", "binary12p3sf", "binary16p5se"]  # the latter two: float64 numbers alone, its smallest ones too
BLOCKS = ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4"]
BLOCKS += ["bfp2", "bfp8", "bfp8_row", "bfp8_column", "bfp16", "bfp24_row"]
ROUNDINGS = [*Rounding, FewBits(1), FewBits(4), FewBits(8, True), FewBits(23), FewBits(23, True)]
ROUNDINGS += [FewBits(5, even=True), FewBits(23, even=True)]
ROOT = Path(__file__).parent.parent.parent
# Each rounding mode is a kernel that must be compiled once: four of them for the quick tests, one of each kind.
QUICK = (Rounding.NEAREST, Rounding.UP, Rounding.STOCHASTIC, FewBits(8, True))
SOME = [pytest.param(r, marks=() if r in QUICK else pytest.mark.slow) for r in ROUNDINGS]
N = 5011  # groups of 256 and a rest


def numbers(n: int = N) -> dict[str, torch.Tensor]:
    """float32 of every kind: any bits, and ranges where formats have their normal, subnormal and far smaller values."""
    g = torch.Generator().manual_seed(7)

    def bits(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), dtype=torch.int32, generator=g).view(torch.float32)

    normal = torch.randn(n, generator=g)
    kinds = {"any": bits(-(2**31), 2**31 - 1), "subnormal": bits(0, 2**23), "zeros": torch.zeros(n)}
    return kinds | {f"{scale:g}": normal * scale for scale in (1e8, 1.0, 1e-3, 1e-7, 1e-26, 1e-37)}


def bits(x: torch.Tensor) -> torch.Tensor:
    width = {4: torch.int32, 2: torch.int16, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(width)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def both(x, fmt, rounding, overflow=Overflow.SATURATE, dim=-1):
    key = Key(2**63 + 5) if is_random(rounding) else None
    return [engine.quantize(x, fmt, rounding, overflow, key, dim) for engine in (eager, fused)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_fused_is_eager(name, rounding):
    fmt = format_named(name)
    for overflow in Overflow:
        if overflow is Overflow.INFINITY and not fmt.has_infinity:
            continue
        for kind, x in numbers().items():
            slow, quick = both(x, fmt, rounding, overflow)
            wrong = (bits(slow) != bits(quick)).nonzero().flatten()[:3]
            assert len(wrong) == 0, (kind, overflow, x[wrong], slow[wrong], quick[wrong])


@pytest.mark.parametrize("name", [n for n in FORMATS if format_named(n).mantissa_bits <= 3])
@pytest.mark.parametrize("rounding", list(Rounding), ids=str)
def test_fused_is_eager_at_every_value_and_tie(name, rounding):
    x = torch.from_numpy(oracles.around(oracles.values(format_named(name))))
    assert same(*both(x, format_named(name), rounding))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("rounding", SOME, ids=str)
def test_fused_is_eager_in_blocks(name, rounding):
    fmt = format_named(name)
    for kind, x in numbers(64 * 77).items():
        x = x.reshape(64, 77)
        for dim in (0, 1):
            assert same(*both(x, fmt, rounding, dim=dim)), kind
    mixed = numbers(64 * 77)["1"].reshape(64, 77) * torch.exp2(torch.arange(77) % 40)
    mixed[5, 6], mixed[::7, ::5], mixed[3], mixed[4, :40] = math.inf, math.nan, math.nan, 0.0
    for x in (mixed, mixed.T, mixed.reshape(4, 16, 7, 11).to(memory_format=torch.channels_last), mixed[0], mixed[0, 0]):
        assert same(*both(x, fmt, rounding, dim=min(1, max(x.ndim - 1, 0)) if x.ndim else -1))


@pytest.mark.parametrize("name", ["bfp2", "bfp8", "bfp24", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.UP, Rounding.STOCHASTIC, FewBits(4)], ids=str)
def test_fused_is_eager_in_a_block_that_threads_share(name, rounding):
    for scale in (1.0, 1e-37, 1e30):
        x = numbers(70_001)["1"] * scale
        assert same(*both(x, format_named(name), rounding))
        x[7], x[70_000], x[3] = -math.inf, math.nan, 0.0
        assert same(*both(x, format_named(name), rounding))
        x[70_000] = 1.0  # torch's conversions to bfloat16 give a NaN now these bits, now those
        assert same(*both(x.bfloat16(), format_named(name), rounding))


LAYOUTS = [(3, 3, 5, 7), (2, 16, 9, 9), (2, 300, 3, 3), (5, 1, 4, 4), (1, 257, 2, 2), (2, 64, 1, 1), (3, 10, 4, 4, 3)]


@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC, FewBits(4)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-7])  # the latter takes a second random word
def test_layouts(shape, rounding, scale):
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    for name in ("float8", "fixed8.4", "mxfp8_e4m3"):
        fmt = format_named(name)
        expected = both(x, fmt, rounding, dim=1)[0]
        moved = torch.empty_like(x, memory_format=last).copy_(x)
        for result in both(moved, fmt, rounding, dim=1):
            assert same(result, expected)
            assert result.is_contiguous(memory_format=last)


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC], ids=str)
def test_strided_numbers(rounding):
    x = torch.randn(300, 400, generator=torch.Generator().manual_seed(2))
    for view in (x.T, x[:, ::3], x[3:, 5:300], x[:1].expand(50, 400), x[7, 9], x[:0]):
        slow, quick = both(view, NAMED["float8"], rounding)
        assert same(slow, quick)
        assert same(slow, both(view.contiguous(), NAMED["float8"], rounding)[0])


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.STOCHASTIC, FewBits(4)], ids=str)
def test_many_threads(rounding):
    """Pieces that are taken in turn; and half precision, converted piece by piece."""
    x = torch.randn(700_001, generator=torch.Generator().manual_seed(3)) * 1e-3
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append([quantize(x, "float8", rounding, 3, backend=backend) for backend in ("fused", "eager")])
            results[-1].append(quantize(x.bfloat16(), "float8", rounding, 3, backend="fused").float())
            results[-1].append(quantize(x.bfloat16().float(), "float8", rounding, 3, backend="eager"))
    finally:
        torch.set_num_threads(threads)
    for quick, slow, half, half_slow in results:
        assert same(quick, slow)
        assert same(half, half_slow)
        assert same(quick, results[0][0])


@pytest.mark.parametrize("name", ["float8", "e2m0", "e8m3", "e2m23", "float32", "fixed8.4", "fixed3.5", *WIDE])
@pytest.mark.parametrize("rounding", SOME, ids=str)
@pytest.mark.parametrize("overflow", list(Overflow), ids=str)
def test_fused_is_eager_in_float64(name, rounding, overflow):
    fmt = format_named(name)
    if overflow is not Overflow.SATURATE and not fmt.has_infinity:
        fmt = replace(fmt, has_infinity=True)
    g = torch.Generator().manual_seed(9)
    x = torch.randint(-(2**63), 2**63 - 1, (N,), dtype=torch.int64, generator=g).view(torch.float64)
    for kind in (x, *(numbers()[k].double() * (1 + 2.0**-40) for k in ("1", "1e-07", "1e+08", "any"))):
        assert same(*both(kind, fmt, rounding, overflow))
    for view in (x[: 70 * 70].reshape(70, 70).T, x[::3], x[:0]):
        assert same(*both(view, fmt, rounding, overflow))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "fixed8.4", "mxfp8_e4m3", "bfp8", "e4m10"])
@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.UP, Rounding.STOCHASTIC], ids=str)
def test_other_types_are_rounded_once_from_the_value_they_hold(dtype, name, rounding):
    x = (torch.randn(40, 70, generator=torch.Generator().manual_seed(4)) * 3).to(dtype)
    x[0, :4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    if name == "e4m10" and dtype == torch.bfloat16:  # its largest value is none of bfloat16's
        with pytest.raises(TypeError, match="bfloat16"):
            quantize(x, name, rounding, 5)
        return
    slow, quick = (quantize(x, name, rounding, 5, backend=backend) for backend in ("eager", "fused"))
    assert same(slow, quick)
    assert slow.dtype == dtype
    if dtype != torch.float64 and name[:3] != "mxf" and name[:3] != "bfp":
        assert same(slow, quantize(x.float(), name, rounding, 5).to(dtype))


@pytest.mark.parametrize("name", [n for n in FORMATS if format_named(n).mantissa_bits <= 3])
@pytest.mark.parametrize("rounding", [r for r in Rounding if r is not Rounding.STOCHASTIC], ids=str)
def test_float64_is_rounded_once(name, rounding):
    """Next to a tie, by less than float32 can tell."""
    fmt = format_named(name)
    points = np.array(oracles.values(fmt)[:40])
    middles = (points[1:] + points[:-1]) / 2
    x = np.concatenate([middles, np.nextafter(middles, np.inf), np.nextafter(middles, 0.0), points * (1 + 2.0**-52)])
    x = np.concatenate([x, -x])
    parity = {"rounding": rounding, "fmt": fmt}
    if fmt.mantissa_bits == 0:
        x = x[~np.isin(np.abs(x), middles)]  # the oracle leaves ties of these formats to gfloat
    exact = [float(oracles.round_exactly(float(v), **parity)[0]) for v in x]
    expected = [max(fmt.lowest, min(fmt.largest, value)) for value in exact]
    ours = quantize(torch.from_numpy(x), fmt, rounding)
    assert ours.dtype == torch.float64
    assert ours.tolist() == expected


def test_float64_carries_float32s_noise():
    x = numbers()["1e-07"]
    for rounding in ROUNDINGS:
        assert torch.equal(quantize(x.double(), "float8", rounding, 5), quantize(x, "float8", rounding, 5).double())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("name", ["float8", "mxfp4", "fixed8.4"])
def test_in_place(rounding, scale, name):
    x = torch.randn(3, 40, 5, 5, generator=torch.Generator().manual_seed(5)) * scale
    for layout in (torch.contiguous_format, torch.channels_last):
        for backend in ("eager", "fused"):
            mine = x.to(memory_format=layout, copy=True)
            expected = quantize(x, name, rounding, 5, dim=1)
            assert quantize(mine, name, rounding, 5, dim=1, backend=backend, out=mine) is mine
            assert torch.equal(mine, expected)
    with pytest.raises(ValueError, match="out"):
        quantize(x, name, rounding, 5, out=torch.empty(3))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_into_a_tensor_of_another_layout(rounding, backend):
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(8))
    before, expected = x.clone(), quantize(x, "float8", rounding, 5)
    for out in (torch.empty(30, 40).T, torch.empty(40, 60)[:, ::2]):
        assert quantize(x, "float8", rounding, 5, backend=backend, out=out) is out
        assert torch.equal(out, expected)
        assert torch.equal(x, before)


@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_autograd_notices_what_is_rounded_in_place(backend):
    x = torch.randn(5, requires_grad=True)
    y = x.exp()
    loss = y.square().sum()
    quantize(y, "float8", backend=backend, out=y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("zeros", [8, 31, 32, 33, 34, 36, 40, 64, 70])
def test_values_so_small_that_two_words_do_not_decide(zeros):
    """The second word all zero, which chance does not give: at the index where it is, for several keys."""
    fmt, ups = NAMED["float8"], 0
    for value in range(60):
        key = Key(value)
        index = oracles.index_of_word(0, key.parts(0, 1))
        x = torch.full((1,), math.ldexp(2**24 - 1, -16 - 24 - zeros))
        slow = eager._round_block(
            x.view(torch.int32), eager._SINGLE, fmt, Rounding.STOCHASTIC, Overflow.SATURATE, key, index
        )
        stored, quick = fused._stored(fmt, Rounding.STOCHASTIC), torch.empty(1)
        fused._flat(stored, False, x, quick, key, index)
        assert same(slow, quick)
        ups += int(slow > 0)
    further = zeros - 32
    expected = 60 * 2.0**-further if further > 0 else 60
    assert abs(ups - expected) <= 5 * math.sqrt(expected) + 1


def test_threads_without_gnu_openmp(monkeypatch):
    monkeypatch.setattr(threads, "_gomp_parallel", None)
    test_many_threads(Rounding.STOCHASTIC)
    assert threads._pool is not None


def test_threads_survive_a_fork():
    code = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from low_precision.tensor import quantize
torch.set_num_threads(2)
x = torch.randn(600_000, generator=torch.Generator().manual_seed(0))
expected = quantize(x, "float8", "stochastic", 1, backend="fused")
child = os.fork()
same = torch.equal(quantize(x, "float8", "stochastic", 1, backend="fused"), expected)
if child == 0:
    os._exit(0 if same else 1)
assert same
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, timeout=120, env=environment)


def test_threads_of_python_may_round_at_once():
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(400_000, generator=torch.Generator().manual_seed(6))
    expected = [quantize(x, "float8", "stochastic", key, backend="eager") for key in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda key: quantize(x, "float8", "stochastic", key, backend="fused"), range(8)))
    assert all(same(a, b) for a, b in zip(expected, results, strict=True))


@pytest.mark.parametrize("rounding", [Rounding.STOCHASTIC, FewBits(4)], ids=str)
@pytest.mark.parametrize("name", ["float8", "mxfp8_e4m3", "nvfp4", "bfp8_row"])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_a_part_takes_the_words_of_the_whole(backend, name, rounding):
    """Rows from `first_row` on, as a process that has a part of the batch rounds them."""
    whole = torch.randn(12, 40, 6, 5, generator=torch.Generator().manual_seed(9)) * 1e-3
    if name == "nvfp4":  # whose scale follows the largest number of the tensor
        whole[:, 0, 0, 0] = 1.0
    for layout in (torch.contiguous_format, torch.channels_last):
        x = whole.to(memory_format=layout)
        expected = quantize(x, name, rounding, 7, dim=1)
        for rows in (slice(0, 5), slice(5, 12)):
            part = quantize(x[rows], name, rounding, Key(7, rows.start), dim=1, backend=backend)
            assert torch.equal(part, expected[rows])
    if name == "float8":
        x = whole.double()
        part = quantize(x[5:], name, rounding, Key(7, 5), backend=backend)
        assert torch.equal(part, quantize(x, name, rounding, 7)[5:])


@pytest.mark.parametrize("name", ["float8", "nvfp4"])
def test_a_part_across_2_to_the_32(name):
    """Where the words begin anew with another key."""
    x = torch.randn(2, 3 * 2**16, generator=torch.Generator().manual_seed(10)) * 1e-6
    for first_row in (2**32 // (3 * 2**16), 2**16, 2**20):
        key = Key(7, first_row)
        slow, quick = (quantize(x, name, "stochastic", key, backend=backend) for backend in ("eager", "fused"))
        assert same(slow, quick)
    halves = [quantize(x[row], name, "stochastic", Key(7), backend="fused") for row in (0, 1)]
    assert not torch.equal(halves[0], quantize(x, name, "stochastic", Key(7, 2**16))[0])


def test_float32_leaves_every_bit_alone():
    x = numbers()["any"]
    for backend in ("eager", "fused"):
        assert same(quantize(x, FLOAT32, "nearest", backend=backend), x)


def test_a_task_is_what_a_kernel_reads():
    """Each field by its name, in whatever order they were named, and no name that is no field."""
    names = tasks.field_names(tasks.ImagesTask)
    task = tasks.ImagesTask(**{name: 10 + place for place, name in enumerate(reversed(names))})
    fields = numba.njit(lambda address: loops._images_task(address))(ctypes.addressof(task))
    assert fields._fields == names
    assert fields == tuple(getattr(task, name) for name in names)
    assert (fields.source, fields.offsets) == (task.source, task.offsets) == (9 + len(names), 10)
    with pytest.raises(AttributeError):
        tasks.Task(sources=1)


@pytest.mark.slow
def test_machine_code_is_made_again_when_a_file_that_it_comes_from_changes(tmp_path):
    """numba itself looks only at the file of the kernel, scaled.py here; what is changed stands in group.py."""
    shutil.copytree(ROOT / "low_precision", tmp_path / "low_precision", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import torch
from low_precision.engines import scaled, scaled_lines
print(float(scaled_lines.maxima(torch.ones(1, 300), 1, 300, 9.0)), scaled.maxima(False, False).cache_hits)
"""

    def largest() -> list[str]:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.split()

    assert largest() == ["1.0", "0"]
    assert largest() == ["1.0", "1"]  # from the cache
    group = tmp_path / "low_precision/engines/group.py"
    before = group.read_text()
    group.write_text(before.replace("largest = max(largest, ", "largest = min(largest, "))
    assert group.read_text() != before
    assert largest() == ["0.0", "0"]


def test_kernels_are_made_of_files_whose_change_is_noticed():
    """operations.kernel looks at the files in engines/ and at noise.py: those may be imported where kernels are."""
    for name in ("operations", "number", "group", "loops", "loops64", "lanes", "tasks"):
        source = (ROOT / "low_precision/engines" / f"{name}.py").read_text()
        modules = re.findall(r"^(?:from|import) (low_precision\S*)(?: import (\w+))?", source, re.MULTILINE)
        for module, member in modules:
            assert module.startswith("low_precision.engines.") or f"{module}.{member}".startswith("low_precision.noise")


def test_qtorchs_formats_and_ours():
    """There and back; and an exponent of 8 bits, whose largest number is none of float32's, is refused."""
    qtorch = pytest.importorskip("qtorch")
    from low_precision.engines.qtorch import from_qtorch, to_qtorch

    for man in range(1, 24):
        for exp in range(1, 8):
            format = from_qtorch(qtorch.FloatingPoint(exp=exp, man=man))
            assert format.largest == 2.0 ** (2 ** (exp - 1)) * (2 - 2.0**-man)
            assert (to_qtorch(format).exp, to_qtorch(format).man) == (exp, man)
            assert same(*both(numbers()["any"][:600], format, Rounding.NEAREST))
        with pytest.raises(ValueError, match=r"^given FloatingPoint .*, allowed: at most 7 bits of exponent"):
            from_qtorch(qtorch.FloatingPoint(exp=8, man=man))
