"""The data sets: tensors, scaled and split. A new one is a function and a row of `DATASETS`.

Nothing heavy is imported before a set is loaded: the command line reads the table alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from low_precision.errors import SettingError, nearest, shown
from sources.named_file import FORMS, NamedFile, named_file

if TYPE_CHECKING:
    import numpy as np
    import torch

TEST_SPLIT = 0.2  # share of the rows kept for testing, where nothing else is said
CONTEXT = 64  # characters of a window of text, where nothing else is said
OF_TEXT = "the last tenth is for testing"
BOSTON = Path(__file__).parent / "sources" / "boston.csv"


@dataclass(frozen=True)
class DataSet:
    """A row of the table. `rows`: () -> features float64 (n, d), targets float64 (n,) or classes int64 (n,).

    `rows` may also give a set that comes split, as `downloaded` does: training and test features and targets.
    text: in place of `rows`: --data-dir -> a text. Its samples are characters, and shape is (characters of a window,).
    task, samples, shape and outputs are None where only loading tells; those of `Data.spec` never are.
    """

    rows: Callable[[], tuple[np.ndarray, ...]] | None
    task: str | None  # "regression", "classification" or "language"
    samples: int | None
    shape: tuple[int, ...] | None  # of one sample, as the model reads it
    outputs: int | None  # of the model: 1, or the number of classes or symbols
    model: str  # where --model is not given
    own_split: str | None = None  # for a set that comes split
    downloaded: Callable[[str | None], tuple[np.ndarray, ...]] | None = None  # in place of `rows`: from --data-dir
    augmented: bool = False  # images, which training moves and mirrors
    text: Callable[[str | None], str] | None = None  # in place of `rows`: from --data-dir

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

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the model's options by which the data are made."""
        return ()

    def to(self, device: torch.device, layout: torch.memory_format) -> Data:
        """The same on that device, the features in that layout."""
        x = {name: getattr(self, name).to(device, memory_format=layout) for name in ("train_x", "test_x")}
        return replace(self, **x, train_y=self.train_y.to(device), test_y=self.test_y.to(device))

    def steps(self, batch_size: int) -> int:
        """In an epoch."""
        return math.ceil(len(self.train_x) / batch_size)

    def batch(
        self, rows: torch.Tensor, noise: torch.Generator, part: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model reads of this part of the training rows of these numbers, and their targets.

        noise: as in `features`.
        """
        return self.features(self.train_x[rows], noise, part), self.train_y[rows[part]]

    def test_batches(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All test rows, so many at a time: what the model reads, and targets."""
        for x, y in zip(self.test_x.split(rows), self.test_y.split(rows), strict=True):
            yield self.features(x), y

    def features(
        self, rows: torch.Tensor, noise: torch.Generator | None = None, part: slice = slice(None)
    ) -> torch.Tensor:
        """What the model reads of this part of these rows of train_x or test_x: float32, on their device.

        noise: for training; images are moved and mirrored with it where the row says so, the same whatever the part.
        """
        if self.image_scale is None:
            return rows[part]
        images = augment(rows, noise, part=part) if noise and self.spec.augmented else rows[part]
        mean, deviation = (t.to(rows.device) for t in self.image_scale)
        return images.float().sub_(mean).div_(deviation)


@dataclass(frozen=True)
class Text(Data):
    """A text, its end for testing. A sample is a window of `context` tokens, its targets are those one further.

    train_x, test_x: numbers of characters, int64 (n,); train_y, test_y: the same from the second one on, (n - 1,).
    A row's number says where its window begins.
    """

    symbols: str = ""  # the characters, by their numbers

    @property
    def options(self) -> tuple[str, ...]:
        return ("context",)

    @property
    def context(self) -> int:
        return (self.spec.shape or (CONTEXT,))[0]

    @property
    def windows(self) -> int:
        """The places in the training text where a window with its targets can begin."""
        return len(self.train_y) - self.context + 1

    def steps(self, batch_size: int) -> int:
        """So many that a model reads about as many characters as the training text has."""
        return max(1, len(self.train_x) // (batch_size * self.context))

    def batch(
        self, rows: torch.Tensor, noise: torch.Generator, part: slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows that begin there, and their targets: int64 (n, context) each."""
        x, y = (numbers.unfold(0, self.context, 1)[rows[part]] for numbers in (self.train_x, self.train_y))
        return x, y

    def test_batches(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Windows that follow one another, as many characters at a time as `rows` windows of CONTEXT have.

        What is left at the end, shorter than a window, is left out.
        """
        x, y = (numbers.unfold(0, self.context, self.context) for numbers in (self.test_x[:-1], self.test_y))
        count = max(1, rows * CONTEXT // self.context)
        yield from zip(x.split(count), y.split(count), strict=True)


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


def cifar10(data_dir: str | None) -> tuple[np.ndarray, ...]:
    """Krizhevsky 2009: 32x32 images in colour, of animals and vehicles."""
    from sources import cifar10

    return cifar10.load(data_dir)


def fashion_mnist(data_dir: str | None) -> tuple[np.ndarray, ...]:
    """Xiao, Rasul and Vollgraf 2017: 28x28 images of clothes, in the sizes of MNIST."""
    from sources import fashion_mnist

    return fashion_mnist.load(data_dir)


def shakespeare(data_dir: str | None) -> str:
    """Karpathy 2015: 40,000 lines of Shakespeare's plays."""
    from sources import shakespeare

    return shakespeare.load(data_dir)


DATASETS: dict[str, DataSet] = {
    "toy": DataSet(toy, "regression", 11, (1,), 1, "linear"),
    "boston": DataSet(boston, "regression", 506, (13,), 1, "linear"),
    "diabetes": DataSet(diabetes, "regression", 442, (10,), 1, "linear"),
    "digits": DataSet(digits, "classification", 1797, (1, 8, 8), 10, "cnn"),
    "breast_cancer": DataSet(breast_cancer, "classification", 569, (30,), 2, "mlp"),
    "cifar10": DataSet(
        *(None, "classification", 60000, (3, 32, 32), 10, "resnet20"),
        own_split="50,000 + 10,000",
        downloaded=cifar10,
        augmented=True,
    ),
    "fashion_mnist": DataSet(
        None, "classification", 70000, (1, 28, 28), 10, "cnn", own_split="60,000 + 10,000", downloaded=fashion_mnist
    ),
    "shakespeare": DataSet(None, "language", 1115394, (CONTEXT,), 65, "gpt", own_split=OF_TEXT, text=shakespeare),
}


def spec_of(name: str) -> DataSet:
    """The row of that name, or of the file: FILE.csv:TARGET[:classes], FILE.py:FUNCTION, FILE.txt.

    SettingError for a name that is not known. No file is read before its rows or its text are asked for.
    """
    if name in DATASETS:
        return DATASETS[name]
    file = named_file(name)
    if file is None:
        raise SettingError("dataset", shown(name), ", ".join((*DATASETS, *FILE_FORMS)), nearest(name, DATASETS))
    if file.suffix == ".txt":
        return DataSet(None, "language", None, None, None, "gpt", own_split=OF_TEXT, text=partial(_from_text, file))
    return DataSet(partial(_READERS[file.suffix], file), None, None, None, None, "mlp")


def _from_csv(file: NamedFile) -> tuple[np.ndarray, ...]:
    from sources import csv_file

    return csv_file.read(file.path, file.part, file.as_classes)


def _from_function(file: NamedFile) -> tuple[np.ndarray, ...]:
    """What the function gives, with the global random numbers of Python, numpy and torch at their seeds 0."""
    import random

    import numpy as np
    import torch

    from sources import python_file

    function = python_file.function_named("dataset", str(file))
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the generator that many functions draw from
    torch.manual_seed(0)
    return python_file.call("dataset", str(file), function)


def _from_text(file: NamedFile, data_dir: str | None) -> str:
    from sources import text_file

    return text_file.read(file.path)


_READERS = {".csv": _from_csv, ".py": _from_function}
FILE_FORMS = tuple(FORMS[suffix] for suffix in (*_READERS, ".txt"))  # the names of data sets in files


@cache
def _rows(rows: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Kept, as a sweep loads the same set once for each run; nobody writes to it."""
    return rows()


def load(
    name: str,
    test_split: float = TEST_SPLIT,
    seed: int = 42,
    scale_on: str = "train",
    data_dir: str | None = None,
    context: int = CONTEXT,
) -> Data:
    """The set of that name, its features and regression targets standardized: mean 0, deviation 1.

    The scalers are fitted on the training rows, or with scale_on "all" on every row before the split. Images of bytes
    stay uint8, and each of their channels is scaled as a whole; other features that are whole numbers stay int64, as
    models read them that look them up. Raises SettingError for what is wrong in a file or a row of the table, and what
    reading or downloading raises. context: the characters of a window of text.
    """
    import numpy as np
    import torch

    from sources import scaling
    from sources.arrays import checked

    spec = spec_of(name)
    if spec.text:
        if test_split != TEST_SPLIT:
            raise SettingError("test_split", shown(test_split), f"{name} has its own split ({OF_TEXT})")
        if scale_on != "train":
            raise SettingError("scale_on", shown(scale_on), "train (a text is not scaled)")
        return _of_text(name, spec, spec.text(data_dir), context)
    if spec.downloaded:
        arrays = spec.downloaded(data_dir)
    else:
        arrays = checked(name, _rows(spec.rows) if name in DATASETS else spec.rows())
    spec = _completed(name, spec, arrays)
    train_x, train_y, test_x, test_y = _split(name, spec, arrays, test_split, seed)
    # The rows on which the scalers are fitted: all of them in the order of the set, as the last bits depend on it.
    everywhere = scale_on == "all"
    deviation, image_scale = 1.0, None
    if train_x.dtype == np.uint8:
        image_scale = scaling.of_images(list(arrays[::2]) if everywhere else [train_x])
    elif train_x.dtype.kind == "f":
        fitted = np.concatenate(arrays[::2]) if everywhere else train_x
        (train_x, test_x), _ = scaling.standardized(fitted, train_x, test_x)
    if spec.task == "regression":
        fitted = np.concatenate(arrays[1::2]) if everywhere else train_y
        (train_y, test_y), deviation = scaling.standardized(fitted, train_y, test_y)

    def features(rows: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(rows)
        return (tensor.float() if tensor.is_floating_point() else tensor).reshape(-1, *spec.shape)

    def targets(rows: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(rows)
        return tensor.float() if spec.task == "regression" else tensor.long()

    split = features(train_x), targets(train_y), features(test_x), targets(test_y)
    return Data(spec, *split, deviation, image_scale)


def _completed(name: str, spec: DataSet, arrays: tuple[np.ndarray, ...]) -> DataSet:
    """The row with nothing left open. SettingError where it says something else than its arrays."""
    import numpy as np

    x, y = arrays[0], np.concatenate(arrays[1::2])
    task = "regression" if y.dtype.kind == "f" else "classification"
    outputs = 1 if task == "regression" else int(y.max()) + 1
    open_fields = {"task": task, "samples": len(y), "shape": x.shape[1:], "outputs": outputs}
    spec = replace(spec, **{field: value for field, value in open_fields.items() if getattr(spec, field) is None})
    if len(arrays) == 4 and not spec.own_split:
        spec = replace(spec, own_split=f"{len(arrays[1]):,} + {len(arrays[3]):,}")
    if spec.task != task or math.prod(spec.shape) != math.prod(x.shape[1:]) or spec.outputs < outputs:
        said = f"{name}, whose row says {spec.task} of {spec.shape} with {spec.outputs} outputs"
        raise SettingError("dataset", said, f"what its arrays are: {task} of {x.shape[1:]} with {outputs}")
    return spec


def _split(
    name: str, spec: DataSet, arrays: tuple[np.ndarray, ...], test_split: float, seed: int
) -> tuple[np.ndarray, ...]:
    """Training features and targets, test features and targets. SettingError for a share that cannot be."""
    if len(arrays) == 4:
        if test_split != TEST_SPLIT:
            raise SettingError("test_split", shown(test_split), f"{name} has its own split ({spec.own_split})")
        return arrays
    from sklearn.model_selection import train_test_split

    rows = len(arrays[0])
    if rows - math.ceil(test_split * rows) < 1:
        raise SettingError("test_split", shown(test_split), f"what leaves a training row of the {rows} of {name}")
    train_x, test_x, train_y, test_y = train_test_split(*arrays, test_size=test_split, random_state=seed)
    return train_x, train_y, test_x, test_y


def _of_text(name: str, spec: DataSet, text: str, context: int) -> Text:
    """Split by place: int(0.9 n) characters for training, the last tenth for testing. SettingError for a short text."""
    import torch

    from sources.text_file import encoded

    check_context(context)
    symbols, numbers = encoded(text)
    if len(text) <= 10 * context or len(symbols) < 2:
        said = f"{shown(name)} of {len(text):,} characters, {len(symbols)} of them different"
        least = f"a text of at least {10 * context + 1:,}, so that its last tenth holds a window of context={context}"
        raise SettingError("dataset", said, f"{least}, and of 2 different ones")
    spec = replace(spec, samples=len(text), shape=(context,), outputs=len(symbols))
    train, test = torch.from_numpy(numbers).tensor_split([9 * len(text) // 10])
    return Text(spec, train, train[1:], test, test[1:], symbols=symbols)


def check_context(context: object) -> None:
    """SettingError for what is no number of characters of a window."""
    if isinstance(context, bool) or not isinstance(context, int) or context < 1:
        raise SettingError("model_options", f"context={context}", "a whole number >= 1")


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
