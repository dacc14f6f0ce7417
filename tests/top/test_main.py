"""The command line as a user meets it: wrong arguments, failures, interruptions, what is printed and what is left."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from run_helpers import CIFAR10_FILES, ROOT, epochs_in, is_refused, names, only, write_cifar10

import main
from lab.console import command
from lab.record import Record
from low_precision.formats import NAMED
from settings.flags import parser

# flag, a value that is not allowed, what the line must name beside them
WRONG = [
    ("--dataset", "bostn", "toy, boston"),
    ("--dataset", "Toy", "toy, boston"),
    ("--dataset", "", "toy, boston"),
    ("--epochs", "-1", ">= 0"),
    ("--epochs", "1.5", ">= 0"),
    ("--epochs", "two", ">= 0"),
    ("--epochs", "1\n2", ">= 0"),
    ("--learning-rate", "0", "> 0"),
    ("--learning-rate", "-0.1", "> 0"),
    ("--learning-rate", "nan", "> 0"),
    ("--learning-rate", "inf", "> 0"),
    ("--learning-rate", "1e31", "1e30"),
    ("--learning-rate", "0,1", "> 0"),
    ("--batch-size", "0", ">= 1"),
    ("--batch-size", "all", ">= 1"),
    ("--test-split", "0", "0 < f < 1"),
    ("--test-split", "1", "0 < f < 1"),
    ("--test-split", "-0.2", "0 < f < 1"),
    ("--test-split", "20%", "0 < f < 1"),
    ("--test-split", "nan", "0 < f < 1"),
    ("--precision", "float9", "float8_e5m2"),
    ("--precision", "e9m2", "eXmY"),
    ("--precision", "e4m24", "eXmY"),
    ("--precision", "e1m2", "eXmY"),
    ("--rounding", "Nearest", "nearest_away"),
    ("--seed", "-1", "4294967295"),
    ("--seed", "4294967296", "4294967295"),
    ("--seed", "4.2", "4294967295"),
    ("--rounding-seed", "none", "4294967295"),
    ("--model", "resnet18", "resnet20"),
    ("--model", "cnn", "no images"),
    ("--quantize", "weights,noise", "accumulator"),
    ("--quantize", "weights,weights", "accumulator"),
    ("--quantize", "all,weights", "accumulator"),
    ("--quantize", "", "accumulator"),
    ("--site", "weights", "SITE=FORMAT"),
    ("--site", "noise=float8", "SITE=FORMAT"),
    ("--site", "weights=float8:even", "SITE=FORMAT"),
    ("--recipe", "publish", "published"),
    ("--transform", "wgrad=hadamard3", "[PRODUCT=]none"),
    ("--layers", "", "patterns"),
    ("--layers", "a,,b", "patterns"),
    ("--optimizer", "lbfgs", "adamw"),
    ("--momentum", "-1", ">= 0"),
    ("--weight-decay", "x", ">= 0"),
    ("--average-last", "1.5", "a fraction, 0 <= f <= 1"),
    ("--average-last", "nan", "a fraction"),
    ("--schedule", "step", "onecycle"),
    ("--steps", "-1", "a whole number >= 0"),
    ("--steps", "2.5", "a whole number >= 0"),
    ("--evaluate-every", "0", "a whole number >= 1"),
    ("--micro-batch", "0", "a whole number >= 1"),
    ("--betas", "0.9", "two numbers A,B"),
    ("--decay", "none", "matrices"),
    ("--clip-norm", "0", "> 0"),
    ("--warmup", "-1", ">= 0"),
    ("--final-learning-rate", "-1", ">= 0"),
    ("--model-options", "width", "NAME=VALUE"),
    ("--sample", "-1", ">= 0"),
    ("--smallest-state", "-1", ">= 0"),
    ("--loss-scale", "0", "dynamic"),
    ("--loss-scale", "static", "dynamic"),
    ("--overflow", "wrap", "infinity"),
    ("--overflow", "error", "saturate"),
    ("--scale-on", "test", "train, all"),
    ("--backend", "numpy", "eager"),
    ("--device", "gpu", "cuda"),
    ("--data-dir", "", "folder"),
    ("--files-dir", "", "folder"),
    ("--model", "net.py", "FILE.py:FUNCTION"),
    ("--optimizer", "mine.py:", "FILE.py:FUNCTION"),
    ("--dataset", "mine.csv", "FILE.csv:TARGET[:classes]"),
    ("--watch", "-1", ">= 0"),
    ("--watch-also", "float9", "float8"),
    ("--output-dir", "", "folder"),
    ("--checkpoint-every", "0", "epochs"),
    ("--checkpoint-every", "1.5", "epochs"),
    ("--checkpoint-every", "10x", "10m"),
    ("--checkpoint-every", "", "10m"),
    ("--resume", "runs/nothing", "folder of a record"),
    ("--resume", "", "folder of a record"),
    ("--watch", "-1", ">= 0"),
    ("--watch", "1.5", ">= 0"),
    ("--watch-also", "mxfp5", "recipe:NAME"),
    ("--watch-also", "recipe:mxfp9", "recipe:NAME"),
    ("--wandb", "on", "offline"),
    ("--wandb-project", "", "name"),
    ("--wandb-entity", "", "name"),
]


@pytest.mark.parametrize(("flag", "value", "allowed"), WRONG)
def test_a_wrong_value_is_named_with_its_flag_and_what_is_allowed(cli, tmp_path, flag, value, allowed):
    seen = value if value.isprintable() and value else repr(value)
    is_refused(cli(f"{flag}={value}"), f"{flag}: given {seen}", allowed)
    if not value.startswith("-"):
        is_refused(cli(flag, value), f"{flag}: given {seen}", allowed)
    assert list(tmp_path.iterdir()) == []


def test_every_flag_has_a_wrong_value_above():
    flags = {option for action in parser()._actions for option in action.option_strings}
    without = {"-h", "--help", "--list-formats", "--list-recipes", "--debug", "--shadow"}  # which take no value
    assert flags - {flag for flag, _, _ in WRONG} == without


@pytest.mark.parametrize("flag", list(dict.fromkeys(flag for flag, _, _ in WRONG)))
def test_a_flag_without_its_value(cli, tmp_path, flag):
    is_refused(cli(flag), f"{flag}: given nothing")
    is_refused(cli("--epochs", "1", flag, "--device", "cpu"), f"{flag}: given nothing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epoch", "3"], ["--epoch", "--epochs"]),  # no abbreviations
        (["--learning_rate", "3"], ["--learning_rate", "--learning-rate"]),
        (["--lr=0.1"], ["--lr"]),
        (["-e", "3"], ["-e"]),
        (["boston"], ["boston"]),
        ([""], ["''"]),
        (["--epochs", "1", "2"], ["2"]),
        (["--debug=1"], ["--debug", "1"]),
        (["--list-formats=1"], ["--list-formats", "1"]),
        (["--momentum", "-1e-3"], ["--momentum", "--momentum=VALUE"]),
        (["--dataset", "boston", "--model", "cnn"], ["--model", "cnn", "linear, mlp"]),
        (["--dataset", "cifar10", "--test-split", "0.3"], ["--test-split", "0.3", "own split"]),
        (["--test-split", "0.99"], ["--test-split", "0.99", "training row"]),
        (["--precision", "float8", "--overflow", "infinity"], ["--overflow", "infinity", "saturate"]),
        (["--precision", "fp16", "--backend", "qtorch"], ["--backend", "qtorch", "eager"]),
        (["--optimizer", "adam", "--momentum", "0.9"], ["--momentum", "0.9"]),
        (["--site", "errors=fp16", "--site", "errors=fp16"], ["--site", "each site once"]),
        (["--recipe", "qtorch-tutorial", "--optimizer", "adam"], ["--momentum", "--recipe qtorch-tutorial"]),
    ],
)
def test_arguments_that_are_unknown_or_do_not_go_together(cli, tmp_path, arguments, words):
    is_refused(cli(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_what_only_the_model_or_the_machine_knows_is_a_wrong_argument_too(cli, tmp_path, monkeypatch):
    is_refused(cli("--layers", "linear,fc*"), "--layers: given 'fc*'", "a pattern that matches one of: linear")
    missing = tmp_path / "missing"
    for dataset in ("cifar10", "shakespeare"):  # said before any download
        is_refused(cli("--dataset", dataset, "--layers", "nope", "--data-dir", missing), "--layers", "'nope'")
        is_refused(cli("--dataset", dataset, "--site", "nope/products=fp16", "--data-dir", missing), "--site", "nope")
    of_vit = "--dataset", "cifar10", "--model", "vit", "--model-options", "patch=5"
    is_refused(cli(*of_vit, "--data-dir", missing), "--model-options", "patch=5", "divisor")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    is_refused(cli("--device", "cuda"), "--device", "cuda", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_and_help_answer_without_loading_anything_heavy(tmp_path):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import main
calls = [["--epochs", "x"], ["--nope"], ["--dataset", "boston", "--model", "cnn"], ["--list-formats"], ["--help"]]
for argv in calls:
    try:
        print(main.main(argv))
    except SystemExit as end:
        print(end.code)
    heavy = {"torch", "numpy", "sklearn", "wandb", "qtorch", "tqdm"} & set(sys.modules)
    assert not heavy, heavy
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert [line for line in ran.stdout.splitlines() if line in ("0", "1", "2")] == ["2", "2", "2", "0", "0"]
    assert len(ran.stderr.splitlines()) == 3
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_format_and_recipe(cli, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in [*(flag for flag, _, _ in WRONG), "--debug", "published", "eXmY", "accumulator", "[default: 0.01]"]:
        assert word in said


def test_list_formats(cli, tmp_path):
    ran = cli("--list-formats")
    assert (ran.status, ran.err) == (0, "")
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines()}
    assert set(NAMED) <= set(rows)
    assert rows["float8"][1:6] == ["1-5-2", "114688", "6.103516e-05", "1.525879e-05", "0.125"]
    assert rows["fp16"][1:3] == ["1-5-10", "65504"]
    assert "half" in ran.out
    assert list(tmp_path.iterdir()) == []


def test_the_first_command_of_a_new_user(cli, tmp_path):
    ran = cli()
    assert ran.status == 0
    assert [line.split("  ")[0] for line in ran.err.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert ran.out.startswith("toy-float32-42: complete (2 epochs, 2 steps, ")
    for name in ("training_mse", "training_rmse", "testing_mse", "testing_rmse", "testing_rmse_target_units"):
        (line,) = [line for line in ran.out.splitlines() if line.split()[0] == name]
        assert float(line.split()[1]) == pytest.approx(ran.summary[name], rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert ran.folder.parent.name == "runs"
    assert names(ran.folder) == ["checkpoint.pt", "config.json", "metrics.jsonl", "summary.json"]


def test_the_last_of_two_values_of_a_flag_counts(cli):
    assert cli("--epochs", 1, "--epochs", 3).summary["epochs"] == 3


def test_the_record_says_which_command_made_it(cli):
    ran = cli("--epochs", 1, "--output-dir", "a b")
    assert ran.summary["command"] == command("main.py", "--epochs", "1", "--output-dir", "a b")
    assert shlex.split(ran.summary["command"])[1:] == [str(ROOT / "main.py"), "--epochs", "1", "--output-dir", "a b"]


def test_recipe_and_sites_reach_the_run(cli):
    site = "momentum=half:stochastic:4:half"
    ran = cli("--recipe", "published", "--precision", "float8", "--scale-on", "train", "--site", site)
    assert ran.config["quantize"] == ["activations", "errors"]
    assert ran.config["scale_on"] == "train"
    assert ran.config["site"] == [site]
    assert ran.summary["rules"] == {
        "activations": "float8:nearest",
        "errors": "float8:nearest",
        "momentum": "fp16:stochastic:4:half",
    }


def test_folders_in_the_home_folder(cli, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    ran = cli("--output-dir", "~/runs", "--epochs", 1)
    assert ran.folder == only(home / "runs")
    again = cli("--resume", f"~/runs/{ran.folder.name}")
    assert (again.status, again.folder) == (0, ran.folder)
    write_cifar10(home, count=2)
    ran = cli("--dataset", "cifar10", "--data-dir", "~", "--model", "linear", "--epochs", 1)
    assert ran.status == 0
    assert names(tmp_path) == ["home", "runs"]


# Interruptions


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_kept(cli, tmp_path, monkeypatch, number, status):
    write = Record.evaluation

    def interrupt_in_the_third(record, metrics):
        write(record, metrics)
        if metrics["epoch"] == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Record, "evaluation", interrupt_in_the_third)
    ran = cli("--epochs", 1000)
    assert (ran.status, ran.out) == (status, "")
    assert "Traceback" not in ran.err
    folder = only(tmp_path / "runs")
    assert f"interrupted: recorded so far in runs/{folder.name}" in ran.err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["epochs"] >= 2  # the signal may arrive before the epoch is in the summary
    assert epochs_in(folder) == [1, 2, 3]


def test_an_interrupted_run_replaces_nothing_and_a_complete_one_replaces_it(cli, tmp_path, monkeypatch):
    complete = cli("--epochs", 4)
    before = {path.name: path.read_bytes() for path in complete.folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Record, "evaluation", lambda record, metrics: os.kill(os.getpid(), signal.SIGTERM))
        assert cli("--epochs", 4).status == 143
    assert {path.name: path.read_bytes() for path in complete.folder.iterdir()} == before
    again = cli("--epochs", 4)
    assert again.folder == complete.folder
    assert list((tmp_path / "runs").iterdir()) == [tmp_path / again.folder]
    assert (again.folder / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]


@pytest.mark.parametrize("call", range(60, 80))
def test_an_interruption_inside_the_rounding_is_one_too(cli, monkeypatch, call):
    """Forward, backward or in the optimizer's hooks: 20 calls of the engine in a row are more than a step."""
    from low_precision.engines import eager

    engine, calls = eager.quantize, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return engine(*arguments)

    monkeypatch.setattr(eager, "quantize", interrupted)
    ran = cli("--precision", "float8", "--epochs", 1000, "--backend", "eager", "--momentum", 0.9)
    assert ran.status == 143
    assert "Traceback" not in ran.err


