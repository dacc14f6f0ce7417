"""lp.watch: what it hears, against loops by hand; and that nothing changes by a bit where somebody listens."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from watch_helpers import RULES, Net, state_of, trained

import low_precision as lp
from low_precision.watcher import layer_of


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("name", RULES)
def test_listening_changes_no_bit(name, reentrant):
    without = trained(RULES[name], False, reentrant=reentrant)
    of_others = state_of(without[0], without[1], without[3])
    model, optimizer, watcher, given = trained(RULES[name], True, reentrant=reentrant)
    assert all(torch.equal(a, b) for a, b in zip(of_others, state_of(model, optimizer, given), strict=True))
    assert {row["step"] for row in watcher.rows()} == {1, 2, 3, 4}


@pytest.mark.parametrize("loss_scale", [1024.0, "dynamic"])
def test_loss_scales_are_as_without(loss_scale):
    a, b = (trained(RULES["float8"], watched, loss_scale=loss_scale) for watched in (False, True))
    assert a[1].loss_scale.state_dict() == b[1].loss_scale.state_dict()
    assert all(torch.equal(p, q) for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True))


@pytest.mark.parametrize("name", RULES)
def test_what_checkpointing_computes_again_counts_once(name):
    """Dropout aside, which draws other numbers there."""
    rows = {}
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        net = Net(reentrant)
        net.attention.dropout = 0.0
        model = lp.quantize_model(net, seed=1, **RULES[name])
        optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.05), model)
        watcher = lp.watch(model)
        for _ in range(2):
            model(torch.ones(3, 8, 16)).square().mean().backward()
            optimizer.step()
        of_run = [
            (r["layer"], r["site"], r.get("rule"), {n: v for n, v in r.items() if n != "step"}) for r in watcher.rows()
        ]
        rows[reentrant] = sorted(of_run, key=lambda row: str(row[:3]))
    assert len(rows[None]) > 10
    assert rows[None] == rows[False] == rows[True]


def test_the_rows_of_a_layer_by_hand():
    """Of one step of two micro-batches, by the library's quantize alone."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    w, b = (p.detach().clone() for p in layer.parameters())
    model = lp.quantize_model(
        nn.Sequential(layer), weights="float8", inputs="float8", errors="float8", activations="e4m3"
    )
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, gradients="e4m3")
    watcher = lp.watch(model)
    batches = [torch.randn(4, 6), torch.randn(3, 6)]
    before = {name: [] for name in ("inputs", "activations", "errors", "gradients", "weights")}
    w, b = lp.quantize(w, "float8"), lp.quantize(b, "float8")
    gradient_w, gradient_b = torch.zeros_like(w), torch.zeros_like(b)
    for x in batches:
        model(x.requires_grad_()).square().sum().backward()
        before["inputs"].append(x.detach())
        read = lp.quantize(x.detach(), "float8")
        y = read @ w.T + b
        before["activations"].append(y)
        error = 2 * lp.quantize(y, "e4m3")
        rounded = lp.quantize(error, "float8")
        before["errors"] += [error, rounded @ w]
        gradient_w, gradient_b = gradient_w + rounded.T @ read, gradient_b + rounded.sum(0)
    before["gradients"] += [gradient_w, gradient_b]
    before["weights"] = [w - 0.01 * lp.quantize(gradient_w, "e4m3"), b - 0.01 * lp.quantize(gradient_b, "e4m3")]
    optimizer.step()
    rows = {row["site"]: row for row in watcher.rows()}
    assert rows.keys() == before.keys()
    for site, tensors in before.items():
        row, format = rows[site], {"activations": "e4m3", "gradients": "e4m3"}.get(site, "float8")
        x = torch.cat([tensor.flatten() for tensor in tensors])
        q = lp.quantize(x, format)
        assert (row["step"], row["layer"], row["rule"]) == (1, "0", f"{format}:nearest")
        assert row["numbers"] == x.numel()
        assert row["flushed"] == float(((x != 0) & (q == 0)).double().mean())
        assert row["amax"] == pytest.approx(float(x.abs().max()), rel=1e-6)
        noise = (q.double() - x.double()).square().sum()
        assert row["sqnr_db"] == pytest.approx(10 * math.log10(x.double().square().sum() / noise), rel=1e-4)


def boston_like(**rules):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 13, generator=generator)
    y = x @ torch.randn(13, 1, generator=generator) + torch.randn(64, 1, generator=generator)
    torch.manual_seed(0)
    model = lp.quantize_model(nn.Sequential(nn.Linear(13, 1)), seed=1, **rules)
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.001), model)
    return model, optimizer, x, y


