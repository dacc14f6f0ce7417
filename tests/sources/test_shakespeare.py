"""Tiny Shakespeare, found or downloaded: a small text in its place, served on this machine."""

import hashlib

import pytest

from sources import shakespeare
from sources.download import Remote

BODY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 50


@pytest.fixture
def remote(archive_server):
    """The text of BODY, from two addresses of the server."""
    port = archive_server.http.server_port
    urls = tuple(f"http://127.0.0.1:{port}{path}" for path in ("/official", "/mirror"))
    return Remote("tinyshakespeare.txt", f"sha256:{hashlib.sha256(BODY).hexdigest()}", urls)


def load(folder, remote):
    return shakespeare.load(folder, file=remote, progress=False)


def one_line(kind, folder, remote):
    with pytest.raises(kind) as caught:
        load(folder, remote)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_downloaded_once(tmp_path, archive_server, remote):
    archive_server.bodies["/official"] = BODY
    assert [load(tmp_path / "new", remote) for _ in range(2)] == [BODY.decode()] * 2
    assert archive_server.requests == [("/official", 0, len(BODY))]
    assert (tmp_path / "new" / "tinyshakespeare.txt").read_bytes() == BODY


def test_interrupted_and_continued_at_the_mirror(tmp_path, archive_server, remote):
    archive_server.bodies = {"/official": BODY, "/mirror": BODY}
    archive_server.cut["/official"] = 1000
    assert load(tmp_path, remote) == BODY.decode()
    (_, _, sent), (path, begun, _) = archive_server.requests
    assert (path, sent) == ("/mirror", 1000)
    assert begun <= 1000


def test_no_address_delivers(tmp_path, archive_server, remote):
    archive_server.bodies["/mirror"] = BODY[:-1] + b"?"
    said = one_line(ConnectionError, tmp_path, remote)
    assert "tinyshakespeare.txt could not be downloaded" in said
    assert "/official: 404" in said
    assert "/mirror: wrong checksum" in said
    assert "--data-dir" in said


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", *shakespeare.OTHER_NAMES])
def test_found_where_it_lies(tmp_path, archive_server, remote, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(BODY)
    assert load(str(tmp_path), remote) == BODY.decode()
    assert archive_server.requests == []


@pytest.mark.parametrize("wrong", [BODY[:-1], BODY.replace(b"\n", b"\r\n"), b""], ids=["cut off", "line ends", "empty"])
def test_another_text_in_its_place_is_one_line(tmp_path, remote, wrong):
    (tmp_path / "input.txt").write_bytes(wrong)
    said = one_line(ValueError, tmp_path, remote)
    assert f"{tmp_path / 'input.txt'}: not tiny Shakespeare ({len(wrong)} bytes" in said
    assert "delete it" in said


def test_the_official_text_is_asked_for_by_its_official_name(tmp_path, monkeypatch):
    """What load() fetches without being told; nothing is asked for over the network."""
    asked = []
    monkeypatch.setattr(shakespeare, "fetch", lambda folder, file, progress: asked.append(file) or tmp_path / "text")
    (tmp_path / "text").write_bytes(BODY)
    with pytest.raises(ValueError, match="not tiny Shakespeare"):
        shakespeare.load(tmp_path)
    assert asked == [shakespeare.TEXT]
    assert shakespeare.TEXT.urls[0].startswith("https://raw.githubusercontent.com/karpathy/char-rnn/")
