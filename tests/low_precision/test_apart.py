"""How far two models are apart, against the definitions written out in NumPy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from training_helpers import batch, small, train

import low_precision as lp


def flat(model, layer, gradients=False):
    """The numbers of a Linear layer's weight and bias, or of their gradients, in one row."""
    linear = model.get_submodule(layer)
    tensors = [linear.weight, linear.bias]
    return np.concatenate([(t.grad if gradients else t).detach().double().numpy().ravel() for t in tensors])


def test_distances_and_cosines_are_those_of_their_definitions():
    model = small()
    reference = copy.deepcopy(model)
    lp.quantize_model(model, weights="float8", inputs="float8", errors="float8", rounding="stochastic", seed=1)
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, loss_scale=64.0)
    train(model, optimizer, range(5))
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.1), range(5))
    rows = lp.compare(model, reference)
    assert [row["layer"] for row in rows] == ["hidden1", "hidden2", "output"]
    for row in rows:
        ours, theirs = flat(model, row["layer"]), flat(reference, row["layer"])
        assert row["weights_distance"] == pytest.approx(
            np.linalg.norm(ours - theirs) / np.linalg.norm(theirs), rel=1e-12
        )
        ours, theirs = flat(model, row["layer"], True), flat(reference, row["layer"], True)
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert row["gradient_cosine"] == pytest.approx(cosine, rel=1e-12)
        assert 0 < row["weights_distance"] < 1
        assert 0.5 < row["gradient_cosine"] < 1


def test_a_model_and_its_copy_are_not_apart():
    model = small("cnn")
    for each in (model, reference := copy.deepcopy(model)):
        x, y = batch("cnn")
        nn.functional.cross_entropy(each(x), y).backward()
    for row in lp.compare(model, reference):
        assert row["weights_distance"] == 0
        assert row["gradient_cosine"] == pytest.approx(1, abs=1e-15)


def test_nothing_to_divide_by_is_none():
    """No gradient yet; a gradient of zeros; weights of zeros; a weight that is not finite."""
    model, reference = small(), small()
    assert [row["gradient_cosine"] for row in lp.compare(model, reference)] == [None] * 3
    with torch.no_grad():
        for p in reference.hidden1.parameters():
            p.zero_()
        model.output.weight[0, 0] = torch.inf
    for each in (model, reference):
        for p in each.parameters():
            p.grad = torch.zeros_like(p)
    rows = lp.compare(model, reference)
    assert [row["weights_distance"] is None for row in rows] == [True, False, True]
    assert [row["gradient_cosine"] for row in rows] == [None] * 3


def test_the_smallest_and_the_largest_gradients_have_a_cosine():
    model, reference = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    model.weight.grad, reference.weight.grad = torch.full((1, 2), 1e-44), torch.full((1, 2), 3e38)
    (row,) = lp.compare(model, reference)
    assert row["layer"] == ""
    assert row["gradient_cosine"] == pytest.approx(1)


def test_a_gradient_that_one_of_them_has_not_is_left_out():
    model, reference = small(), small()
    for each in (model, reference):
        for p in each.parameters():
            p.grad = torch.ones_like(p)
    model.hidden1.bias.grad = None
    reference.hidden1.bias.grad = torch.full((8,), 100.0)
    assert lp.compare(model, reference)[0]["gradient_cosine"] == pytest.approx(1)


def test_shared_parameters_are_counted_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert [row["layer"] for row in lp.compare(model, copy.deepcopy(model))] == ["0", "1"]


@pytest.mark.parametrize("other", [nn.Sequential(nn.Linear(5, 8)), small("cnn")])
def test_models_of_other_parameters_are_refused(other):
    with pytest.raises(ValueError, match=r"compare: given .*, allowed: two models with the same parameters"):
        lp.compare(small(), other)
