"""bfloat16 weights: to nearest, stochastically, with Kahan summation: python experiments/bfloat16_weights.py

Zamirai, Zhang, Aberger and De Sa 2020 (arXiv:2010.06192), its abstract. Digits, `--model cnn`, everything in bfloat16
(the recipes bfloat16, bfloat16-stochastic and bfloat16-kahan) beside float32: 40 epochs, batches of 64, learning rate
0.01; 10 seeds of each. Records go to runs/bfloat16_weights, and what is there is not run again.
"""

from __future__ import annotations

import statistics

from claims import Claims, spread, trained

COMMON = "--dataset digits --batch-size 64 --learning-rate 0.01"
NAMES = {
    "bfloat16 nearest": "nearest",
    "bfloat16 nearest; weights bfloat16 stochastic": "stochastic",
    "bfloat16 nearest; compensation bfloat16 nearest": "Kahan",
}


def main() -> None:
    import report

    with Claims(__doc__) as claims:
        seeds, epochs = (2, 1) if claims.given.quick else (10, 40)
        common = f"{COMMON} --seed 0:{seeds} --epochs {epochs}"
        runs = trained(
            "runs/bfloat16_weights", f"{common} --recipe bfloat16,bfloat16-stochastic,bfloat16-kahan", common
        )
        difference = {
            short: [100 * d for d in report.pairs(runs[name], runs["float32"], "testing_accuracy")]
            for name, short in NAMES.items()
        }
        mean = {short: statistics.fmean(d) for short, d in difference.items()}

        def told(short: str) -> str:
            ends = report.interval(difference[short])
            return f"{short} {mean[short]:+.2f}" + (f" [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else "")

        loss = {short: spread(runs[name], "training_loss") for name, short in NAMES.items()}
        claims.add(
            "nearest rounding of weight updates often cancels small updates, which degrades convergence and accuracy",
            f"training loss, median and 5 to 95 % of {seeds} seeds: float32 "
            f"{spread(runs['float32'], 'training_loss')}, "
            f"nearest {loss['nearest']}; points of testing accuracy against float32, mean and 95 % interval: "
            f"{told('nearest')}",
            mean["nearest"] < -0.5 and (report.interval(difference["nearest"]) or (0, 0))[1] < 0,
        )
        claims.add(
            "stochastic rounding and Kahan summation remedy it: 0.1 % lower to 0.2 % higher accuracy than 32-bit "
            "training",
            f"training loss: stochastic {loss['stochastic']}, Kahan {loss['Kahan']}; points of testing accuracy "
            f"against float32: {told('stochastic')}, {told('Kahan')}",
            all(-0.1 <= mean[short] <= 0.2 for short in ("stochastic", "Kahan")),
        )
        if claims.given.figure:
            from analysis import figures

            every = [run for group in runs.values() for run in group]
            figures.curves(every, "training_loss", claims.given.figure, "digits in bfloat16")


if __name__ == "__main__":
    main()
