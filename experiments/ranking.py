"""Whether the watch knows what will help: noise as it is watched, against the loss that wider numbers take back.

Every operand of every product is rounded to a 4-bit format. Then one item at a time is widened to bfloat16: an operand
in the whole model, or a layer with all its operands. What an item recovers is the loss with all in the format less the
loss with that item in bfloat16, at the same seed. What the watch says of an item, and of an operand in one layer, is
the noise-to-signal ratio 10^(-sqnr/10) of its operands, the mean over the watched steps and the operands in it, from
runs in which nothing is widened. Spearman's rank correlation compares the two.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claims import Claims

FORMATS = ("mxfp4", "nvfp4")
WIDER = "bfloat16"
STATISTICS = ("noise", "bias", "saturated share", "flushed share")
ALL = "nothing"  # the run in which nothing is widened
FLOAT32 = "float32"


def operands_of(item: str) -> tuple[str, Sequence[str]]:
    """The layer that an item is in, "" for the whole model, and its operands."""
    from low_precision import OPERANDS

    layer, _, operand = item.rpartition("/")
    return layer, OPERANDS if operand == "*" else [operand]


def of_item(item: str, lines: Sequence[dict[str, Any]]) -> list[float]:
    """STATISTICS of an item: of the rounding of its operands, by the lines of a watch."""
    layer, operands = operands_of(item)
    inside = f"{layer}.", f"{layer}:"
    rows = [
        line
        for line in lines
        if line["site"] in operands and (not layer or line["layer"] == layer or line["layer"].startswith(inside))
    ]
    noise = [10 ** (-row["sqnr_db"] / 10) for row in rows if row["sqnr_db"] is not None]
    others = ([abs(row[name] or 0.0) for row in rows] for name in ("bias", "saturated", "flushed"))
    return [statistics.fmean(values) if values else 0.0 for values in (noise, *others)]


def rank_correlation(x: list[float], y: list[float]) -> tuple[float, float]:
    """Spearman's, and the share of all orders (of 20,000 where there are more than 7!) that have one as high."""
    import numpy as np
    from scipy import stats

    found = float(stats.spearmanr(x, y).statistic)
    if math.factorial(len(x)) <= 5040:
        orders = list(itertools.permutations(stats.rankdata(x)))
    else:
        generator = np.random.default_rng(1)
        orders = [generator.permutation(stats.rankdata(x)) for _ in range(20_000)]
    ranks = stats.rankdata(y)
    centred = (ranks - ranks.mean()) / ranks.std()
    all_of_them = np.array([(np.asarray(order) - np.mean(order)) / np.std(order) for order in orders]) @ centred
    return found, float(np.mean(all_of_them / len(ranks) >= found - 1e-9))


