"""CIFAR-10 from several addresses, interrupted or not, and archives that are unpacked, damaged or hostile. Offline."""

import contextlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cifar10_helpers import (
    PACKED,
    assert_loaded,
    load_error,
    members,
    pack,
    write_files,
)

from sources import cifar10


def test_download_then_no_request(tmp_path, archive_server):
    archive_server.bodies["/official"] = PACKED
    archive = archive_server.archive("/official", "/mirror")
    for _ in range(2):
        assert_loaded(cifar10.load(tmp_path / "new" / "folder", archive=archive, progress=False))
    assert archive_server.requests == [("/official", 0, len(PACKED))]
    assert not (tmp_path / "new/folder/cifar-10-binary.tar.gz.part").exists()
    assert not (tmp_path / "new/folder/cifar-10-batches-bin/readme.html").exists()


@pytest.mark.parametrize(
    ("terminal", "progress", "bar"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_progress_bar_on_a_terminal_only(tmp_path, archive_server, capsys, monkeypatch, terminal, progress, bar):
    archive_server.bodies["/a"] = PACKED
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    cifar10.load(tmp_path, archive=archive_server.archive("/a"), progress=progress)
    assert ("100%|" in capsys.readouterr().err) == bar


def test_mirrors_are_tried_in_order(tmp_path, archive_server):
    archive_server.bodies["/third"] = PACKED
    assert_loaded(cifar10.load(tmp_path, archive=archive_server.archive("/first", "/second", "/third"), progress=False))
    assert [path for path, _, _ in archive_server.requests] == ["/first", "/second", "/third"]


def test_a_wrong_checksum_moves_on_to_the_mirror(tmp_path, archive_server):
    archive_server.bodies = {"/official": PACKED[:-1] + b"?", "/mirror": PACKED}
    assert_loaded(cifar10.load(tmp_path, archive=archive_server.archive("/official", "/mirror"), progress=False))
    assert archive_server.requests == [("/official", 0, len(PACKED)), ("/mirror", 0, len(PACKED))]


def test_all_wrong_leaves_nothing_to_trust(tmp_path, archive_server):
    archive_server.bodies["/a"] = archive_server.bodies["/b"] = PACKED[:-1] + b"?"
    archive = archive_server.archive("/a", "/b", "/c")
    message = load_error(ConnectionError, tmp_path, archive=archive)
    for url, reason in zip(archive.urls, ["wrong checksum", "wrong checksum", "404"], strict=True):
        assert f"{url}: {reason}" in message
    assert "--data-dir" in message
    left = {path.name for path in tmp_path.iterdir() if path.stat().st_size}
    assert left == set()
    archive_server.bodies["/a"] = PACKED
    assert_loaded(cifar10.load(tmp_path, archive=archive, progress=False))
    assert archive_server.requests[-1] == ("/a", 0, len(PACKED))


def test_no_server_at_all(tmp_path, archive_server):
    archive = archive_server.archive("/a")
    archive_server.close()
    assert "ConnectionError" in load_error(ConnectionError, tmp_path, archive=archive)


def interrupted(folder, archive_server):
    """A download that breaks off half-way; returns the archive and the bytes that were kept."""
    archive_server.bodies["/a"], archive_server.cut["/a"] = PACKED, len(PACKED) // 2
    archive = archive_server.archive("/a")
    load_error(ConnectionError, folder, archive=archive)
    kept = (folder / "cifar-10-binary.tar.gz.part").stat().st_size
    assert len(PACKED) // 4 < kept <= len(PACKED) // 2
    archive_server.cut.clear()
    archive_server.requests.clear()
    return archive, kept


def test_a_cut_off_transfer_continues_in_the_next_run(tmp_path, archive_server):
    archive, kept = interrupted(tmp_path, archive_server)
    assert_loaded(cifar10.load(tmp_path, archive=archive, progress=False))
    assert archive_server.requests == [("/a", kept, len(PACKED) - kept)]


def test_a_cut_off_transfer_continues_at_the_mirror(tmp_path, archive_server):
    archive_server.bodies["/a"] = archive_server.bodies["/b"] = PACKED
    archive_server.cut["/a"] = len(PACKED) // 2
    assert_loaded(cifar10.load(tmp_path, archive=archive_server.archive("/a", "/b"), progress=False))
    (_, _, _), (path, asked, sent) = archive_server.requests
    assert (path, sent) == ("/b", len(PACKED) - asked)
    assert asked > 0


def test_a_server_without_ranges_sends_everything_once(tmp_path, archive_server):
    archive, kept = interrupted(tmp_path, archive_server)
    archive_server.ranges = False
    assert_loaded(cifar10.load(tmp_path, archive=archive, progress=False))
    assert archive_server.requests == [("/a", kept, len(PACKED))]


def test_a_bad_part_is_dropped_and_the_address_tried_from_the_start(tmp_path, archive_server):
    archive_server.bodies["/a"] = PACKED
    (tmp_path / "cifar-10-binary.tar.gz.part").write_bytes(b"x" * 1000)
    assert_loaded(cifar10.load(tmp_path, archive=archive_server.archive("/a"), progress=False))
    assert archive_server.requests == [("/a", 1000, len(PACKED) - 1000), ("/a", 0, len(PACKED))]


@pytest.mark.parametrize(("part", "requests"), [(PACKED, 1), (PACKED + b"more", 2)], ids=["whole", "too long"])
def test_a_part_to_which_nothing_can_be_added(tmp_path, archive_server, part, requests):
    archive_server.bodies["/a"] = PACKED
    (tmp_path / "cifar-10-binary.tar.gz.part").write_bytes(part)
    assert_loaded(cifar10.load(tmp_path, archive=archive_server.archive("/a"), progress=False))
    assert len(archive_server.requests) == requests


def run_load(folder, archive, before=""):
    """load() in a process of its own, after the statements `before`."""
    imports = "import sys, os, tarfile\nfrom sources import cifar10"
    code = f"{imports}\n{before}\ncifar10.load(sys.argv[1], archive=cifar10.{archive!r})"
    root = Path(cifar10.__file__).parent.parent
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=root, stderr=subprocess.PIPE)


def test_runs_that_start_together_download_once(tmp_path, archive_server):
    archive_server.bodies["/a"] = PACKED
    runs = [run_load(tmp_path, archive_server.archive("/a")) for _ in range(3)]
    assert [run.communicate() and run.returncode for run in runs] == [0, 0, 0]
    assert len(archive_server.requests) == 1


# Unpacking


@pytest.mark.parametrize("killed_in", ["tarfile.TarFile.extractfile", "os.replace"])
def test_killed_while_unpacking_heals(tmp_path, archive_server, killed_in):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(PACKED)
    before = f"real, calls = {killed_in}, []\n"
    before += "def third(*a, **k): calls.append(a); return real(*a, **k) if len(calls) < 3 else os._exit(9)\n"
    before += f"{killed_in} = third"
    run = run_load(tmp_path, archive_server.archive(), before)
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
