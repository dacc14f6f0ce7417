"""People's own models, data sets and optimizers: what they come to, and what is said of wrong ones.

No file of the project knows anything of them.
"""

import json

import numpy as np
import pytest
import torch
from run_helpers import OWN_FILE, bits, house_csv, is_refused, stopped, write_own_files

import data
import models
import sweep
import train
from lab.fingerprint import fingerprint_of_run
from settings.config import Config

pytestmark = pytest.mark.usefixtures("one_thread")

MINE_FLAGS = ["--dataset", "mine.py:circles", "--model", "mine.py:net", "--optimizer", "mine.py:heavy_ball"]
RUN = [*MINE_FLAGS, "--epochs", 4, "--batch-size", 16, "--precision", "float8", "--rounding", "stochastic"]


@pytest.fixture
def mine(cli, tmp_path):
    """The folder in which the command line runs, with mine.py and house.csv in it."""
    write_own_files(tmp_path)
    return tmp_path


def test_all_three_in_one_file(cli, mine):
    ran = cli(*RUN, "--weight-decay", 0.01, "--momentum", 0.8)
    assert ran.status == 0
    assert ran.folder.name.startswith("mine-circles-float8-stochastic-42-")
    assert ran.summary["parameters"] == 2 * 8 + 8 + 8 * 2 + 2
    state = torch.load(ran.folder / "checkpoint.pt", weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.01)
    assert ran.config["files_dir"] == str(mine)


