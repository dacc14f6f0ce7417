"""What rounding loses while a model trains, by step, layer and site: `watch` and `report`.

A watcher listens: `Clock.watcher` is what every quantizer, the weights and the products of one model tell of what they
do. It listens in step 1 and in every N-th step, and in training alone. It sums over all calls and micro-batches of a
step, on the device, without waiting for it, and changes no bit: it only reads. What activation checkpointing computes
again has the name and the number of the first time, and counts once.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from low_precision import losses, torch_private
from low_precision.errors import SettingError, shown
from low_precision.listener import Kept, Listener, Rounder
from low_precision.losses import Loss
from low_precision.model import LowPrecision
from low_precision.tried import FORM, tried_named
from low_precision.what_if import Tried, WhatIf

KEPT = ("weights", "accumulator", "compensation")  # sites of what an optimizer's step moves
OF_PARAMETERS = (*KEPT, "gradients", "momentum")  # whose tensors have the names of parameters


class Place(NamedTuple):
    """What a row of the table is of. also: the rule or recipe that is tried and not in use."""

    layer: str
    site: str
    rule: str = ""
    also: str = ""


def layer_of(site: str, tensor: str) -> str:
    """The layer of a quantizer's tensor: a module's full name, or that of a function in it, as "blocks.0:matmul".

    All operands of a function are of one layer, and so are all steps of a recurrent one.
    """
    if site.partition(".")[0] in OF_PARAMETERS:
        return tensor.rpartition(".")[0]
    name = re.sub(r"(\[[^\]]*\])+(\.(input|output|error))?$", "", tensor)
    if site == "errors" or (site == "elementwise" and ":" in name):
        name = re.sub(r"\.(input|output|error)$", "", name)
    return re.sub(r"(:h[hr](_l\d+)?(_reverse)?)\.\d+$", r"\1", name)


class _Sums:
    """What was summed up for one place on one device. Parts are added, but for `moved`, the last step of them."""

    def __init__(self) -> None:
        self.loss: Loss | None = None
        self.product: Tensor | None = None  # float64 (2,), see losses.of_product
        self.update: Tensor | None = None  # float64 (5,), see losses.of_update
        self.moved: Tensor | None = None  # int64 (): the last step that moved it, 0 for none

    def add(
        self,
        loss: Loss | None = None,
        product: Tensor | None = None,
        update: Tensor | None = None,
        moved: Tensor | None = None,
    ) -> None:
        if loss is not None:
            self.loss = loss if self.loss is None else self.loss.plus(loss)
        if product is not None:
            self.product = product if self.product is None else self.product + product
        if update is not None:
            self.update = update if self.update is None else self.update + update
        if moved is not None:
            self.moved = moved if self.moved is None else torch.maximum(self.moved, moved)

    def plus(self, other: _Sums) -> None:
        self.add(other.loss, other.product, other.update, other.moved)

    def on_cpu(self) -> _Sums:
        """Copies that are on their way to the CPU: they may be read once the devices are synchronized."""

        def fetched(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to("cpu", non_blocking=True)

        copied = _Sums()
        copied.loss = self.loss and self.loss.on_cpu()
        copied.product, copied.update, copied.moved = map(fetched, (self.product, self.update, self.moved))
        return copied

    def row(self, step: int, place: Place) -> dict[str, Any]:
        """A line of layers.jsonl."""
        row: dict[str, Any] = {"step": step, "layer": place.layer, "site": place.site}
        row |= {"also": place.also} if place.also else {}
        row |= {"rule": place.rule} if place.rule else {}
        row |= self.loss.row() if self.loss else {}
        row |= {"error": losses.relative(self.product)} if self.product is not None else {}
        row |= losses.update_row(self.update) if self.update is not None else {}
        return row | ({"last_moved": int(self.moved)} if self.moved is not None else {})


_ByPlace = dict[Place, _Sums]


class Watcher(Listener):
    """Listens to one model in step 1 and in every `every`-th step; `rows` has what it heard.

    names: of the model's parameters. step: the optimizer steps done so far. tried: what is tried beside the run, for
    which `try_beside` has to be called.
    """

    def __init__(self, names: dict[Tensor, str], every: int, step: int = 0, tried: Sequence[Tried] = ()) -> None:
        self._names, self.every, self._tried = names, every, tried
        self._what_if: WhatIf | None = None
        self._gradients = 0  # how often the gradients of this step were told
        self._lock = threading.Lock()  # replicas of a model run in threads of their own
        self._sums: dict[tuple[Place, torch.device], _Sums] = {}  # of this step
        self._heard: set[tuple[Any, ...]] = set()  # roundings of this step, each by its part, name and number
        self._part = 0  # of this step's batch, where it passes in parts
        # Steps whose sums nobody has asked for. Those of several devices are added once they have come.
        self._ended: list[tuple[int, list[tuple[Place, _Sums]]]] = []
        self._devices: set[torch.device] = set()  # from which they come
        self._rows: list[dict[str, Any]] = []
        self._before: dict[tuple[str, Tensor], Tensor] = {}  # what a step found, by site and parameter
        self._moved: dict[tuple[str, Tensor], Tensor] = {}  # int64 (): the last step that moved it
        self._moved_before: dict[str, int] = {}  # the same of a loaded state, by site and name
        self._is_updating = False
        self._is_on = False
        self.begin(step + 1)

    @property
    def is_on(self) -> bool:
        return self._is_on

    @property
    def tries(self) -> bool:
        return self._is_on and bool(self._tried)

    def begin(self, step: int) -> None:
        self.step, self._is_on = step, step == 1 or step % self.every == 0
        self._sums.clear()
        self._heard.clear()
        self._gradients = self._part = 0
        if self._what_if:
            self._what_if.end_step()
        for one in self._tried:
            one.move_to(step - 1)

    def begin_part(self) -> None:
        self._part += 1

    def end_step(self) -> None:
        if self.is_on:
            for one in self._tried:
                one.clock.delayed.move()
        if self._sums:
            self._ended.append((self.step, [(place, sums.on_cpu()) for (place, _), sums in self._sums.items()]))
            self._devices |= {device for _, device in self._sums if device.type == "cuda"}
        self.begin(self.step + 1)

    def _at(self, place: Place, device: torch.device) -> _Sums:
        return self._sums.setdefault((place, device), _Sums())

    def _is_new(self, *rounding: Any) -> bool:
        """Whether it was not heard before in this step; it counts as heard then."""
        with self._lock:
            count = len(self._heard)
            self._heard.add((self._part, *rounding))
            return len(self._heard) > count

    # What quantizers tell.

    def before(self, rounder: Rounder, x: Tensor, in_place: bool, *number: object) -> Tensor | None:
        site = rounder.names[0]
        if site in KEPT and not self._is_updating:  # a check, or weights that were set from outside
            return None
        if not _is_plain(x) or not self._is_new(*rounder.names, *number):
            return None
        with torch.no_grad():
            return x.detach().clone() if in_place else x.detach()

    def rounded(
        self, rounder: Rounder, x: Tensor, rounded: Tensor, dim: int, scale: Tensor | None, also: str = ""
    ) -> None:
        site, tensor = rounder.site, rounder.names[1]
        if site == "elementwise" and tensor.endswith(".error"):
            site = "elementwise.errors"
        place = Place(layer_of(rounder.names[0], tensor), site, str(rounder.rule), also)
        with torch_private.hidden_from_modes():
            loss = losses.of_rounding(x, rounded, rounder.rule.format, dim, scale)
        with self._lock:
            self._at(place, x.device).add(loss)

    # What products tell.

    def product(
        self,
        site: str,
        layer: str,
        number: tuple[object, ...],
        result: Tensor,
        exact: Callable[[], Tensor],
        also: str = "",
    ) -> None:
        if not _is_plain(result) or not self._is_new(site, layer, *number):
            return
        with torch.no_grad(), torch_private.hidden_from_modes():
            sums = losses.of_product(result, exact())
        with self._lock:
            self._at(Place(layer_of(site, layer), site, also=also), result.device).add(product=sums)

    # What the weights tell.

    def found(self, weights: Kept, parameters: Iterable[Tensor]) -> None:
        for site, p, kept in self._kept(weights, parameters):
            before = self._before.get((site, p))
            if before is None or before.shape != kept.shape or before.device != kept.device:
                self._before[site, p] = kept.detach().clone()
            else:
                before.copy_(kept)

    @contextmanager
    def update(self, weights: Kept, parameters: Sequence[Tensor]) -> Iterator[None]:
        with torch.no_grad():
            made = {p: p.detach().clone() for p in parameters if p in self._names} if self.is_on else {}
            self._is_updating = self.is_on
            try:
                yield
                for p in made if self.tries else ():
                    found = self._before["accumulator" if p in weights.masters else "weights", p]
                    for one in self._tried:
                        one.update(self, p, found, made[p])
            finally:
                self._is_updating = False
            for site, p, kept in self._kept(weights, parameters):
                before = self._before.get((site, p))
                if before is not None and p in self._names and (weights.rounder(site, p) or _is_behind(weights, p)):
                    self._follow(weights, site, p, before, kept, made.get(p))

    def _follow(self, weights: Kept, site: str, p: Tensor, before: Tensor, kept: Tensor, made: Tensor | None) -> None:
        """What became of a parameter's update, in the weights or behind them. made: what the optimizer made of it."""
        known = self._moved.get((site, p))
        if known is None:
            last = self._moved_before.get(f"{site} {self._names[p]}", 0)
            known = torch.full((), last, dtype=torch.int64, device=p.device)
        has_moved = (kept != before).any()
        moved = self._moved[site, p] = torch.where(has_moved, self.step, known.to(p.device))
        if made is None:
            return
        found = self._before["accumulator" if p in weights.masters else "weights", p]
        exact, arrived = made.double() - found.double(), kept.double() - before.double()
        if site == "compensation":  # what it keeps is not lost
            arrived += p.detach().double() - self._before["weights", p].double()
        rounder = weights.rounder(site, p)
        rule = "float32" if rounder is None else str(rounder.rule)
        with self._lock:
            sums = self._at(Place(layer_of(site, self._names[p]), site, rule), p.device)
            sums.add(update=losses.of_update(exact, arrived), moved=moved)

    def _kept(self, weights: Kept, parameters: Iterable[Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(site, parameter, what is kept there), of the parameters that are rounded, or where that is tried."""
        for p in parameters:
            if weights.rounder("weights", p) or _is_behind(weights, p) or self.tries:
                yield "weights", p, p
            if p in weights.masters:
                yield "accumulator", p, weights.masters[p]
            if p in weights.lost:
                yield "compensation", p, weights.lost[p]

    # What is tried beside the run.

    def try_beside(self, low: LowPrecision) -> None:
        """From now on what flows through the model is tried too."""
        self._what_if = WhatIf(self._tried, low.frames, low.run, low.model, self)

    def stop(self) -> None:
        """Nothing is tried any more."""
        if self._what_if:
            self._what_if.remove()
        self._tried = ()

    def try_call(
        self, frame: Any, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Callable[[Any], None]:
        assert self._what_if is not None
        return self._what_if.call(frame, function, arguments, named)

    def try_gradients(self, gradients: Mapping[Tensor, Tensor]) -> None:
        for one in self._tried:
            one.gradients(gradients, self._gradients)
        self._gradients += 1

    def try_states(self, optimizer: torch.optim.Optimizer) -> None:
        for one in self._tried:
            one.states(optimizer)

    def tried_update(self, rounder: Rounder, also: str, sums: Tensor) -> None:
        place = Place(layer_of(*rounder.names), rounder.site, str(rounder.rule), also)
        with self._lock:
            self._at(place, sums.device).add(update=sums)

    # What it heard.

    def take(self, over_processes: Callable[[Any], list[Any]] | None = None) -> list[dict[str, Any]]:
        """The rows since the last `take`, which forgets them: see `rows`.

        over_processes: from what this process has to what all have; the sums are of all of them then, in all.
        """
        rows, self._rows = self._rows, []
        return rows + self._fetched(over_processes)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each watched step, layer and site, in the order of the steps (docs/watch.md); waits for the
        devices. Of several processes, each has what it heard."""
        self._rows += self._fetched(None)
        return list(self._rows)

    def _fetched(self, over_processes: Callable[[Any], list[Any]] | None) -> list[dict[str, Any]]:
        for device in self._devices:
            torch.cuda.synchronize(device)
        ended = [(step, _merged(parts)) for step, parts in self._ended]
        self._ended.clear()
        if over_processes is not None:
            first, *others = over_processes(ended)
            ended = _over_processes(first, others)
        return [sums.row(step, place) for step, by_place in ended for place, sums in by_place.items()]

    def state_dict(self) -> dict[str, Any]:
        """The last step that moved each parameter, by site and name; the delayed scales of what is tried."""
        moved = {f"{site} {self._names[p]}": int(step) for (site, p), step in self._moved.items() if p in self._names}
        delayed = {one.text: one.clock.delayed.state_dict() for one in self._tried}
        return {"moved": self._moved_before | moved, "delayed": delayed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moved.clear()
        self._moved_before = {str(name): int(step) for name, step in state["moved"].items()}
        for one in self._tried:
            one.clock.delayed.load_state_dict(state["delayed"].get(one.text, {}))


def _merged(parts: Iterable[tuple[Place, _Sums]]) -> _ByPlace:
    merged: _ByPlace = {}
    for place, sums in parts:
        merged.setdefault(place, _Sums()).plus(sums)
    return merged


def _over_processes(first: list[tuple[int, _ByPlace]], others: Iterable[Any]) -> list[tuple[int, _ByPlace]]:
    """The sums of all processes: of what flows, all of them; parameters are the same everywhere."""
    for other in others:
        for (_, mine), (_, theirs) in zip(first, other, strict=True):
            for place, sums in theirs.items():
                if place.site.partition(".")[0] not in OF_PARAMETERS:
                    mine.setdefault(place, _Sums()).plus(sums)
    return first


def _is_behind(weights: Kept, p: Tensor) -> bool:
    """Whether an accumulator or a compensation stands behind a parameter, which may be in float32 itself."""
    return p in weights.masters or p in weights.lost


def _is_plain(x: Tensor) -> bool:
    """Whether the tensor has numbers to be looked at: it is not fake, and no transform of torch.func is active."""
    return not torch_private.transforms_are_active() and not torch_private.is_fake(x) and x.numel() > 0


def watch(model: nn.Module, every: int = 1, also: str | Sequence[str] = ()) -> Watcher:
    """Listen to what rounding loses in step 1 of `model` and in every `every`-th step: a Watcher, whose rows() has it.

    model: of quantize_model; its optimizer of quantize_optimizer, whose steps are counted. Another call ends the one
    before. Nothing that is computed changes by a bit. also: what is tried beside it, "FORMAT[:ROUNDING]" or
    "recipe:NAME", on the tensors of this run, which may be one in float32: of quantize_model(model) without a site.
    SettingError for an `every` that is no whole number above 0 and for unknown names, ValueError for a model that is
    not rounded, and with the backend qtorch.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise SettingError("every", shown(every, repr), "a whole number >= 1")
    low = LowPrecision.of(model)
    if low is None:
        raise ValueError("watch: this model is not rounded: call quantize_model(model, ...) first")
    if low.scheme.backend == "qtorch":
        raise ValueError("watch: given a model with backend='qtorch', whose OptimLP rounds by itself")
    texts: list[Any] = list(also) if isinstance(also, list | tuple) else [also]
    if wrong := [text for text in texts if not isinstance(text, str) or not text]:
        raise SettingError("also", shown(wrong[0], repr), f"{FORM}, or a list of them")
    names = list(dict.fromkeys(map(tried_named, texts)))
    tried = [Tried(name, low.scheme, low.clock.seed, low.model, low.parameter_names) for name in names]
    if isinstance(low.clock.watcher, Watcher):
        low.clock.watcher.stop()
    watcher = Watcher(low.parameter_names, every, low.clock.step, tried)
    if tried:
        watcher.try_beside(low)
    low.clock.watcher = watcher
    return watcher
