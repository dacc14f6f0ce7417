"""CUDA beside the CPU: python bench/on_gpu.py [--rounds 10] [--parts bits,watch,speed]

bits: numbers of all sizes, NaNs, infinities and subnormal ones are rounded on both, to formats of each kind, in every
rounding, and the bits are compared. watch: a watched model whose numbers are so short that every sum is exact gives the
same rows on both; and there and in a transformer, neither a watched step nor one between may wait for the GPU, or torch
raises (torch.cuda.set_sync_debug_mode). speed: the throughput of quantize() on the GPU: medians of G elements/s, of
8192 x 8192 float32 numbers, by CUDA's events. Exit status 1 where a bit or a row differs, or a step waits.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from low_precision.errors import SettingError
from low_precision.formats import format_named
from low_precision.tensor import quantize
from low_precision.watcher import Watcher, watch
from low_precision.wrap import quantize_model, quantize_optimizer

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


# Scales that are powers of two keep the numbers short.
WATCHED = (
    {"weights": "float8_e4m3fn", "inputs": "float8", "activations": "bfloat16", "errors": "float8:stochastic"},
    {"products": "mxfp4:stochastic", "weights": "float8", "accumulator": "float16"},
    {"products": "float8_e4m3fn@8x8@e8m0", "weights": "float8", "compensation": "float8", "elementwise": "float8"},
    {
        "products": "float8_e4m3fn@tensor@pow2",
        "weights": "int8@row@pow2",
        "activations": "bfloat16",
        "errors": "int8@row@pow2",
    },
)
RECIPES = ("nvfp4", "quartet", "te-delayed", "deepseek", "unit-scaling")
ALSO = ("mxfp4", "float8:stochastic")


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
        self.rnn, self.head = nn.LSTM(64, 32, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.layers(x))[0])


def watched(
    device: str, of_run: tuple[nn.Module, Tensor, Tensor], also: tuple[str, ...], **rules: object
) -> tuple[Watcher, int]:
    """The watcher of a training of 4 steps, 1, 2 and 4 watched; and whether step 3 or 4 waited for the device.

    of_run: model, inputs, and the gradient with respect to what the model gives.
    """
    model, x, error = (part.to(device) for part in of_run)
    quantize_model(model, seed=1, **rules)
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), lr=2.0**-10), model)
    watcher, waits = watch(model, 2, also), 0
    for step in range(1, 5):
        # The first steps load kernels and make tables.
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" and step > 2 else "default")
        try:
            model(x).backward(error)
            optimizer.step()
        except RuntimeError as problem:
            if "synchroniz" not in str(problem):
                raise
            print(f"step {step} waits for the GPU, with {rules}")
            traceback.print_exc()
            waits = 1
            break
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
    return watcher, waits


def short_numbers() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, inputs and errors of so few digits that no sum of products rounds, in whatever order it is added."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-8, 9, p.shape, generator=generator) / 8)
    x, error = (torch.randint(-8, 9, shape, generator=generator).float() for shape in ((16, 32), (16, 8)))
    return model, x, error


def unequal(row: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The fields in which two rows differ: counts and maxima at all, sums of float64 numbers beyond their rounding."""
    names = {*row, *other}

    def same(a: object, b: object) -> bool:
        return math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b

    return sorted(name for name in names if not same(row.get(name), other.get(name)))


def watching() -> int:
    """How many of the watched runs differ from the CPU's, or wait."""
    wrong = 0
    for rules in WATCHED:
        rows = []
        for device in ("cpu", "cuda"):
            watcher, waits = watched(device, short_numbers(), ALSO, **rules)
            rows.append(watcher.rows())
        differing = [(row, names) for row, other in zip(*rows, strict=False) if (names := unequal(row, other))]
        print(f"watched, {rules}: {len(rows[0])} rows, {len(rows[1])} on the GPU, {len(differing)} differ")
        for row, names in differing[:3]:
            print(f"  step {row['step']} {row['layer']} {row['site']} {row.get('also', '')}: {', '.join(names)}")
        wrong += bool(differing) or len(rows[0]) != len(rows[1]) or waits
    for recipe in RECIPES:
        torch.manual_seed(0)
        model, x, error = Transformer(), torch.randn(4, 16, 64), torch.randn(4, 16, 32)
        watcher, waits = watched("cuda", (model, x, error), (*ALSO, f"recipe:{recipe}"), recipe=recipe)
        print(f"watched, recipe {recipe}: {len(watcher.rows())} rows, {'waits' if waits else 'nothing waits'}")
        wrong += waits
    return wrong


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
    parser.add_argument("--parts", default="bits,watch,speed")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU that torch can use")
    parts, wrong = asked.parts.split(","), 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, n = {asked.rounds} rounds, medians")
    if "bits" in parts:
        count, wrong = differing()
        print(f"{count} cases, {wrong} with a differing bit")
    if "watch" in parts:
        wrong += watching()
    if "speed" in parts:
        speeds(asked.rounds)
    sys.exit(wrong > 0)


def speeds(rounds: int) -> None:
    x = torch.randn(8192, 8192, device="cuda")
    print(f"{'clone':32} {x.numel() / milliseconds(x.clone, rounds) / 1e6:8.1f} G elements/s")
    for name, rounding in itertools.product(TIMED, ("nearest", "stochastic")):
        time = milliseconds(lambda name=name, rounding=rounding: quantize(x, name, rounding, 5), rounds)
        print(f"{f'{name} {rounding}':32} {x.numel() / time / 1e6:8.1f}")


if __name__ == "__main__":
    main()
