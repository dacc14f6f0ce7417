"""Where a small transformer loses under 4-bit products, and whether the watch knows: python experiments/transformer.py

Four of torch's nn.TransformerEncoderLayer (width 128, 4 heads, pre-norm) learn to sort 16 symbols of 32, with AdamW, in
240 steps of 16 sequences; float32 gets from ln 32 = 3.47 nats a symbol to about 1. Every operand of every product,
attention's too, is rounded to nvfp4, or to mxfp4. Then one item at a time is widened to bfloat16: an operand in the
whole model, or a layer with all its operands. What an item recovers is the loss with all in the format less the loss
with that item in bfloat16, on 1,024 sequences that no run has trained on, with the same seed.
What the watch says of an item, and of an operand in one layer, is the noise-to-signal ratio 10^(-sqnr/10) of its
operands, the mean over the watched steps and the operands in it, from runs in which nothing is widened. Spearman's rank
correlation compares the two.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
import time
from pathlib import Path

from claims import Claims, save

SYMBOLS, TOKENS, BATCH, STEPS, WARMUP, RATE, TEST = 32, 16, 16, 240, 20, 1e-3, 1024
FORMATS = ("mxfp4", "nvfp4")
SEEDS = (1, 2, 3)
WIDER = "bfloat16"
LAYERS = (*(f"layers.{number}" for number in range(4)), "head")
WATCH_EVERY = 20
STATISTICS = ("noise", "bias", "saturated share", "flushed share")
ALL = "nothing"  # the run in which nothing is widened


def items() -> list[str]:
    """What is widened, in the order of the runs: operands in the whole model, layers with all their operands."""
    from low_precision import OPERANDS

    return [*OPERANDS, *(f"{layer}/*" for layer in LAYERS)]


def places() -> list[str]:
    """One operand in one layer, of which the watch alone is asked."""
    from low_precision import OPERANDS

    return [f"{layer}/{operand}" for layer in LAYERS for operand in OPERANDS]


def train(rule: str | None, item: str, seed: int, watch_every: int = 0) -> tuple[float, list[dict]]:
    """The loss on the test sequences after training, and what was watched.

    rule: of all operands; None for float32. item: of `items`, widened, or ALL.
    """
    import torch
    import torch.nn.functional as F

    import low_precision as lp
    from bench.step import Encoder

    torch.manual_seed(seed)
    model = Encoder(SYMBOLS, TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / WARMUP) * (1 - n / STEPS))
    watcher = None
    if rule:
        rules = dict.fromkeys(lp.OPERANDS, rule)
        pattern, _, site = item.rpartition("/")
        wider = dict.fromkeys(lp.OPERANDS if site == "*" else [site], WIDER)
        if item != ALL and not pattern:
            rules |= wider
        layers = {pattern: wider} if pattern else None
        lp.quantize_model(model, **rules, layers=layers, seed=seed, backend="fused")
        optimizer = lp.quantize_optimizer(optimizer, model)
        watcher = lp.watch(model, every=watch_every) if watch_every else None
    numbers = torch.Generator().manual_seed(1000 + seed)
    for _ in range(STEPS):
        x = torch.randint(SYMBOLS, (BATCH, TOKENS), generator=numbers)
        loss = F.cross_entropy(model(x).flatten(0, 1), x.sort(1).values.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    rows = watcher.rows() if watcher else []
    model.eval()
    test = torch.randint(SYMBOLS, (TEST, TOKENS), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        losses = [F.cross_entropy(model(x).flatten(0, 1), x.sort(1).values.flatten()) for x in test.split(128)]
    return float(torch.stack(losses).mean()), rows


def losses(
    path: Path, formats: tuple[str, ...], chosen: list[str], seeds: tuple[int, ...]
) -> dict[tuple[str, str, int], float]:
    """By (format, item, seed) the loss; what is in the file already is not trained again."""
    head = ("format", "widened", "seed", "testing_loss")
    rows = [tuple(row) for row in csv.reader(path.open())][1:] if path.exists() else []
    known = {(name, item, int(seed)): float(loss) for name, item, seed, loss in rows}
    todo = [("float32", ALL, seed) for seed in seeds]
    todo += [(name, item, seed) for item in (ALL, *chosen) for seed in seeds for name in formats]
    for name, item, seed in todo:
        if (name, item, seed) not in known:
            started = time.monotonic()
            loss, _ = train(None if name == "float32" else name, item, seed)
            known[name, item, seed] = loss
            rows.append((name, item, str(seed), f"{loss:.6f}"))
            save([head, *rows], path)
            print(f"{name} {item} {seed}: {loss:.4f} ({time.monotonic() - started:.0f} s)", flush=True)
    return known


def watched(path: Path, formats: tuple[str, ...], seeds: tuple[int, ...]) -> dict[tuple[str, str, int], dict]:
    """By (format, item, seed) what the watch says of the item, the mean over watched steps and its operands' places."""
    head = ("format", "widened", "seed", *STATISTICS)
    rows = [tuple(row) for row in csv.reader(path.open())][1:] if path.exists() else []
    for name in formats:
        for seed in seeds:
            if not any((row[0], row[2]) == (name, str(seed)) for row in rows):
                _, lines = train(name, ALL, seed, WATCH_EVERY)
                rows += [
                    (name, item, str(seed), *(f"{x:.6g}" for x in of_item(item, lines)))
                    for item in (*items(), *places())
                ]
                save([head, *rows], path)
                print(f"watched {name} {seed}", flush=True)
    return {(n, i, int(s)): dict(zip(STATISTICS, map(float, x), strict=True)) for n, i, s, *x in rows}