def test_ctrl_c_ends_a_process(script, tmp_path):
    command = [*script, "--epochs", "10000", "--batch-size", "1", "--learning-rate", "1e-6", "--debug"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert first.startswith("epoch ")
    assert process.returncode == 130
    assert (out, "Traceback" in err) == ("", False)
    assert "interrupted: recorded so far in runs/" in err
    folder = only(tmp_path / "runs")
    epochs = epochs_in(folder)
    assert epochs == list(range(1, len(epochs) + 1))
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


# Divergence


@pytest.mark.parametrize("dataset", ["toy", "breast_cancer"])
def test_a_diverged_run_is_a_result(cli, dataset):
    ran = cli("--dataset", dataset, "--learning-rate", 1e30, "--epochs", 50, "--batch-size", 4)
    assert ran.status == 0
    summary = ran.summary  # strict JSON: NaN and infinity are null
    assert summary["status"] == "diverged"
    assert f"diverged: a loss at step {summary['diverged_step']} is not finite" in ran.out
    assert summary["diverged_step"] - summary["steps"] in (0, 1)
    assert summary["epochs"] == len(ran.metrics) < 50
    assert None in ran.metrics[-1].values()
    assert None not in [value for line in ran.metrics[:-1] for value in line.values()]


def test_a_nan_is_not_rounded_away(cli, monkeypatch):
    import data

    load = data.load

    def load_nan(*arguments):
        split = load(*arguments)
        split.train_x[3] = float("nan")
        return split

    monkeypatch.setattr(data, "load", load_nan)
    ran = cli("--precision", "float8", "--batch-size", 1, "--epochs", 3)
    assert (ran.status, ran.summary["status"]) == (0, "diverged")
    assert 1 <= ran.summary["diverged_step"] <= 8


# The whole way with CIFAR-10


def test_a_tiny_cifar10_from_the_command_line(cli, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    write_cifar10(folder)
    arguments = ["--dataset", "cifar10", "--data-dir", folder, "--epochs", 1, "--batch-size", 80]
    ran = cli(*arguments, "--precision", "float8", "--rounding", "stochastic")
    assert ran.status == 0
    assert "cifar10: 200 + 40 images" in ran.err
    assert "Warning" not in ran.err
    assert (ran.config["model"], ran.summary["steps"], ran.summary["parameters"]) == ("resnet20", 3, 272_282)
    assert 0 <= ran.summary["testing_accuracy"] <= 1
    state = torch.load(ran.folder / "checkpoint.pt", weights_only=True)["model"]
    assert state["conv.weight"].shape == (16, 3, 3, 3)
    assert names(folder) == sorted(CIFAR10_FILES)  # nothing written beside the data
    again = cli(*arguments, "--model", "linear", "--epochs", 12, "--learning-rate", 0.001)
    assert again.summary["training_loss"] < again.metrics[0]["training_loss"]


@pytest.mark.parametrize(
    "words",
    [
        ("main.py", "--list-recipes"),
        ("quant.py", "float8", "0.3"),
        ("quant.py", "--show", "float8"),
        ("report.py", "--formats", "float8,mxfp4"),
    ],
    ids=" ".join,
)
def test_what_is_printed_may_be_read_in_part(tmp_path, words):
    """`python main.py --list-recipes | head`"""
    script, *arguments = words
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, ROOT / script, *arguments], stdout=write, stderr=subprocess.PIPE, cwd=tmp_path
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_what_the_library_warns_of_is_one_line(cli):
    ran = cli("--dataset", "digits", "--epochs", 1, "--recipe", "adam8bit", "--wandb", "disabled")
    lines = [line for line in ran.err.splitlines() if not line.startswith("epoch ")]
    text = "warning: momentum: states of fewer than 4096 numbers stay in float32, those of conv1.weight, conv1.bias"
    assert [line.startswith(text) for line in lines] == [True], ran.err
