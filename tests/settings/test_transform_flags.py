"""--transform, and operands that name another one, as flags: Config, hash, command line, sweeps."""

import pytest

import sweep
from low_precision.recipe import Recipe
from low_precision.recipes import RECIPES
from settings.config import Config, ConfigError
from settings.flags import config_of, flags_of
from settings.recipes import with_recipe

NAMED = ("dgrad.weights=forward.weights>mxfp4", "wgrad.inputs=forward.inputs")


def test_a_run_without_one_keeps_its_name():
    assert Config.make().folder_name == Config.make(transform="none").folder_name
    assert "transform" not in Config.make()._decisive()
    assert Config.make(transform="none").transform == ()


def test_what_decides_is_in_the_hash():
    texts = ["hadamard16", "wgrad=hadamard16", "wgrad=hadamard16:fixed", "wgrad=hadamard16:random"]
    names = {Config.make(site="products=float8", transform=text).folder_name for text in texts}
    assert len(names) == len(texts)
    both = Config.make(transform=("hadamard16", "forward=none", "dgrad=none"))
    assert both.folder_name == Config.make(transform="wgrad=hadamard16").folder_name
    assert both.differences(Config.make()) == ["transform"]


def test_the_seed_of_signs_is_one_of_noise():
    for text, decides in (("hadamard16:fixed", False), ("hadamard16", False), ("hadamard32:fixed", True)):
        first, second = (Config.make(transform=text, rounding_seed=seed).folder_name for seed in (1, 2))
        assert (first != second) == decides


def test_flags_and_back():
    words = ["--transform", "hadamard16:fixed", "--transform", "wgrad=hadamard32:random", "--site", NAMED[0]]
    config = config_of(words)
    assert config.transform == ("hadamard16:fixed", "wgrad=hadamard32:random")
    assert config_of(flags_of(config)) == config == Config.from_json(config.to_json())
    assert str(config.rules()["dgrad.weights"]) == "forward.weights>mxfp4:nearest"
    assert config_of(["--transform", "wgrad=hadamard16,dgrad=none"]).transform == ("wgrad=hadamard16", "dgrad=none")


def test_references_are_lines_and_rules():
    config = Config.make(site=("products=mxfp8_e4m3", *NAMED, "fc/dgrad.weights=forward.weights"))
    assert str(config.rules()["wgrad.inputs"]) == "forward.inputs"
    assert [str(line) for line in config.lines()] == ["fc/dgrad.weights=forward.weights"]
    assert config.folder_name != Config.make(site=("products=mxfp8_e4m3", *NAMED)).folder_name
    stochastic = Config.make(rounding="stochastic", site="dgrad.weights=forward.weights>float8")
    assert str(stochastic.rules()["dgrad.weights"]) == "forward.weights>float8:stochastic"
    other_noise = Config.make(rounding="stochastic", site="dgrad.weights=forward.weights>float8", rounding_seed=5)
    assert other_noise.folder_name != stochastic.folder_name


def test_a_semicolon_parts_the_values_of_a_sweep():
    runs, _ = sweep.grid(["--transform", "none;wgrad=hadamard16:fixed,dgrad=hadamard32;hadamard16:random"])
    assert [run.transform for run in runs] == [
        (),
        ("wgrad=hadamard16:fixed", "dgrad=hadamard32"),
        ("hadamard16:random",),
    ]


def test_an_explicit_one_wins_over_a_recipes(monkeypatch):
    transforms = {"wgrad": "hadamard16:fixed", "dgrad": "hadamard32"}
    row = Recipe("rotated", "", "", operands={"products": "nvfp4"}, transforms=transforms)
    monkeypatch.setitem(RECIPES, "rotated", row)
    for explicit, expected in {
        "wgrad=none": {"dgrad": "hadamard32"},
        "none": {},
        "hadamard8": dict.fromkeys(("forward", "dgrad", "wgrad"), "hadamard8"),
        "forward=hadamard4": {"forward": "hadamard4", "dgrad": "hadamard32", "wgrad": "hadamard16:fixed"},
    }.items():
        config = Config.make(**with_recipe("rotated", {"transform": explicit}))
        assert {product: str(transform) for product, transform in config.transforms().items()} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transform": "hadamard12"}, r"--transform: given hadamard12"),
        ({"transform": "wgrad=hadamrd16"}, "did you mean hadamard16"),
        ({"transform": ("wgrad=hadamard16", "wgrad=none")}, r"\(wgrad stands there twice\)"),
        ({"transform": ("hadamard16", "none")}, r"\(one without a PRODUCT stands there twice\)"),
        ({"transform": "hadamard16", "backend": "qtorch"}, "qtorch has no operands"),
        ({"site": "dgrad.weights=forward.inputs"}, "--site: given dgrad.weights=forward.inputs"),
        ({"site": ("wgrad.errors=dgrad.errors", "dgrad.errors=wgrad.errors")}, "neither has numbers of its own"),
    ],
)
def test_bad_ones_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config.make(**settings)