def of_item(item: str, lines: list[dict]) -> list[float]:
    """STATISTICS of an item: of the rounding of its operands."""
    from low_precision import OPERANDS

    pattern, _, site = item.rpartition("/")
    sites = OPERANDS if site == "*" else [site]
    inside = (pattern, f"{pattern}.", f"{pattern}:")
    rows = [
        line
        for line in lines
        if line["site"] in sites and (not pattern or line["layer"] == pattern or line["layer"].startswith(inside[1:]))
    ]
    noise = [10 ** (-row["sqnr_db"] / 10) for row in rows if row["sqnr_db"] is not None]
    others = ([abs(row[name] or 0.0) for row in rows] for name in ("bias", "saturated", "flushed"))
    return [statistics.fmean(values) if values else 0.0 for values in (noise, *others)]


def rank_correlation(x: list[float], y: list[float]) -> tuple[float, float]:
    """Spearman's, and the share of all orders (of 100,000 where there are more) that have one as high: one-sided."""
    import numpy as np
    from scipy import stats

    def correlation(order: object) -> float:
        return float(stats.spearmanr(order, y).statistic)

    found = correlation(x)
    if math.factorial(len(x)) <= 5040:
        orders = list(itertools.permutations(stats.rankdata(x)))
    else:
        generator = np.random.default_rng(1)
        orders = [generator.permutation(stats.rankdata(x)) for _ in range(20_000)]
    ranks = stats.rankdata(y)
    centred = (ranks - ranks.mean()) / ranks.std()
    all_of_them = np.array([(np.asarray(order) - np.mean(order)) / np.std(order) for order in orders]) @ centred
    return found, float(np.mean(all_of_them / len(ranks) >= found - 1e-9))


def main() -> None:
    with Claims(__doc__) as claims:
        quick = claims.asked.quick
        global STEPS, TEST
        STEPS, TEST = (2, 32) if quick else (STEPS, TEST)
        folder = (claims.asked.save or Path("results/transformer.csv")).parent
        formats, seeds = (FORMATS[:1], SEEDS[:1]) if quick else (FORMATS, SEEDS)
        chosen = [*items()[:3], *items()[-3:]] if quick else items()
        loss = losses(folder / "transformer_runs.csv", formats, chosen, seeds)
        said = watched(folder / "transformer_watched.csv", formats, seeds)
        ranked = {}
        for name in formats:
            tell(claims, name, chosen, seeds, loss, said, ranked)
        if claims.asked.figure:
            draw(ranked, claims.asked.figure)


