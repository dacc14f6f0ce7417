"""Fashion-MNIST as numpy arrays: found in a folder, packed or unpacked, or downloaded and checked.

Source: Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747; https://github.com/zalandoresearch/fashion-mnist states the MD5 of
the four files, which are in MNIST's IDX format.
"""

from __future__ import annotations

import gzip
import math
import sys
import zlib
from pathlib import Path

import numpy as np

from sources.download import Remote, fetch, folder_of, has_checksum

FOLDERS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
)


def _remote(name: str, sha256: str) -> Remote:
    return Remote(name, f"sha256:{sha256}", tuple(f"{folder}/{name}" for folder in FOLDERS))


# Training images and labels, test images and labels; their MD5 are 8d4fb7e6c68d591d4c3dfef9ec88bf0d,
# 25c81989df183df01b3e8a0aad5dffbe, bef4ecab320f06d8554ea6380940ec79 and bb300cfdad3c16e7a12a480ee83cd310.
FILES = (
    _remote("train-images-idx3-ubyte.gz", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
    _remote("train-labels-idx1-ubyte.gz", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    _remote("t10k-images-idx3-ubyte.gz", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
    _remote("t10k-labels-idx1-ubyte.gz", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
)
UNPACKED = {  # of these the SHA-256 of what is packed is known too
    "train-labels-idx1-ubyte": "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-labels-idx1-ubyte": "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FOLDER = "fashion_mnist"  # where downloads are kept: the files of MNIST have the same names
OTHER_FOLDERS = ("", "FashionMNIST/raw", "fashion-mnist", "data/fashion")  # where others keep them
OFFICIAL = (60_000, 10_000)  # images of the two halves


def load(
    data_dir: str | Path | None = None, *, files: tuple[Remote, ...] | None = None, progress: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The training and the test set, each in the order of its files.

    Returns training images uint8 (60000, 1, 28, 28), training labels int64 (60000,) in 0..9, test images uint8 (10000,
    1, 28, 28), test labels int64 (10000,). Sets of another size are read too, with a line on stderr.

    Each of the four files is looked for in the folder fashion_mnist of `data_dir` (None: the user's cache folder), then
    in `data_dir` itself and in the folders of other projects, packed by gzip or not; what is nowhere is downloaded.
    Of unpacked files the checksums of the labels alone are known. files: others than FILES.
    Errors, each with one line: ValueError for a malformed or corrupted file, ConnectionError when no address delivered,
    OSError from the file system.
    """
    folder = folder_of(data_dir)
    places = [_place(folder, file, progress) for file in files or FILES]
    x_train, y_train, x_test, y_test = map(_read, places, files or FILES)
    for images, labels, path in ((x_train, y_train, places[0]), (x_test, y_test, places[2])):
        if len(images) != len(labels):
            raise ValueError(f"{path}: {len(images)} images, but {len(labels)} labels beside it")
    if (len(y_train), len(y_test)) != OFFICIAL:
        print(f"fashion_mnist: {len(y_train)} + {len(y_test)} images, officially 60000 + 10000", file=sys.stderr)
    return x_train[:, None], y_train.astype(np.int64), x_test[:, None], y_test.astype(np.int64)


def _place(data_dir: Path, file: Remote, progress: bool) -> Path:
    """Where the file lies, packed or not; downloaded where it lies nowhere."""
    for folder in (FOLDER, *OTHER_FOLDERS):
        for name in (file.name, file.name.removesuffix(".gz")):
            if (path := data_dir / folder / name).is_file():
                return path
    return fetch(data_dir / FOLDER, file, progress)


def _read(path: Path, file: Remote) -> np.ndarray:
    """What an IDX file holds: uint8, images (n, 28, 28) or labels (n,)."""
    raw = content = path.read_bytes()
    if path.name == file.name:
        try:
            content = gzip.decompress(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: refused ({type(error).__name__}: {error}); delete it and run again") from error
    shape = (28, 28) if "images" in path.name else ()
    # The magic number says uint8 (8) and the number of dimensions; then comes each of them: big-endian int32 all.
    head = np.frombuffer(content, ">i4", count=min(len(content) // 4, 2 + len(shape))).tolist()
    if not (head[:1] == [0x801 + len(shape)] and tuple(head[2:]) == shape and head[1] >= 1):
        raise ValueError(f"{path}: no IDX file of {'images of 28 x 28 bytes' if shape else 'labels'}")
    values = np.frombuffer(content, np.uint8, offset=4 * len(head))
    if len(values) != head[1] * math.prod(shape):
        raise ValueError(f"{path}: {len(values)} bytes behind its head, must be {head[1] * math.prod(shape)}")
    known = file if path.name == file.name else Remote(path.name, UNPACKED.get(path.name, ""), ())
    if head[1] in OFFICIAL and known.checksum and not has_checksum(raw, known):
        raise ValueError(f"{path}: corrupted, or of another set than this (not of {known.checksum}); replace it")
    if not shape and (wrong := np.flatnonzero(values > 9)).size:
        raise ValueError(f"{path}: label {values[wrong[0]]} in record {wrong[0]}, must be 0 to 9")
    return values.reshape(head[1], *shape).copy()  # a copy can be written to, as torch wants it
