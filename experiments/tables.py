"""The two tables of the fifteen experiments in README: python experiments/tables.py single, or published

single      linear regression, 30 epochs, seed 42, every number rounded: the final training and testing MSE
published   the same with `--recipe published`, beside the digits that the original experiments printed; of stochastic
            rounding the median (smallest - largest) of 200 rounding seeds. The originals divided the testing MSE by the
            number of test rows once more, so it is divided here too.

Records go to runs/single and runs/published, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from claims import by_rule, save, trained

BATCH = {"toy": 32, "boston": 512, "diabetes": 512}
TEST_ROWS = {"toy": 3, "boston": 102, "diabetes": 89}
SEEDS = 200
PUBLISHED = {  # training MSE and testing MSE / rows, as printed by the original experiments; diabetes had none
    "toy float32": ("0.2312", "0.0846"),
    "toy float16 nearest": ("0.2311", "0.08461"),
    "toy float16 stochastic": ("0.2312", "0.08461"),
    "toy float8 nearest": ("0.2294", "0.08281"),
    "toy float8 stochastic": ("0.22", "0.08932"),
    "boston float32": ("0.5221", "0.004211"),
    "boston float16 nearest": ("0.5221", "0.004212"),
    "boston float16 stochastic": ("0.5222", "0.00421"),
    "boston float8 nearest": ("0.53", "0.004204"),
    "boston float8 stochastic": ("0.5219", "0.00418"),
}
RULES = {  # by what the tables call them
    "float32": "float32",
    "float16 nearest": "float16:nearest",
    "float16 stochastic": "float16:stochastic",
    "float8 nearest": "float8:nearest",
    "float8 stochastic": "float8:stochastic",
}
PRECISIONS = "--precision float32,float16,float8 --rounding nearest,stochastic"


def single() -> list[list[str]]:
    from low_precision.rules import rule_of

    settings = {
        dataset: by_rule(trained("runs/single", f"--dataset {dataset} --epochs 30 --batch-size {batch} {PRECISIONS}"))
        for dataset, batch in BATCH.items()
    }
    lines = [["setting", *BATCH]]
    for name, rule in RULES.items():
        runs = [settings[dataset][rule_of(rule)].runs[0] for dataset in BATCH]
        lines.append([name, *(f"{run.value('training_mse'):.4f} / {run.value('testing_mse'):.4f}" for run in runs)])
    return lines


def published() -> list[list[str]]:
    from low_precision.rules import rule_of

    lines = [["run", "training MSE, published", "ours", "testing MSE as printed", "ours, divided likewise"]]
    for dataset, batch in BATCH.items():
        common = f"--recipe published --dataset {dataset} --epochs 30 --batch-size {batch}"
        settings = trained(
            "runs/published",
            f"{common} --precision float32,float16,float8",
            f"{common} --precision float16,float8 --rounding stochastic --rounding-seed 0:{SEEDS}",
        )
        settings_by_rule = by_rule(settings, ("activations", "errors"))
        for name, rule in RULES.items():
            setting = settings_by_rule[rule_of(rule)]
            testing = [value / TEST_ROWS[dataset] for value in setting.values("testing_mse")]
            printed = PUBLISHED.get(f"{dataset} {name}", ("-", "-"))
            cells = [printed[0], _spread(setting.values("training_mse")), printed[1], _spread(testing)]
            lines.append([f"{dataset} {name}", *cells])
    return lines


def _spread(values: list[float]) -> str:
    text = f"{statistics.median(values):.4g}"
    return text if len(values) == 1 else f"{text} ({min(values):.4g} - {max(values):.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("single", "published"))
    parser.add_argument("--save", type=Path, required=True, help="a CSV file")
    asked = parser.parse_args()
    lines = {"single": single, "published": published}[asked.table]()
    save(lines, asked.save)
    print(asked.save.read_text(), end="")


if __name__ == "__main__":
    main()
