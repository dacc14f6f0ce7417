"""Stagnation: the harmonic series and the heat equation in 16 bits: python experiments/stagnation.py

Croci, Fasi, Higham, Mary and Mikaitis 2022 (doi:10.1098/rsos.211631), its abstract; the harmonic series as in Higham's
"Half Precision Arithmetic: fp16 Versus bfloat16" (2018); the heat equation as in Croci and Giles 2022
(arXiv:2010.16225), its abstract.

harmonic  s_n = fl(s_{n-1} + fl(1/n)) until n = 10^5, one run to nearest and 1,000 stochastic ones
heat      u_t = u_xx + π² sin πx on [0, 1], u = 0 at the ends and at the start, to t = 1, where it has all but reached
          sin πx: the explicit Euler method, central differences, Δt = h²/4. Every operation is rounded to fp16 (the
          source enters exactly), 100 stochastic runs. The error is against the same method in float64: the largest
          over x, and for its growth with Δt the root mean square. (A constant source would not do: x(1 - x)/2 is a
          value of fp16 at each point of a coarse grid, where nothing is left to round.)
"""

from __future__ import annotations

from claims import Claims, slope

RUNS = {"harmonic": 1000, "heat": 100}


def harmonic(name: str, terms: int) -> tuple[int, float, object]:
    """To nearest: the last n that changed the sum, and the sum; stochastically: the sums, shape (runs,)."""
    import torch

    from low_precision.tensor import quantize

    inverse = 1 / torch.arange(1, terms + 1, dtype=torch.float64)
    nearest, moved = torch.zeros(1, dtype=torch.float64), 0
    parts = quantize(inverse, name)
    for n in range(terms):
        new = quantize(nearest + parts[n], name, backend="fused")
        moved = n + 1 if bool(new != nearest) else moved
        nearest = new
    sums = torch.zeros(RUNS["harmonic"], dtype=torch.float64)
    for n in range(terms):
        part = quantize(inverse[n].expand_as(sums), name, "stochastic", key=2 * n, backend="fused")
        sums = quantize(sums + part, name, "stochastic", key=2 * n + 1, backend="fused")
    return moved, float(nearest), sums


def heat(name: str, rounding: str | None, intervals: int, runs: int) -> tuple[object, int, int]:
    """u at t = 1, shape (runs, points inside); the last step at which anything moved, and the steps in all."""
    import torch

    from low_precision.tensor import quantize

    key = iter(range(10**9))

    def fl(x):
        return x if rounding is None else quantize(x, name, rounding, key=next(key), backend="fused")

    dt = 0.25 / intervals**2
    steps = 4 * intervals**2
    u = torch.zeros(runs, intervals + 1, dtype=torch.float64)
    x = torch.arange(1, intervals, dtype=torch.float64) / intervals
    source, moved = dt * torch.pi**2 * torch.sin(torch.pi * x), 0
    for step in range(steps):
        left, middle, right = u[:, :-2], u[:, 1:-1], u[:, 2:]
        difference = fl(fl(left - middle) + fl(right - middle))
        new = fl(middle + fl(0.25 * difference + source))
        if rounding == "nearest":
            if not bool((new != middle).any()):
                break
            moved = step + 1
        u[:, 1:-1] = new
    return u[:, 1:-1], moved, steps


