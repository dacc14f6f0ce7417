"""reproduce.py: its commands are ones that the scripts take, and README and docs show what they make."""

import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass

import pytest
from run_helpers import ROOT

import report
import reproduce
import sweep

PAGES = "".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = [command for section in reproduce.SECTIONS.values() for command in section.commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_valid(command):
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    if script == "sweep.py":
        configs, _ = sweep.grid(arguments)
        assert configs
    elif script == "report.py":
        report.Asked.of(arguments)
    else:
        assert (ROOT / script).exists()


def test_what_is_made_is_there_and_is_shown():
    made = {word for command in COMMANDS for word in shlex.split(command) if re.match(r"(results|images)/", word)}
    assert made
    for name in made:
        assert (ROOT / name).exists(), name
        assert name in PAGES, name


def test_every_section_is_named_in_the_pages():
    for name in reproduce.SECTIONS:
        assert re.search(rf"python reproduce\.py [\w\- ]*\b{name}\b", PAGES), name


def test_without_a_section_it_lists_commands_that_work_as_they_stand(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert reproduce.main([]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [words[1:] for words in lines] == [shlex.split(command)[1:] for command in (*COMMANDS, reproduce.REPORT)]
    assert {os.path.realpath(shutil.which(words[0])) for words in lines} == {os.path.realpath(sys.executable)}


@pytest.mark.parametrize("wrong", ["bostn", "--boston"])
def test_a_section_that_is_not_known_is_one_line(wrong, capsys):
    assert reproduce.main([wrong]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"given {wrong} (did you mean boston?), allowed: " in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_command_that_fails_ends_its_section(capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(reproduce.subprocess, "run", lambda words, cwd: ran.append(words) or Ended(3))
    assert reproduce.main(["toy"]) == 3
    assert len(ran) == 1
    assert "reproduce.py toy" in capsys.readouterr().err


@dataclass
class Ended:
    returncode: int
