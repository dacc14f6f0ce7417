"""Where a run's record goes: local files always, Weights & Biases (wandb) beside them.

`Record` writes the files that are the run's result. `Wandb` sends the same numbers to wandb from a process of its own:
whatever happens to wandb there (not installed, no network, killed, stuck) cannot reach the training. That process is
this file run as a script, see `_relay`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import math
import os
import queue
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

REPLACING = ("complete", "diverged")  # the runs that ended by themselves; "interrupted" and "failed" replace nothing


def write_whole(path: str | os.PathLike, data: str | bytes) -> None:
    """Write `data` (str: as UTF-8) to `path`, whole or not at all; an older file stays until the new one is on disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise


def _name(error: BaseException, path: str | os.PathLike) -> None:
    """Add the file to an error that the system reports without one, as a write on a full disk."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def _to_json(value, indent: int | None = None) -> str:
    """Strict JSON and a line end: NaN and the infinities, which JSON does not have, become null."""

    def finite(value):
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False) + "\n"


def _lock(file) -> bool:
    """Lock an open file until it is closed or its process is gone. False: in use, or no locks on this file system."""
    with contextlib.suppress(ImportError, OSError):  # ImportError: Windows, where leftovers stay
        import fcntl

        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
    return False


class Record:
    """The files of one run. They grow in `folder`, at first OUTPUT_DIR/NAME.partial-PID; `finish` puts it in its place.

    output_dir: created if it is not there. name: NAME-HASH. config: anything that is JSON.
    OSError, in the system's own words, wherever something cannot be written (a full disk, no permission).
    """

    def __init__(self, output_dir: str | os.PathLike, name: str, config: dict):
        output_dir = Path(output_dir)
        self._final = output_dir / name
        self._created = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
        output_dir.mkdir(parents=True, exist_ok=True)
        for attempt in itertools.count():
            self.folder = output_dir / f"{name}.partial-{os.getpid()}{f'-{attempt}' if attempt else ''}"
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir()
                break
        try:
            write_whole(self.folder / "config.json", _to_json(config, indent=2))
            self._metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 - open till `finish`
            _lock(self._metrics)  # while it lasts, everybody knows that the folder is in use
        except BaseException:
            self._remove()
            raise

    def epoch(self, metrics: dict[str, float | int | None]) -> None:
        """Append one line to metrics.jsonl. At any moment, a kill -9 included, the file holds whole lines only."""
        line = _to_json(metrics).encode()
        size = self._metrics.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that takes only a part of it says why when asked to take the rest
                line = line[self._metrics.write(line) :]
        except BaseException as error:
            self._metrics.truncate(size)
            _name(error, self._metrics.name)
            raise

    def checkpoint(self, state: dict) -> None:
        """Replace checkpoint.pt by `state` (anything that torch.save takes), whole or not at all."""
        import torch

        buffer = io.BytesIO()  # torch.save into a file turns a full disk into a RuntimeError
        torch.save(state, buffer)
        write_whole(self.folder / "checkpoint.pt", buffer.getbuffer())

    def finish(self, summary: dict) -> Path:
        """Write summary.json, put the folder in its place OUTPUT_DIR/NAME, and return where it lies.

        summary["status"] "complete" or "diverged" replaces an older record of that name. Between its two renames the
        older record is NAME.old-PID and the new one still NAME.partial-PID, both whole. Afterwards the older one is
        deleted, with whatever killed or interrupted runs left under the same name and no process has in use.
        Any other status replaces nothing: where the place is taken, the folder stays NAME.partial-PID. "failed" before
        the first epoch leaves nothing: the path returned then does not exist.
        """
        if summary["status"] == "failed" and not self._metrics.seek(0, os.SEEK_END):
            self._metrics.close()
            self._remove()
            return self.folder
        write_whole(self.folder / "summary.json", _to_json(summary, indent=2))
        os.fsync(self._metrics)
        if os.name == "nt":
            self._metrics.close()  # Windows renames no folder with an open file in it
        if summary["status"] in REPLACING:
            self._replace()
            self._clean()
        else:
            for older in self._siblings("old"):  # a replacement was cut short: the older record gets its place back
                with contextlib.suppress(OSError):
                    os.rename(older, self._final)
            if not self._final.exists():
                self.folder = self.folder.rename(self._final)
        self._metrics.close()
        return self.folder

    def _replace(self) -> None:
        """Move the folder into its place. What lies there, or is put there at the same moment, steps aside first."""
        for attempt in itertools.count():
            try:
                self.folder = self.folder.rename(self._final)  # OSError where a folder with files in it lies
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 100:
                    raise
            aside = self._final.with_name(f"{self._final.name}.old-{os.getpid()}-{attempt}")
            with contextlib.suppress(OSError):  # another process was faster, or the next attempt says what is wrong
                self._final.rename(aside)

    def _clean(self) -> None:
        for older in self._siblings("old"):  # the record that is in place now has replaced them all
            shutil.rmtree(older, ignore_errors=True)
        for partial in self._siblings("partial"):
            with contextlib.suppress(OSError), open(partial / "metrics.jsonl", "r+b") as file:
                if _lock(file):
                    shutil.rmtree(partial, ignore_errors=True)

    def _siblings(self, kind: str) -> list[Path]:
        return [path for path in self._final.parent.iterdir() if path.name.startswith(f"{self._final.name}.{kind}-")]

    def _remove(self) -> None:
        """Undo what __init__ made, with the folders above it unless something else is in them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in self._created:  # the innermost first
                path.rmdir()


