"""Comparisons too long for the tests: python bench/exhaustive.py [all] [random] [probability] [--numbers 1e9]

all          each of the 2**32 float32 numbers, to nearest, in float8, float16, float8_e4m3fn and bfloat16: the fused
             engine against eager, and against ml_dtypes in the formats that it has (overflow aside)
random       random bit patterns and normal numbers in many formats, in every rounding: fused against eager
probability  stochastic rounding in every format of at most 8 bits: at 16 points in each gap, n = 10**6 each, how often
             the upper neighbour comes; with Bonferroni's bound for so many points

Prints a line for each, with the count of differences, and ends with 1 if there was any.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import oracles

from low_precision.formats import BLOCKS, NAMED
from low_precision.rounding import FewBits, Rounding, is_random
from low_precision.tensor import quantize

WHOLE = ("float8", "float16", "float8_e4m3fn", "bfloat16")
OTHERS = (*NAMED, "e2m0", "e3m0", "e8m0", "e8m3", "e4m10", "e8m22", "fixed8.4", "fixed16.12s", *BLOCKS, "bfp8_row")
ROUNDINGS = (*Rounding, FewBits(4), FewBits(8, True))
PIECE = 2**24


def differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """Bits count, so -0 is not 0; a NaN is a NaN."""
    unlike = (a.view(torch.int32) != b.view(torch.int32)) & ~(a.isnan() & b.isnan())
    return int(unlike.sum())


def whole(name: str) -> int:
    found, against, compared = 0, 0, 0
    fmt, dtype = NAMED[name], getattr(ml_dtypes, name, None)
    for start in range(0, 2**32, PIECE):
        x = torch.arange(start, start + PIECE, dtype=torch.int64).to(torch.int32).view(torch.float32)
        quick = quantize(x, name, backend="fused")
        found += differing(quick, quantize(x, name, backend="eager"))
        if dtype:
            inside = x.abs() <= fmt.largest
            theirs = torch.from_numpy(x.numpy().astype(dtype).astype(np.float32))
            against += int((inside & (quick.view(torch.int32) != theirs.view(torch.int32))).sum())
            compared += int(inside.sum())
    line = f"{name}: 2**32 numbers, fused and eager differ in {found}"
    print(line + (f"; ml_dtypes differs in {against} of {compared} in range" if dtype else ""), flush=True)
    return found + against


def random(name: str, numbers: int) -> int:
    found = 0
    generator = torch.Generator().manual_seed(1)
    for rounding in ROUNDINGS:
        for number, start in enumerate(range(0, numbers, PIECE)):
            shape = (min(PIECE, numbers - start) // 64, 64)
            if number % 2:
                x = torch.randn(shape, generator=generator) * 2.0 ** (8 * (number % 11) - 40)
            else:
                x = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator).view(torch.float32)
            key = number if is_random(rounding) else None
            found += differing(*(quantize(x, name, rounding, key, backend=engine) for engine in ("fused", "eager")))
    print(f"{name}: {len(ROUNDINGS)} roundings x {numbers:,} numbers, differing: {found}", flush=True)
    return found


def probability(name: str) -> int:
    fmt, n, points = NAMED[name], 10**6, 16
    values = oracles.values(fmt)
    worst, outside, count = 0.0, 0, 0
    bound = statistics.NormalDist().inv_cdf(1 - 1e-6 / 2 / (points * len(values)))  # for all of them: 1 in 10**6
    for gap, (low, high) in enumerate(itertools.pairwise(values)):
        for point in range(points):
            x = float(np.float32(low + (high - low) * (point + 0.5) / points))
            p = (x - low) / (high - low)
            key = gap * points + point
            ups = int((quantize(torch.full((n,), x), fmt, "stochastic", key, backend="fused") == high).sum())
            z = (ups - n * p) / math.sqrt(n * p * (1 - p))
            worst, outside, count = max(worst, abs(z)), outside + (abs(z) > bound), count + 1
    print(f"{name}: {count} points, n = {n:,}: largest deviation {worst:.2f}, {outside} beyond {bound:.2f}", flush=True)
    return outside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["all", "random", "probability"])
    parser.add_argument("--numbers", type=float, default=1e9, help="of `random`, for each format and rounding")
    asked = parser.parse_args()
    works = {
        "all": [(whole, name) for name in WHOLE],
        "random": [(random, name, int(asked.numbers)) for name in OTHERS if name != "float32"],
        "probability": [(probability, n) for n, f in NAMED.items() if f.exponent_bits + f.mantissa_bits < 8],
    }
    wrong = 0
    for what in asked.what:
        for work, *arguments in works[what]:
            start = time.perf_counter()
            wrong += work(*arguments)
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
