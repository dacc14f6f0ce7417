"""All of a run that is not training, as one context: record, wandb, progress, checkpoints, and how the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lab import checkpoint, remarks
from lab.advice import advice
from lab.checkpoint import Due
from lab.console import Progress, printable, say
from lab.environment import environment
from lab.interrupt import Stop, Stopped
from lab.layers import layer_lines
from lab.metrics import Metrics, wandb_keys
from lab.processes import Processes
from lab.record import REPLACING, NoRecord, Record
from lab.resume import RunEnded
from lab.shadow import shadow_lines
from lab.state import State
from lab.step_lines import LAYERS, LinesFile, asked_for, by_evaluation
from lab.wandb_run import Wandb
from quant import RunRounding
from settings.config import Config

MEMORY_SIGNS = ("can't allocate memory", "not enough memory", "std::bad_alloc")  # how PyTorch says it


@dataclass(frozen=True)
class Result:
    """What came of a run. summary: as in summary.json; folder: where the record lies; notes: lines for the user."""

    config: Config
    summary: dict[str, Any]
    history: list[Metrics]  # the lines of metrics.jsonl
    folder: Path
    notes: list[str]


class Session:
    """One run's record, wandb run, progress, checkpoints and wish to stop, from the first step to the summary.

    As a context it takes the state to where the run is resumed, and at its end turns the exception that ended the run,
    if any, into a status, writes the last checkpoint and the summary, and closes record and wandb. `result` is what
    came of the run. An exception that leaves it carries a RunEnded.
    """

    def __init__(
        self,
        state: State,
        rounding: RunRounding,
        processes: Processes,
        resume: Path | None,
        quiet: bool,
        started: float,
    ) -> None:
        """resume: the folder of the record to go on with. started: monotonic seconds."""
        self.state, self._rounding, self._processes = state, rounding, processes
        self._resume, self._quiet, self._started = resume, quiet, started
        self._stop = Stop()
        self._step_lines = [layer_lines(state.watcher, processes)] if state.watcher else []
        self._step_lines += [shadow_lines(state.shadow)] if state.shadow else []
        self._untrained: dict[str, float] = {}  # the metrics of a run of no steps
        self.sample: str | None = None  # of text

    def __enter__(self) -> Session:
        self._record = self._open_record()
        self._wandb = self._open_wandb()
        self.progress = Progress(self.state.config, self.state.plan, self.state.step, quiet=self._quiet)
        self._due = Due(self.state.config.checkpoint_every, self.state.plan.in_epoch, self.state.step)
        self._stop.__enter__()
        return self

    def between_steps(self) -> None:
        """Writes a checkpoint if one is due; raises Stopped if one of the processes was asked to stop."""
        if self._asked():
            self._write_checkpoint()

    def stop_if_asked(self) -> None:
        """Raises Stopped if one of the processes was asked to stop."""
        self._asked()

    def check_in_evaluation(self, diverged_step: int | None) -> Callable[[], None] | None:
        """What evaluation calls now and then, to be stopped in its middle; None where it must go on.

        A step that diverged is half done, and of several processes, the others do not evaluate.
        """
        return self._stop.check if diverged_step is None and self._processes.count == 1 else None

    def end_evaluation(self, metrics: Metrics, diverged_step: int | None) -> None:
        """Records the metrics of an evaluation. diverged_step: the step that ended the run early."""
        self._record.evaluation(metrics)
        self._write_lines()
        self.state.end_evaluation(metrics, diverged_step)
        self._log_at_wandb(self._wandb, metrics)
        self.progress.evaluated(metrics, len(self.state.history))
        if self._processes.any_of(self.state.finished or self._due.after_step(self.state.step)):
            self._write_checkpoint()

    def untrained(self, metrics: dict[str, float]) -> None:
        """Records the metrics of a run of no steps."""
        self._untrained = metrics
        self._write_checkpoint()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failure = error
        try:
            if isinstance(error, Stopped):
                failure = _failure_of(self._write_checkpoint) or error
            elif error is not None:
                failure = _out_of_memory(error, self.state.step + 1, self.state.config) or error
            self.progress.close()
            summary = self._summary(failure)
            folder = self._record.folder
            try:
                folder = self._record.finish(summary)
            except (OSError, KeyboardInterrupt) as late:  # all of it is where it was
                failure = failure or late
                summary["status"] = "failed"
        finally:
            self._stop.__exit__()
        notes = [*self._record.notes, *summary.get("remarks", [])]
        notes += [f"advice: {sentence}" for sentence in summary.get("advice", [])]
        notes += self._close_wandb(summary, failed=failure is not None)
        if failure is None:
            self.result = Result(self.state.config, summary, self.state.history, folder, notes)
            return
        if self._processes.first:
            RunEnded(folder if folder.exists() else None, notes).attach_to(failure)
        if failure is not error:
            raise failure

    def _asked(self) -> bool:
        """Whether a checkpoint is due; raises Stopped if one of the processes was asked to stop."""
        stopping, writing = self._processes.any(self._stop.asked > 0, self._due.after_step(self.state.step))
        if stopping:
            raise Stopped(self._stop.number)
        return writing

    def _write_lines(self) -> None:
        """Records what was seen of the steps since the last time. Before each checkpoint, so that none is lost."""
        for lines in self._step_lines:
            self._record.lines(lines.name, lines.take())

    def _log_at_wandb(self, wandb: Wandb, metrics: Metrics) -> None:
        """The metrics of an evaluation, and the last that was seen of the steps before it."""
        numbers, histograms = wandb_keys(metrics), {}
        for lines in self._step_lines:
            more, of_these = lines.for_wandb()
            numbers, histograms = numbers | more, histograms | of_these
        wandb.log(numbers, int(metrics.get("step") or metrics["epoch"] or 0), histograms)

    def _write_checkpoint(self) -> None:
        self._processes.check_same(self._replicated())
        self._write_lines()
        self._record.checkpoint(checkpoint.pack(self.state.save(time.monotonic() - self._started)))
        self._due.was_written(self.state.step)

    def _replicated(self) -> Iterator[Tensor]:
        """What must have the same bits in every process. Batch norm's statistics are those of the first one."""
        yield from self.state.model.parameters()
        yield from self._rounding.kept()
        if self.state.shadow:
            yield from self.state.shadow.model.parameters()
        for moments in self.state.optimizer.state.values():
            yield from (value for value in moments.values() if torch.is_tensor(value))

    def _open_record(self) -> Record | NoRecord:
        """The run's record; where it is resumed, with the state taken to where its last checkpoint was."""
        config = self.state.config
        if not self._resume:
            files = [LinesFile(name) for name in asked_for(config)]
            where = config.output_dir, config.folder_name
            return Record(*where, config.as_dict(), files) if self._first else NoRecord()
        folder = self._resume
        last = self._processes.from_first(lambda: checkpoint.latest(folder))
        if last:
            self.state.load(last.state, folder / last.name)
        if not self._first:
            return NoRecord()
        file = (last.name, last.raw) if last else None
        files = [LinesFile.resumed(folder, name, self.state.step) for name in asked_for(config)]
        record = Record.resume(folder, config.as_dict(), self.state.history, file, files)
        if last is None:
            say(f"resuming {folder}: no checkpoint yet, from the start")
            return record
        for note in last.notes:
            say(f"{note}; going on from {last.name}")
        epochs = "" if self.state.plan.by_step else f"epoch {self.state.epochs} of {config.epochs}, "
        of_steps = f" of {self.state.plan.steps}" if self.state.plan.by_step else ""
        say(f"resuming {folder} after {epochs}step {self.state.step}{of_steps}")
        if len(codes := self.state.code.split("+")) > 1:
            others = ", ".join(codes[:-1])
            say(f"the code has changed: until here the run was trained by {others}, from here on by {codes[-1]}")
        return record

    def _open_wandb(self) -> Wandb:
        """The run at wandb, with the evaluations that are behind it; none but for the first process."""
        state = self.state
        config = state.config if self._first else replace(state.config, wandb="disabled")
        where = (config.wandb, config.wandb_project, config.wandb_entity)
        wandb = Wandb(*where, config.name, config.group, config.as_dict(), config.output_dir, state.wandb_id)
        state.wandb_id = wandb.id or state.wandb_id
        every = state.plan.every
        before = {lines: by_evaluation(self._record.lines_before(lines.name), every) for lines in self._step_lines}
        for number, metrics in enumerate(state.history, 1):
            for lines, rows in before.items():
                lines.saw(rows.get(number, []))
            self._log_at_wandb(wandb, metrics)
        for lines, rows in before.items():  # of steps that are not evaluated yet
            lines.saw(rows.get(len(state.history) + 1, []))
        return wandb

    def _close_wandb(self, summary: dict[str, Any], failed: bool) -> list[str]:
        if self._stop.asked > 1:  # at once: wandb's process sees that we are gone, and closes the run
            return []
        try:
            return self._wandb.finish(summary, exit_code=1 if failed else 0)
        except KeyboardInterrupt:  # the record is whole and in its place
            return ["wandb: not waited for"]

    def _summary(self, failure: BaseException | None) -> dict[str, Any]:
        state = self.state
        status = "complete" if state.diverged_step is None else "diverged"
        if failure:
            status = "interrupted" if isinstance(failure, KeyboardInterrupt) else "failed"
        summary: dict[str, Any] = {"name": state.config.name, "status": status}
        epochs = state.plan.epochs(state.step) if state.plan.by_step else state.epochs
        summary |= {"epochs": epochs, "steps": state.step}
        summary |= state.history[-1] if state.history else self._untrained
        for name in ("epoch", "step"):
            summary.pop(name, None)
        if state.diverged_step is not None:
            summary["diverged_step"] = state.diverged_step
        seconds = round(state.seconds + time.monotonic() - self._started, 3)
        parameters = sum(p.numel() for p in state.model.parameters())
        summary |= {"seconds": seconds, "parameters": parameters, "resumed": state.resumed}
        summary["rules"] = {site: str(rule) for site, rule in state.config.rules().items()}
        if lines := state.config.lines():
            summary["lines"] = [str(line) for line in lines]
        if transforms := state.config.transforms():
            summary["transform"] = {product: str(transform) for product, transform in transforms.items()}
        if status in REPLACING:
            if self.sample is not None:
                summary["sample"] = self.sample
            summary |= remarks.measured(state)
            if said := remarks.sentences(state.config, summary, state.spec):
                summary["remarks"] = said
            if state.watcher and (advised := advice(state.config, self._record.lines_before(LAYERS))):
                summary["advice"] = advised
        summary["code"] = state.code
        return summary | {"command": state.command, "environment": environment(state.config, self._processes)}

    @property
    def _first(self) -> bool:
        return self._processes.first


