"""--shadow: the float32 run of the same seed beside a run, of which it changes no bit; stopped, resumed, swept."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from run_helpers import BOSTON, NOISY_BOSTON, bits, is_refused, names, only, stopped
from torch import nn

import models
import sweep
from lab import shadow, wandb_run
from lab.step_lines import LinesFile, by_evaluation

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = ["--dataset", "digits", "--model", "mlp", "--epochs", 2, "--batch-size", 500]
RUNS = {
    "sgd": [*NOISY_BOSTON, "--momentum", 0.9, "--schedule", "cosine", "--site", "accumulator=float16"],
    "adam": [*DIGITS, "--optimizer", "adam", "--precision", "float8", "--loss-scale", "dynamic"],
    "recipe": [*BOSTON, "--model", "mlp", "--recipe", "nvfp4", "--schedule", "onecycle"],
}
IN_FLOAT32 = {  # the same run as a user would start it without rounding
    "sgd": [*BOSTON, "--momentum", 0.9, "--schedule", "cosine"],
    "adam": [*DIGITS, "--optimizer", "adam"],
    "recipe": [*BOSTON, "--model", "mlp", "--schedule", "onecycle"],
}


def loaded(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def lines_of(folder) -> list[dict]:
    return list(map(json.loads, (folder / "shadow.jsonl").read_text().splitlines()))


def without_shadow(of_run):
    """What `bits` gives, but for the shadow and the setting that asked for it."""
    metrics, summary, tensors = of_run
    shadows = ("shadow/", "config/shadow")
    return metrics, summary, {name: value for name, value in tensors.items() if not name.startswith(shadows)}


@pytest.mark.parametrize("name", RUNS)
def test_it_changes_no_bit_and_is_the_float32_run(cli, name):
    alone = cli(*RUNS[name], "--output-dir", "alone")
    beside = cli(*RUNS[name], "--shadow")
    assert alone.folder.name == beside.folder.name
    assert without_shadow(bits(beside.folder)) == bits(alone.folder)
    assert "shadow.jsonl" not in names(alone.folder)
    assert "shadow" not in alone.config
    float32 = loaded(cli(*IN_FLOAT32[name], "--output-dir", "float32").folder)
    ours = loaded(beside.folder)["shadow"]
    for key, value in float32["model"].items():
        assert torch.equal(ours["model"][key], value), key
    assert str(ours["optimizer"]["state"]) == str(float32["optimizer"]["state"])


def test_collages_shadow_is_adamw(cli):
    arguments = ["--dataset", "boston", "--epochs", 3, "--learning-rate", 0.003]
    ours = loaded(cli(*arguments, "--optimizer", "collage", "--shadow").folder)["shadow"]["model"]
    float32 = loaded(cli(*arguments, "--optimizer", "adamw", "--output-dir", "float32").folder)["model"]
    assert all(torch.equal(ours[name], value) for name, value in float32.items())


def test_the_lines_are_the_differences(cli):
    """A model, then its one layer, in each step; the numbers of the last one from the checkpoint's weights."""
    ran = cli(*NOISY_BOSTON, "--shadow")
    lines = lines_of(ran.folder)
    assert [(line["step"], line["layer"]) for line in lines] == [(s, x) for s in range(1, 29) for x in ("", "linear")]
    state = loaded(ran.folder)
    ours, theirs = (
        np.concatenate([model[f"linear.{name}"].double().numpy().ravel() for name in ("weight", "bias")])
        for model in (state["model"], state["shadow"]["model"])
    )
    distance = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert lines[-1]["weights_distance"] == pytest.approx(distance, rel=1e-8)
    assert all(0 < line["gradient_cosine"] <= 1 for line in lines[1::2])
    # The training MSE of an epoch is the loss of its last step.
    float32 = cli(*BOSTON, "--output-dir", "float32").metrics
    for epoch, (line, other) in enumerate(zip(ran.metrics, float32, strict=True), 1):
        difference = line["training_mse"] - other["training_mse"]
        assert lines[2 * 7 * epoch - 2]["loss_difference"] == pytest.approx(difference, rel=1e-8, abs=1e-15)


def test_float32_is_not_apart_from_itself(cli):
    for line in lines_of(cli(*BOSTON, "--shadow").folder):
        assert line.get("loss_difference", 0) == 0 == line.get("weights_distance", 0)
        assert line.get("gradient_cosine", 1) == pytest.approx(1, abs=1e-12)


