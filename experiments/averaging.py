"""Averaged weights in low precision (SWALP) on convex problems: python experiments/averaging.py

Yang, Zhang, Kirichenko, Bai, Wilson and De Sa 2019 (arXiv:1904.11943); the claims are those of its abstract. Stochastic
gradient descent, one row a step; after each step the weights are rounded stochastically to fixed point (b bits behind
the point, gap δ = 2^-b), and their average, in float64, is taken from a tenth of the steps on. 50 seeds at once.

quadratic  linear regression, x ~ N(0, I) in 16 dimensions, y = x w* + noise of deviation 0.5, η = 0.02, fixed8.6
logistic   breast_cancer (569 rows, 30 standardized features), L2 penalty 0.1, η = 0.01, gaps from 2^-3 to 2^-8; the
           optimum by 20 steps of Newton's method in float64

The error is the squared distance to the optimum, divided by the dimension, and its mean over the seeds.
"""

from __future__ import annotations

from claims import Claims, slope

SEEDS = 50


def descend(gradient, dimension: int, name: str | None, rate: float, places: list[int]) -> tuple[dict, dict]:
    """By number of steps: the weights, and their average; each of shape (seeds, dimension)."""
    import torch

    from low_precision.tensor import quantize

    generator = torch.Generator().manual_seed(1)
    w = torch.zeros(SEEDS, dimension, dtype=torch.float64)
    total, count, last, average = torch.zeros_like(w), 0, {}, {}
    for step in range(1, places[-1] + 1):
        w = w - rate * gradient(w, generator)
        if name:
            w = quantize(w, name, "stochastic", key=step, backend="fused")
        if step > places[-1] // 10:
            total += w
            count += 1
        if step in places and count:
            last[step], average[step] = w.clone(), total / count
    return last, average


def quadratic(dimension: int = 16):
    import torch

    best = torch.linspace(-0.9, 0.87, dimension, dtype=torch.float64)

    def gradient(w, generator):
        x = torch.randn(w.shape, generator=generator, dtype=torch.float64)
        noise = 0.5 * torch.randn(len(w), 1, generator=generator, dtype=torch.float64)
        return x * ((x * (w - best)).sum(1, keepdim=True) - noise)

    return gradient, best


def logistic(penalty: float = 0.1):
    import torch
    from sklearn.preprocessing import StandardScaler

    from data import breast_cancer

    x, y = breast_cancer()
    x = torch.tensor(StandardScaler().fit_transform(x))
    sign = torch.tensor(2.0 * y - 1.0, dtype=torch.float64)
    best = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(20):  # Newton's method
        p = torch.sigmoid(-sign * (x @ best))
        slope_there = penalty * best - (x * (sign * p)[:, None]).mean(0)
        curve = (x.T * (p * (1 - p))) @ x / len(x) + penalty * torch.eye(len(best), dtype=torch.float64)
        best = best - torch.linalg.solve(curve, slope_there)
    assert float(slope_there.abs().max()) < 1e-12

    def gradient(w, generator):
        rows = torch.randint(len(x), (len(w),), generator=generator)
        chosen, s = x[rows], sign[rows]
        p = torch.sigmoid(-s * (chosen * w).sum(1))
        return penalty * w - chosen * (s * p)[:, None]

    return gradient, best


