"""reproduce.py: its commands are ones that the scripts take, and README shows what they make."""

import re
import shlex

import pytest
from conftest import ROOT

import report
import reproduce
import sweep

README = (ROOT / "README.md").read_text()
COMMANDS = [command for section in reproduce.SECTIONS.values() for command in section.commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_valid(command):
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    if script == "sweep.py":
        configs, _ = sweep.grid(arguments)
        assert configs
    elif script == "report.py":
        report._parser().parse_args(arguments)
    else:
        assert (ROOT / script).exists()


def test_what_is_made_is_there_and_is_shown():
    made = {word for command in COMMANDS for word in shlex.split(command) if re.match(r"(results|images)/", word)}
    assert made
    for name in made:
        assert (ROOT / name).exists(), name
        assert name in README, name


def test_every_section_is_named_in_readme():
    for name in reproduce.SECTIONS:
        assert re.search(rf"python reproduce\.py [\w\- ]*\b{name}\b", README), name


def test_without_a_section_it_lists_them_and_a_wrong_one_is_one_line(capsys):
    assert reproduce.main([]) == 0
    told = capsys.readouterr().out
    assert all(command in told for command in COMMANDS)
    for wrong in ("bostn", "--bostn"):
        assert reproduce.main([wrong]) == 2
        told = capsys.readouterr()
        assert wrong in told.err
        assert len(told.err.splitlines()) == 1
