"""Whether following the advice of a watched run helps: python experiments/advice.py

For each advice (lab/advice.py) a run that gets it, and the same run with each of the flags that the sentence names;
five seeds of each, none of which the thresholds were set on, watched in every 20th step (boston: in every step).
The advice must come, with these flags, at each seed; following it must take back more than half of what was lost
against float32; and the runs that follow it, and float32, must be told nothing. The testing loss, median and range
over the seeds. boston is linear regression in whole batches, 30 epochs, the scalers fitted on all rows; digits an MLP
of two hidden layers, 5 epochs of batches of 64 with the learning rate 0.1 (for the errors 256 and 0.3), and for adam
the data set's own convolutions.
"""

from __future__ import annotations

import json
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

from claims import Claims

BOSTON = "--dataset boston --epochs 30 --batch-size 512 --scale-on all --watch 1"
DIGITS = "--dataset digits --model mlp --epochs 5 --batch-size 64 --learning-rate 0.1 --watch 20"
ADAM = "--dataset digits --optimizer adam --learning-rate 0.001 --batch-size 64 --epochs 5 --watch 20"
FIRST_SEED = 30
MOMENTUM = DIGITS.replace("0.1", "0.03") + " --momentum 0.9"
LARGE = "--dataset digits --model mlp --epochs 5 --batch-size 256 --learning-rate 0.3 --watch 20"


@dataclass(frozen=True)
class Case:
    """about: what goes wrong. word: of the sentence. wrong, followed: the flags of the run, and those it is advised."""

    about: str
    word: str
    common: str
    wrong: str
    followed: tuple[str, ...]


CASES = (
    Case(
        "lost updates: boston, every site in float8, to nearest",
        "updates were lost",
        BOSTON,
        "--precision float8",
        ("--rounding stochastic", "--site accumulator=float16"),
    ),
    Case(
        "lost updates: digits, every site in float8, to nearest",
        "updates were lost",
        DIGITS,
        "--precision float8",
        ("--rounding stochastic", "--site accumulator=float16"),
    ),
    Case(
        "lost updates: digits, every site in nvfp4, to nearest",
        "lost",
        DIGITS,
        "--precision nvfp4",
        ("--rounding stochastic", "--site accumulator=float16"),
    ),
    Case(
        "weights that are zero: digits, weights in int8",
        "all of them are zero",
        DIGITS,
        "--precision int8 --quantize weights",
        ("--site weights=int8@tensor",),
    ),
    Case(
        "flushed to zero: digits, errors in float8_e4m3fn",
        "became zero",
        LARGE,
        "--precision float8_e4m3fn --quantize errors",
        ("--loss-scale dynamic", "--site errors=float8_e4m3fn@tensor"),
    ),
    Case(
        "saturated: digits, activations in fixed8.6",
        "are beyond",
        DIGITS,
        "--precision fixed8.6 --quantize activations",
        ("--site activations=int8@tensor",),
    ),
    Case(
        "saturated: digits, errors in float8_e4m3fn, loss times 1,000,000",
        "are beyond",
        DIGITS,
        "--precision float8_e4m3fn --quantize errors --loss-scale 1000000",
        ("--loss-scale dynamic",),
    ),
    Case(
        "second moment: digits, every site in float8, stochastically, adam",
        "divided by its root",
        ADAM,
        "--precision float8 --rounding stochastic",
        ("--site momentum.exp_avg_sq=bfloat16",),
    ),
    Case(
        "rounded to one side: digits, what flows in float8, toward zero",
        "on average",
        DIGITS,
        "--precision float8 --quantize inputs,activations,errors --rounding toward_zero",
        ("--rounding nearest", "--rounding stochastic"),
    ),
    Case(
        "rounded to one side: digits, weights in bfloat16, toward zero",
        "in each of",
        DIGITS,
        "--precision bfloat16 --rounding toward_zero --quantize weights",
        ("--rounding nearest", "--rounding stochastic"),
    ),
    Case(
        "one site: digits, operands of the forward products in fixed8.2",
        "signal-to-noise",
        DIGITS,
        "--precision fixed8.2 --quantize forward.inputs,forward.weights",
        ("--site forward.weights=bfloat16",),
    ),
    Case(
        "not finite: digits, every site in fp16 with infinities, loss times 10,000,000",
        "not finite",
        DIGITS,
        "--precision fp16 --overflow infinity --loss-scale 10000000",
        ("--loss-scale dynamic",),
    ),
)
QUIET = (  # what rounding does not harm, and what the thresholds must leave alone
    (BOSTON.replace("30", "500"), "--precision float16"),  # its last updates, which are tiny, are all lost
    (BOSTON, "--precision bfloat16"),
    (DIGITS, "--precision float16"),
    (DIGITS, "--precision bfloat16"),
    (DIGITS, "--precision fp16 --loss-scale dynamic"),
    (DIGITS, "--precision float8_e4m3fn --rounding stochastic"),  # most errors become zero, and their mean is right
    (DIGITS, "--precision fixed16.8 --rounding stochastic"),
    (DIGITS, "--precision nvfp4 --quantize products"),
    (DIGITS, "--precision mxfp8_e4m3 --quantize products"),
    (ADAM, "--precision bfloat16"),
    (ADAM, "--recipe adam8bit"),
    (ADAM, "--recipe coat"),
    (ADAM, "--recipe nvfp4"),
    (MOMENTUM, "--recipe qtorch-tutorial"),
    (MOMENTUM, "--recipe bfloat16-kahan"),
)


