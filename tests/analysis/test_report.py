"""Tables and figures say what the records say."""

import csv
import itertools
import json
import re
import shutil
import statistics

import numpy as np
import pytest
from scipy import stats

import report
from analysis import figures, maps, runs, tables
from analysis.runs import Run
from settings.config import Config
from settings.recipes import with_recipe


def run_of(config: Config, values: dict[int, float], status: str = "complete", metric: str = "testing_mse") -> Run:
    """A run with these values of one metric by epoch."""
    return Run(config, status, 0.5, [{"epoch": epoch, metric: value} for epoch, value in values.items()])


@pytest.fixture
def trained(cli, tmp_path):
    """Records of three seeds of float8, one of float32, one of another weight decay, and one that diverged."""
    settings = [["--seed", seed, "--precision", "float8", "--rounding", "stochastic"] for seed in (1, 2, 3)]
    settings += [["--seed", 1], ["--seed", 1, "--weight-decay", 1e-3], ["--learning-rate", 1e30, "--optimizer", "adam"]]
    ran = [cli("--dataset", "boston", "--epochs", 3, *flags) for flags in settings]
    return tmp_path / "runs", ran


PLAIN = "--optimizer sgd --learning-rate 0.01 --weight-decay 0.0"


def rows(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in cells}


def test_a_table_has_the_median_and_the_percentiles_of_each_setting(trained, capsys):
    folder, ran = trained
    assert report.main([str(folder), "--metric", "testing_mse"]) == 0
    cells = rows(capsys.readouterr().out)
    values = sorted(one.summary["testing_mse"] for one in ran[:3])
    assert cells[f"float8 stochastic {PLAIN}"][:2] == ["3", "3"]
    expected = [f"{v:.4g}" for v in (statistics.median(values), *np.percentile(values, [5, 95]))]
    assert re.findall(r"[\d.]+", cells[f"float8 stochastic {PLAIN}"][2]) == expected
    assert len(cells) == 4  # settings of one name are told apart by what they differ in
    name = next(name for name in cells if "--weight-decay 0.001" in name)
    assert cells[name][2] == f"{ran[4].summary['testing_mse']:.4g}"
    assert sum("1 diverged" in row[2] for row in cells.values()) == 1
    assert "time" not in " ".join(cells)


def test_what_is_saved_gives_the_same_table(trained, tmp_path, capsys):
    folder, _ = trained
    assert report.main([str(folder), "--metric", "testing_mse", "--save", str(tmp_path / "all.csv")]) == 0
    first = capsys.readouterr().out
    assert report.main([str(tmp_path / "all.csv"), "--metric", "testing_mse"]) == 0
    assert capsys.readouterr().out == first
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + 5 * 3 + 1


def test_a_figure_shows_each_setting_in_its_own_colour(trained, tmp_path):
    from matplotlib import image

    folder, _ = trained
    looks = [figures.look(setting) for setting in runs.settings_of(runs.read([folder]).runs)]
    colours = {look.colour for look in looks}
    assert {"#000000", "#E69F00"} <= colours  # float32, and float8 stochastically, in every figure
    assert report.main([str(folder), "--metric", "training_mse", "--figure", str(tmp_path / "new" / "x.svg")]) == 0
    drawn = (tmp_path / "new" / "x.svg").read_text()
    assert all(colour.lower() in drawn.lower() for colour in colours)
    assert report.main([str(folder), "--metric", "training_mse", "--figure", str(tmp_path / "x.png")]) == 0
    pixels = (image.imread(tmp_path / "x.png")[..., :3] * 255).round().astype(int)
    for colour in colours:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(-1) == 0).sum() > 20


