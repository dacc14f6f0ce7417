"""What a watched run is advised: from lines made by hand, each on both sides of its threshold, and from runs."""

import itertools
import json
import re
import shlex

import pytest
import torch
from run_helpers import BOSTON, stopped
from torch.nn import functional as F
from training_helpers import FLOAT8, nearest

import data
import models
from lab.advice import advice
from lab.step_lines import LAYERS, SHADOW, by_evaluation
from settings.config import Config
from settings.flags import config_of

pytestmark = pytest.mark.usefixtures("one_thread")

HEALTHY = {"flushed": 0.01, "subnormal": 0.02, "saturated": 0.0, "not_finite": 0.0, "sqnr_db": 20.0, "bias": 0.001}
HEALTHY |= {"amax": 1.0, "exponents": {"lowest": -3, "counts": [1, 2]}, "numbers": 100}


def lines(site="errors", layer="fc", rule="float8:nearest", steps=(1, 10, 20), **numbers):
    """The lines of one place, alike in each step; numbers that are lists are those of the steps."""

    def at(index: int) -> dict:
        return {name: value[index] if isinstance(value, list) else value for name, value in numbers.items()}

    place = {"layer": layer, "site": site, "rule": rule}
    return [{"step": step, **place, **HEALTHY, **at(index)} for index, step in enumerate(steps)]


def updates(layer="fc", site="weights", rule="float8:nearest", lost=1.0, arrived=0.0, cosine=0.0, norm=1.0, **more):
    numbers = {"lost_updates": lost, "arrived_norm": arrived, "update_cosine": cosine, "update_norm": norm}
    return lines(site, layer, rule, **numbers | {"last_moved": 6} | more)


def told(*places, **settings) -> list[str]:
    config = Config.make(**{"dataset": "digits", "model": "mlp", "precision": "float8", **settings})
    return advice(config, sorted(itertools.chain(*places), key=lambda line: line["step"]))


def only_one(*places, **settings) -> str:
    (sentence,) = told(*places, **settings)
    flags_are_flags(sentence, **settings)
    return sentence


def flags_are_flags(sentence: str, **settings) -> None:
    """Each flag that a sentence names, with its value, is one that main.py takes."""
    named = re.findall(r"(--[a-z-]+) (?:below )?('[^']+'|[^\s,]+)", sentence)
    assert named, sentence
    for flag, value in named:
        flags = ["--dataset", "digits", "--model", "mlp", "--precision", "float8", flag, *shlex.split(value)]
        config_of([*flags, *(["--optimizer", settings["optimizer"]] if "optimizer" in settings else [])])


def test_healthy_lines_say_nothing():
    places = [lines(site, layer) for site in ("inputs", "errors", "gradients") for layer in ("a", "b")]
    assert told(*places, updates("a", lost=0.3, arrived=1.0, cosine=0.99)) == []
    assert told() == []


def test_lost_updates():
    sentence = only_one(updates(lost=[0.1, 0.9, 0.97]), updates("other", lost=0.0, arrived=1.0, cosine=1.0))
    assert sentence == (
        "weights of fc: 97% of the updates were lost in step 20, and none has moved since step 6:"
        " --rounding stochastic or --site accumulator=float16 would keep them"
    )


def test_lost_updates_count_by_their_length():
    """What is lost at the end, when a run has arrived, is short: of 10 + 1 + 0.1 the last two, of 2.1 again these."""
    arrived = {"arrived": [1.0, 0.0, 0.0], "cosine": [1.0, 0.0, 0.0], "lost": [0.0, 1.0, 1.0]}
    assert told(updates(norm=[10.0, 1.0, 0.1], **arrived)) == []
    assert only_one(updates(norm=[1.0, 1.0, 0.1], **arrived))


def test_what_an_accumulator_or_compensation_keeps_is_not_lost():
    for site in ("accumulator", "compensation"):
        kept = updates(site=site, rule="float16:nearest", lost=0.0, arrived=1.0, cosine=1.0)
        assert told(updates(), kept) == []
    lost = updates(site="accumulator", rule="float16:nearest")
    sentence = only_one(updates(lost=0.0, arrived=1.0, cosine=1.0), lost)
    assert "accumulator=float16:stochastic or --site accumulator=float32 would" in sentence


def test_stochastic_rounding_loses_updates_on_purpose():
    assert told(updates(rule="float8:stochastic", lost=0.95, arrived=4.0, cosine=0.2)) == []