def test_what_is_not_set_is_the_functions_own(cli, mine):
    state = torch.load(cli(*RUN).folder / "checkpoint.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["momentum"] == 0.9


def test_a_csv_file_is_learned(cli, mine):
    ran = cli("--dataset", "house.csv:price", "--model", "linear", "--epochs", 60, "--learning-rate", 0.1)
    assert ran.folder.name.startswith("house-price-float32-42-")
    assert ran.summary["testing_mse"] < 1e-3
    ran = cli("--dataset", "house.csv:price", "--optimizer", "adam", "--site", "momentum.exp_avg=float16")
    assert (ran.status, ran.summary["parameters"]) == (0, 2 * 128 + 128 + 128 * 128 + 128 + 128 + 1)


def test_the_same_data_as_a_csv_file_and_from_a_function_give_the_same_bits(cli, mine):
    (mine / "table.py").write_text(
        "import csv, numpy as np\n"
        "def rows():\n"
        "    table = np.array([[float(c) for c in row] for row in list(csv.reader(open('house.csv')))[1:]])\n"
        "    return table[:, :2], table[:, 2]\n"
    )
    first, second = (cli("--dataset", name).metrics for name in ("house.csv:price", "table.py:rows"))
    assert first == second


@pytest.mark.parametrize("kind", ["numpy", "tensors", "split", "column targets", "lists"])
def test_what_a_data_sets_function_may_give(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 3, 4)).astype(np.float32), rng.normal(size=20).astype(np.float32)
    given = {
        "numpy": (x, y),
        "tensors": (torch.tensor(x), torch.tensor(y)),
        "split": (x[:15], y[:15], x[15:], y[15:]),
        "column targets": [x, y[:, None]],
        "lists": (x.tolist(), y.tolist()),
    }[kind]
    monkeypatch.setitem(data.DATASETS, "given", data.DataSet(lambda: given, None, None, None, None, "mlp"))
    split = data.load("given")
    sizes = (15, 5) if kind == "split" else (16, 4)
    assert (len(split.train_x), len(split.test_x)) == sizes
    assert (split.spec.task, split.spec.shape, split.spec.outputs, split.spec.samples) == ("regression", (3, 4), 1, 20)
    assert (split.train_x.dtype, split.train_y.dtype, split.train_y.shape) == (*[torch.float32] * 2, (sizes[0], 1))
    assert split.train_x.double().mean(0).abs().max() < 1e-6
    if kind == "split":
        expected = (x[15:] - x[:15].mean(0)) / x[:15].std(0)
        np.testing.assert_allclose(split.test_x.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_whole_numbers_stay_and_bytes_are_images(monkeypatch):
    rng = np.random.default_rng(2)
    tokens, images, y = rng.integers(0, 9, (20, 6)), rng.integers(0, 256, (20, 2, 5, 4), np.uint8), np.arange(20) % 3
    for name, x in (("tokens", tokens), ("images", images)):
        monkeypatch.setitem(data.DATASETS, name, data.DataSet(lambda x=x: (x, y), None, None, None, None, "mlp"))
    split = data.load("tokens")
    assert (split.train_x.dtype, split.spec.outputs) == (torch.int64, 3)
    assert sorted(split.train_x.tolist() + split.test_x.tolist()) == sorted(tokens.tolist())
    split = data.load("images", scale_on="all")
    seen = torch.cat([split.features(split.train_x, torch.Generator()), split.features(split.test_x)])
    assert split.train_x.dtype == torch.uint8
    assert seen.double().mean((0, 2, 3)).abs().max() < 1e-6
    np.testing.assert_allclose(seen.double().std((0, 2, 3), correction=0).numpy(), 1, rtol=1e-5)


def test_a_text_and_a_model_that_reads_it(cli, mine):
    (mine / "verses.txt").write_text("the fog comes in on little feet; the tide goes out on none\n" * 40)
    (mine / "reader.py").write_text(
        "from torch import nn\n"
        "def net(shape, outputs, width=8):\n"
        "    assert shape == (64,)\n"
        "    return nn.Sequential(nn.Embedding(outputs, width), nn.Linear(width, outputs))\n"
    )
    ran = cli("--dataset", "verses.txt", "--model", "reader.py:net", "--precision", "float8", "--epochs", 2)
    assert ran.status == 0, ran
    assert ran.folder.name.startswith("verses-float8-nearest-42-")
    assert ran.summary["code"].count(".") == 1


# Stopped, resumed, swept


def test_resumed_from_another_folder_to_the_same_bits(cli, mine, monkeypatch, tmp_path_factory):
    whole = cli(*RUN, "--output-dir", "whole").folder.absolute()
    half = stopped(cli, monkeypatch, *RUN, "--output-dir", "half", steps=10).absolute()  # 4 steps an epoch
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    ran = cli("--resume", half)
    assert ran.status == 0, ran
    assert bits(ran.folder) == bits(whole)


def test_files_that_were_moved_are_named_anew(cli, mine, monkeypatch):
    half = stopped(cli, monkeypatch, *RUN, steps=10)
    (mine / "moved").mkdir()
    (mine / "mine.py").rename(mine / "moved" / "mine.py")
    is_refused(cli("--resume", half), "--dataset: given mine.py:circles (No such file")
    ran = cli("--resume", half, "--files-dir", "moved")
    assert (ran.status, ran.config["files_dir"]) == (0, str(mine / "moved"))
    assert "the code has changed" not in ran.err


def test_a_changed_file_is_said_when_a_run_goes_on(cli, mine, monkeypatch):
    half = stopped(cli, monkeypatch, *RUN, steps=10)
    (mine / "mine.py").write_text(OWN_FILE + "\n# a comment\n")
    unchanged = cli("--resume", half)
    assert "the code has changed" not in unchanged.err
    half = stopped(cli, monkeypatch, *RUN, "--output-dir", "again", steps=10)
    (mine / "mine.py").write_text(OWN_FILE.replace("Tanh", "ReLU"))
    assert "the code has changed" in cli("--resume", half).err


def codes(folder):
    return {path.name: json.loads((path / "summary.json").read_text())["code"] for path in folder.iterdir()}


def test_a_sweep_trains_again_what_other_contents_made(mine, capsys):
    (mine / "helper_of_mine.py").write_text("WIDTH = 4\n")
    (mine / "wide.py").write_text(
        "from torch import nn\nimport helper_of_mine as h\n"
        "def net(shape, outputs): return nn.Sequential(nn.Linear(*shape, h.WIDTH), nn.Linear(h.WIDTH, outputs))\n"
    )
    command = [
        "--dataset",
        "toy,house.csv:price",
        "--model",
        "linear,wide.py:net",
        "--jobs",
        "1",
        "--epochs",
        "1",
        "--output-dir",
        "swept",
    ]

    def swept():
        capsys.readouterr()
        assert sweep.main(command) == 0
        return capsys.readouterr().err, codes(mine / "swept")

    _, first = swept()
    assert len(first) == 4
    code = first[next(name for name in first if name.startswith("toy-float32-42") and "." not in first[name])]
    assert {made_by.partition(".")[0] for made_by in first.values()} == {code}
    assert swept() == ("", first)
    (mine / "house.csv").write_text(house_csv() + "\n1,2,3\n")
    said, second = swept()
    assert "2 of 4 runs were made by other code" in said
    assert {name for name in first if first[name] != second[name]} == {n for n in first if n.startswith("house-price")}
    (mine / "helper_of_mine.py").write_text("WIDTH = 5\n")
    assert "2 of 4 runs were made by other code" in swept()[0]
    (mine / "house.csv").write_text(house_csv())  # as it was
    assert "2 of 4 runs were made by other code" in swept()[0]


def test_a_report_does_not_mind_that_different_files_are_different(mine, capsys):
    import report

    (mine / "other.csv").write_text(house_csv(30))
    sweep.main(["--dataset", "toy,house.csv:price,other.csv:price", "--jobs", "1", "--epochs", "1"])
    capsys.readouterr()
    assert report.main(["runs"]) in (None, 0)
    said = capsys.readouterr()
    assert "house.csv:price" in said.out
    assert "different code" not in said.err


# In Python


def test_rows_of_the_tables_at_run_time(tmp_path, monkeypatch):
    import low_precision as lp
    from settings.recipes import with_recipe

    monkeypatch.chdir(tmp_path)

    def rows():
        x = np.arange(40.0)[:, None]
        return x, 3 * x[:, 0]

    def net(shape, outputs, width=4):
        return torch.nn.Sequential(torch.nn.Linear(*shape, width), torch.nn.Linear(width, outputs))

    with pytest.raises(ValueError, match="given mine"):
        Config.make(dataset="mine")
    monkeypatch.setitem(data.DATASETS, "mine", data.DataSet(rows, "regression", 40, (1,), 1, "linear"))
    monkeypatch.setitem(models.MODELS, "my net", net)
    recipe = lp.Recipe("mine", "weights of products in 4 bits", "nobody", operands={"forward.weights": "mxfp4"})
    monkeypatch.setitem(lp.RECIPES, "mine", recipe)
    config = Config.make(**with_recipe("mine", {"dataset": "mine", "model": "my net", "epochs": 3}))
    result = train.run(config, quiet=True)
    assert result.summary["parameters"] == 4 + 4 + 4 + 1
    assert result.folder.name.startswith("mine-mine-42-")
    assert result.summary["code"].count(".") == 1  # this file is in it
    with pytest.raises(ValueError, match="did you mean my net"):
        Config.make(model="my nt")


def test_a_text_of_a_row_at_run_time_is_in_the_fingerprint(monkeypatch):
    def verse(data_dir):
        return "one fish, two fish, red fish, blue fish"

    row = data.DataSet(None, "language", None, None, None, "gpt", own_split=data.OF_TEXT, text=verse)
    monkeypatch.setitem(data.DATASETS, "verse", row)
    assert fingerprint_of_run(Config(dataset="verse")).count(".") == 1
    assert fingerprint_of_run(Config(dataset="shakespeare")).count(".") == 0


def test_a_row_that_says_something_else_than_its_arrays(monkeypatch):
    row = data.DataSet(lambda: (np.zeros((4, 2)), np.arange(4.0)), "regression", 4, (3,), 1, "linear")
    monkeypatch.setitem(data.DATASETS, "mine", row)
    with pytest.raises(ValueError, match=r"mine, whose row says regression of \(3,\).*allowed.*\(2,\)"):
        data.load("mine")


def test_a_report_says_where_one_file_had_several_contents(mine, capsys):
    import report

    command = ["--dataset", "house.csv:price", "--jobs", "1", "--epochs", "1", "--seed"]
    sweep.main([*command, "1"])
    (mine / "house.csv").write_text(house_csv(30))
    sweep.main([*command, "2"])
    capsys.readouterr()
    report.main(["runs"])
    assert capsys.readouterr().err.count(" with files ") == 2
