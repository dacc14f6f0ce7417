"""The data sets: what they hold, how they are split and scaled, against scikit-learn and plain loops."""

import numpy as np
import pytest
import torch
from run_helpers import CIFAR10_FILES, write_cifar10
from sklearn.model_selection import train_test_split

import data
from data import DATASETS, load

BUNDLED = [name for name, spec in DATASETS.items() if not spec.own_split]
REGRESSION = [name for name in BUNDLED if DATASETS[name].task == "regression"]


def by_hand(name, scale_on, test_split=0.2, seed=42):
    """Rows split by scikit-learn and scaled with mean and deviation, in float64."""
    x, y = DATASETS[name].rows()
    train, test = train_test_split(np.arange(len(x)), test_size=test_split, random_state=seed)

    def scaled(column):
        fitted = column if scale_on == "all" else column[train]
        deviation = fitted.std(axis=0)
        return (column - fitted.mean(axis=0)) / np.where(deviation < 1e-12, 1, deviation)

    x = scaled(x)
    if DATASETS[name].task == "regression":
        y = scaled(y)
    return x[train], y[train], x[test], y[test]


@pytest.mark.parametrize("scale_on", ["train", "all"])
@pytest.mark.parametrize("name", BUNDLED)
def test_rows_are_split_and_scaled(name, scale_on):
    spec, split = DATASETS[name], load(name, scale_on=scale_on)
    x, y, test_x, test_y = by_hand(name, scale_on)
    assert split.train_x.shape == (len(x), *spec.shape)
    assert split.test_x.shape == (len(test_x), *spec.shape)
    # float32 rounding of values up to 25 or so: half a unit in the last place, and float64's own noise before it
    for ours, theirs in ((split.train_x, x), (split.test_x, test_x)):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.reshape(len(theirs), -1).numpy(), theirs, rtol=1e-6, atol=1e-6)
    for ours, theirs in ((split.train_y, y), (split.test_y, test_y)):
        if spec.task == "regression":
            assert (ours.dtype, ours.shape) == (torch.float32, (len(theirs), 1))
            np.testing.assert_allclose(ours[:, 0].numpy(), theirs, rtol=1e-6, atol=1e-6)
        else:
            assert (ours.dtype, ours.shape) == (torch.int64, (len(theirs),))
            assert (ours.numpy() == theirs).all()
            assert 0 <= ours.min() <= ours.max() == spec.outputs - 1
    assert split.image_scale is None
    assert torch.equal(split.features(split.train_x, torch.Generator()), split.train_x)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_table_says_how_many_rows_there_are(name):
    split = load(name)
    assert len(split.train_x) + len(split.test_x) == DATASETS[name].samples
    assert len(split.test_x) == -(-DATASETS[name].samples // 5)  # a fifth, rounded up


def test_sizes_of_the_published_experiments():
    assert {name: len(load(name).test_x) for name in REGRESSION} == {"toy": 3, "diabetes": 89, "boston": 102}


@pytest.mark.parametrize("name", BUNDLED)
def test_scaled_on_the_training_rows_these_have_mean_0_and_deviation_1(name):
    x = load(name).train_x.double().flatten(1)
    deviation = x.std(0, correction=0)
    assert x.mean(0).abs().max() < 1e-6
    assert ((deviation - 1).abs() < 1e-6).logical_or(deviation == 0).all()  # 0: a pixel that is always the same


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize("scale_on", ["train", "all"])
def test_target_deviation_leads_back_to_the_sets_own_units(name, scale_on):
    split = load(name, scale_on=scale_on)
    targets = DATASETS[name].rows()[1]
    scaled = torch.cat([split.train_y, split.test_y]).double() * split.target_deviation
    assert float(scaled.max() - scaled.min()) == pytest.approx(targets.max() - targets.min(), rel=1e-6)


def test_toy_is_the_line():
    x, y = data.toy()
    assert x.tolist() == [[i] for i in range(11)]
    assert y.tolist() == [2 * i + 1 for i in range(11)]


def test_boston_is_boston():
    """Facts of the published table: Harrison and Rubinfeld 1978, as in StatLib."""
    x, y = data.boston()
    assert x[0].tolist() == [0.00632, 18, 2.31, 0, 0.538, 6.575, 65.2, 4.09, 1, 296, 15.3, 396.9, 4.98]
    assert (y.min(), y.max(), (y == 50).sum(), x[:, 3].sum()) == (5, 50, 16, 35)
    assert y.mean() == pytest.approx(22.5328, abs=5e-5)


def test_the_seed_decides_the_split_and_nothing_else_does():
    first, again, other = load("diabetes", seed=1), load("diabetes", seed=1), load("diabetes", seed=2)
    assert torch.equal(first.train_x, again.train_x)
    assert not torch.equal(first.train_x, other.train_x)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002  the global generator that scikit-learn would fall back to
    assert torch.equal(first.test_y, load("diabetes", seed=1).test_y)


@pytest.mark.parametrize(("share", "kept"), [(1e-9, 1), (0.5, 6), (0.9, 10)])
def test_the_test_split_is_rounded_up(share, kept):
    assert len(load("toy", test_split=share).test_x) == kept


def slow_augment(images, generator, padding):
    """Pixel by pixel, from the same draws."""
    n, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator).tolist()
    mirrored = torch.rand(n, 1, generator=generator).tolist()
    moved = torch.zeros_like(images)
    for i in range(n):
        for row in range(height):
            for column in range(width):
                from_row = row + top[i][0] - padding
                from_column = (width - 1 - column if mirrored[i][0] < 0.5 else column) + left[i][0] - padding
                if 0 <= from_row < height and 0 <= from_column < width:
                    moved[i, :, row, column] = images[i, :, from_row, from_column]
    return moved


