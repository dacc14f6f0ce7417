"""Flags: the command of a run gives that run again, and errors say in fields what was given and what is allowed."""

import copy
import pickle
import shlex
from dataclasses import fields

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sweep
from data import DATASETS
from low_precision.formats import BLOCKS, NAMED
from low_precision.rounding import Rounding
from low_precision.rules import SITES
from settings.config import MODEL_NAMES, OPTIMIZERS, Config, ConfigError
from settings.flags import config_of, flags_of, parser
from settings.recipes import RECIPES, with_recipe

FORMATS = st.sampled_from([*NAMED, *BLOCKS, "half", "e4m3", "fixed8.4s", "bfp8_row"])
ROUNDINGS = st.sampled_from([*map(str, Rounding), "stochastic:4", "stochastic:23:half"])
RULES = FORMATS | st.builds("{}:{}".format, FORMATS, ROUNDINGS)
TEXTS = st.text(min_size=1, max_size=8) | st.sampled_from(["-x", "--epochs", "a b", "=", "-", "~", "none", "it's"])
STATES = {f"momentum.{state}" for states in OPTIMIZERS.values() for state in states}
ALL_OF_THEM = st.sampled_from([*SITES, *sorted(STATES)])
PATTERNS = st.sampled_from(["stage1.*", "fc", "*", "-x", "conv[12]", "none", "all"])
PRODUCTS = st.sampled_from(["forward", "dgrad", "wgrad"])
TRANSFORMS = st.sampled_from(["none", "hadamard16", "hadamard2:random", "hadamard64:fixed:bfloat16"])
VALUES = {
    "dataset": st.sampled_from([*DATASETS]),
    "test_split": st.floats(0.01, 0.9),
    "scale_on": st.sampled_from(["train", "all"]),
    "data_dir": TEXTS,
    "files_dir": st.none() | TEXTS,
    "model": st.sampled_from([*MODEL_NAMES, "mine.py:net"]),
    "model_options": st.none() | st.sampled_from(["layers=2", "width=8,dropout=0.5,heads=1", "relu=true,name=a-b"]),
    "epochs": st.integers(0, 10**30),
    "steps": st.none() | st.integers(0, 10**30),
    "evaluate_every": st.none() | st.integers(1, 10**30),
    "batch_size": st.integers(1, 10**30),
    "micro_batch": st.none() | st.integers(1, 10**30),
    "optimizer": st.sampled_from([*OPTIMIZERS, "mine.py:lion"]),
    "learning_rate": st.floats(1e-300, 1e30),
    "momentum": st.floats(0, 1e30),
    "betas": st.none() | st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    "weight_decay": st.floats(0, 1e30),
    "decay": st.sampled_from(["all", "matrices"]),
    "clip_norm": st.none() | st.floats(1e-300, 1e30),
    "schedule": st.sampled_from(["constant", "cosine", "onecycle"]),
    "warmup": st.integers(0, 10**30),
    "final_learning_rate": st.floats(0, 1e30),
    "average_last": st.floats(0, 1),
    "seed": st.integers(0, 2**32 - 1),
    "device": st.sampled_from(["auto", "cpu", "cuda"]),
    "recipe": st.none(),  # with_recipe gives it beside its rules: below
    "precision": FORMATS,
    "rounding": ROUNDINGS,
    "quantize": st.sampled_from(["all", "none"]) | st.lists(ALL_OF_THEM, unique=True),
    "site": st.dictionaries(ALL_OF_THEM, RULES).map(lambda d: tuple(f"{s}={r}" for s, r in d.items())),
    "transform": st.just("none")
    | st.dictionaries(PRODUCTS, TRANSFORMS).map(lambda d: [f"{p}={t}" for p, t in d.items()]),
    "layers": st.none() | st.lists(PATTERNS, min_size=1, max_size=3).map(tuple),
    "rounding_seed": st.none() | st.integers(0, 2**32 - 1),
    "overflow": st.sampled_from(["saturate", "infinity"]),
    "loss_scale": st.just("dynamic") | st.floats(1e-30, 1e30),
    "smallest_state": st.integers(0, 10**30),
    "backend": st.sampled_from(["auto", "eager", "fused", "qtorch"]),
    "output_dir": TEXTS,
    "checkpoint_every": st.sampled_from(["1", "5", "90s", "1.5m", "2h"]),
    "watch": st.integers(1, 10**30),
    "watch_also": st.lists(RULES | st.sampled_from(["recipe:nvfp4", "recipe:te-delayed"]), max_size=2).map(tuple),
    "shadow": st.booleans(),
    "sample": st.integers(0, 10**30),
    "wandb": st.sampled_from(["auto", "online", "offline", "disabled"]),
    "wandb_project": st.none() | TEXTS,
    "wandb_entity": st.none() | TEXTS,
}