def test_a_settings_colour_follows_from_its_rules_alone():
    """However the rules were written, and whatever else is drawn."""
    written = [
        Config.make(dataset="boston", precision="float8"),
        Config.make(dataset="toy", site=[f"{site}=float8" for site in ("weights", "inputs", "activations")]
                    + [f"{site}=float8" for site in ("errors", "gradients", "momentum")]),
    ]  # fmt: skip
    first, second = (figures.look(runs.Setting(config, ())) for config in written)
    assert first == second
    assert figures.look(runs.Setting(Config.make(precision="float8", rounding="stochastic"), ())) != first


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_longest_names_are_within_the_figure(seeds, tmp_path):
    from matplotlib import image

    sites = [f"{site}=float16:stochastic:{bits}:half" for bits, site in enumerate(("weights", "errors", "momentum"), 1)]
    config = Config.make(precision="float8", rounding="stochastic", site=sites, layers="a.very.long.name.of.a.layer.*")
    made = [
        run_of(Config.make(**{**vars(config), "seed": seed}), {1: 0.1, 2: 0.2}, metric="testing_accuracy")
        for seed in range(seeds)
    ]
    figures.curves(made, "testing_accuracy", tmp_path / "x.png", "")
    pixels = image.imread(tmp_path / "x.png")[..., :3]
    border = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    assert all((edge == 1).all() for edge in border)


def test_epochs_are_whole_numbers(tmp_path):
    """Three epochs once had ticks at 1.25, 1.50 and so on."""
    made = [run_of(Config.make(precision=name), {1: 1.0, 2: 0.5, 3: 0.4}) for name in ("float32", "float8")]
    figures.curves(made, "testing_mse", tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    panel = drawn[drawn.index('<g id="axes_2">') :]
    labels = re.findall(r"<!-- ([^>]*) -->", panel[: panel.index('<g id="matplotlib.axis_4">')])
    assert {"1", "2", "3"} <= set(labels)
    assert not [label for label in labels if "." in label]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere"),
        (["runs", "--metric", "accuracy"], "testing_mse"),
        (["runs", "--metric", "testing_mes"], "did you mean testing_mse?"),
        (["runs", "--metric", "testing_mse", "--figure", "x.gif"], ".png"),
        (["missing.csv"], "missing.csv"),
        ([], "paths"),
        (["runs", "--metrics", "testing_mse"], "--metrics"),
        (["runs", "--metric", "testing_mse", "--at", "x"], "--at"),
        (["runs", "--metric", "testing_mse", "--map", "x.png"], "eXmY"),
        (["--readme", "missing.md"], "missing.md"),
    ],
)
def test_what_is_wrong_is_one_line(trained, tmp_path, capsys, arguments, said):
    before = sorted(tmp_path.rglob("*"))
    assert report.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "float32"),
        ({"precision": "float8"}, "float8 nearest"),
        ({"recipe": "published", "precision": "float8"}, "float8 nearest activations, errors"),
        ({"precision": "float8", "site": "momentum=float32"}, "float8 nearest; momentum float32"),
        ({"precision": "float8", "layers": "fc"}, "float8 nearest; in fc"),
        ({"recipe": "qtorch-tutorial"}, "float8 nearest; momentum, accumulator float16 stochastic"),
        ({"recipe": "bfloat16-kahan"}, "bfloat16 nearest; compensation bfloat16 nearest"),
        ({"precision": "float32", "site": "weights=float8"}, "float8 nearest weights"),
    ],
)  # fmt: skip
def test_a_setting_is_named_by_what_is_rounded(settings, name):
    recipe = settings.get("recipe")
    others = {key: value for key, value in settings.items() if key != "recipe"}
    assert runs.rounded(Config.make(**with_recipe(recipe, others))) == name


def test_an_average_of_weights_has_the_same_baseline(cli, tmp_path):
    cli("--dataset", "boston", "--precision", "float32")
    cli("--dataset", "boston", "--precision", "float8", "--average-last", 0.5)
    plain, averaged = runs.settings_of(runs.read([tmp_path / "runs"]).runs)
    assert not plain.rules
    assert averaged.rules
    assert runs.baseline_of(averaged, [plain, averaged]) is plain


