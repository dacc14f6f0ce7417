"""Rules of single modules: lines PATTERN/SITE=RULE in a Scheme, and layers={pattern: rules} of quantize_model."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from training_helpers import batch, equal_bits, holds, small, train

import low_precision as lp
from low_precision.errors import SettingError
from low_precision.formats import NAMED
from low_precision.layers import LayerRounding
from low_precision.model import LowPrecision
from low_precision.rounding import Overflow
from low_precision.rules import Line, covers, rule_of, site_line
from low_precision.scheme import Scheme

pytestmark = pytest.mark.usefixtures("one_thread")

NOISY = "float8:stochastic"
STORED = {"weights": NOISY, "inputs": NOISY, "activations": NOISY, "errors": NOISY, "accumulator": "float16:stochastic"}


def scheme(rules: dict[str, str], *lines: str, **settings) -> Scheme:
    made = tuple(site_line(line) for line in lines)
    return Scheme({site: rule_of(rule) for site, rule in rules.items()}, lines=made, **settings)


def rules(made: Scheme, module: str) -> dict[str, str]:
    return {site: str(rule) for site, rule in made.of(module).rules.items()}


# Lines


@pytest.mark.parametrize(
    ("pattern", "covered", "others"),
    [
        ("head", ["head", "head.fc", "head.fc.deeper"], ["", "heads", "body.head", "body"]),
        ("blocks.*", ["blocks.0", "blocks.11.fc"], ["blocks", "", "xblocks.0"]),
        ("blocks.1", ["blocks.1", "blocks.1.fc"], ["blocks.11", "blocks"]),
        ("*.fc", ["a.fc", "a.b.fc.inner"], ["fc", "a.fcx"]),
        ("block[02].fc?", ["block0.fc1", "block2.fcx.a"], ["block1.fc1", "block0.fc"]),
        ("*", ["", "a", "a.b"], []),
        ("", ["", "a", "a.b"], []),
        ("Head", ["Head"], ["head"]),
    ],
)
def test_a_pattern_means_modules_and_all_that_is_in_them(pattern, covered, others):
    assert [name for name in covered if not covers(pattern, name)] == []
    assert [name for name in others if covers(pattern, name)] == []


def test_a_line_is_cut_at_the_first_equals_sign_and_the_last_slash():
    line = site_line("a/b*/momentum.exp_avg=float8:stochastic:4")
    assert line == Line("a/b*", "momentum.exp_avg", rule_of("float8:stochastic:4"))
    assert site_line(str(line)) == line
    assert site_line("*=half", "up") == Line(None, "*", rule_of("fp16:up"))
    assert site_line("weights=half") == Line(None, "weights", rule_of("half"))
    assert site_line("fc/products=float8").left_side == "fc/products"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fc/wieghts=float8", ["did you mean weights?", "fc/wieghts=float8", "[PATTERN/]SITE="]),
        ("fc/=float8", ["fc/=float8"]),
        ("/weights=float8", ["[PATTERN/]SITE=FORMAT[:ROUNDING]"]),
        ("fc/weights", ["[PATTERN/]SITE=FORMAT[:ROUNDING]"]),
        ("fc/weights=float7", ["format: given float7", "float8"]),
        ("fc/momentum.step=float8", ["step is a count"]),
    ],
)
def test_a_bad_line_is_named(text, words):
    with pytest.raises(SettingError) as caught:
        site_line(text)
    assert [word for word in words if word not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) == 1


# The rules of a module


def test_lines_apply_in_order_over_the_rules():
    made = scheme(
        {"weights": "float8", "inputs": "float8"},
        "a/weights=bfloat16",
        "a.b/*=fp16",
        "a.b.c/inputs=float32",
        "*.last/products=mxfp4",
        "*.last/wgrad.errors=bfloat16",
    )
    everywhere = {"weights": "float8:nearest", "inputs": "float8:nearest"}
    assert rules(made, "other") == everywhere
    assert rules(made, "a") == everywhere | {"weights": "bfloat16:nearest"}
    assert rules(made, "a.b") == {"weights": "fp16:nearest", "inputs": "fp16:nearest"}
    assert rules(made, "a.b.c") == {"weights": "fp16:nearest"}
    last = rules(made, "x.last")
    assert last["forward.weights"] == "mxfp4:nearest"
    assert last["wgrad.errors"] == "bfloat16:nearest"
    assert len(last) == 8


def test_a_later_line_wins_however_wide_its_pattern_is():
    made = scheme({"weights": "float8"}, "a/weights=bfloat16", "*/weights=fp16")
    assert rules(made, "a") == {"weights": "fp16:nearest"}
    made = scheme({"weights": "float8"}, "a/weights=bfloat16", "weights=fp16")  # for the whole model
    assert rules(made, "a") == {"weights": "fp16:nearest"}


def test_a_star_stands_for_what_has_a_rule_so_far():
    made = scheme({"weights": "float8"}, "a/inputs=float8", "a/*=bfloat16", "a/errors=fp16")
    assert rules(made, "a") == {"weights": "bfloat16:nearest", "inputs": "bfloat16:nearest", "errors": "fp16:nearest"}
    # What is left alone still has its sites, for a later line.
    made = scheme({"weights": "float8", "inputs": "float8"}, "a/*=float32", "a.b/*=bfloat16")
    assert rules(made, "a") == {}
    assert rules(made, "a.b") == {"weights": "bfloat16:nearest", "inputs": "bfloat16:nearest"}
    assert made.leaves_alone("a")
    assert not made.leaves_alone("a.b")
    assert not made.leaves_alone("b")


def test_in_float32_a_star_takes_a_copy_of_the_weights_away_too():
    made = scheme({"weights": "float8", "accumulator": "float32"}, "a/*=float32", "b/weights=float32")
    assert rules(made, "a") == {}
    assert rules(made, "b") == {"accumulator": "float32"}  # asked for, and there


def test_without_lines_a_scheme_is_that_of_every_module():
    made = scheme({"weights": "float8"})
    assert made.of("a") is made
    with_lines = scheme({"weights": "float8"}, "a/weights=fp16")
    assert with_lines.of("a.b") is with_lines.of("a.b")
    assert with_lines.of("a").lines == ()
    assert with_lines.of("a").of("b").rules == with_lines.of("a").rules


@pytest.mark.parametrize(
    ("rules_of_all", "lines", "overflow", "message"),
    [
        ({}, ["head/compensation=bfloat16"], "saturate", "compensation.*beside rounded weights.*in module head"),
        ({"weights": "float8", "compensation": "float32"}, ["head/weights=float32"], "saturate", "in module head"),
        ({"weights": "float8", "accumulator": "float32"}, ["head/compensation=fp16"], "saturate", "in module head"),
        ({}, ["head/weights=float8"], "infinity", r"saturate, propagate \(head/weights: float8 has no infinity\)"),
    ],
)
def test_which_rules_go_together_is_asked_for_each_module(rules_of_all, lines, overflow, message):
    model = nn.Sequential()
    model.add_module("body", nn.Linear(2, 2))
    model.add_module("head", nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SettingError, match=message):
        LowPrecision(model, scheme(rules_of_all, *lines, overflow=Overflow(overflow)))
    assert equal_bits(list(model.state_dict().values()), list(before.values()))


def test_rules_that_go_together_in_each_module_alone():
    """A compensation for the whole model stands beside weights that lines round, each in a format of its own."""
    made = scheme({"compensation": "bfloat16"}, "hidden*/weights=bfloat16", "output/weights=fp16")
    model = small()
    low = LowPrecision(model, made)
    assert len(list(low.kept())) == 6
    assert holds(model.output.weight, NAMED["fp16"])


# What comes of it in a model


def pair_of_layers() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(5)
    return nn.Linear(6, 8), nn.Linear(8, 4)


A_RULES = {"weights": "float8", "inputs": "float8", "errors": "float8"}
B_RULES = {"weights": "bfloat16", "inputs": "float8", "activations": "fp16", "accumulator": "float32"}
B_RULES |= {"forward.weights": "mxfp8_e4m3"}


def test_each_module_is_rounded_as_if_its_rules_were_a_models():
    """Against two models, one for each layer, with two optimizers: to nearest, names and noise make no difference."""
    first, second = pair_of_layers()
    lp.quantize_model(first, **A_RULES)
    lp.quantize_model(second, **B_RULES)
    adams = [torch.optim.Adam(layer.parameters(), 0.1) for layer in (first, second)]
    lp.quantize_optimizer(adams[0], first, gradients="float8", momentum="float8")
    states = {"momentum.exp_avg_sq": "bfloat16"}
    lp.quantize_optimizer(adams[1], second, gradients="fp16", momentum="float8", **states)

    whole = nn.Sequential(*pair_of_layers())
    layers = {"1": {name: B_RULES[name] for name in ("weights", "activations", "accumulator", "forward.weights")}}
    layers["1"] |= {"errors": None, "gradients": "fp16", "momentum.exp_avg_sq": "bfloat16"}
    lp.quantize_model(whole, **A_RULES, layers=layers)
    adam = torch.optim.Adam(whole.parameters(), 0.1)
    lp.quantize_optimizer(adam, whole, gradients="float8", momentum="float8")

    for step in range(4):
        torch.manual_seed(step)
        x, error = torch.randn(7, 6), torch.randn(7, 4)
        apart, together = second(first(x)), whole(x)
        assert equal_bits([apart.detach()], [together.detach()])
        apart.backward(error)
        together.backward(error)
        for optimizer in (*adams, adam):
            optimizer.step()
            optimizer.zero_grad()
    parameters = [*first.parameters(), *second.parameters()]
    assert equal_bits([p.detach() for p in parameters], [p.detach() for p in whole.parameters()])
    moments = [adams[number // 2].state[p]["exp_avg_sq"] for number, p in enumerate(parameters)]
    assert equal_bits(moments, [adam.state[p]["exp_avg_sq"] for p in whole.parameters()])
    assert set(whole.low_precision._weights.masters) == set(whole[1].parameters())


def trained(**settings) -> tuple[nn.Module, torch.optim.Optimizer, list[torch.Tensor]]:
    model = lp.quantize_model(small(), **STORED, seed=4, **settings)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    lp.quantize_optimizer(optimizer, model, gradients=NOISY, momentum="float16:stochastic")
    return model, optimizer, train(model, optimizer, range(4), evaluate=True)


def test_what_is_left_alone_is_as_what_was_not_selected():
    """Stochastically: the noise of the other modules does not move either."""
    chosen, chosen_optimizer, chosen_losses = trained(layers=["hidden*"])
    left, left_optimizer, losses = trained(layers={"output": None})
    assert equal_bits(losses, chosen_losses)
    assert str(left) == str(chosen)
    assert list(left.state_dict()) == list(chosen.state_dict())
    assert equal_bits(list(left.state_dict().values()), list(chosen.state_dict().values()))
    states = [optimizer.state_dict()["low_precision"] for optimizer in (left_optimizer, chosen_optimizer)]
    assert states[0]["accumulator"].keys() == states[1]["accumulator"].keys()
    assert states[0].pop("rules") == states[1].pop("rules") | {"output/*": "float32"}
    other, _, other_losses = trained(layers={"output": {"weights": "bfloat16"}})
    assert not equal_bits(other_losses, losses)
    assert "weights=bfloat16:nearest" in str(other.output)


def test_float32_at_every_site_one_by_one_computes_the_same():
    sites = (*STORED, "gradients", "momentum")
    _, _, losses = trained(layers={"output": None})
    one_by_one, _, same = trained(layers={"output": dict.fromkeys(sites, "float32")})
    assert equal_bits(losses, same)
    assert "accumulator=float32" in str(one_by_one.output)  # which exists where somebody asks for it


def test_print_says_what_happens_and_no_more():
    model = small()
    lp.quantize_model(model, inputs="float8", layers={"output": {"gradients": "fp16"}, "hidden2": {"inputs": None}})
    shown = {name: module.extra_repr() for name, module in model.named_modules() if isinstance(module, LayerRounding)}
    inputs = "inputs=float8:nearest"
    assert shown == {"hidden1.rounding": inputs, "output.rounding": inputs}  # no optimizer rounds a gradient yet
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lp.quantize_optimizer(optimizer, model)
    shown = {name: module.extra_repr() for name, module in model.named_modules() if isinstance(module, LayerRounding)}
    assert shown == {"hidden1.rounding": inputs, "output.rounding": f"{inputs}, gradients=fp16:nearest"}


def test_gradients_and_one_state_by_layer():
    model = small()
    lp.quantize_model(model, layers={"hidden1": {"gradients": "float8", "momentum.exp_avg_sq": "float8"}})
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    lp.quantize_optimizer(optimizer, model)
    seen = {}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
    )
    train(model, optimizer, range(2))
    rounded = {name for name, gradient in seen.items() if holds(gradient, NAMED["float8"])}
    assert rounded == {"hidden1.weight", "hidden1.bias"}
    moments = {name: optimizer.state[p] for name, p in model.named_parameters()}
    assert {name for name, m in moments.items() if holds(m["exp_avg_sq"], NAMED["float8"])} == rounded
    assert not any(holds(m["exp_avg"], NAMED["float8"]) for m in moments.values())


def test_a_state_that_the_optimizer_does_not_keep_is_named_after_the_first_step():
    model = lp.quantize_model(small(), layers={"output": {"momentum.exp_avgs": "float8"}})
    optimizer = lp.quantize_optimizer(torch.optim.Adam(model.parameters()), model)
    with pytest.raises(SettingError, match=r"momentum.exp_avgs \(did you mean momentum.exp_avg\?\)"):
        train(model, optimizer, range(1))


class _Tied(nn.Module):
    """The first and the last layer share their weight, and the two in the middle are one module with two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last.weight = self.first.weight
        self.a = self.b = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.b(self.a(self.first(x))))


