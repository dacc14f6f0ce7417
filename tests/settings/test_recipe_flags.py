"""Recipes from the command line: what --recipe sets, what flags override, how records are named, and the page."""

import re
import shlex

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from run_helpers import ROOT, is_refused

import low_precision as lp
import models
import quant
import sweep
from analysis import runs
from low_precision import recipes as library
from low_precision.recipe import Recipe
from low_precision.rules import OPERANDS, effective, site_line
from settings import recipes
from settings.config import Config, ConfigError
from settings.flags import config_of, flags_of
from settings.recipes import FLAGS, RECIPES, described, settings_of, with_recipe

OF_OPERANDS = [name for name, row in RECIPES.items() if row.operands]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
pytestmark = pytest.mark.usefixtures("one_thread")


def of(recipe: str | None, **settings) -> Config:
    return Config.make(**with_recipe(recipe, settings))


def texts(config: Config) -> dict[str, str]:
    return {site: str(rule) for site, rule in config.rules().items()}


def rules_of(row: Recipe) -> dict[str, str]:
    lines = [site_line(f"{site}={text}") for site, text in row.rules.items()]
    return {site: str(rule) for site, rule in effective({line.site: line.rule for line in lines}).items()}


# What a recipe sets


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "published"])
def test_a_recipes_settings_have_the_rules_of_its_row(name):
    config = of(name)
    assert texts(config) == rules_of(RECIPES[name])
    assert config.loss_scale == RECIPES[name].loss_scale
    assert config.transform == tuple(f"{p}={text}" for p, text in RECIPES[name].transforms.items())
    assert config.smallest_state == RECIPES[name].smallest_state
    assert config.recipe == (name if RECIPES[name].operands else None)
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", [name for name in RECIPES if not RECIPES[name].operands])
def test_a_recipe_without_operands_is_the_flags_that_its_text_shows(name):
    flags = " ".join(described(RECIPES[name]).split("  flags: ")[1].split())
    assert config_of(shlex.split(flags)) == of(name)


def test_none_is_no_recipe():
    assert config_of(["--recipe", "none"]) == Config() == of(None)
    assert config_of(["--recipe", "none", "--epochs", "3"]) == Config(epochs=3)


# What flags override


def test_flags_win_one_by_one():
    as_it_is = texts(of("nvfp4"))
    assert texts(of("nvfp4", site=["dgrad.errors=nvfp4"])) == as_it_is | {"dgrad.errors": "nvfp4:nearest"}
    assert texts(of("nvfp4", site="products=mxfp4")) == dict.fromkeys(OPERANDS, "mxfp4:nearest")
    assert texts(of("nvfp4", site="products=float32")) == {}
    assert texts(of("nvfp4", rounding="stochastic")) == as_it_is  # its rules name their roundings
    with_bfloat16 = of("nvfp4", precision="bfloat16", quantize="inputs,activations,errors")
    assert set(texts(with_bfloat16)) == {*OPERANDS, "inputs", "activations", "errors"}
    by_layer = of("nvfp4", site=["head/dgrad.errors=nvfp4", "head/*=float32"])
    assert texts(by_layer) == as_it_is
    assert len(by_layer.lines()) == 2
    assert of("quartet", transform="none").transform == ()
    kept = of("quartet", transform=("wgrad=none",)).transform
    assert kept == ("forward=hadamard32", "dgrad=hadamard32:random", "wgrad=none")
    assert of("adam8bit", smallest_state=0).smallest_state == 0
    assert of("adam8bit", optimizer="adamw").optimizer == "adamw"


@pytest.mark.parametrize("name", OF_OPERANDS)
def test_the_command_of_a_run_with_a_recipe_is_short_and_is_that_run(name):
    assert flags_of(of(name)) == ["--recipe", name]
    lines = ["output/*=float32", "dgrad.errors=bfloat16"]
    config = of(name, dataset="digits", site=lines, transform="wgrad=hadamard8")
    words = flags_of(config)
    assert config_of(words) == config
    assert (words.count("--site"), words.count("--transform"), len(words)) == (2, 1, 10)


