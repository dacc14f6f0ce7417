"""Operands that name another operand, against the products written out in plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import equal_bits

import low_precision as lp
from low_precision.rules import Reference, Rule, rule_at, rule_of, site_line, site_rule

pytestmark = pytest.mark.usefixtures("one_thread")


def q(x, fmt, dim=-1):
    return lp.quantize(x.detach(), fmt, dim=dim)


def run(layer, x, error):
    """y, dx, dW."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(error)
    return [y.detach(), x.grad, layer.weight.grad]


def case():
    torch.manual_seed(0)
    return (
        nn.Linear(48, 40, bias=False),
        torch.randn(36, 48) * 10.0 ** torch.randint(-3, 3, (36, 48)),
        torch.randn(36, 40),
    )


FORWARD = {"forward.inputs": "mxfp8_e4m3", "forward.weights": "mxfp4"}


def test_the_very_numbers_of_the_forward_product():
    layer, x, e = case()
    model = lp.quantize_model(
        copy.deepcopy(layer), **FORWARD, **{"dgrad.weights": "forward.weights", "wgrad.inputs": "forward.inputs"}
    )
    w = layer.weight
    read_w, read_x = q(w, "mxfp4", 1), q(x, "mxfp8_e4m3", 1)
    assert equal_bits(run(model, x, e), [F.linear(read_x, read_w), e @ read_w, e.t() @ read_x])


def test_they_are_rounded_again_along_the_other_sum():
    layer, x, e = case()
    sites = FORWARD | {"dgrad.weights": "forward.weights>mxfp6_e2m3", "wgrad.inputs": "forward.inputs>float8"}
    model = lp.quantize_model(copy.deepcopy(layer), **sites)
    read_w, read_x = q(layer.weight, "mxfp4", 1), q(x, "mxfp8_e4m3", 1)
    expected = [F.linear(read_x, read_w), e @ q(read_w, "mxfp6_e2m3", 0), e.t() @ q(read_x, "float8")]
    assert equal_bits(run(model, x, e), expected)


@pytest.mark.parametrize(("site", "named"), [("wgrad.errors", "dgrad.errors"), ("dgrad.errors", "wgrad.errors")])
def test_errors_one_direction_at_a_time(site, named):
    layer, x, e = case()
    model = lp.quantize_model(copy.deepcopy(layer), **{named: "mxfp8_e4m3", site: f"{named}>bfloat16"})
    first = q(e, "mxfp8_e4m3", 1 if named == "dgrad.errors" else 0)
    again = q(first, "bfloat16")
    of_x, of_w = (first, again) if named == "dgrad.errors" else (again, first)
    assert equal_bits(run(model, x, e)[1:], [of_x @ layer.weight.detach(), of_w.t() @ x])


def test_an_operand_without_a_rule_is_the_stored_tensor():
    layer, x, e = case()
    model = lp.quantize_model(copy.deepcopy(layer), **{"dgrad.weights": "forward.weights>float8"})
    assert equal_bits(run(model, x, e)[:2], [layer(x).detach(), e @ q(layer.weight, "float8")])


def test_the_noise_is_that_of_the_named_operand():
    layer, x, _e = case()
    kept = {"forward.weights": "float8:stochastic", "forward.inputs": "float8:stochastic"}
    plain = lp.quantize_model(copy.deepcopy(layer), seed=3, **kept)
    y = plain(torch.eye(48))  # reads the identity exactly, so what comes out are the rounded weights
    with_reference = lp.quantize_model(copy.deepcopy(layer), seed=3, **kept, **{"dgrad.weights": "forward.weights"})
    x = torch.eye(48).requires_grad_()
    again = with_reference(x)
    again.backward(torch.eye(48)[:, :40])
    assert equal_bits([again.detach()], [y.detach()])
    assert equal_bits([x.grad[:40]], [y.t().detach()])
    assert not equal_bits([y.t().detach()], [layer.weight.detach()])


def test_a_second_rounding_has_noise_of_its_own():
    layer, x, e = case()
    sites = {"forward.weights": "bfloat16:stochastic", "dgrad.weights": "forward.weights>float8:stochastic"}
    first, second = (run(lp.quantize_model(copy.deepcopy(layer), seed=seed, **sites), x, e)[1] for seed in (3, 4))
    assert not equal_bits([first], [second])


@pytest.mark.parametrize("frozen", ["weights", "inputs"])
def test_where_only_one_gradient_is_needed_the_named_operand_is_rounded_all_the_same(frozen):
    layer, x, e = case()
    for site, named in (("wgrad.errors", "dgrad.errors"), ("dgrad.errors", "wgrad.errors")):
        model = lp.quantize_model(copy.deepcopy(layer), seed=1, **{named: "float8:stochastic", site: named})
        both = run(copy.deepcopy(model), x, e)
        if frozen == "weights":
            model.weight.requires_grad_(False)
            assert equal_bits(run(model, x, e)[1:2], both[1:2])
        else:
            model(x).backward(e)
            assert equal_bits([model.weight.grad], both[2:])