def test_every_setting_has_values_above():
    assert list(VALUES) == [f.name for f in fields(Config)]


@settings(max_examples=500, derandomize=True, database=None, deadline=None)
@given(st.data(), st.lists(st.sampled_from([*VALUES]), unique=True, max_size=6))
def test_the_command_of_a_run_is_that_run(draw, names):
    try:
        config = Config.make(**{name: draw.draw(VALUES[name], name) for name in names})
    except ConfigError:
        assume(False)  # settings that do not go together
    words = flags_of(config)
    assert config_of(words) == config
    assert config_of(shlex.split(shlex.join(words))) == config
    if names and names[0] not in ("optimizer", "dataset", "model"):  # without which others may not go together
        left_out = flags_of(config, without=[names[0]])
        default = next(f.default for f in fields(Config) if f.name == names[0])
        try:
            assert getattr(config_of(left_out), names[0]) == default
        except ConfigError:  # the others need it, as a model of images needs a data set of them
            assert names[0] in ("optimizer", "dataset", "momentum", "watch", "schedule", "learning_rate", "steps")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_of_a_recipe_is_that_run(recipe):
    config = Config.make(**with_recipe(recipe, {"dataset": "digits"}))
    assert config_of(flags_of(config)) == config == config_of(["--recipe", recipe, "--dataset", "digits"])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({}, []),
        ({"quantize": "none"}, ["--quantize", "none"]),
        ({"quantize": "errors,weights"}, ["--quantize", "weights,errors"]),
        ({"output_dir": "-x"}, ["--output-dir=-x"]),
        ({"layers": ("-x", "y")}, ["--layers=-x,y"]),
        (
            {"site": ("weights=fp16", "accumulator=float32")},
            ["--site", "weights=fp16", "--site", "accumulator=float32"],
        ),
        (
            {"optimizer": "adam", "site": "momentum.exp_avg_sq=bfloat16", "quantize": "momentum.exp_avg,weights"},
            [
                *("--optimizer", "adam", "--quantize", "weights,momentum.exp_avg"),
                *("--site", "momentum.exp_avg_sq=bfloat16"),
            ],
        ),
        ({"rounding": "stochastic:4:half"}, ["--rounding", "stochastic:4:half"]),
        ({"loss_scale": 1024, "epochs": "3"}, ["--epochs", "3", "--loss-scale", "1024.0"]),
    ],
    ids=str,
)
def test_flags_as_they_are_written(made, words):
    assert flags_of(Config.make(**made)) == words


@pytest.mark.parametrize("patterns", [(), ("a,b",), ("",), (" a",)])
def test_patterns_that_no_flag_could_name_are_refused(patterns):
    with pytest.raises(ConfigError, match="--layers"):
        Config.make(layers=patterns)


@pytest.mark.parametrize("word", ["--resume=x", "--debug", "--list-formats", "--list-recipes"])
def test_what_is_no_flag_of_a_run_is_refused(word):
    with pytest.raises(ConfigError, match=f"^{word.partition('=')[0]}: given it, allowed: the flags of a run alone$"):
        config_of([word])


def test_folders_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = config_of(["--output-dir", "~/runs", "--data-dir", "~"])
    assert (config.output_dir, config.data_dir) == ("/home/somebody/runs", "/home/somebody")
    assert config_of(flags_of(config)) == config
    assert config_of(["--output-dir", "a~b"]).output_dir == "a~b"
    assert config.folder_name == Config().folder_name


# Errors

