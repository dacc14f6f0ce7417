"""CIFAR-10: both layouts, the download from several addresses, and files that are broken or hostile. All offline."""

import contextlib
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from sources import cifar10

NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
SIZES = [20, 21, 22, 23, 24, 8]  # records: all different, so that a batch read twice or in another's place shows


def make_batches():
    """Six pairs of labels int64 (n,) and pixels uint8 (n, 3072)."""
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 10, n), rng.integers(0, 256, (n, 3072), dtype=np.uint8)) for n in SIZES]


BATCHES = make_batches()


def as_binary(labels, pixels):
    return np.column_stack([labels.astype(np.uint8), pixels]).tobytes()


def as_python(labels, pixels, protocol=4, bytes_keys=False, label_type=list):
    batch = {"batch_label": "training batch", "labels": label_type(labels.tolist()), "data": pixels, "filenames": ["a"]}
    return pickle.dumps({k.encode() if bytes_keys else k: v for k, v in batch.items()}, protocol)


def as_python2(labels, pixels):
    """What Python 2 wrote, as in the official files: strings of bytes, numpy's old module names."""

    def string(text):
        return b"U" + bytes([len(text)]) + text.encode()

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string("b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + string("u1") + b"K\x00K\x01\x87R(K\x03" + string("|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"K" + bytes([len(labels)]) + b"M" + struct.pack("<H", 3072) + b"\x86"
    state = b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels.tolist()) + b"e"
    return b"\x80\x02}(" + string("data") + array + state + string("labels") + numbers + b"u."


def write_files(folder, write=as_binary, suffix=".bin"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in zip(NAMES, BATCHES, strict=True):
        (folder / f"{name}{suffix}").write_bytes(write(*batch))
    return folder


def pack(files):
    """A .tar.gz of a dictionary of member names and contents."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def members(write=as_binary, folder="cifar-10-batches-bin", suffix=".bin"):
    return {f"{folder}/{name}{suffix}": write(*batch) for name, batch in zip(NAMES, BATCHES, strict=True)}


PACKED = pack(members() | {"cifar-10-batches-bin/readme.html": b"not needed"})


def assert_loaded(arrays):
    """That `arrays` are exactly the batches of this file."""
    x_train, y_train, x_test, y_test = arrays
    assert [a.dtype for a in arrays] == [np.uint8, np.int64, np.uint8, np.int64]
    assert all(a.flags.c_contiguous for a in arrays)
    assert x_train.shape == (sum(SIZES[:5]), 3, 32, 32)
    assert x_test.shape == (SIZES[5], 3, 32, 32)
    np.testing.assert_array_equal(x_train.reshape(-1, 3072), np.concatenate([pixels for _, pixels in BATCHES[:5]]))
    np.testing.assert_array_equal(y_train, np.concatenate([labels for labels, _ in BATCHES[:5]]))
    np.testing.assert_array_equal(x_test.reshape(-1, 3072), BATCHES[5][1])
    np.testing.assert_array_equal(y_test, BATCHES[5][0])


def load_error(kind, *args, **kwargs):
    """The one line that load() fails with."""
    with pytest.raises(kind) as caught:
        cifar10.load(*args, progress=False, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


class Server:
    """Serves `bodies` by path; `cut` ends a transfer after that many bytes, `ranges` is whether Range is honoured."""

    def __init__(self):
        self.bodies, self.cut, self.ranges = {}, {}, True
        self.requests = []  # (path, first byte asked for, bytes sent)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                body = outer.bodies.get(self.path)
                start = asked if outer.ranges else 0
                status = 404 if body is None else 416 if start >= len(body) else 206 if start else 200
                rest = body[start:] if status < 400 else b""
                sent = rest[: outer.cut.get(self.path, len(rest))]
                outer.requests.append((self.path, asked, len(sent)))  # before the client can go on to its next one
                self.send_response(status)
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def archive(self, *paths, body=PACKED):
        """The archive that has the checksum of `body`, from these paths in this order."""
        urls = tuple(f"http://127.0.0.1:{self.http.server_port}{path}" for path in paths)
        return cifar10.Archive("cifar-10-binary.tar.gz", f"sha256:{hashlib.sha256(body).hexdigest()}", urls)

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server()
    yield server
    server.close()


# ---- files that lie there ----


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_binary_files_are_read_without_a_request(tmp_path, server, folder):
    write_files(tmp_path / folder)
    assert_loaded(cifar10.load(str(tmp_path), archive=server.archive("/a")))
    assert server.requests == []
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


# ---- download ----


def test_download_then_no_request(tmp_path, server):
    server.bodies["/official"] = PACKED
    archive = server.archive("/official", "/mirror")
    for _ in range(2):
        assert_loaded(cifar10.load(tmp_path / "new" / "folder", archive=archive, progress=False))
    assert server.requests == [("/official", 0, len(PACKED))]
    assert not (tmp_path / "new/folder/cifar-10-binary.tar.gz.part").exists()
    assert not (tmp_path / "new/folder/cifar-10-batches-bin/readme.html").exists()


@pytest.mark.parametrize(
    ("terminal", "progress", "bar"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_progress_bar_on_a_terminal_only(tmp_path, server, capsys, monkeypatch, terminal, progress, bar):
    server.bodies["/a"] = PACKED
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    cifar10.load(tmp_path, archive=server.archive("/a"), progress=progress)
    assert ("100%|" in capsys.readouterr().err) == bar


def test_mirrors_are_tried_in_order(tmp_path, server):
    server.bodies["/third"] = PACKED
    assert_loaded(cifar10.load(tmp_path, archive=server.archive("/first", "/second", "/third"), progress=False))
    assert [path for path, _, _ in server.requests] == ["/first", "/second", "/third"]


def test_a_wrong_checksum_moves_on_to_the_mirror(tmp_path, server):
    server.bodies = {"/official": PACKED[:-1] + b"?", "/mirror": PACKED}
    assert_loaded(cifar10.load(tmp_path, archive=server.archive("/official", "/mirror"), progress=False))
    assert server.requests == [("/official", 0, len(PACKED)), ("/mirror", 0, len(PACKED))]


def test_all_wrong_leaves_nothing_to_trust(tmp_path, server):
    server.bodies["/a"] = server.bodies["/b"] = PACKED[:-1] + b"?"
    archive = server.archive("/a", "/b", "/c")
    message = load_error(ConnectionError, tmp_path, archive=archive)
    for url, reason in zip(archive.urls, ["wrong checksum", "wrong checksum", "404"], strict=True):
        assert f"{url}: {reason}" in message
    assert "--data-dir" in message
    left = {path.name for path in tmp_path.iterdir() if path.stat().st_size}
    assert left == set()
    server.bodies["/a"] = PACKED
    assert_loaded(cifar10.load(tmp_path, archive=archive, progress=False))
    assert server.requests[-1] == ("/a", 0, len(PACKED))


def test_no_server_at_all(tmp_path, server):
    archive = server.archive("/a")
    server.close()
    assert "ConnectionError" in load_error(ConnectionError, tmp_path, archive=archive)


def interrupted(folder, server):
    """A download that breaks off half-way; returns the archive and the bytes that were kept."""
    server.bodies["/a"], server.cut["/a"] = PACKED, len(PACKED) // 2
    archive = server.archive("/a")
    load_error(ConnectionError, folder, archive=archive)
    kept = (folder / "cifar-10-binary.tar.gz.part").stat().st_size
    assert len(PACKED) // 4 < kept <= len(PACKED) // 2
    server.cut.clear()
    server.requests.clear()
    return archive, kept


def test_a_cut_off_transfer_continues_in_the_next_run(tmp_path, server):
    archive, kept = interrupted(tmp_path, server)
    assert_loaded(cifar10.load(tmp_path, archive=archive, progress=False))
    assert server.requests == [("/a", kept, len(PACKED) - kept)]


def test_a_cut_off_transfer_continues_at_the_mirror(tmp_path, server):
    server.bodies["/a"] = server.bodies["/b"] = PACKED
    server.cut["/a"] = len(PACKED) // 2
    assert_loaded(cifar10.load(tmp_path, archive=server.archive("/a", "/b"), progress=False))
    (_, _, _), (path, asked, sent) = server.requests
    assert (path, sent) == ("/b", len(PACKED) - asked)
    assert asked > 0


def test_a_server_without_ranges_sends_everything_once(tmp_path, server):
    archive, kept = interrupted(tmp_path, server)
    server.ranges = False
    assert_loaded(cifar10.load(tmp_path, archive=archive, progress=False))
    assert server.requests == [("/a", kept, len(PACKED))]


def test_a_bad_part_is_dropped_and_the_address_tried_from_the_start(tmp_path, server):
    server.bodies["/a"] = PACKED
    (tmp_path / "cifar-10-binary.tar.gz.part").write_bytes(b"x" * 1000)
    assert_loaded(cifar10.load(tmp_path, archive=server.archive("/a"), progress=False))
    assert server.requests == [("/a", 1000, len(PACKED) - 1000), ("/a", 0, len(PACKED))]


@pytest.mark.parametrize(("part", "requests"), [(PACKED, 1), (PACKED + b"more", 2)], ids=["whole", "too long"])
def test_a_part_to_which_nothing_can_be_added(tmp_path, server, part, requests):
    server.bodies["/a"] = PACKED
    (tmp_path / "cifar-10-binary.tar.gz.part").write_bytes(part)
    assert_loaded(cifar10.load(tmp_path, archive=server.archive("/a"), progress=False))
    assert len(server.requests) == requests


def run_load(folder, archive, before=""):
    """load() in a process of its own, after the statements `before`."""
    imports = "import sys, os, tarfile\nfrom sources import cifar10"
    code = f"{imports}\n{before}\ncifar10.load(sys.argv[1], archive=cifar10.{archive!r})"
    root = Path(cifar10.__file__).parent.parent
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=root, stderr=subprocess.PIPE)


def test_runs_that_start_together_download_once(tmp_path, server):
    server.bodies["/a"] = PACKED
    runs = [run_load(tmp_path, server.archive("/a")) for _ in range(3)]
    assert [run.communicate() and run.returncode for run in runs] == [0, 0, 0]
    assert len(server.requests) == 1


# ---- unpacking ----


@pytest.mark.parametrize("killed_in", ["tarfile.TarFile.extractfile", "os.replace"])
def test_killed_while_unpacking_heals(tmp_path, server, killed_in):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(PACKED)
    before = f"real, calls = {killed_in}, []\n"
    before += "def third(*a, **k): calls.append(a); return real(*a, **k) if len(calls) < 3 else os._exit(9)\n"
    before += f"{killed_in} = third"
    run = run_load(tmp_path, server.archive(), before)
    run.communicate()
    assert run.returncode == 9
    assert (tmp_path / "cifar-10-batches-bin.unpacking").is_dir()
    assert_loaded(cifar10.load(tmp_path))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"cifar-10-batches-bin"}


def test_missing_files_are_unpacked_from_the_archive(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(PACKED)
    folder = write_files(tmp_path / "cifar-10-batches-bin")
    (folder / "data_batch_3.bin").unlink()
    assert_loaded(cifar10.load(tmp_path))


def test_an_archive_that_points_outside_is_refused(tmp_path):
    packed = pack(members() | {"cifar-10-batches-bin/../../../escaped": b"x"})
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "cifar-10-binary.tar.gz").write_bytes(packed)
    assert "cifar-10-binary.tar.gz: refused" in load_error(ValueError, data_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert not any(path.is_dir() for path in data_dir.iterdir())


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "../../../escaped"),
        (tarfile.LNKTYPE, "../escaped"),
        (tarfile.CHRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_links_to_the_outside_and_devices_lead_nowhere(tmp_path, kind, target):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-bin/trick")
        member.type, member.linkname = kind, target
        tar.addfile(member)
        for name, content in members().items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "cifar-10-binary.tar.gz").write_bytes(packed.getvalue())
    with contextlib.suppress(ValueError):  # refused as a whole, or the six files alone taken out of it
        assert_loaded(cifar10.load(data_dir, progress=False))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    left = {path.name for path in data_dir.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())}
    assert left == set()
    assert "trick" not in {path.name for path in data_dir.rglob("*")}


def test_a_link_in_a_batchs_place_is_refused(tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members().items():
            member = tarfile.TarInfo(name)
            if name.endswith("data_batch_1.bin"):
                member.type, member.linkname = tarfile.SYMTYPE, "data_batch_2.bin"
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(packed.getvalue())
    assert "data_batch_1.bin' points outside, or is a link" in load_error(ValueError, tmp_path)


damaged_archives = {
    "no archive": (b"<html>not found</html>", "refused"),
    "empty": (b"", "refused"),
    "cut off": (PACKED[: len(PACKED) // 2], "refused"),
    "bits flipped": (PACKED[:200_000] + bytes(1000) + PACKED[201_000:], "refused"),
    "blocks overwritten": (PACKED[:100_000] + b"\xff" * 150_000 + PACKED[250_000:], "refused"),
    "lacks a batch": (pack(dict(list(members().items())[:5])), "no test_batch.bin"),
}


@pytest.mark.parametrize(("content", "message"), damaged_archives.values(), ids=damaged_archives.keys())
def test_a_damaged_archive_is_one_line(tmp_path, content, message):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(content)
    write_files(tmp_path / "cifar-10-batches-bin.unpacking" / "cifar-10-batches-bin")  # left by a killed run
    line = load_error(ValueError, tmp_path)
    assert str(archive) in line
    assert message in line
    assert not any(path.is_dir() for path in tmp_path.iterdir())


# ---- broken and hostile files ----


@pytest.mark.parametrize("layout", [(as_binary, ".bin"), (as_python, "")], ids=["binary", "python"])
def test_a_missing_batch_is_named(tmp_path, server, layout):
    write, suffix = layout
    write_files(tmp_path, write, suffix)
    (tmp_path / f"data_batch_3{suffix}").unlink()
    line = load_error(FileNotFoundError, tmp_path, archive=server.archive("/a"))
    assert f"missing data_batch_3{suffix} of" in line
    assert server.requests == []


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