def test_lost_updates_to_the_exact_count():
    """A linear model whose weights are float8 to nearest stalls; here by plain PyTorch beside it."""
    model, optimizer, x, y = boston_like(weights="float8")
    w, b = (p.detach().clone() for p in model.parameters())
    watcher = lp.watch(model)
    counts, last = [], []
    for step in range(1, 31):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        error = 2 * (x @ w.T + b - y) / len(x)
        new_w, new_b = w - 0.001 * (error.T @ x), b - 0.001 * error.sum(0)
        lost = wanted = 0
        moved = False
        for old, new in zip([*w.flatten(), *b], [*new_w.flatten(), *new_b], strict=True):
            rounded = lp.quantize(new.reshape(1), "float8")[0]
            wanted += int(new != old)
            lost += int(new != old and rounded == old)
            moved |= bool(rounded != old)
        w, b = lp.quantize(new_w, "float8"), lp.quantize(new_b, "float8")
        counts.append((wanted, lost))
        last.append(step if moved else last[-1])
    assert torch.equal(model[0].weight, w)
    rows = [row for row in watcher.rows() if row["site"] == "weights"]
    assert [(row["updates"], round(row["lost_updates"] * row["updates"])) for row in rows] == counts
    assert [row["last_moved"] for row in rows] == last
    assert counts[-1][0] == counts[-1][1]
    assert last[-1] < 30


def test_what_an_accumulator_and_a_compensation_keep():
    model, optimizer, x, y = boston_like(weights="float8", accumulator="float32")
    watcher = lp.watch(model)
    for _ in range(10):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    rows = {row["site"]: row for row in watcher.rows() if row["step"] == 10}
    assert rows["weights"]["lost_updates"] >= 0.5
    assert rows["accumulator"]["lost_updates"] == 0.0
    assert rows["accumulator"]["arrived_norm"] == 1.0
    assert rows["accumulator"]["rule"] == "float32"
    model, optimizer, x, y = boston_like(weights="bfloat16", compensation="float32")
    watcher = lp.watch(model)
    for _ in range(10):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    rows = {row["site"]: row for row in watcher.rows() if row["step"] == 10}
    assert rows["compensation"]["lost_updates"] == 0.0
    assert rows["compensation"]["update_cosine"] == pytest.approx(1.0, abs=1e-5)


def test_the_error_of_products_by_hand():
    torch.manual_seed(0)
    model = lp.quantize_model(nn.Sequential(nn.Linear(8, 6)), products="mxfp4")
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.0), model)
    watcher = lp.watch(model)
    x = torch.randn(5, 8, requires_grad=True)
    y = model(x)
    e = torch.randn(5, 6)
    y.backward(e)
    optimizer.step()
    w, a = model[0].weight.detach(), x.detach()

    def q(tensor, dim):
        return lp.quantize(tensor, "mxfp4", dim=dim)

    wanted = {
        "forward": (q(a, 1) @ q(w, 1).T, a @ w.T),
        "dgrad": (q(e, 1) @ q(w, 0), e @ w),
        "wgrad": (q(e, 0).T @ q(a, 0), e.T @ a),
    }
    rows = {row["site"]: row for row in watcher.rows()}
    for site, (rounded, exact) in wanted.items():
        assert rows[site]["error"] == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-5)
        assert rows[site].keys() == {"step", "layer", "site", "error"}


def test_step_1_and_every_nth_are_heard_and_the_last_move_of_all():
    rows = {}
    for every in (1, 9):
        model, optimizer, x, y = boston_like(weights="float8")
        watcher = lp.watch(model, every=every)
        for _ in range(25):
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert watcher.rows() == watcher.rows()  # which does not forget them
        rows[every] = [row for row in watcher.take() if row["site"] == "weights"]
        assert watcher.take() == watcher.rows() == []
    assert rows[9] == [row for row in rows[1] if row["step"] in (1, 9, 18)]
    assert rows[9][-1]["last_moved"] not in (0, 1, 9, 18)  # between the steps that were watched


def test_a_copy_is_not_heard_and_a_pass_that_looks_neither():
    model, optimizer, x, y = boston_like(weights="float8", inputs="float8")
    watcher = lp.watch(model)
    copy.deepcopy(model)(x)
    lp.coverage(model, x)
    with lp.unquantized(model):
        model(x)
    model.eval()
    model(x)
    model.train()
    with torch.no_grad():
        model(x)
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    (row,) = [row for row in watcher.rows() if row["site"] == "inputs"]
    assert row["numbers"] == x.numel()


