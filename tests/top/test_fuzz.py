"""Hypothesis: whatever comes from outside ends in a result or in one line, in no time, and writes nowhere else.

Seeded (derandomize) and without a database, so that every run tries the same examples.
"""

import json
import shutil
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_helpers import Ran

import main
from lab import checkpoint
from low_precision import formats
from low_precision.rules import SITES
from settings.config import INDECISIVE, Config, ConfigError
from settings.flags import parser


def fuzzed(examples):
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,  # the machine may be busy
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("\udcff\x00\n\t =-.,:*/\\%"), max_size=12)
KNOWN = sorted({flag for action in parser()._actions for flag in action.option_strings})
ODD = [
    "all",
    "none",
    "dynamic",
    "stochastic",
    "inf",
    "nan",
    "-1",
    "0",
    "1e400",
    "10m",
    "1_0",
    "\u0663",
    "boston",
    "cnn",
]
WORDS = st.sampled_from([*KNOWN, *SITES, *formats.NAMED, *ODD])
WORD = st.one_of(WORDS, TEXT, st.builds("{}={}".format, WORDS, st.one_of(WORDS, TEXT)), st.integers().map(str))


def answer(kind, call, *arguments):
    """What the call gives, or None and the one line of its refusal."""
    try:
        return call(*arguments), ""
    except kind as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    return None, said


@fuzzed(600)
@given(st.lists(WORD, max_size=6))
def test_command_lines(arguments):
    """A valid run that survives its own JSON, or one line."""
    asked, said = answer(ConfigError, main.configure, [word for word in arguments if word not in ("-h", "--help")])
    if asked is None:
        assert "given" in said
        assert "allowed" in said
        return
    config, options = asked
    assert options.resume is None
    if config is not None:
        assert Config.from_json(config.to_json()) == config
        assert config.resolved().folder_name == config.folder_name
        assert "/" not in config.folder_name


@fuzzed(400)
@given(st.one_of(TEXT, st.from_regex(r"e\d{1,3}m\d{1,3}"), st.sampled_from([*formats.NAMED, *formats.ALIASES])))
def test_format_names(name):
    format, said = answer(ValueError, formats.format_named, name)
    if said:
        return
    assert formats.format_named(format.name) == format
    assert 0 < format.smallest_subnormal <= format.smallest_normal <= format.largest < 2.0**128


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([f.name for f in fields(Config)])


@fuzzed(300)
@given(st.dictionaries(st.one_of(FIELDS, TEXT), st.one_of(JSON, WORDS), max_size=4))
def test_configurations_from_json(settings_given):
    config, said = answer(ConfigError, Config.from_json, json.dumps(settings_given))
    assert said or Config.from_json(config.to_json()) == config


# Records


def resumed(folder, capsys, *arguments):
    capsys.readouterr()
    status = main.main(["--resume", str(folder), *arguments])
    return Ran(status, *capsys.readouterr())


def ends_in_a_result_or_a_line(ran, place, outside):
    """`outside`: what lay around the record, by name and content."""
    assert ran.status in (0, 1, 2), ran
    assert "Traceback" not in ran.err
    if ran.status:
        assert ran.out == ""
        assert [line.startswith("main.py: error: ") for line in ran.err.splitlines()].count(True) == 1
    assert everything(place, but="runs") == outside


def everything(place, but):
    return {
        str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
        for path in place.rglob("*")
        if but not in path.relative_to(place).parts[:1]
    }


@pytest.fixture
def fresh(tmp_path, stopped_run, monkeypatch):
    """fresh(): the record of a stopped run, in runs/ beside a file of ours; and what lies around it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")

    def copy():
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        return shutil.copytree(stopped_run, tmp_path / "runs" / stopped_run.name)

    return copy


FILES = [
    "config.json",
    "metrics.jsonl",
    "summary.json",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "stranger",
    ".x.tmp",
]
DAMAGE = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("flip"), st.floats(0, 1)),
    st.tuples(st.just("put"), st.binary(max_size=200)),
    st.tuples(st.just("put"), JSON.map(lambda value: json.dumps(value).encode())),
    st.tuples(st.just("delete"), st.none()),
    st.tuples(st.just("folder"), st.none()),
)


@fuzzed(60)
@given(st.lists(st.tuples(st.sampled_from(FILES), DAMAGE), min_size=1, max_size=3))
def test_records_that_are_cut_foreign_or_edited(fresh, tmp_path, capsys, damages):
    folder = fresh()
    for name, (how, what) in damages:
        path = folder / name
        if how == "put" and not path.is_dir():
            path.write_bytes(what)
        elif how == "folder" and not path.exists():
            path.mkdir()
        elif path.is_file():
            raw = bytearray(path.read_bytes())
            if how == "flip" and raw:
                raw[int(what * (len(raw) - 1))] ^= 16
            path.unlink() if how == "delete" else path.write_bytes(raw[: int(what * len(raw))] if how == "cut" else raw)
    outside = everything(tmp_path, but="runs")
    ends_in_a_result_or_a_line(resumed(folder, capsys), tmp_path, outside)


@fuzzed(60)
@given(st.dictionaries(FIELDS.filter(lambda name: name not in ("device", "wandb")), st.one_of(JSON, WORDS), min_size=1))
def test_records_whose_settings_were_edited(fresh, tmp_path, capsys, edits):
    """Settings that decide the result no longer fit the checkpoint; no setting moves the record elsewhere."""
    folder = fresh()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | edits))
    outside = everything(tmp_path, but="runs")
    ran = resumed(folder, capsys)
    ends_in_a_result_or_a_line(ran, tmp_path, outside)
    edited, said = answer(ConfigError, lambda: Config.make(**(config | edits)))
    assert (ran.status == 0) == (not said and not edited.differences(Config.make(**config)))
    assert set(edits) - set(INDECISIVE) or ran.status in (0, 2)


LEAF = st.one_of(st.none(), st.integers(-(2**70), 2**70), st.floats(), TEXT, st.just([]), st.just({}), st.just([{}]))


@fuzzed(60)
@given(st.integers(0, 200), LEAF)
def test_checkpoints_of_which_one_value_was_edited(fresh, tmp_path, capsys, which, value):
    """Sealed again, as a stranger can do: a result, or one line."""
    folder = fresh()
    state = checkpoint.unpack((folder / "checkpoint.pt").read_bytes())
    places = []

    def visit(holder):
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                visit(holder[key])

    visit(state)
    holder, key = places[which % len(places)]
    holder[key] = value
    (folder / "checkpoint.pt").write_bytes(checkpoint.pack(state))
    outside = everything(tmp_path, but="runs")
    ends_in_a_result_or_a_line(resumed(folder, capsys), tmp_path, outside)
