"""The data sets: tensors, scaled and split. A new one is a function and a row of `DATASETS`.

Nothing heavy is imported before a set is loaded: the command line reads the table alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from low_precision.errors import SettingError, nearest, shown

if TYPE_CHECKING:
    import numpy as np
    import torch

BOSTON = Path(__file__).parent / "sources" / "boston.csv"


@dataclass(frozen=True)
class DataSet:
    """A row of the table. `rows`: () -> features float64 (n, d), targets float64 (n,) or classes int64 (n,).

    task, samples, shape and outputs are None where only loading tells; those of `Data.spec` never are.
    """

    rows: Callable[[], tuple[np.ndarray, np.ndarray]] | None
    task: str | None  # "regression" or "classification"
    samples: int | None
    shape: tuple[int, ...] | None  # of one sample, as the model reads it
    outputs: int | None  # of the model: 1, or the number of classes
    model: str  # where --model is not given
    own_split: str | None = None  # for a set that comes split

    @property
    def layout(self) -> torch.memory_format:
        """How samples lie in memory: images pixel by pixel, in which convolutions run faster."""
        import torch

        return torch.channels_last if len(self.shape or ()) == 3 else torch.contiguous_format


@dataclass(frozen=True)
class Data:
    """A set, split: features (n, *shape); targets float32 (n, 1) or classes int64 (n,).

    Features are float32, scaled; or uint8 images, a quarter of that in memory, each batch of which `features` scales.
    """

    spec: DataSet  # with nothing left open
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    target_deviation: float = 1.0  # what one unit of a scaled regression target is in the set's own units
    image_scale: tuple[torch.Tensor, torch.Tensor] | None = None  # of uint8: mean and deviation, float32 (1, c, 1, 1)

    def to(self, device: torch.device, layout: torch.memory_format) -> Data:
        """The same on that device, the features in that layout."""
        x = {name: getattr(self, name).to(device, memory_format=layout) for name in ("train_x", "test_x")}
        return replace(self, **x, train_y=self.train_y.to(device), test_y=self.test_y.to(device))

    def features(
        self, rows: torch.Tensor, noise: torch.Generator | None = None, part: slice = slice(None)
    ) -> torch.Tensor:
        """What the model reads of this part of these rows of train_x or test_x: float32, on their device.

        noise: for training; images are cropped and flipped with it, the same whatever the part.
        """
        if self.image_scale is None:
            return rows[part]
        images = rows[part] if noise is None else augment(rows, noise, part=part)
        mean, deviation = (t.to(rows.device) for t in self.image_scale)
        return images.float().sub_(mean).div_(deviation)


def toy() -> tuple[np.ndarray, np.ndarray]:
    """y = 2x + 1 at x = 0 .. 10."""
    import numpy as np

    x = np.arange(11, dtype=np.float64)
    return x[:, None], 2 * x + 1


def boston() -> tuple[np.ndarray, np.ndarray]:
    """Harrison and Rubinfeld 1978: 506 x 13, median home values in 1000 dollars (README says what is wrong with it)."""
    import numpy as np

    table = np.loadtxt(BOSTON, delimiter=",", skiprows=1)
    return table[:, :-1], table[:, -1]


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    """Efron et al. 2004: 442 x 10, disease progression after a year."""
    from sklearn.datasets import load_diabetes

    return load_diabetes(return_X_y=True)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Alpaydin and Kaynak 1998: 1797 8x8 images of handwritten digits."""
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Wolberg et al. 1995: 569 x 30, malignant (0) or benign (1)."""
    from sklearn.datasets import load_breast_cancer

    return load_breast_cancer(return_X_y=True)


DATASETS: dict[str, DataSet] = {
    "toy": DataSet(toy, "regression", 11, (1,), 1, "linear"),
    "boston": DataSet(boston, "regression", 506, (13,), 1, "linear"),
    "diabetes": DataSet(diabetes, "regression", 442, (10,), 1, "linear"),
    "digits": DataSet(digits, "classification", 1797, (1, 8, 8), 10, "cnn"),
    "breast_cancer": DataSet(breast_cancer, "classification", 569, (30,), 2, "mlp"),
    "cifar10": DataSet(None, "classification", 60000, (3, 32, 32), 10, "resnet20", own_split="50,000 + 10,000"),
}


def spec_of(name: str) -> DataSet:
    """The row of that name. SettingError for a name that is not known."""
    if name in DATASETS:
        return DATASETS[name]
    raise SettingError("dataset", shown(name), ", ".join(DATASETS), nearest(name, DATASETS))


@cache
def _rows(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Kept, as a sweep loads the same set once for each run; nobody writes to it."""
    return spec_of(name).rows()


