"""What a page of runs carries: counted by hand here, and read out of the file as the browser would."""

import base64
import gzip
import json
import math
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
from page_helpers import LAYERS, SITES, layer_lines, shadow_lines, write_lines, write_record
from run_helpers import ROOT

import report
from analysis import page_data as pages
from analysis import watched
from analysis.figures import COLOURS
from analysis.page_data import page_data
from analysis.runs import read
from settings.config import Config


def config(seed: int = 0, epochs: int = 4, **settings: object) -> Config:
    return Config.make(dataset="boston", epochs=epochs, seed=seed, **settings)


def data_of(folder, **options):
    runs = read([folder], unfinished=True).runs
    return page_data(runs, "testing_mse", folder.parent, **options)


def unpacked(path) -> dict:
    """The data of a written page."""
    text = path.read_text()
    packed = re.search(r'id="packed-data">([^<]*)<', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.fixture
def sweep(tmp_path):
    """Three seeds of float32 and of float8, one that diverged, one that goes on."""
    for seed in range(3):
        write_record(tmp_path / "runs", config(seed))
        write_record(tmp_path / "runs", config(seed, precision="float8"))
    write_record(tmp_path / "runs", config(3, precision="float8"), "diverged", epochs=2)
    write_record(tmp_path / "runs", config(4, precision="float8"), None, epochs=3)
    return tmp_path / "runs"


def test_curves_are_medians_and_percentiles_of_the_runs_that_came_so_far(sweep):
    data = data_of(sweep)
    assert [setting["name"] for setting in data["settings"]] == ["float32", "float8 nearest"]
    curve = data["curves"]["settings"][1]
    assert curve["epochs"] == [1, 2, 3, 4]
    for i, epoch in enumerate(curve["epochs"]):
        ran = {1: 5, 2: 5, 3: 4, 4: 3}[epoch]
        seeds = {5: (0, 1, 2, 3, 4), 4: (0, 1, 2, 4), 3: (0, 1, 2)}[ran]
        values = [1 / epoch + seed / 1000 + 0.4 for seed in seeds]
        metric = curve["metrics"]["testing_mse"]
        assert metric["number"][i] == ran
        assert metric["median"][i] == pytest.approx(statistics.median(values), rel=5e-4)
        low, high = np.percentile(values, [5, 95])
        assert (metric["low"][i], metric["high"][i]) == pytest.approx((low, high), rel=5e-4)
        each = [values[seeds.index(seed)] if seed in seeds else None for seed in range(5)]
        assert [one[i] for one in metric["runs"]] == [pytest.approx(v, rel=5e-4) if v else None for v in each]


def test_the_table_is_of_the_runs_that_ended_and_says_how_many_did_not(sweep, capsys):
    data = data_of(sweep)
    assert dict(data["statuses"]) == {"complete": 6, "diverged": 1, "going on or killed": 1}
    median, low, high, number, mean, left, right, middle, pairs, diverged = data["table"]["testing_mse"][1]
    assert (number, pairs, diverged) == (3, 3, 1)
    assert (median, mean, middle) == pytest.approx((0.651, 0.4, 0.4), rel=1e-3)
    assert (low, high) == pytest.approx((0.6501, 0.6519), rel=1e-3)
    assert left is None or left <= 0.4 <= right
    assert report.main([str(sweep), "--html", str(sweep.parent / "x.html")]) == 0
    printed = capsys.readouterr()
    assert "| float8 nearest | 4 | 2-4 | 0.651 " in printed.out
    assert "left out: 1 going on or killed" in printed.err
    assert unpacked(sweep.parent / "x.html") == json.loads(json.dumps(data))


def test_what_differs_has_a_column_and_what_is_common_is_told_once(tmp_path):
    from settings.recipes import with_recipe

    write_record(tmp_path / "runs", config(learning_rate=0.1))
    write_record(tmp_path / "runs", config(precision="float8", learning_rate=0.1, site=["accumulator=float16"]))
    recipe = with_recipe("nvfp4", {"dataset": "boston", "epochs": 4, "learning_rate": 0.1, "site": ["errors=float16"]})
    write_record(tmp_path / "runs", Config.make(**recipe))
    data = data_of(tmp_path / "runs")
    rows = [dict(zip(data["columns"], setting["cells"], strict=True)) for setting in data["settings"]]
    assert {row["--precision"] for row in rows} == {"float32", "float8"}
    assert {row["--site"] for row in rows} == {"", "accumulator=float16", "errors=float16"}  # not the recipe's own
    assert {row["--recipe"] for row in rows} == {"", "nvfp4"}
    assert data["common"] == ["--dataset boston", "--epochs 4", "--learning-rate 0.1"]
    assert not {"--seed", "--dataset", "--epochs"} & set(data["columns"])


def test_links_lead_from_the_page_to_the_records(sweep, tmp_path):
    (tmp_path / "pages of mine").mkdir()
    runs = read([sweep], unfinished=True).runs
    from urllib.parse import unquote

    data = page_data(runs, "testing_mse", tmp_path / "pages of mine")
    targets = [(tmp_path / "pages of mine" / unquote(link)).resolve() for link in data["runs"]["folders"]]
    assert sorted(targets) == sorted(folder.resolve() for folder in sweep.iterdir())


def test_a_sweep_that_has_just_begun(tmp_path, capsys):
    """A record without an epoch, one without metrics, one that is written at this moment."""
    folder = write_record(tmp_path / "runs", config(0), None, epochs=2)
    write_record(tmp_path / "runs", config(1), None, epochs=0)
    (write_record(tmp_path / "runs", config(2), None, epochs=0) / "metrics.jsonl").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "testing_m')
    assert report.main([str(tmp_path / "runs"), "--html", str(tmp_path / "x.html")]) == 0
    data = unpacked(tmp_path / "x.html")
    assert data["statuses"] == [["going on or killed", 2]]
    assert data["runs"]["epochs"] == [2, 0]
    printed = capsys.readouterr()
    assert printed.out == ""  # no run has ended, so there is no table
    assert "2 going on or killed, 1 vanished" in printed.err


def test_a_run_that_is_trained_again_is_there_once_by_the_record_that_ended(tmp_path):
    write_record(tmp_path / "runs", config(0), None, epochs=1)
    write_record(tmp_path / "runs", config(0))
    found = read([tmp_path / "runs"], unfinished=True)
    assert [run.status for run in found.runs] == ["complete"]
    assert found.left_out == {"read already": 1}


def test_layers_become_matrices(tmp_path):
    folder = write_record(tmp_path / "runs", config(precision="float8"))
    lines = layer_lines("float8:nearest")
    write_lines(folder / "layers.jsonl", lines)
    with open(folder / "layers.jsonl", "a") as file:
        file.write('{"step": 200, "layer": "embed", "si')  # it is growing
    (one,) = data_of(tmp_path / "runs")["layers"]["runs"]
    assert one["steps"] == [0, 50, 100, 150]
    sites = [*SITES, "dgrad", "forward", "wgrad"]
    assert [row[:2] for row in one["rows"]] == [[layer, site] for layer in LAYERS for site in sites]
    for line in lines:
        row, column = (
            [row[:2] for row in one["rows"]].index([line["layer"], line["site"]]),
            one["steps"].index(line["step"]),
        )
        for name in one["values"]:
            values = one["values"][name][row]
            if name in line:
                assert values[column] == pytest.approx(line[name], rel=5e-3)
            else:
                assert values is None
        kept = one["exponents"]["counts"][row]
        exponents = line.get("exponents")
        assert (kept and kept[column]) == (exponents and [exponents["lowest"], exponents["counts"]])


def test_of_many_steps_the_first_and_the_last_are_kept(tmp_path):
    path = tmp_path / "layers.jsonl"
    write_lines(path, layer_lines("float8:nearest", ("fc",), tuple(range(0, 5000, 10))))
    one = watched.reduced(path, watched.size_of(path), 40)
    assert (len(one["steps"]), one["of"], one["steps"][0], one["steps"][-1]) == (40, 500, 0, 4990)
    gaps = {b - a for a, b in zip(one["steps"], one["steps"][1:], strict=False)}
    assert max(gaps) - min(gaps) <= 10
    columns = one["exponents"]["columns"]
    assert (len(columns), columns[0], columns[-1]) == (watched.HISTOGRAMS, 0, 39)


def test_what_was_tried_beside_is_apart(tmp_path):
    path = tmp_path / "layers.jsonl"
    write_lines(path, layer_lines("float32", ("fc",)) + layer_lines("nvfp4:nearest", ("fc",), also="nvfp4"))
    one = watched.reduced(path, watched.size_of(path), 40)
    assert [row for row in one["rows"] if row[1] == "weights"] == [
        ["fc", "weights", "float32", None],
        ["fc", "weights", "nvfp4:nearest", "nvfp4"],
    ]
    assert one["ranges"]["nvfp4:nearest"]["scaled"]


def test_the_shadow_is_read_alike(tmp_path):
    folder = write_record(tmp_path / "runs", config(precision="float8"))
    write_lines(folder / "shadow.jsonl", shadow_lines())
    data = data_of(tmp_path / "runs")
    (one,) = data["shadow"]["runs"]
    assert [row[0] for row in one["rows"]] == [*LAYERS, ""]
    assert one["values"]["loss_difference"] == [None] * len(LAYERS) + [[0, 0.05, 0.1, 0.15]]
    assert set(data["statistics"]) == {"weights_distance", "gradient_cosine", "loss_difference"}


@pytest.mark.parametrize(
    ("rule", "lowest", "normal", "largest"),
    [
        ("float8:nearest", 2.0**-16, 2.0**-14, 1.75 * 2.0**16),  # 1-5-2, finite only, bias 15
        ("float8_e4m3fn", 2.0**-9, 2.0**-6, 448.0),
        ("nvfp4:stochastic", 0.5, 1.0, 6.0),
        ("mxfp8_e4m3", 2.0**-9, 2.0**-6, 448.0),
        ("int8", 1.0, 64.0, 127.0),
        ("forward.weights>float4_e2m1fn", 0.5, 1.0, 6.0),
    ],
)
def test_ranges_are_those_of_the_formats(rule, lowest, normal, largest):
    found = watched.range_of(rule)
    expected = [round(math.log2(value), 3) for value in (lowest, normal, largest)]
    assert [found[name] for name in ("lowest", "normal", "largest")] == expected
    assert found["scaled"] == (rule.startswith(("nvfp4", "mxfp8")))


def test_a_range_that_nobody_knows_is_none():
    assert watched.range_of("<function mine>") is None
    assert watched.range_of("forward.weights") is None


def test_pages_with_more_layers_than_fit_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "LAYER_NUMBERS", 40_000)
    for seed in range(3):
        for precision in ("float8", "float16"):
            folder = write_record(tmp_path / "runs", config(seed, precision=precision))
            write_lines(folder / "layers.jsonl", layer_lines(f"{precision}:nearest", steps=tuple(range(0, 1000, 10))))
    data = data_of(tmp_path / "runs")
    shown = [data["runs"]["seeds"][one["run"]] for one in data["layers"]["runs"]]
    assert data["layers"]["there"] == 6
    assert shown[:2] == [0, 0]  # one of each setting first
    assert len(shown) < 6
    assert all(len(one["steps"]) < one["of"] == 100 for one in data["layers"]["runs"])