def main() -> None:
    with Claims(__doc__) as claims:
        steps = 2000 if claims.asked.quick else 200_000
        places = sorted({int(steps * 10 ** (-k / 4)) for k in range(4)})

        def error(w, best) -> float:
            return float(((w - best) ** 2).mean())

        gradient, best = quadratic()
        curves = {}
        for name in ("fixed8.6", None):
            last, average = descend(gradient, len(best), name, 0.02, places)
            curves[name, "last"] = [error(last[n], best) for n in places]
            curves[name, "average"] = [error(average[n], best) for n in places]
        averaged = [n - steps // 10 for n in places]
        fall = slope(averaged, curves["fixed8.6", "average"])
        claims.add(
            "quadratic objectives: the average converges arbitrarily close to the optimum, the last weights do not",
            f"fixed8.6, gap² / 12 is {2.0**-12 / 12:.1e}: from {averaged[0]:,} to {averaged[-1]:,} averaged steps the "
            f"average's error falls "
            f"from {curves['fixed8.6', 'average'][0]:.1e} to {curves['fixed8.6', 'average'][-1]:.1e}, like "
            f"T^({fall:.2f}); that of the last weights "
            f"stays at {curves['fixed8.6', 'last'][-1]:.1e}. float64: {curves[None, 'average'][-1]:.1e} averaged, "
            f"{curves[None, 'last'][-1]:.1e} last (means of {SEEDS} seeds)",
            fall < -0.7 and curves["fixed8.6", "average"][-1] < 2.0**-12 / 12,
        )
        gradient, best = logistic()
        bits = [3, 4, 5, 6, 7, 8]
        balls, averages = {}, {}
        for b in [None, *bits]:
            last, average = descend(gradient, len(best), b and f"fixed{b + 4}.{b}", 0.01, places)
            averages[b] = average[places[-1]]
            balls[b] = sum(error(last[n], best) for n in places) / len(places), error(averages[b], best)
        gaps = [2.0**-b for b in bits]
        excess = {k: [balls[b][k] - balls[None][k] for b in bits] for k in (0, 1)}
        # Where the average ends for ever more steps: its mean over the seeds, less that of float64 with the same rows.
        # The square of that mean is too large by its variance.
        ends, clear = [], []
        for k, b in enumerate(bits):
            apart = averages[b] - averages[None]
            noise = float(apart.var(0).mean()) / SEEDS
            ends.append(float((apart.mean(0) ** 2).mean()) - noise)
            clear += [k] * (ends[k] > 0.5 * noise)
        rates = [slope(gaps, excess[0]), slope(gaps, excess[1])]
        rates.append(slope([gaps[k] for k in clear], [ends[k] for k in clear]) if len(clear) > 1 else float("nan"))
        claims.add(
            "strongly convex objectives: the average ends in a noise ball asymptotically smaller than that of "
            "low-precision SGD (δ² against δ in the squared distance)",
            f"logistic regression, gaps δ = 2^-3 to 2^-8, errors less those of float64 with the same rows: last "
            f"weights "
            f"{excess[0][0]:.1e} to {excess[0][-1]:.1e}, like δ^{rates[0]:.2f}; average of {steps * 9 // 10:,} steps "
            f"{excess[1][0]:.1e} to {excess[1][-1]:.1e}, like δ^{rates[1]:.2f}; where it ends for ever more steps "
            f"(squared distance of the averages' mean over {SEEDS} seeds) {ends[0]:.1e} to "
            f"{ends[clear[-1]] if clear else 0:.1e}, "
            f"like δ^{rates[2]:.2f}, for the {len(clear)} gaps where it is told from noise",
            rates[2] > rates[0] + 0.5 and all(a < b for a, b in zip(excess[1], excess[0], strict=True)),
        )
        if claims.asked.figure:
            draw(claims.asked.figure, places, curves, gaps, balls, [(gaps[k], ends[k]) for k in clear])


def draw(path, places, curves, gaps, balls, ends) -> None:
    from analysis import figures

    plt = figures.pyplot()
    chart, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for number, (name, label) in enumerate((("fixed8.6", "fixed8.6"), (None, "float64"))):
        for mark, (what, style) in enumerate((("last", "--"), ("average", "-"))):
            left.loglog(
                places,
                curves[name, what],
                style,
                marker="os"[mark],
                color=figures.COLOURS[number + 1],
                label=f"{label}, {what} weights",
            )
    left.set(title="quadratic: linear regression", xlabel="steps", ylabel="squared distance to the optimum / dimension")
    left.legend(fontsize="small")
    for k, (what, style) in enumerate((("last", "--"), ("average", "-"))):
        right.loglog(
            gaps,
            [balls[b][k] for b in balls if b],
            style,
            marker="os"[k],
            color=figures.COLOURS[1],
            label=f"fixed point, {what} weights",
        )
        right.axhline(balls[None][k], linestyle=style, color=figures.COLOURS[2], label=f"float64, {what} weights")
    right.loglog(
        *zip(*ends, strict=True), ":^", color=figures.COLOURS[3], label="where the average ends for ever more steps"
    )
    right.set(title="strongly convex: logistic regression", ylim=(3e-7, 30), xlabel="gap δ of the weights' format")
    right.legend(fontsize="small")
    chart.suptitle("Averaging the weights of low-precision SGD")
    figures.store(chart, path)


if __name__ == "__main__":
    main()