SITES = st.lists(st.sampled_from([*OPERANDS, "products", "weights", "output/products", "*"]), unique=True, max_size=4)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.sampled_from(OF_OPERANDS), SITES, st.sampled_from([(), ("none",), ("wgrad=none", "forward=hadamard8")]))
def test_any_command_of_a_recipe_is_that_run(name, sites, transform):
    chosen = {"site": tuple(f"{site}=bfloat16:stochastic" for site in sites), "transform": transform}
    config = of(name, **{key: value for key, value in chosen.items() if value})
    assert config_of(flags_of(config)) == config


# Names


def test_a_record_is_named_after_its_recipe():
    assert of("nvfp4", dataset="boston", seed=7).name == "boston-nvfp4-7"
    assert of("adam8bit", dataset="boston").name == "boston-float32-42"
    assert of("bfloat16", dataset="boston").name == "boston-bfloat16-nearest-42"
    one, other = of("nvfp4"), of("nvfp4", transform="none")
    assert one.folder_name != other.folder_name
    assert one.name == other.name
    assert one.differences(other) == ["transform"]
    assert set(of("te-current").differences(of("ao-tensorwise"))) == {"recipe"}


def test_a_recipe_needs_its_rules():
    with pytest.raises(ConfigError, match="--recipe: given nvfp4, allowed: None, or with the rules"):
        Config.make(recipe="nvfp4")
    with pytest.raises(ConfigError, match=r"--recipe: given \.\./x, allowed: a recipe's name"):
        Config.make(recipe="../x", site="products=float8")


def test_a_row_of_ones_own_is_recorded_with_its_rules(monkeypatch):
    mine = Recipe("mine", "", "", operands={"products": "mxfp4"}, loss_scale=8.0)
    monkeypatch.setitem(library.RECIPES, "mine", mine)
    config = of("mine", dataset="boston")
    assert (config.name, config.loss_scale, of(mine, dataset="boston")) == ("boston-mine-42", 8.0, config)
    assert config_of(flags_of(config)) == config
    assert of("mine", loss_scale=1.0).loss_scale == 1.0
    assert config_of(flags_of(of("mine", loss_scale=1.0))).loss_scale == 1.0
    text = config.to_json()
    monkeypatch.undo()
    again = Config.from_json(text)  # where nobody knows the row
    assert (again, again.folder_name) == (config, config.folder_name)
    assert runs.rounded(again).startswith("mine; ")
    monkeypatch.setitem(library.RECIPES, "swalp", Recipe("swalp", "", "", operands={"products": "mxfp4"}))
    assert settings_of(RECIPES["swalp"]).keys() == {"recipe", "site"}
    assert FLAGS["swalp"]["precision"] == "bfp8_row"


# Runs


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore:momentum. states of fewer than 4096 numbers stay in float32:UserWarning")
@pytest.mark.filterwarnings("error")
def test_every_recipe_trains(cli, name):
    # 8-bit Adam diverges at 0.01, and so does torchao's on the same data: docs/recipes.md.
    rate = 0.001 if name == "adam8bit" else 0.01
    flags = ("--dataset", "digits", "--test-split", 0.6, "--batch-size", 64, "--learning-rate", rate)
    ran = cli(*flags, "--recipe", name, "--wandb", "disabled")
    assert ran.status == 0, ran.err
    assert ran.metrics[-1]["training_loss"] < ran.metrics[0]["training_loss"]
    boston = cli("--dataset", "boston", "--recipe", name, "--wandb", "disabled")
    assert boston.status == 0, boston.err
    assert "warning" not in (ran.err + boston.err).replace("UserWarning", "")
    if RECIPES[name].operands:
        assert ran.folder.name.startswith(f"digits-{name}-42-")
        assert ran.config["recipe"] == name
        assert ran.summary["rules"] == rules_of(RECIPES[name])


