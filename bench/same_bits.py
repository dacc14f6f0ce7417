"""Train with an older checkout and with this one, and compare the results bit by bit.

    python bench/same_bits.py OLD_CHECKOUT [--only NAME,...] [--jobs N] [--keep FOLDER]

For a change of the code that must not change any result. Each configuration below is trained with the code in
OLD_CHECKOUT and with the code of the checkout in which this script lies, by the same Python, on the CPU, in one thread.
The script prints a line for each configuration, and its exit status is 1 unless all of these agree:

- the name of the record's folder, and the bytes of metrics.jsonl and config.json;
- what summary.json holds, except the seconds, the command, the environment, the code's fingerprint, and keys that only
  the new code writes;
- everything in checkpoint.pt (weights, optimizer with accumulator and compensation, loss scale, schedule, average,
  random streams), except the same, wandb's id, and what only the new code saves (`ADDED`). Tensors
  agree if type, shape and bits do: -0.0 is not 0.0, and a NaN equals a NaN with the same bits. A run that fails counts
  as a difference, even if it fails with both.

The configurations "resumed-..." are started with the old code and interrupted by SIGINT in their third epoch; the new
code goes on with `--resume`, and the record is compared with that of a run that the old code did without interruption.

Runs of the same checkout share a process, which calls `main.main` for each of them; what is interrupted or resumed has
a process to itself. The loops of the fused engine are compiled anew for each checkout, because numba's cache does not
notice every change. With two jobs, the default, all of it takes two minutes on two free cores and four on busy ones.
Not compared: CIFAR-10, which is a download, and stochastic rounding with `--backend qtorch`, which cannot be seeded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

NEW = Path(__file__).resolve().parent.parent
# What a checkpoint of the new code has besides, by the beginning of its place.
ADDED = ("code", "first_loss", "second_moments.", "optimizer.low_precision.seed", "optimizer.low_precision.rules")
ADDED += tuple(f"optimizer.low_precision.{name}" for name in ("rounded_by", "checksums", "delayed", "smallest_state"))
SHOWN = 3  # names of what differs on a line
EVERYWHERE = "--dataset boston --epochs 3 --batch-size 64 --device cpu --wandb disabled"  # a configuration's flags win
MLP = "--model mlp --learning-rate 0.01 --momentum 0.9"
DIGITS = "--dataset digits --epochs 1 --batch-size 128 --learning-rate 0.02 --momentum 0.9"
NOISY = "--precision float8 --rounding stochastic"
DYNAMIC = "--precision fp16 --overflow infinity --loss-scale dynamic"

FORMATS = ["float8", "float16", "float8_e4m3fn", "e4m3", "float4_e2m1fn", "fixed16.8", "fixed8.4s", "bfloat16"]
FORMATS += ["mxfp8_e4m3", "mxfp4", "mxint8", "nvfp4", "bfp8", "bfp8_row", "bfp8_column"]
ROUNDINGS = ["nearest_away", "toward_zero", "up", "down", "stochastic:4", "stochastic:4:half"]
RECIPES = ["published --precision float8", "qtorch-tutorial", "ocp-fp8", "bfloat16", "bfloat16-stochastic"]
RECIPES += ["bfloat16-kahan", "swalp"]

WITH_EACH_ENGINE = {
    **{
        f"{name}-{r}": f"{MLP} --precision {name} --rounding {r}" for name in FORMATS for r in ("nearest", "stochastic")
    },
    **{f"float8-{r.replace(':', '-')}": f"{MLP} --precision float8 --rounding {r}" for r in ROUNDINGS},
    "fp16-infinity": f"{MLP} --precision fp16 --overflow infinity",
    "digits-cnn": f"{DIGITS} {NOISY}",
    "digits-cnn-mxfp8": f"{DIGITS} --precision mxfp8_e4m3 --rounding stochastic",
    "digits-cnn-bfp8_column": f"{DIGITS} --precision bfp8_column",
}
RUNS = {
    # The data sets, and runs with an unusual end. Where no engine is named, the program chooses it.
    "toy": f"--dataset toy --epochs 20 --batch-size 4 {NOISY}",
    "boston": "--precision float16 --rounding stochastic --scale-on all --test-split 0.3",
    "diabetes": "--dataset diabetes --precision float8 --seed 7",
    "digits": f"{DIGITS} {NOISY}",
    "breast_cancer": "--dataset breast_cancer --precision float16 --learning-rate 0.1",
    "float32": MLP,
    "no-epochs": f"--epochs 0 {NOISY}",
    "diverging": "--epochs 50 --learning-rate 1e20 --precision bfloat16 --overflow infinity",
    # Formats and roundings.
    **{f"{name}-eager": f"{flags} --backend eager" for name, flags in WITH_EACH_ENGINE.items()},
    **{f"{name}-fused": f"{flags} --backend fused" for name, flags in WITH_EACH_ENGINE.items()},
    "qtorch": f"{MLP} --precision float8 --backend qtorch",
    # Optimizers, accumulator and compensation.
    "sgd": f"{MLP} --weight-decay 0.01 {NOISY}",
    "adam": "--model mlp --optimizer adam --weight-decay 0.01 --precision float16 --rounding stochastic",
    "adamw": "--model mlp --optimizer adamw --weight-decay 0.1 --precision bfloat16 --rounding stochastic",
    "accumulator-float16": f"{MLP} --precision float8 --site accumulator=float16:stochastic",
    "accumulator-float32": "--model mlp --optimizer adam --precision float8 --site accumulator=float32",
    "compensation": f"{MLP} --precision bfloat16 --site compensation=bfloat16",
    "compensation-adamw": "--model mlp --optimizer adamw --precision e5m6 --site compensation=float8:stochastic",
    # Loss scales, schedules and averages.
    "loss-scale-1000": f"{MLP} --precision float8 --loss-scale 1000",
    "loss-scale-dynamic": f"{MLP} --batch-size 8 {DYNAMIC}",
    "loss-scale-dynamic-saturate": "--model mlp --optimizer adam --precision e4m3 --loss-scale dynamic",
    "cosine": f"{MLP} --schedule cosine {NOISY}",
    "onecycle": f"{MLP} --schedule onecycle {NOISY}",
    "average-last": f"{MLP} --epochs 4 --average-last 0.5 {NOISY}",
    # What is rounded, and the noise.
    "quantize-weights": f"{MLP} --quantize weights,momentum {NOISY}",
    "quantize-errors": f"{MLP} --quantize activations,errors {NOISY}",
    "quantize-inputs": f"{MLP} --quantize inputs,gradients --precision mxfp4",
    "quantize-none": f"{MLP} --quantize none --precision float8",
    "sites": f"{MLP} --precision float8 --site errors=e5m2:stochastic --site inputs=bfp8_row --site momentum=float32",
    "layers": f"{MLP} --layers hidden2,output {NOISY}",
    "rounding-seed": f"{MLP} --rounding-seed 5 {NOISY}",
    # Other models of digits.
    "digits-linear": f"{DIGITS} --model linear {NOISY}",
    "digits-mlp": f"{DIGITS} --model mlp --precision mxfp8_e4m3 --rounding stochastic",
    "digits-cnn-layers": f"{DIGITS} --layers conv* --precision float8 --average-last 1",
    "digits-resnet20": f"{DIGITS} --model resnet20 {NOISY}",
    "digits-resnet20-average": f"{DIGITS} --model resnet20 --layers stage1.*,fc --precision mxfp4 --average-last 1",
    # Recipes.
    **{f"recipe-{recipe.split()[0]}": f"--model mlp --recipe {recipe}" for recipe in RECIPES},
    "recipe-qtorch-tutorial-digits": "--dataset digits --epochs 2 --recipe qtorch-tutorial",
    "recipe-swalp-digits": "--dataset digits --epochs 2 --recipe swalp",
}
RESUMED = {  # They last long enough to be interrupted in time.
    "resumed-accumulator": f"{MLP} --epochs 40 --batch-size 8 {NOISY} --site accumulator=float16:stochastic",
    "resumed-loss-scale": f"{MLP} --epochs 40 --batch-size 8 {DYNAMIC}",
    "resumed-compensation": "--model mlp --epochs 40 --batch-size 8 --optimizer adamw --precision bfloat16"
    " --site compensation=bfloat16 --schedule onecycle --average-last 0.5",
    "resumed-cnn": f"{DIGITS} --epochs 8 --batch-size 64 {NOISY} --schedule cosine --average-last 0.25",
}
ATTEMPTS = 3  # to interrupt a run before it ends

# One process for many runs. Each of them begins with the random state of a new process.
DRIVER = """
import contextlib, json, pathlib, sys
sys.path[0] = sys.argv[1]
import torch
import main
seed = torch.initial_seed()
for name, arguments in json.load(sys.stdin).items():
    torch.manual_seed(seed)
    with open(f"{name}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        status = main.main(arguments)
    pathlib.Path(f"{name}.status").write_text(str(status))
"""


class Side:
    """A checkout, and a folder for its runs: runs/NAME/RECORD, NAME.log (what it printed) and NAME.status."""

    def __init__(self, tree: Path, place: Path) -> None:
        self.tree, self.place = tree, place
        place.mkdir(parents=True)
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
        self.environment = os.environ | settings | {"NUMBA_CACHE_DIR": str(place / "numba")}

    def __str__(self) -> str:
        git = ["git", "-C", self.tree, "describe", "--always", "--dirty", "--exclude=*"]
        return f"{self.tree} ({subprocess.run(git, capture_output=True, text=True).stdout.strip() or 'no commit'})"

    def train(self, names: list[str]) -> None:
        """Train these configurations one after another in one process."""
        runs = json.dumps({name: arguments(name) for name in names})
        command = [sys.executable, "-c", DRIVER, str(self.tree)]
        with open(self.place / "driver.log", "a") as log:
            subprocess.run(command, input=runs, text=True, cwd=self.place, env=self.environment, stdout=log, stderr=log)

    def start(self, flags: list[str], place: Path, log: Path) -> subprocess.Popen:
        """Start main.py in the folder `place`, which may be that of the other side."""
        command = [sys.executable, str(self.tree / "main.py"), *flags]
        with open(log, "a") as output:
            return subprocess.Popen(command, cwd=place, env=self.environment, stdout=output, stderr=output)

    def records(self, name: str) -> list[Path]:
        return sorted((self.place / "runs" / name).glob("*/"))

    def failure(self, name: str) -> str | None:
        """One line that says why a run left no record; None if it left one."""
        status, count = self.place / f"{name}.status", len(self.records(name))
        ended = f"exit status {status.read_text()}" if status.exists() else "it did not end"
        if ended == "exit status 0" and count == 1:
            return None
        log = self.place / (f"{name}.log" if status.exists() else "driver.log")
        printed = log.read_text().split("\n") if log.exists() else []
        return f"{self.tree}: {ended}, {count} records; {next(filter(None, reversed(printed)), 'nothing printed')}"


def arguments(name: str) -> list[str]:
    return shlex.split(f"{EVERYWHERE} {(RUNS | RESUMED)[name]} --output-dir runs/{name}")


def epochs_recorded(folder: Path) -> int:
    with contextlib.suppress(OSError):  # The run may rename its record at this moment.
        return sum(metrics.read_bytes().count(b"\n") for metrics in folder.glob("*/metrics.jsonl"))
    return 0


def interrupt_and_resume(name: str, old: Side, new: Side) -> str:
    """Start a run with the old code, interrupt it, and go on with the new code. Returns where it was interrupted."""
    folder, log = new.place / "runs" / name, new.place / f"{name}.log"
    for _ in range(ATTEMPTS):
        shutil.rmtree(folder, ignore_errors=True)
        process = old.start(arguments(name), new.place, log)
        while process.poll() is None and epochs_recorded(folder) < 2:
            time.sleep(0.002)
        time.sleep(0.02)  # so that some batches of the next epoch are done
        process.send_signal(signal.SIGINT)
        if process.wait() == 128 + signal.SIGINT:
            break
    else:
        return f"NOT INTERRUPTED: the last of {ATTEMPTS} attempts ended with exit status {process.returncode}"
    (record,) = new.records(name)
    state = torch.load(record / "checkpoint.pt", weights_only=True)
    status = new.start(["--resume", str(record.relative_to(new.place))], new.place, log).wait()
    (new.place / f"{name}.status").write_text(str(status))
    return f"interrupted in epoch {state['epoch'] + 1} after {state['batch']} batches"


def leaves(value: Any, place: str = "") -> dict[str, tuple]:
    """The tensors, numbers and texts in nested dicts and lists: by their place, their type, shape and bits."""
    if isinstance(value, dict | list | tuple) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            where: leaf for key, item in items for where, leaf in leaves(item, f"{place}.{key}".lstrip(".")).items()
        }
    if isinstance(value, torch.Tensor):
        bits = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {place: (value.dtype, tuple(value.shape), bits)}
    return {place: (type(value), (), struct.pack("<d", value) if isinstance(value, float) else value)}


def differing(old: dict[str, tuple], new: dict[str, tuple]) -> list[str]:
    """The places of leaves that are not the same, or that only one of the two has."""
    return [place for place in old | new if old.get(place) != new.get(place)]


def first_difference(old: bytes, new: bytes) -> str:
    """The word "same", or from which line on two files differ."""
    lines = zip_longest(old.splitlines(keepends=True), new.splitlines(keepends=True))
    return next((f"DIFFERENT from line {n}" for n, (a, b) in enumerate(lines, 1) if a != b), "same")


def listed(names: list[str]) -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*names[:SHOWN], *more]) or "none"


def compare(name: str, old: Side, new: Side) -> tuple[bool, int, int, str]:
    """Whether one configuration's results are the same, how many tensors were compared and differ, and a line."""
    failures = [failure for side in (old, new) if (failure := side.failure(name))]
    if failures:
        return False, 0, 0, f"FAILED: {'; '.join(failures)}"
    records = [side.records(name)[0] for side in (old, new)]
    metrics = first_difference(*[(record / "metrics.jsonl").read_bytes() for record in records])
    states = [torch.load(record / "checkpoint.pt", weights_only=True) for record in records]
    summaries = [json.loads((record / "summary.json").read_text()) for record in records]

    others = [] if records[0].name == records[1].name else [f"the record's name, {records[0].name}, {records[1].name}"]
    if (records[0] / "config.json").read_bytes() != (records[1] / "config.json").read_bytes():
        others.append("config.json")
    if name in RESUMED and not summaries[1]["resumed"]:
        others.append("the new code began anew")
    summaries[1] = {key: value for key, value in summaries[1].items() if key in summaries[0]}
    may_differ = {"seconds", "command", "wandb_id", "environment", "code", *(["resumed"] if name in RESUMED else [])}
    for value in (*states, *summaries):
        for key in may_differ & value.keys():
            del value[key]
    others += [f"summary.json {place}" for place in differing(*map(leaves, summaries))]
    before, after = map(leaves, states)
    tensors = {place for place, leaf in (before | after).items() if isinstance(leaf[0], torch.dtype)}
    wrong = [place for place in differing(before, after) if place in tensors]
    added = {place for place in after if place not in before and place.startswith(ADDED)}
    others += [f"checkpoint.pt {place}" for place in differing(before, after) if place not in tensors | added]

    line = f"{summaries[0]['status']:8}  metrics {metrics}  {len(tensors):3} tensors, differing: {listed(wrong)}"
    line += f"; differing besides: {listed(others)}" if others else ""
    return metrics == "same" and not wrong and not others, len(tensors), len(wrong), line


def qtorch_compiles() -> bool:
    """Whether qtorch is installed and compiles, which takes it half a minute when it does so first."""
    return subprocess.run([sys.executable, "-c", "import qtorch.quant"], capture_output=True).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD_CHECKOUT", type=Path, help="the checkout to compare with")
    parser.add_argument("--only", metavar="NAME,...", help="only these configurations [default: all]")
    parser.add_argument("--jobs", type=int, default=2, help="processes that run together [default: 2]")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="a new folder in which all records are kept")
    asked = parser.parse_args()
    known = [*RUNS, *RESUMED]
    names = asked.only.split(",") if asked.only else known
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--only: unknown {', '.join(unknown)}; the configurations are {', '.join(known)}")
    if not (asked.old / "main.py").is_file():
        parser.error(f"OLD_CHECKOUT: there is no main.py in {asked.old}")
    if asked.keep and asked.keep.exists():
        parser.error(f"--keep: {asked.keep} exists already")
    if "qtorch" in names and not qtorch_compiles():
        print("qtorch: left out, because it is not installed or does not compile here")
        names.remove("qtorch")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # If this script ignores SIGINT, so do the runs.

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(max(1, asked.jobs)) as pool:
        place = (asked.keep or Path(temporary)).resolve()
        old, new = Side(asked.old.resolve(), place / "old"), Side(NEW, place / "new")
        print(f"old: {old}\nnew: {new}\nPython {platform.python_version()}, torch {torch.__version__}", flush=True)
        count = max(1, asked.jobs // 2)
        parts = [names[i::count] for i in range(count)]
        trained = [pool.submit(old.train, part) for part in parts]
        trained += [pool.submit(new.train, [name for name in part if name in RUNS]) for part in parts]
        resumed = {name: pool.submit(interrupt_and_resume, name, old, new) for name in names if name in RESUMED}
        for future in trained:
            future.result()
        results = []
        for name in names:
            note = f"  ({resumed[name].result()})" if name in resumed else ""
            results.append(compare(name, old, new))
            print(f"{name:30}  {results[-1][3]}{note}", flush=True)
    same, tensors, wrong = (sum(result[i] for result in results) for i in range(3))
    print(f"{len(results)} configurations: {same} the same, {len(results) - same} different", end="; ")
    print(f"{tensors} tensors compared, {wrong} different; {time.monotonic() - start:.0f} s")
    return 0 if same == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
