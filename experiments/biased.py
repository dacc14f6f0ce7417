"""Stochastic rounding with a helpful bias, against plain and nearest: python experiments/biased.py

Xia, Massei, Hochstenbach and Koren 2022 (arXiv:2202.12276), after Xia, Anthonissen, Hochstenbach and Koren 2021
(arXiv:2103.13445); the claims are those of their abstracts. With a < x < b neighbours and p = (x - a)/(b - a), x
becomes b with the probability

SR            p
SR_ε          p + ε sign(x), clipped to [0, 1]: away from zero more often; for the step fl(η g), which it makes longer
signed-SR_ε   p - ε sign(gradient), clipped: down the gradient more often; for the difference fl(w - step)

Gradient descent with all rows in each step; operands, products, errors and gradients are rounded stochastically, and
the update w = fl(w - fl(η g)) by each scheme in turn:

logistic   multinomial logistic regression on digits (1,437 training rows, 10 classes), every number in float8_e5m2,
           the papers' 8-bit format; η = 0.1
network    64-32-1, ReLU, digits 3 against 8, every number in float8_e5m2; η = 0.1
fixed      the same network in 16-bit fixed point, 6 bits behind the point (fixed16.6); η = 0.1

"SR, 4 η" is plain SR with a learning rate four times as large: a control, as a bias down the gradient is a longer step
too. All seeds (initial weights and rounding noise; n = 30) are trained at once, as one more dimension of each tensor.
"""

from __future__ import annotations

import itertools
import math

from claims import Claims

SCHEMES = ("float32", "nearest", "SR", "SR_ε", "signed-SR_ε", "SR, 4 η")
EPSILON = 0.25
SEEDS = 30


def rounded(x, name, scheme, key, gradient=None):
    """x in the format by that scheme; `gradient`: whose sign signed-SR_ε goes against."""
    import torch

    from low_precision.tensor import quantize

    if scheme == "float32":
        return x
    if scheme in ("nearest", "SR", "SR, 4 η"):
        return quantize(x, name, "nearest" if scheme == "nearest" else "stochastic", key=key)
    low, high = quantize(x, name, "down"), quantize(x, name, "up")
    p = ((x - low) / (high - low)).nan_to_num(0.0)  # a value of the format stays: its neighbours are itself
    bias = EPSILON * (x.sign() if scheme == "SR_ε" else -gradient.sign())
    uniform = torch.rand(x.shape, generator=torch.Generator().manual_seed(key))
    return torch.where(uniform < p + bias, high, low)


def places_of(name: str, scheme: str) -> tuple[str, str]:
    """How the product η g is rounded, and how the difference w - fl(η g)."""
    if scheme == "float32":
        return scheme, scheme
    if scheme == "SR_ε" or name.startswith("fixed"):
        return ("SR_ε" if scheme == "signed-SR_ε" else scheme), "SR"
    return "SR", scheme


def rows_of(pair: bool):
    """Digits in [0, 1] with a column of ones: rows and targets, of training and of test."""
    import torch
    from sklearn.model_selection import train_test_split

    from data import digits

    x, y = digits()
    if pair:
        chosen = (y == 3) | (y == 8)
        x, y = x[chosen], (y[chosen] == 8).astype(int)
    parts = train_test_split(x / 16.0, y, test_size=0.2, random_state=42)
    ones = [torch.cat([torch.tensor(p, dtype=torch.float32), torch.ones(len(p), 1)], 1) for p in parts[:2]]
    return ones[0], torch.tensor(parts[2]), ones[1], torch.tensor(parts[3])


def train(kind: str, name: str, scheme: str, steps: int, rate: float) -> dict[str, object]:
    """Test accuracy and training loss by step, shape (steps, seeds)."""
    import torch
    from torch.nn import functional

    x, y, test_x, test_y = rows_of(pair=kind != "logistic")
    classes = 10 if kind == "logistic" else 2
    target = functional.one_hot(y, classes).float() if kind == "logistic" else y.float()[:, None]
    widths = [x.shape[1], classes] if kind == "logistic" else [x.shape[1], 32, 1]
    start = torch.Generator().manual_seed(1)
    key = iter(range(1, 10**9))
    rate = 4 * rate if scheme == "SR, 4 η" else rate
    inner = "float32" if scheme == "float32" else "SR"  # everything but the update, in every scheme

    def fl(value):
        return rounded(value, name, inner, next(key))

    weights = [
        torch.randn(SEEDS, a, b, generator=start) * (0.0 if kind == "logistic" else math.sqrt(2 / a))
        for a, b in itertools.pairwise(widths)
    ]
    weights = [fl(w) for w in weights]
    x, test_x = (rounded(part, name, "float32" if scheme == "float32" else "nearest", 0) for part in (x, test_x))

    def forward(rows, rounder):
        values = [rows]
        for w in weights[:-1]:
            values.append(rounder(torch.relu(values[-1] @ w)))
        return values, rounder(values[-1] @ weights[-1])

    losses, accuracies = [], []
    for _ in range(steps):
        values, logits = forward(x, fl)
        if kind == "logistic":
            losses.append(
                functional.cross_entropy(logits.transpose(1, 2), y.expand(SEEDS, -1), reduction="none").mean(1)
            )
            error = fl(logits.softmax(-1) - target)
        else:
            losses.append(
                functional.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none").mean(
                    (1, 2)
                )
            )
            error = fl(logits.sigmoid() - target)
        gradients = []
        for number in reversed(range(len(weights))):
            gradients.insert(0, fl(values[number].mT @ error / len(x)))
            if number:
                error = fl((error @ weights[number].mT) * (values[number] > 0))
        for number, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            product, difference = places_of(name, scheme)
            step = rounded(rate * g, name, product, next(key), g)
            weights[number] = rounded(w - step, name, difference, next(key), g)
        _, logits = forward(test_x, lambda value: value)  # the instrument itself is not rounded
        right = logits.argmax(-1) == test_y if kind == "logistic" else (logits[..., 0] > 0) == (test_y == 1)
        accuracies.append(right.float().mean(1))
    return {"accuracy": torch.stack(accuracies), "loss": torch.stack(losses)}


