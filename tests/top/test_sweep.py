"""Sweeps: the runs that were asked for, each once, with the records of single runs; stopped and going on."""

import json
import re
import shlex
import signal
import subprocess
import sys

import pytest
import yaml
from run_helpers import ROOT, bits

import main
import sweep
from low_precision.rules import ALL_SITES
from settings.config import Config, ConfigError


def configs(*argv) -> list[Config]:
    return sweep.grid([str(word) for word in argv])[0]


def test_every_combination_that_means_something_is_one_run():
    runs = configs("--precision", "float8,float32", "--rounding", "nearest,stochastic", "--seed", "0:3", "--epochs", 7)
    assert len(runs) == 9  # float32 has no rounding
    assert {c.seed for c in runs} == {0, 1, 2}
    assert {c.epochs for c in runs} == {7}
    assert len({c.folder_name for c in runs}) == 9
    assert configs() == [Config(wandb="disabled").resolved()]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--seed", "3,5:7,10:20:5"], {"seed": [3, 5, 6, 10, 15]}),
        (["--learning-rate", "0.1,1e-3"], {"learning_rate": [0.1, 1e-3]}),
        (["--quantize", "all;weights,errors", "--precision", "fp16"], {"quantize": [ALL_SITES, ("weights", "errors")]}),
        (
            ["--site", "accumulator=float16,momentum=float16;", "--precision", "float8"],
            {"site": [("accumulator=float16", "momentum=float16"), ()]},
        ),
        (["--recipe", "bfloat16,ocp-fp8"], {"precision": ["bfloat16", "float8_e4m3fn"]}),
        (["--wandb", "offline"], {"wandb": ["offline"]}),
    ],
)  # fmt: skip
def test_values_of_a_flag(flags, expected):
    for name, values in expected.items():
        assert [getattr(c, name) for c in configs(*flags)] == values


def test_a_file_in_wandbs_form_and_flags_that_win(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        """
program: main.py
method: grid
metric: {name: Testing.MSE, goal: minimize}
parameters:
  dataset: {value: boston}
  precision: {values: [float8, float16]}
  learning-rate: {values: [0.1, 0.01]}
  seed: {values: [1, 2]}
"""
    )
    runs = configs(file)
    assert len(runs) == 8
    assert {c.dataset for c in runs} == {"boston"}
    assert {c.seed for c in configs(file, "--seed", 7)} == {7}


