"""Every figure and table of README from its commands: `python reproduce.py boston`, or `python reproduce.py all`.

Without a section it lists them, with the time that each took on two cores and the commands that it runs. Records go to
runs/, and what this code completed there is not run again; results/, images/ and the pages' tables are then made anew.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.console import command
from low_precision.errors import SettingError, nearest, shown

ROOT = Path(__file__).resolve().parent  # where the commands run
PYTHON = "python "  # how each command begins in this file; it is run, and printed, with the Python that runs this
REPORT = "python report.py --readme README.md --readme docs"


# On two cores of an AMD EPYC, where other work ran beside most of them; of cifar10, the sum of its runs, two at a time.
MINUTES = {
    "single": 1,
    "published": 4,
    "toy": 3,
    "boston": 10,
    "diabetes": 4,
    "bit-widths": 2,
    "sums": 4,
    "stagnation": 1,
    "biased": 2,
    "averaging": 3,
    "fixed_point": 7,
    "bfloat16_weights": 7,
    "stall": 1,
    "advice": 3,
    "transformer": 40,
    "shakespeare": 92,
    "parts": 92,
    "widened": 35,
    "cifar10": 290,
    "page": 11,
}


@dataclass(frozen=True)
class Section:
    about: str
    minutes: float
    commands: tuple[str, ...]


def regression(dataset: str, batch: int) -> Section:
    """Everything rounded, 100 seeds, 500 epochs (whose first 30 are those of a run of 30)."""
    folder = f"runs/{dataset}"
    title = f"{dataset}, linear regression: testing MSE by format and rounding of every number"
    common = f"python sweep.py --dataset {dataset} --epochs 500 --batch-size {batch} --seed 0:100 --output-dir {folder}"
    return Section(
        f"{dataset}: everything rounded, 100 seeds, 30 and 500 epochs",
        MINUTES[dataset],
        (
            f"{common} --precision float32,float16,float8 --rounding nearest,stochastic",
            f"{common} --precision float8 --rounding nearest,stochastic --site accumulator=float16",
            f"python report.py {folder} --metric testing_mse --at 30,500 --save results/{dataset}.csv"
            f" --figure images/{dataset}_results.png --title {shlex.quote(title)}",
        ),
    )


def experiment(name: str, about: str) -> Section:
    command = f"python experiments/{name}.py --save results/{name}.csv --figure images/{name}.png"
    return Section(about, MINUTES[name], (command,))


def table(name: str, about: str) -> Section:
    return Section(about, MINUTES[name], (f"python experiments/tables.py {name} --save results/{name}.csv",))


CIFAR10 = (
    "python sweep.py --dataset cifar10 --epochs 15 --schedule onecycle --batch-size 64 --learning-rate 0.1"
    " --momentum 0.9 --weight-decay 2e-4 --output-dir runs/cifar10"
)
GPT_TRAINING = (
    "--dataset shakespeare --batch-size 12 --optimizer adamw --learning-rate 1e-3 --betas 0.9,0.99 --weight-decay 0.1"
    " --decay matrices --clip-norm 1 --schedule cosine --warmup 100 --final-learning-rate 1e-4"
)
GPT = f"python sweep.py {GPT_TRAINING} --steps 2000 --evaluate-every 500 --seed 0:5 --output-dir runs/shakespeare"
SECTIONS = {
    "single": table("single", "the fifteen experiments, seed 42"),
    "published": table("published", "the same beside the published results"),
    "toy": regression("toy", 32),
    "boston": regression("boston", 512),
    "diabetes": regression("diabetes", 512),
    "bit-widths": Section(
        "a map of formats: 2 to 8 exponent bits, 0 to 10 mantissa bits, 20 seeds",
        MINUTES["bit-widths"],
        (
            "python sweep.py --dataset boston --epochs 30 --batch-size 512 --seed 0:20 --rounding nearest,stochastic"
            f" --precision float32,{','.join(f'e{e}m{m}' for e in range(2, 9) for m in range(11))}"
            " --output-dir runs/bit-widths",
            "python report.py runs/bit-widths --metric testing_mse --at 30 --save results/bit_widths.csv"
            " --map images/bit_widths.png"
            " --title 'boston, linear regression, 30 epochs: testing MSE by the bits of every number'",
        ),
    ),
    "sums": experiment("sums", "error growth of sums (Connolly et al. 2021)"),
    "stagnation": experiment("stagnation", "harmonic series and heat equation (Croci et al. 2022)"),
    "biased": experiment("biased", "biased stochastic rounding (Xia et al. 2021, 2022)"),
    "averaging": experiment("averaging", "averaged weights (Yang et al. 2019)"),
    "fixed_point": experiment("fixed_point", "16-bit fixed point (Gupta et al. 2015)"),
    "bfloat16_weights": experiment("bfloat16_weights", "bfloat16 weights (Zamirai et al. 2020)"),
    "stall": experiment("stall", "why float8 to nearest stalls on boston: lost updates by step"),
    "advice": experiment("advice", "following what watched runs are advised"),
    "transformer": experiment("transformer", "where a small transformer loses in 4-bit products"),
    "shakespeare": Section(
        "a small GPT under the recipes of the field, 2,000 steps, five seeds of each setting",
        MINUTES["shakespeare"],
        (
            f"{GPT} --precision float32",
            f"{GPT} --site 'products=bfloat16,head/*=float32'",
            f"{GPT} --recipe te-current,ao-rowwise,deepseek,mxfp8,mxfp4-rht,quartet,int8 --site 'head/*=float32'",
            f"{GPT} --recipe nvfp4 --site 'head/*=float32,blocks.3/*=float32'",
            "python report.py runs/shakespeare --metric testing_loss --save results/shakespeare.csv"
            " --figure images/shakespeare.png"
            " --title 'tiny Shakespeare, GPT of 4 blocks, 2,000 steps: testing loss by recipe'",
        ),
    ),
    "parts": experiment("parts", "the GPT: which parts NVFP4, MXFP8 and MXFP4 need, 1,000 steps, five seeds"),
    "widened": experiment("widened", "the GPT: where it loses in 4-bit products, 300 steps, three seeds"),
    "cifar10": Section(
        "ResNet-20 on CIFAR-10, 15 epochs, one seed of each setting, a thread for each run",
        MINUTES["cifar10"],
        (
            f"{CIFAR10} --precision float32",
            f"{CIFAR10} --precision float8 --rounding nearest,stochastic --loss-scale 1000",
            f"{CIFAR10} --recipe qtorch-tutorial --rounding nearest,stochastic",
            f"{CIFAR10} --recipe qtorch-tutorial --rounding stochastic --site 'activations=float16;"
            "weights=float8:nearest;weights=float8:nearest,activations=float16'",
            f"{CIFAR10} --precision float16 --loss-scale 1000",
            f"{CIFAR10} --recipe ocp-fp8,bfloat16,bfloat16-stochastic,swalp",
            "python report.py runs/cifar10 --metric testing_accuracy --save results/cifar10.csv"
            " --figure images/cifar10_results.png"
            " --title 'CIFAR-10, ResNet-20, 15 epochs: testing accuracy by what is rounded'",
        ),
    ),
    "page": Section(
        "pictures of a page of runs; they need chromium, and playwright of requirements-test.txt",
        MINUTES["page"],
        (
            "python sweep.py --dataset digits --model resnet20 --learning-rate 0.05 --momentum 0.9 --batch-size 64"
            " --epochs 4 --seed 0:3 --precision float32,float8,nvfp4 --rounding nearest,stochastic --watch 4"
            " --watch-also mxfp8_e4m3 --shadow --output-dir runs/page",
            "python bench/page.py runs/page --repeats 0 --pictures images",
        ),
    ),
}


def listing() -> str:
    lines = ["Sections (minutes on two cores), or: all"]
    if Path.cwd() != ROOT:
        lines.append(f"\nfirst:\n  cd {shlex.quote(str(ROOT))}")
    for name, section in SECTIONS.items():
        lines.append(f"\n{name} ({section.minutes:g} min): {section.about}")
        lines += [f"  {printed(text)}" for text in section.commands]
    return "\n".join([*lines, f"\nafter each:\n  {printed(REPORT)}"])


def printed(text: str) -> str:
    """A command of this file as a shell takes it in ROOT."""
    with contextlib.chdir(ROOT):
        return command(*shlex.split(text.removeprefix(PYTHON)))


def run(text: str) -> int:
    print(f"+ {printed(text)}", flush=True)
    return subprocess.run([sys.executable, *shlex.split(text.removeprefix(PYTHON))], cwd=ROOT).returncode


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="reproduce.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}, or all")
    known, flags = parser.parse_known_args(argv)
    names = known.sections + flags
    if unknown := [name for name in names if name not in (*SECTIONS, "all")]:
        allowed = [*SECTIONS, "all"]
        error = SettingError(None, shown(unknown[0]), ", ".join(allowed), nearest(unknown[0], allowed))
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2
    if not names:
        print(listing())
    for name in SECTIONS if "all" in names else names:
        started = time.monotonic()
        for text in (*SECTIONS[name].commands, REPORT):
            if status := run(text):
                again = command("reproduce.py", name)
                print(f"reproduce.py: {name} ended with {status}; to go on: {again}", file=sys.stderr)
                return status
        print(f"{name}: {(time.monotonic() - started) / 60:.1f} min", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
