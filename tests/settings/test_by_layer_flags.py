"""--site PATTERN/SITE=FORMAT[:ROUNDING]: in the Config, the hash, recipes, records, sweeps and the names of runs."""

import json

import pytest
from run_helpers import NOISY_BOSTON, is_refused

import sweep
from analysis import figures
from analysis.runs import baseline_of, names, read, settings_of
from low_precision.rules import ALL_SITES
from settings import recipes
from settings.config import Config, ConfigError
from settings.flags import config_of, flags_of
from settings.recipes import FLAGS, RECIPES, Recipe, with_recipe

FLOAT8 = {"precision": "float8", "model": "mlp"}


def lines(config: Config) -> list[str]:
    return [str(line) for line in config.lines()]


# The Config


def test_a_line_without_a_pattern_holds_for_the_whole_model():
    config = Config.make(**FLOAT8, rounding="up", site=("weights=fp16", "output/weights=bfloat16", "hidden*/*=float32"))
    assert {str(config.rules()[site]) for site in ALL_SITES if site != "weights"} == {"float8:up"}
    assert str(config.rules()["weights"]) == "fp16:up"
    assert lines(config) == ["output/weights=bfloat16:up", "hidden*/*=float32"]
    assert Config.make(**FLOAT8, site="weights=fp16").lines() == ()


def test_a_later_line_for_the_whole_model_wins_over_an_earlier_one_by_layer():
    config = Config.make(**FLOAT8, site=("output/weights=bfloat16", "weights=fp16"))
    assert str(config.rules()["weights"]) == "fp16:nearest"
    assert lines(config) == ["output/weights=bfloat16:nearest", "weights=fp16:nearest"]


def test_a_star_stands_for_the_sites_that_have_a_rule():
    config = Config.make(precision="float8", quantize="weights,errors", site=("*=bfloat16", "inputs=fp16"))
    rules = {site: str(rule) for site, rule in config.rules().items()}
    assert rules == {"weights": "bfloat16:nearest", "errors": "bfloat16:nearest", "inputs": "fp16:nearest"}
    assert Config.make(site="*=bfloat16").rules() == {}


def test_json_and_flags_give_the_same_run_again():
    config = Config.make(**FLOAT8, site=("output/*=float32", "hidden?/momentum=fp16:stochastic:4", "products=mxfp4"))
    assert Config.from_json(config.to_json()) == config
    assert config_of(flags_of(config)) == config


def test_the_hash_holds_the_lines_and_no_other_run_changes_its_name():
    assert Config.make().folder_name == "toy-float32-42-cf6ea23f"  # as before there were lines
    noisy = Config.make(dataset="boston", precision="float8", rounding="stochastic", site="momentum=float16")
    assert noisy.folder_name == "boston-float8-stochastic-42-2798af0a"
    sites = [
        (),
        ("output/*=float32",),
        ("output/weights=float32",),
        ("hidden1/weights=float32",),
        ("output/*=float32", "output/weights=float8"),
        ("output/weights=float8", "output/*=float32"),
    ]
    assert len({Config.make(**FLOAT8, site=site).folder_name for site in sites}) == len(sites)
    nothing = Config.make(model="mlp", site="output/*=float32")  # of a run that rounds nothing
    assert nothing.folder_name == Config.make(model="mlp").folder_name
    seeds = [Config.make(model="mlp", site="output/weights=float8:stochastic", rounding_seed=seed) for seed in (1, 2)]
    assert seeds[0].folder_name != seeds[1].folder_name
    named = Config.make(model="mlp", site="output/weights=float8", layers="output")
    assert named.folder_name != Config.make(model="mlp", site="output/weights=float8").folder_name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"site": ("fc/weights=float8", "fc/weights=fp16")}, ["--site", "fc/weights stands there twice"]),
        ({"site": "fc/wieghts=float8"}, ["--site: given fc/wieghts=float8 (did you mean weights?)", "[PATTERN/]SITE="]),
        ({"site": "/weights=float8"}, ["--site: given /weights=float8"]),
        ({"site": "fc/weights"}, ["--site: given fc/weights"]),
        ({"site": "fc/weights=float7"}, ["--site: given fc/weights=float7 (did you mean float8?)"]),
        ({"site": "a,b/weights=float8"}, ["a comma or a semicolon"]),
        ({"site": "fc/momentum.exp_avg=fp16"}, ["--site: given fc/momentum.exp_avg=fp16", "keeps no state"]),
        ({"site": "fc/weights=float8", "overflow": "infinity"}, ["--overflow", "fc/weights: float8 has no infinity"]),
        ({"site": "fc/*=float32", "precision": "float8", "backend": "qtorch"}, ["--backend", "qtorch", "fc/*=float32"]),
        ({"quantize": "fc/weights"}, ["--quantize: given fc/weights"]),
        ({"quantize": "*"}, ["--quantize: given *"]),
    ],
    ids=str,
)
def test_bad_lines_are_refused_in_one_sentence(settings, words):
    with pytest.raises(ConfigError) as caught:
        Config.make(**settings)
    assert [word for word in words if word not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) == 1