def test_a_baseline_trains_alike_and_rounds_nothing():
    configs = [
        Config.make(dataset="boston", epochs=epochs, precision=precision)
        for epochs, precision in itertools.product((5, 6), ("float32", "float8", "float16"))
    ]
    settings = [runs.Setting(config, (run_of(config, {1: 1.0}),)) for config in configs]
    for setting in settings:
        baseline = runs.baseline_of(setting, settings)
        assert (baseline.config.epochs, baseline.rules) == (setting.config.epochs, {})
    assert runs.baseline_of(settings[1], settings[3:]) is None


def test_the_same_rules_are_one_setting_however_they_were_written():
    sites = ("weights", "inputs", "activations", "errors", "gradients", "momentum")
    by_sites = Config.make(seed=2, site=[f"{site}=float8:stochastic" for site in sites])
    by_precision = Config.make(seed=1, precision="float8", rounding="stochastic")
    (setting,) = runs.settings_of([run_of(by_sites, {1: 1.0}), run_of(by_precision, {1: 2.0})])
    assert [run.seed for run in setting.runs] == [1, 2]


def test_settings_of_the_same_words_stay_apart():
    """Their names differ only by a flag that is added; what groups them is their rules."""
    configs = [Config.make(precision="float8_e5m2", overflow=overflow) for overflow in ("saturate", "infinity")]
    settings = runs.settings_of([run_of(config, {1: 1.0}) for config in configs])
    assert len(settings) == 2
    assert len({runs.rounded(setting.config) for setting in settings}) == 1
    assert len(set(runs.names(settings))) == 2


def test_pairs_are_runs_of_one_seed(trained, capsys):
    folder, ran = trained
    assert report.main([str(folder), "--metric", "testing_mse"]) == 0
    cells = rows(capsys.readouterr().out)
    difference = ran[0].summary["testing_mse"] - ran[3].summary["testing_mse"]  # both of seed 1
    # The other two seeds have no partner, so there is no interval.
    assert cells[f"float8 stochastic {PLAIN}"][3] == f"{difference:+.2g}"
    assert cells[f"float32 {PLAIN}"][3] == "-"


def test_without_a_metric_it_takes_one_that_the_records_have(trained, capsys):
    folder, _ = trained
    assert report.main([str(folder), "--metric", "testing_mse"]) == 0
    expected = capsys.readouterr().out
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out == expected
    assert "testing mse" in expected


@pytest.fixture
def made():
    """100 seeds: a baseline, and a setting that is worse by 1 on average, 0.5 the deviation; one of it diverged."""
    chance = np.random.default_rng(1)
    result = []
    for seed in range(100):
        base = chance.normal(3.0, 1.0)
        for precision, value in (("float32", base), ("e5m2", base + chance.normal(1.0, 0.5))):
            diverged = precision != "float32" and seed == 7
            values = {1: value + 1} if diverged else {1: value + 1, 5: value}
            config = Config.make(seed=seed, rounding_seed=seed, precision=precision, epochs=5)
            result.append(run_of(config, values, "diverged" if diverged else "complete"))
    return result


def test_the_interval_is_that_of_the_mean_difference(made):
    baseline, other = runs.settings_of(made)
    differences = tables.pairs(other.runs, baseline.runs, "testing_mse")
    assert len(differences) == 99
    for some in (differences, differences[:5], differences[:2]):
        students = stats.ttest_1samp(some, 0).confidence_interval(0.95)
        assert tables.interval(some) == pytest.approx((students.low, students.high))
    assert tables.interval([0.5]) is tables.interval([0.5, 0.5]) is None


