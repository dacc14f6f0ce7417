"""16-bit fixed point, to nearest and stochastically, on digits: python experiments/fixed_point.py

Gupta, Agrawal, Gopalakrishnan and Narayanan 2015 (arXiv:1502.02551), its abstract. The network is `--model cnn`, every
number of the training in fixed16.F, F bits behind the point: 20 epochs, batches of 64, learning rate 0.1; 10 seeds of
each setting. Records go to runs/fixed_point, and what is there is not run again.
"""

from __future__ import annotations

import statistics

from claims import Claims, by_rule, spread, trained

COMMON = "--dataset digits --batch-size 64 --learning-rate 0.1"


def main() -> None:
    from low_precision.rules import rule_of

    with Claims(__doc__) as claims:
        seeds, epochs = (2, 1) if claims.asked.quick else (10, 20)
        formats = ("fixed16.8", "fixed16.10", "fixed16.12")
        common = f"{COMMON} --seed 0:{seeds} --epochs {epochs}"
        settings = trained(
            "runs/fixed_point",
            f"{common} --precision float32,{','.join(formats)} --rounding nearest,stochastic",
        )
        settings_by_rule = by_rule(settings)

        def accuracy(rule: str) -> str:
            return spread(settings_by_rule[rule_of(rule)], "testing_accuracy", 100, ".1f")

        def median(rule: str) -> float:
            return 100 * statistics.median(settings_by_rule[rule_of(rule)].values("testing_accuracy"))

        few = f"testing accuracy in %, median and 5 to 95 % of {seeds} seeds"
        claims.add(
            "deep networks can be trained in 16-bit fixed point with stochastic rounding, with little to no "
            "degradation",
            f"{few}: float32 {accuracy('float32')}; stochastic "
            + ", ".join(f"{name} {accuracy(f'{name}:stochastic')}" for name in formats[:2]),
            all(median(f"{name}:stochastic") > median("float32") - 1 for name in formats[:2]),
        )
        claims.add(
            "the rounding scheme plays a crucial role",
            f"{few}: to nearest " + ", ".join(f"{name} {accuracy(f'{name}:nearest')}" for name in formats[:2]),
            all(median(f"{name}:nearest") < median(f"{name}:stochastic") - 5 for name in formats[:2]),
        )
        worst = formats[2]
        claims.add(
            "(our own question) do more bits behind the point help?",
            f"with 12, so that numbers end at ±8: stochastic "
            f"{accuracy(f'{worst}:stochastic')}, nearest {accuracy(f'{worst}:nearest')}",
            median(f"{worst}:stochastic") > median("float32") - 1,
        )
        if claims.asked.figure:
            from analysis import figures

            every = [run for setting in settings for run in setting.runs]
            title = "digits, cnn, 16-bit fixed point: testing accuracy by format and rounding of every number"
            figures.curves(every, "testing_accuracy", claims.asked.figure, title)


if __name__ == "__main__":
    main()