def test_flushed_errors():
    noisy = {"flushed": 0.6, "sqnr_db": 3.0}
    sentence = only_one(lines("errors", "fc", **noisy), lines("dgrad.errors", "b", **noisy), lines("inputs"))
    assert sentence.startswith(
        "errors of fc, and 1 more like it: 60% of them became zero in float8: --loss-scale dynamic"
    )
    assert "--site errors=float8@tensor" in sentence
    assert told(lines("errors", flushed=0.6, sqnr_db=30.0)) == []  # a long tail of tiny numbers
    assert told(lines("inputs", **noisy)) == []
    assert told(lines("errors", **noisy), loss_scale="dynamic") == []
    assert told(lines("errors", rule="mxfp8_e4m3:nearest", **noisy)) == []  # it has a scale
    assert told(lines("errors", rule="float8:stochastic", **noisy)) == []  # their mean is right


@pytest.mark.parametrize(
    ("rule", "site", "settings", "words"),
    [
        ("float8:nearest", "activations", {}, "reaches further or --site activations=float8@tensor would keep them"),
        ("fixed8.6:nearest", "inputs", {}, "are beyond 1.98438, where fixed8.6 ends (up to 9)"),
        ("fixed8.6:nearest", "inputs", {}, "or --site inputs=int8@tensor would keep them"),
        ("float8:nearest", "momentum.exp_avg_sq", {"optimizer": "adam"}, "or --site momentum.exp_avg_sq=bfloat16"),
        ("float8:nearest", "errors", {"loss_scale": 1000.0}, ": a --loss-scale below 1000 or --loss-scale dynamic"),
    ],
)  # fmt: skip
def test_saturated(rule, site, settings, words):
    sentence = only_one(lines(site, rule=rule, saturated=0.05, amax=9.0), lines("inputs", "b"), **settings)
    assert "5.0% of them are beyond" in sentence
    assert words in sentence
    assert told(lines(site, rule=rule, saturated=0.009), **settings) == []


def test_a_dynamic_loss_scale_may_look_for_its_place():
    first = lines("errors", saturated=[0.3, 0.0, 0.0])
    assert told(first, loss_scale="dynamic") == []
    assert only_one(first, loss_scale=1000.0)
    assert only_one(lines("errors", saturated=[0.3, 0.3, 0.0]), loss_scale="dynamic")
    assert only_one(lines("inputs", saturated=[0.3, 0.0, 0.0]), loss_scale="dynamic")


def test_saturation_under_a_scale_is_the_scales_way():
    assert told(lines("inputs", rule="mxfp4:nearest", saturated=0.1)) == []


def test_rounding_to_one_side():
    sentence = only_one(lines("inputs", rule="float8:toward_zero", bias=-0.09))
    assert (
        "toward_zero makes them 9% too small on average: --rounding nearest or --rounding stochastic would" in sentence
    )
    assert "too high" in only_one(lines("inputs", rule="float8:up", bias=0.05))
    assert told(lines("inputs", rule="float8:toward_zero", bias=-0.01)) == []
    assert told(lines("inputs", rule="float8:nearest", bias=-0.09)) == []


def test_one_noisy_site():
    others = [lines("inputs", layer) for layer in ("a", "b", "c")]
    sentence = only_one(lines("forward.weights", "b", sqnr_db=2.0), *others)
    assert sentence == (
        "forward.weights of b: a signal-to-noise ratio of 2 dB, of the others 20 dB (median):"
        " --site b/forward.weights=bfloat16 would keep more"
    )
    both = [lines("forward.weights", layer, sqnr_db=2.0) for layer in ("a", "b")]
    assert "--site forward.weights=bfloat16" in only_one(*both, *others)
    assert told(lines("forward.weights", sqnr_db=7.0), *others) == []
    assert told(lines("forward.weights", sqnr_db=2.0), lines("errors", sqnr_db=4.0), *others) == []  # two sites
    assert only_one(lines("forward.weights", sqnr_db=2.0), lines("errors", sqnr_db=5.5), *others)
    assert told(lines("forward.weights", rule="float8:stochastic", sqnr_db=2.0), *others) == []
    assert told(lines("forward.weights", sqnr_db=2.0), lines("inputs", sqnr_db=12.0)) == []  # all are noisy
    assert told(lines("forward.weights", sqnr_db=None), *others) == []
    assert len(told(lines("errors", flushed=0.6, sqnr_db=2.0), *others)) == 1  # which has a reason


