"""What the tests of CIFAR-10 share: small batches in both layouts, archives of them, and a server of archives."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
