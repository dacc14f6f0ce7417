"""momentum.NAME: one state of the optimizer is a site of its own, where the optimizer keeps it."""

import pytest
import torch

from lab import optimizers
from low_precision.rules import ALL_SITES, COUNTS
from settings.config import OPTIMIZERS, Config, ConfigError
from settings.recipes import FLAGS, RECIPES, Recipe, with_recipe


def refused(**settings) -> str:
    """The one line with which Config refuses these settings."""
    with pytest.raises(ConfigError) as caught:
        Config.make(**settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def rules(**settings) -> dict[str, str]:
    return {site: str(rule) for site, rule in Config.make(**settings).rules().items()}


def test_a_state_of_the_optimizer_is_a_site_of_its_own():
    adam = {"optimizer": "adam", "precision": "float8"}
    everywhere = dict.fromkeys(ALL_SITES, "float8:nearest")
    wide = rules(**adam, site="momentum.exp_avg_sq=bfloat16")
    assert wide == everywhere | {"momentum.exp_avg_sq": "bfloat16:nearest"}
    assert list(wide) == [*ALL_SITES, "momentum.exp_avg_sq"]  # in the order of a step
    assert rules(**adam, site="momentum.exp_avg=float32") == everywhere | {"momentum.exp_avg": "float32"}
    assert rules(**adam, quantize="none", site="momentum.exp_avg=half") == {"momentum.exp_avg": "fp16:nearest"}
    assert rules(**adam, quantize="momentum.exp_avg,weights") == {
        "weights": "float8:nearest",
        "momentum.exp_avg": "float8:nearest",
    }
    sites = ("accumulator=float32", "momentum.exp_avg_sq=bfloat16", "momentum=float16:up", "momentum.exp_avg=fp16")
    assert rules(optimizer="adamw", site=sites) == {
        "momentum": "float16:up",
        "momentum.exp_avg": "fp16:nearest",
        "momentum.exp_avg_sq": "bfloat16:nearest",
        "accumulator": "float32",
    }
    sgd = rules(momentum=0.9, precision="float8", site="momentum.momentum_buffer=float16")
    assert sgd == everywhere | {"momentum.momentum_buffer": "float16:nearest"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"site": "momentum.momentum_buffer=fp16"},
            ["no momentum.NAME", "without --momentum"],
        ),
        ({"site": "momentum.momentum_buffer=float32"}, ["no momentum.NAME"]),  # nothing would come of it anyway
        ({"momentum": 0.9, "site": "momentum.exp_avg=fp16"}, ["allowed: momentum.momentum_buffer (what sgd keeps)"]),
        (
            {"optimizer": "adam", "site": "momentum.momentum_buffer=fp16"},
            ["momentum.exp_avg, momentum.exp_avg_sq"],
        ),
        ({"optimizer": "adamw", "site": "momentum.exp_avg_sqr=fp16"}, ["did you mean momentum.exp_avg_sq?", "adamw"]),
        ({"optimizer": "adam", "site": "momentum.max_exp_avg_sq=fp16"}, ["momentum.exp_avg_sq (what adam keeps)"]),
        ({"optimizer": "adam", "site": "exp_avg=fp16"}, ["did you mean momentum.exp_avg?", "momentum.NAME"]),
        ({"optimizer": "adam", "site": "momentum.step=fp16"}, ["momentum.step=fp16", "step is a count"]),
        ({"optimizer": "adam", "site": "momentum.exp_avg=fp8"}, ["did you mean float8_e4m3fn?", "E4M3"]),
        ({"optimizer": "adam", "site": ("momentum.exp_avg=fp16",) * 2}, ["each site once"]),
        ({"quantize": "weights,momentum.exp_avg"}, ["--quantize: given momentum.exp_avg", "no momentum.NAME"]),
        ({"quantize": "momentum.step"}, ["--quantize: given momentum.step", "step is a count"]),
        ({"quantize": "momentun.exp_avg"}, ["--quantize: given", "did you mean momentum.exp_avg?"]),
    ],
    ids=str,
)
def test_a_state_that_the_optimizer_does_not_keep_is_refused(settings, words):
    line = refused(**settings)
    assert line.startswith(("--site: given ", "--quantize: given "))
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_states_are_those_of_torchs_optimizers(optimizer):
    momentum = 0.9 if optimizer == "sgd" else 0
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))  # muon has one for each of them
    made = optimizers.build(Config(optimizer=optimizer, momentum=momentum), model)
    model(torch.ones(1, 3)).sum().backward()
    made.step()
    states = {name for layer in model for name in made.state[layer.weight]}
    assert states - set(COUNTS) == set(OPTIMIZERS[optimizer])


def test_qtorch_rounds_all_states_alike():
    settings = {"optimizer": "adam", "precision": "float8", "backend": "qtorch"}
    assert "no momentum.NAME" in refused(**settings, site="momentum.exp_avg_sq=float16")
    assert "no momentum.NAME" in refused(**settings, site="momentum.exp_avg_sq=float32")
    Config.make(**settings, site="momentum.exp_avg_sq=float8")  # as momentum


def test_a_states_site_stands_beside_a_recipes_momentum(monkeypatch):
    settings = {"optimizer": "adam", "momentum": 0.0, "site": ["momentum.exp_avg_sq=bfloat16"]}
    made = Config.make(**with_recipe("qtorch-tutorial", settings)).rules()
    assert str(made["momentum"]) == "float16:stochastic"
    assert str(made["momentum.exp_avg_sq"]) == "bfloat16:nearest"
    monkeypatch.setitem(RECIPES, "mine", Recipe("mine", "", ""))
    monkeypatch.setitem(FLAGS, "mine", {"site": ("momentum.exp_avg=fp16",), "precision": "float8"})
    assert with_recipe("mine", {"site": "momentum.exp_avg=float16"})["site"] == ("momentum.exp_avg=float16",)
    assert with_recipe("mine", {"site": "momentum=float16"})["site"] == ("momentum.exp_avg=fp16", "momentum=float16")
    with pytest.raises(ConfigError, match=r"--site: given momentum.exp_avg=fp16, allowed: no momentum"):
        Config.make(**with_recipe("mine", {}))


def test_the_hash_changes_with_the_rule_of_a_state():
    adam = {"optimizer": "adam", "precision": "float8", "rounding": "stochastic"}
    sites = ((), "momentum.exp_avg=fp16", "momentum.exp_avg_sq=fp16", "momentum.exp_avg=float32", "momentum=fp16")
    assert len({Config.make(**adam, site=site).folder_name for site in sites}) == len(sites)
