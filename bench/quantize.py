"""Throughput of quantize() beside a plain copy and other tools: python bench/quantize.py [--rounds 15]

All methods take turns in each round, so that what else the machine does hits all of them; printed are the median of M
elements/s over the rounds, its quartiles, and the median of the ratio to `clone` in the same round. float32 in, float32
out. Compared where they are installed: qtorch, torch's casts and ml_dtypes, for formats that they have.

glibc gives large tensors back to the system at once, and fresh pages cost more than rounding: run it with
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 to measure engines, without to see what you get.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from low_precision.formats import format_named
from low_precision.tensor import quantize

# One of each kind: what numbers are, and how they find the scale that they share.
KINDS = (
    *("float8", "float8_e4m3fn", "bfloat16", "fixed8.4", "int8", "binary8p3se", "binary8p4ue", "nf4", "posit8_table"),
    *("mxfp8_e4m3", "mxfp4", "mxint8", "bfp8", "bfp8_row", "bfp8_column", "float8_e4m3fn@32@e8m0_rceil"),
    *("float8_e4m3fn@tensor", "float8_e4m3fn@row", "float8_e4m3fn@row@pow2", "float8_e4m3fn@128"),
    *("float8_e4m3fn@128x128", "int8@32x32", "float8_e4m3fn@flat256", "nvfp4", "float4_e2m1fn@16x16@float8_e4m3fn"),
    *("float4_e2m1fn@32@headroom", "float4_e2m1fn@32@quest", "dynamic8@flat256", "float8_e4m3fn@flat128@expand"),
)
SIZES = (10_000_000, 100_000, 1_000)
SECONDS = 0.1  # of one method in one round, at least


def peers(x: torch.Tensor, name: str, rounding: str) -> dict[str, Callable[[], object]]:
    """What else rounds `x` so, by name."""
    fmt, found = format_named(name), {}
    dtypes = {"fp16": torch.float16, "bfloat16": torch.bfloat16}
    dtype = dtypes.get(name, getattr(torch, name, None) if name.startswith("float8_") else None)
    if rounding == "nearest" and dtype:
        found["torch cast"] = lambda: x.to(dtype).float()
    with contextlib.suppress(ImportError, AttributeError):
        import ml_dtypes

        other = getattr(ml_dtypes, name)
        if rounding == "nearest":
            import numpy as np

            found["ml_dtypes"] = lambda: x.numpy().astype(other).astype(np.float32)
    with contextlib.suppress(ImportError, ValueError):
        from low_precision.engines.qtorch import to_qtorch

        to_qtorch(fmt)
        quantize(x[:1], fmt, rounding, 7, backend="qtorch")  # compiles
        found["qtorch"] = lambda: quantize(x, fmt, rounding, 7, backend="qtorch")
    return found


def measure(methods: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each, in each round."""
    calls = {}
    for name, method in methods.items():
        method()  # what is loaded and compiled once
        start = time.perf_counter()
        method()
        calls[name] = max(1, int(SECONDS / max(time.perf_counter() - start, 1e-7)))
    times = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                method()
            times[name].append((time.perf_counter() - start) / calls[name])
    return times


def table(title: str, times: dict[str, list[float]], n: int) -> None:
    print(f"\n{title}")
    print(f"  {'':48} {'M elements/s':>12} {'quartiles':>17} {'us a call':>10} {'of clone':>9}")
    for name, found in times.items():
        low, middle, high = (n / seconds / 1e6 for seconds in statistics.quantiles(found, n=4)[::-1])
        ratio = statistics.median(c / t for c, t in zip(times["clone"], found, strict=True))
        print(f"  {name:48} {middle:12.0f} {low:8.0f} {high:8.0f} {statistics.median(found) * 1e6:10.1f} {ratio:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--format", default="float8")
    parser.add_argument("--others", default="", help="comma-separated formats to compare, or all: one of each kind")
    parser.add_argument("--threads", default="", help="comma-separated; default: 1 and all")
    parser.add_argument("--no-peers", action="store_true", help="only clone and our engines")
    given = parser.parse_args()
    threads = [int(t) for t in given.threads.split(",")] if given.threads else sorted({1, torch.get_num_threads()})
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, n = {given.rounds} rounds, medians"
    )
    for count in threads:
        torch.set_num_threads(count)
        for n in SIZES:
            x = torch.randn(n, generator=torch.Generator().manual_seed(0))
            for rounding in ("nearest", "stochastic"):
                methods = {"clone": x.clone}
                for backend in ("fused", "eager"):
                    methods[backend] = lambda b=backend, x=x, r=rounding: quantize(x, given.format, r, 7, backend=b)
                if not given.no_peers:
                    methods |= peers(x, given.format, rounding)
                times = measure(methods, given.rounds)
                table(f"{given.format}, {rounding}, {n:,} elements, {count} threads", times, n)
        if given.others:
            x = torch.randn(SIZES[0] // 1024, 1024, generator=torch.Generator().manual_seed(0))
            methods = {"clone": x.clone}
            for name in KINDS if given.others == "all" else given.others.split(","):
                for rounding in ("nearest", "stochastic"):
                    label = f"{name} {rounding}"
                    methods[label] = lambda f=name, x=x, r=rounding: quantize(x, f, r, 7, backend="fused")
            table(
                f"other formats, fused, {x.numel():,} elements, {count} threads",
                measure(methods, given.rounds),
                x.numel(),
            )


if __name__ == "__main__":
    main()