def main() -> None:
    import torch

    with Claims(__doc__) as claims:
        terms = 600 if claims.asked.quick else 10**5
        truth = float((1 / torch.arange(1, terms + 1, dtype=torch.float64)).sum())
        series = {name: harmonic(name, terms) for name in ("bfloat16", "fp16")}
        for name, (stop, published) in {"bfloat16": (65, "5.0625"), "fp16": (513, "7.0859")}.items():
            moved, nearest, _ = series[name]
            # The term after the last one that moves the sum is the first that does not: stop.
            claims.add(
                f"harmonic series in {name}, to nearest: it stops at {published}, after {stop} terms (Higham)",
                f"{nearest:.5g}: term {moved} is the last that moves it, term {moved + 1} the first that does not",
                f"{nearest:.4f}".startswith(published[:6]) and stop in (moved, moved + 1),
            )
        texts, ok = [], True
        for name, (_, nearest, sums) in series.items():
            low, middle, high = (float(torch.quantile(sums, q)) for q in (0.05, 0.5, 0.95))
            error = float(sums.std()) / len(sums) ** 0.5
            mean = float(sums.mean())
            texts.append(
                f"{name}: mean {mean:.3f} ± {2 * error:.3f}, median {middle:.2f} ({low:.2f} - {high:.2f}), nearest "
                f"{nearest:.4f}"
            )
            ok &= abs(mean - truth) < 4 * error
        claims.add(
            "stochastic rounding is immune to stagnation (Croci et al.), and unbiased",
            f"{terms:,} terms, true sum {truth:.3f}; {RUNS['harmonic']:,} runs, 5 to 95 % in brackets: "
            + "; ".join(texts),
            ok,
        )
        sizes = [8, 16] if claims.asked.quick else [8, 16, 32, 64, 128]
        runs = 5 if claims.asked.quick else RUNS["heat"]
        name, u = "fp16", 2.0**-11
        near, chance, square, stopped = [], [], [], []
        for intervals in sizes:
            exact, _, _ = heat(name, None, intervals, 1)
            computed, moved, steps = heat(name, "nearest", intervals, 1)
            near.append(float((computed - exact).abs().max()))
            stopped.append((moved, steps))
            computed, _, _ = heat(name, "stochastic", intervals, runs)
            chance.append((computed - exact).abs().amax(1))
            square.append(float(((computed - exact) ** 2).mean().sqrt()))
        middle = [float(c.median()) for c in chance]
        times = [0.25 / n**2 for n in sizes]
        errors = [f"1/{n}: {100 * a:.2g} % and {100 * b:.2g} %" for n, a, b in zip(sizes, near, middle, strict=True)]
        claims.add(
            "heat equation in half precision: to nearest it stagnates for small enough Δt, stochastically it does not",
            f"error, as a share of the solution's maximum, to nearest and stochastically (median of {runs}), h = "
            + "; ".join(errors)
            + f". To nearest nothing moves after step {stopped[-1][0]:,} of {stopped[-1][1]:,} at h = 1/{sizes[-1]}",
            near[-1] > 10 * middle[-1] and stopped[-1][0] < 0.5 * stopped[-1][1],
        )
        growth, growth_of_largest = -slope(times, square), -slope(times, middle)
        claims.add(
            "there the stochastic error grows like u Δt^(-1/4) at most (Croci and Giles)",
            f"its root mean square over x and runs grows like Δt^(-{growth:.2f}), from {square[0] / u:.2f} u to "
            f"{square[-1] / u:.2f} u; the largest over x, of ever more points, like Δt^(-{growth_of_largest:.2f})",
            growth < 0.28,
        )
        if claims.asked.figure:
            draw(claims.asked.figure, times, near, chance, name, u)


def draw(path, times, near, chance, name, u) -> None:
    from analysis import figures
    from analysis.tables import band

    plt = figures.pyplot()
    chart, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    axes.loglog(times, near, "-o", color=figures.COLOURS[1], label=f"{name} to nearest")
    axes.loglog(
        times, [float(c.median()) for c in chance], "--s", color=figures.COLOURS[2], label=f"{name} stochastic, median"
    )
    low, high = zip(*(band(c.tolist()) for c in chance), strict=True)
    axes.fill_between(times, low, high, color=figures.COLOURS[2], alpha=0.2, label="5 % to 95 % of the runs")
    axes.loglog(
        times,
        [u * dt**-0.25 * (float(chance[0].median()) / u / times[0] ** -0.25) for dt in times],
        ":",
        color="gray",
        label="grows like Δt^(-1/4)",
    )
    axes.axhline(1.0, color="black", linewidth=1, label="the solution's maximum: all is lost")
    axes.invert_xaxis()
    axes.set(
        xlabel="time step Δt (smaller to the right)",
        ylabel="largest error at t = 1",
        title="Heat equation in half precision",
    )
    axes.legend(fontsize="small")
    figures.store(chart, path)


if __name__ == "__main__":
    main()