class Careless(nn.Module):
    """A model that draws random numbers from every generator, overwrites what it reads, and counts what it saw."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(features, 1), nn.BatchNorm1d(features)
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        x = nn.functional.dropout(self.norm(x.mul_(2)), 0.5, self.training)
        if not self.training:
            return self.linear(x)
        noise = random.random() + np.random.random() + torch.rand(1, generator=self.generator)  # noqa: NPY002
        return self.linear(x) * (1 + 0.1 * noise)


def test_a_careless_model_trains_to_the_same_bits_too(cli, monkeypatch):
    monkeypatch.setitem(models.MODELS, "linear", lambda shape, outputs: Careless(shape[0]))

    def trained(*arguments):
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        return cli(*arguments).folder

    alone = bits(trained(*NOISY_BOSTON, "--output-dir", "alone"))
    beside = trained(*NOISY_BOSTON, "--shadow")
    assert without_shadow(bits(beside)) == alone
    ours = loaded(beside)["shadow"]["model"]
    for key, value in loaded(trained(*BOSTON, "--output-dir", "float32"))["model"].items():
        assert torch.equal(ours[key], value), key
    again = trained(*BOSTON, "--shadow", "--output-dir", "both")  # the same features are dropped
    assert {line["loss_difference"] for line in lines_of(again)[:: len(ours_layers(ours)) + 1]} == {0}


def ours_layers(state: dict) -> set[str]:
    return {name.rpartition(".")[0] for name in state}


def test_what_is_watched_is_the_run_alone(cli):
    """layers.jsonl has the same bytes, though the shadow runs through the same functions."""
    flags = [*DIGITS, "--precision", "float8", "--rounding", "stochastic", "--watch", 2, "--quantize", "all"]
    alone = cli(*flags, "--output-dir", "alone").folder
    beside = cli(*flags, "--shadow").folder
    assert (beside / "layers.jsonl").read_bytes() == (alone / "layers.jsonl").read_bytes()


def test_what_is_not_finite_is_null_and_the_run_goes_on(cli):
    """float32 diverges at this learning rate, while float8 saturates."""
    ran = cli("--dataset", "boston", "--precision", "float8", "--learning-rate", 1e6, "--epochs", 30, "--shadow")
    assert ran.status == 0
    assert lines_of(ran.folder)[-1]["weights_distance"] is None


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_resumed_run_has_the_same_shadow(cli, monkeypatch, name):
    """Stopped in the middle of an epoch: the lines' bytes too."""
    expected = cli(*RUNS[name], "--shadow", "--output-dir", "straight").folder
    folder = stopped(cli, monkeypatch, *RUNS[name], "--shadow", steps=5)
    assert lines_of(folder)[-1]["step"] == 5
    ran = cli("--resume", folder)
    assert bits(ran.folder) == bits(expected)
    assert (ran.folder / "shadow.jsonl").read_bytes() == (expected / "shadow.jsonl").read_bytes()


def test_lines_after_the_checkpoint_come_again(cli, child, tmp_path):
    """Killed behind the third epoch's lines and before its checkpoint."""
    arguments = [*NOISY_BOSTON, "--shadow", "--checkpoint-every", 2]
    expected = cli(*arguments, "--output-dir", "straight").folder
    dies = "from lab.session import Session\nSession._log_at_wandb_ = Session._log_at_wandb\n"
    dies += "def log(self, wandb, metrics):\n if metrics['epoch'] == 3:\n  import os, signal\n"
    dies += (
        "  os.kill(os.getpid(), signal.SIGKILL)\n self._log_at_wandb_(wandb, metrics)\nSession._log_at_wandb = log\n"
    )
    child(*arguments, before=dies)
    folder = only(tmp_path / "runs")
    assert lines_of(folder)[-1]["step"] == 21
    assert loaded(folder)["step"] == 14
    ran = cli("--resume", folder)
    assert (ran.folder / "shadow.jsonl").read_bytes() == (expected / "shadow.jsonl").read_bytes()
    assert bits(ran.folder) == bits(expected)


def test_a_run_that_began_without_it_cannot_be_resumed_with_it(cli, monkeypatch):
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON)
    is_refused(cli("--resume", folder, "--shadow"), "--shadow", "which began without it", "no --resume")


