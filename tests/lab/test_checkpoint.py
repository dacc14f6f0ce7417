"""Checkpoints: every wrong bit is seen, nothing in them is executed, and what is no state of the run is refused."""

import copy
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from run_helpers import BOSTON, NOISY_BOSTON, bits, has_failed, is_refused, snapshot, stopped

from lab import checkpoint
from lab.checkpoint import CheckpointError, Due
from lab.record import CHECKPOINTS

STATE = {"weights": torch.arange(300.0), "numbers": [1, 2.5, float("inf"), None, "text"], "empty": {}}


def sealed(raw):
    """A zip archive with the digest that it should have."""
    raw = bytes(raw[:-2]) + (71).to_bytes(2, "little")
    return raw + b"sha256:" + hashlib.sha256(raw).hexdigest().encode()


def test_what_is_packed_comes_back_and_torch_reads_it_too(tmp_path):
    raw = checkpoint.pack(STATE)
    (tmp_path / "checkpoint.pt").write_bytes(raw)
    for back in (checkpoint.unpack(raw), torch.load(tmp_path / "checkpoint.pt", weights_only=True)):
        assert torch.equal(back.pop("weights"), STATE["weights"])
        assert back == {name: STATE[name] for name in ("numbers", "empty")}


def test_every_flipped_bit_and_every_truncation_is_seen():
    raw = checkpoint.pack(STATE)
    draw = random.Random(0)
    for place in [*range(len(raw) - 100, len(raw)), *draw.sample(range(len(raw)), 400)]:
        flipped = bytearray(raw)
        flipped[place] ^= 1 << draw.randrange(8)
        with pytest.raises(CheckpointError, match=r"^(corrupted|cut off)[^\n]*$"):
            checkpoint.unpack(bytes(flipped))
        with pytest.raises(CheckpointError, match=r"^(corrupted|cut off)[^\n]*$"):
            checkpoint.unpack(raw[:place])


class Call:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_strangers_checkpoint_runs_no_code(tmp_path):
    marker = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save({"version": Call(marker)}, buffer)
    raw = sealed(buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"^refused: [^\n]*$"):
        checkpoint.unpack(raw)
    assert not marker.exists()
    torch.load(io.BytesIO(raw), weights_only=False)
    assert marker.exists()  # it would have run


