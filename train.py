"""run(config) -> Result: one training run, from the data to its record."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, nn

import data
import models
import quant
from data import Data
from lab import optimizers
from lab.average import Average
from lab.batches import Batch, Batches
from lab.clipping import Clipping
from lab.environment import device_of
from lab.fingerprint import fingerprint_of_run
from lab.fitting import check_before_loading, check_fit
from lab.metrics import TASKS, Diverged, Losses, Metrics, Task, TrainMetrics, evaluate
from lab.plan import Plan
from lab.processes import Processes
from lab.sample import sampled
from lab.session import Result, Session
from lab.shadow import Shadow
from lab.state import State
from quant import RunRounding
from settings.config import Config


def run(config: Config, command: str | None = None, resume: Path | None = None, quiet: bool = False) -> Result:
    """Train as `config` says and record it; `command` is recorded as what started the run; quiet: without progress.

    resume: the folder of an unfinished record of the same configuration, to go on with from its last checkpoint. A run
    that diverges is a result too, its status "diverged". Ctrl-C, SIGTERM and SIGHUP end the run after its step, with a
    checkpoint, as a KeyboardInterrupt.
    Raises ConfigError for what this machine does not have and for a checkpoint of another configuration, and what
    loading, training or writing raises; before that, what was recorded is closed with the status "failed" or
    "interrupted", and the exception carries a lab.resume.RunEnded, which says where it lies and how to go on.
    """
    started, config = time.monotonic(), config.resolved()
    code = fingerprint_of_run(config)
    check_before_loading(config)
    with Processes(device_of(config.device)) as processes:
        rows = (config.placed(config.dataset), config.test_split, config.seed, config.scale_on, config.data_dir)
        split = processes.first_before_others(lambda: data.load(*rows, config.options.get("context", data.CONTEXT)))
        spec, device = split.spec, processes.device
        task, layout = TASKS[spec.task], spec.layout
        split = split.to(device, layout)
        built = config.placed(config.model_name), spec.shape, spec.outputs, config.seed, config.options, split.options
        make_model = partial(models.build, *built)

        model = make_model().to(device, memory_format=layout)
        batches = Batches(config, split, processes)
        check_fit(config, model, batches, spec)
        plain = copy.deepcopy(model) if config.shadow else None  # before its weights are rounded
        optimizer = optimizers.build(config, model)
        rounding = quant.round_run(config, model, optimizer, processes.any_of if processes.count > 1 else None)
        plan = Plan.of(config, batches.steps)
        schedule = optimizers.schedule(config, optimizer, plan.steps)
        average = Average(config, plan, make_model().to(memory_format=layout)) if config.average_last else None
        clipping = Clipping(config.clip_norm, model.parameters(), device) if config.clip_norm else None
        shadow = Shadow(config, plain, plan.steps, processes.wrap, config.watch or 1) if plain else None
        sums = TrainMetrics(task), Losses(device), average, clipping
        state = State(config, spec, plan, model, optimizer, schedule, *sums, command, code, rounding.watcher, shadow)
        session = Session(state, rounding, processes, resume, quiet or not processes.first, started)
        whole_model = processes.wrap(model)

        with session:
            if not plan.steps:
                session.untrained(processes.from_first(lambda: evaluate(model, split, task)))
            while not state.finished:
                diverged_step = train_until_evaluation(whole_model, batches, task, rounding, state, session)
                check = session.check_in_evaluation(diverged_step)
                metrics = measured(split, task, rounding, state, processes, check, diverged_step)
                session.end_evaluation(metrics, diverged_step)
            if config.sample and state.diverged_step is None:
                draw = partial(sampled, model, split, rounding, config, session.check_in_evaluation(None))
                session.sample = processes.from_first(draw)
    return session.result


def train_until_evaluation(
    model: nn.Module, batches: Batches, task: Task, rounding: RunRounding, state: State, session: Session
) -> int | None:
    """The steps up to the next evaluation, from where `state` is; the one whose loss is not finite, or None."""
    state.begin_measuring()
    model.train()
    try:
        for rows in batches.remaining(state):
            session.between_steps()  # a checkpoint that is due is written; Stopped is raised if somebody asked for it
            batch = batches.part(rows, state.noise)
            if state.shadow:
                state.shadow.train_step(batch, task, state.step + 1)
            loss = train_step(model, batch, task, rounding, state)
            state.step_done()
            if state.shadow:
                state.shadow.compare(state.model, loss, state.step)
            session.progress.step(loss)
        session.stop_if_asked()
        state.losses.check(state.step)
    except Diverged as error:
        return error.step
    return None


def train_step(model: nn.Module, batch: Batch, task: Task, rounding: RunRounding, state: State) -> Tensor:
    """Forward, backward, update -> the loss of the whole batch, (). The rounding is in hooks: low_precision/model.py.

    With --micro-batch the batch passes forward and backward in parts, whose gradients add up to that of the whole.
    Diverged for a loss that is not finite, before it reaches the weights.
    """
    rounding.optimizer.zero_grad()
    parts, results = batch.parts(state.config.micro_batch), []
    for part in parts:
        rounding.at(part.first_row, part.rows)  # so that noise depends on the place of a row in the whole batch alone
        with batch.processes.adding(model, last=part is parts[-1]):
            with part.drawn(state.step + 1):
                output = model(part.x)
            loss = task.loss(output, part.y)
            results.append((loss.detach(), task.correct(output, part.y), part.rows))
            if part is parts[-1]:
                whole_loss, correct, rows = batch.over_processes(results)
                state.metrics.add(whole_loss, correct, rows)
                state.losses.add(whole_loss, state.step + 1)
            rounding.scale(part.share(loss)).backward()
    if state.clipping and not rounding.unscale():
        state.clipping.clip()
    rounding.optimizer.step()
    if state.schedule:
        state.schedule.step()
    return whole_loss


def measured(
    split: Data,
    task: Task,
    rounding: RunRounding,
    state: State,
    processes: Processes,
    check: Callable[[], None] | None,
    diverged_step: int | None,
) -> Metrics:
    """An evaluation's metrics: training, the test set's, at the end those of the averaged weights, the loss scale's.

    check: called now and then, to stop in the middle.
    """
    number, average = len(state.history) + 1, state.average
    metrics: Metrics = {**state.plan.place(number, diverged_step or state.step), **state.metrics.values()}
    metrics |= processes.from_first(lambda: evaluate(state.model, split, task, check))
    if average and diverged_step is None:
        average.update(state.model, number)
        if number == state.plan.evaluations:
            metrics |= processes.from_first(lambda: average.measured(split, task, check))
    if rounding.loss_scale.dynamic:
        metrics |= {"loss_scale": rounding.loss_scale.value, "skipped_steps": rounding.loss_scale.skipped}
    if state.clipping:
        metrics |= state.clipping.values()
    return metrics
