"""CIFAR-10 that lies there, in both layouts, and files that are broken or hostile."""

import contextlib
import hashlib
import os
import pickle

import numpy as np
import pytest
from cifar10_helpers import (
    BATCHES,
    SIZES,
    as_binary,
    as_python,
    as_python2,
    assert_loaded,
    load_error,
    members,
    pack,
    write_files,
)

from sources import cifar10


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_binary_files_are_read_without_a_request(tmp_path, archive_server, folder):
    write_files(tmp_path / folder)
    assert_loaded(cifar10.load(str(tmp_path), archive=archive_server.archive("/a")))
    assert archive_server.requests == []
    assert not (tmp_path / "cifar-10-binary.tar.gz.lock").exists()  # a folder that cannot be written to will do


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("bytes_keys", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_python_files_of_every_protocol_equal_the_binary_ones(tmp_path, folder, bytes_keys, protocol):
    write_files(tmp_path / folder, lambda *batch: as_python(*batch, protocol, bytes_keys), "")
    assert_loaded(cifar10.load(tmp_path))


def test_python_files_written_by_python_2(tmp_path):
    write_files(tmp_path, as_python2, "")
    assert_loaded(cifar10.load(tmp_path))


def test_python_files_with_arrays_of_labels_and_pixels_in_fortran_order(tmp_path):
    write_files(tmp_path, lambda labels, pixels: as_python(labels, np.asfortranarray(pixels), label_type=np.array), "")
    assert_loaded(cifar10.load(tmp_path))


@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_binary_archive_is_unpacked_once(tmp_path, prefix):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(pack({prefix + name: content for name, content in members().items()}))
    assert_loaded(cifar10.load(tmp_path))
    archive.write_bytes(b"not looked at again")
    assert_loaded(cifar10.load(tmp_path))


def test_a_python_archive_is_unpacked(tmp_path):
    packed = pack(members(as_python, "cifar-10-batches-py", ""))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(packed)
    assert_loaded(cifar10.load(tmp_path))
    assert (tmp_path / "cifar-10-batches-py" / "test_batch").is_file()


def test_the_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / project)
    write_files(tmp_path / "low_precision_ml")
    assert_loaded(cifar10.load())


def test_another_size_is_told_in_one_line(tmp_path, capsys):
    cifar10.load(write_files(tmp_path))
    message = capsys.readouterr().err
    assert "110 + 8 images" in message
    assert message.count("\n") == 1


# Broken and hostile files


@pytest.mark.parametrize("layout", [(as_binary, ".bin"), (as_python, "")], ids=["binary", "python"])
def test_a_missing_batch_is_named(tmp_path, archive_server, layout):
    write, suffix = layout
    write_files(tmp_path, write, suffix)
    (tmp_path / f"data_batch_3{suffix}").unlink()
    line = load_error(FileNotFoundError, tmp_path, archive=archive_server.archive("/a"))
    assert f"missing data_batch_3{suffix} of" in line
    assert archive_server.requests == []


broken_binaries = {
    "cut off": (as_binary(*BATCHES[1])[:-1], f"{21 * 3073 - 1} bytes"),
    "empty": (b"", "0 bytes"),
    "label 10": (b"\x00" * 3073 + b"\x0a" + b"\x00" * 3072, "label 10 in record 1, must be 0 to 9"),
}