def median(values) -> float:
    return float(values.median())


def main() -> None:
    with Claims(__doc__) as claims:
        steps = 10 if claims.asked.quick else 300
        cases = {"logistic": "float8_e5m2", "network": "float8_e5m2", "fixed": "fixed16.6"}
        results = {
            (kind, scheme): train(kind, name, scheme, steps, 0.1) for kind, name in cases.items() for scheme in SCHEMES
        }

        def loss(kind, scheme, step=-1):
            return results[kind, scheme]["loss"][step]

        def spreads(kind, what="loss", step=-1):
            shown = (lambda v: f"{v:.3g}") if what == "loss" else (lambda v: f"{100 * v:.1f}")
            return ", ".join(
                f"{s} {shown(median(v))} ({shown(float(v.quantile(0.05)))} - {shown(float(v.quantile(0.95)))})"
                for s in SCHEMES
                for v in [results[kind, s][what][step]]
            )

        spread = f"median and 5 to 95 % of {SEEDS} seeds"
        for kind, name in cases.items():
            better = median(loss(kind, "SR")) < median(loss(kind, "nearest"))
            claims.add(
                f"{kind}, {name}: stochastic rounding helps to prevent stagnation",
                f"training loss in step {steps}, {spread}: {spreads(kind)}",
                better,
            )
        for kind in cases:
            half = median(loss(kind, "SR"))
            reach = {}
            for scheme in SCHEMES:
                below = [n for n in range(steps) if median(loss(kind, scheme, n)) <= half]
                reach[scheme] = below[0] + 1 if below else None
            accuracy = {s: median(results[kind, s]["accuracy"][-1]) for s in SCHEMES}
            reached = f"first step whose median loss is at most that of SR in step {steps}: " + ", ".join(
                f"{s} {n or 'never'}" for s, n in reach.items()
            )
            reached += f"; testing accuracy in % at the end: {spreads(kind, 'accuracy')}"
            if kind == "fixed":
                claims.add(
                    "fixed: 16-bit fixed point: faster convergence and higher accuracy than SR and nearest (2021); "
                    "with the schemes of 2022",
                    reached,
                    bool(reach["SR_ε"]) and reach["SR_ε"] < 0.9 * steps and accuracy["SR_ε"] > accuracy["SR"],
                )
            else:
                for scheme, text in (("signed-SR_ε", reached), ("SR_ε", "steps and accuracies in the row above")):
                    fast = reach[scheme] is not None and reach[scheme] < 0.9 * steps
                    claims.add(f"{kind}: {scheme} converges faster than unbiased SR (2022)", text, fast)
            claims.add(
                f"{kind}: (our own question) is that the bias, and not only a longer step?",
                f"plain SR with 4 η ends at a loss of {median(loss(kind, 'SR, 4 η')):.3g}, signed-SR_ε at "
                f"{median(loss(kind, 'signed-SR_ε')):.3g}; SR with 4 η is at SR's final loss after {reach['SR, 4 η']} "
                "steps",
                median(loss(kind, "signed-SR_ε")) < median(loss(kind, "SR, 4 η")),
            )
        if claims.asked.figure:
            draw(claims.asked.figure, results, cases, steps)


def draw(path, results, cases, steps) -> None:
    from analysis import figures

    plt = figures.pyplot()
    chart, panels = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
    for axes, (kind, name) in zip(panels, cases.items(), strict=True):
        for number, scheme in enumerate(SCHEMES):
            losses = results[kind, scheme]["loss"]
            axes.plot(range(1, steps + 1), losses.median(1).values, label=scheme, **figures.nth_look(number))
            axes.fill_between(
                range(1, steps + 1),
                losses.quantile(0.05, 1),
                losses.quantile(0.95, 1),
                color=figures.COLOURS[number],
                alpha=0.15,
            )
        axes.set(title=f"{kind}, {name}", xlabel="step", yscale="log", ylim=(3e-3, 4))
    panels[0].set_ylabel("training loss")
    chart.suptitle(f"Which rounding of the update? ε = {EPSILON}; median of {SEEDS} seeds and 5 % to 95 %")
    chart.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figures.store(chart, path)


if __name__ == "__main__":
    main()