def tell(
    claims: Claims, name: str, chosen: list[str], seeds: tuple[int, ...], loss: dict, said: dict, ranked: dict
) -> None:
    """The claims of one format."""

    def recovered(item: str) -> list[float]:
        return [loss[name, ALL, seed] - loss[name, item, seed] for seed in seeds]

    whole, without = ([loss[key, ALL, seed] for seed in seeds] for key in (name, "float32"))
    kinds = {
        "operands": [item for item in chosen if not item.endswith("/*")],
        "layers": [item for item in chosen if item.endswith("/*")],
    }
    for kind, of_kind in kinds.items():
        if len(of_kind) < 3:
            continue
        gains = {item: statistics.fmean(recovered(item)) for item in of_kind}
        noise = {item: statistics.fmean(said[name, item, seed]["noise"] for seed in seeds) for item in of_kind}
        texts = [
            f"{item.removesuffix('/*')} {noise[item]:.4f}, {gains[item]:.3f} ({min(recovered(item)):.3f} -"
            f" {max(recovered(item)):.3f})"
            for item in sorted(of_kind, key=lambda item: -noise[item])
        ]
        ratios = {}
        for statistic in STATISTICS:
            values = [statistics.fmean(said[name, item, seed][statistic] for seed in seeds) for item in of_kind]
            ratios[statistic] = rank_correlation(values, [gains[item] for item in of_kind])
            ranked[name, kind, statistic] = values, [recovered(item) for item in of_kind], of_kind
        rho, p = ratios[STATISTICS[0]]
        others = ", ".join(f"of the {other} {rho:.2f}, p = {p:.2g}" for other, (rho, p) in list(ratios.items())[1:])
        claims.add(
            f"{name}, {kind}: what is noisiest by the watch recovers most when it is widened to bfloat16",
            f"loss of float32 {statistics.fmean(without):.3f}, of {name} {statistics.fmean(whole):.3f} (means of"
            f" {len(seeds)} seeds). Noise-to-signal ratio, and recovered loss, mean and range, the noisiest first:"
            f" {'; '.join(texts)}. Spearman's rank correlation over these {len(of_kind)}: {rho:.2f}, one-sided p ="
            f" {p:.2g} (permutations). Not asked beforehand: {others}",
            rho > 0 and p < 0.05,
        )
    noise = {place: statistics.fmean(said[name, place, seed]["noise"] for seed in seeds) for place in places()}
    first, *others = sorted(noise, key=lambda place: -noise[place])
    best = max(kinds["layers"], key=lambda item: statistics.fmean(recovered(item))).removesuffix("/*")
    claims.add(
        f"{name}: the layer that recovers most is the one with the noisiest operand",
        f"noise-to-signal ratios of {len(noise)} operands in single layers, mean of {len(seeds)} seeds: the largest"
        f" {', '.join(f'{place} {noise[place]:.4f}' for place in (first, *others[:3]))}; the median"
        f" {statistics.median(noise.values()):.4f}; the smallest {others[-1]} {noise[others[-1]]:.4f}."
        f" Widened to bfloat16, {best} recovers most",
        first.startswith(f"{best}/"),
    )


def draw(ranked: dict, path: Path) -> None:
    """For each format and kind: recovered loss, mean and range over the seeds, against the noise-to-signal ratio."""
    from analysis import figures

    shown = {key[:2]: value for key, value in ranked.items() if key[2] == STATISTICS[0]}
    columns = max(1, len(shown) // len({name for name, _ in shown}))
    rows = -(-len(shown) // columns)
    chart, panels = figures.pyplot().subplots(
        rows, columns, figsize=(5.5 * columns, 4 * rows), layout="constrained", squeeze=False
    )
    for axes, ((name, kind), (values, gains, names)) in zip(panels.flat, shown.items(), strict=False):
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


if __name__ == "__main__":
    main()
