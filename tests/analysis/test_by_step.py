"""Runs by steps in tables, CSV files, figures and the page; beside runs by epochs too."""

import csv

import pytest

import report
from analysis import runs, tables
from analysis.page_data import page_data
from analysis.run import common_unit, units
from analysis.runs import Run, read, settings_of
from settings.config import Config

COMMON = ["--dataset", "boston", "--batch-size", 64]  # 7 steps an epoch


@pytest.fixture
def by_step(cli, tmp_path):
    """Two seeds of float32 and of float8, evaluated in the steps 5, 10, 15 and 17."""
    for seed in (1, 2):
        for precision in ("float32", "float8"):
            flags = ["--steps", 17, "--evaluate-every", 5, "--seed", seed, "--precision", precision]
            assert cli(*COMMON, *flags).status == 0
    return tmp_path / "runs"


def test_runs_count_their_steps(by_step):
    made = read([by_step]).runs
    assert {(run.unit, run.last, run.planned) for run in made} == {("step", 17, 17)}
    one = made[0]
    assert one.value("testing_mse", 10) == one.history[1]["testing_mse"]
    assert one.value("testing_mse", 1) is None
    assert one.value("testing_mse") == one.history[-1]["testing_mse"]
    assert "step" not in runs.metrics_of(made)
    assert "epoch" not in runs.metrics_of(made)


def test_tables_say_steps(by_step):
    made = read([by_step]).runs
    head, *lines = tables.table(made, "testing_mse", (10, None))
    assert head[:4] == ["what is rounded", "runs", "steps", "testing mse, step 10"]
    assert [line[2] for line in lines] == ["17", "17"]
    (first, *_) = csv.DictReader(tables.numbers(made, "testing_mse", (10,)).splitlines())
    assert (first["unit"], first["epochs"], first["epoch"]) == ("step", "17", "10")


def test_what_is_saved_gives_the_same_runs(by_step, tmp_path, capsys):
    made = read([by_step]).runs
    runs.save(made, tmp_path / "all.csv")
    again = read([tmp_path / "all.csv"]).runs
    assert [run.last for run in again] == [17] * 4
    assert tables.table(again, "testing_mse", (5, 17)) == tables.table(made, "testing_mse", (5, 17))
    runs.save(made, tmp_path / "some.csv", (10,))
    (head, *lines) = csv.reader((tmp_path / "some.csv").read_text().splitlines())
    assert head[5:7] == ["epoch", "step"]
    assert {tuple(line[5:7]) for line in lines} == {("1.428571", "10")}
    assert report.main([str(tmp_path / "all.csv"), "--at", "15"]) == 0
    assert "testing mse, step 15" in capsys.readouterr().out


def test_figures_and_the_page_are_drawn_by_step(by_step, tmp_path):
    figure, page = tmp_path / "x.svg", tmp_path / "x.html"
    assert report.main([str(by_step), "--figure", str(figure), "--html", str(page)]) == 0
    assert "after step 17" in figure.read_text()
    assert "by step" in figure.read_text()
    data = page_data(read([by_step]).runs, "testing_mse", tmp_path)
    assert (data["unit"], data["units"]) == ("step", "steps")
    assert data["curves"]["settings"][0]["epochs"] == [5, 10, 15, 17]
    assert data["runs"]["of"] == data["runs"]["epochs"] == [17] * 4
    assert "--steps 17" in data["common"]
    assert not any(flag.startswith("--epochs") for flag in data["common"])


def test_beside_runs_by_epochs(by_step, cli, tmp_path):
    assert cli(*COMMON, "--epochs", 3, "--seed", 1).status == 0
    made = read([by_step]).runs
    assert (common_unit(made), units(made)) == ("epoch", "epochs or steps")
    names = runs.names(settings_of(made))
    assert any("--epochs 3" in name and "--steps" not in name for name in names)
    assert any("--steps 17" in name and "--epochs" not in name for name in names)
    data = page_data(made, "testing_mse", tmp_path)
    places = [setting["epochs"] for setting in data["curves"]["settings"]]
    assert sorted(places) == [[0.714286, 1.428571, 2.142857, 2.428571]] * 2 + [[1, 2, 3]]
    columns = dict(zip(data["columns"], zip(*(s["cells"] for s in data["settings"]), strict=True), strict=True))
    assert sorted(columns["--epochs"]) == ["", "", "3"]
    assert report.main([str(by_step), "--at", "3", "--figure", str(tmp_path / "x.svg")]) == 0
    assert "after epoch or step 3" in (tmp_path / "x.svg").read_text()
    head, *_ = tables.table(made, "testing_mse")
    assert head[2] == "epochs or steps"


def test_epochs_with_evaluations_between_have_no_known_end():
    config = Config(epochs=3, evaluate_every=4)
    run = Run(config, "complete", 1.0, [{"step": 4, "epoch": 0.5, "testing_mse": 1.0}])
    assert (run.unit, run.last, run.planned) == ("step", 4, None)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 17}, {"evaluate_every": 4}, {"micro_batch": 8}, {"clip_norm": 0.5}, {"model_options": "width=3"}],
    ids=str,
)
def test_runs_without_a_setting_come_before_those_with_it(settings):
    with_it, without = Config(model="mlp", **settings), Config(model="mlp")
    found = settings_of([Run(config, "complete", 1.0, []) for config in (with_it, without)])
    assert [setting.config for setting in found] == [without, with_it]