def test_the_same_left_side_may_stand_once_in_a_recipe_and_once_among_the_flags(monkeypatch):
    of_recipe = {"precision": "float8", "site": ("fc/*=float32", "fc/weights=fp16", "weights=bfloat16")}
    monkeypatch.setitem(RECIPES, "mine", Recipe("mine", "", ""))
    monkeypatch.setitem(FLAGS, "mine", of_recipe)
    flags = {"site": ["fc/weights=bfloat16:up", "fc/products=mxfp4"]}
    made = with_recipe("mine", flags)["site"]
    assert made == ("fc/*=float32", "weights=bfloat16", "fc/weights=bfloat16:up", "fc/products=mxfp4")
    assert lines(Config.make(**with_recipe("mine", {})))[0] == "fc/*=float32"
    shown = " ".join(recipes.table().split())
    assert "--site 'fc/*=float32' --site" in shown  # as a shell takes it
    assert "--site weights=bfloat16" in shown


# Runs


def test_what_only_the_model_knows_is_a_wrong_argument_too(cli, tmp_path):
    boston = ("--dataset", "boston", "--model", "mlp", "--precision", "float8")
    is_refused(cli(*boston, "--site", "ouput/*=float32"), "--site: given ouput/* (did you mean output?)", "hidden1")
    outside = ("--layers", "hidden*", "--site", "output/weights=fp16")
    is_refused(cli(*boston, *outside), "--site: given output/weights", "one of the modules that layers select: hidden1")
    apart = ("--site", "output/compensation=fp16", "--site", "output/weights=float32")
    is_refused(cli(*boston, *apart), "--site: given compensation", "in module output")
    is_refused(cli(*boston, "--site", "output:linear/inputs=fp16"), "--site: given output:linear/inputs")
    assert list(tmp_path.iterdir()) == []


def test_a_run_records_its_lines_and_goes_on_with_them(cli, tmp_path):
    flags = [*NOISY_BOSTON, "--model", "mlp", "--momentum", 0.9, "--site", "output/*=float32"]
    flags += ["--site", "hidden1/momentum=fp16:stochastic"]
    ran = cli(*flags)
    assert ran.status == 0
    assert json.loads((ran.folder / "config.json").read_text())["site"] == flags[-3::2]
    assert ran.summary["lines"] == ["output/*=float32", "hidden1/momentum=fp16:stochastic"]
    assert ran.summary["rules"]["weights"] == "float8:stochastic"
    alone = cli(*NOISY_BOSTON, "--model", "mlp", "--momentum", 0.9, "--layers", "hidden*", *flags[-2:])
    assert alone.summary["testing_mse"] == ran.summary["testing_mse"]
    again = cli("--resume", ran.folder, "--site", "output/*=fp16")
    is_refused(again, "--resume", "--site output/*=fp16, not output/*=float32,hidden1/momentum=fp16:stochastic")
    without = cli(*flags[:-4])
    assert "lines" not in without.summary
    assert without.summary["testing_mse"] != ran.summary["testing_mse"]


def test_what_saturates_is_counted_by_the_formats_of_each_module(cli):
    """Most weights of hidden2, and so of the model, are beyond the largest number of fixed2.7."""
    of_all = ["--model", "mlp", "--epochs", 1, "--precision", "float8", "--quantize", "weights"]
    assert cli(*of_all).summary["saturated"]["weights"] == 0
    ended = cli(*of_all, "--site", "hidden2/weights=fixed2.7").summary["saturated"]["weights"]
    assert 0.5 < ended < 1


def test_a_sweep_takes_lists_of_lines():
    values = ";output/*=float32;hidden*/weights=fp16,output/*=bfloat16"
    configs, _ = sweep.grid(["--model", "mlp", "--precision", "float8", "--site", values])
    assert [lines(config) for config in configs] == [
        [],
        ["output/*=float32"],
        ["hidden*/weights=fp16:nearest", "output/*=bfloat16:nearest"],
    ]
    assert len({config.folder_name for config in configs}) == 3


def test_the_names_and_figures_of_runs_tell_them_apart(cli, tmp_path):
    for flags in (
        [],
        ["--precision", "float8"],
        ["--precision", "float8", "--site", "output/*=float32"],
        ["--precision", "float8", "--site", "output/weights=bfloat16", "--site", "output/inputs=bfloat16"],
        ["--site", "output/weights=fp16:stochastic"],
    ):
        assert cli("--model", "mlp", "--epochs", 1, *flags).status == 0
    settings = settings_of(read([tmp_path / "runs"]).runs)
    assert sorted(names(settings)) == [
        "float32",
        "float32; output/weights fp16 stochastic",
        "float8 nearest",
        "float8 nearest; output/* float32",
        "float8 nearest; output/weights,inputs bfloat16 nearest",
    ]
    unrounded = next(setting for setting in settings if not setting.rounds)
    assert [baseline_of(setting, settings) for setting in settings] == [unrounded] * len(settings)
    colours = [look.colour for look in figures._looks(settings)]
    assert len(set(colours)) == len(colours)