MODES = ("online", "offline", "disabled", "shared", "run", "dryrun")  # what WANDB_MODE may say
# How long a server may keep us waiting, beside the training and at its end, where uploading the rest takes 1-2 s; what
# only something stuck in wandb exceeds, slow import included; wandb's cleaning up, milliseconds unless a network hangs.
INIT_SECONDS, FINISH_SECONDS, STUCK_SECONDS, CLEANUP_SECONDS = 5, 5, 15, 1


class Wandb:
    """A run at Weights & Biases, written by a process of its own while the training goes on.

    mode: "online", "offline", "disabled" or "auto": WANDB_MODE where it is set, else what wandb's own settings say,
    else online where an API key is configured, else offline. project, entity: None for WANDB_PROJECT, WANDB_ENTITY,
    else "low-precision-ml" and wandb's own. directory: wandb's files go to DIRECTORY/wandb; WANDB_DIR wins over it.

    Nothing here raises because of wandb, asks a question or waits for a network, `finish` for some seconds excepted.
    What could not be sent is in an offline run in the end, with every step. If the training is killed, the run is
    closed as failed, with what was logged until then. "disabled" starts nothing and imports nothing.
    """

    def __init__(
        self, mode: str, project: str | None, entity: str | None, name: str, group: str | None, config: dict, directory
    ):
        env = os.environ.get
        self._lines: list[str] = []
        self._sent: list[bytes] = []  # everything, for a second process should the first one fail
        self._process = None
        if mode == "auto" and env("WANDB_MODE"):
            mode = env("WANDB_MODE")
            if mode not in MODES:
                self._warn(f"WANDB_MODE is {mode!r}, not one of {', '.join(MODES)}; using offline")
                mode = "offline"
        if mode == "disabled":
            return
        self._own_id = secrets.token_hex(4)  # given, so that it is one run should it take two processes
        run = {"name": name, "group": group, "config": config, "id": env("WANDB_RUN_ID") or self._own_id}
        run["project"] = project or env("WANDB_PROJECT") or "low-precision-ml"
        run["entity"] = entity or env("WANDB_ENTITY") or None
        run["dir"] = os.path.abspath(env("WANDB_DIR") or directory)
        self._start(mode)
        self._send({"run": run, "pid": os.getpid(), "argv": sys.argv})

    def log(self, metrics: dict[str, float | int | None], step: int) -> None:
        """Send the metrics of one step; steps must grow. Returns at once.

        NaN and the infinities go as they are, and wandb shows them: a diverged run looks diverged. None, a metric that
        was not measured, is left out: anything else would replace its last value in wandb's table of runs.
        """
        self._send({"step": step, "log": {key: value for key, value in metrics.items() if value is not None}})

    def finish(self, summary: dict, exit_code: int = 0) -> list[str]:
        """Close the run with `summary` as its summary; an exit_code other than 0 marks it as failed.

        Returns lines for the user: where the run is, how to upload it, warnings. Waits for some seconds at most.
        """
        self._send({"finish": summary, "exit_code": exit_code})
        replies = self._collect()
        if "done" not in replies:
            self._start("offline")
            replies = self._collect()
        if "done" not in replies:
            self._warn("the run is not recorded there")
        elif folder := replies.get("folder"):
            sync = f"wandb sync {shlex.quote(folder)}"
            self._lines.append(f"wandb: {replies['url'] or f'offline run, to upload it: {sync}'}")
            if "late" in replies:
                self._warn(f"the server did not take everything in {FINISH_SECONDS} s; to upload the rest: {sync}")
            for half in Path(folder).parent.glob(f"*run-*-{self._own_id}*"):  # begun by a first process that failed
                if str(half) != folder:
                    shutil.rmtree(half, ignore_errors=True)
        return list(dict.fromkeys(self._lines))

    def _warn(self, text: str) -> None:
        self._lines.append(f"wandb: warning: {text}")

    def _start(self, mode: str) -> None:
        # Without WANDB_SILENT, wandb.login() asks the server for the user's name, to print it.
        environment = {"WANDB_PROGRAM": os.path.abspath(sys.argv[0])} | os.environ | {"WANDB_SILENT": "true"}
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "bufsize": 0}
        # A session of its own: Ctrl-C in the terminal reaches the training alone, which then says how it ended.
        options |= {"env": environment | {"WANDB_MODE": mode}, "start_new_session": True}
        self._pending = b"".join(self._sent)
        try:
            self._process = subprocess.Popen([sys.executable, __file__, mode], **options)
            if os.name == "posix":
                os.set_blocking(self._process.stdin.fileno(), False)  # a full pipe must not make the training wait
        except OSError as error:
            self._warn(f"cannot start a process for it: {error}")

    def _send(self, message: dict) -> None:
        if self._process:
            self._sent.append((json.dumps(message, default=str) + "\n").encode())
            self._pending += self._sent[-1]
            with contextlib.suppress(OSError):  # full: more at the next call; or the process is gone: `finish` sees it
                self._pending = self._pending[os.write(self._process.stdin.fileno(), self._pending) :]

    def _collect(self) -> dict:
        """Send the rest, wait for the process, return what it said: "done" is in it if there is nothing left to do."""
        process, self._process = self._process, None
        if not process:  # disabled, or a warning has said why not
            return {"done": True}
        try:
            output, _ = process.communicate(self._pending, STUCK_SECONDS)
        except subprocess.TimeoutExpired:
            self._warn(f"no answer from it in {STUCK_SECONDS} s")
            process.kill()
            output, _ = process.communicate()
        replies = {}
        for reply in map(json.loads, output.splitlines()):
            replies |= reply
            if "warning" in reply:
                self._warn(reply["warning"])
        if "done" not in replies and not self._lines:
            self._warn("its process ended half-way")
        return replies