@dataclass
class Ranking:
    """layers: the names of a model's layers, whose parts count with them. seeds: of the runs.

    loss: by (format or FLOAT32, item or ALL, seed). said: STATISTICS by name, by (format, item or place, seed).
    """

    layers: tuple[str, ...]
    seeds: tuple[int, ...]
    loss: dict[tuple[str, str, int], float] = field(default_factory=dict)
    said: dict[tuple[str, str, int], dict[str, float]] = field(default_factory=dict)
    shown: dict[tuple[str, str], tuple[list[float], list[list[float]], list[str]]] = field(default_factory=dict)

    def items(self) -> list[str]:
        """What is widened, in the order of the runs: operands in the whole model, layers with all their operands."""
        from low_precision import OPERANDS

        return [*OPERANDS, *(f"{layer}/*" for layer in self.layers)]

    def places(self) -> list[str]:
        """One operand in one layer, of which the watch alone is asked."""
        from low_precision import OPERANDS

        return [f"{layer}/{operand}" for layer in self.layers for operand in OPERANDS]

    def watched(self, name: str, seed: int, lines: Sequence[dict[str, Any]]) -> None:
        """Keep what the watch of this run said of each item and place."""
        for item in (*self.items(), *self.places()):
            self.said[name, item, seed] = dict(zip(STATISTICS, of_item(item, lines), strict=True))

    def recovered(self, name: str, item: str) -> list[float]:
        """By seed: the loss without what is widened, less the loss with it."""
        return [self.loss[name, ALL, seed] - self.loss[name, item, seed] for seed in self.seeds]

    def mean(self, name: str, item: str, statistic: str) -> float:
        """Of what the watch said, over the seeds."""
        return statistics.fmean(self.said[name, item, seed][statistic] for seed in self.seeds)

    def tell(self, claims: Claims, name: str, chosen: Sequence[str]) -> None:
        """The claims of one format, of which `chosen` were widened."""
        whole, without = ([self.loss[key, ALL, seed] for seed in self.seeds] for key in (name, FLOAT32))
        kinds = {
            "operands": [item for item in chosen if not item.endswith("/*")],
            "layers": [item for item in chosen if item.endswith("/*")],
        }
        for kind, of_kind in kinds.items():
            if len(of_kind) < 3:
                continue
            gains = {item: self.recovered(name, item) for item in of_kind}
            means = [statistics.fmean(gains[item]) for item in of_kind]
            noise = {item: self.mean(name, item, STATISTICS[0]) for item in of_kind}
            texts = [
                f"{item.removesuffix('/*')} {noise[item]:.4f}, {statistics.fmean(gains[item]):.3f}"
                f" ({min(gains[item]):.3f} - {max(gains[item]):.3f})"
                for item in sorted(of_kind, key=lambda item: -noise[item])
            ]
            ranks = {
                statistic: rank_correlation([self.mean(name, item, statistic) for item in of_kind], means)
                for statistic in STATISTICS
            }
            self.shown[name, kind] = list(noise.values()), list(gains.values()), of_kind
            rho, p = ranks[STATISTICS[0]]
            others = ", ".join(f"of the {other} {rho:.2f}, p = {p:.2g}" for other, (rho, p) in list(ranks.items())[1:])
            claims.add(
                f"{name}, {kind}: what is noisiest by the watch recovers most when it is widened to bfloat16",
                f"loss of float32 {statistics.fmean(without):.3f}, of {name} {statistics.fmean(whole):.3f} (means of"
                f" {len(self.seeds)} seeds). Noise-to-signal ratio, and recovered loss, mean and range, the noisiest"
                f" first: {'; '.join(texts)}. Spearman's rank correlation over these {len(of_kind)}: {rho:.2f},"
                f" one-sided p = {p:.2g} (permutations). Not asked beforehand: {others}",
                rho > 0 and p < 0.05,
            )
        noise = {place: self.mean(name, place, STATISTICS[0]) for place in self.places()}
        first, *others = sorted(noise, key=lambda place: -noise[place])
        best = max(kinds["layers"], key=lambda item: statistics.fmean(self.recovered(name, item))).removesuffix("/*")
        claims.add(
            f"{name}: the layer that recovers most is the one with the noisiest operand",
            f"noise-to-signal ratios of {len(noise)} operands in single layers, mean of {len(self.seeds)} seeds: the"
            f" largest {', '.join(f'{place} {noise[place]:.4f}' for place in (first, *others[:3]))}; the median"
            f" {statistics.median(noise.values()):.4f}; the smallest {others[-1]} {noise[others[-1]]:.4f}."
            f" Widened to bfloat16, {best} recovers most",
            first.startswith(f"{best}/"),
        )

    def draw(self, path: Path) -> None:
        """For each format and kind: recovered loss, mean and range over the seeds, against noise-to-signal ratio."""
        from analysis import figures

        columns = max(1, len(self.shown) // len({name for name, _ in self.shown}))
        rows = -(-len(self.shown) // columns)
        chart, panels = figures.pyplot().subplots(
            rows, columns, figsize=(5.5 * columns, 4 * rows), layout="constrained", squeeze=False
        )
        for axes, ((name, kind), (values, gains, names)) in zip(panels.flat, self.shown.items(), strict=False):
            for x, by_seed, item in zip(values, gains, names, strict=True):
                y = statistics.fmean(by_seed)
                axes.plot([x, x], [min(by_seed), max(by_seed)], color=figures.COLOURS[1])
                axes.plot(x, y, "o", color=figures.COLOURS[1])
                axes.annotate(
                    item.removesuffix("/*"), (x, y), fontsize="x-small", xytext=(3, 3), textcoords="offset points"
                )
            axes.axhline(0, color="gray", linewidth=1)
            axes.margins(x=0.2, y=0.1)
            axes.locator_params(axis="x", nbins=5)
            axes.set(xlabel="noise-to-signal ratio", ylabel="recovered loss", title=f"{name}: {kind}")
        figures.store(chart, path)
