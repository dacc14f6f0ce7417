"""Tables and figures say what the records say."""

import json
import re
import shutil
import statistics

import numpy as np
import pytest

import report
from analysis import figures
from analysis import runs as records
from analysis.runs import Run
from settings.config import Config
from settings.recipes import with_recipe


@pytest.fixture
def runs(cli, tmp_path):
    """Records of three seeds of float8, one of float32, one of another weight decay, and one that diverged."""
    settings = [["--seed", seed, "--precision", "float8", "--rounding", "stochastic"] for seed in (1, 2, 3)]
    settings += [["--seed", 1], ["--seed", 1, "--weight-decay", 1e-3], ["--learning-rate", 1e30, "--optimizer", "adam"]]
    found = [cli("--dataset", "boston", "--epochs", 3, *flags) for flags in settings]
    return tmp_path / "runs", found


PLAIN = "--optimizer sgd --learning-rate 0.01 --weight-decay 0.0"


def rows(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in cells}


def test_a_table_has_the_median_and_the_percentiles_of_each_setting(runs, capsys):
    folder, found = runs
    assert report.main([str(folder), "--metric", "testing_mse"]) == 0
    told = rows(capsys.readouterr().out)
    values = sorted(run.summary["testing_mse"] for run in found[:3])
    assert told[f"float8 stochastic {PLAIN}"][:2] == ["3", "3"]
    expected = [f"{v:.4g}" for v in (statistics.median(values), *np.percentile(values, [5, 95]))]
    assert re.findall(r"[\d.]+", told[f"float8 stochastic {PLAIN}"][2]) == expected
    assert len(told) == 4  # settings of one name are told apart by what they differ in
    name = next(name for name in told if "--weight-decay 0.001" in name)
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
    assert all(colour.lower() in drawn.lower() for colour in figures.COLOURS[1:4])
    assert report.main([str(folder), "--metric", "training_mse", "--figure", str(tmp_path / "x.png")]) == 0
    pixels = (image.imread(tmp_path / "x.png")[..., :3] * 255).round().astype(int)
    for colour in figures.COLOURS[:4]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(-1) == 0).sum() > 20


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_longest_names_are_within_the_figure(seeds, tmp_path):
    from matplotlib import image

    name = "float8 stochastic; " + "; ".join(
        f"{site} float16 stochastic" for site in ("weights", "gradients", "momentum")
    )
    history = [{"epoch": epoch, "testing_accuracy": 0.1 * epoch} for epoch in (1, 2)]
    made = [Run(name * 3, seed, "complete", 1.0, history, seed) for seed in range(seeds)]
    figures.curves(made, "testing_accuracy", tmp_path / "x.png", "")
    pixels = image.imread(tmp_path / "x.png")[..., :3]
    border = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    assert all((edge == 1).all() for edge in border)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere"),
        (["runs", "--metric", "accuracy"], "testing_mse"),
        (["runs", "--metric", "testing_mse", "--figure", "x.gif"], ".png"),
        (["missing.csv"], "missing.csv"),
        ([], "paths"),
        (["runs", "--metrics", "testing_mse"], "--metrics"),
        (["runs", "--metric", "testing_mse", "--at", "x"], "--at"),
        (["runs", "--metric", "testing_mse", "--map", "x.png"], "eXmY"),
        (["--readme", "missing.md"], "missing.md"),
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
    assert records.setting_of(Config.make(**with_recipe(recipe, given))) == name


def test_an_average_of_weights_has_the_same_baseline(cli, tmp_path):
    cli("--dataset", "boston", "--precision", "float32")
    cli("--dataset", "boston", "--precision", "float8", "--average-last", 0.5)
    assert [run.setting for run in records.read([tmp_path / "runs"])] == ["float32", "float8 nearest"]


def test_pairs_are_runs_of_one_seed(runs, tmp_path, capsys):
    folder, found = runs
    assert report.main([str(folder), "--metric", "testing_mse"]) == 0
    told = rows(capsys.readouterr().out)
    difference = found[0].summary["testing_mse"] - found[3].summary["testing_mse"]  # both of seed 1
    assert (
        told[f"float8 stochastic {PLAIN}"][3] == f"{difference:+.2g}"
    )  # the other two seeds have no partner, so no interval
    assert told[f"float32 {PLAIN}"][3] == "-"


@pytest.fixture
def made():
    """100 seeds: a baseline, and a setting that is worse by 1 on average, 0.5 the deviation; one of it diverged."""
    chance = np.random.default_rng(1)
    found = []
    for seed in range(100):
        base = chance.normal(3.0, 1.0)
        for setting, value in (("float32", base), ("e5m2 nearest", base + chance.normal(1.0, 0.5))):
            history = [{"epoch": 1, "testing_mse": value + 1}, {"epoch": 5, "testing_mse": value}]
            lost = setting != "float32" and seed == 7
            status = "diverged" if lost else "complete"
            found.append(records.Run(setting, seed, status, 0.5, history[:1] if lost else history))
    return found


def test_the_interval_is_that_of_the_mean_difference(made):
    groups = records.by_setting(made)
    differences = report.pairs(groups["e5m2 nearest"], groups["float32"], "testing_mse")
    assert len(differences) == 99
    low, high = report.interval(differences)
    spread = 1.96 * statistics.stdev(differences) / 99**0.5  # the normal approximation, near enough at n = 99
    assert (low, high) == pytest.approx(
        (statistics.fmean(differences) - spread, statistics.fmean(differences) + spread), abs=0.15 * spread
    )
    assert report.interval(differences) == (low, high)
    assert report.interval([0.5]) is report.interval([0.5, 0.5]) is None


