"""The same numbers at Weights & Biases (wandb), sent from a process of its own.

Whatever happens to wandb there (not installed, no network, killed, stuck) cannot reach the training. That process is
this file run as a script, see `_relay`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

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

    run_id: that of a run to continue, the `id` of an earlier Wandb. Log its earlier steps again: online, the server
    leaves out those that it has; offline, the new folder then replaces the earlier one, and is the whole run.
    """

    def __init__(
        self,
        mode: str,
        project: str | None,
        entity: str | None,
        name: str,
        group: str | None,
        config: dict,
        directory,
        run_id: str | None = None,
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
        # Given, so that it is one run should it take two processes. It comes from a file, and finds folders to delete.
        continued = run_id is not None and re.fullmatch("[0-9a-f]{8}", run_id)
        self._own_id = run_id if continued else secrets.token_hex(4)
        self.id = env("WANDB_RUN_ID") or self._own_id
        if mode == "disabled":
            return
        run = {"name": name, "group": group, "config": config, "id": self.id}
        run["resume"] = "allow" if run_id else None
        run["project"] = project or env("WANDB_PROJECT") or "low-precision-ml"
        run["entity"] = entity or env("WANDB_ENTITY") or None
        run["dir"] = os.path.abspath(env("WANDB_DIR") or directory)
        self._start(mode)
        self._send({"run": run, "pid": os.getpid(), "argv": sys.argv})

    def log(self, metrics: dict[str, float | int | None], step: int, histograms: dict[str, dict] | None = None) -> None:
        """Send the metrics of one step; steps must grow. Returns at once.

        histograms: by key, {"lowest": a whole number, "counts": those of it, of the next one, ...}.

        NaN and the infinities go as they are, and wandb shows them: a diverged run looks diverged. None, a metric that
        was not measured, is left out: anything else would replace its last value in wandb's table of runs.
        """
        numbers = {key: value for key, value in metrics.items() if value is not None}
        self._send({"step": step, "log": numbers} | ({"histograms": histograms} if histograms else {}))

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
            # Of a process that failed, or of the run before it was resumed: all of it is in the new folder.
            for half in Path(folder).parent.glob(f"*run-*-{self._own_id}*"):
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
    if start["run"]["resume"]:
        # A folder is named by the second and the id: that of the process of the run before, if it was killed in this
        # very second, must not be ours too.
        settings["x_sync_dir_suffix"] = str(start["pid"])
    if mode == "offline":
        del start["run"]["resume"]  # which offline means nothing
    run = wandb.init(**start["run"], mode=mode, settings=settings)
    folder = os.path.dirname(run.dir)
    answer(folder=folder, url=None if mode == "offline" else run.url)
    if not folder.startswith(start["run"]["dir"]):
        answer(warning=f"cannot write to {start['run']['dir']}; its files are in {folder}")
    while "finish" not in (message := next_message()):
        histograms = {}
        for key, of_key in message.get("histograms", {}).items():
            bins = [of_key["lowest"] + n for n in range(len(of_key["counts"]) + 1)]
            histograms[key] = wandb.Histogram(np_histogram=(of_key["counts"], bins))
        run.log(message["log"] | histograms, step=message["step"])
    run.summary.update(message["finish"])
    try:
        run.finish(exit_code=message["exit_code"])
    except TimeoutError:
        answer(late=True)
    answer(done=True)


if __name__ == "__main__":
    _relay(sys.argv[1])