def test_a_resumed_model_knows_when_it_last_moved():
    model, optimizer, x, y = boston_like(weights="float8")
    watcher = lp.watch(model)

    def train(steps):
        for _ in range(steps):
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(12)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), watcher.state_dict()))
    watcher.take()
    train(3)
    wanted = watcher.take()
    model, optimizer, x, y = boston_like(weights="float8")
    watcher = lp.watch(model)
    for part, state in zip((model, optimizer, watcher), saved, strict=True):
        part.load_state_dict(state)
    train(3)
    assert watcher.take() == wanted
    assert wanted[-1]["last_moved"] < 12


def test_closures_and_skipped_steps():
    model, _, x, y = boston_like(weights="float8")
    optimizer = lp.quantize_optimizer(torch.optim.LBFGS(model.parameters(), max_iter=3), model)
    watcher = lp.watch(model)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    rows = {row["site"]: row for row in watcher.rows()}
    assert rows["weights"]["updates"] > 14  # more than one evaluation moved the 14 weights
    model, _, x, y = boston_like(weights="float8", errors="float8")
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_scale="dynamic")
    watcher = lp.watch(model)
    optimizer.loss_scale.scale(1e30 * F.mse_loss(model(x), y)).backward()
    optimizer.step()
    assert optimizer.loss_scale.skipped == 1
    assert [row["site"] for row in watcher.rows()] == ["errors"]


def test_the_report_stands_beside_the_modules():
    model, _, watcher, _ = trained(RULES["stochastic"], True, steps=2)
    report = lp.report(model)
    title, table, worst, legend = str(report).split("\n\n")
    assert title == "What rounding lost in step 2"
    assert [line.split()[0] for line in table.splitlines()[:3]] == ["module", "(the", ":relu"]
    assert ":matmul.1" in table
    assert "weights" in table
    assert "float8:stochastic" in table
    assert max(map(len, table.splitlines())) < 200
    assert "not finite" not in table  # there is none, so there is no column
    assert {row["step"] for row in report.rows} == {2}
    assert {row["layer"] for row in report.rows} == {row["layer"] for row in watcher.rows()}
    noisiest = min((row for row in report.rows if row.get("sqnr_db") is not None), key=lambda row: row["sqnr_db"])
    place = (
        f"{noisiest['layer'] or '(the model)'} {noisiest['site']} ({noisiest['rule']}): {noisiest['sqnr_db']:.1f} dB"
    )
    assert worst.splitlines()[0].split(maxsplit=2) == ["lowest", "SQNR", place]
    assert "flushed: became zero" in legend


def test_a_report_of_weights_that_never_moved():
    model, optimizer, x, y = boston_like(weights="float8")
    lp.watch(model)
    optimizer.param_groups[0]["lr"] = 1e-9
    F.mse_loss(model(x), y).backward()
    optimizer.step()
    (line,) = [line for line in str(lp.report(model)).splitlines() if "float8:nearest" in line and "(" not in line]
    assert line.split()[-5:] == ["100", "%", "0", "%", "never"]


def test_the_layers_of_tensors():
    assert layer_of("weights", "blocks.0.fc.weight") == "blocks.0.fc"
    assert layer_of("momentum", "weight") == ""
    assert layer_of("inputs", "blocks.0.fc") == layer_of("errors", "blocks.0.fc.output") == "blocks.0.fc"
    assert layer_of("inputs", "blocks.0.input") == layer_of("errors", "blocks.0.input.output") == "blocks.0.input"
    assert layer_of("forward.inputs", "blocks.0:matmul.1[0]") == "blocks.0:matmul.1"
    assert layer_of("errors", "blocks.0:matmul.1[1].input") == "blocks.0:matmul.1"
    assert layer_of("activations", "rnn:lstm[step 3]") == "rnn:lstm"
    assert layer_of("forward.weights", "rnn:hh_l0_reverse.7[1]") == "rnn:hh_l0_reverse"
    assert layer_of("elementwise", "m:gelu.error") == "m:gelu"


def test_what_cannot_be_watched():
    with pytest.raises(ValueError, match="not rounded"):
        lp.watch(nn.Linear(2, 2))
    model = lp.quantize_model(nn.Linear(2, 2), weights="float8")
    with pytest.raises(ValueError, match="nobody watches"):
        lp.report(model)
    for every in (0, -1, 1.5, True, "5"):
        with pytest.raises(lp.SettingError, match="a whole number >= 1"):
            lp.watch(model, every)
    assert "nothing was heard" in str((lp.watch(model), lp.report(model))[1])