def test_convolutions():
    torch.manual_seed(2)
    layer, x = nn.Conv2d(8, 12, 3, groups=2, bias=False), torch.randn(5, 8, 7, 7)
    sites = {"forward.weights": "mxfp4", "dgrad.weights": "forward.weights"}
    sites |= {"forward.inputs": "mxfp8_e4m3", "wgrad.inputs": "forward.inputs"}
    model = lp.quantize_model(copy.deepcopy(layer), **sites)
    read_x = q(x, "mxfp8_e4m3", 1).requires_grad_()
    read_w = q(layer.weight, "mxfp4", 1).requires_grad_()
    y = F.conv2d(read_x, read_w, groups=2)
    e = torch.randn_like(y)
    y.backward(e)
    assert equal_bits(run(model, x, e), [y.detach(), read_x.grad, read_w.grad])


class Scores(nn.Module):
    def forward(self, q, k):
        return q @ k.mT


def test_a_product_of_two_inputs_takes_the_rule_where_there_is_no_such_operand():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, 8, requires_grad=True)
    sites = {"dgrad.errors": "float8", "wgrad.errors": "dgrad.errors>e2m1"}
    y = lp.quantize_model(
        Scores(), **{"wgrad.inputs": "forward.inputs", "forward.inputs": "float8"}, layers={"*": sites}
    )(a, b)
    e = torch.randn_like(y)
    y.backward(e)
    errors = q(q(e, "float8"), "e2m1")
    assert equal_bits([y.detach()], [q(a, "float8") @ q(b, "float8").mT])
    assert equal_bits([a.grad, b.grad], [errors @ q(b, "float8"), errors.mT @ q(a, "float8")])


def test_gradients_of_gradients_pass_straight_through():
    layer, x, _e = case()
    sites = {"forward.weights": "float8", "dgrad.weights": "forward.weights>bfloat16", "wgrad.errors": "dgrad.errors"}
    model = lp.quantize_model(copy.deepcopy(layer), **sites)
    x = x[:4].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    gradient.sum().backward()
    assert model.weight.grad.isfinite().all()
    assert model.weight.grad.abs().sum() > 0


def test_texts():
    for text in ("forward.weights", "forward.weights>mxfp8_e4m3:stochastic"):
        rule = rule_at("dgrad.weights", text)
        assert isinstance(rule, Reference)
        assert isinstance(rule, Rule)
        assert str(rule) == text
        assert rule_at("dgrad.weights", str(rule)) == rule == rule_at("dgrad.weights", rule)
    assert str(site_line("b.*/wgrad.errors=dgrad.errors>float8")) == "b.*/wgrad.errors=dgrad.errors>float8:nearest"
    assert site_rule("dgrad.weights=forward.weights>float32")[1] == Reference.to("forward.weights")
    assert str(site_rule("dgrad.weights=forward.weights>float8", "up")[1]) == "forward.weights>float8:up"
    assert Reference.to("forward.weights", rule_of("float8")) != rule_of("float8")


@pytest.mark.parametrize(
    ("site", "text", "allowed"),
    [
        ("dgrad.weights", "forward.inputs", "allowed: forward.weights, forward.weights>FORMAT"),
        ("dgrad.weights", "forward.weight", "did you mean forward.weights"),
        ("dgrad.weights", "forward.weights>", "format"),
        ("dgrad.weights", "forward.weights>forward.inputs", "format"),
        ("forward.weights", "dgrad.weights", "of operands, dgrad.weights may name forward.weights"),
        ("products", "forward.weights", "of operands"),
        ("weights", "forward.weights", "of operands"),
        ("*", "dgrad.errors", "of operands"),
    ],
)
def test_what_may_not_be_named(site, text, allowed):
    with pytest.raises(lp.SettingError, match=allowed):
        rule_at(site, text)


def test_a_circle_is_an_error():
    with pytest.raises(lp.SettingError, match="neither has numbers of its own"):
        lp.quantize_model(nn.Linear(2, 2), **{"wgrad.errors": "dgrad.errors", "dgrad.errors": "wgrad.errors"})
    with pytest.raises(lp.SettingError, match="neither has numbers of its own"):
        lp.quantize_model(
            nn.Sequential(nn.Linear(2, 2)),
            **{"wgrad.errors": "dgrad.errors"},
            layers={"0": {"dgrad.errors": "wgrad.errors>float8"}},
        )
    with pytest.raises(lp.SettingError, match="operands of products alone"):
        lp.Quantize(Reference.to("forward.weights"))


def test_lines_coverage_and_print_show_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lp.quantize_model(
        model, products="float8", layers={"1": {"dgrad.weights": "forward.weights>bfloat16", "dgrad.errors": None}}
    )
    assert "dgrad.weights=forward.weights>bfloat16:nearest" in repr(model[1])
    assert "forward.weights>" not in repr(model[0])
    model(torch.zeros(2, 4)).sum().backward()
    rows = {(row.module, row.tensor): row.rule for row in lp.coverage(model).rows}
    assert rows["1", "dgrad.weights"] == "forward.weights>bfloat16:nearest"
