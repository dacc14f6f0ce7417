"""What rounding costs in a training step: python bench/step.py [--rounds 10] [--models linear,cnn,encoder]

For each model, steps in float32 (the same plain PyTorch loop, without any of this project's hooks, and with train.py's
layout), then all that train.py does in a float32 step (images cropped and flipped from bytes, metrics), then steps with
every site rounded, with the operands of all products, and with three recipes, take turns; printed are medians of ms a
step, quartiles, the ratio to float32 in the same round, and the most memory that a process of its own with such steps
had (read from Linux's /proc). Random data of the model's usual shape: linear 512 x 13, cnn 256 x 1 x 8 x 8, resnet20
128 x 3 x 32 x 32 (channels_last), transformer 16 x 64 tokens (4 layers of width 128, 4 heads, causal), encoder the
same of torch's own nn.TransformerEncoderLayer (without a mask).
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
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import models
from lab.lean import lean
from lab.metrics import TASKS, TrainMetrics
from low_precision.model import LowPrecision
from low_precision.rounding import Rounding
from low_precision.rules import ALL_SITES, OPERANDS, rule_of
from low_precision.scheme import Scheme
from low_precision.wrap import quantize_model, quantize_optimizer

SHAPES = {"linear": (512, (13,), 1), "cnn": (256, (1, 8, 8), 10), "resnet20": (128, (3, 32, 32), 10)}
TOKENS, WIDTH, SYMBOLS = (16, 64), 128, 64  # of the two transformers
TRANSFORMERS = ("transformer", "encoder")
WIDE = rule_of("float16:stochastic")
WHOLE = "float32, all of it"
SETTINGS = {
    "float32": None,
    WHOLE: {},
    "float8 nearest": dict.fromkeys(ALL_SITES, rule_of("float8", Rounding.NEAREST)),
    "float8 stochastic": dict.fromkeys(ALL_SITES, rule_of("float8", Rounding.STOCHASTIC)),
    "qtorch-tutorial": dict.fromkeys(ALL_SITES, rule_of("float8")) | {"momentum": WIDE, "accumulator": WIDE},
    "mxfp8_e4m3 nearest": dict.fromkeys(ALL_SITES, rule_of("mxfp8_e4m3")),
    "products float8": dict.fromkeys(OPERANDS, rule_of("float8")),
    "products mxfp8_e4m3": dict.fromkeys(OPERANDS, rule_of("mxfp8_e4m3")),
    "products mxfp8_e4m3 stochastic": dict.fromkeys(OPERANDS, rule_of("mxfp8_e4m3:stochastic")),
    **{f"recipe {recipe}": recipe for recipe in ("te-current", "mxfp8", "nvfp4")},
}


class Block(nn.Module):
    """One layer of the transformer, pre-norm: tokens (samples, tokens, width) -> the same."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.read, self.write = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        read = self.read(self.before_attention(x)).view(samples, tokens, 3, self.heads, -1)
        q, k, v = read.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.write(seen.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.before_mlp(x))


def transformer() -> nn.Module:
    torch.manual_seed(1)
    blocks = [Block() for _ in range(4)]
    return nn.Sequential(nn.Embedding(SYMBOLS, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS))


class Encoder(nn.Module):
    """Four of torch's transformer layers, pre-norm, 4 heads: (samples, tokens) -> (samples, tokens, symbols)."""

    def __init__(self, symbols: int = SYMBOLS, tokens: int = TOKENS[1]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, WIDTH))
        settings = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, **settings) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embedding(x) + self.position)))


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return Encoder()


def stepper(name: str, rules: dict | str | None, backend: str) -> Callable[[], None]:
    """A function that does one training step. rules: by site, or a recipe's name; None: no hooks at all."""
    model, x, y = training(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if isinstance(rules, str):
        quantize_optimizer(optimizer, quantize_model(model, recipe=rules, seed=1, backend=backend))
    elif rules is not None:
        LowPrecision(model, Scheme(rules, seed=1, backend=backend)).attach(optimizer)
    loss_of = F.cross_entropy if y.dtype == torch.int64 else F.mse_loss

    def step() -> None:
        loss = loss_of(model(x).flatten(0, -2), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def training(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, a batch that it reads, and what it should give."""
    if name in TRANSFORMERS:
        tokens = torch.randint(SYMBOLS, TOKENS, generator=torch.Generator().manual_seed(2))
        return {"transformer": transformer, "encoder": encoder}[name](), tokens, tokens.roll(-1, 1).flatten()
    rows, shape, outputs = SHAPES[name]
    model = models.build(name, shape, outputs, 1)
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(2))
    y = torch.randn(rows, 1) if outputs == 1 else torch.randint(0, outputs, (rows,))
    if len(shape) == 3:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return model, x, y


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
    split = data.Data(data.spec_of("cifar10" if len(shape) == 3 else "boston"), x, y, x, y, image_scale=scale)
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
    parser.add_argument("--models", default=",".join((*SHAPES, *TRANSFORMERS)))
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
        settings = [setting for setting in SETTINGS if setting != WHOLE or name in SHAPES]
        steps = {setting: stepper_of(name, setting, asked.backend) for setting in settings}
        calls = {"resnet20": 1, **dict.fromkeys(TRANSFORMERS, 2)}.get(name, 50)
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
        print(f"\n{name}, batch {SHAPES[name][0] if name in SHAPES else TOKENS[0]}")
        print(f"  {'':30} {'ms a step':>10} {'quartiles':>19} {'x float32':>10} {'MB':>7}")
        for setting, found in times.items():
            low, middle, high = statistics.quantiles(found, n=4)
            ratio = statistics.median(t / f for t, f in zip(found, times["float32"], strict=True))
            most = memory(name, setting, asked.backend)
            print(f"  {setting:30} {middle:10.2f} {low:9.2f} {high:9.2f} {ratio:10.2f} {most:7.0f}")


if __name__ == "__main__":
    main()
