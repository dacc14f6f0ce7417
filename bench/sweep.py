"""A sweep against a shell loop: python bench/sweep.py [--seeds 100] [--kills 0]

Times `sweep.py` over 3 data sets x 5 settings x SEEDS seeds x 30 epochs, start to finish, wandb off, and a loop of 15
`main.py` runs, one for each data set and setting; prints seconds, seconds a run, and their ratio. With --kills N it
starts such a sweep N times (of 4 seeds), kills it (SIGKILL, children too) at a random moment, starts it again, and
compares the records with those of a sweep that was left alone: metrics and weights, bit by bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lab import checkpoint

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--dataset", "toy,boston,diabetes", "--epochs", "30", "--batch-size", "512", "--wandb", "disabled"]
PRECISIONS = ["--precision", "float32,float16,float8", "--rounding", "nearest,stochastic"]  # float32 has no rounding
SINGLE = [("float32", "nearest"), *((p, r) for p in ("float16", "float8") for r in ("nearest", "stochastic"))]


def swept(seeds: int, folder: Path) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "sweep.py"),
        *COMMON,
        *PRECISIONS,
        "--seed",
        f"0:{seeds}",
        "--output-dir",
        str(folder),
    ]


def seconds(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def records(folder: Path) -> dict[str, tuple[bytes, dict]]:
    """By name: the metrics' bytes, and each weight's."""
    found = {}
    for record in folder.iterdir():
        if ".partial-" not in record.name:
            state = checkpoint.latest(record).state["model"]
            weights = {name: tensor.numpy().tobytes() for name, tensor in state.items()}
            found[record.name] = (record / "metrics.jsonl").read_bytes(), weights
    return found


def kill(seeds: int, folder: Path, after: float) -> int:
    """Starts the sweep, kills it with all its processes after so many seconds -> how many records there were."""
    running = subprocess.Popen(
        swept(seeds, folder),
        cwd=folder.parent,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        running.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    return len(list(folder.glob("*/summary.json")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--kills", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if asked.kills:
            seconds(swept(4, folder / "alone"), folder)
            expected, wrong, chance = records(folder / "alone"), 0, random.Random(1)
            for number in range(asked.kills):
                target = folder / f"killed-{number}"
                after = chance.uniform(3.0, 9.0)
                there = kill(4, target, after)
                seconds(swept(4, target), folder)
                same = records(target) == expected
                wrong += not same
                print(
                    f"killed after {after:.1f} s with {there} of {len(expected)} records: same at the end: {same}",
                    flush=True,
                )
            print(f"{asked.kills - wrong} of {asked.kills} ended with the records of an undisturbed sweep")
            return int(wrong > 0)
        runs = 15 * asked.seeds
        took = seconds(swept(asked.seeds, folder / "swept"), folder)
        print(f"sweep.py: {runs} runs in {took:.1f} s, {1e3 * took / runs:.1f} ms a run", flush=True)
        loop = 0.0
        for dataset in ("toy", "boston", "diabetes"):
            for precision, rounding in SINGLE:
                command = [sys.executable, str(ROOT / "main.py"), "--dataset", dataset, *COMMON[2:]]
                loop += seconds([*command, "--precision", precision, "--rounding", rounding], folder)
        print(f"a loop of main.py: 15 runs in {loop:.1f} s, {1e3 * loop / 15:.0f} ms a run")
        print(f"a run in the loop takes {loop / 15 / (took / runs):.0f} times one of the sweep")
    return 0


if __name__ == "__main__":
    sys.exit(main())
