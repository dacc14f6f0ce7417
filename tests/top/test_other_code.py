"""Records of other code: sweep.py makes them anew or keeps them, main.py --resume says so, and so does report.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import NOISY_BOSTON, ROOT, bits, only, signal_after, snapshot, stopped, strict_json

import lab.fingerprint
import report
import sweep
import train
from lab.fingerprint import fingerprint

OURS, OTHER = "0123456789abcdef", "fedcba9876543210"
FLAGS = ["--dataset", "boston", "--precision", "float8", "--seed", "0:3", "--epochs", "1", "--jobs", "1"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def written_by(monkeypatch, tmp_path):
    """written_by(NAME): from now on, the code of this process has that fingerprint."""
    monkeypatch.chdir(tmp_path)

    def change(code: str) -> None:
        monkeypatch.setattr(lab.fingerprint, "fingerprint", lambda: code)

    return change


def times(folder: Path) -> dict[str, int]:
    return {path.name: (path / "summary.json").stat().st_mtime_ns for path in folder.iterdir()}


def codes(folder: Path) -> list[str | None]:
    return [strict_json((path / "summary.json").read_text()).get("code") for path in sorted(folder.iterdir())]


def test_a_record_carries_the_fingerprint(cli):
    ran = cli("--epochs", 1)
    assert ran.summary["code"] == fingerprint()
    assert len(fingerprint()) == 16


def test_runs_of_other_code_are_made_anew(written_by, capsys):
    written_by(OTHER)
    assert sweep.main(FLAGS) == 0
    made = times(Path("runs"))
    capsys.readouterr()
    written_by(OURS)
    assert sweep.main(FLAGS) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == ["3 of 3 runs were made by other code: they are trained anew; --keep keeps them"]
    assert codes(Path("runs")) == [OURS] * 3
    again = times(Path("runs"))
    assert again.keys() == made.keys()
    assert all(again[name] > made[name] for name in made)
    assert sweep.main(FLAGS) == 0
    assert capsys.readouterr().err == ""
    assert times(Path("runs")) == again


def test_runs_of_other_code_may_be_kept(written_by, capsys):
    written_by(OTHER)
    assert sweep.main(FLAGS) == 0
    kept = snapshot(Path("runs"))
    capsys.readouterr()
    written_by(OURS)
    assert sweep.main([*FLAGS[:4], "--seed", "0:4", *FLAGS[6:], "--keep"]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == ["3 of 4 runs were made by other code: they are kept"]
    assert "4 runs: 4 complete" in said.out
    assert sorted(codes(Path("runs"))) == [OURS, OTHER, OTHER, OTHER]
    assert {path: raw for path, raw in snapshot(Path("runs")).items() if path in kept} == kept


def test_records_without_a_fingerprint_are_of_other_code(written_by, capsys):
    written_by(OURS)
    assert sweep.main(FLAGS) == 0
    for folder in sorted(Path("runs").iterdir())[:2]:
        summary = strict_json((folder / "summary.json").read_text())
        del summary["code"]
        (folder / "summary.json").write_text(json.dumps(summary))
    capsys.readouterr()
    assert sweep.main(FLAGS) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("2 of 3 runs were made by other code (2 of them by a version that recorded no fingerprint")
    assert codes(Path("runs")) == [OURS] * 3


def test_an_older_record_stays_until_the_new_one_is_complete(written_by, monkeypatch, capsys):
    written_by(OTHER)
    assert sweep.main(FLAGS) == 0
    kept = snapshot(Path("runs"))
    written_by(OURS)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_until_evaluation", lambda *_: 1 / 0)
        assert sweep.main(FLAGS) == 1
    assert snapshot(Path("runs")) == kept
    assert "the code changed meanwhile" not in capsys.readouterr().err
    assert sweep.main(FLAGS) == 0
    assert codes(Path("runs")) == [OURS] * 3


def unfinished_run(cli, monkeypatch) -> list[str]:
    """Leaves a run that was stopped in its middle. Returns the arguments with which sweep.py comes to it."""
    arguments = [*map(str, NOISY_BOSTON), "--wandb", "disabled"]
    folder = stopped(cli, monkeypatch, *arguments)
    assert strict_json((folder / "summary.json").read_text())["status"] == "interrupted"
    return [*arguments, "--jobs", "1"]


def test_an_unfinished_run_of_this_code_goes_on(cli, written_by, monkeypatch, capsys):
    written_by(OURS)
    arguments = unfinished_run(cli, monkeypatch)
    assert sweep.main(arguments) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("resuming ")
    summary = strict_json((only(Path("runs")) / "summary.json").read_text())
    assert (summary["code"], summary["resumed"]) == (OURS, [10])


def test_an_unfinished_run_of_other_code_begins_anew(cli, written_by, monkeypatch, capsys):
    written_by(OTHER)
    arguments = unfinished_run(cli, monkeypatch)
    written_by(OURS)
    assert sweep.main(arguments) == 0
    assert capsys.readouterr().err.splitlines() == [
        "1 unfinished runs without a checkpoint of this code began anew",
    ]
    summary = strict_json((only(Path("runs")) / "summary.json").read_text())
    assert (summary["code"], summary["resumed"]) == (OURS, [])


def test_an_unfinished_run_of_other_code_may_go_on(cli, written_by, monkeypatch, capsys):
    """It is then of both, so a later sweep makes it anew."""
    written_by(OTHER)
    arguments = unfinished_run(cli, monkeypatch)
    written_by(OURS)
    assert sweep.main([*arguments, "--keep"]) == 0
    assert "1 unfinished runs of other code went on with this code" in capsys.readouterr().err.splitlines()
    summary = strict_json((only(Path("runs")) / "summary.json").read_text())
    assert (summary["code"], summary["resumed"]) == (f"{OTHER}+{OURS}", [10])
    assert sweep.main(arguments) == 0
    assert "1 of 1 runs were made by other code" in capsys.readouterr().err
    assert codes(Path("runs")) == [OURS]


def test_an_unfinished_run_beside_a_record_of_other_code(cli, written_by, monkeypatch, capsys):
    """What this code began to make anew goes on, and then replaces the record."""
    arguments = [*map(str, NOISY_BOSTON), "--wandb", "disabled"]
    written_by(OTHER)
    assert cli(*arguments).status == 0
    written_by(OURS)
    with monkeypatch.context() as patch:
        signal_after(patch, 10)
        assert cli(*arguments).status == 143
    assert len(list(Path("runs").iterdir())) == 2
    assert sweep.main([*arguments, "--jobs", "1"]) == 0
    summary = strict_json((only(Path("runs")) / "summary.json").read_text())
    assert (summary["code"], summary["resumed"]) == (OURS, [10])


def test_code_that_changes_while_a_sweep_goes_on_is_told(written_by, monkeypatch, capsys):
    written_by(OURS)
    monkeypatch.setattr(train, "fingerprint_of_run", lambda config: OTHER)
    assert sweep.main(FLAGS) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "the code changed meanwhile: 3 runs are of other code; the same command trains them anew"


def test_a_sweep_counts_the_runs_with_remarks(written_by, capsys):
    written_by(OURS)
    arguments = ["--dataset", "boston", "--precision", "float8", "--learning-rate", "0.01,10", "--epochs", "20"]
    assert sweep.main([*arguments, "--jobs", "1"]) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "remarks" in line]
    name = next(path.name for path in Path("runs").iterdir() if "remarks" in (path / "summary.json").read_text())
    assert said.startswith(f"1 of 2 runs have remarks in their summary.json, as {name}: warning: training made the")


# main.py --resume


def test_a_resumed_run_of_other_code_goes_on_and_says_so(cli, written_by, monkeypatch):
    written_by(OTHER)
    expected = cli(*NOISY_BOSTON, "--output-dir", "straight")
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON)
    written_by(OURS)
    ran = cli("--resume", folder)
    told = [line for line in ran.err.splitlines() if "code" in line]
    assert told == [
        f"the code has changed: until here the run was trained by {OTHER}, from here on by {OURS}",
    ]
    assert (ran.status, ran.summary["status"], ran.summary["code"]) == (0, "complete", f"{OTHER}+{OURS}")
    assert (ran.folder / "metrics.jsonl").read_bytes() == (expected.folder / "metrics.jsonl").read_bytes()


def test_a_resumed_run_of_the_same_code_says_nothing_of_it(cli, monkeypatch):
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON)
    ran = cli("--resume", folder)
    assert "code" not in ran.err
    assert ran.summary["code"] == fingerprint()


def test_code_that_changes_twice_is_told_each_time(cli, written_by, monkeypatch):
    written_by(OTHER)
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON, steps=5)
    for code in (OURS, OURS, OTHER):
        written_by(code)
        folder = stopped(cli, monkeypatch, "--resume", folder, steps=3)
    ran = cli("--resume", folder)
    assert ran.summary["code"] == f"{OTHER}+{OURS}+{OTHER}"
    assert f"trained by {OTHER}, {OURS}, from here on by {OTHER}" in ran.err


@pytest.mark.parametrize("name", ["accumulator", "compensation"])
def test_records_of_version_0_1_do_not_say_what_made_them(cli, tmp_path, name):
    shutil.copytree(ROOT / "tests" / "lab" / "records_of_0.1" / name, tmp_path / "runs")
    (tmp_path / "runs" / "expected.json").unlink()
    ran = cli("--resume", only(tmp_path / "runs"))
    assert f"until here the run was trained by unknown, from here on by {fingerprint()}" in ran.err
    assert ran.summary["code"] == f"unknown+{fingerprint()}"


@pytest.mark.parametrize("code", [3, None, "", "x", "0123", f"{OURS}+", f"{OURS} {OTHER}", f"{OURS}\n"])
def test_a_checkpoint_whose_fingerprint_cannot_be_is_refused(cli, monkeypatch, code):
    import torch

    from lab import checkpoint

    folder = stopped(cli, monkeypatch, *NOISY_BOSTON)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    (folder / "checkpoint.pt").write_bytes(checkpoint.pack(state | {"code": code}))
    ran = cli("--resume", folder)
    assert ran.status == 1
    assert "no state of this run (ValueError: its code cannot be)" in ran.err


# report.py


def test_a_report_counts_the_runs_by_their_code(written_by, capsys):
    for code, seeds in ((OTHER, "0:2"), (OURS, "2:5")):
        written_by(code)
        assert sweep.main([*FLAGS[:4], "--seed", seeds, *FLAGS[6:]]) == 0
    capsys.readouterr()
    assert report.main(["runs"]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"these runs were made by different code: 3 by {OURS}, 2 by {OTHER}\n"
    assert report.main(["runs", "--save", "runs.csv"]) == 0
    assert capsys.readouterr().out == printed.out
    assert report.main(["runs.csv"]) == 0  # which knows nothing of code
    assert capsys.readouterr() == (printed.out, "")
    for folder in list(Path("runs").iterdir())[3:]:
        shutil.rmtree(folder)
    assert report.main(["runs", "runs.csv"]) == 0
    assert ", 2 without a fingerprint" in capsys.readouterr().err


# The files themselves


@pytest.mark.slow
def test_a_change_of_a_file_is_seen_and_a_change_of_a_comment_is_not(tmp_path):
    """A copy of the checkout in which a student changes the model."""
    tree = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "docs", "images", "results")
    shutil.copytree(ROOT, tree, ignore=ignored)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}

    def swept(*more: str) -> tuple[list[str], dict[str, tuple]]:
        command = [sys.executable, "sweep.py", *FLAGS, *more]
        ran = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
        assert "3 runs: 3 complete, 0 diverged, 0 failed" in ran.stdout
        return ran.stderr.splitlines(), {path.name: bits(path) for path in (tree / "runs").iterdir()}

    said, first = swept()
    assert said == []
    made = times(tree / "runs")
    models = tree / "models.py"
    text = models.read_text()
    models.write_text(text.replace('"""Linear (or softmax) regression."""', '"""Of one layer."""  # the simplest one'))
    assert models.read_text() != text
    assert swept() == ([], first)
    models.write_text(text.replace("torch.manual_seed(seed)", "torch.manual_seed(seed + 1)"))
    assert models.read_text() != text
    assert swept("--keep") == (["3 of 3 runs were made by other code: they are kept"], first)
    assert times(tree / "runs") == made
    said, changed = swept()
    assert said == ["3 of 3 runs were made by other code: they are trained anew; --keep keeps them"]
    assert changed.keys() == first.keys()
    assert all(changed[name] != first[name] for name in first)
    assert swept() == ([], changed)
    models.write_text(text)
    assert swept()[1] == first
