"""Rules as texts: what is printed is what is taken, and errors say in fields what was given and what is allowed."""

import copy
import itertools
import pickle
import re

import pytest
import torch

import low_precision as lp
from low_precision import rules
from low_precision.errors import MOST_SHOWN, SettingError, nearest, shown
from low_precision.formats import ALIASES, BLOCKS, FLOAT32, NAMED, format_named
from low_precision.rounding import FewBits, Overflow, Rounding, overflow_named, rounding_named
from low_precision.rules import (
    ALL_SITES,
    COUNTS,
    SITES,
    STATES,
    Rule,
    check_rules,
    effective,
    in_order,
    is_site,
    is_there,
    momentum_rule,
    rule_of,
    site_rule,
    state_of,
)

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
    assert {*ALL_SITES, *rules.ADDED_SITES, rules.ELEMENTWISE} == set(SITES)
    for site in SITES:  # what is in float32 is not rounded, but an accumulator in float32 exists
        assert is_there(site, rule_of("float8"))
        assert is_there(site, rule_of("float32")) == (site in rules.ADDED_SITES)


# momentum.NAME: one state of the optimizer


def test_a_state_of_the_optimizer_is_a_site():
    for name in ("momentum.exp_avg_sq", "momentum.momentum_buffer", "momentum.whatever_2", "momentum.état"):
        assert is_site(name)
        assert state_of(name) == name.removeprefix("momentum.")
        assert site_rule(f"{name}=bfloat16:up") == (name, rule_of("bfloat16:up"))
        check_rules({name: rule_of("float8")}, Overflow.SATURATE)
    for wrong in (
        "momentum.",
        "momentum.a b",
        "momentum.a.b",
        "momentum.2",
        "momentum.a-b",
        " momentum.a",
        "Momentum.a",
    ):
        assert not is_site(wrong)
    for wrong in ("weights.a", ".a", "", 3, None, ("momentum",)):
        assert not is_site(wrong)
    assert [state_of(site) for site in SITES] == [None] * len(SITES)


def test_a_states_rule_goes_before_momentums():
    wide, narrow = rule_of("bfloat16"), rule_of("float8")
    both = {"momentum": narrow, "momentum.exp_avg_sq": wide}
    assert momentum_rule(both, "exp_avg_sq") is wide
    assert momentum_rule(both, "exp_avg") is narrow
    assert momentum_rule({"momentum.exp_avg_sq": wide}, "exp_avg") is None
    assert momentum_rule({}, "exp_avg") is None


def test_the_order_of_sites():
    made = in_order({"momentum.b", "accumulator", "momentum", "weights", "momentum.a", "gradients"})
    assert made == ["weights", "gradients", "momentum", "momentum.a", "momentum.b", "accumulator"]
    assert in_order(reversed(SITES)) == list(SITES)


@pytest.mark.parametrize(
    ("made", "left"),
    [
        ({}, {}),
        ({"weights": "float32"}, {}),
        ({"accumulator": "float32", "weights": "float8"}, {"weights": "float8", "accumulator": "float32"}),
        ({"momentum.a": "float8"}, {"momentum.a": "float8"}),
        ({"momentum.a": "float32"}, {}),  # nothing is rounded anyway
        ({"momentum": "float32", "momentum.a": "float32"}, {}),
        ({"momentum.a": "float32", "momentum": "float8"}, {"momentum": "float8", "momentum.a": "float32"}),
        ({"momentum": "float8", "momentum.a": "float8"}, {"momentum": "float8"}),
        ({"momentum": "float8", "momentum.a": "float8:up"}, {"momentum": "float8", "momentum.a": "float8:up"}),
    ],
)
def test_the_rules_that_make_a_difference(made, left):
    effective_rules = effective({site: rule_of(spec) for site, spec in made.items()})
    assert list(effective_rules.items()) == [(site, rule_of(spec)) for site, spec in left.items()]


def states_of(kind: type[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """The tensors that it keeps of a matrix and of a vector, by their names, in all variants that it has."""
    states: dict[str, torch.Tensor] = {}
    for variant in ({}, {"amsgrad": True}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True}):
        for shape in ((2, 3), (3,)):
            p = torch.nn.Parameter(torch.randn(shape))
            try:
                optimizer = kind([p], lr=0.1, **variant)
            except (TypeError, ValueError):  # it has no such variant, or takes no vectors
                continue
            p.grad = torch.randn(shape)
            optimizer.step()
            states |= {name: value for name, value in optimizer.state[p].items() if torch.is_tensor(value)}
    return states


def test_the_states_and_counts_are_those_of_torchs_optimizers():
    others = (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)  # a closure; sparse gradients: as Adam
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and kind not in others]
    kinds = [kind for kind in kinds if issubclass(kind, torch.optim.Optimizer)]
    assert len(kinds) > 10
    states = {name: value for kind in kinds for name, value in states_of(kind).items()}
    assert states.keys() >= {*STATES, *COUNTS}
    assert {name for name, value in states.items() if value.ndim == 0} == {*COUNTS}
    assert all(is_site(f"momentum.{name}") == (name not in COUNTS) for name in states)


