"""16-bit fixed point, to nearest and stochastically, on digits: python experiments/fixed_point.py

Gupta, Agrawal, Gopalakrishnan and Narayanan 2015 (arXiv:1502.02551), its abstract. The network is `--model cnn`, every
number of the training in fixed16.F, F bits behind the point: 20 epochs, batches of 64, learning rate 0.1; 10 seeds of
each setting. Records go to runs/fixed_point, and what is there is not run again.
"""

from __future__ import annotations

from claims import Claims, spread, trained

COMMON = "--dataset digits --batch-size 64 --learning-rate 0.1"


def main() -> None:
    with Claims(__doc__) as claims:
        seeds, epochs = (2, 1) if claims.given.quick else (10, 20)
        formats = ("fixed16.8", "fixed16.10", "fixed16.12")
        common = f"{COMMON} --seed 0:{seeds} --epochs {epochs}"
        runs = trained(
            "runs/fixed_point",
            f"{common} --precision float32,{','.join(formats)} --rounding nearest,stochastic",
        )
        told = {name: spread(group, "testing_accuracy", 100, ".1f") for name, group in runs.items()}
        value = {name: float(text.split()[0]) for name, text in told.items()}
        few = f"testing accuracy in %, median and 5 to 95 % of {seeds} seeds"
        claims.add(
            "deep networks can be trained in 16-bit fixed point with stochastic rounding, with little to no "
            "degradation",
            f"{few}: float32 {told['float32']}; stochastic "
            + ", ".join(f"{name} {told[f'{name} stochastic']}" for name in formats[:2]),
            all(value[f"{name} stochastic"] > value["float32"] - 1 for name in formats[:2]),
        )
        claims.add(
            "the rounding scheme plays a crucial role",
            f"{few}: to nearest " + ", ".join(f"{name} {told[f'{name} nearest']}" for name in formats[:2]),
            all(value[f"{name} nearest"] < value[f"{name} stochastic"] - 5 for name in formats[:2]),
        )
        worst = formats[2]
        claims.add(
            "(our own question) do more bits behind the point help?",
            f"with 12, so that numbers end at ±8: stochastic "
            f"{told[f'{worst} stochastic']}, nearest {told[f'{worst} nearest']}",
            value[f"{worst} stochastic"] > value["float32"] - 1,
        )
        if claims.given.figure:
            from analysis import figures

            every = [run for group in runs.values() for run in group]
            figures.curves(every, "testing_accuracy", claims.given.figure, "digits in 16-bit fixed point")


if __name__ == "__main__":
    main()
