"""gpt beside nanoGPT, whose model it is: python bench/nanogpt.py CHECKOUT [--pairs 200] [--steps 2000]

CHECKOUT: one of https://github.com/karpathy/nanoGPT (its commit 3adf61e was compared). Prints

- whether initial weights, logits, loss and all gradients have the same bits, for 4 layers of 128 and 6 of 384, with
  dropout and without, and whether the learning rates of all steps do;
- medians and quartiles of the milliseconds of a step, and the ratio: all that main.py does from one step to the next,
  and what nanoGPT's loop does, take turns, in one process with one thread;
- the testing loss of the weights that nanoGPT's train.py trains in so many steps, over our whole test text, beside its
  own estimate (--steps 0: without that). It takes as long as a run of ours, about two minutes.

The text is looked for as --dataset shakespeare does.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import os
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402
from lab import optimizers  # noqa: E402
from lab.metrics import TASKS, evaluate  # noqa: E402
from reproduce import GPT_TRAINING  # noqa: E402
from settings.flags import config_of  # noqa: E402

SMALL, LARGE = {"layers": 4, "heads": 4, "width": 128}, {"layers": 6, "heads": 6, "width": 384}
CONTEXTS = ((SMALL, 64), (LARGE, 256))
SYMBOLS, ROWS, SEED = 65, 12, 1337
RATES = {"learning_rate": 1e-3, "min_lr": 1e-4, "warmup_iters": 100}
UNTIMED = 10  # steps at the start


def module_of(checkout: Path) -> ModuleType:
    """Its model.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    if spec is None or spec.loader is None or not (checkout / "model.py").exists():
        raise SystemExit(f"nanogpt.py: error: {checkout}: no checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(module: ModuleType, options: dict[str, Any], context: int, seed: int) -> nn.Module:
    """Its model, with the initial weights of that seed."""
    torch.manual_seed(seed)
    sizes = {"n_layer": options["layers"], "n_head": options["heads"], "n_embd": options["width"]}
    dropout = options.get("dropout", 0.0)
    return module.GPT(module.GPTConfig(block_size=context, vocab_size=SYMBOLS, bias=False, dropout=dropout, **sizes))


def same_bits(module: ModuleType) -> None:
    for options, context in CONTEXTS:
        for dropout in (0.0, 0.2):
            options = {**options, "dropout": dropout}
            their_model = theirs(module, options, context, SEED)
            our_model = models.build("gpt", (context,), SYMBOLS, SEED, options)
            weights = zip(their_model.parameters(), our_model.parameters(), strict=True)
            agree = {"weights": all(torch.equal(a, b) for a, b in weights)}
            x, y = torch.randint(SYMBOLS, (2, ROWS, context), generator=torch.Generator().manual_seed(SEED))
            torch.manual_seed(SEED)
            their_logits, their_loss = their_model(x, y)
            torch.manual_seed(SEED)
            our_logits = our_model(x)
            our_loss = TASKS["language"].loss(our_logits, y)
            agree |= {"logits": torch.equal(their_logits, our_logits), "loss": torch.equal(their_loss, our_loss)}
            their_loss.backward()
            our_loss.backward()
            gradients = zip(their_model.parameters(), our_model.parameters(), strict=True)
            agree["gradients"] = all(torch.equal(a.grad, b.grad) for a, b in gradients)
            told = ", ".join(f"{name} {'the same' if same else 'DIFFER'}" for name, same in agree.items())
            print(f"{options}, context {context}: {told}", flush=True)


def same_rates(checkout: Path, steps: int = 2000) -> None:
    """Its function get_lr, taken out of its script, beside our schedule."""
    tree = ast.parse((checkout / "train.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_lr")
    names: dict[str, Any] = {**RATES, "lr_decay_iters": steps, "math": math}
    exec(compile(ast.Module([function], []), str(checkout), "exec"), names)
    config = config_of([*GPT_TRAINING.split(), "--steps", str(steps)])
    optimizer = optimizers.build(config, nn.Linear(1, 1))
    schedule = optimizers.schedule(config, optimizer, steps)
    apart = 0
    for step in range(steps):
        apart += optimizer.param_groups[0]["lr"] != names["get_lr"](step)
        optimizer.step()
        if schedule:
            schedule.step()
    print(f"learning rates: {apart} of {steps} differ", flush=True)


def batch(text: torch.Tensor, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As its get_batch draws one."""
    starts = torch.randint(len(text) - context, (ROWS,))
    x = torch.stack([text[i : i + context] for i in starts])
    return x, torch.stack([text[i + 1 : i + 1 + context] for i in starts])


def times(module: ModuleType, pairs: int, data_dir: str | None) -> None:
    """Steps of a run of train.py, and between each two of them one of nanoGPT's loop."""
    text = data.load("shakespeare", data_dir=data_dir).train_x
    model = theirs(module, SMALL, 64, SEED)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x, y = batch(text, 64)
    ours: list[float] = []
    others: list[float] = []
    train_step, since = train.train_step, 0.0

    def timed(*arguments: Any) -> torch.Tensor:
        nonlocal x, y, since
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        _, loss = model(x, y)
        x, y = batch(text, 64)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        ended = time.perf_counter()
        if since:  # from the end of nanoGPT's step before to the start of this one
            ours.append(started - since)
            others.append(ended - started)
        since = time.perf_counter()
        return train_step(*arguments)

    with tempfile.TemporaryDirectory() as folder:
        flags = [*GPT_TRAINING.split(), "--warmup", "0", "--steps", str(pairs + UNTIMED + 1), "--output-dir", folder]
        flags += ["--wandb", "disabled", *(["--data-dir", data_dir] if data_dir else [])]
        train.train_step = timed
        try:
            train.run(config_of(flags), quiet=True)
        finally:
            train.train_step = train_step
    ours, others = ours[UNTIMED:], others[UNTIMED:]
    ratio = statistics.median(ours) / statistics.median(others)
    quartiles = statistics.quantiles([a / b for a, b in zip(ours, others, strict=True)])
    print(
        f"a step, {len(ours)} pairs: ours {shown(ours)} ms, nanoGPT's {shown(others)} ms; ratio of the medians"
        f" {ratio:.3f}, of the pairs {quartiles[1]:.3f} ({quartiles[0]:.3f} - {quartiles[2]:.3f})",
        flush=True,
    )


def shown(seconds: list[float]) -> str:
    low, middle, high = statistics.quantiles([1000 * s for s in seconds])
    return f"{middle:.1f} ({low:.1f} - {high:.1f})"


def trained(checkout: Path, steps: int, data_dir: str | None) -> None:
    """Its train.py in a copy of the checkout, and what its last weights come to on our test text."""
    split = data.load("shakespeare", data_dir=data_dir)
    assert isinstance(split, data.Text)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "nanoGPT"
        shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "out*"))
        texts = copy / "data" / "shakespeare_char"
        for name, tokens in (("train", split.train_x), ("val", split.test_x)):
            (texts / f"{name}.bin").write_bytes(tokens.numpy().astype("uint16").tobytes())
        (texts / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": SYMBOLS}))
        sizes = "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
        length = f"--max_iters={steps} --lr_decay_iters={steps} --eval_interval={min(250, steps)} --eval_iters=20"
        how = "--device=cpu --compile=False --dtype=float32 --log_interval=1000 --always_save_checkpoint=True"
        command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *f"{sizes} {length} {how}".split()]
        started = time.monotonic()
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=one_thread)
        if ran.returncode:
            raise SystemExit(f"nanogpt.py: error: its train.py: {ran.stderr}")
        saved = torch.load(copy / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    model = models.build("gpt", (64,), SYMBOLS, 0, SMALL)
    state = {name: value for name, value in saved["model"].items() if name != "lm_head.weight"}
    with torch.no_grad():
        for mine, value in zip(model.parameters(), state.values(), strict=True):
            mine.copy_(value)
    (said,) = re.findall(rf"step {steps}: train loss [\d.]+, val loss ([\d.]+)", ran.stdout)
    loss = evaluate(model, split, TASKS["language"])["testing_loss"]
    minutes = (time.monotonic() - started) / 60
    print(
        f"after {saved['iter_num']:,} steps of its train.py ({minutes:.1f} min): testing loss {loss:.4f}, by its own"
        f" estimate {said}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--pairs", type=int, default=200, help="of steps [default: 200; 0: none]")
    parser.add_argument("--steps", type=int, default=2000, help="of its training [default: 2000; 0: none]")
    parser.add_argument("--data-dir", help="where the text lies [default: the user's cache folder]")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, one thread, {platform.machine()}")
    module = module_of(asked.checkout)
    same_bits(module)
    same_rates(asked.checkout)
    if asked.pairs:
        times(module, asked.pairs, asked.data_dir)
    if asked.steps:
        trained(asked.checkout, asked.steps, asked.data_dir)


if __name__ == "__main__":
    main()
