"""CUDA beside the CPU: python bench/on_gpu.py [--rounds 10]

First, numbers of all sizes, NaNs, infinities and subnormal ones are rounded on both, to formats of each kind, in every
rounding, and the bits are compared. Then the throughput of quantize() on the GPU: medians of G elements/s, of 8192 x
8192 float32 numbers, by CUDA's events. Exit status 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from low_precision.errors import SettingError
from low_precision.formats import format_named
from low_precision.tensor import quantize

ROUNDINGS = ("nearest", "nearest_away", "toward_zero", "up", "down", "to_odd", "stochastic", "stochastic:8:half")
PLAIN = ("float8", "fp16", "bfloat16", "float8_e4m3fn", "float4_e2m1fn", "e3m0", "e8m3", "fixed8.4", "int8")
PLAIN += ("binary8p3se", "binary8p3ue", "binary16p8se", "nf4", "posit8_table")
ELEMENTS = ("float8_e4m3fn", "float4_e2m1fn", "int8", "dynamic8")
GROUPS = ("tensor", "row", "column", "16", "7", "16x16", "flat64")
SCALES = ("float32", "pow2", "e8m0", "e8m0_rceil", "e8m0_even", "headroom", "quest", "float8_e4m3fn", "expand")
TIMED = ("float8", "nf4", "mxfp8_e4m3", "mxfp4", "float8_e4m3fn@tensor", "float8_e4m3fn@row", "float8_e4m3fn@128x128")
TIMED += ("nvfp4", "float4_e2m1fn@32@quest", "dynamic8@flat256")


def hard(*shape: int) -> Tensor:
    """Normal numbers times powers of two of all sizes, a power for each 8 of a line, and special values."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(-40, 40, (*shape[:-1], -(-shape[-1] // 8)), generator=generator)
    x = torch.randn(shape, generator=generator) * torch.exp2(powers.float()).repeat_interleave(8, -1)[..., : shape[-1]]
    special = torch.tensor([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-42, -1e-45, 3.4028234e38])
    x.view(-1)[torch.randperm(x.numel(), generator=generator)[: len(special)]] = special
    return x


def cases() -> Iterator[tuple[Tensor, str, dict[str, object]]]:
    """A tensor, a format and further arguments of quantize."""
    plain, images, grouped = hard(129, 1023), hard(4, 8, 9, 7).to(memory_format=torch.channels_last), hard(130, 200)
    for name in PLAIN:
        for overflow in ("saturate", "infinity", "propagate") if format_named(name).has_infinity else ("saturate",):
            yield plain, name, {"overflow": overflow}
        yield images, name, {}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield plain.to(dtype), "float8_e4m3fn", {}
        yield plain.to(dtype), "mxfp8_e4m3", {}
    for parts in itertools.product(ELEMENTS, GROUPS, SCALES):
        try:
            name = format_named("@".join(parts)).name
        except SettingError:  # these do not go together
            continue
        for dim in (0, 1):
            yield grouped, name, {"dim": dim}


def differing() -> tuple[int, int]:
    """How many cases there are, and in how many a bit differs, each of which is printed."""
    count = wrong = 0
    for (x, name, more), rounding in itertools.product(cases(), ROUNDINGS):
        slow = quantize(x, name, rounding, 5, backend="eager", **more)
        quick = quantize(x.cuda(), name, rounding, 5, **more).cpu()
        whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
        places = (slow.view(whole) != quick.view(whole)).nonzero()
        count, wrong = count + 1, wrong + bool(len(places))
        if len(places):
            place = tuple(places[0].tolist())
            print(f"{name}:{rounding} {x.dtype} {more}: {len(places)}, {x[place]} -> {slow[place]}, {quick[place]}")
    return count, wrong


def milliseconds(method: Callable[[], object], rounds: int) -> float:
    """The median of `rounds` calls, after three that warm up."""
    times = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        method()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU that torch can use")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, n = {asked.rounds} rounds, medians")
    count, wrong = differing()
    print(f"{count} cases, {wrong} with a differing bit")
    x = torch.randn(8192, 8192, device="cuda")
    print(f"{'clone':32} {x.numel() / milliseconds(x.clone, asked.rounds) / 1e6:8.1f} G elements/s")
    for name, rounding in itertools.product(TIMED, ("nearest", "stochastic")):
        time = milliseconds(lambda name=name, rounding=rounding: quantize(x, name, rounding, 5), asked.rounds)
        print(f"{f'{name} {rounding}':32} {x.numel() / time / 1e6:8.1f}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
