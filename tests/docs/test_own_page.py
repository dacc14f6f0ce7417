"""docs/own.md: its commands run as they stand, on the files that it shows, and its lines are those that are printed."""

import re
import shlex

import pytest
from run_helpers import ROOT

PAGE = (ROOT / "docs" / "own.md").read_text()
FENCE = re.compile(r"`([\w.]+)`[^`]*?\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```shell\npython main\.py (.*)\n```", PAGE, re.MULTILINE)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def files(cli, tmp_path):
    """The files of the page, in the folder of the command line."""
    section = PAGE.partition("## Three commands")[2].partition("\n## ")[0]
    files = dict(FENCE.findall(section))
    assert set(files) == {"flats.csv", "mine.py", "verses.txt"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_there_are_three_commands():
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run_as_they_stand(cli, files, command):
    ran = cli(*shlex.split(command))
    assert ran.status == 0, ran
    assert ran.summary["status"] == "complete"
    assert "." in ran.summary["code"]


def printed(word):
    (line,) = [line for line in PAGE.splitlines() if line.startswith("main.py: error: ") and word in line]
    return line


def test_the_lines_of_mistakes_are_those_that_are_printed(cli, files):
    table = (files / "flats.csv").read_text()
    (files / "flats.csv").write_text(table.replace("98.6", "n/a"))
    assert cli("--dataset", "flats.csv:rent").err.strip() == printed("flats.csv")
    text = (files / "mine.py").read_text()
    (files / "mine.py").write_text(text.replace("nn.Linear(*shape, width)", "nn.Linear(*shape)"))
    assert cli("--dataset", "mine.py:circles", "--model", "mine.py:net").err.strip() == printed("mine.py")


def test_the_python_runs(tmp_path, monkeypatch):
    import data
    import low_precision as lp
    import models

    monkeypatch.chdir(tmp_path)
    code = PAGE.partition("## From Python")[2].split("```python\n")[1].split("```")[0]
    names = {}
    try:
        exec(code, names)
    finally:
        for table, name in ((data.DATASETS, "line"), (models.MODELS, "one layer"), (lp.RECIPES, "mine")):
            table.pop(name, None)
    assert names["result"].summary["parameters"] == 2
    assert names["result"].folder.name.startswith("line-mine-42-")
