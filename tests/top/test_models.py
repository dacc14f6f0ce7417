"""The models: shapes, sizes, structure, and initial weights that depend on the seed alone."""

import math

import pytest
import torch
from torch import nn

import models
from data import DATASETS
from low_precision.errors import SettingError
from settings.config import MODEL_NAMES


def parameters(model):
    return sum(p.numel() for p in model.parameters())


FITTING = [
    (name, dataset)
    for name in MODEL_NAMES
    for dataset in DATASETS
    if name != "gpt" and DATASETS[dataset].task != "language"
    if len(DATASETS[dataset].shape) == 3 or name in ("linear", "mlp")
]


@pytest.mark.parametrize(("name", "dataset"), FITTING)
def test_every_model_reads_every_set_that_it_is_for(name, dataset):
    spec = DATASETS[dataset]
    model = models.build(name, spec.shape, spec.outputs, seed=0)
    output = model(torch.randn(5, *spec.shape))
    assert (output.shape, output.dtype) == ((5, spec.outputs), torch.float32)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_config_names_the_models_that_there_are():
    assert set(MODEL_NAMES) == set(models.MODELS)


def test_sizes():
    assert parameters(models.build("linear", (13,), 1, 0)) == 14
    assert parameters(models.build("linear", (1, 8, 8), 10, 0)) == 650
    assert parameters(models.build("mlp", (30,), 2, 0)) == 30 * 128 + 128 + 128 * 128 + 128 + 128 * 2 + 2


def test_size_of_resnet20():
    widths, inside, expected = [16] * 3 + [32] * 3 + [64] * 3, 16, 3 * 16 * 9
    for width in widths:
        expected += 2 * inside + inside * width * 9 + 2 * width + width * width * 9  # bn, conv, bn, conv
        expected += inside * width if inside != width else 0  # the shortcut's 1x1 convolution
        inside = width
    expected += 2 * 64 + 64 * 10 + 10
    model = models.build("resnet20", (3, 32, 32), 10, 0)
    assert parameters(model) == expected == 272_282
    on_the_path = [m for m in model.modules() if isinstance(m, nn.Linear) or getattr(m, "kernel_size", None) == (3, 3)]
    assert len(on_the_path) == 20


def test_resnet20_is_preactivated():
    """bn, ReLU, convolution, in this order and twice; nothing after the addition: a block may give negative values."""
    torch.manual_seed(0)
    for block, stride in ((models._Block(4, 4, 1), 1), (models._Block(4, 8, 2), 2)):
        for bn in (block.bn1, block.bn2):
            nn.init.uniform_(bn.weight, 0.5, 2)
            nn.init.normal_(bn.bias)
        x = torch.randn(6, 4, 8, 8)
        y = nn.functional.batch_norm(x, None, None, block.bn1.weight, block.bn1.bias, training=True)
        y = nn.functional.conv2d(y.clamp(min=0), block.conv1.weight, stride=stride, padding=1)
        y = nn.functional.batch_norm(y, None, None, block.bn2.weight, block.bn2.bias, training=True)
        y = nn.functional.conv2d(y.clamp(min=0), block.conv2.weight, padding=1)
        around = x if stride == 1 else nn.functional.conv2d(x, block.shortcut.weight, stride=2)
        output = block(x)
        torch.testing.assert_close(output, around + y)
        assert (output < 0).any()


def test_resnet20_shrinks_where_its_comments_say():
    model = models.build("resnet20", (3, 32, 32), 10, 0)
    shapes = {}
    for name in ("conv", "stage1", "stage2", "stage3"):
        getattr(model, name).register_forward_hook(lambda m, i, o, name=name: shapes.update({name: tuple(o.shape[1:])}))
    model(torch.randn(2, 3, 32, 32))
    assert shapes == {"conv": (16, 32, 32), "stage1": (16, 32, 32), "stage2": (32, 16, 16), "stage3": (64, 8, 8)}


def test_resnet20_starts_from_he_weights():
    model = models.build("resnet20", (3, 32, 32), 10, 0)
    weight = model.stage3[2].conv2.weight.detach()
    expected, n = math.sqrt(2 / (64 * 9)), weight.numel()
    # the deviation of a sample deviation is about sigma / sqrt(2 n)
    assert abs(float(weight.std()) - expected) < 5 * expected / math.sqrt(2 * n)
    assert abs(float(weight.mean())) < 5 * expected / math.sqrt(n)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_initial_weights_depend_on_the_seed_alone(name):
    shape = (16,) if name == "gpt" else (1, 8, 8)
    first = models.build(name, shape, 10, 1).state_dict()
    torch.manual_seed(99)
    torch.rand(7)
    again, other = models.build(name, shape, 10, 1).state_dict(), models.build(name, shape, 10, 2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_seed_is_set_right_before_the_model_is_built():
    torch.manual_seed(7)
    layer = nn.Linear(13, 1)
    assert torch.equal(models.build("linear", (13,), 1, 7).linear.weight, layer.weight)


def test_a_name_that_is_none_leads_to_the_nearest():
    with pytest.raises(
        SettingError, match=r"resnet2 \(did you mean resnet20\?\), allowed: linear, .*FILE\.py:FUNCTION"
    ):
        models.build("resnet2", (3, 32, 32), 10, 0)
