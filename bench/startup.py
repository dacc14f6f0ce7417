"""What a small run costs from the shell, against the imports that it cannot do without.

    python bench/startup.py [--pairs 11]

Two ratios, each of wall times: a run on boston without wandb against importing PyTorch and scikit-learn alone; the
same run with wandb offline against those imports, wandb's, and one offline run of wandb that logs nothing. The two
sides alternate, after one warm-up of each, so that both see the same state of the machine; everything is written to
temporary folders. Then the CPU time of `--help` and of a wrong argument.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAIN = str(Path(__file__).parent.parent / "main.py")
IMPORTS = "import torch, sklearn.datasets, sklearn.model_selection, sklearn.preprocessing"
WANDB = "import wandb; wandb.init(mode='offline').finish()"
RUN = [MAIN, "--dataset", "boston", "--precision", "float8", "--wandb"]
TARGET_RATIO, TARGET_CPU_SECONDS = 1.3, 0.5


def seconds(arguments: list[str], status: int = 0) -> tuple[float, float]:
    """Wall and CPU seconds of Python with these arguments, its child processes included; RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment |= {f"WANDB_{name}_DIR": folder for name in ("CONFIG", "CACHE", "DATA")} | {"WANDB_SILENT": "true"}
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        ran = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ran.returncode != status:
        raise RuntimeError(f"{arguments}: exit status {ran.returncode}: {ran.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def compare(name: str, ours: list[str], bare: list[str], pairs: int) -> None:
    """Print the medians of `pairs` alternating runs of both, their ratio, and the spread of the pairs' ratios."""
    seconds(ours), seconds(bare)
    times = [(seconds(ours)[0], seconds(bare)[0]) for _ in range(pairs)]
    our_times, bare_times = map(list, zip(*times, strict=True))
    ratio = statistics.median(our_times) / statistics.median(bare_times)
    print(f"{name}: ratio {ratio:.2f} (target <= {TARGET_RATIO})", flush=True)
    print(f"  run {spread(our_times)} s, bare {spread(bare_times)} s, pairs' ratio {spread([a / b for a, b in times])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=11, help="alternating runs of each side [default: 11]")
    pairs = parser.parse_args().pairs
    print(f"n = {pairs} each, median (min - max); {os.cpu_count()} CPUs, {platform.platform()}")
    compare("without wandb", [*RUN, "disabled"], ["-c", IMPORTS], pairs)
    compare("wandb offline", [*RUN, "offline"], ["-c", f"{IMPORTS}; {WANDB}"], pairs)
    for name, arguments, status in (("--help", ["--help"], 0), ("a wrong argument", ["--epochs", "x"], 2)):
        cpu = [seconds([MAIN, *arguments], status)[1] for _ in range(pairs)]
        print(f"{name}: {spread(cpu)} s of CPU (target < {TARGET_CPU_SECONDS})")


if __name__ == "__main__":
    main()
