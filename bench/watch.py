"""What watching costs: python bench/watch.py [--rounds 9] [--models resnet20,encoder] [--every 50]

For each model of bench/step.py and some of its settings: steps that nobody watches, steps of a watched model between
the watched ones, and watched steps, one after the other in each round. Printed are medians of ms a step, and what
`--watch N` costs over a run, from these: (N - 1 steps between and a watched one) over N steps that nobody watches. Of
one thread on the CPU it is the process's own time, which other processes do not lengthen as much.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.step import SETTINGS, training
from low_precision.watcher import Watcher, watch
from low_precision.wrap import quantize_model, quantize_optimizer

NAMES = ("float8 nearest", "products mxfp8_e4m3", "recipe nvfp4")


class Training:
    """One model, its optimizer, and who watches it."""

    def __init__(self, name: str, setting: str, every: int, also: tuple[str, ...], backend: str) -> None:
        """every: 0: nobody watches."""
        self.model, self.x, self.y = training(name)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        rules = SETTINGS[setting]
        if isinstance(rules, str):
            quantize_model(self.model, recipe=rules, seed=1, backend=backend)
            quantize_optimizer(self.optimizer, self.model)
        else:
            sites = dict(rules or {})
            of_optimizer = {site: sites.pop(site) for site in ("gradients", "momentum") if site in sites}
            quantize_model(self.model, seed=1, backend=backend, **sites)
            quantize_optimizer(self.optimizer, self.model, **of_optimizer)
        self.watcher: Watcher | None = watch(self.model, every, also) if every else None

    def step(self) -> None:
        output = self.model(self.x).flatten(0, -2)
        loss = F.mse_loss(output, self.y) if self.y.is_floating_point() else F.cross_entropy(output, self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def milliseconds(self, watched: bool = False) -> float:
        """Of one step. watched: as one that is watched."""
        if self.watcher:
            self.watcher.begin(1 if watched else 2)
        clock = time.process_time if torch.get_num_threads() == 1 and self.x.is_cpu else time.perf_counter
        start = clock()
        self.step()
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return (clock() - start) * 1e3


def measured(make: Callable[[int], Training], rounds: int, every: int) -> tuple[float, float, float, float]:
    """Medians of a step that nobody watches, one between watched ones, and a watched one; the cost in percent."""
    plain, watched = make(0), make(10**9)
    for one in (plain, watched):
        one.step(), one.milliseconds(watched=one.watcher is not None)
    times = [(plain.milliseconds(), watched.milliseconds(), watched.milliseconds(watched=True)) for _ in range(rounds)]
    off, between, seen = (statistics.median(column) for column in zip(*times, strict=True))
    return off, between, seen, 100 * ((every - 1) * between + seen - every * off) / (every * off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", default="resnet20,encoder")
    parser.add_argument("--settings", default=",".join(NAMES))
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--also", default="")
    parser.add_argument("--backend", default="fused")
    asked = parser.parse_args()
    also = tuple(filter(None, asked.also.split(",")))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {asked.backend}, n = {asked.rounds} rounds")
    print(f"{'':34} {'ms off':>9} {'between':>9} {'watched':>9} {f'--watch {asked.every} costs':>18}")
    for name in asked.models.split(","):
        for setting in asked.settings.split(","):

            def make(every: int, name: str = name, setting: str = setting) -> Training:
                return Training(name, setting, every, also, asked.backend)

            off, between, seen, cost = measured(make, asked.rounds, asked.every)
            print(f"{name:12} {setting:21} {off:9.1f} {between:9.1f} {seen:9.1f} {cost:16.1f} %")


if __name__ == "__main__":
    main()
