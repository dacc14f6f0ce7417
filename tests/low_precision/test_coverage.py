"""lp.coverage and print(model) say what really happens."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import equal_bits

import low_precision as lp

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return F.relu(self.norm(self.layer(x))) @ self.weight


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def table(model: nn.Module) -> dict[tuple[str, str, str], tuple[str, int]]:
    return {(row.module, row.function, row.tensor): (row.rule, row.times) for row in lp.coverage(model).rows}


def test_each_operand_and_function_has_its_rule():
    model = lp.quantize_model(Model(), weights="float8", inputs="bfloat16", **{"wgrad.errors": "float16:stochastic"})
    model(X)
    assert table(model) == {
        ("layer", "", "forward.inputs"): ("bfloat16:nearest", 1),
        ("layer", "", "forward.weights"): ("float8:nearest", 1),
        ("layer", "", "wgrad.errors"): ("float16:stochastic", 1),
        ("layer", "", "wgrad.inputs"): ("bfloat16:nearest", 1),
        ("layer", "", "activations"): ("not rounded", 1),
        ("norm", "batch_norm", "elementwise"): ("not rounded", 1),
        ("", "relu", "elementwise"): ("not rounded", 1),
        ("", "matmul", "forward.inputs"): ("bfloat16:nearest", 1),
        ("", "matmul", "forward.weights"): ("float8:nearest", 1),
        ("", "matmul", "dgrad.errors"): ("not rounded", 1),
        ("", "matmul", "dgrad.weights"): ("float8:nearest", 1),
        ("", "matmul", "wgrad.errors"): ("float16:stochastic", 1),
        ("", "matmul", "wgrad.inputs"): ("bfloat16:nearest", 1),
        ("", "matmul", "activations"): ("not rounded", 1),
    }
    said = lp.coverage(model).sentence()
    assert said == "operands of products: dgrad.errors; results of products (2), batch_norm, relu"


def test_the_table_is_read_by_people():
    model = lp.quantize_model(nn.Sequential(nn.Linear(8, 8)), inputs="float8")
    model(X)
    head, first, *_ = str(lp.coverage(model)).splitlines()
    assert head.split() == ["module", "function", "tensor", "rule", "times"]
    assert first.split() == ["0", "(Linear)", "-", "forward.inputs", "float8:nearest", "1"]


def test_a_pass_that_is_made_to_look_leaves_nothing_behind():
    """Buffers, random states, counts and the first pass are as they were."""
    torch.manual_seed(0)
    states = []
    for looks in (False, True):
        torch.manual_seed(1)
        model = lp.quantize_model(nn.Sequential(Model(), nn.Dropout()), products="float8:stochastic", seed=1)
        if looks:
            assert lp.coverage(model, X).rows
            with pytest.raises(ValueError, match="was not called yet"):
                lp.coverage(model)
        y = model(X)
        states.append([y, *(buffer for buffer in model.buffers() if buffer.is_floating_point())])
    assert equal_bits(*states)


def test_of_a_model_whose_weights_alone_are_rounded():
    model = lp.quantize_model(Model(), weights="float8")
    model(X)
    with pytest.raises(ValueError, match=r"coverage\(model, \*inputs\) calls it"):
        lp.coverage(model)
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    rules = {row.tensor: row.rule for row in lp.coverage(model, X).rows}
    assert rules["forward.weights"] == "float8:nearest"
    assert rules["forward.inputs"] == "not rounded"
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


def test_a_model_that_is_not_rounded_has_none():
    with pytest.raises(ValueError, match="this model is not rounded"):
        lp.coverage(nn.Linear(2, 2), X)


def test_of_wrapped_models():
    model = nn.DataParallel(lp.quantize_model(Model(), inputs="float8"))
    model(X)
    assert lp.coverage(model).rows == lp.coverage(model.module).rows


def test_products_that_no_site_reaches_are_in_it():
    class Sparse(Model):
        def forward(self, x):
            return torch.ops.aten.mm(self.layer(x), self.weight)

    model = lp.quantize_model(Sparse(), inputs="float8")
    with pytest.warns(UserWarning, match="not rounded: mm in Sparse"):
        model(X)
    assert ("", "mm", "forward.inputs") in table(model)
    assert "mm" not in {row.function for row in lp.coverage(model).rows if row.rule != "not rounded"}


def test_print_shows_the_functions_of_the_first_pass():
    model = lp.quantize_model(Model(), inputs="float8", activations="bfloat16", **{"forward.weights": "float16"})
    assert "matmul" not in str(model)
    model(X)
    line = next(line for line in str(model).splitlines() if "matmul" in line)
    of_inputs = "forward.inputs=float8:nearest, forward.weights=float16:nearest, wgrad.inputs=float8:nearest"
    assert line.strip() == f"matmul: {of_inputs}, activations=bfloat16:nearest"
    model(X)
    assert str(model).count("matmul") == 1
    lp.remove(model)
    assert "matmul" not in str(model)


def test_print_shows_elementwise_where_it_is_and_not_at_products():
    model = lp.quantize_model(Model(), elementwise="bfloat16", inputs="float8")
    model(X)
    assert "elementwise" not in str(model.layer)
    assert "batch_norm: elementwise=bfloat16:nearest" in str(model.norm)


def test_a_first_pass_that_is_interrupted_leaves_no_hooks_behind():
    class Interrupted(Model):
        stops = True

        def forward(self, x):
            y = super().forward(x)
            if self.stops:
                raise KeyboardInterrupt
            return y

    model = lp.quantize_model(Interrupted(), inputs="float8")
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.children()]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(X)
    model.stops = False
    model(X)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.children()] == hooks
    assert {row.times for row in lp.coverage(model).rows} == {1}


def test_a_module_that_is_named_as_a_function_begins():
    model = nn.Sequential()
    model.add_module("e", nn.Embedding(5, 8))
    model.add_module("d", nn.Dropout(0.5))
    model.add_module("layer", nn.Linear(8, 8))
    lp.quantize_model(model, inputs="float8", weights="float8", activations="float8", errors="float8")
    model(torch.tensor([1, 2]))
    assert {row.function for row in lp.coverage(model).rows if row.module in ("e", "d")} == {"embedding", "dropout"}
    assert lp.coverage(model).sentence() == "results of embedding, dropout"