def test_not_finite():
    late = lines("gradients", not_finite=[0.0, 0.5, 1.0])
    sentence = only_one(late, lines("errors", "b", not_finite=[0.0, 0.0, 0.1]), loss_scale=1024.0)
    assert sentence.startswith(
        "gradients of fc, and 1 more like it: 50.0% of them are not finite in step 10: a --loss-s"
    )
    assert told(lines("gradients", not_finite=0.5), loss_scale="dynamic") == []
    of_format = only_one(lines("gradients", not_finite=0.5), precision="fp16", overflow="infinity")
    assert "--overflow saturate" in of_format
    assert "a --learning-rate below 0.01 may help" in only_one(lines("gradients", not_finite=0.5))


def test_rounding_to_one_side_adds_up_in_weights():
    """2 % in 20 steps together."""
    truncated = updates(rule="bfloat16:toward_zero", lost=0.3, arrived=1.0, cosine=0.9, bias=-0.0011)
    sentence = only_one(truncated, precision="bfloat16", rounding="toward_zero")
    assert sentence == (
        "weights of fc: toward_zero makes them 0.11% too small in each of 20 steps, on average:"
        " --rounding nearest or --rounding stochastic would not"
    )
    truncated = updates(rule="bfloat16:toward_zero", lost=0.3, arrived=1.0, cosine=0.9, bias=-0.0009)
    assert told(truncated, precision="bfloat16", rounding="toward_zero") == []


def test_updates_that_a_scale_takes_elsewhere():
    """None is lost as a number, and yet they go nowhere."""
    sentence = only_one(updates(rule="nvfp4:nearest", lost=0.04, arrived=3.0, cosine=0.01), precision="nvfp4")
    assert "97% of the way that the updates would have gone was lost to rounding: --rounding stochastic or" in sentence
    assert "and none has ever moved: " in only_one(updates(last_moved=0))


def test_weights_that_are_all_zero_come_first():
    zero = updates(rule="int8:nearest", amax=0.0), updates("other", rule="int8:nearest", amax=0.0)
    noisy = lines("errors", flushed=0.6, sqnr_db=2.0)
    assert only_one(*zero, noisy, precision="int8") == (
        "weights of fc, and 1 more like it: all of them are zero in int8, in every step:"
        " --site weights=int8@tensor or a format with smaller numbers would keep them"
    )
    moved = updates(rule="int8:nearest", amax=[0.0, 0.0, 1.0], arrived=1.0, cosine=1.0)
    assert told(moved, precision="int8") == []
    assert "not finite" in told(updates(rule="int8:nearest", amax=0.0, not_finite=1.0), precision="int8")[0]


def test_a_second_moment_that_vanished_comes_first():
    squares = lines("momentum.exp_avg_sq", flushed=[0.95, 0.1, 0.0])
    saturated = lines("activations", saturated=0.8, amax=1e9)
    assert only_one(squares, saturated, optimizer="adam") == (
        "momentum.exp_avg_sq of fc: 95% of it became zero in step 1, where exp_avg did not, in float8, and steps are"
        " divided by its root: --site momentum.exp_avg_sq=bfloat16 would keep it"
    )
    with_it = lines("momentum.exp_avg", flushed=[0.9, 0.1, 0.0])
    assert told(squares, with_it, optimizer="adam") == []
    assert told(lines("momentum.exp_avg_sq", flushed=0.09), optimizer="adam") == []
    assert told(lines("momentum.exp_avg_sq", rule="mxfp8_e4m3:nearest", flushed=0.5), optimizer="adam") == []


def test_flags_are_those_that_reach_the_place():
    """--rounding does not where a site names one; and where modules have lines, a line for all stands over them."""
    own = {"site": ["weights=float8:nearest"]}
    assert "in step 20: --site weights=float8:stochastic or --site acc" in only_one(updates(last_moved=20), **own)
    own = {"site": ["weights=float8"]}
    assert "in step 20: --rounding stochastic or --site acc" in only_one(updates(last_moved=20), **own)
    by_layer = {"site": ["fc/weights=float8:nearest"]}
    sentence = only_one(updates(last_moved=20), **by_layer)
    assert "--site '*/weights=float8:stochastic' or --site '*/accumulator=float16' would" in sentence
    wide = only_one(updates(rule="bfloat16:nearest"), precision="bfloat16")
    assert "--site accumulator=float32" in wide  # float16 has but two bits more


def test_flags_that_the_run_cannot_have_are_not_named():
    """qtorch has no dynamic loss scale."""
    noisy = lines("errors", flushed=0.6, sqnr_db=3.0)
    assert told(noisy, backend="qtorch")[0].endswith("in float8: --site errors=float8@tensor would keep them")