WRONG = [
    ("--dataset", "bostn", "boston"),
    ("--model", "resnet18", "resnet20"),
    ("--optimizer", "adamW", "adamw"),
    ("--schedule", "cosin", "cosine"),
    ("--scale-on", "trian", "train"),
    ("--device", "cudaa", "cuda"),
    ("--precision", "float9", "float8"),
    ("--precision", "bflaot16", "bfloat16"),
    ("--precision", "mxfp4_", "mxfp4"),
    ("--rounding", "stochastik", "stochastic"),
    ("--rounding", "nearest_awy", "nearest_away"),
    ("--quantize", "weight,errors", "weights"),
    ("--quantize", "non", "none"),
    ("--site", "accumlator=fp16", "accumulator"),
    ("--site", "weights=flota8", "float8"),
    ("--site", "momentum.exp_avg_sq=bf16", "bfloat16"),
    ("--site", "momentu.exp_avg_sq=bfloat16", "momentum.exp_avg_sq"),
    ("--site", "exp_avg_sq=bfloat16", "momentum.exp_avg_sq"),
    ("--precision", "fp8", "float8_e4m3fn"),
    ("--precision", "E4M3", "float8_e4m3fn"),
    ("--precision", "float16_ieee", "fp16"),
    ("--precision", "f16", "fp16"),
    ("--site", "weights=float8:stochastc", "stochastic"),
    ("--recipe", "publish", "published"),
    ("--overflow", "infinty", "infinity"),
    ("--loss-scale", "dynamc", "dynamic"),
    ("--backend", "fusd", "fused"),
    ("--wandb", "offlin", "offline"),
    # nothing is near
    ("--site", "momentum.step=fp16", None),
    ("--precision", "e4m\u0663", None),  # an Arabic digit
    ("--rounding", "stochastic:\u0664", "stochastic"),
    ("--dataset", "42", None),
    ("--precision", "", None),
    ("--loss-scale", "-1", None),
    ("--epochs", "x", None),
    ("--quantize", "weights,weights", None),
]


@pytest.mark.parametrize(("flag", "value", "near"), WRONG)
def test_a_wrong_value_gets_the_nearest_known_one(flag, value, near):
    with pytest.raises(ConfigError) as caught:
        config_of([f"{flag}={value}"])
    error = caught.value
    seen = value or "''"
    assert (error.setting, error.value, error.nearest) == (flag, seen, near)
    hint = f" (did you mean {near}?)" if near else ""
    assert str(error) == f"{flag}: given {seen}{hint}, allowed: {error.allowed}{error.note}"
    assert near is None or near in error.allowed or flag == "--site"


def test_help_and_errors_say_which_names_mislead():
    words = ("e4m3 ends at 240: OCP's is float8_e4m3fn", "float16 (qtorch's 1-6-9; IEEE half is fp16)")
    text = " ".join(parser().format_help().split())
    with pytest.raises(ConfigError) as caught:
        config_of(["--precision", "x"])
    for word in words:
        assert word in text
        assert word in str(caught.value)
    assert "momentum.NAME" in text
    assert "momentum.exp_avg_sq=bfloat16" in text


def test_values_of_a_sweep():
    flags = ["--optimizer", "adam", "--precision", "float8", "--seed", "0:2"]
    flags += ["--site", ";momentum.exp_avg_sq=bfloat16;momentum.exp_avg_sq=float8;momentum.exp_avg=fp16,momentum=fp16"]
    runs, _ = sweep.grid(flags)
    sites = {config.site for config in runs}
    # The third is as the first, and a state's rule that is momentum's is no other run than momentum's alone.
    assert sites == {(), ("momentum.exp_avg_sq=bfloat16",), ("momentum.exp_avg=fp16", "momentum=fp16")}
    assert len(runs) == 6
    with pytest.raises(ConfigError, match=r"--site: given momentum.exp_avg_sq=bfloat16, allowed: no momentum"):
        sweep.grid(["--optimizer", "adam,sgd", "--site", "momentum.exp_avg_sq=bfloat16"])


@pytest.mark.parametrize(("word", "near"), [("--epoch", "--epochs"), ("--reciep", "--recipe"), ("--zzz", None)])
def test_an_unknown_flag_gets_the_nearest_known_one(word, near):
    with pytest.raises(ConfigError) as caught:
        config_of([word, "3"])
    assert (caught.value.setting, caught.value.value, caught.value.nearest) == (None, word, near)


def test_an_error_survives_pickling_and_copying():
    """As in a sweep, whose runs are in other processes."""
    with pytest.raises(ConfigError) as caught:
        Config.make(precision="float9")
    error = caught.value
    error.note += "; --recipe x gives it"
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(back) is ConfigError
        assert vars(back) == vars(error)
        assert str(back) == str(error)
