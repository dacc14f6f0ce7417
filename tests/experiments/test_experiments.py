"""The scripts of experiments/: what they compute is what they say, and each runs to its end (--quick)."""

import csv
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from run_helpers import ROOT
from scipy import stats

sys.path.insert(0, str(ROOT / "experiments"))
import averaging
import biased
import claims
import parts
import ranking
import stagnation
import sums

import sweep
from low_precision.tensor import quantize

SHARED = ("claims", "ranking", "tables")  # no scripts that tell claims
SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem not in SHARED)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_tells_and_keeps_its_claims(name, tmp_path):
    command = [
        sys.executable,
        ROOT / "experiments" / f"{name}.py",
        "--quick",
        "--save",
        "new/c.csv",
        "--figure",
        "x.svg",
    ]
    ran = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    with open(tmp_path / "new" / "c.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["claim", "measured here", "holds"]
    assert len(rows) == ran.stdout.count("claim: ") >= 2
    for claim, measured, holds in rows:
        assert claim in ran.stdout
        assert measured in ran.stdout
        assert holds in ("yes", "**no**", claims.UNDECIDED)
    assert (tmp_path / "x.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("low", "high", "bound", "expected"),
    [
        (0.1, 0.2, None, True),
        (-0.2, -0.1, None, False),
        (-0.1, 0.2, None, None),
        (0.0, 0.2, None, None),
        (math.inf, math.inf, None, True),  # it diverged
        (-0.1, 0.2, 0.3, True),
        (-0.1, 0.2, 0.2, None),
        (-0.4, 0.2, 0.3, None),
        (0.31, 0.4, 0.3, False),
        (-0.4, -0.31, 0.3, False),
        (math.inf, math.inf, 0.3, False),
        (math.nan, math.nan, None, None),  # what it is compared with diverged
        (math.nan, math.nan, 0.3, None),
    ],
)
def test_an_interval_decides_or_does_not(low, high, bound, expected):
    assert parts.verdict(low, high, bound) is expected


def test_claims_of_parts_are_of_settings_in_pairs():
    named = {name for claim in parts.CLAIMS for name in (claim.base, claim.other)}
    assert named | {"float32"} == set(parts.SETTINGS)
    asked = parts.commands("--dataset shakespeare", 10, 2, list(parts.SETTINGS))
    configs = [sweep.grid(flags.split())[0] for _, flags in asked]
    assert [len(found) for found in configs] == [1] * len(asked)
    assert len({found[0].folder_name for found in configs}) == len(asked)  # no two settings are one


def test_noise_of_an_item_is_the_mean_over_its_layers_parts_and_operands():
    def line(layer, site, sqnr):
        return {"layer": layer, "site": site, "sqnr_db": sqnr, "bias": -0.5, "saturated": None, "flushed": 0.25}

    lines = [
        line("blocks.1.up", "forward.inputs", 20.0),
        line("blocks.1:scores", "forward.weights", 10.0),
        line("blocks.10.up", "forward.inputs", 0.0),
        line("head", "wgrad.errors", None),
    ]
    assert ranking.of_item("blocks.1/*", lines) == pytest.approx([0.055, 0.5, 0.0, 0.25])
    assert ranking.of_item("forward.inputs", lines) == pytest.approx([0.505, 0.5, 0.0, 0.25])
    assert ranking.of_item("blocks.1/forward.inputs", lines) == pytest.approx([0.01, 0.5, 0.0, 0.25])
    assert ranking.of_item("head/*", lines) == pytest.approx([0.0, 0.5, 0.0, 0.25])


def test_a_rank_correlation_is_scipys_with_the_share_of_orders_that_are_as_high():
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0]
    rho, p = ranking.rank_correlation(x, y)
    exact = stats.permutation_test(
        (x,), lambda order: stats.spearmanr(order, y).statistic, permutation_type="pairings", alternative="greater"
    )
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert p == pytest.approx(exact.pvalue)


