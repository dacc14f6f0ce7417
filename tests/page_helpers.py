"""Records as runs leave them, made up quickly: what tests of pages look at, without training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from settings.config import Config

SITES = ("weights", "inputs", "activations", "errors", "gradients")
LAYERS = ("embed", "blocks.0.attention.query", "blocks.0.fc", "blocks.1.attention.query", "blocks.1.fc", "head")


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_record(
    output: Path, config: Config, status: str | None = "complete", epochs: int | None = None, **summary: object
) -> Path:
    """The folder of a run. status None: it goes on. epochs: how far it came; all of them by default.

    Its testing_mse is 1 / epoch + seed / 1000 + an amount that its rounding decides.
    """
    folder = output / (config.folder_name if status in ("complete", "diverged") else f"{config.folder_name}.partial-7")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    worse = 0.0 if config.precision == "float32" else 0.4 if config.rounding == "nearest" else 0.1
    done = config.epochs if epochs is None else epochs
    values = [1 / epoch + config.seed / 1000 + worse for epoch in range(1, done + 1)]
    lines = [{"epoch": i + 1, "training_mse": value / 2, "testing_mse": value} for i, value in enumerate(values)]
    write_lines(folder / "metrics.jsonl", lines)
    if status:
        told = {"name": config.name, "status": status, "epochs": done, "seconds": 0.25, "code": "0123456789abcdef"}
        (folder / "summary.json").write_text(json.dumps(told | summary))
    return folder


def layer_lines(
    rule: str, layers: tuple[str, ...] = LAYERS, steps: tuple[int, ...] = (0, 50, 100, 150), also: str | None = None
) -> list[dict]:
    """A layers.jsonl: what is flushed grows with the depth, and lost updates with the steps."""
    noise = random.Random(0)
    lines = []
    others = {"also": also} if also else {}
    for step in steps:
        for depth, layer in enumerate(layers):
            share = (depth + 1) / (len(layers) + 1)
            for site in SITES:
                middle = -4 - 2 * depth - 4 * (site in ("errors", "gradients"))
                counts = [round(1000 * math.exp(-((e - 8) ** 2) / 8)) for e in range(17)]
                line: dict = {"step": step, "layer": layer, "site": site, "rule": rule, **others}
                line |= {
                    "flushed": round(share * 0.2, 4),
                    "subnormal": share * 0.4,
                    "saturated": 0.0,
                    "not_finite": 0.0,
                }
                line |= {"sqnr_db": 30 - 20 * share + noise.random(), "bias": (noise.random() - 0.5) / 100}
                line |= {"amax": 2.0**middle * 16}
                if "@" in rule or rule.startswith(("nvfp4", "mxfp")):
                    line |= {"scale_min": 2.0 ** (middle - 6), "scale_max": 2.0**middle}
                line |= {"exponents": {"lowest": middle - 8, "counts": counts}, "numbers": sum(counts)}
                if site == "weights":
                    lost = min(1.0, step / 200 + share / 4)
                    line |= {"lost_updates": lost, "arrived_norm": 1 - lost, "update_cosine": math.sqrt(1 - lost)}
                    line |= {"last_moved": max(0, step - 10 * depth)}
                lines.append(line)
            for product in ("forward", "dgrad", "wgrad"):
                lines.append({"step": step, "layer": layer, "site": product, **others, "error": 0.01 * (depth + 1)})
    return lines


def shadow_lines(layers: tuple[str, ...] = LAYERS, steps: tuple[int, ...] = (0, 50, 100, 150)) -> list[dict]:
    lines = []
    for step in steps:
        for depth, layer in enumerate(layers):
            distance, cosine = 1e-3 * (1 + step) * (depth + 1), 1 / (1 + step * (depth + 1) / 500)
            lines.append({"step": step, "layer": layer, "weights_distance": distance, "gradient_cosine": cosine})
        lines.append({"step": step, "layer": "", "loss_difference": step / 1000})
    return lines
