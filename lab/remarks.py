"""What the end of a run says of its numbers: what was not rounded, moments that became zero, a model made worse.

A run can be complete and yet worth nothing, because formats that saturate never show a NaN. What is measured here is in
summary.json, and what is worth a sentence is printed too. Nothing of it changes a number of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data import DataSet
from lab.metrics import TASKS
from low_precision.by_layer import shared_names
from low_precision.formats import Format
from low_precision.rules import COUNTS, FLOWING, momentum_rule
from low_precision.scheme import Scheme
from low_precision.wrap import coverage
from settings.config import Config

if TYPE_CHECKING:
    from lab.state import State

# Adam divides by sqrt(exp_avg_sq) + eps. Where exp_avg_sq became zero, a weight moves by exp_avg / eps learning rates,
# while a healthy one moves by about one. Few such weights do no harm: float16 has 4 % of them in its first step.
TOO_FAR = 10.0  # learning rates
VANISHED_SHARE = 0.1
# A run made its model worse where its loss is so many times that of the untrained model and that of a constant answer.
# It learned nothing where the loss did not fall much below either, and weights stand at the end of their format.
WORSE, NOTHING_LEARNED, SATURATED_SHARE = 10.0, 0.95, 0.01


class SecondMoments:
    """Of Adam's second moments, the share of elements that became zero and then moved too far: the largest one so far.

    It is looked at in the steps 1, 2, 4, 8, ...: what destroys a model happens in its first steps, and at the end
    nothing of it can be seen, because gradients of a destroyed model are large.
    """

    def __init__(self, rounded: bool) -> None:
        """rounded: whether the optimizer's state is; otherwise nothing is looked at."""
        self.rounded = rounded
        self.share, self.step = 0.0, 0

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if self.rounded and step & (step - 1) == 0:
            share = vanished(optimizer)
            if share is not None and share > self.share:
                self.share, self.step = share, step

    def state_dict(self) -> dict[str, Any]:
        return {"share": self.share, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.share, self.step = float(state["share"]), int(state["step"])


@torch.no_grad()
def vanished(optimizer: torch.optim.Optimizer) -> float | None:
    """The share of exp_avg_sq that is zero where exp_avg is over TOO_FAR times eps; None of other optimizers."""
    counts, elements = [], 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = optimizer.state.get(p, {})
            if {"exp_avg", "exp_avg_sq"} <= moments.keys() and isinstance(group.get("eps"), float):
                far = moments["exp_avg"].abs() > TOO_FAR * group["eps"]
                counts.append(((moments["exp_avg_sq"] == 0) & far).sum())
                elements += p.numel()
    return int(torch.stack(counts).sum()) / elements if elements else None


def measured(state: State) -> dict[str, Any]:
    """For summary.json: the first step's loss, and shares of moments that vanished and of numbers that saturated."""
    fields: dict[str, Any] = {}
    if state.losses.first is not None:
        fields["first_loss"] = float(state.losses.first)
    moments = state.second_moments
    if moments.rounded and (share := vanished(state.optimizer)) is not None:
        fields["vanished"] = {"exp_avg_sq": {"share": moments.share, "step": moments.step, "at_the_end": share}}
    if shares := _saturated(state):
        fields["saturated"] = shares
    if stays := _not_rounded(state):
        fields["not_rounded"] = stays
    return fields


def _not_rounded(state: State) -> str:
    """What of the numbers that flow through the model is not rounded, in one line; of a model where others are."""
    sites = {*state.config.rules(), *(line.site for line in state.config.lines())}
    if not sites & set(FLOWING) or state.config.backend == "qtorch":
        return ""
    try:
        return coverage(state.model).sentence()
    except ValueError:  # no step was made
        return ""


@torch.no_grad()
def _saturated(state: State) -> dict[str, float]:
    """By site, the share of weights and of moments that stand at the largest magnitude of their format."""
    counts: dict[str, Tensor | int] = {}
    elements: dict[str, int] = {}
    for site, number_format, tensor in _stored(state):
        at_an_end = (tensor == number_format.largest) | (tensor == number_format.lowest)
        counts[site] = counts.get(site, 0) + at_an_end.sum()
        elements[site] = elements.get(site, 0) + tensor.numel()
    return {site: int(count) / elements[site] for site, count in counts.items() if elements[site]}


def _stored(state: State) -> Iterator[tuple[str, Format, Tensor]]:
    """The weights and the optimizer's moments that are rounded to a format with a largest value, and their sites."""
    scheme = Scheme(state.config.rules(), lines=state.config.lines(), shared_names=shared_names(state.model))
    for full_name, p in state.model.named_parameters():
        rules = scheme.of_parameter(full_name).rules
        tensors = [("weights", rules.get("weights"), p)]
        for name, value in state.optimizer.state.get(p, {}).items():
            if torch.is_tensor(value) and name not in COUNTS:
                site = f"momentum.{name}" if f"momentum.{name}" in rules else "momentum"
                tensors.append((site, momentum_rule(rules, name), value))
        for site, rule, tensor in tensors:
            if rule and isinstance(rule.format, Format):  # where a block has a scale, its largest number is at the end
                yield site, rule.format, tensor


def sentences(config: Config, summary: dict[str, Any], spec: DataSet) -> list[str]:
    """What a person should know of a run that ended by itself, from its summary; nothing of a healthy one."""
    return [*_of_moments(summary), *(_of_loss(config, summary, spec) if summary["status"] == "complete" else [])]


def _of_moments(summary: dict[str, Any]) -> Iterator[str]:
    for name, of_moment in summary.get("vanished", {}).items():
        if of_moment["share"] >= VANISHED_SHARE:
            yield (
                f"warning: {name} became zero where exp_avg did not, for {of_moment['share']:.1%} of the weights"
                f" at step {of_moment['step']} and {of_moment['at_the_end']:.1%} at the end; such a weight moves by"
                f" more than {TOO_FAR:g} learning rates in a step; a wider format: --site momentum.{name}=bfloat16"
            )


def _of_loss(config: Config, summary: dict[str, Any], spec: DataSet) -> Iterator[str]:
    task, rules = TASKS[spec.task], config.rules()
    first, constant = summary.get("first_loss"), task.loss_of_constant(spec.outputs)
    losses = [summary.get(f"{phase}_{task.loss_metric}") for phase in ("training", "testing")]
    if first is None or None in losses:
        return
    saturated = {site: share for site, share in summary.get("saturated", {}).items() if share >= SATURATED_SHARE}
    smaller = min(losses)  # of the two, as one odd batch or one odd test row says nothing of the run
    if smaller > WORSE * max(first, constant):
        what = "training made the model worse"
    elif smaller > NOTHING_LEARNED * min(first, constant) and "weights" in saturated:
        what = "the model learned nothing"
    else:
        return
    wider = ", a wider format" if rules or config.lines() else ""
    ends = [
        f"{share:.1%} of {site}" + ("" if config.lines() else f" at {rules[site].format.largest:g}")
        for site, share in saturated.items()
    ]
    yield (
        f"warning: {what}: the training loss was {first:.4g} at the first step and is {losses[0]:.4g} at the end, the"
        f" testing loss {losses[1]:.4g}; a constant answer has {constant:.3g}"
        f"{'; at the largest magnitude of their format: ' if ends else ''}{', '.join(ends)}"
        f"; what may help: a --learning-rate below {config.learning_rate:g}{wider}"
    )
