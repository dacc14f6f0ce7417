"""README says what is true: its Python runs, its commands are valid, its table has every flag."""

import re
import shlex
from dataclasses import fields

import pytest
from conftest import ROOT

import main
import report
from low_precision.formats import NAMED, SITES, Rounding
from settings.config import DATASETS, MODELS, Config, flag

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for line in README.splitlines() if line.startswith("python main.py ")]


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON) == 3
    names = {}
    for code in PYTHON:
        exec(code.replace("range(200)", "range(2)"), names)
    assert names["quantize"](names["torch"].tensor([0.3]), "float8").item() == 0.3125
    assert names["result"].summary["status"] == "complete"


def test_the_commands_are_the_fifteen_experiments():
    runs = set()
    for command in COMMANDS:
        config, _ = main.configure(shlex.split(command)[2:])
        if config.dataset != "cifar10":
            assert (config.epochs, config.learning_rate, config.seed) == (30, 0.01, 42)
            assert config.batch_size == (32 if config.dataset == "toy" else 512)
            runs.add(config.name)
    assert len(runs) == 15


@pytest.mark.parametrize("f", fields(Config), ids=lambda f: f.name)
def test_every_flag_is_in_the_table_with_its_default(f):
    (row,) = [line for line in README.splitlines() if line.startswith("| `--") and f"`{flag(f.name)}`" in line]
    default = f.metadata["default"].removesuffix(".0")
    if default not in ("none", "the data set's own", "wandb's own setting"):  # there, the table says more
        assert row.split("|")[-2].strip().startswith(default)


def test_every_name_is_there():
    names = [*DATASETS, *MODELS, *NAMED, *SITES, *(rounding.value for rounding in Rounding)]
    assert [name for name in names if name not in README] == []


def test_tables_are_those_of_the_records():
    assert len(report.BLOCK.findall(README)) == README.count("\n<!-- report.py ") >= 12
    assert report.rewritten(README, ROOT) == README