def test_a_sweep_of_fifteen_hundred_runs_stays_small(tmp_path):
    """Each of its values has four digits that nobody can guess, so packing does not help."""
    from analysis.page import document
    from analysis.runs import Run

    noise = np.random.default_rng(0)
    names = ("training_mse", "training_rmse", "testing_mse", "testing_rmse")
    runs = []
    for rounding in ("nearest", "stochastic"):
        for precision in ("float8", "float16", "bfloat16"):
            for seed in range(250):
                values = noise.random((30, len(names)))
                history = [
                    {"epoch": i + 1, **dict(zip(names, map(float, line), strict=True))} for i, line in enumerate(values)
                ]
                made = config(seed, 30, precision=precision, rounding=rounding)
                runs.append(Run(made, "complete", 0.1, history, folder=tmp_path / made.folder_name))
    text = document("a sweep", page_data(runs, "testing_mse", tmp_path), ["runs.js"])
    assert len(runs) == 1500
    assert len(text) < 4_000_000


def test_the_same_records_make_the_same_bytes(sweep, tmp_path):
    for name in ("a.html", "b.html"):
        assert report.main([str(sweep), "--html", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_plotly_is_loaded_for_a_page_alone(sweep, tmp_path):
    code = (
        "import sys, report; status = report.main(sys.argv[1:]); assert 'plotly' not in sys.modules; sys.exit(status)"
    )
    for arguments in ([str(sweep)], [str(sweep), "--save", str(tmp_path / "x.csv")]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    code = "import sys, main\ntry: main.main(['--help'])\nexcept SystemExit: pass\nassert 'plotly' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_without_plotly_one_line_says_what_to_install(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert report.main([str(sweep), "--html", str(tmp_path / "x.html")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "pip install plotly" in said[-1]
    assert not (tmp_path / "x.html").exists()


def test_a_folder_is_no_page(sweep, capsys):
    assert report.main([str(sweep), "--html", str(sweep)]) == 2
    assert "--html" in capsys.readouterr().err


def test_a_file_that_no_watched_run_left_is_named(tmp_path, capsys):
    folder = write_record(tmp_path / "runs", config())
    (folder / "layers.jsonl").write_text('{"step": 0, "site": "weights"}\n')
    assert report.main([str(tmp_path / "runs"), "--html", str(tmp_path / "x.html")]) == 2
    assert "layers.jsonl" in capsys.readouterr().err


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_of_okabe_and_ito_and_have_contrast():
    style = (ROOT / "analysis" / "templates" / "page.css").read_text()
    blocks = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r"^:root.*?^}", style, re.M | re.S)
    ]
    light, dark = blocks[0], blocks[0] | blocks[1]
    for theme in (light, dark):
        assert {theme[f"series-{i}"].upper() for i in range(1, 7)} == {colour.upper() for colour in COLOURS[1:]}
        for back in (theme["back"], theme["raised"]):
            assert min(contrast(theme[name], back) for name in ("text", "faint", "accent", "warn")) >= 4.5
        assert min(contrast(theme[f"series-{i}"], theme["back"]) for i in range(4)) >= 3
        assert contrast(theme["series-4"], theme["back"]) >= 3