def test_a_line_is_for_a_shared_module_or_parameter_by_each_of_its_names():
    model = lp.quantize_model(_Tied(), weights="float8", layers={"b": {"weights": "bfloat16"}, "last": None})
    assert holds(model.a.weight, NAMED["bfloat16"])
    assert not holds(model.a.weight, NAMED["float8"])
    assert not holds(model.first.weight, NAMED["float8"])  # it is in `last`, which is left alone
    assert holds(model.first.bias, NAMED["float8"])
    assert not holds(model.last.bias, NAMED["float8"])
    assert "weights=bfloat16" in str(model.a)
    assert str(model.first) == str(_Tied().first)  # shown by its weight
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, gradients="float8")
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    assert not holds(model.first.weight.grad, NAMED["float8"])
    assert holds(model.first.bias.grad, NAMED["float8"])


def test_what_comes_later_has_the_rules_of_its_place():
    model = small()
    lp.quantize_model(model, weights="float8", layers={"hidden2": {"weights": "bfloat16"}, "output": None})
    model.output = nn.Linear(8, 3)  # as where it was not selected
    model(batch()[0])
    model.hidden2 = nn.Linear(8, 8)
    with pytest.raises(RuntimeError, match="layer hidden2 was added"):
        model(batch()[0])
    lp.quantize_model(model)
    assert holds(model.hidden2.weight, NAMED["bfloat16"])
    assert not holds(model.hidden2.weight, NAMED["float8"])
    model(batch()[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_trains_alike(duplicate):
    made = lp.quantize_model(small(), **STORED, seed=1, layers={"hidden2": {"*": "fp16:stochastic"}, "output": None})
    results = []
    for model in (duplicate(made), made):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        lp.quantize_optimizer(optimizer, model, gradients=NOISY, momentum=NOISY)
        results.append([*train(model, optimizer, range(3)), *(p.detach() for p in model.parameters())])
    assert equal_bits(*results)


# Saved and resumed


BY_LAYER = {"hidden1": {"momentum": "fp16:stochastic"}, "hidden2": {"momentum.exp_avg": "float8:stochastic"}}


def start(layers: dict) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = lp.quantize_model(small(), **STORED, seed=4, layers=layers)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    return model, lp.quantize_optimizer(optimizer, model, gradients=NOISY, momentum="float16:stochastic")


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [optimizer.state[p][name] for p in model.parameters() for name in ("exp_avg", "exp_avg_sq")]


def test_a_resumed_training_has_the_same_bits():
    model, optimizer = start(BY_LAYER)
    train(model, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, range(2, 5))
    other, other_optimizer = start(BY_LAYER)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    assert equal_bits(train(other, other_optimizer, range(2, 5)), expected)
    assert equal_bits(moments(other, other_optimizer), moments(model, optimizer))


def test_a_saved_state_is_rounded_again_only_where_the_rule_of_its_module_has_changed():
    model, optimizer = start(BY_LAYER)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    assert saved["low_precision"]["rules"] | {"hidden2/momentum.exp_avg": NOISY} == saved["low_precision"]["rules"]
    other, changed = start({**BY_LAYER, "output": {"momentum": "float4_e2m1fn"}})
    changed.load_state_dict(copy.deepcopy(saved))
    same = list(zip(moments(model, optimizer), moments(other, changed), strict=True))
    assert all(equal_bits([before], [after]) for before, after in same[:8])  # of the two hidden layers
    assert all(holds(after, NAMED["float4_e2m1fn"]) for _, after in same[8:])
    assert not equal_bits([before for before, _ in same[8:]], [after for _, after in same[8:]])


# What is refused, and what is said


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ({"ouput": None}, SettingError, ["layers: given 'ouput' (did you mean output?)", "hidden1, relu1"]),
        ({"hiden*": {"weights": "float8"}}, SettingError, ["did you mean hidden"]),
        ({"output:linear": None}, SettingError, ["layers: given 'output:linear'"]),
        ({"output": {"wieghts": "float8"}}, SettingError, ["layers: output/wieghts", "did you mean weights?", "*"]),
        ({"output": {"weights": "float7"}}, SettingError, ["layers: output/weights: format: given float7"]),
        ({"output": {"accumulator": None}}, SettingError, ["layers: output/accumulator: given None"]),
        ({"output": "float8"}, TypeError, ["layers: output: given 'float8'", "None, or a dict"]),
        ({"output": {"weights": 8}}, TypeError, ["layers: output/weights: given 8"]),
        ({7: None}, TypeError, ["layers: given 7, allowed: name patterns"]),
    ],
    ids=str,
)
def test_bad_layers_are_refused_at_once(layers, error, words):
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error) as caught:
        lp.quantize_model(model, weights="float8", layers=layers)
    assert [word for word in words if word not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) == 1
    assert equal_bits(list(model.state_dict().values()), list(before.values()))
    assert not hasattr(model, "low_precision")