@pytest.mark.parametrize("name", OF_OPERANDS)
def test_python_and_the_shell_give_the_same_bits(name):
    x, y = torch.randn(40, 13), torch.randn(40, 1)

    def trained(rounded) -> list[torch.Tensor]:
        model = models.build("mlp", (13,), 1, 3)
        optimizer = rounded(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.loss_scale.scale(F.mse_loss(model(x), y)).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    def shell(model, optimizer):
        config = of(name, dataset="boston", model="mlp", optimizer="adamw", seed=3)
        return quant.round_run(config, model, optimizer).optimizer

    def python(model, optimizer):
        lp.quantize_model(model, recipe=name, seed=3)
        return lp.quantize_optimizer(optimizer, model)

    for one, other in zip(trained(shell), trained(python), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_a_sweep_over_recipes_and_its_report(cli, tmp_path, capsys):
    words = ["--dataset", "boston", "--recipe", "nvfp4,mxfp8,none", "--epochs", "1", "--transform", ";wgrad=none"]
    assert len(sweep.grid(words)[0]) == 4  # of mxfp8 and of no recipe, wgrad has no transform anyway
    assert sweep.main([*words, "--site", ";dgrad.errors=nvfp4,wgrad.errors=nvfp4", "--jobs", "1"][:6]) == 0
    configs = [run.config for run in runs.read([tmp_path / "runs"]).runs]
    assert sorted(config.name for config in configs) == ["boston-float32-42", "boston-mxfp8-42", "boston-nvfp4-42"]
    path = tmp_path / "kept.csv"
    runs.save(runs.read([tmp_path / "runs"]).runs, path)
    assert [run.config.folder_name for run in runs.read([path]).runs] == [c.folder_name for c in configs]
    names = runs.names(runs.settings_of(runs.read([path]).runs))
    assert names == ["float32", "mxfp8", "nvfp4"] or set(names) == {"float32", "mxfp8", "nvfp4"}


def test_reports_say_what_differs_from_the_recipe():
    assert runs.rounded(of("nvfp4")) == "nvfp4"
    assert runs.rounded(of("nvfp4", site="wgrad.errors=nvfp4")) == "nvfp4; wgrad.errors nvfp4 nearest"
    assert runs.rounded(of("nvfp4", site="wgrad.errors=float32")) == "nvfp4; wgrad.errors float32"
    assert runs.rounded(of("nvfp4", site="output/*=float32")) == "nvfp4; output/* float32"
    assert runs.rounded(of("nvfp4", transform="none")) == "nvfp4; no transform of wgrad"
    assert runs.rounded(of("nvfp4", transform="dgrad=hadamard8")) == "nvfp4; hadamard8 of dgrad"


def test_wrong_recipes_are_one_line(cli):
    is_refused(cli("--recipe", "nvpf4"), "--recipe: given nvpf4 (did you mean nvfp4?)")
    is_refused(cli("--recipe", "nvfp4", "--site", "dgrad.error=nvfp4"), "did you mean dgrad.errors?")
    is_refused(cli("--recipe", "adam8bit", "--optimizer", "sgd"), "--site: given momentum.exp_avg", "--recipe adam8bit")
    is_refused(cli("--dataset", "boston", "--recipe", "nvfp4", "--backend", "qtorch"), "--backend: given qtorch")
    is_refused(cli("--dataset", "boston", "--recipe", "nvfp4", "--site", "head/*=float32"), "--site: given head/*")


# The page


def test_the_page_has_each_recipe_as_it_is_listed():
    sections = dict(re.findall(r"^### (\S+)\n\n```text\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL))
    assert sections == {name: described(row) for name, row in library.RECIPES.items()}
    for name, text in sections.items():
        assert text in recipes.table(), name


def test_the_page_has_the_table_of_operands():
    table = PAGE.split("<!-- operands -->\n")[1].split("\n<!-- end -->")[0]
    assert table == recipes.operands_table()


def test_the_pages_python_runs():
    names: dict = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(code, names)
    try:
        assert str(names["model"].low_precision.scheme.rules["forward.inputs"]) == "mxfp4:nearest"
    finally:
        library.RECIPES.pop("mxfp4-forward", None)


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("--site", "dgrad.weights=forward.inputs", "allowed: forward.weights, forward.weights>FORMAT[:ROUNDING], or"),
        ("--site", "products=float8@33x", "allowed: [PATTERN/]SITE=FORMAT[:ROUNDING] with the group tensor, row,"),
        ("--site", "weights=float8:stoch", "with the rounding nearest,"),
        ("--transform", "wgrad=hadamard17", "(did you mean hadamard16?), allowed: [PRODUCT=]none or"),
    ],
)
def test_a_wrong_text_beside_a_recipe_is_named_alone_and_says_why(flag, text, expected):
    """And not with the recipe's own texts, which nobody wrote."""
    with pytest.raises(ConfigError) as refusal:
        config_of(["--recipe", "nvfp4", flag, text])
    assert (refusal.value.setting, refusal.value.value) == (flag, text)
    assert expected in str(refusal.value)