def _failure_of(action: Callable[[], None]) -> BaseException | None:
    try:
        action()
    except BaseException as error:
        return error
    return None


def _out_of_memory(error: BaseException, step: int, config: Config) -> MemoryError | None:
    """One line for the many ways in which PyTorch says that there is no memory left; None for other errors."""
    text = str(error).strip().partition("\n")[0]
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(sign in text for sign in MEMORY_SIGNS):
        return None
    less = f"a --batch-size below {config.batch_size}"
    if config.micro_batch and config.micro_batch < config.batch_size:  # which says how many rows are computed at once
        less = f"a --micro-batch below {config.micro_batch}"
    clearer = MemoryError(f"out of memory in step {step}: {less} needs less ({text})")
    clearer.__cause__ = error
    return clearer


def report(result: Result) -> str:
    """What main.py prints at the end: how it ended, the last metrics, where the record lies."""
    summary = result.summary
    ended = summary["status"]
    if ended == "diverged":
        ended = f"diverged: a loss at step {summary['diverged_step']} is not finite"
    lines = [
        f"{summary['name']}: {ended} ({summary['epochs']} epochs, {summary['steps']} steps, {summary['seconds']} s)"
    ]
    for name, value in summary.items():
        if name.startswith(("training_", "testing_", "averaged_")):
            lines.append(f"  {name:26} {value:.6g}")
    if "sample" in summary:
        lines.append(f"sample:\n{printable(summary['sample'])}")
    if "not_rounded" in summary:
        lines.append(f"not rounded: {summary['not_rounded']}")
    lines.append(f"record: {result.folder}")
    return "\n".join([*lines, *result.notes])
