"""What is tried beside a run: against quantize and products by hand; and the run's bits are those of one without."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from watch_helpers import RULES, state_of, trained

import low_precision as lp

TRIED = ("mxfp4", "float8:stochastic", "float8_e4m3fn@tensor@delayed4", "recipe:nvfp4", "recipe:te-delayed")


@pytest.mark.parametrize("name", ["stochastic", "nvfp4", "te-delayed"])
def test_trying_changes_no_bit(name):
    without = trained(RULES[name], False, reentrant=False, loss_scale="dynamic")
    model, optimizer, watcher, given = trained(
        RULES[name], True, reentrant=False, loss_scale="dynamic", every=2, also=[*TRIED, "recipe:quartet"]
    )
    of_both = zip(state_of(without[0], without[1], without[3]), state_of(model, optimizer, given), strict=True)
    assert all(torch.equal(a, b) for a, b in of_both)
    assert without[1].loss_scale.state_dict() == optimizer.loss_scale.state_dict()
    plain = trained(RULES[name], True, reentrant=False, loss_scale="dynamic", every=2)[2].rows()
    assert [row for row in watcher.rows() if "also" not in row] == plain


def linear(also, steps=1, dtype=None):
    """A float32 layer with no rule of its own: the rows of its last step, its tensors there, and the weights it had."""
    torch.manual_seed(0)
    model = lp.quantize_model(nn.Sequential(nn.Linear(32, 6, bias=False)), seed=1)
    optimizer = lp.quantize_optimizer(torch.optim.Adam(model.parameters(), lr=0.01), model)
    watcher = lp.watch(model, also=also)
    for _ in range(steps):
        x, e = torch.randn(5, 32), torch.randn(5, 6)
        x = x.requires_grad_()
        w = model[0].weight.detach().clone()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            y = model(x)
        y.float().backward(e)
        optimizer.step()
        optimizer.zero_grad()
    rows = {row["site"]: row for row in watcher.rows() if row["step"] == steps}
    return rows, x.detach(), w, e, y.detach(), model[0].weight.detach(), optimizer


def decibels(x, q):
    return 10 * math.log10(float(x.double().square().sum() / (q.double() - x.double()).square().sum()))


def test_every_site_of_a_layer_in_float32():
    rows, x, w, e, y, new_w, optimizer = linear("mxfp4")

    def q(tensor, dim=1):
        return lp.quantize(tensor, "mxfp4", dim=dim)

    moments = next(iter(optimizer.state.values()))
    of_sites = {
        "inputs": (x, 1),
        "activations": (y, 1),
        "errors": (e, 1),
        "forward.inputs": (x, 1),
        "forward.weights": (w, 1),
        "dgrad.errors": (e, 1),
        "dgrad.weights": (w, 0),
        "wgrad.errors": (e, 0),
        "wgrad.inputs": (x, 0),
        "gradients": (e.T @ x, 1),
        "momentum.exp_avg": (moments["exp_avg"], 1),
        "momentum.exp_avg_sq": (moments["exp_avg_sq"], 1),
        "weights": (new_w, 1),
    }
    products = {
        "forward": (q(x) @ q(w).T, x @ w.T),
        "dgrad": (q(e) @ q(w, 0), e @ w),
        "wgrad": (q(e, 0).T @ q(x, 0), e.T @ x),
    }
    assert rows.keys() == {*of_sites, *products}
    for site, (tensor, dim) in of_sites.items():
        assert rows[site]["also"] == rows[site]["rule"] == "mxfp4:nearest"
        assert rows[site]["sqnr_db"] == pytest.approx(decibels(tensor, q(tensor, dim)), rel=1e-5), site
        assert rows[site]["numbers"] == tensor.numel()
    for site, (rounded, exact) in products.items():
        assert rows[site]["error"] == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-5)
    # Weights stand in the format before the step, so the update is added to what was found, rounded.
    before = q(w).double()
    after = q((before + (new_w.double() - w.double())).float()).double()
    assert rows["weights"]["updates"] == w.numel()
    assert rows["weights"]["lost_updates"] == float((after == before).double().mean()) > 0.5


def test_a_delayed_scale_follows_from_the_steps_before():
    torch.manual_seed(0)
    model = lp.quantize_model(nn.Sequential(nn.Linear(8, 6)), seed=1)
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.0), model)
    watcher = lp.watch(model, also="float8_e4m3fn@tensor@delayed4")
    batches = [torch.randn(5, 8), 8 * torch.randn(5, 8), torch.randn(5, 8)]
    for x in batches:
        model(x).sum().backward()
        optimizer.step()
    rows = [row for row in watcher.rows() if row["site"] == "forward.inputs"]
    for step in (2, 3):
        amax = max(float(x.abs().max()) for x in batches[: step - 1])
        assert rows[step - 1]["scale_max"] == pytest.approx(amax / 448, rel=1e-6)
    assert rows[1]["saturated"] > 0 == rows[2]["saturated"]


def test_a_recipe_at_its_own_sites_alone_and_products_of_two_inputs_left():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(16, 16)

        def forward(self, x):
            q = self.query(x)
            return F.scaled_dot_product_attention(q, q, q) @ self.query.weight

    torch.manual_seed(0)
    model = lp.quantize_model(Attention(), seed=1)
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.01), model)
    watcher = lp.watch(model, also=["recipe:mxfp8", "bfloat16"])
    model(torch.randn(2, 5, 16)).sum().backward()
    optimizer.step()
    by_tried = {}
    for row in watcher.rows():
        by_tried.setdefault(row["also"], set()).add((row["layer"], row["site"].partition(".")[0]))
    # The layer's inputs need no gradient; the other product's do.
    assert by_tried["recipe:mxfp8"] == {
        *(("query", product) for product in ("forward", "wgrad")),
        *((":matmul", product) for product in ("forward", "dgrad", "wgrad")),
    }
    assert {":scores", ":values"} <= {layer for layer, _ in by_tried["bfloat16:nearest"]}


def test_under_autocast_halves_are_widened():
    rows, *_ = linear("nvfp4", dtype=torch.bfloat16)
    assert {"activations", "forward", "wgrad.inputs"} <= rows.keys()


def test_what_cannot_be_tried():
    model = lp.quantize_model(nn.Sequential(nn.Linear(8, 6)), seed=1)
    for also in (3, "", ["float8", None]):
        with pytest.raises(lp.SettingError, match=r"also: given .*, allowed: FORMAT\[:ROUNDING\] or recipe:NAME"):
            lp.watch(model, also=also)
    with pytest.raises(lp.SettingError, match="did you mean recipe:nvfp4"):
        lp.watch(model, also="recipe:nvfp5")
    with pytest.raises(lp.SettingError, match="did you mean mxfp4"):
        lp.watch(model, also="mxfp5")
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.01), model)
    watcher = lp.watch(model, also="mxfp4")
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="this model is compiled, so no layer's products can be tried"):
        compiled(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    assert {row["site"] for row in watcher.rows()} == {"gradients", "weights"}


def test_a_call_that_cannot_be_tried_is_named_and_the_run_goes_on(monkeypatch):
    from low_precision import what_if

    def fails(*arguments, **named):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(what_if, "call_in", fails)
    with pytest.warns(UserWarning, match="watch: mxfp4:nearest could not be tried at 0: no memory left"):
        rows, *_ = linear("mxfp4")
    assert {"inputs", "activations", "weights"} <= rows.keys()