@pytest.mark.parametrize(("shape", "padding"), [((9, 3, 8, 8), 4), ((5, 1, 6, 9), 2), ((4, 2, 5, 5), 0)])
def test_augment_moves_and_mirrors_whole_images(shape, padding):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 1  # no pixel is 0: what comes in is seen
    before = images.clone()
    fast = data.augment(images, torch.Generator().manual_seed(3), padding)
    assert torch.equal(fast, slow_augment(images, torch.Generator().manual_seed(3), padding))
    assert torch.equal(images, before)
    assert not torch.equal(fast, data.augment(images, torch.Generator().manual_seed(4), padding))


def test_augment_reaches_every_place_evenly():
    n = 9000
    images = torch.zeros(n, 1, 9, 9)
    images[:, :, 4, 4] = 1.0  # the centre, which mirroring leaves in place
    moved = data.augment(images, torch.Generator().manual_seed(0)).sum((0, 1))
    assert moved.sum() == n
    p = 1 / 81
    assert ((moved - n * p).abs() < 5.5 * (n * p * (1 - p)) ** 0.5).all()  # a false alarm in 10**6, of 81 counts
    images = torch.zeros(n, 1, 1, 3)
    images[..., 0] = 1.0
    right = data.augment(images, torch.Generator().manual_seed(1), padding=0)[..., 2].sum()
    assert abs(float(right) - n / 2) < 5 * (n / 4) ** 0.5


@pytest.mark.parametrize("scale_on", ["train", "all"])
def test_cifar10_is_scaled_by_channel(tmp_path, scale_on):
    batches = write_cifar10(tmp_path)
    split = load("cifar10", scale_on=scale_on, data_dir=str(tmp_path))
    train = np.concatenate([pixels for _, pixels in batches[:5]]).astype(np.float64)
    test = batches[5][1].astype(np.float64)
    fitted = np.concatenate([train, test]) if scale_on == "all" else train
    mean, deviation = fitted.mean((0, 2, 3), keepdims=True), fitted.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(split.features(split.train_x).numpy(), (train - mean) / deviation, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(split.features(split.test_x).numpy(), (test - mean) / deviation, rtol=1e-6, atol=2e-6)
    assert split.train_y.tolist() == [int(label) for labels, _ in batches[:5] for label in labels]
    assert split.test_y.tolist() == batches[5][0].tolist()
    assert (split.train_x.dtype, split.train_y.dtype) == (torch.uint8, torch.int64)
    augmented = data.augment(split.train_x, torch.Generator().manual_seed(1))
    assert torch.equal(split.features(split.train_x, torch.Generator().manual_seed(1)), split.features(augmented))


def test_cifar10_of_one_colour_is_scaled_to_zero(tmp_path):
    for name in CIFAR10_FILES:
        (tmp_path / name).write_bytes(bytes([3] + [7] * 3072) * 2)
    split = load("cifar10", data_dir=str(tmp_path))
    assert not split.features(split.train_x).any()
