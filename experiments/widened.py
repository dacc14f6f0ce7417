"""Where a small GPT loses under 4-bit products, and whether the watch knows: python experiments/widened.py

The question of transformer.py, on README's GPT on tiny Shakespeare with its settings of training, in 300 steps. Every
operand of every product, attention's and the head's too, is rounded, and one item at a time is widened: ranking.py says
how.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from claims import Claims, small_training, trained_runs
from ranking import ALL, FLOAT32, FORMATS, WIDER, Ranking

from reproduce import GPT_TRAINING

STEPS, WATCH_EVERY = 300, 50
SEEDS = (0, 1, 2)
LAYERS = (*(f"blocks.{number}" for number in range(4)), "head")
FOLDER = "runs/shakespeare-widened"


def commands(
    ranking: Ranking, formats: Sequence[str], chosen: Sequence[str], training: str, steps: int
) -> dict[tuple[str, str, int], str]:
    """By (format, item, seed) the arguments of its run; the runs in which nothing is widened are watched."""
    asked = {}
    for seed in ranking.seeds:
        common = f"{training} --steps {steps} --evaluate-every {steps} --seed {seed}"
        asked[FLOAT32, ALL, seed] = f"{common} --precision float32"
        for name in formats:
            asked[name, ALL, seed] = f"{common} --site products={name} --watch {WATCH_EVERY}"
            for item in chosen:
                asked[name, item, seed] = f"{common} --site products={name},{item}={WIDER}"
    return asked


def main() -> None:
    with Claims(__doc__) as claims:
        quick = claims.asked.quick
        formats, seeds, steps = (FORMATS[:1], SEEDS[:1], 2) if quick else (FORMATS, SEEDS, STEPS)
        ranking = Ranking(LAYERS, seeds)
        items = ranking.items()
        chosen = [*items[:3], *items[-3:]] if quick else items
        training = small_training(GPT_TRAINING, FOLDER) if quick else GPT_TRAINING
        asked = commands(ranking, formats, chosen, training, steps)
        everything = []
        for (name, item, seed), (run,) in zip(asked, trained_runs(FOLDER, *asked.values()), strict=True):
            everything.append(run)
            loss = run.value("testing_loss")
            ranking.loss[name, item, seed] = math.inf if loss is None else loss
            if item == ALL and name != FLOAT32 and run.folder:
                lines = (run.folder / "layers.jsonl").read_text().splitlines()
                ranking.watched(name, seed, [json.loads(line) for line in lines])
        if claims.asked.save:
            from analysis import runs as records

            records.save(everything, claims.asked.save.with_name(f"{claims.asked.save.stem}_runs.csv"))
        for name in formats:
            ranking.tell(claims, name, chosen)
        if claims.asked.figure:
            ranking.draw(claims.asked.figure)


if __name__ == "__main__":
    main()
