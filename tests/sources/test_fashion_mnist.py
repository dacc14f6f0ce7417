"""Fashion-MNIST from small IDX files, which are written here by hand: found, downloaded, damaged. Offline."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from sources import fashion_mnist
from sources.download import Remote


def idx(array):
    """An array of bytes in the IDX format (its magic number: 0, 0, 8 for uint8, the dimensions)."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def halves(train=30, test=12):
    rng = np.random.default_rng(1)
    for n in (train, test):
        yield rng.integers(0, 256, (n, 28, 28))
        yield rng.integers(0, 10, n)


ARRAYS = list(halves())
NAMES = [file.name for file in fashion_mnist.FILES]
PACKED = {name: gzip.compress(idx(array), mtime=0) for name, array in zip(NAMES, ARRAYS, strict=True)}


@pytest.fixture
def files(archive_server):
    """The four files as the server has them, each at two addresses."""
    port = archive_server.http.server_port

    def remote(name):
        urls = tuple(f"http://127.0.0.1:{port}/{folder}/{name}" for folder in ("official", "mirror"))
        return Remote(name, f"sha256:{hashlib.sha256(PACKED[name]).hexdigest()}", urls)

    return tuple(map(remote, NAMES))


def load(folder, files=None):
    return fashion_mnist.load(folder, files=files, progress=False)


def is_loaded(arrays):
    x, y, test_x, test_y = arrays
    assert [array.dtype for array in arrays] == [np.uint8, np.int64, np.uint8, np.int64]
    assert (x.shape, test_x.shape) == ((30, 1, 28, 28), (12, 1, 28, 28))
    assert all(array.flags.writeable for array in arrays)
    for ours, expected in zip((x[:, 0], y, test_x[:, 0], test_y), ARRAYS, strict=True):
        np.testing.assert_array_equal(ours, expected)


def one_line(kind, *args):
    with pytest.raises(kind) as caught:
        load(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def write(folder: Path, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in PACKED.items():
        if packed:
            (folder / name).write_bytes(content)
        else:
            (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(content))


def test_downloaded_once(tmp_path, archive_server, files, capsys):
    archive_server.bodies = {f"/official/{name}": content for name, content in PACKED.items()}
    for _ in range(2):
        is_loaded(load(tmp_path / "new", files))
    assert [path for path, _, _ in archive_server.requests] == [f"/official/{name}" for name in NAMES]
    assert {path.name for path in (tmp_path / "new" / "fashion_mnist").iterdir()} >= set(NAMES)
    assert "fashion_mnist: 30 + 12 images, officially 60000 + 10000" in capsys.readouterr().err


def test_what_is_missing_comes_from_the_mirror(tmp_path, archive_server, files):
    write(tmp_path / "fashion_mnist")
    (tmp_path / "fashion_mnist" / NAMES[2]).unlink()
    archive_server.bodies = {f"/mirror/{name}": content for name, content in PACKED.items()}
    is_loaded(load(tmp_path, files))
    assert [path for path, _, _ in archive_server.requests] == [f"/official/{NAMES[2]}", f"/mirror/{NAMES[2]}"]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["fashion_mnist", *fashion_mnist.OTHER_FOLDERS])
def test_found_where_it_lies(tmp_path, folder, packed):
    write(tmp_path / folder, packed)
    is_loaded(load(tmp_path))


def replaced(tmp_path, number, content):
    """The set with other content in its file of that number -> where that lies."""
    write(tmp_path)
    path = tmp_path / NAMES[number]
    path.write_bytes(content)
    return path


SHORT = np.zeros((5, 28, 28))
WRONG = {
    "no gzip": (0, b"<html>not found</html>", "refused"),
    "cut off": (0, PACKED[NAMES[0]][:2000], "refused"),
    "empty": (1, b"", "no IDX file of labels"),
    "nothing in it": (1, gzip.compress(b""), "no IDX file of labels"),
    "labels for images": (0, PACKED[NAMES[1]], "no IDX file of images"),
    "other images": (0, gzip.compress(idx(np.zeros((5, 32, 32)))), "no IDX file of images"),
    "too short": (0, gzip.compress(idx(SHORT)[:-1]), "3919 bytes behind its head, must be 3920"),
    "too long": (0, gzip.compress(idx(SHORT) + b"x"), "3921 bytes"),
    "another count": (0, gzip.compress(idx(SHORT)), "5 images, but 30 labels"),
    "an eleventh class": (3, gzip.compress(idx(np.arange(12))), "label 10 in record 10"),
    "MNIST's labels": (1, gzip.compress(idx(np.zeros(60_000))), "of another set"),
}


@pytest.mark.parametrize(("number", "content", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_damaged_file_is_one_line(tmp_path, number, content, message):
    path = replaced(tmp_path, number, content)
    said = one_line(ValueError, tmp_path)
    assert str(path) in said
    assert message in said


def test_unpacked_labels_of_another_set_are_refused(tmp_path):
    """MNIST's four files have the same names and sizes."""
    write(tmp_path, packed=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(10_000)))
    assert "of another set" in one_line(ValueError, tmp_path)


def test_the_official_files():
    assert [len(file.urls) for file in fashion_mnist.FILES] == [3] * 4
    assert fashion_mnist.FILES[0].urls[0] == (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz"
    )


@pytest.mark.parametrize("scale_on", ["train", "all"])
def test_the_set_is_scaled_as_a_whole_and_never_augmented(tmp_path, scale_on):
    write(tmp_path)
    split = data.load("fashion_mnist", scale_on=scale_on, data_dir=str(tmp_path))
    train, test = ARRAYS[0].astype(np.float64), ARRAYS[2].astype(np.float64)
    fitted = np.concatenate([train, test]) if scale_on == "all" else train
    expected = (train[:, None] - fitted.mean()) / fitted.std()
    seen = split.features(split.train_x, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(seen.numpy(), expected, rtol=1e-6, atol=2e-6)
    assert (split.train_y.tolist(), split.test_y.tolist()) == (ARRAYS[1].tolist(), ARRAYS[3].tolist())
    assert (split.spec.own_split, split.train_x.dtype) == ("60,000 + 10,000", torch.uint8)