def test_a_folder_that_vanishes_is_written_anew_with_its_lines(cli, tmp_path, monkeypatch):
    expected = cli(*NOISY_BOSTON, "--shadow", "--output-dir", "straight").folder
    end_epoch = shadow.Shadow.take_lines

    def take_lines(self):
        lines = end_epoch(self)
        if lines and lines[-1]["step"] == 14:
            shutil.rmtree(only(tmp_path / "runs"))
        return lines

    monkeypatch.setattr(shadow.Shadow, "take_lines", take_lines)
    ran = cli(*NOISY_BOSTON, "--shadow")
    assert "written anew" in ran.out
    assert (ran.folder / "shadow.jsonl").read_bytes() == (expected / "shadow.jsonl").read_bytes()


def test_lines_are_whole_and_of_the_steps_that_are_kept(tmp_path):
    path = tmp_path / "shadow.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    lines = LinesFile.resumed(tmp_path, "shadow.jsonl", 2)
    lines.fill(tmp_path)
    lines.add(tmp_path, [{"step": 3, "x": float("nan")}])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "x": null}\n'
    assert by_evaluation(lines.rows(), 2) == {1: [{"step": 2}], 2: [{"step": 3, "x": None}]}
    assert list(LinesFile.resumed(tmp_path / "nowhere", "shadow.jsonl", 2).rows()) == []


def test_wandb_has_the_last_lines_of_each_epoch(cli, monkeypatch):
    sent = []
    monkeypatch.setattr(wandb_run.Wandb, "log", lambda self, metrics, step, _: sent.append((step, metrics)))
    lines = lines_of(cli(*NOISY_BOSTON, "--shadow").folder)
    assert [step for step, _ in sent] == [1, 2, 3, 4]
    for step, metrics in sent:
        model, layer = lines[2 * 7 * step - 2 :][:2]
        names = {"shadow/loss_difference", "shadow/linear/weights_distance", "shadow/linear/gradient_cosine"}
        assert {name for name in metrics if name.startswith("shadow/")} == names
        assert metrics["shadow/loss_difference"] == pytest.approx(model["loss_difference"], rel=1e-8)
        assert metrics["shadow/linear/weights_distance"] == pytest.approx(layer["weights_distance"], rel=1e-8)
        assert metrics["shadow/linear/gradient_cosine"] == pytest.approx(layer["gradient_cosine"], rel=1e-8)
    straight = list(sent)
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON, "--shadow", "--output-dir", "again", steps=17)
    sent.clear()
    cli("--resume", folder)
    assert [step for step, _ in sent] == [1, 2, 3, 4]
    for (_, metrics), (_, expected) in zip(sent, straight, strict=True):
        assert metrics == pytest.approx(expected, rel=1e-8)


def test_a_sweep_trains_again_what_has_none(cli, tmp_path, capsys):
    flags = ["--dataset", "toy", "--precision", "float8", "--seed", "0:2"]
    assert sweep.main([*flags, "--jobs", "1"]) == 0
    assert sweep.main([*flags, "--seed", "0", "--shadow", "--jobs", "1"]) == 0
    capsys.readouterr()
    assert sweep.main([*flags, "--shadow", "--jobs", "1"]) == 0
    assert "1 of 2 runs have no shadow.jsonl, which is asked for: they are trained anew" in capsys.readouterr().err
    assert all("shadow.jsonl" in names(folder) for folder in (tmp_path / "runs").iterdir())
    assert sweep.main([*flags, "--shadow", "--jobs", "1"]) == 0
    assert "shadow.jsonl" not in capsys.readouterr().err
    assert sweep.main([*flags, "--jobs", "1"]) == 0  # without the flag, what is there stays
    assert all("shadow.jsonl" in names(folder) for folder in (tmp_path / "runs").iterdir())


def test_a_sweep_does_not_go_on_with_what_began_without_it(cli, tmp_path, monkeypatch, capsys):
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON, "--wandb", "disabled", steps=9)
    assert sweep.main([*map(str, NOISY_BOSTON), "--shadow", "--jobs", "1"]) == 0
    ran = only(tmp_path / "runs")
    assert (ran.name, json.loads((ran / "summary.json").read_text())["resumed"]) == (folder.name, [])
    assert lines_of(ran)[0]["step"] == 1