def test_the_exponent_of_a_power_law():
    x = [1.0, 10.0, 1000.0]
    assert claims.slope(x, [3 * v**-0.25 for v in x]) == pytest.approx(-0.25)


@pytest.mark.parametrize(("name", "terms", "value"), [("bfloat16", 64, 5.0625), ("fp16", 512, 7.0859375)])
def test_the_harmonic_series_stops_where_numpy_stops(name, terms, value):
    moved, nearest, _ = stagnation.harmonic(name, 600)
    assert (moved, nearest) == (terms, value)
    if name == "fp16":
        total = np.float16(0)
        for n in range(1, 601):
            total = total + np.float16(1) / np.float16(n)
        assert float(total) == nearest


def test_the_heat_equation_without_rounding_ends_at_its_solution():
    computed, _, steps = stagnation.heat("fp16", None, 16, 1)
    assert steps == 4 * 16**2
    exact = np.sin(np.pi * np.arange(1, 16) / 16)
    # Central differences have (1 + π² h²/12) times the solution at the end of time; e^(-π²) of the start is left.
    assert np.allclose(computed[0].numpy(), exact * (1 - np.exp(-(np.pi**2))) * (1 + np.pi**2 / 16**2 / 12), rtol=1e-4)


def test_backward_errors_of_sums_are_those_of_a_plain_loop():
    computed = sums.errors("bfloat16", "nearest", [100], 3)[100]
    torch.manual_seed(1)
    equal = quantize(1 + torch.rand(3, dtype=torch.float64), "bfloat16")
    total = torch.zeros(3)
    for _ in range(100):
        total = (total + equal.float()).bfloat16().float()
    assert torch.allclose(computed[0], ((total - 100 * equal).abs() / (100 * equal)).double(), atol=1e-12)


@pytest.mark.parametrize("scheme", ["SR_ε", "signed-SR_ε"])
@pytest.mark.parametrize(("x", "gradient"), [(1.0625, 1.0), (1.0625, -1.0), (-1.1, 1.0), (-1.1, -1.0), (1.22, 1.0)])
def test_biased_schemes_go_up_as_often_as_they_say(scheme, x, gradient):
    n = 40_000
    values = torch.full((n,), x)
    computed = biased.rounded(values, "float8_e5m2", scheme, 5, torch.full((n,), gradient))
    low, high = (quantize(values[:1], "float8_e5m2", way).item() for way in ("down", "up"))
    bias = biased.EPSILON * (np.sign(x) if scheme == "SR_ε" else -gradient)
    p = min(1.0, max(0.0, (values[0].item() - low) / (high - low) + bias))
    ups = int((computed == high).sum())
    assert ups + int((computed == low).sum()) == n
    assert stats.binomtest(ups, n, p).pvalue > 1e-4 if 0 < p < 1 else ups == n * p


def test_a_value_of_the_format_stays_whatever_the_bias():
    values = torch.tensor([0.0, 1.0, -1.25, 2.0**-16])
    for scheme in ("SR_ε", "signed-SR_ε"):
        assert torch.equal(biased.rounded(values, "float8_e5m2", scheme, 1, torch.ones(4)), values)


def test_averages_are_means_of_the_weights_after_a_tenth():
    seen = []

    def gradient(w, generator):
        seen.append(w.clone())
        return w - 1

    last, average = averaging.descend(gradient, 2, None, 0.5, [10, 20])
    weights = [*seen[1:], last[20]]  # after each step
    assert torch.equal(last[10], weights[9])
    assert torch.allclose(average[20], torch.stack(weights[2:]).mean(0))


def test_the_optimum_of_the_logistic_regression_has_no_gradient():
    gradient, best = averaging.logistic()
    generator = torch.Generator().manual_seed(1)
    mean = gradient(best.expand(200_000, -1), generator).mean(0)
    spread = gradient(best.expand(200_000, -1), generator).std(0) / 200_000**0.5
    assert bool((mean.abs() < 5 * spread).all())