def test_rules_that_name_another_operand_are_read():
    named = lines("dgrad.weights", rule="forward.weights", bias=-0.5, saturated=0.5)
    again = lines("dgrad.weights", "b", rule="forward.weights>float8:toward_zero", bias=-0.5)
    gone = lines("inputs", "c", rule="table:no such file:nearest", saturated=0.5)
    assert "dgrad.weights of b: toward_zero makes" in only_one(named, again, gone)


def test_what_was_only_tried_and_what_products_lost_say_nothing():
    tried = [{**line, "also": "float8"} for line in lines(saturated=0.5)]
    products = [{"step": 1, "layer": "fc", "site": "forward", "error": 0.9}]
    assert told(tried, products) == []


# Runs


def boston_by_hand(epochs: int) -> list[tuple[int, int, int]]:
    """Linear regression, every site in float8, to nearest: by step, updates, lost ones, the last step that moved."""
    split = data.load("boston", 0.2, 42, "all", None)
    model = models.build("linear", (13,), 1, 42)
    w, b = (nearest(p, FLOAT8) for p in model.parameters())
    x, y, counts, last_moved = nearest(split.train_x, FLOAT8), split.train_y, [], 0
    for step in range(1, epochs + 1):
        output = nearest(F.linear(x, w, b), FLOAT8)
        dy = nearest(2 * (output - y) / len(y), FLOAT8)
        wanted = unmoved = 0
        for p, gradient in ((w, dy.T @ x), (b, dy.sum(0))):
            exact = p - torch.tensor(0.01) * nearest(gradient, FLOAT8)
            after = nearest(exact, FLOAT8)
            wanted, unmoved = wanted + (exact != p).sum(), unmoved + ((exact != p) & (after == p)).sum()
            last_moved = step if bool((after != p).any()) else last_moved
            p.copy_(after)
        counts.append((int(wanted), int(unmoved), last_moved))
    return counts


def in_file(path) -> list[dict]:
    return list(map(json.loads, path.read_text().splitlines()))


STALLED = ["--dataset", "boston", "--epochs", 30, "--batch-size", 512, "--scale-on", "all", "--precision", "float8"]


def test_boston_stalls_to_the_exact_count(cli):
    ran = cli(*STALLED, "--watch", 1)
    rows = [line for line in in_file(ran.folder / LAYERS) if line["site"] == "weights"]
    counts = [(row["updates"], row["lost_updates"] * row["updates"], row["last_moved"]) for row in rows]
    assert counts == [pytest.approx(count, abs=1e-6) for count in boston_by_hand(30)]
    assert rows[-1]["lost_updates"] == 1
    (sentence,) = ran.summary["advice"]
    assert f"advice: {sentence}" in ran.out
    assert sentence.startswith("weights of linear: 100% of the updates were lost in step 30, and none has moved since")
    for flags in (["--rounding", "stochastic"], ["--site", "accumulator=float16"]):
        followed = cli(*STALLED, "--watch", 1, *flags)
        assert "advice" not in followed.summary
        assert followed.summary["testing_mse"] < 0.6 < 0.9 < ran.summary["testing_mse"]


@pytest.mark.parametrize("name", ["bfloat16-kahan", "collage-plus", "coat", "quartet", "swalp", "qtorch-tutorial"])
def test_runs_that_keep_pairs_scales_or_named_operands_are_told_nothing(cli, name):
    """Their lines have what others have not, or lack it."""
    model = ["--dataset", "digits", "--model", "mlp", "--epochs", 1, "--batch-size", 128]
    assert "advice" not in cli(*model, "--recipe", name, "--watch", 5).summary


def test_a_run_without_watching_is_told_nothing(cli):
    assert "advice" not in cli(*STALLED).summary
    assert "advice" not in cli(*BOSTON, "--watch", 2, "--output-dir", "float32").summary


def test_a_resumed_run_is_told_the_same(cli, monkeypatch):
    expected = cli(*STALLED, "--watch", 3, "--output-dir", "straight").summary["advice"]
    folder = stopped(cli, monkeypatch, *STALLED, "--watch", 3, steps=20)
    assert cli("--resume", folder).summary["advice"] == expected


def test_watched_shadows_have_the_watched_steps(cli):
    ran = cli(*STALLED, "--watch", 10, "--shadow")
    for name in (LAYERS, SHADOW):
        steps = by_evaluation(in_file(ran.folder / name), 1)
        assert list(steps) == [1, 10, 20, 30]