def test_epochs_of_the_table_and_of_what_is_saved(made, tmp_path):
    head, _, line = report.table(made, "testing_mse", (1, 5))
    assert head[3:7:2] == ["testing mse, epoch 1", "testing mse, epoch 5"]
    assert line[1:3] == ["100", "1-5"]
    assert "diverged" not in line[3]
    assert line[5].endswith("; 1 diverged")
    records.save(made, tmp_path / "some.csv", [5])
    kept = records.read([tmp_path / "some.csv"])
    assert len(kept) == 200
    assert report.table(kept, "testing_mse", (5,))[2][3:] == report.table(made, "testing_mse", (5,))[2][3:]


def test_blocks_of_a_readme_are_made_anew_and_nothing_else(made, tmp_path):
    records.save(made, tmp_path / "some.csv")
    (tmp_path / "claims.csv").write_text('claim,holds\n"sums, to nearest",yes\n')
    readme = tmp_path / "README.md"
    blocks = [
        "<!-- report.py some.csv --metric testing_mse --at 5 -->\nstale\n<!-- end -->",
        "<!-- report.py claims.csv -->\n<!-- end -->",
    ]
    readme.write_text(f"before\n{blocks[0]}\nbetween <!-- no block -->\n{blocks[1]}\nafter\n")
    assert report.main(["--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "stale" not in text
    assert report.markdown(report.table(records.read([tmp_path / "some.csv"]), "testing_mse", (5,))) in text
    assert "| claim | holds |\n|---|---|\n| sums, to nearest | yes |\n<!-- end -->\nafter\n" in text
    assert report.main(["--readme", str(readme)]) == 0
    assert readme.read_text() == text


def test_a_folder_of_all_of_it(made, tmp_path, capsys):
    records.save(made, tmp_path / "some.csv")
    target = tmp_path / "new" / "all"
    assert report.main([str(tmp_path / "some.csv"), "--metric", "testing_mse", "--output", str(target)]) == 0
    names = {"table.md", "table.csv", "runs.csv", "curves.png", "curves.svg", "map.png", "map.svg"}
    assert {path.name for path in target.iterdir()} == names
    assert (target / "table.md").read_text() == capsys.readouterr().out
    again = tmp_path / "again"
    assert report.main([str(target / "runs.csv"), "--metric", "testing_mse", "--output", str(again)]) == 0
    for name in names:
        assert (again / name).read_bytes() == (target / name).read_bytes()


def test_a_map_shows_the_median_of_each_format(made, tmp_path):
    figures.bit_widths(made, "testing_mse", tmp_path / "map.svg", "")
    drawn = (tmp_path / "map.svg").read_text()
    values = [run.history[-1]["testing_mse"] for run in made if run.setting != "float32" and run.status == "complete"]
    assert f"<!-- {statistics.median(values):.2g} -->" in drawn
    assert "<!-- nearest -->" in drawn


def test_runs_that_differ_in_their_rounding_seed_alone_stay_apart(tmp_path):
    """Even where they took the same time."""
    found = [
        records.Run("float8 stochastic", 1, "complete", 0.5, [{"epoch": 1, "testing_mse": v}], rounding_seed=n)
        for n, v in enumerate((1.0, 2.0, 4.0))
    ]
    records.save(found, tmp_path / "some.csv")
    assert records.read([tmp_path / "some.csv"]) == found


def test_runs_that_did_not_end_are_left_out(cli, tmp_path):
    ran = cli("--dataset", "boston", "--epochs", 3)
    summary = json.loads((ran.folder / "summary.json").read_text())
    stopped = ran.folder.with_name(ran.folder.name + ".partial-1")
    shutil.copytree(ran.folder, stopped)
    (stopped / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    assert len(records.read([tmp_path / "runs"])) == 1


@pytest.mark.parametrize("text", ["claim,holds\na,yes\n", "", "a file whose last line is cut off"])
def test_another_file_than_that_of_save_is_one_line(made, tmp_path, capsys, text):
    file = tmp_path / "some.csv"
    records.save(made, file)
    whole = file.read_text().splitlines()
    file.write_text(text if "cut" not in text else "\n".join([*whole[:-1], whole[-1][: len("float32,9")]]))
    assert report.main([str(file), "--metric", "testing_mse", "--save", str(tmp_path / "new.csv")]) == 2
    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1
    assert "some.csv" in told.err
    assert told.out == ""
    assert not (tmp_path / "new.csv").exists()


def test_readme_shows_what_was_saved_in_the_same_call(made, tmp_path):
    records.save(made, tmp_path / "all.csv")
    block = "<!-- report.py some.csv --metric testing_mse --at 5 -->\n<!-- end -->\n"
    (tmp_path / "README.md").write_text(block)
    arguments = ["--metric", "testing_mse", "--at", "5", "--save", tmp_path / "some.csv"]
    assert report.main(list(map(str, [tmp_path / "all.csv", *arguments, "--readme", tmp_path / "README.md"]))) == 0
    saved = report.table(records.read([tmp_path / "some.csv"]), "testing_mse", (5,))
    assert report.markdown(saved) in (tmp_path / "README.md").read_text()


def test_a_map_of_runs_without_a_value_is_one_line(made, tmp_path, capsys):
    records.save(made, tmp_path / "some.csv")
    arguments = ["--metric", "testing_mse", "--at", "4", "--map", tmp_path / "x.png", "--save", tmp_path / "new.csv"]
    assert report.main(list(map(str, [tmp_path / "some.csv", *arguments]))) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"some.csv"}


def test_one_setting_in_two_files_is_one_line(made, tmp_path, capsys):
    for name in ("a.csv", "b.csv"):
        records.save(made, tmp_path / name)
    assert report.main([str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--metric", "testing_mse"]) == 2
    assert "b.csv" in capsys.readouterr().err