# Errors

SATURATE, INFINITY = Overflow.SATURATE, Overflow.INFINITY
WRONG = [
    # call, setting, value, a word that is allowed, the nearest
    (lambda: format_named("float9"), "format", "float9", "bfloat16", "float8"),
    (lambda: format_named("mxfp8"), "format", "mxfp8", "nvfp4", "mxfp8_e4m3"),
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
    (lambda: site_rule("momentum.step=fp16"), "site", "momentum.step=fp16", "momentum.NAME", None),
    (lambda: site_rule("momentun.exp_avg=fp16"), "site", "momentun.exp_avg=fp16", "weights", "momentum.exp_avg"),
    (lambda: site_rule("exp_avg=fp16"), "site", "exp_avg=fp16", "momentum.NAME", "momentum.exp_avg"),
    (lambda: site_rule("sum=fp16"), "site", "sum=fp16", "momentum.NAME", "momentum.sum"),
    (lambda: site_rule("momentum.=fp16"), "site", "momentum.=fp16", "momentum.NAME", "momentum"),
    (lambda: site_rule(" weights=fp16"), "site", "' weights=fp16'", "momentum.NAME", "weights"),
    (lambda: check_rules({"momentum.eta": rule_of("fp16")}, SATURATE), "site", "momentum.eta", "momentum.NAME", None),
    (lambda: check_rules({"momentum.sum ": rule_of("fp16")}, SATURATE), "site", "'momentum.sum '", "", "momentum.sum"),
    (lambda: check_rules({"momentum.x": rule_of("float8")}, INFINITY), "overflow", "infinity", "momentum.x", None),
    (lambda: check_rules({3: rule_of("fp16")}, SATURATE), "site", "3", "weights", None),
    (lambda: overflow_named("infinty"), "overflow", "infinty", "saturate, propagate, infinity", "infinity"),
    (lambda: overflow_named("Saturate"), "overflow", "Saturate", "saturate, propagate, infinity", "saturate"),
    (lambda: overflow_named(""), "overflow", "''", "saturate", None),
    (lambda: rounding_named(" Nearest"), "rounding", "' Nearest'", "nearest", "nearest"),
    (lambda: rounding_named("stochastic:٣"), "rounding", "stochastic:٣", "stochastic:R", "stochastic"),
    (lambda: format_named("e4m٣"), "format", "e4m٣", "eXmY", None),
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
    (lambda: FewBits("4"), "random bits", "'4'", "1 .. 23", None),
    (lambda: FewBits(4, "half"), "half_offset", "'half'", "True", None),
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


NO_NAMES = (None, 3, 1.5, True, b"nearest", ["nearest"], {}, ("float8", "up"), object, 10**5000, torch.zeros(2, 2))


@pytest.mark.parametrize("value", NO_NAMES, ids=[type(value).__name__ for value in NO_NAMES])
@pytest.mark.parametrize(
    ("call", "word"),
    [
        (format_named, "a BlockFormat, or a name: float32"),
        (rounding_named, "nearest_away"),
        (overflow_named, "saturate, propagate, infinity"),
        (rule_of, "FORMAT[:ROUNDING]"),
        (lambda value: rule_of("float8", value), "nearest_away"),
        (lambda value: rule_of(NAMED["float8"], value), "nearest_away"),
        (lambda value: Rule(value, Rounding.UP), "rule_of takes texts"),
        (lambda value: Rule(NAMED["float8"], value), "rule_of takes texts"),
        (lambda value: check_rules({"weights": value}, Overflow.SATURATE), "rule_of makes one"),
        (site_rule, "SITE=FORMAT[:ROUNDING]"),
    ],
    ids=itertools.count(),
)
def test_a_value_of_another_type_is_named_in_one_line(call, word, value):
    with pytest.raises(TypeError) as caught:
        call(value)
    line = str(caught.value)
    assert re.search("given .+, allowed: ", line)
    assert word in line
    assert len(line.splitlines()) == 1


def test_a_rule_is_not_made_of_texts():
    with pytest.raises(TypeError, match="rule: format: given 'float8', allowed: a Format"):
        Rule("float8", Rounding.UP)
    with pytest.raises(TypeError, match="rule: rounding: given 'up', allowed: a Rounding"):
        Rule(NAMED["float8"], "up")


def test_members_and_formats_stand_for_themselves():
    for rounding in ROUNDINGS:
        assert rounding_named(rounding) is rounding
    for overflow in Overflow:
        assert overflow_named(overflow) is overflow is overflow_named(overflow.value)
    for format in FORMATS:
        assert format_named(format) is format


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
    assert nearest(10**5000, SITES) is None
    assert "more digits than Python writes" in shown(10**5000)
    assert shown("x" * 10**6) == "x" * MOST_SHOWN + "..."
    assert (shown("8", repr), shown(8, repr), shown("8")) == ("'8'", "8", "8")
