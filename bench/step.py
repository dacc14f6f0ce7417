"""What rounding costs in a training step: python bench/step.py [--rounds 10] [--models linear,cnn,resnet20]

For each model, steps in float32 (the same plain PyTorch loop, without any of this project's hooks, and with train.py's
layout), then all that train.py does in a float32 step (images cropped and flipped from bytes, metrics), then steps with
every site rounded, take turns; printed are medians of ms a step, quartiles, the ratio to float32 in
the same round, and the most memory that a process of its own with such steps had (read from Linux's /proc). Random data
of the model's usual shape: linear 512 x 13, cnn 256 x 1 x 8 x 8, resnet20 128 x 3 x 32 x 32 (channels_last).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import models
from lab.metrics import TASKS, TrainMetrics
from lab.optimizers import lean
from low_precision.model import LowPrecision
from low_precision.rounding import Rounding
from low_precision.rules import ALL_SITES, rule_of
from low_precision.scheme import Scheme

SHAPES = {"linear": (512, (13,), 1), "cnn": (256, (1, 8, 8), 10), "resnet20": (128, (3, 32, 32), 10)}
WIDE = rule_of("float16:stochastic")
WHOLE = "float32, all of it"
SETTINGS = {
    "float32": None,
    WHOLE: {},
    "float8 nearest": dict.fromkeys(ALL_SITES, rule_of("float8", Rounding.NEAREST)),
    "float8 stochastic": dict.fromkeys(ALL_SITES, rule_of("float8", Rounding.STOCHASTIC)),
    "qtorch-tutorial": dict.fromkeys(ALL_SITES, rule_of("float8")) | {"momentum": WIDE, "accumulator": WIDE},
    "mxfp8_e4m3 nearest": dict.fromkeys(ALL_SITES, rule_of("mxfp8_e4m3")),
}


def stepper(name: str, rules: dict | None, backend: str) -> Callable[[], None]:
    """A function that does one training step."""
    rows, shape, outputs = SHAPES[name]
    model = models.build(name, shape, outputs, 1)
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(2))
    y = torch.randn(rows, 1) if outputs == 1 else torch.randint(0, outputs, (rows,))
    if len(shape) == 3:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if rules is not None:
        LowPrecision(model, Scheme(rules, seed=1, backend=backend)).attach(optimizer)
    loss_of = F.mse_loss if outputs == 1 else F.cross_entropy

    def step() -> None:
        loss = loss_of(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def whole_stepper(name: str) -> Callable[[], None]:
    """A function that does what train.py does between two rows of numbers and the next: data and metrics too."""
    rows, shape, outputs = SHAPES[name]
    model = models.build(name, shape, outputs, 1)
    task = TASKS["regression" if outputs == 1 else "classification"]
    if len(shape) == 3:
        images = torch.randint(0, 256, (50 * rows, *shape), dtype=torch.uint8)
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, images))
        scale = torch.full((1, shape[0], 1, 1), 120.0), torch.full((1, shape[0], 1, 1), 60.0)
    else:
        x, scale = torch.randn(50 * rows, *shape), None
    y = torch.randn(len(x), 1) if outputs == 1 else torch.randint(0, outputs, (len(x),))
    split = data.Data(x, y, x, y, image_scale=scale)
    low = LowPrecision(model, Scheme({}))
    optimizer = low.attach(lean(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9))
    metrics, noise = TrainMetrics(task), torch.Generator().manual_seed(3)

    def step() -> None:
        batch = torch.randint(0, len(x), (rows,))
        features, truth = split.features(split.train_x[batch], noise), split.train_y[batch]
        output = model(features)
        loss = task.loss(output, truth)
        metrics.add(loss.detach(), task.correct(output, truth), rows)
        assert loss.isfinite()
        optimizer.zero_grad()
        low.scale(loss).backward()
        optimizer.step()

    return step


def memory(name: str, setting: str, backend: str) -> float:
    """MB that a process with some steps took at most."""
    command = [sys.executable, __file__, "--models", name, "--memory-of", setting, "--backend", backend]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def stepper_of(name: str, setting: str, backend: str) -> Callable[[], None]:
    return whole_stepper(name) if setting == WHOLE else stepper(name, SETTINGS[setting], backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--backend", default="fused")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.memory_of:
        step = stepper_of(asked.models, asked.memory_of, asked.backend)
        for _ in range(4):
            step()
        (peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
        print(int(peak) / 1024)  # getrusage would count what the parent had before it started this
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {asked.backend}, n = {asked.rounds} rounds")
    for name in asked.models.split(","):
        steps = {setting: stepper_of(name, setting, asked.backend) for setting in SETTINGS}
        calls = 1 if name == "resnet20" else 50
        for step in steps.values():
            for _ in range(2):  # what is loaded and compiled once
                step()
        times = {setting: [] for setting in steps}
        for _ in range(asked.rounds):
            for setting, step in steps.items():
                start = time.perf_counter()
                for _ in range(calls):
                    step()
                times[setting].append((time.perf_counter() - start) / calls * 1e3)
        print(f"\n{name}, batch {SHAPES[name][0]}")
        print(f"  {'':20} {'ms a step':>10} {'quartiles':>19} {'x float32':>10} {'MB':>7}")
        for setting, found in times.items():
            low, middle, high = statistics.quantiles(found, n=4)
            ratio = statistics.median(t / f for t, f in zip(found, times["float32"], strict=True))
            most = memory(name, setting, asked.backend)
            print(f"  {setting:20} {middle:10.2f} {low:9.2f} {high:9.2f} {ratio:10.2f} {most:7.0f}")


if __name__ == "__main__":
    main()
