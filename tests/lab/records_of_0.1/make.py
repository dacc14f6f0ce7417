"""Makes these records anew: python make.py CHECKOUT, with a checkout of commit 3eccf10, the last one of version 0.1.

Each folder holds the record of a run that was stopped by SIGTERM in the middle of an epoch, without its summary.json,
as after a kill; and expected.json: the metrics and the final weights of the same run when it was left alone, and what
decides in which order PyTorch sums.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
COMMON = [
    "--dataset",
    "boston",
    "--rounding",
    "stochastic",
    "--batch-size",
    "64",
    "--epochs",
    "6",
    "--wandb",
    "disabled",
]
RUNS = {  # the step after which it was stopped, of 7 an epoch; flags
    "accumulator": (17, ["--precision", "float8", "--momentum", "0.9", "--site", "accumulator=float16:stochastic"]),
    "compensation": (
        31,
        [
            *("--precision", "float8_e4m3fn", "--site", "compensation=bfloat16", "--optimizer", "adam"),
            *("--loss-scale", "dynamic", "--schedule", "cosine", "--average-last", "0.5"),
        ],
    ),
}


def make(name: str, stop: int, flags: list[str]) -> None:
    import console  # noqa: I001 - of the old checkout, as main
    import main

    shutil.rmtree(HERE / name, ignore_errors=True)
    assert main.main([*flags, "--output-dir", f"{name}-straight"]) == 0
    (straight,) = (HERE / f"{name}-straight").iterdir()
    step, done = console.Progress.step, []

    def stepped(progress: console.Progress) -> None:
        step(progress)
        done.append(1)
        if len(done) == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    console.Progress.step = stepped
    assert main.main([*flags, "--output-dir", name]) == 143
    console.Progress.step = step
    (stopped,) = (HERE / name).iterdir()
    (stopped / "summary.json").unlink()
    state = torch.load(straight / "checkpoint.pt", weights_only=True)
    weights = {key: tensor.flatten().tolist() for key, tensor in state["model"].items()}
    lines = (straight / "metrics.jsonl").read_text().splitlines()
    computed_by = [torch.__version__.partition("+")[0], torch.backends.cpu.get_cpu_capability()]
    expected = {"computed_by": computed_by, "metrics": lines, "weights": weights}
    (HERE / name / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(straight.parent)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    os.chdir(HERE)
    for name, (stop, flags) in RUNS.items():
        make(name, stop, [*COMMON, *flags])