def zipped(files, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return sealed(buffer.getvalue())


@pytest.mark.parametrize(
    "raw",
    [
        sealed(b"no archive at all....."),
        zipped({}),
        zipped({"archive/data.pkl": pickle.dumps([1, 2]), "archive/version": "3\n"}),
        zipped({"archive/data.pkl": bytes(10**7), "archive/version": "3\n"}, zipfile.ZIP_DEFLATED),  # a bomb
        zipped({"archive/data.pkl": pickle.dumps({})[:-1], "archive/version": "3\n"}),
        zipped({"../../escaped": b"x", "archive/version": "3\n"}),
        zipped({"archive/constants.pkl": pickle.dumps(()), "archive/data.pkl": b"", "archive/version": "3\n"}),
    ],
    ids=["no zip", "empty", "a list", "bomb", "cut pickle", "path", "TorchScript"],
)
def test_archives_that_are_no_checkpoint_are_one_line(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^refused: [^\n]*$"):
        checkpoint.unpack(raw)
    assert list(tmp_path.iterdir()) == []


def test_when_a_checkpoint_is_due(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    due = Due("3", 5, 0)
    now[0] = 1e9
    assert [step for step in range(1, 50) if due.after_step(step)] == [15, 30, 45]
    due.was_written(30)
    assert [step for step in range(1, 50) if due.after_step(step)] == [15, 45]
    for text, seconds in (("90s", 90), ("1.5m", 90), ("2h", 7200)):
        now[0] = 0.0
        due = Due(text, 5, 0)
        now[0] = seconds - 1.0
        assert not due.after_step(15)
        now[0] = float(seconds)
        assert due.after_step(16)


# Corrupted ones, from the command line


def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == "flipped":
        raw[len(raw) // 2] ^= 8
    path.write_bytes({"flipped": raw, "truncated": raw[: len(raw) // 2], "empty": b"", "text": b"no checkpoint"}[how])


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "text", "missing"])
def test_a_damaged_one_falls_back_to_the_one_before(cli, monkeypatch, how):
    expected = bits(cli(*NOISY_BOSTON, "--output-dir", "straight").folder)
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON, "--checkpoint-every", 1, steps=17)
    newest = folder / "checkpoint.pt"
    damage(newest, how) if how != "missing" else newest.unlink()
    ran = cli("--resume", folder)
    assert (ran.status, bits(ran.folder)) == (0, expected)
    lines = ran.err.splitlines()[:2]
    reason = {"flipped": "corrupted: its SHA-256", "missing": "missing"}.get(how, "cut off, or no checkpoint")
    assert lines[0].startswith(f"{newest}: {reason}")
    assert lines[0].endswith("; going on from checkpoint.previous.pt")
    assert lines[1] == f"resuming {folder} after epoch 2 of 4, step 14"


def test_the_good_one_survives_a_kill_after_the_fall_back(cli, child, tmp_path, monkeypatch):
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON, "--checkpoint-every", 1, steps=17)
    damage(folder / "checkpoint.pt", "flipped")
    dies = """
import os, signal
from lab.record import Record
Record.checkpoint = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""
    assert child("--resume", folder, before=dies).status == -9
    ran = cli("--resume", folder)
    assert ran.status == 0
    assert "after epoch 2 of 4, step 14" in ran.err


def test_when_both_are_damaged_both_are_named_and_nothing_is_touched(cli, tmp_path, monkeypatch):
    folder = stopped(cli, monkeypatch, *NOISY_BOSTON, "--checkpoint-every", 1, steps=17)
    damage(folder / "checkpoint.pt", "flipped")
    damage(folder / "checkpoint.previous.pt", "truncated")
    before = snapshot(tmp_path)
    has_failed(cli("--resume", folder), "checkpoint.pt: corrupted", "checkpoint.previous.pt: cut off", "anew")
    assert snapshot(tmp_path) == before


# Whole ones that are of something else


def edited(folder, change):
    state = checkpoint.unpack((folder / "checkpoint.pt").read_bytes())
    made = change(state)
    state = made if isinstance(made, dict) and "version" in made else state
    (folder / "checkpoint.pt").write_bytes(checkpoint.pack(state))


def test_another_format_version_is_refused(cli, tmp_path, monkeypatch):
    folder = stopped(cli, monkeypatch, *BOSTON)
    for version in (0, 2, None, "1"):
        edited(folder, lambda state: state.update(version=version))  # noqa: B023 - called at once
        before = snapshot(tmp_path)
        is_refused(cli("--resume", folder), "checkpoint.pt", f"format version is {version}, allowed: 1")
        assert snapshot(tmp_path) == before


CHANGES = {
    "a step too many": lambda s: s.update(step=11),
    "an epoch too many": lambda s: s.update(epoch=5),
    "a negative batch": lambda s: s.update(batch=-3),
    "no count": lambda s: s.update(epoch="1"),
    "no metrics": lambda s: s.update(metrics=None),
    "metrics of another epoch": lambda s: s["metrics"][0].update(epoch=2),
    "metrics of anything": lambda s: s["metrics"][0].update(training_mse=[1]),
    "a layer less": lambda s: s["model"].popitem(),
    "another shape": lambda s: s["model"].update({"linear.weight": torch.zeros(2, 13)}),
    "moments of another shape": lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(7)),
    "moments of nothing": lambda s: s["optimizer"]["state"].update({99: {"momentum_buffer": torch.zeros(1)}}),
    "another optimizer": lambda s: s["optimizer"].update(param_groups=[]),
    "no generator": lambda s: s.update(torch_rng=torch.zeros(3, dtype=torch.uint8)),
    "seconds before": lambda s: s.update(seconds=-1.0),
    "no seconds": lambda s: s.update(seconds=float("nan")),
    "an id that is none": lambda s: s.update(wandb_id=7),
    "a setting of the future": lambda s: s["config"].update(colour="red"),
    "no configuration": lambda s: s.update(config=[1]),
    "a key less": lambda s: s.pop("train"),
    "nothing": lambda s: {"version": 1},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_an_edited_one_is_refused_and_nothing_is_touched(cli, tmp_path, stopped_run, change):
    folder = shutil.copytree(stopped_run, tmp_path / "runs" / stopped_run.name)
    edited(folder, change)
    before = snapshot(tmp_path)
    has_failed(cli("--resume", folder), "checkpoint.pt: no ", "of this ")
    assert snapshot(tmp_path) == before


def test_links_and_pipes_in_a_strangers_record_are_refused(cli, tmp_path, stopped_run):
    """A link would have us write outside the record, a pipe wait for ever."""
    mine = tmp_path / "mine"
    for name in ("config.json", "metrics.jsonl", "checkpoint.pt"):
        for make in (lambda path: path.symlink_to(mine), os.mkfifo):
            folder = shutil.copytree(stopped_run, tmp_path / "runs" / stopped_run.name)
            mine.write_text("mine")
            (folder / name).unlink()
            make(folder / name)
            before = sorted(path.name for path in (tmp_path / "runs").rglob("*"))
            has_failed(cli("--resume", folder), "not a plain file", name)
            assert mine.read_text() == "mine"
            assert sorted(path.name for path in (tmp_path / "runs").rglob("*")) == before
            shutil.rmtree(tmp_path / "runs")


def test_metrics_that_were_edited_are_those_of_the_checkpoint_again(cli, tmp_path, stopped_run):
    expected = bits(cli(*NOISY_BOSTON, "--momentum", 0.9, "--output-dir", "straight").folder)
    for number, text in enumerate((b"", b"{}\n" * 9, b"\xff\xfe" * 5000)):
        folder = shutil.copytree(stopped_run, tmp_path / str(number) / stopped_run.name)
        (folder / "metrics.jsonl").write_bytes(text)
        assert bits(cli("--resume", folder).folder) == expected


def test_an_id_of_wandb_from_a_stranger_deletes_nothing(cli, tmp_path, monkeypatch):
    """The id finds the folders that a resumed run replaces: '*' would find all of them."""
    from lab import wandb_run

    for run_id in ("*", "../..", "0123456?", "0" * 9, "", None):
        made = wandb_run.Wandb("disabled", None, None, "name", None, {}, tmp_path, run_id)
        assert made.id != run_id
        assert len(made.id) == 8
    assert wandb_run.Wandb("disabled", None, None, "name", None, {}, tmp_path, "0123abcd").id == "0123abcd"


def test_a_checkpoint_is_of_plain_things_alone(stopped_run):
    """So that no later version has to execute what this one wrote."""
    state = copy.deepcopy(checkpoint.unpack((stopped_run / "checkpoint.pt").read_bytes()))
    kinds = set()

    def visit(value):
        kinds.add(type(value))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            visit(item)

    visit(state)
    assert {kind.__name__ for kind in kinds} <= {
        *("dict", "OrderedDict", "list", "tuple", "Tensor", "int", "float", "str", "bool", "NoneType")
    }
    assert json.loads(json.dumps(state["config"]))["dataset"] == "boston"
    assert CHECKPOINTS[0] == "checkpoint.pt"
