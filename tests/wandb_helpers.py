"""What the tests of wandb share: runs, what an offline run's file holds, and a server that knows just enough."""

from __future__ import annotations

import contextlib
import json
import shlex
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from lab import wandb_run

KEY = "0123456789" * 4  # of the form of an API key
NAME = "boston-float8-nearest-42-1a2b3c4d"
STEPS = [{"Training.MSE": 1 / (step + 1), "Testing.MSE": step * 0.1} for step in range(30)]


def tracker(mode, directory, **changes):
    settings = {"project": None, "entity": None, "name": NAME[:-9], "group": "boston", "config": {"seed": 42, "a": [1]}}
    return wandb_run.Wandb(mode, directory=directory, **(settings | changes))


def whole_run(mode, directory, exit_code=0, **changes):
    run = tracker(mode, directory, **changes)
    for step, metrics in enumerate(STEPS):
        run.log(metrics, step=step)
    return run.finish({"status": "complete", "testing_mse": 0.5}, exit_code)


def folder_in(lines):
    """The folder that the last line tells the user to upload, as a shell would read it."""
    words = shlex.split(lines[-1])
    assert words[-3:-1] == ["wandb", "sync"]
    return Path(words[-1])


def stored(folder):
    """All records of a run's .wandb file: blocks of 32768 bytes, records of which (crc32, length, type) comes first."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    place, parts, records = 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little for a header: the rest of the block is empty
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def history(records):
    steps = {}
    for record in records:
        if record.HasField("history"):
            items = {
                (item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
            }
            steps[items["_step"]] = {key: value for key, value in items.items() if not key.startswith("_")}
    return steps


def assert_whole(lines, warnings=0):
    """The lines tell of an offline run that has every metric of every step."""
    assert [line.startswith("wandb: warning: ") for line in lines] == [True] * warnings + [False], lines
    records = stored(folder_in(lines))
    assert history(records) == dict(enumerate(STEPS))
    return records


@contextlib.contextmanager
def server(monkeypatch, *, key=True, status=200, hang_at=None):
    """A W&B server that knows just enough: the run's creation, its history, its files (it wants none)."""
    requests, released = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            requests.append((self.path, body.decode(errors="replace")))
            if hang_at and hang_at in requests[-1][0]:
                released.wait()
            answer = {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}}
            if status != 200:
                answer = {"errors": [{"message": "user is not logged in"}]}
            elif "upsertBucket" in requests[-1][1]:
                asked = json.loads(body)["variables"]
                project = {"id": "p", "name": asked.get("project"), "entity": {"id": "e", "name": "somebody"}}
                bucket = {"id": "b", "name": asked.get("name"), "config": "{}", "project": project}
                answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
            data = json.dumps(answer).encode()
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_PUT = do_POST

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.server_port}")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    try:
        yield requests
    finally:
        released.set()
        listening.shutdown()
        listening.server_close()


def uploaded(requests):
    """The history that the server was sent, by step."""
    steps = {}
    for path, body in requests:
        if path.endswith("/file_stream"):
            for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                items = json.loads(line)
                steps[items["_step"]] = {key: value for key, value in items.items() if not key.startswith("_")}
    return steps