def test_the_file_that_comes_along_is_what_both_take():
    """Its names are flags as wandb's agent gives them to the program: --NAME=VALUE."""
    file = ROOT / "sweeps" / "boston.yaml"
    assert len(configs(file)) == 50
    parameters = yaml.safe_load(file.read_text())["parameters"]
    words = [f"--{name}={choice.get('value', choice.get('values', [None])[0])}" for name, choice in parameters.items()]
    config, _ = main.configure(words)
    assert (config.dataset, config.batch_size, config.precision) == ("boston", 512, "float32")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--precision", "float8,flot16"], "flot16"),
        (["--seed", "5:5"], "--seed"),
        (["--jobs", "0"], "--jobs"),
        (["--resume", "x"], "--resume"),
        (["--cluster", "slurm"], "ray"),
        (["missing.yaml"], "missing.yaml"),
        (["--epoch", "3"], "--epoch"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep.main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "method: random\nparameters: {seed: {values: [1]}}",
        "parameters: 3",
        "[",
        "parameters: {seeds: {values: [1]}}",
        "a: b",
    ],
)
def test_a_file_that_is_no_grid_is_one_line(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        configs(tmp_path / "x.yaml")


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("parameters: {seed: {values: [1, 2]}}")
    assert len(configs("~/x.yaml")) == 2


def test_a_line_now_and_then_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    """However long a run takes: also before the first of them has ended."""
    assert sweep.LINE_SECONDS <= 30
    monkeypatch.setattr(sweep, "LINE_SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    assert sweep.main(["--seed", "0:2", "--jobs", "1", "--epochs", "300"]) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert "0 of 2 runs" in lines
    assert set(lines) <= {f"{done} of 2 runs" for done in range(3)}
    assert lines == sorted(lines)
    assert said.out.startswith("2 runs: 2 complete, 0 diverged, 0 failed")


FLAGS = ["--dataset", "boston", "--epochs", 3, "--precision", "float8,float32", "--rounding", "nearest,stochastic"]


def test_records_are_those_of_single_runs_and_are_not_made_again(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweep.main([str(w) for w in [*FLAGS, "--seed", "0:2", "--jobs", 2, "--output-dir", "swept"]]) == 0
    folders = sorted((tmp_path / "swept").iterdir())
    assert len(folders) == 6
    made = {folder: (folder / "summary.json").stat().st_mtime_ns for folder in folders}
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        command = shlex.split(json.loads((folder / "summary.json").read_text())["command"])[2:]
        ran = cli(*command, "--output-dir", "alone")
        assert json.loads((ran.folder / "config.json").read_text()) == config | {"output_dir": "alone"}
        assert bits(ran.folder) == bits(folder)
    assert sweep.main([str(w) for w in [*FLAGS, "--seed", "0:3", "--jobs", 2, "--output-dir", "swept"]]) == 0
    assert len(list((tmp_path / "swept").iterdir())) == 9
    assert {folder: (folder / "summary.json").stat().st_mtime_ns for folder in folders} == made


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"nothing")
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(b"nothing")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    arguments = ["--dataset", "toy,cifar10", "--data-dir", tmp_path, "--seed", "1,2", "--jobs", 1, "--epochs", 1]
    assert sweep.main(list(map(str, arguments))) == 1
    said = capsys.readouterr()
    assert "4 runs: 2 complete, 0 diverged, 2 failed" in said.out
    assert said.err.count("failed: cifar10-float32-1") == 1


def test_what_only_the_model_could_tell_is_of_the_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--dataset", "toy", "--precision", "float8", "--site", "lineer/weights=float16", "--jobs", 1]
    assert sweep.main(list(map(str, arguments))) == 1
    assert re.search(r"^failed: toy-\S+: --site: given lineer/", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """SIGKILL once the first record is there: the records of an undisturbed sweep, and nothing else."""
    command = [sys.executable, ROOT / "sweep.py", *FLAGS, "--seed", "0:8", "--jobs", 2, "--output-dir"]
    running = subprocess.Popen(list(map(str, [*command, tmp_path / "killed"])), cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("killed/*/summary.json")):
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    subprocess.run(list(map(str, [*command, tmp_path / "killed"])), cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(list(map(str, [*command, tmp_path / "left"])), cwd=tmp_path, check=True, capture_output=True)
    killed = {f.name: bits(f) for f in (tmp_path / "killed").iterdir() if ".partial-" not in f.name}
    assert killed == {f.name: bits(f) for f in (tmp_path / "left").iterdir()}
    assert len(killed) == 24


def test_on_a_ray_cluster_of_this_machine(tmp_path):
    """Needs requirements-cluster.txt. The records are those of processes, and nothing is run twice."""
    pytest.importorskip("ray")
    command = [sys.executable, str(ROOT / "sweep.py"), *map(str, FLAGS), "--seed", "0:2", "--jobs", "2"]
    made = {}
    for name, more in (("ray", ["--cluster", "ray"]), ("here", [])):
        (tmp_path / name).mkdir()
        ran = subprocess.run([*command, *more], cwd=tmp_path / name, check=True, capture_output=True, text=True)
        assert "6 runs: 6 complete, 0 diverged, 0 failed" in ran.stdout
        folders = sorted((tmp_path / name / "runs").iterdir())
        made[name] = {f.name: (bits(f), (f / "config.json").read_bytes()) for f in folders}
    assert made["ray"] == made["here"]
    times = [f.stat().st_mtime_ns for f in sorted((tmp_path / "ray" / "runs").iterdir())]
    subprocess.run([*command, "--cluster", "ray"], cwd=tmp_path / "ray", check=True, capture_output=True)
    assert [f.stat().st_mtime_ns for f in sorted((tmp_path / "ray" / "runs").iterdir())] == times


def test_a_process_that_is_killed_ends_the_sweep_in_one_line(tmp_path):
    command = [sys.executable, ROOT / "sweep.py", "--seed", "0:2", "--epochs", 10**6, "--jobs", 2]
    running = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("runs/.*partial-*"))) + len(list(tmp_path.glob("runs/*partial-*"))) < 2:
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.05)
    subprocess.run(["pkill", "-KILL", "-P", str(running.pid), "-f", "loky.backend.popen_loky"], check=True)
    _, said = running.communicate()
    assert running.returncode == 1
    assert [line for line in said.splitlines() if "goes on" in line]
    assert "Traceback" not in said