def test_a_line_outside_the_selected_layers_is_refused():
    with pytest.raises(SettingError, match=r"'output'.*one of the modules that layers select: hidden1, hidden2"):
        LowPrecision(small(), scheme({"weights": "float8"}, "output/weights=fp16"), ["hidden*"])
    LowPrecision(small(), scheme({"weights": "float8"}, "*2/weights=fp16"), ["hidden*"])


def test_qtorch_rounds_all_modules_alike():
    with pytest.raises(SettingError, match=r"backend qtorch: layers: given output/\*=float32"):
        lp.quantize_model(small(), weights="float8", backend="qtorch", layers={"output": None})


class _WithRecurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.fc = nn.RNN(4, 4), nn.Linear(4, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normed(self.fc(self.recurrent(x)[0]))


def test_what_is_left_alone_is_neither_named_nor_refused():
    left_alone = {"recurrent": None, "normed": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lp.quantize_model(_WithRecurrence(), weights="float8", products="float8", layers=left_alone)
        model(torch.randn(3, 2, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"normed .* computes its weight"):
        lp.quantize_model(_WithRecurrence(), weights="float8", layers={"recurrent": None})
    weights_only = {"recurrent": {"weights": "float8"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp.quantize_model(_WithRecurrence(), layers=weights_only)(torch.randn(3, 2, 4))


def test_a_module_that_is_gone_when_the_optimizer_comes_is_no_error():
    model = lp.quantize_model(small(), weights="float8", layers={"hidden2": {"weights": "fp16"}})
    model.hidden2 = nn.Identity()
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, gradients="float8")
    train(model, optimizer, range(1))
    assert holds(model.output.weight, NAMED["float8"])


def test_a_scheme_of_the_optimizers_own_follows_the_models_lines():
    model = small()
    low = LowPrecision(model, scheme({}, "output/*=float32"))
    optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.1), scheme=scheme({"gradients": "float8"}))
    train(model, optimizer, range(1))
    assert holds(model.hidden1.weight.grad, NAMED["float8"])
    assert not holds(model.output.weight.grad, NAMED["float8"])
    other = small()
    low = LowPrecision(other, scheme({}))
    with pytest.raises(SettingError, match="'ouput'"):
        low.attach(torch.optim.SGD(other.parameters(), 0.1), scheme=scheme({}, "ouput/*=float32"))
