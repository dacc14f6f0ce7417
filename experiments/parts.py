"""Which parts NVFP4, MXFP8 and MXFP4 need, on a small GPT: python experiments/parts.py

The model is README's GPT on tiny Shakespeare with its settings of training, in 1,000 steps. Each part of a recipe is
left out or replaced, all else being the same; at the same seed, the runs share initial weights and batches. What a part
does is the difference of two testing losses, over five such pairs: its mean, with the 95 % interval of Student's t.

A claim that something is worse holds where the interval lies above zero, and does not where it lies below. A claim that
two are alike holds where the interval lies within a bound, and does not where it lies beyond: the bound stands in the
claim, and where its paper has none, it is ours. In all other cases the size of this experiment does not decide.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from claims import Claims, small_training, trained_runs

from reproduce import GPT_TRAINING

STEPS, SEEDS = 1000, 5
FOLDER = "runs/shakespeare-parts"
METRIC = "testing_loss"

HEAD = "head/*=float32"
WIDE = f"{HEAD},blocks.3/*=float32"
STOCHASTIC = "float4_e2m1fn@16x16@float8_e4m3fn:stochastic:8"
SETTINGS = {
    "float32": "--precision float32",
    "te-current": f"--recipe te-current --site {HEAD}",
    "nvfp4": f"--recipe nvfp4 --site {WIDE}",
    "no transform": f"--recipe nvfp4 --transform wgrad=none --site {WIDE}",
    "no signs": f"--recipe nvfp4 --transform wgrad=hadamard16:bfloat16 --site {WIDE}",
    "fresh signs": f"--recipe nvfp4 --transform wgrad=hadamard16:random:bfloat16 --site {WIDE}",
    "errors to nearest": f"--recipe nvfp4 --site dgrad.errors=nvfp4,wgrad.errors=nvfp4,{WIDE}",
    "stochastic weights": f"--recipe nvfp4 --site forward.weights={STOCHASTIC},{WIDE}",
    "weights in 1x16": f"--recipe nvfp4 --site forward.weights=nvfp4,dgrad.weights=nvfp4,{WIDE}",
    "all blocks": f"--recipe nvfp4 --site {HEAD}",
    "all layers": "--recipe nvfp4",
    "mxfp8": f"--recipe mxfp8 --site {HEAD}",
    "mxfp8, floor": f"--site products=mxfp8_e4m3,{HEAD}",
    "mxfp4": f"--site products=mxfp4,{HEAD}",
    "mxfp4, no signs": f"--site products=mxfp4,{HEAD} --transform wgrad=hadamard32",
    "mxfp4, fresh signs": f"--site products=mxfp4,{HEAD} --transform wgrad=hadamard32:random",
}
QUICK = ("float32", "te-current", "nvfp4", "no transform", "no signs")


@dataclass(frozen=True)
class Claim:
    """That `other` ends higher than `base`, or, with `within`, no more than this share of base's loss away from it.

    within: a share, or the name of a setting: then it is a tenth of the gap between that one and `base`.
    """

    words: str
    other: str
    base: str = "nvfp4"
    within: float | str | None = None


NVIDIA, MISHRA, AMD, TSENG = "NVIDIA 2025", "Mishra et al. 2025", "AMD 2026", "Tseng et al. 2025"
CLAIMS = (
    Claim(f"NVFP4 ends within 1.5 % of FP8 ({NVIDIA})", "nvfp4", "te-current", within=0.015),
    Claim(f"without the Hadamard transform in wgrad it is worse ({NVIDIA})", "no transform"),
    Claim(f"with errors rounded to nearest it is worse ({NVIDIA})", "errors to nearest"),
    Claim(f"with weights rounded stochastically it is worse ({NVIDIA})", "stochastic weights"),
    Claim(f"with weights in blocks of 1x16, other ones on the way back, it is worse ({NVIDIA})", "weights in 1x16"),
    Claim(f"with the last block in FP4 too it is worse ({NVIDIA})", "all blocks"),
    Claim(f"with the last block and the head in FP4 too it is worse ({NVIDIA})", "all layers"),
    Claim(
        f"the signs of the transform do not matter: without any it is alike ({NVIDIA}, at small scale)",
        "no signs",
        within="float32",
    ),
    Claim(
        f"signs need not be drawn anew: with fresh ones it is alike ({NVIDIA}, at small scale)",
        "fresh signs",
        within="float32",
    ),
    Claim(f"MXFP8 ends where float32 does ({MISHRA}, of bfloat16)", "mxfp8", "float32", within=0.005),
    Claim(f"MXFP8 with OCP's scale, which is rounded down, is worse ({MISHRA})", "mxfp8, floor", "mxfp8"),
    Claim(
        f"MXFP4 is worse without a transform in wgrad than with one that has fresh signs ({TSENG})",
        "mxfp4",
        "mxfp4, fresh signs",
    ),
    Claim(
        f"MXFP4 is worse without a transform in wgrad than with one that has no signs ({AMD})",
        "mxfp4",
        "mxfp4, no signs",
    ),
    Claim(
        f"MXFP4 is worse with fresh signs in wgrad's transform than without signs ({AMD})",
        "mxfp4, fresh signs",
        "mxfp4, no signs",
    ),
)


def commands(training: str, steps: int, seeds: int, chosen: Sequence[str]) -> list[tuple[str, str]]:
    """(setting, the arguments of its run) of each seed in turn, so that what is there early is of whole pairs."""
    common = f"{training} --steps {steps} --evaluate-every {steps}"
    return [(name, f"{common} --seed {seed} {SETTINGS[name]}") for seed in range(seeds) for name in chosen]


def differences(other: Sequence[float], base: Sequence[float]) -> list[float]:
    """In pairs of the same seed; infinite or NaN where one diverged."""
    return [a - b for a, b in zip(other, base, strict=True)]


def verdict(low: float, high: float, bound: float | None) -> bool | None:
    """Of an interval of a difference: above zero, or with a bound, within it on either side. None: undecided."""
    if bound is None:
        inside, outside = low > 0, high < 0
    else:
        inside, outside = -bound < low and high < bound, low > bound or high < -bound
    return True if inside else False if outside else None


def tell(claims: Claims, claim: Claim, losses: dict[str, list[float]]) -> tuple[float, float, float]:
    """The interval of the difference: mean, low, high."""
    from analysis.tables import interval

    base, other = losses[claim.base], losses[claim.other]
    apart = differences(other, base)
    if all(map(math.isfinite, apart)):
        mean = statistics.fmean(apart)
        low, high = interval(apart) or (mean, mean)
    else:  # something diverged: where it is the base, nothing can be said
        mean = low = high = math.inf if all(map(math.isfinite, base)) else math.nan
    bound, why = None, ""
    if isinstance(claim.within, str):
        bound = abs(statistics.fmean(differences(base, losses[claim.within]))) / 10
        why = f". Alike: within {bound:.4f}, a tenth of the gap between {claim.base} and {claim.within}"
    elif claim.within is not None:
        bound = claim.within * statistics.fmean(base)
        why = f". The bound: {claim.within:.1%} of {claim.base}'s loss, {bound:.4f}"
    claims.add(
        claim.words,
        f"testing loss, mean of {len(base)} seeds: {claim.base} {statistics.fmean(base):.4f}, {claim.other}"
        f" {statistics.fmean(other):.4f} (`{SETTINGS[claim.other]}`). Difference {mean:+.4f} [{low:+.4f}, {high:+.4f}],"
        f" above zero at {sum(x > 0 for x in apart)} of {len(apart)} seeds{why}",
        verdict(low, high, bound),
    )
    return mean, low, high


def main() -> None:
    with Claims(__doc__) as claims:
        quick = claims.asked.quick
        steps, seeds = (2, 2) if quick else (STEPS, SEEDS)
        chosen = QUICK if quick else tuple(SETTINGS)
        training = small_training(GPT_TRAINING, FOLDER) if quick else GPT_TRAINING
        asked = commands(training, steps, seeds, chosen)
        losses: dict[str, list[float]] = {name: [] for name in chosen}
        everything = []
        for (name, _), runs in zip(asked, trained_runs(FOLDER, *(flags for _, flags in asked)), strict=True):
            everything += runs
            losses[name] += [math.inf if (loss := run.value(METRIC)) is None else loss for run in runs]
        if claims.asked.save:  # of each run too, which report.py reads
            from analysis import runs as records

            records.save(everything, claims.asked.save.with_name(f"{claims.asked.save.stem}_runs.csv"))
        told = [claim for claim in CLAIMS if {claim.other, claim.base} <= set(chosen)]
        intervals = [tell(claims, claim, losses) for claim in told]
        if claims.asked.figure:
            draw(told, intervals, losses, claims.asked.figure)


def draw(told: Sequence[Claim], intervals: Sequence[tuple[float, float, float]], losses: dict, path: Path) -> None:
    """A row for each claim: the differences of its pairs, their mean and its interval; a panel for each base's kind."""
    from analysis import figures

    panels: dict[str, list[int]] = {}
    for number, claim in enumerate(told):
        panels.setdefault(claim.other.split(",")[0] if claim.other.startswith("mxfp") else "nvfp4", []).append(number)
    heights = [len(rows) + 1 for rows in panels.values()]
    shape = {"figsize": (9, 0.42 * sum(heights) + 0.6), "height_ratios": heights}
    chart, axes_of = figures.pyplot().subplots(len(panels), 1, layout="constrained", squeeze=False, **shape)
    for axes, (name, rows) in zip(axes_of.flat, panels.items(), strict=True):
        for place, number in enumerate(rows):
            claim, (mean, low, high) = told[number], intervals[number]
            apart = [x for x in differences(losses[claim.other], losses[claim.base]) if math.isfinite(x)]
            axes.plot(apart, [place] * len(apart), "o", color=figures.COLOURS[5], alpha=0.7, markersize=4)
            if math.isfinite(mean):
                axes.plot([low, high], [place, place], color=figures.COLOURS[0], linewidth=1.5)
                axes.plot(mean, place, "|", color=figures.COLOURS[0], markersize=12)
        axes.axvline(0, color="gray", linewidth=1)
        labels = [f"{told[number].other} less {told[number].base}" for number in rows]
        axes.set(yticks=range(len(rows)), yticklabels=labels, ylim=(len(rows) - 0.5, -0.5), title=name)
        axes.tick_params(labelsize="small")
    chart.supxlabel("difference of testing losses at the same seed, mean and 95 % interval", fontsize="small")
    figures.store(chart, path)


if __name__ == "__main__":
    main()
