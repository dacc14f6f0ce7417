"""Where a small transformer loses under 4-bit products, and whether the watch knows: python experiments/transformer.py

Four of torch's nn.TransformerEncoderLayer (width 128, 4 heads, pre-norm) learn to sort 16 symbols of 32, with AdamW, in
240 steps of 16 sequences; float32 gets from ln 32 = 3.47 nats a symbol to about 1. Every operand of every product,
attention's too, is rounded, and one item at a time is widened: ranking.py says how. The losses are those on 1,024
sequences that no run has trained on.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

from claims import Claims, save
from ranking import ALL, FLOAT32, FORMATS, STATISTICS, WIDER, Ranking, operands_of

SYMBOLS, TOKENS, BATCH, STEPS, WARMUP, RATE, TEST = 32, 16, 16, 240, 20, 1e-3, 1024
SEEDS = (1, 2, 3)
LAYERS = (*(f"layers.{number}" for number in range(4)), "head")
WATCH_EVERY = 20


def train(rule: str | None, item: str, seed: int, watch_every: int = 0) -> tuple[float, list[dict]]:
    """The loss on the test sequences after training, and what was watched.

    rule: of all operands; None for float32. item: of a ranking's, widened, or ALL.
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
        layer, operands = operands_of(item)
        wider = dict.fromkeys(operands, WIDER)
        if item != ALL and not layer:
            rules |= wider
        layers = {layer: wider} if layer else None
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


def losses(ranking: Ranking, path: Path, formats: tuple[str, ...], chosen: list[str]) -> None:
    """The loss by format, item and seed; what is in the file already is not trained again."""
    head = ("format", "widened", "seed", "testing_loss")
    rows = [tuple(row) for row in csv.reader(path.open())][1:] if path.exists() else []
    ranking.loss |= {(name, item, int(seed)): float(loss) for name, item, seed, loss in rows}
    todo = [(FLOAT32, ALL, seed) for seed in ranking.seeds]
    todo += [(name, item, seed) for item in (ALL, *chosen) for seed in ranking.seeds for name in formats]
    for name, item, seed in todo:
        if (name, item, seed) not in ranking.loss:
            started = time.monotonic()
            loss, _ = train(None if name == FLOAT32 else name, item, seed)
            ranking.loss[name, item, seed] = loss
            rows.append((name, item, str(seed), f"{loss:.6f}"))
            save([head, *rows], path)
            print(f"{name} {item} {seed}: {loss:.4f} ({time.monotonic() - started:.0f} s)", flush=True)


def watched(ranking: Ranking, path: Path, formats: tuple[str, ...]) -> None:
    """What the watch says by format, item or place, and seed; what is in the file already is not trained again."""
    head = ("format", "widened", "seed", *STATISTICS)
    rows = [tuple(row) for row in csv.reader(path.open())][1:] if path.exists() else []
    for name in formats:
        for seed in ranking.seeds:
            if not any((row[0], row[2]) == (name, str(seed)) for row in rows):
                _, lines = train(name, ALL, seed, WATCH_EVERY)
                ranking.watched(name, seed, lines)
                rows += [
                    (name, item, str(seed), *(f"{x:.6g}" for x in ranking.said[name, item, seed].values()))
                    for item in (*ranking.items(), *ranking.places())
                ]
                save([head, *rows], path)
                print(f"watched {name} {seed}", flush=True)
    ranking.said |= {(n, i, int(s)): dict(zip(STATISTICS, map(float, x), strict=True)) for n, i, s, *x in rows}


def main() -> None:
    with Claims(__doc__) as claims:
        quick = claims.asked.quick
        global STEPS, TEST
        STEPS, TEST = (2, 32) if quick else (STEPS, TEST)
        folder = (claims.asked.save or Path("results/transformer.csv")).parent
        formats, seeds = (FORMATS[:1], SEEDS[:1]) if quick else (FORMATS, SEEDS)
        ranking = Ranking(LAYERS, seeds)
        items = ranking.items()
        chosen = [*items[:3], *items[-3:]] if quick else items
        losses(ranking, folder / "transformer_runs.csv", formats, chosen)
        watched(ranking, folder / "transformer_watched.csv", formats)
        for name in formats:
            ranking.tell(claims, name, chosen)
        if claims.asked.figure:
            ranking.draw(claims.asked.figure)


if __name__ == "__main__":
    main()
