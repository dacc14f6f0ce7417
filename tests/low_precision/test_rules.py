"""Rules as texts: what is printed is what is taken, and errors say in fields what was given and what is allowed."""

import copy
import itertools
import pickle

import pytest

import low_precision as lp
from low_precision import rules
from low_precision.errors import SettingError, nearest, shown
from low_precision.formats import ALIASES, BLOCKS, FLOAT32, NAMED, format_named
from low_precision.rounding import FewBits, Overflow, Rounding, rounding_named
from low_precision.rules import ALL_SITES, SITES, Rule, check_rules, is_there, rule_of, site_rule

ANY_WIDTH = ["e2m0", "e8m23", "e4m3", "fixed8.4", "fixed2.0", "fixed25.126s", "bfp2", "bfp24_row", "bfp8_column"]
FORMATS = [format_named(name) for name in (*NAMED, *BLOCKS, *ANY_WIDTH)]
ROUNDINGS = [*Rounding, *(FewBits(bits, half) for bits in (1, 4, 23) for half in (False, True))]


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_what_is_printed_is_what_is_taken(rounding):
    """Also at a site. float32 is not rounded: its rounding goes unsaid."""
    assert rounding_named(str(rounding)) == rounding
    for format in FORMATS:
        rule = Rule(format, rounding)
        for back in (rule_of(str(rule)), rule_of(str(rule), "up"), site_rule(f"weights={rule}", "down")[1]):
            assert back.format == format
            assert format == FLOAT32 or back == rule
        assert str(rule_of(str(rule))) == str(rule)


def test_a_rule_is_a_text_a_format_or_a_rule():
    stochastic = Rule(NAMED["float8"], Rounding.STOCHASTIC)
    assert rule_of("float8:stochastic") == rule_of(NAMED["float8"], "stochastic") == rule_of(stochastic) == stochastic
    assert rule_of("float8", FewBits(4, True)) == rule_of("float8:stochastic:4:half")
    assert rule_of("float8") == rule_of("float8", Rounding.NEAREST) == Rule(NAMED["float8"], Rounding.NEAREST)
    assert rule_of(stochastic, "up") == stochastic
    assert rule_of(BLOCKS["nvfp4"]).format is BLOCKS["nvfp4"]
    for alias, name in ALIASES.items():
        assert rule_of(alias) == rule_of(name)
    for wrong in (8, None, Rounding.UP, ["float8"]):
        with pytest.raises(TypeError, match=r"allowed: FORMAT\[:ROUNDING\]"):
            rule_of(wrong)


def test_sites_and_their_rules():
    assert site_rule("accumulator=float16:stochastic:4") == ("accumulator", rule_of("float16:stochastic:4"))
    assert site_rule("errors=half", "up") == ("errors", rule_of("fp16:up"))
    assert (set(ALL_SITES) | set(rules.ADDED_SITES)) == set(SITES)
    for site in SITES:  # what is in float32 is not rounded, but an accumulator in float32 exists
        assert is_there(site, rule_of("float8"))
        assert is_there(site, rule_of("float32")) == (site in rules.ADDED_SITES)


# Errors

SATURATE, INFINITY = Overflow.SATURATE, Overflow.INFINITY
WRONG = [
    # call, setting, value, a word that is allowed, the nearest
    (lambda: format_named("float9"), "format", "float9", "bfloat16", "float8"),
    (lambda: format_named("mxfp8"), "format", "mxfp8", "nvfp4", "mxfp4"),
    (lambda: format_named("?"), "format", "?", "eXmY", None),
    (lambda: rounding_named("stohastic"), "rounding", "stohastic", "stochastic:R", "stochastic"),
    (lambda: rounding_named(""), "rounding", "''", "nearest_away", None),
    (lambda: rounding_named("stochastic:24"), "rounding", "stochastic:24", "1<=R<=23", "stochastic"),
    (lambda: rounding_named("stochastic:4:"), "rounding", "stochastic:4:", ":half", "stochastic"),
    (lambda: rule_of("float8:nerest"), "rounding", "nerest", "nearest", "nearest"),
    (lambda: rule_of("float8:"), "rounding", "''", "nearest", None),
    (lambda: rule_of("flaot16:up"), "format", "flaot16", "float16", "float16"),
    (lambda: rule_of("float8", "nearset"), "rounding", "nearset", "nearest", "nearest"),
    (lambda: site_rule("wieghts=float8"), "site", "wieghts=float8", "SITE=FORMAT[:ROUNDING]", "weights"),
    (lambda: site_rule("weights"), "site", "weights", "SITE=FORMAT[:ROUNDING]", None),
    (lambda: site_rule("weights=float7"), "format", "float7", "float8", "float8"),
    (lambda: check_rules({"gradient": rule_of("fp16")}, SATURATE), "site", "gradient", "errors", "gradients"),
    (lambda: check_rules({"errors": rule_of("float8")}, INFINITY), "overflow", "infinity", "saturate", None),
    (
        lambda: check_rules({"compensation": rule_of("fp16")}, SATURATE),
        "site",
        "compensation",
        "weights",
        None,
    ),
    (lambda: FewBits(0), "random bits", "0", "1 .. 23", None),
    (lambda: lp.LossScale("dynamc"), "loss scale", "'dynamc'", "dynamic", "dynamic"),
    (lambda: lp.quantize([], "float9"), "format", "float9", "float8", "float8"),
]


@pytest.mark.parametrize(("call", "setting", "value", "allowed", "near"), WRONG, ids=itertools.count())
def test_errors_carry_fields(call, setting, value, allowed, near):
    with pytest.raises(SettingError) as caught:
        call()
    error = caught.value
    assert isinstance(error, ValueError)
    assert (error.setting, error.value, error.nearest) == (setting, value, near)
    assert allowed in error.allowed
    hint = f" (did you mean {near}?)" if near else ""
    assert str(error) == f"{setting}: given {value}{hint}, allowed: {error.allowed}{error.note}"
    assert len(str(error).splitlines()) == 1


def test_an_error_survives_pickling_and_copying():
    """As it must where it comes from another process."""
    error = SettingError("format", "float9", "float8, float16", "float8", "; this and that")
    error.note += "!"
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert (back.setting, back.value, back.allowed, back.nearest) == error.args[:4]
        assert back.note == "; this and that!"
        assert str(back) == str(error)
    assert str(SettingError(None, "3", "4")) == "given 3, allowed: 4"


def test_words_are_shown_on_one_line_and_the_nearest_is_near():
    assert [shown(text) for text in ("float8", "", " x", "a\nb", 3)] == ["float8", "''", "' x'", r"'a\nb'", "3"]
    assert nearest("weihgts", SITES) == "weights"
    assert nearest("zzz", SITES) is None
    assert nearest(7, SITES) is None