def test_the_table_for_programs_holds_numbers(made):
    baseline, other = runs.settings_of(made)
    differences = tables.pairs(other.runs, baseline.runs, "testing_mse")
    lines = list(csv.DictReader(tables.numbers(made, "testing_mse").splitlines()))
    assert tuple(lines[0]) == tables.NUMBERS
    first, second = lines
    assert first["mean_difference"] == first["median_difference"] == ""
    assert float(second["mean_difference"]) == pytest.approx(statistics.fmean(differences), rel=1e-8)
    assert float(second["median_difference"]) == pytest.approx(statistics.median(differences), rel=1e-8)
    ends = [float(second[name]) for name in ("mean_difference_low", "mean_difference_high")]
    assert ends == pytest.approx(tables.interval(differences), rel=1e-8)
    assert float(second["median"]) == pytest.approx(statistics.median(other.values("testing_mse")), rel=1e-8)
    counts = [second[name] for name in ("runs", "epochs", "pairs", "diverged", "without_value")]
    assert counts == ["100", "5", "99", "1", "0"]
    words = ("setting", "flags", "metric", "unit")
    assert all(float(line[name] or 0) is not None for line in lines for name in tables.NUMBERS if name not in words)


def test_epochs_of_the_table_and_of_what_is_saved(made, tmp_path):
    head, _, line = tables.table(made, "testing_mse", (1, 5))
    assert head[3] == "testing mse, epoch 1"
    assert "mean over pairs of the same seed" in head[4]
    assert head[5] == "median of the pairs"
    assert head[6] == "testing mse, epoch 5"
    assert line[1:3] == ["100", "1-5"]
    assert "diverged" not in line[3]
    assert line[6].endswith("; 1 diverged")
    runs.save(made, tmp_path / "some.csv", [5])
    kept = runs.read([tmp_path / "some.csv"]).runs
    assert len(kept) == 200
    assert tables.table(kept, "testing_mse", (5,))[2][3:] == tables.table(made, "testing_mse", (5,))[2][3:]


def test_a_file_gives_the_configs_again(tmp_path):
    """Every flag that decides a result comes back, and so does each seed."""
    configs = [
        Config.make(dataset="boston", precision="float8", rounding="stochastic:4:half", seed=3, rounding_seed=9),
        Config.make(dataset="digits", precision="float8", quantize="none", site="accumulator=float32"),
        Config.make(**with_recipe("qtorch-tutorial", {"dataset": "digits", "layers": "conv*,output"})),
        Config.make(dataset="boston", precision="fp16", overflow="infinity", loss_scale="dynamic", optimizer="adam"),
    ]
    runs.save([run_of(config, {1: 1.5}) for config in configs], tmp_path / "some.csv")
    back = runs.read([tmp_path / "some.csv"]).runs
    assert [run.config for run in back] == configs
    assert [run.config.folder_name for run in back] == [config.folder_name for config in configs]


def test_blocks_of_a_readme_are_made_anew_and_nothing_else(made, tmp_path):
    runs.save(made, tmp_path / "some.csv")
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
    assert tables.markdown(tables.table(runs.read([tmp_path / "some.csv"]).runs, "testing_mse", (5,))) in text
    assert "| claim | holds |\n|---|---|\n| sums, to nearest | yes |\n<!-- end -->\nafter\n" in text
    assert report.main(["--readme", str(readme)]) == 0
    assert readme.read_text() == text


def test_a_folder_of_all_of_it(made, tmp_path, capsys):
    runs.save(made, tmp_path / "some.csv")
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
    maps.bit_widths(made, "testing_mse", tmp_path / "map.svg")
    drawn = (tmp_path / "map.svg").read_text()
    values = [v for setting in runs.settings_of(made) if setting.rules for v in setting.values("testing_mse")]
    assert f"<!-- {statistics.median(values):#.2g} -->" in drawn
    assert "<!-- rounding: nearest -->" in drawn


def test_a_map_holds_the_formats_that_all_sites_share():
    configs = [
        Config.make(precision="e4m3"),
        Config.make(precision="e4m3", site="accumulator=e4m3"),
        Config.make(precision="float8_e4m3fn"),
        Config.make(precision="e4m3", quantize="weights"),
    ]
    places = maps._widths([run_of(config, {1: float(n)}) for n, config in enumerate(configs)], "testing_mse", None)
    assert [list(by_bits.items()) for by_bits in places.values()] == [[((4, 3), [0.0])]]


