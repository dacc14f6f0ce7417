"""What rounding lost, as a table beside the tree of the model's modules: `report`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import nn

from low_precision.model import LowPrecision
from low_precision.watcher import Watcher

# The columns of numbers: their heads, and the fields of a row. One that has no number, or 0 everywhere, is left out.
_SHARES = {"flushed": "flushed", "subnormal": "subnormal", "saturated": "saturated", "not finite": "not_finite"}
_NUMBERS = {"SQNR dB": "sqnr_db", "bias": "bias"}
_UPDATES = {"lost updates": "lost_updates", "arrived": "arrived_norm", "last moved": "last_moved"}
_COLUMNS = _SHARES | _NUMBERS | _UPDATES | {"error": "error", "step": "step"}
_TEXTS = ("module", "site", "rule")
_WHOLE = "(the model)"
_MEANINGS = {
    "flushed": "became zero",
    "subnormal": "became less than the format's smallest normal number, where it has fewer digits",
    "saturated": "were beyond the format's largest number",
    "not finite": "are infinite or NaN",
    "SQNR dB": "the numbers' power over that of the rounding errors: a bit is worth 6 dB, below 0 there is but noise",
    "bias": "the sum of the rounding errors over that of the magnitudes",
    "lost updates": "of the weights that the optimizer moved, how many rounding put back to where they were",
    "arrived": "the length of the update after rounding over that before",
    "last moved": "the last step in which any of the layer's weights moved",
    "error": "how far a product (y: forward, dx: dgrad, dW: wgrad) is from that of unrounded operands",
}
# Of which columns the worst row is named, and how.
_WORST = {"SQNR dB": "lowest SQNR", "saturated": "most saturated", "lost updates": "most lost updates"}
_WORST |= {"error": "largest error"}


@dataclass(frozen=True)
class Report:
    """The newest row of each layer and site (docs/watch.md). str() is a table in the order of the model's modules.

    modules: the types of the modules, by their full names.
    """

    rows: tuple[Mapping[str, Any], ...]
    modules: Mapping[str, str]

    def __str__(self) -> str:
        if not self.rows:
            return "nothing was heard yet: a watcher hears of the training steps after lp.watch"
        heads = self._heads()
        lines = [(*_TEXTS, *heads), *self._lines(heads)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pads: list[Callable[[str, int], str]] = [
            str.ljust if n < len(_TEXTS) else str.rjust for n in range(len(widths))
        ]
        texts = [
            "  ".join(pad(cell, width) for cell, width, pad in zip(line, widths, pads, strict=True)) for line in lines
        ]
        steps = {row["step"] for row in self.rows}
        title = f"What rounding lost in step {max(steps)}" + (
            ", or in the last one that has it" if len(steps) > 1 else ""
        )
        parts = [title, "\n".join(text.rstrip() for text in texts), self._worst(heads), _legend(heads)]
        return "\n\n".join(filter(None, parts))

    def _heads(self) -> list[str]:
        """The columns that say something."""
        # Of updates 0 is good to know, and of weights that never moved all is 0.
        heads = [
            head
            for head, name in _COLUMNS.items()
            if any(row.get(name) or (head in _UPDATES and row.get(name) is not None) for row in self.rows)
        ]
        return heads if len({row["step"] for row in self.rows}) > 1 else [head for head in heads if head != "step"]

    def _worst(self, heads: list[str]) -> str:
        """In which place most was lost, a line for each of some columns."""
        lines = []
        for head, title in _WORST.items():
            is_lowest, name = head == "SQNR dB", _COLUMNS[head]
            rows = [row for row in self.rows if row.get(name) is not None]
            if head not in heads or not rows:
                continue
            worst = (min if is_lowest else max)(rows, key=itemgetter(name))
            if worst[name] or is_lowest:
                where = f"{worst['layer'] or _WHOLE} {worst['site']}"
                rule = _rule(worst)
                what = f"{_cell(head, worst)}{' dB' if is_lowest else ''}"
                lines.append(f"{title:17}  {where}{f' ({rule})' if rule else ''}: {what}")
        return "\n".join(lines)

    def _lines(self, heads: list[str]) -> Iterator[tuple[str, ...]]:
        by_layer: dict[str, list[Mapping[str, Any]]] = {}
        for row in self.rows:
            by_layer.setdefault(row["layer"], []).append(row)
        for name, kind in self.modules.items():
            inside = [layer for layer in by_layer if layer == name or layer.startswith(f"{name}:")]
            is_above = any(not name or layer.startswith(f"{name}.") for layer in by_layer)
            if not (inside or is_above):
                continue
            depth = name.count(".") + 1 if name else 0
            title = f"{'  ' * depth}{name.rpartition('.')[2] or _WHOLE} {kind}"
            for layer in sorted(inside, key=list(by_layer).index):
                _, _, function = layer.partition(":") if layer != name else ("", "", "")
                title = f"{'  ' * (depth + 1)}:{function}" if function and title == "" else title
                for row in sorted(by_layer[layer], key=lambda row: row.get("also") or ""):
                    if function and title and not title.lstrip().startswith(":"):
                        yield (title, *[""] * (len(heads) + 2))
                        title = f"{'  ' * (depth + 1)}:{function}"
                    yield (title, row["site"], _rule(row), *(_cell(head, row) for head in heads))
                    title = ""
            if title:
                yield (title, *[""] * (len(heads) + 2))


def _rule(row: Mapping[str, Any]) -> str:
    rule, also = str(row.get("rule", "")), row.get("also")
    if not also:
        return rule
    return f"tried: {also}" if also == rule or not rule else f"tried: {also}, {rule}"


def _cell(head: str, row: Mapping[str, Any]) -> str:
    value = row.get(_COLUMNS[head])
    if value is None:
        return ""
    if head in ("step", "last moved"):
        return str(value or "never")
    if head == "SQNR dB":
        return f"{value:.1f}"
    percent = 100 * value
    return f"{percent:.3g} %" if abs(percent) >= 1 or not value else f"{percent:.1g} %"


def _legend(heads: list[str]) -> str:
    """What the columns are."""
    shares = [f"{head}: {_MEANINGS[head]}" for head in _SHARES if head in heads]
    lines = [f"Of all numbers of a tensor: {'; '.join(shares)}."] if shares else []
    lines += [f"{head}: {_MEANINGS[head]}." for head in heads if head in _MEANINGS and head not in _SHARES]
    return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What a watched model lost in its last watched step, by module and site: print(lp.report(model)).

    model: of lp.watch. ValueError for a model that nobody watches. Waits for the devices.
    """
    low = LowPrecision.of(model)
    watcher = low.clock.watcher if low else None
    if low is None or not isinstance(watcher, Watcher):
        raise ValueError("report: nobody watches this model: call watch(model) before training")
    newest: dict[tuple[str, str, str | None, str | None], dict[str, Any]] = {}
    for row in watcher.rows():
        newest[row["layer"], row["site"], row.get("rule"), row.get("also")] = row
    kinds = {name: type(module).__name__ for name, module in low.model.named_modules()}
    return Report(tuple(newest.values()), kinds)