def _relay(mode: str) -> None:
    """The process behind `Wandb`: reads its messages on stdin, a JSON line each, and answers on stdout likewise."""
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that wandb prints, or starts, comes between
    messages = queue.SimpleQueue()

    def read():
        for line in sys.stdin.buffer:
            if line.endswith(b"\n"):
                messages.put(json.loads(line))
        messages.put({"finish": {}, "exit_code": 1})  # read only if no other "finish" came: the training was killed
        threading.Timer(STUCK_SECONDS, os._exit, [1]).start()  # what hangs here does not outlive the training by more

    def answer(**reply):
        with contextlib.suppress(OSError):  # the training was killed; what it logged is recorded all the same
            os.write(answers, (json.dumps(reply) + "\n").encode())

    threading.Thread(target=read, daemon=True).start()
    try:
        _record(mode, messages.get(), messages.get, answer)
    except Exception as error:  # whatever it is, it costs a warning
        answer(warning=(str(error).splitlines() or [f"it failed ({type(error).__name__})"])[0])
    threading.Timer(CLEANUP_SECONDS, os._exit, [0]).start()
    with contextlib.suppress(BaseException):
        sys.modules["wandb"].teardown()
    os._exit(0)


def _record(asked: str, start: dict, next_message, answer) -> None:
    sys.argv = start["argv"]  # wandb notes how the training was started
    if asked == "auto":
        del os.environ["WANDB_MODE"]
    import wandb

    mode = wandb.setup().settings.mode  # WANDB_MODE, or what a settings file says
    mode = {"run": "online", "dryrun": "offline"}.get(mode, mode)
    if mode == "disabled":
        return answer(done=True)
    if mode != "offline":
        try:
            wandb.login(verify=False)  # finds the key where wandb keeps it; there is no terminal at which to ask for it
        except wandb.errors.UsageError as error:
            mode = "offline"
            if asked != "auto":
                answer(warning=str(error))
    settings = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
    settings |= {"console": "off", "x_stats_pid": start["pid"]}  # the process whose memory and load wandb plots
    run = wandb.init(**start["run"], mode=mode, settings=settings)
    folder = os.path.dirname(run.dir)
    answer(folder=folder, url=None if mode == "offline" else run.url)
    if not folder.startswith(start["run"]["dir"]):
        answer(warning=f"cannot write to {start['run']['dir']}; its files are in {folder}")
    while "finish" not in (message := next_message()):
        run.log(message["log"], step=message["step"])
    run.summary.update(message["finish"])
    try:
        run.finish(exit_code=message["exit_code"])
    except TimeoutError:
        answer(late=True)
    answer(done=True)


if __name__ == "__main__":
    _relay(sys.argv[1])