def load(
    name: str, test_split: float = 0.2, seed: int = 42, scale_on: str = "train", data_dir: str | None = None
) -> Data:
    """The set of that name, its features and regression targets standardized: mean 0, deviation 1.

    The scalers are fitted on the training rows, or with scale_on "all" on every row before the split. CIFAR-10 comes
    split, as uint8, and each of its channels is scaled as a whole. Raises what reading, or for cifar10 downloading,
    raises.
    """
    if name == "cifar10":
        return _cifar10(scale_on, data_dir)
    import torch
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    spec = spec_of(name)
    x, y = _rows(name)
    if spec.task == "regression":
        y = y[:, None]
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=test_split, random_state=seed)
    scaler = StandardScaler().fit(x if scale_on == "all" else train_x)
    train_x, test_x = scaler.transform(train_x), scaler.transform(test_x)
    deviation = 1.0
    if spec.task == "regression":
        scaler = StandardScaler().fit(y if scale_on == "all" else train_y)
        train_y, test_y = scaler.transform(train_y), scaler.transform(test_y)
        deviation = float(scaler.scale_[0])

    def features(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rows).float().reshape(-1, *spec.shape)

    def targets(rows: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(rows)
        return tensor.float() if spec.task == "regression" else tensor.long()

    return Data(spec, features(train_x), targets(train_y), features(test_x), targets(test_y), deviation)


def _cifar10(scale_on: str, data_dir: str | None) -> Data:
    import torch

    from sources import cifar10

    train_x, train_y, test_x, test_y = map(torch.from_numpy, cifar10.load(data_dir))
    fitted = [train_x, test_x] if scale_on == "all" else [train_x]
    # Counts of each byte value in each channel: mean and deviation exact, without a float64 copy of the set.
    counts = sum(torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(3)]) for images in fitted)
    share, value = counts.double() / counts.sum(1, keepdim=True), torch.arange(256.0, dtype=torch.float64)
    mean = share @ value
    deviation = (share @ value**2 - mean**2).sqrt()
    deviation[deviation == 0] = 1.0  # as StandardScaler does

    shift, scale = (t.float().view(1, 3, 1, 1) for t in (mean, deviation))
    return Data(DATASETS["cifar10"], train_x, train_y, test_x, test_y, image_scale=(shift, scale))


def augment(
    images: torch.Tensor, generator: torch.Generator, padding: int = 4, part: slice = slice(None)
) -> torch.Tensor:
    """Each image moved by up to `padding` pixels either way (black comes in) and mirrored every other time.

    images: uint8 (n, c, h, w) -> new tensor, same, in the layout channels_last. One draw for each image, on the CPU
    whatever the device; only those in `part` are returned. The usual augmentation of CIFAR-10 (He et al. 2016, 4.2).
    """
    import torch

    n, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)[:, part]
    mirrored = torch.rand(n, 1, generator=generator)[part] < 0.5
    images = images[part]
    n = len(images)
    columns = torch.arange(width)
    columns = torch.where(mirrored, width - 1 - columns, columns) + left  # (n, w)
    rows = torch.arange(height) + top  # (n, h)
    index = [i.to(images.device) for i in (torch.arange(n), rows, columns)]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    moved = padded.permute(0, 2, 3, 1)[index[0][:, None, None], index[1][:, :, None], index[2][:, None, :]]
    return moved.permute(0, 3, 1, 2)
