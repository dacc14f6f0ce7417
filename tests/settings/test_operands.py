"""The operand sites among the settings: --site, --quantize, and what they are called."""

import pytest

from low_precision.rules import OPERANDS
from settings.config import Config, ConfigError


def test_products_stand_for_all_six():
    together = Config.make(site="products=mxfp8_e4m3")
    apart = Config.make(site=tuple(f"{site}=mxfp8_e4m3" for site in OPERANDS))
    chosen = Config.make(quantize="products", precision="mxfp8_e4m3")
    assert together.rules() == apart.rules() == chosen.rules()
    assert list(together.rules()) == list(OPERANDS)
    assert together.folder_name == apart.folder_name
    assert together.folder_name != Config.make().folder_name


def test_a_later_line_wins():
    first = Config.make(site=("products=float8", "wgrad.errors=bfloat16")).rules()
    assert str(first["wgrad.errors"]) == "bfloat16:nearest"
    assert str(first["wgrad.inputs"]) == "float8:nearest"
    last = Config.make(site=("wgrad.errors=bfloat16", "products=float8")).rules()
    assert {str(rule) for rule in last.values()} == {"float8:nearest"}


def test_all_is_what_it_was():
    assert not set(Config.make(precision="float8").rules()) & {*OPERANDS, "elementwise"}


def test_elementwise_is_a_site():
    by_site = Config.make(precision="float8", site="elementwise=bfloat16").rules()
    assert str(by_site["elementwise"]) == "bfloat16:nearest"
    chosen = Config.make(precision="bfloat16", quantize="weights,elementwise").rules()
    assert {site: str(rule) for site, rule in chosen.items()} == dict.fromkeys(
        ("weights", "elementwise"), "bfloat16:nearest"
    )


def test_the_json_and_a_choice_of_sites():
    config = Config.make(precision="float8", quantize="weights,forward.inputs,products", site="dgrad.errors=float16")
    assert Config.from_json(config.to_json()) == config
    assert list(config.rules()) == ["weights", *OPERANDS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": "forward.inptus=float8"}, r"did you mean forward.inputs\?"),
        ({"site": "product=float8"}, r"did you mean products\?"),
        ({"site": "wgrad.weights=float8"}, "--site: given wgrad.weights=float8"),
        ({"quantize": "weights,dgrad"}, "--quantize: given weights,dgrad"),
        ({"site": "products=float8", "backend": "qtorch"}, "no operands"),
        ({"site": "elementwise=float8", "backend": "qtorch"}, "no elementwise"),
        ({"site": "products=float8", "overflow": "infinity"}, "forward.inputs: float8 has no infinity"),
    ],
)
def test_bad_ones_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config.make(**settings)
