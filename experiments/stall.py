"""Why float8 to nearest stalls on boston: python experiments/stall.py

Linear regression on boston in whole batches, 30 epochs, the scalers fitted on all rows, every site rounded, ten seeds.
A run is watched in every step (`--watch 1`), with the same training in float32 beside it (`--shadow`): the share of
updates that rounding the weights undid, by step; the last step that moved any weight; and how far the weights are from
those of float32. Stochastic rounding and a float16 accumulator stand beside it, as the advice of the first run has it.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from claims import Claims

COMMON = "--dataset boston --epochs 30 --batch-size 512 --scale-on all --precision float8 --watch 1 --shadow"
SETTINGS = {
    "to nearest": "",
    "stochastic": "--rounding stochastic",
    "to nearest, float16 accumulator": "--site accumulator=float16",
}
STEPS, FIRST_SEED = 30, 10  # the thresholds of the advice were set on earlier ones


@dataclass(frozen=True)
class Watched:
    """Of one setting, by seed: the testing MSE, the advice, and by step what was lost and how far float32 is."""

    losses: list[float]
    advised: list[list[str]]
    lost: list[list[float]]  # of the accumulator, where there is one: what it keeps is not lost
    moved: list[int]
    distances: list[list[float]]


def watched(folder: str, flags: str, seeds: int) -> Watched:
    import sweep
    from lab.advice import advice

    configs, options = sweep.grid(
        f"{COMMON} {flags} --seed {FIRST_SEED}:{FIRST_SEED + seeds} --output-dir {folder}".split()
    )
    if failures := sweep.run(configs, options.jobs):
        raise RuntimeError(str(failures))
    found = Watched([], [], [], [], [])
    for config in configs:
        record = Path(folder) / config.folder_name
        summary = json.loads((record / "summary.json").read_text())
        found.losses.append(summary["testing_mse"])
        lines = [json.loads(line) for line in (record / "layers.jsonl").read_text().splitlines()]
        found.advised.append(advice(config, lines))
        kept = "accumulator" if "accumulator" in flags else "weights"
        rows = [line for line in lines if line["site"] == kept]
        found.lost.append([row["lost_updates"] for row in rows])
        found.moved.append(rows[-1]["last_moved"])
        shadow = [json.loads(line) for line in (record / "shadow.jsonl").read_text().splitlines()]
        found.distances.append([line["weights_distance"] for line in shadow if line["layer"] == "linear"])
    return found


def told(values: list[float], form: str = ".3g") -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def main() -> None:
    with Claims(__doc__) as claims:
        seeds = 2 if claims.asked.quick else 10
        by_name = {name: watched("runs/stall", flags, seeds) for name, flags in SETTINGS.items()}
        nearest, *others = by_name.values()
        at_steps = [
            f"step {step} {told([lost[step - 1] for lost in nearest.lost], '.0%')}" for step in (1, 2, 3, 5, 10, STEPS)
        ]
        stops = f"the last step that moved a weight: {told([float(step) for step in nearest.moved], '.0f')} of {STEPS}"
        claims.add(
            "boston, every site in float8 to nearest: at the end every update is lost, at each seed",
            f"updates lost, median and range of {seeds} seeds: {', '.join(at_steps)}; {stops}",
            all(lost[-1] == 1 for lost in nearest.lost),
        )
        claims.add(
            f"no weight moves in the second half of the {STEPS} steps, at each seed",
            stops,
            all(step <= STEPS / 2 for step in nearest.moved),
        )
        texts = [
            f"{name}: updates lost in step {STEPS} {told([lost[-1] for lost in found.lost], '.0%')}, testing MSE"
            f" {told(found.losses)}, weights off those of float32 by {told([d[-1] for d in found.distances], '.0%')}"
            for name, found in by_name.items()
        ]
        nearer = all(
            ours[-1] < theirs[-1] / 2
            for found in others
            for ours, theirs in zip(found.distances, nearest.distances, strict=True)
        )
        claims.add(
            "stochastic rounding and an accumulator stay beside float32: less than half as far from it, at each seed",
            "; ".join(texts),
            nearer,
        )
        counts = {name: sum(map(bool, found.advised)) for name, found in by_name.items()}
        claims.add(
            "the advice names both to the run that stalls, and says nothing to those that follow it",
            f"runs that are told something: {', '.join(f'{name} {n} of {seeds}' for name, n in counts.items())}; the"
            f" first one: {next(iter(nearest.advised[0]), 'nothing')}",
            [*counts.values()] == [seeds, 0, 0],
        )
        if claims.asked.figure:
            draw(by_name, claims.asked.figure)


def draw(by_name: dict[str, Watched], path: Path) -> None:
    from analysis import figures

    chart, (left, right) = figures.pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (name, found) in enumerate(by_name.items(), 1):
        for axes, by_seed in ((left, found.lost), (right, found.distances)):
            steps = range(1, len(by_seed[0]) + 1)
            values = list(zip(*by_seed, strict=True))
            axes.plot(steps, [100 * statistics.median(v) for v in values], label=name, **figures.nth_look(number))
            low, high = ([100 * end(v) for v in values] for end in (min, max))
            axes.fill_between(steps, low, high, alpha=0.2, color=figures.COLOURS[number])
    left.set(xlabel="step", ylabel="updates lost (%)", title="What rounding the weights undoes")
    right.set(xlabel="step", ylabel="distance (%)", title="Weights: distance from float32's")
    left.legend(fontsize="small")
    figures.store(chart, path)


if __name__ == "__main__":
    main()
