"""Error growth of sums and inner products, to nearest and stochastically: python experiments/sums.py

Connolly, Higham and Mary 2021 (doi:10.1137/20M1334796); the claims as the survey of Croci et al. 2022
(doi:10.1098/rsos.211631) states them in its abstract. Recursive summation, s = fl(s + x), of n up to 10^6 numbers that
are themselves in the format; in an inner product each product is rounded first. 100 sets of numbers of each kind:

equal      x_1 = x_2 = ... = x_n, uniform in [1, 2): each addition makes the same error
positive   uniform in [0, 1)
signs      uniform in [-1, 1)
product    of two vectors uniform in [0, 1)

The error is |computed - exact| over the sum of |x| (of |x y|), the backward error; sums are exact in float64 to 10^-9
of that. u = 2^-(mantissa bits + 1).
"""

from __future__ import annotations

from claims import Claims, slope

KINDS = ("equal", "positive", "signs", "product")
FORMATS = {"bfloat16": 7, "tf32": 10, "e8m15": 15}  # name: mantissa bits; the exponents of all are those of float32
SETS = 100


def errors(name: str, rounding: str, places: list[int], sets: int) -> dict[int, object]:
    """By n: the backward errors, shape (kinds, sets)."""
    import torch

    from low_precision.tensor import quantize

    torch.manual_seed(1)
    equal = quantize(1 + torch.rand(sets, dtype=torch.float64), name)
    computed, exact, size = (torch.zeros(len(KINDS), sets, dtype=torch.float64) for _ in range(3))
    width, low = torch.tensor([1, 2, 1, 1])[:, None], torch.tensor([0, 1, 0, 0])[:, None]
    errors_by_n, block = {}, 100
    for start in range(0, places[-1], block):
        drawn = torch.rand(block, 4, sets, dtype=torch.float64) * width - low
        positive, signs, left, right = quantize(drawn, name).unbind(1)
        products = left * right
        # Keys: even ones for products, odd ones for sums, so that no two roundings share their random bits.
        rounded = quantize(products, name, rounding, key=2 * start)
        truth = torch.stack([equal.expand_as(positive), positive, signs, products], 1)
        terms = torch.stack([*truth.unbind(1)[:3], rounded], 1)
        for step in range(block):
            computed = quantize(computed + terms[step], name, rounding, key=2 * (start + step) + 1, backend="fused")
        exact += truth.sum(0)
        size += truth.abs().sum(0)
        if start + block in places:
            errors_by_n[start + block] = (computed - exact).abs() / size
    return errors_by_n


def main() -> None:
    with Claims(__doc__) as claims:
        places = [10**k for k in range(2, 4 if claims.asked.quick else 7)]
        sets = 10 if claims.asked.quick else SETS
        results = {(f, r): errors(f, r, places, sets) for f in FORMATS for r in ("nearest", "stochastic")}
        mean = {  # root mean square over the sets
            (f, r, kind): [float((by_n[n][k] ** 2).mean().sqrt()) for n in places]
            for (f, r), by_n in results.items()
            for k, kind in enumerate(KINDS)
        }
        last, fine = places[-1], "e8m15"
        u = {name: 2.0 ** -(bits + 1) for name, bits in FORMATS.items()}

        ratio = {
            r: [max(float(results[f, r][n].max()) / (n**0.5 * u[f]) for f in FORMATS) for n in places]
            for r in ("nearest", "stochastic")
        }
        claims.add(
            "stochastic: the error is at most a constant times √n u, with high probability (Connolly et al.)",
            f"largest error / (√n u) of {4 * sets} sums and products in each of 3 formats: "
            f"{max(ratio['stochastic']):.2f}, "
            f"at n = {places[0]} {ratio['stochastic'][0]:.2f}, at n = 10^{len(places) + 1} "
            f"{ratio['stochastic'][-1]:.2f}",
            max(ratio["stochastic"]) < 5 and ratio["stochastic"][-1] <= 1.5 * ratio["stochastic"][0],
        )
        growth = {r: slope(places, mean[fine, r, "equal"]) for r in ("nearest", "stochastic")}
        claims.add(
            "nearest: the worst case grows like n u; stochastic like √n u",
            f"equal numbers in {fine}, n = 100 to 10^{len(places) + 1}: error grows like n^{growth['nearest']:.2f} to "
            f"nearest, n^{growth['stochastic']:.2f} stochastically; at the end "
            f"{mean[fine, 'nearest', 'equal'][-1] / u[fine]:,.0f} u against "
            f"{mean[fine, 'stochastic', 'equal'][-1] / u[fine]:,.0f} u (root mean square of {sets})",
            growth["nearest"] > 0.9 and growth["stochastic"] < 0.6,
        )
        lost = results["bfloat16", "nearest"][last][1]
        kept = mean["bfloat16", "stochastic", "positive"][-1]
        claims.add(
            "stochastic rounding is immune to stagnation, nearest is not",
            f"10^{len(places) + 1} positive numbers in bfloat16: to nearest {100 * float(lost.min()):.1f} - "
            f"{100 * float(lost.max()):.1f} % of the sum are lost (smallest - largest of {sets}), stochastically the "
            f"error is {100 * kept:.1f} % (root mean square)",
            float(lost.min()) > 0.5 and kept < 0.1,
        )
        more = {
            kind: [mean[fine, "stochastic", kind][k] / mean[fine, "nearest", kind][k] for k in (0, -1)]
            for kind in KINDS
            if kind != "equal"
        }
        claims.add(
            "(our own question) where is nearest the better one? Its single error is at most half as large, so: while "
            "errors cancel by themselves, in short sums and where the numbers' signs cancel",
            f"{fine}, stochastic error / nearest error (root mean squares of {sets}) at n = 100 and "
            f"10^{len(places) + 1}: " + "; ".join(f"{kind} {a:.2g} and {b:.2g}" for kind, (a, b) in more.items()),
            all(a > 1 for a, _ in more.values()) and more["signs"][1] > 1,
        )
        if claims.asked.figure:
            draw(claims.asked.figure, places, mean, u, sets)


def draw(path, places, mean, u, sets) -> None:
    from analysis import figures

    plt = figures.pyplot()
    chart, panels = plt.subplots(1, len(KINDS), figsize=(12, 4.4), sharey=True, layout="constrained")
    for axes, kind in zip(panels, KINDS, strict=True):
        for number, name in enumerate(FORMATS):
            colour = figures.COLOURS[1 + number]
            axes.loglog(places, mean[name, "nearest", kind], "-o", color=colour, markersize=4, label=f"{name}, nearest")
            axes.loglog(
                places, mean[name, "stochastic", kind], "--s", color=colour, markersize=4, label=f"{name}, stochastic"
            )
            axes.loglog(places, [n**0.5 * u[name] for n in places], ":", color=colour, linewidth=1)
        axes.set(
            title={"product": "inner products", "equal": "sums of equal numbers", "signs": "sums, both signs"}.get(
                kind, f"sums, {kind}"
            ),
            xlabel="n",
            ylim=(1e-7, 3),
        )
    panels[0].set_ylabel("backward error")
    chart.suptitle(f"Error of sums of n numbers (root mean square of {sets}); dotted: √n u of the format")
    chart.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figures.store(chart, path)


if __name__ == "__main__":
    main()
