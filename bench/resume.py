"""Kill -9 runs at random moments, resume each, and compare its end with that of a run that was left alone.

    python bench/resume.py            # 25 boston and 25 CIFAR-shaped runs; exit status 1 unless all bits agree

Prints a line for each kill, and the counts. It needs no data: the CIFAR-shaped set is made up.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from run_helpers import bits, write_cifar10  # noqa: E402

NOISY = ["--precision", "float8", "--rounding", "stochastic", "--momentum", "0.9", "--schedule", "cosine"]
ACCUMULATOR = ["--site", "accumulator=float16:stochastic"]
RUNS = {
    "boston": ["--dataset", "boston", "--epochs", "60", "--batch-size", "32", *NOISY, *ACCUMULATOR],
    "cifar10": ["--dataset", "cifar10", "--epochs", "3", "--batch-size", "8", "--data-dir", ".", *NOISY, *ACCUMULATOR],
}
EVERY = ("1", "0.2s", "1m")


def start(arguments: list[str], place: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "main.py"), *arguments, "--wandb", "disabled"]
    with open(place / "output", "a") as output:
        return subprocess.Popen(command, cwd=place, stdout=output, stderr=output)


def until_recorded(process: subprocess.Popen, runs: Path) -> float:
    """Wait for the run's folder; returns when it was there."""
    while process.poll() is None and not (runs.is_dir() and any(runs.iterdir())):
        time.sleep(0.001)
    return time.monotonic()


def killed_and_resumed(arguments: list[str], place: Path, seconds: float, draw: random.Random) -> tuple[Path, str]:
    """One run, killed at a random moment of its `seconds` and resumed. Returns its record, and what happened."""
    runs = place / "runs"
    every = draw.choice(EVERY)
    partial: list[Path] = []
    while not partial:  # a run that had its record in place already was not killed while it went on: once more
        shutil.rmtree(runs, ignore_errors=True)
        process = start([*arguments, "--checkpoint-every", every], place)
        since = until_recorded(process, runs)
        time.sleep(draw.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = time.monotonic() - since
        seconds *= 0.9  # if it had ended by then: the machine is faster now
        partial = [path for path in runs.iterdir() if ".partial-" in path.name]
    (folder,) = partial
    metrics, checkpoint = folder / "metrics.jsonl", folder / "checkpoint.pt"
    lines = metrics.read_text().count("\n") if metrics.exists() else 0
    again = ["--resume", str(folder)] if (folder / "config.json").exists() else arguments
    if start(again, place).wait() != 0:
        raise SystemExit((place / "output").read_text())
    (record,) = (path for path in runs.iterdir() if path.name == folder.name.partition(".partial-")[0])
    had = "a checkpoint" if checkpoint.exists() or "after epoch" in (place / "output").read_text() else "none yet"
    return record, f"every {every:4}  killed after {after:5.2f} s, {lines:3} epochs recorded, {had}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="of each of the two runs [default: 25]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [default: 0]")
    parser.add_argument("--threads", type=int, default=1, help="of each run [default: 1]")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    draw, right, kills = random.Random(asked.seed), 0, 0
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {asked.threads} threads a run, {platform.machine()}")
    for name, arguments in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_cifar10(Path(folder), count=8)  # 40 + 8 images: 5 steps an epoch
            process = start(arguments, Path(folder))
            since = until_recorded(process, Path(folder) / "runs")
            assert process.wait() == 0, (Path(folder) / "output").read_text()
            seconds = time.monotonic() - since
            (straight,) = (Path(folder) / "runs").iterdir()
            expected = bits(straight)
        print(f"{name}: left alone, {seconds:.1f} s of record")
        for _ in range(asked.kills):
            with tempfile.TemporaryDirectory() as folder:
                write_cifar10(Path(folder), count=8)
                record, what = killed_and_resumed(arguments, Path(folder), seconds, draw)
                equal = bits(record) == expected
                kills, right = kills + 1, right + equal
                print(f"{name}: {what}: {'the same bits' if equal else 'DIFFERENT BITS'}", flush=True)
    print(f"{right} of {kills} killed and resumed runs ended in the bits of the run that was left alone")
    return 0 if right == kills else 1


if __name__ == "__main__":
    sys.exit(main())