def test_runs_that_differ_in_their_rounding_seed_alone_stay_apart(tmp_path):
    """Even where they took the same time."""
    configs = [Config.make(precision="float8", rounding="stochastic", seed=1, rounding_seed=n) for n in range(3)]
    several = [run_of(config, {1: value}) for config, value in zip(configs, (1.0, 2.0, 4.0), strict=True)]
    runs.save(several, tmp_path / "some.csv")
    assert runs.read([tmp_path / "some.csv"]).runs == several


def test_runs_that_did_not_end_are_left_out_and_counted(cli, tmp_path, capsys):
    ran = cli("--dataset", "boston", "--epochs", 3)
    summary = json.loads((ran.folder / "summary.json").read_text())
    for number, status in enumerate(("interrupted", "interrupted", "failed", None), 1):
        stopped = ran.folder.with_name(f"{ran.folder.name}.partial-{number}")
        shutil.copytree(ran.folder, stopped)
        (stopped / "summary.json").unlink()
        if status:
            (stopped / "summary.json").write_text(json.dumps(summary | {"status": status}))
    assert len(runs.read([tmp_path / "runs"]).runs) == 1
    capsys.readouterr()
    assert report.main([str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().err == "left out: 1 failed, 1 going on or killed, 2 interrupted\n"


@pytest.mark.parametrize("text", ["claim,holds\na,yes\n", "", "a file whose last line is cut off"])
def test_another_file_than_that_of_save_is_one_line(made, tmp_path, capsys, text):
    file = tmp_path / "some.csv"
    runs.save(made, file)
    whole = file.read_text().splitlines()
    file.write_text(text if "cut" not in text else "\n".join([*whole[:-1], whole[-1][: whole[-1].index(",99") + 3]]))
    assert report.main([str(file), "--metric", "testing_mse", "--save", str(tmp_path / "new.csv")]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert "some.csv" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "new.csv").exists()


def test_readme_shows_what_was_saved_in_the_same_call(made, tmp_path):
    runs.save(made, tmp_path / "all.csv")
    block = "<!-- report.py some.csv --metric testing_mse --at 5 -->\n<!-- end -->\n"
    (tmp_path / "README.md").write_text(block)
    arguments = ["--metric", "testing_mse", "--at", "5", "--save", tmp_path / "some.csv"]
    assert report.main(list(map(str, [tmp_path / "all.csv", *arguments, "--readme", tmp_path / "README.md"]))) == 0
    saved = tables.table(runs.read([tmp_path / "some.csv"]).runs, "testing_mse", (5,))
    assert tables.markdown(saved) in (tmp_path / "README.md").read_text()


def test_a_map_of_runs_without_a_value_is_one_line(made, tmp_path, capsys):
    runs.save(made, tmp_path / "some.csv")
    arguments = ["--metric", "testing_mse", "--at", "4", "--map", tmp_path / "x.png", "--save", tmp_path / "new.csv"]
    assert report.main(list(map(str, [tmp_path / "some.csv", *arguments]))) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"some.csv"}


def test_files_are_read_together_and_a_run_counts_once(made, tmp_path, capsys):
    runs.save(made[::2], tmp_path / "a.csv")
    runs.save(made, tmp_path / "b.csv")
    both = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    assert report.main([*both, "--metric", "testing_mse"]) == 0
    text = capsys.readouterr()
    assert text.err == f"left out: {len(made[::2])} read already\n"
    assert report.main([both[1], "--metric", "testing_mse"]) == 0
    assert capsys.readouterr().out == text.out


def test_a_folder_of_pages_is_made_anew(made, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    runs.save(made, tmp_path / "some.csv")
    block = "<!-- report.py some.csv --metric testing_mse --at 5 -->\n<!-- end -->\n"
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/claims.md"):
        (tmp_path / page).write_text(block)
    assert report.main(["--readme", str(tmp_path / "README.md"), "--readme", str(tmp_path / "docs")]) == 0
    expected = tables.markdown(tables.table(made, "testing_mse", (5,)))
    for page in ("README.md", "docs/claims.md"):
        assert expected in (tmp_path / page).read_text()
