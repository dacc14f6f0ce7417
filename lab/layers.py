"""layers.jsonl: what rounding lost by step, layer and site, in a run's record and at wandb."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lab.metrics import Metrics
from lab.processes import Processes
from lab.step_lines import LAYERS, Row, StepLines, WandbKeys
from low_precision.watcher import Watcher

_NOT_MEASURED = ("step", "layer", "site", "rule", "also", "exponents")  # what says of what a row is


def layer_lines(watcher: Watcher, processes: Processes) -> StepLines:
    """What the watcher hears, summed over all processes, each of which has to take it."""
    everywhere = processes.everywhere if processes.count > 1 else None
    return StepLines(LAYERS, lambda: watcher.take(everywhere), wandb_layers)


def wandb_layers(rows: Iterable[Row]) -> WandbKeys:
    """Rows of one step by wandb's keys, "layers/LAYER/SITE/NUMBER": the numbers, and the histograms of exponents."""
    numbers: Metrics = {}
    histograms: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = "/".join(filter(None, ("layers", row.get("also"), row["layer"] or "model", row["site"])))
        numbers |= {f"{key}/{name}": value for name, value in row.items() if name not in _NOT_MEASURED}
        if row.get("exponents", {}).get("counts"):
            histograms[f"{key}/exponents"] = row["exponents"]
    return numbers, histograms
