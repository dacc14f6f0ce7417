"""--micro-batch: the step is that of the whole batch, its noise too, and what is watched counts every part."""

import json

import pytest
import torch
from run_helpers import ROOT, bits, kill_self, only, stopped, torchrun, write_cifar10

from lab.batches import Batch
from lab.processes import Processes
from low_precision.clock import BatchPart
from low_precision.wrap import quantize_model, quantize_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = ["--dataset", "digits", "--model", "mlp", "--batch-size", 100, "--learning-rate", 0.05, "--epochs", 2]
FLOWING = ["--precision", "float8", "--rounding", "stochastic", "--quantize", "inputs,activations,errors"]


@pytest.mark.parametrize("flags", [FLOWING, ["--recipe", "mxfp8", "--rounding", "stochastic"], []], ids=" ".join)
@pytest.mark.parametrize("micro", [30, 1])
def test_the_noise_is_that_of_the_whole_batch(cli, flags, micro):
    """Only sums over rows differ, in their last bits; with noise by part, all of it would."""
    flags = (
        [*flags, "--site", "forward.inputs=float8:stochastic", *DIGITS] if "--recipe" in flags else [*flags, *DIGITS]
    )
    whole, parts = cli(*flags).metrics, cli(*flags, "--micro-batch", micro, "--output-dir", "parts").metrics
    for line, expected in zip(parts, whole, strict=True):
        assert line["training_loss"] == pytest.approx(expected["training_loss"], rel=1e-4)
        assert line["training_accuracy"] == pytest.approx(expected["training_accuracy"], abs=2 / 1437)


