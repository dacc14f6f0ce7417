"""Tables and figures say what the records say."""

import re
import statistics

import numpy as np
import pytest

import report
from config import Config
from recipes import with_recipe


@pytest.fixture
def runs(cli, tmp_path):
    """Records of three seeds of float8, one of float32, one of another weight decay, and one that diverged."""
    settings = [["--seed", seed, "--precision", "float8", "--rounding", "stochastic"] for seed in (1, 2, 3)]
    settings += [["--seed", 1], ["--seed", 1, "--weight-decay", 1e-3], ["--learning-rate", 1e30, "--optimizer", "adam"]]
    found = [cli("--dataset", "boston", "--epochs", 3, *flags) for flags in settings]
    return tmp_path / "runs", found


def rows(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in cells}


def test_a_table_has_the_median_and_the_range_of_each_setting(runs, capsys):
    folder, found = runs
    assert report.main([str(folder), "--metric", "testing_mse"]) == 0
    told = rows(capsys.readouterr().out)
    values = sorted(run.summary["testing_mse"] for run in found[:3])
    assert told["float8 stochastic"][:2] == ["3", "3"]
    expected = [f"{v:.4g}" for v in (statistics.median(values), values[0], values[-1])]
    assert re.findall(r"[\d.]+", told["float8 stochastic"][2]) == expected
    assert len(told) == 4  # settings of one name are told apart by what they differ in
    name = next(name for name in told if "0.001" in name)
    assert "--weight-decay 0.001" in name
    assert told[name][2] == f"{found[4].summary['testing_mse']:.4g}"
    assert sum("1 diverged" in row[2] for row in told.values()) == 1


def test_what_is_saved_gives_the_same_table(runs, tmp_path, capsys):
    folder, _ = runs
    assert report.main([str(folder), "--metric", "testing_mse", "--save", str(tmp_path / "all.csv")]) == 0
    first = capsys.readouterr().out
    assert report.main([str(tmp_path / "all.csv"), "--metric", "testing_mse"]) == 0
    assert capsys.readouterr().out == first
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + 5 * 3 + 1


def test_a_figure_has_a_curve_and_a_name_for_each_setting(runs, tmp_path):
    from matplotlib import image

    folder, _ = runs
    assert report.main([str(folder), "--metric", "training_mse", "--figure", str(tmp_path / "new" / "x.svg")]) == 0
    drawn = (tmp_path / "new" / "x.svg").read_text()
    assert all(colour.lower() in drawn.lower() for colour in report.COLOURS[1:4])
    assert report.main([str(folder), "--metric", "training_mse", "--figure", str(tmp_path / "x.png")]) == 0
    pixels = (image.imread(tmp_path / "x.png")[..., :3] * 255).round().astype(int)
    for colour in report.COLOURS[:4]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(-1) == 0).sum() > 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere"),
        (["runs", "--metric", "accuracy"], "testing_mse"),
        (["runs", "--metric", "testing_mse", "--figure", "x.gif"], ".png"),
        (["missing.csv"], "missing.csv"),
    ],
)
def test_what_is_wrong_is_one_line(runs, tmp_path, capsys, arguments, said):
    before = sorted(tmp_path.rglob("*"))
    assert report.main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert len(told.err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "float32"),
        ({"precision": "float8"}, "float8 nearest"),
        ({"recipe": "published", "precision": "float8"}, "float8 nearest activations, errors"),
        ({"precision": "float8", "site": "momentum=float32"}, "float8 nearest; momentum float32"),
        ({"recipe": "qtorch-tutorial"}, "float8 nearest; momentum, accumulator float16 stochastic"),
        ({"recipe": "bfloat16-kahan"}, "bfloat16 nearest; compensation bfloat16 nearest"),
        ({"precision": "float32", "site": "weights=float8"}, "weights float8 nearest"),
    ],
)  # fmt: skip
def test_a_setting_is_named_by_what_is_rounded(settings, name):
    recipe = settings.get("recipe")
    given = {key: value for key, value in settings.items() if key != "recipe"}
    assert report.setting_of(Config.make(**with_recipe(recipe, given))) == name
