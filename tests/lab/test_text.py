"""Text: how it is cut, read and tested; runs that are stopped, watched, sampled; and what is refused."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from run_helpers import ROOT, bits, is_refused, kill_self, names, only, stopped, torchrun

import data
import models
import sweep
from data import Text
from lab.batches import Batches, batch_rows
from lab.fingerprint import fingerprint_of_run
from lab.fitting import check_before_loading, check_fit
from lab.metrics import TASKS, evaluate, wandb_keys
from lab.processes import Processes
from lab.sample import sampled
from low_precision.errors import SettingError
from settings.config import Config

pytestmark = pytest.mark.usefixtures("one_thread")

VERSE = "The fog comes in on little feet,\nthe tide goes out on none; \u00e9\U0001f30a\n"
SMALL = "layers=2,heads=2,width=16,context=8"
RUN = ["--dataset", "verse.txt", "--model-options", f"{SMALL},dropout=0.2", "--batch-size", 7, "--epochs", 2]
RUN += ["--optimizer", "adamw", "--learning-rate", 0.01, "--device", "cpu"]
NVFP4 = [*RUN, "--recipe", "nvfp4"]


@pytest.fixture
def verse(tmp_path):
    """The folder in which the command line runs, with a text in it."""
    (tmp_path / "verse.txt").write_text(VERSE * 12, encoding="utf-8")
    return tmp_path / "verse.txt"


def loaded(path, context=8) -> Text:
    text = data.load(str(path), context=context)
    assert isinstance(text, Text)
    return text


# How a text is cut


def test_a_text_is_numbered_and_split(verse):
    text, whole = loaded(verse), VERSE * 12
    assert text.symbols == "".join(sorted(set(VERSE)))
    train, test = int(0.9 * len(whole)), len(whole) - int(0.9 * len(whole))
    numbers = torch.cat([text.train_x, text.test_x])
    assert (len(text.train_x), len(text.test_x), numbers.dtype) == (train, test, torch.int64)
    assert "".join(text.symbols[n] for n in numbers.tolist()) == whole
    assert torch.equal(text.train_y, text.train_x[1:])
    assert torch.equal(text.test_y, text.test_x[1:])
    spec = text.spec
    assert (spec.task, spec.samples, spec.shape, spec.outputs) == ("language", len(whole), (8,), len(set(VERSE)))


def test_windows_begin_anywhere_and_come_in_the_order_of_seed_and_epoch(verse):
    text, config = loaded(verse), Config(dataset=str(verse), batch_size=7)
    epoch = list(batch_rows(text, config, 1, torch.device("cpu")))
    assert len(epoch) == text.steps(7) == len(text.train_x) // (7 * 8)
    starts = torch.cat(epoch)
    assert all(len(rows) == 7 for rows in epoch)
    assert 0 <= int(starts.min()) <= int(starts.max()) <= len(text.train_x) - 8 - 1
    assert not torch.equal(starts, torch.cat(list(batch_rows(text, config, 2, torch.device("cpu")))))
    assert torch.equal(starts, torch.cat(list(batch_rows(text, config, 1, torch.device("cpu")))))
    x, y = text.batch(epoch[0], torch.Generator(), slice(2, 5))
    for row, start in enumerate(epoch[0][2:5].tolist()):
        assert x[row].tolist() == text.train_x[start : start + 8].tolist()
        assert y[row].tolist() == text.train_x[start + 1 : start + 9].tolist()


def test_every_place_is_drawn_alike():
    """The first and the last place too: of 20,000 draws from 11 places, each within 5 deviations of its share."""
    numbers = torch.arange(14) % 2
    spec = data.DataSet(None, "language", 14, (3,), 2, "gpt")
    text = Text(spec, numbers, numbers[1:], numbers, numbers[1:], symbols="ab")
    draws = 20_000
    config = Config(batch_size=draws)
    counts = torch.cat(list(batch_rows(text, config, 1, torch.device("cpu")))).bincount()
    assert len(counts) == 14 - 3
    share = draws / 11
    assert int((counts - share).abs().max()) < 5 * math.sqrt(share * (1 - 1 / 11))


@pytest.mark.parametrize("context", [1, 5, 8])
def test_all_of_the_test_text_is_read_once_but_for_a_rest(verse, context):
    text = loaded(verse, context)
    batches = list(text.test_batches(1))
    x, y = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    count = (len(text.test_x) - 1) // context
    assert x.shape == y.shape == (count, context)
    assert x.flatten().tolist() == text.test_x[: count * context].tolist()
    assert y.flatten().tolist() == text.test_x[1 : count * context + 1].tolist()


def test_metrics_are_means_over_tokens(verse):
    text, task = loaded(verse), TASKS["language"]
    model = models.build("gpt", (8,), text.spec.outputs, 0, {"layers": 1, "heads": 2, "width": 16})
    measured = evaluate(model, text, task)
    with torch.no_grad():
        each = [
            -float(F.log_softmax(model(text.test_x[None, s : s + 8]).double(), 2)[0, i, text.test_x[s + i + 1]])
            for s in range(0, len(text.test_x) - 8, 8)
            for i in range(8)
        ]
    assert measured["testing_loss"] == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert measured["testing_bits_per_character"] == pytest.approx(measured["testing_loss"] / math.log(2))
    assert list(wandb_keys(measured)) == ["Testing.Loss", "Testing.BitsPerCharacter"]
    assert task.loss_of_constant(65) == math.log(65)


# Runs


def test_a_text_is_learned(cli, verse):
    ran = cli(*RUN[:-2], "--epochs", 6, "--learning-rate", 0.02)
    assert ran.status == 0, ran
    assert list(ran.metrics[0]) == ["epoch", "training_loss", "testing_loss", "testing_bits_per_character"]
    assert ran.summary["testing_loss"] < 1.5 < ran.metrics[0]["training_loss"] < math.log(len(set(VERSE))) + 0.1
    assert ran.folder.name.startswith("verse-float32-42-")
    assert ran.config["model_options"] == "context=8,dropout=0.2,heads=2,layers=2,width=16"


def test_a_changed_text_is_another_run(cli, verse):
    before = cli(*RUN).summary["code"]
    verse.write_text(VERSE * 13, encoding="utf-8")
    assert cli(*RUN).summary["code"] != before


def test_line_ends_are_characters_and_so_in_the_fingerprint(verse):
    config = Config(dataset=str(verse))
    before = fingerprint_of_run(config)
    verse.write_bytes(verse.read_bytes().replace(b"\n", b"\r\n"))
    assert "\r" in loaded(verse).symbols
    assert fingerprint_of_run(config) != before


@pytest.mark.parametrize("steps", [3, 14])
def test_a_stopped_run_ends_with_the_same_bits(cli, monkeypatch, verse, steps):
    whole = bits(cli(*NVFP4, "--output-dir", "whole").folder)
    folder = stopped(cli, monkeypatch, *NVFP4, steps=steps)
    assert bits(cli("--resume", folder).folder) == whole


def test_what_looks_on_changes_no_bit(cli, verse):
    """A sample, a watcher and the float32 run beside it, in which the same numbers are dropped out."""
    alone = cli(*NVFP4, "--output-dir", "alone")
    beside = cli(*NVFP4, "--sample", 5, "--watch", 2, "--shadow")
    assert beside.folder.name == alone.folder.name
    (metrics, summary, tensors), expected = bits(beside.folder), bits(alone.folder)
    assert len(summary.pop("sample")) == 5
    summary.pop("advice", None)
    assert (metrics, summary) == expected[:2]
    ours = {name: value for name, value in tensors.items() if not name.startswith(("shadow/", "watch/"))}
    assert ours == expected[2]
    float32 = torch.load(cli(*RUN, "--output-dir", "float32").folder / "checkpoint.pt", weights_only=True)["model"]
    shadow = torch.load(beside.folder / "checkpoint.pt", weights_only=True)["shadow"]["model"]
    assert all(torch.equal(shadow[name], value) for name, value in float32.items())


def test_attention_that_is_rounded_drops_out_the_same(cli, verse):
    """Dropout of attention's weights is a call of its own where its products are rounded: to float32, nothing is."""
    plain = cli(*RUN, "--output-dir", "plain")
    ran = cli(*RUN, "--site", "elementwise=e8m22", "--site", "products=e8m22", "--shadow")
    lines = [json.loads(line) for line in (ran.folder / "shadow.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["step"] == 1 and line["layer"] == "")
    assert abs(first["loss_difference"]) < 1e-4  # other masks would be further off than 0.01
    assert ran.summary["testing_loss"] == pytest.approx(plain.summary["testing_loss"], abs=0.01)


def test_engines_agree(cli, verse):
    of_engines = [bits(cli(*NVFP4, "--backend", name, "--output-dir", name).folder) for name in ("eager", "fused")]
    (metrics, _, tensors), (others, _, other_tensors) = of_engines
    assert metrics == others
    assert {name: t for name, t in tensors.items() if name.startswith("model/")} == {
        name: t for name, t in other_tensors.items() if name.startswith("model/")
    }


@pytest.mark.slow
def test_two_processes_are_stopped_and_go_on(cli, verse):
    """In the middle of an epoch, with rounding, dropout and an uneven part: the same bits as without a stop."""
    flags = [str(flag) for flag in [*NVFP4, "--wandb", "disabled"]]
    (verse.parent / "killed.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{kill_self('SIGTERM', 5)}\nimport main\nsys.exit(main.main())"
    )
    torchrun(2, verse.parent, *flags, "--output-dir", "whole")
    ran = torchrun(2, verse.parent, *flags, check=False, script=verse.parent / "killed.py")
    assert ran.returncode != 0
    folder = only(verse.parent / "runs")
    torchrun(2, verse.parent, "--resume", folder, "--wandb", "disabled")
    metrics, summary, tensors = bits(only(verse.parent / "runs"))
    assert len(torch.load(only(verse.parent / "runs") / "checkpoint.pt", weights_only=True)["resumed"]) == 1
    assert (metrics, summary, tensors) == bits(only(verse.parent / "whole"))
    assert summary["steps"] == 2 * loaded(verse).steps(7)


# Samples


def test_a_sample_is_drawn_from_what_the_model_says(verse):
    text = loaded(verse)
    config = Config(dataset=str(verse), sample=30, seed=5)
    model = models.build("gpt", (8,), text.spec.outputs, 0, {"layers": 1, "heads": 2, "width": 16})

    class NoRounding:
        def begin_aside(self) -> None: ...

    made_up = sampled(model, text, NoRounding(), config)
    assert made_up == sampled(model, text, NoRounding(), config)
    assert len(made_up) == 30
    assert set(made_up) <= set(VERSE)
    with torch.no_grad():  # one that says one symbol alone, whatever it reads
        model.head.weight.zero_()
        model.norm.weight.zero_()
    model.forward = lambda x: F.one_hot((x + 1) % text.spec.outputs, text.spec.outputs) * 1000.0
    in_order = (text.symbols * 3)[text.symbols.index("\n") + 1 :]
    assert sampled(model, text, NoRounding(), config) == in_order[:30]


def test_a_sample_is_printed_and_recorded(cli, verse):
    ran = cli(*NVFP4, "--sample", 12)
    assert f"sample:\n{ran.summary['sample']}\n" in ran.out
    assert cli(*NVFP4, "--sample", 12, "--epochs", 0).summary["sample"] != ran.summary["sample"]
    assert "sample" not in cli(*NVFP4).summary


def test_a_sweep_trains_again_what_lacks_its_sample(verse, monkeypatch, capsys):
    monkeypatch.chdir(verse.parent)
    flags = [str(flag) for flag in RUN]
    assert sweep.main([*flags, "--jobs", "1"]) == 0
    assert sweep.main([*flags, "--jobs", "1", "--sample", "4"]) == 0
    assert "1 of 1 runs have no sample" in capsys.readouterr().err
    assert sweep.main([*flags, "--jobs", "1", "--sample", "4"]) == 0
    assert "no sample" not in capsys.readouterr().err
    assert len(names(verse.parent / "runs")) == 1


def test_a_sweep_over_options(verse, monkeypatch):
    monkeypatch.chdir(verse.parent)
    flags = [str(flag) for flag in RUN]
    flags[3] = f"{SMALL};layers=1,heads=1,width=8,context=4"
    configs, _ = sweep.grid(flags)
    expected = ["context=8,heads=2,layers=2,width=16", "context=4,heads=1,layers=1,width=8"]
    assert [config.model_options for config in configs] == expected


# What is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model-options", "layer=2"], "--model-options: given layer (did you mean layers?)"),
        (["--model-options", "layers=two"], "--model-options: given layers=two, allowed: a whole number"),
        (["--model-options", "layers"], "--model-options: given layers, allowed: NAME=VALUE,NAME=VALUE"),
        (["--model-options", "layers=1,layers=2"], "(layers stands there twice)"),
        (["--model-options", "context=0"], "given context=0, allowed: a whole number >= 1"),
        (["--model-options", "context=500"], "characters"),
        (["--dataset", "shakespeare", "--model-options", "context=-3"], "given context=-3, allowed: a whole"),
        (["--dataset", "shakespeare", "--model-options", "context=wide"], "given context=wide, allowed: a whole"),
        (["--model", "mlp"], "--model: given mlp, allowed: gpt (verse.txt holds a text)"),
        (["--scale-on", "all"], "--scale-on: given all, allowed: train (a text is not scaled)"),
        (["--test-split", "0.5"], "verse.txt has its own split (the last tenth is for testing)"),
        (["--sample", "-1"], "--sample: given -1, allowed: a whole number >= 0"),
        (["--dataset", "boston", "--sample", "9"], "--sample: given 9, allowed: 0 (boston holds no text)"),
        (["--dataset", "boston", "--model", "gpt"], "--model: given gpt, allowed: linear, mlp (boston holds no text)"),
        (["--dataset", "boston", "--model", "mlp", "--model-options", "context=13"], "allowed: width (mlp's)"),
        (["--dataset", "none.txt"], "--dataset: given none.txt (No such file or directory)"),
        (["--dataset", "empty.txt"], "--dataset: given empty.txt, which is empty, allowed: a text"),
        (["--dataset", "short.txt"], "allowed: a text of at least 641"),
        (["--dataset", "latin.txt"], "in which byte 4 of 5 is 0xe9, allowed: a text in UTF-8"),
        (["--dataset", "one.txt"], "of 2 different ones"),
    ],
)
def test_wrong_ones_are_told_in_a_line(cli, verse, flags, words):
    folder = verse.parent
    for name, raw in {"empty": b"", "short": b"ab" * 300, "latin": b"caf\xe9s", "one": b"a" * 900}.items():
        (folder / f"{name}.txt").write_bytes(raw)
    before = names(folder)
    is_refused(cli("--dataset", "verse.txt", *flags), words)
    assert names(folder) == before


def test_a_context_is_a_whole_number(verse):
    for context in (0, 1.5, True):
        with pytest.raises(SettingError):
            data.load(str(verse), context=context)


def test_a_model_is_looked_at_on_a_machine_of_many_devices(monkeypatch):
    """Without the states of all of their generators, of which torch warns."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    config, before = Config(dataset="shakespeare"), torch.get_rng_state()
    check_before_loading(config)
    assert torch.equal(torch.get_rng_state(), before)
    text = torch.arange(30) % 7
    split = Text(data.DataSet(None, "language", 30, (4,), 7, "gpt"), text, text[1:], text, text[1:])
    batches = Batches(Config(dataset="mine.txt"), split, Processes(torch.device("cpu")))
    check_fit(batches.config, models.build("gpt", (4,), 7, 0), batches, split.spec)
    with pytest.raises(SettingError, match="which gives"):
        check_fit(batches.config, models.build("gpt", (4,), 6, 0), batches, split.spec)


def test_a_text_takes_no_other_split_and_no_scale(verse):
    """From Python too, where no flags are checked."""
    for wrong in ({"test_split": 0.5}, {"scale_on": "all"}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            data.load(str(verse), **wrong)
