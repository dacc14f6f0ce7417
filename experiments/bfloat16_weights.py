"""bfloat16 weights: to nearest, stochastically, with Kahan summation: python experiments/bfloat16_weights.py

Zamirai, Zhang, Aberger and De Sa 2020 (arXiv:2010.06192), its abstract. Digits, `--model cnn`, everything in bfloat16
(the recipes bfloat16, bfloat16-stochastic and bfloat16-kahan) beside float32: 40 epochs, batches of 64, learning rate
0.01; 10 seeds of each. Records go to runs/bfloat16_weights, and what is there is not run again.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from claims import Claims, spread, trained

if TYPE_CHECKING:
    from analysis.runs import Setting

COMMON = "--dataset digits --batch-size 64 --learning-rate 0.01"


def update_of(setting: Setting) -> str:
    """How the weights are updated: in float32, to nearest, stochastically, or with Kahan summation."""
    from low_precision.rounding import is_random

    rules = setting.rules
    if not rules:
        return "float32"
    if "compensation" in rules:
        return "Kahan"
    return "stochastic" if is_random(rules["weights"].rounding) else "nearest"


def main() -> None:
    from analysis import tables

    with Claims(__doc__) as claims:
        seeds, epochs = (2, 1) if claims.asked.quick else (10, 40)
        common = f"{COMMON} --seed 0:{seeds} --epochs {epochs}"
        settings = trained(
            "runs/bfloat16_weights", f"{common} --recipe bfloat16,bfloat16-stochastic,bfloat16-kahan", common
        )
        by_update = {update_of(setting): setting for setting in settings}
        float32 = by_update["float32"].runs
        difference = {
            update: [100 * d for d in tables.pairs(setting.runs, float32, "testing_accuracy")]
            for update, setting in by_update.items()
        }
        mean = {update: statistics.fmean(d) for update, d in difference.items()}

        def points(update: str) -> str:
            ends = tables.interval(difference[update])
            return f"{update} {mean[update]:+.2f}" + (f" [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else "")

        loss = {update: spread(setting, "training_loss") for update, setting in by_update.items()}
        claims.add(
            "nearest rounding of weight updates often cancels small updates, which degrades convergence and accuracy",
            f"training loss, median and 5 to 95 % of {seeds} seeds: float32 "
            f"{loss['float32']}, "
            f"nearest {loss['nearest']}; points of testing accuracy against float32, mean and 95 % interval: "
            f"{points('nearest')}",
            mean["nearest"] < -0.5 and (tables.interval(difference["nearest"]) or (0, 0))[1] < 0,
        )
        claims.add(
            "stochastic rounding and Kahan summation remedy it: 0.1 % lower to 0.2 % higher accuracy than 32-bit "
            "training",
            f"training loss: stochastic {loss['stochastic']}, Kahan {loss['Kahan']}; points of testing accuracy "
            f"against float32: {points('stochastic')}, {points('Kahan')}",
            all(-0.1 <= mean[update] <= 0.2 for update in ("stochastic", "Kahan")),
        )
        if claims.asked.figure:
            from analysis import figures

            every = [run for setting in settings for run in setting.runs]
            title = "digits, cnn, bfloat16: training loss by the update of the weights"
            figures.curves(every, "training_loss", claims.asked.figure, title)


if __name__ == "__main__":
    main()