def joined(common: str, flags: str, more: str = "") -> str:
    """Each flag once, the last one."""
    words = shlex.split(f"{common} {flags} {more}")
    chosen = dict(zip(words[::2], words[1::2], strict=True))
    return " ".join(f"{flag} {value}" for flag, value in chosen.items())


def runs(folder: str, flags: str, seeds: int) -> tuple[list[float], list[list[str]]]:
    """The testing losses by seed, infinite where the run diverged, and what each is advised."""
    import sweep
    from lab.advice import advice

    command = f"{flags} --seed {FIRST_SEED}:{FIRST_SEED + seeds} --output-dir {folder}"
    configs, options = sweep.grid(shlex.split(command))
    if failures := sweep.run(configs, options.jobs):
        raise RuntimeError(str(failures))
    losses, advised = [], []
    for config in configs:
        record = Path(folder) / config.folder_name
        summary = json.loads((record / "summary.json").read_text())
        loss = summary.get("testing_mse", summary.get("testing_loss"))
        losses.append(float("inf") if loss is None or summary["status"] == "diverged" else loss)
        advised.append(advice(config, map(json.loads, (record / "layers.jsonl").read_text().splitlines())))
    return losses, advised


def spread(losses: list[float]) -> str:
    return f"{statistics.median(losses):.3g} ({min(losses):.3g} - {max(losses):.3g})"


def main() -> None:
    with Claims(__doc__) as claims:
        seeds = 1 if claims.asked.quick else 5
        quiet, shown = 0, []
        for case in CASES[:3] if claims.asked.quick else CASES:
            baseline, silent = runs("runs/advice", case.common, seeds)
            wrong, advised = runs("runs/advice", joined(case.common, case.wrong), seeds)
            named = [next((text for text in sentences if case.word in text), "") for sentences in advised]
            told = sum(bool(text) and all(flag in text for flag in case.followed) for text in named)
            texts, good, repeated = [], told == seeds, sum(map(bool, silent))
            dots = {"float32": baseline, "the run": wrong}
            for more in case.followed:
                followed, after = runs("runs/advice", joined(case.common, case.wrong, more), seeds)
                texts.append(f"{more} {spread(followed)}")
                dots[more] = followed
                lost = [loss - least for loss, least in zip(wrong, baseline, strict=True)]
                left = [loss - least for loss, least in zip(followed, baseline, strict=True)]
                good &= all(rest < 0.5 * loss for rest, loss in zip(left, lost, strict=True))
                repeated += sum(map(bool, after))
            sentence = next(filter(None, named), "nothing")
            claims.add(
                f"{case.about}: following the advice takes back more than half of the loss, at each seed",
                f"told at {told} of {seeds} seeds, as: {sentence}. Testing loss, median and range: float32"
                f" {spread(baseline)}, the run {spread(wrong)}, {', '.join(texts)}. Float32 and the runs that follow it"
                f" are told something {repeated} times",
                good,
            )
            quiet += repeated
            shown.append((case.about, dots))
        for common, flags in QUIET[:1] if claims.asked.quick else QUIET:
            _, advised = runs("runs/advice", joined(common, flags), seeds)
            quiet += sum(map(bool, advised))
        claims.add(
            "a run that rounding does not harm is told nothing",
            f"float32, the runs above that follow an advice, and {len(QUIET)} other settings, {seeds} seeds of each:"
            f" something is told {quiet} times",
            quiet == 0,
        )
        if claims.asked.figure:
            draw(shown, claims.asked.figure)


def draw(shown: list[tuple[str, dict[str, list[float]]]], path: Path) -> None:
    """A panel for each case: the testing losses by seed of float32, the run, and those that follow its advice."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from analysis import figures

    rows = (len(shown) + 1) // 2
    chart, panels = figures.pyplot().subplots(rows, 2, figsize=(12, 1.6 * rows), layout="constrained", squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.axis("off")
    for axes, (about, dots) in zip(panels.flat, shown, strict=False):
        for number, losses in enumerate(dots.values()):
            finite = [loss for loss in losses if loss < float("inf")]
            colour = figures.COLOURS[min(number, 3)]
            axes.plot(finite, [number] * len(finite), "o", alpha=0.6, color=colour)
            if len(finite) < len(losses):
                axes.annotate("diverged", (0.5, number), xycoords=("axes fraction", "data"), color=colour, va="center")
        losses = [loss for of_run in dots.values() for loss in of_run if loss < float("inf")]
        axes.set(yticks=range(len(dots)), yticklabels=dots, ylim=(len(dots) - 0.5, -0.5), xscale="log")
        axes.set_xlim(min(losses) / 1.3, max(losses) * 1.3)
        subs = (1,) if max(losses) > 100 * min(losses) else (1, 2, 3, 5)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(about, fontsize="small", loc="left", x=-0.3)
        axes.tick_params(labelsize="x-small")
    figures.store(chart, path)


if __name__ == "__main__":
    main()