def outputs_of(parts, noise_by_call=False):
    """Those of a linear layer whose outputs are rounded stochastically, with its rows in so many parts."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(16, 16), torch.randn(12, 16)
    quantize_model(model, activations="float8:stochastic", seed=3)
    outputs, clock, size = [], model.low_precision.clock, 12 // parts
    for first in range(0, 12, size):
        if noise_by_call:
            clock.part = BatchPart(size, first)
        else:
            clock.begin_part(BatchPart(size, first))
        outputs.append(model(x[first : first + size]).detach())
    return torch.cat(outputs)


def test_every_row_has_the_bits_that_it_has_in_one_piece():
    whole = outputs_of(1)
    assert all(torch.equal(outputs_of(parts), whole) for parts in (2, 3, 12))
    assert not torch.equal(outputs_of(3, noise_by_call=True), whole)


def test_a_batch_in_parts():
    x, y = torch.arange(11.0)[:, None], torch.arange(11)
    batch = Batch(x, y, 20, 50, Processes(torch.device("cpu")), seed=0)
    parts = batch.parts(4)
    assert [(part.first_row, part.rows, part.whole) for part in parts] == [(20, 4, 50), (24, 4, 50), (28, 3, 50)]
    assert torch.equal(torch.cat([part.x for part in parts]), x)
    assert batch.parts(None) == [batch]
    assert batch.parts(11) == [batch]
    losses = [part.x.square().mean() for part in parts]
    added = sum(part.share(loss) for part, loss in zip(parts, losses, strict=True))
    assert float(added) == pytest.approx(float(x.square().sum() / 50), rel=1e-6)
    results = [(loss, torch.tensor(1), part.rows) for part, loss in zip(parts, losses, strict=True)]
    loss, correct, rows = batch.over_processes(results)
    assert (float(loss), int(correct), rows) == (pytest.approx(float(x.square().mean()), rel=1e-6), 3, 11)


def test_a_part_of_the_size_of_the_batch_is_the_batch(cli):
    first, second = cli(*DIGITS, *FLOWING), cli(*DIGITS, *FLOWING, "--micro-batch", 100, "--output-dir", "other")
    assert first.folder.name == second.folder.name
    assert (first.folder / "metrics.jsonl").read_bytes() == (second.folder / "metrics.jsonl").read_bytes()


def test_gradients_are_rounded_once_after_they_were_added(cli):
    """By hand: two parts of a linear layer, each with its share of the mean, and float8 after the sum."""
    torch.manual_seed(1)
    model = torch.nn.Linear(5, 3)
    x = torch.randn(7, 5)
    expected = torch.nn.Linear(5, 3)
    expected.load_state_dict(model.state_dict())
    for part in (x[:4], x[4:]):
        (expected(part).square().mean() * len(part) / 7).backward()
    quantize_model(model, activations="float32", seed=1)
    optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, gradients="float8_e5m2")
    before = model.weight.detach().clone()
    for part in (x[:4], x[4:]):
        (model(part).square().mean() * len(part) / 7).backward()
    optimizer.step()
    rounded = expected.weight.grad.to(torch.float8_e5m2).float()
    assert torch.allclose(before - model.weight.detach(), rounded, atol=1e-7)


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_what_is_watched_counts_all_parts_once(cli):
    """amax of a step is that of all rows; sums of squares are those of the whole batch, whatever its parts."""
    flags = [*DIGITS, "--precision", "float8", "--epochs", 1, "--watch", 5]
    whole = lines_of(cli(*flags).folder, "layers.jsonl")
    parts = lines_of(cli(*flags, "--micro-batch", 30, "--output-dir", "parts").folder, "layers.jsonl")
    places = [(line["step"], line["layer"], line["site"]) for line in whole]
    assert places == [(line["step"], line["layer"], line["site"]) for line in parts]
    first = [(a, b) for a, b in zip(whole, parts, strict=True) if a["step"] == 1]
    for a, b in first:
        if a["site"] in ("inputs", "activations", "weights"):  # errors are those of each part's mean
            assert b["amax"] == pytest.approx(a["amax"], rel=1e-5)
            for name in ("sqnr_db", "flushed"):  # None where nothing was lost
                assert b[name] == (a[name] and pytest.approx(a[name], rel=1e-3))


@pytest.mark.parametrize(
    "flags",
    [
        ["--recipe", "nvfp4", "--clip-norm", 0.5, "--optimizer", "adamw"],
        ["--precision", "float8", "--rounding", "stochastic", "--site", "accumulator=float16:stochastic"],
        ["--recipe", "te-delayed", "--optimizer", "muon"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_stopped_in_mid_epoch_and_resumed(cli, monkeypatch, flags):
    flags = [*DIGITS[:-2], *flags, "--micro-batch", 30, "--steps", 20, "--evaluate-every", 8]
    expected = bits(cli(*flags, "--output-dir", "straight").folder)
    folder = stopped(cli, monkeypatch, *flags, steps=11)
    assert bits(cli("--resume", folder).folder) == expected


def test_images_are_augmented_as_in_one_piece(cli, tmp_path):
    """Without batch norm, of which each part has its own statistics."""
    write_cifar10(tmp_path, count=5)
    flags = ["--dataset", "cifar10", "--model", "cnn", "--batch-size", 8, "--data-dir", tmp_path, "--epochs", 2]
    whole, parts = cli(*flags).metrics, cli(*flags, "--micro-batch", 3, "--output-dir", "parts").metrics
    for line, expected in zip(parts, whole, strict=True):
        assert line["training_loss"] == pytest.approx(expected["training_loss"], rel=1e-5)
    norms = ["--dataset", "cifar10", "--batch-size", 8, "--data-dir", tmp_path, "--epochs", 1]
    whole, parts = cli(*norms).metrics, cli(*norms, "--micro-batch", 3, "--output-dir", "parts").metrics
    assert abs(whole[0]["training_loss"] - parts[0]["training_loss"]) > 1e-4


@pytest.mark.parametrize(("rows", "less"), [(30, "--micro-batch below 30"), (100, "--batch-size below 100")])
def test_out_of_memory_names_the_flag_that_says_how_many_rows_pass_at_once(cli, monkeypatch, rows, less):
    monkeypatch.setattr(Batch, "parts", lambda batch, rows: torch.empty(2**62, dtype=torch.uint8))
    ran = cli(*DIGITS, "--micro-batch", rows)
    assert f"out of memory in step 1: a {less} needs less" in ran.err


def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(cli):
    flags = ["--dataset", "breast_cancer", "--learning-rate", 1e30, "--batch-size", 8, "--steps", 500]
    ran = cli(*flags, "--micro-batch", 3)
    assert (ran.status, ran.summary["status"]) == (0, "diverged")
    state = torch.load(only(ran.folder.parent) / "checkpoint.pt", weights_only=True)
    assert state["step"] == ran.summary["diverged_step"] - 1


# A language model: dropout, rounding and parts together

VERSE = "The fog comes in on little feet,\nthe tide goes out on none.\n" * 20
GPT = ["--dataset", "verse.txt", "--batch-size", 10, "--micro-batch", 4, "--steps", 20, "--evaluate-every", 8]
GPT += ["--model-options", "layers=2,heads=2,width=32,context=8,dropout=0.2", "--recipe", "nvfp4", "--optimizer"]
GPT += ["adamw", "--betas", "0.9,0.99", "--weight-decay", 0.1, "--decay", "matrices", "--clip-norm", 1, "--shadow"]
GPT += ["--schedule", "cosine", "--warmup", 5, "--learning-rate", 0.01, "--final-learning-rate", 0.001, "--device"]
GPT += ["cpu", "--wandb", "disabled"]


def test_gpt_in_nvfp4_with_dropout_stopped_and_resumed(cli, tmp_path, monkeypatch):
    (tmp_path / "verse.txt").write_text(VERSE)
    expected = bits(cli(*GPT, "--output-dir", "straight").folder)
    folder = stopped(cli, monkeypatch, *GPT, steps=11)
    ran = cli("--resume", folder)
    assert bits(ran.folder) == expected
    assert [line["step"] for line in ran.metrics] == [8, 16, 20]


@pytest.mark.slow
def test_gpt_of_two_processes_stopped_and_resumed(tmp_path):
    (tmp_path / "verse.txt").write_text(VERSE)
    (tmp_path / "killed.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"if os.environ['RANK'] == '0':\n    exec({kill_self('SIGTERM', 11)!r}, {{}})\n"
        "import main\nsys.exit(0 if main.main(sys.argv[1:]) == 143 else 1)\n"
    )
    torchrun(2, tmp_path, *GPT, "--output-dir", "straight")
    torchrun(2, tmp_path, *GPT, script=tmp_path / "killed.py")
    folder = only(tmp_path / "runs")
    torchrun(2, tmp_path, "--resume", folder, "--wandb", "disabled")
    assert bits(only(tmp_path / "runs")) == bits(only(tmp_path / "straight"))