@pytest.mark.parametrize(("content", "message"), broken_binaries.values(), ids=broken_binaries.keys())
def test_a_broken_binary_file_is_one_line(tmp_path, content, message):
    write_files(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(content)
    line = load_error(ValueError, tmp_path)
    assert f"{tmp_path / 'data_batch_2.bin'}: " in line
    assert message in line


IMAGES = np.zeros((2, 3072), np.uint8)
broken_pickles = {
    "cut off": (as_python(*BATCHES[1])[:-9], "not a pickled batch"),
    "empty": (b"", "not a pickled batch"),
    "text": (b"<html>\n</html>\n", "not a pickled batch"),
    "no dictionary": (pickle.dumps([1]), "not a pickled batch"),
    "no data": (pickle.dumps({"labels": [0, 1]}), "'data'"),
    "no labels": (pickle.dumps({"data": IMAGES}), "'labels'"),
    "fine_labels of CIFAR-100": (pickle.dumps({"data": IMAGES, "fine_labels": [0, 1]}), "'labels'"),
    "keys of another encoding": (pickle.dumps({b"\xff" * 3: 0}), "not a pickled batch"),
    "float data": (pickle.dumps({"data": IMAGES.astype("f4"), "labels": [0, 1]}), "float32"),
    "3071 pixels": (pickle.dumps({"data": IMAGES[:, 1:], "labels": [0, 1]}), "(2, 3071)"),
    "one image": (pickle.dumps({"data": IMAGES[0], "labels": 0}), "(3072,)"),
    "no image": (pickle.dumps({"data": IMAGES[:0], "labels": []}), "n >= 1"),
    "one label too many": (pickle.dumps({"data": IMAGES, "labels": [0, 1, 2]}), "(3,)"),
    "float labels": (pickle.dumps({"data": IMAGES, "labels": [0.0, 1.0]}), "labels float64"),
    "ragged labels": (pickle.dumps({"data": IMAGES, "labels": [[0], [1, 2]]}), "not a pickled batch"),
    "label 10": (pickle.dumps({"data": IMAGES, "labels": [0, 10]}), "label 10 in record 1"),
    "label -1": (pickle.dumps({"data": IMAGES, "labels": [-1, 0]}), "label -1 in record 0"),
    "label 256": (pickle.dumps({"data": IMAGES, "labels": [0, 256]}), "label 256 in record 1"),
}


@pytest.mark.parametrize(("content", "message"), broken_pickles.values(), ids=broken_pickles.keys())
def test_a_broken_python_file_is_one_line(tmp_path, content, message):
    write_files(tmp_path, as_python, "")
    (tmp_path / "data_batch_2").write_bytes(content)
    line = load_error(ValueError, tmp_path)
    assert f"{tmp_path / 'data_batch_2'}: " in line
    assert message in line


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def as_object_array(thing):
    array = np.empty(1, object)
    array[0] = thing
    return array


hostile = {
    "alone": lambda call: call,
    "as labels": lambda call: {"data": IMAGES, "labels": [call, 1]},
    "in a numpy array": lambda call: {"data": as_object_array(call), "labels": [0]},
    "as an argument": lambda call: {"data": Call(np.dtype, call), "labels": [0]},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", hostile.values(), ids=hostile.keys())
def test_a_pickle_that_runs_a_command_is_refused(tmp_path, place, protocol):
    marker = tmp_path / "executed"
    content = pickle.dumps(place(Call(os.system, f"echo > '{marker}'")), protocol)
    write_files(tmp_path, as_python, "")
    (tmp_path / "data_batch_1").write_bytes(content)
    line = load_error(ValueError, tmp_path)
    assert f"{tmp_path / 'data_batch_1'}: " in line
    assert f"forbidden '{os.system.__module__}.system'" in line
    assert not marker.exists()
    with contextlib.suppress(TypeError):  # from what comes after the command
        pickle.loads(content)
    assert marker.exists()  # it would have run


@pytest.mark.parametrize("function", [eval, open, np.load, np.fromfile, getattr, pickle.loads])
def test_no_other_function_is_found(tmp_path, function):
    write_files(tmp_path, as_python, "")
    (tmp_path / "test_batch").write_bytes(pickle.dumps(function))
    assert f".{function.__name__}'" in load_error(ValueError, tmp_path)


def test_no_other_encoding_is_used(tmp_path):
    write_files(tmp_path, as_python, "")
    (tmp_path / "test_batch").write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")
    assert "forbidden encoding 'rot13'" in load_error(ValueError, tmp_path)


@pytest.mark.parametrize("layout", [(as_binary, ".bin"), (as_python, "")], ids=["binary", "python"])
def test_a_batch_of_the_official_size_has_the_published_records(tmp_path, monkeypatch, layout):
    write, suffix = layout
    write_files(tmp_path, write, suffix)
    zeros = np.zeros(10_000, np.int64), np.zeros((10_000, 3072), np.uint8)
    (tmp_path / f"data_batch_2{suffix}").write_bytes(write(*zeros))
    line = load_error(ValueError, tmp_path)
    assert f"{tmp_path / 'data_batch_2'}{suffix}: corrupted" in line
    monkeypatch.setitem(cifar10.BATCH_MD5, "data_batch_2", hashlib.md5(as_binary(*zeros)).hexdigest())
    assert len(cifar10.load(tmp_path)[1]) == sum(SIZES[:5]) - SIZES[1] + 10_000
