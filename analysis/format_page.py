"""A page of formats: what report.py's --formats prints, to look at and to point at. It needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.format_data import Drawn, drawn
from analysis.page import document
from analysis.runs import write
from low_precision import facts, format_pages, group_facts
from low_precision.format_text import error_name, number
from low_precision.formats import BlockFormat, Format
from low_precision.rules import Rule

SCRIPTS = ("formats.js",)
PARTS = (1.0, 1.25, 1.5, 1.75, 1.9921875)  # of amax, between which the page's groups are chosen


def write_page(rules: Sequence[Rule], amax: float, path: Path, title: str = "") -> None:
    """A page of these formats. ValueError, in a line, where plotly is not installed."""
    data = page_data(rules, amax, title)
    write(path, document(data["title"], data, SCRIPTS))


def page_data(rules: Sequence[Rule], amax: float, title: str = "") -> dict[str, Any]:
    """What the page's script draws: numbers, and the texts that are read beside them."""
    said = [format_pages.facts_of(rule) for rule in rules]
    names = format_pages.in_order([list(one) for one in said])
    heads = [str(rule.format) for rule in rules]
    return {
        "title": title or f"Number formats: {', '.join(heads)}",
        "facts": [[name, *(one.get(name, "") for one in said)] for name in names],
        "formats": [_format(rule, amax) for rule in rules],
        "amaxes": [[part, number(amax * part)] for part in _parts(amax)],
    }


def _parts(amax: float) -> list[float]:
    return [part for part in PARTS if amax * part <= group_facts.LARGEST]


def _format(rule: Rule, amax: float) -> dict[str, Any]:
    fmt, is_group = rule.format, isinstance(rule.format, BlockFormat)
    shown = [drawn(rule, amax * part) for part in _parts(amax)] if is_group else [drawn(rule, amax)]
    return {
        "name": str(fmt),
        "rule": str(rule),
        "bits": fmt.bits,
        "source": fmt.source,
        "error": error_name(rule.rounding),
        "isGroup": is_group,
        "by": "standard deviation" if is_group and fmt.scaling.kind == group_facts.QUEST else "amax",
        "groups": [list(row) for row in format_pages.group_rows(rule, amax)] if is_group else [],
        "shown": [_shown(one, fmt if isinstance(fmt, Format) and facts.is_listed(fmt) else None) for one in shown],
    }


def _shown(one: Drawn, coded: Format | None) -> dict[str, Any]:
    """coded: the format whose values' bits are told."""
    values = [*(-value for value in reversed(one.below)), *([0.0] if one.zero else []), *one.above]
    return {
        "values": values,
        "codes": [facts.code_of(coded, value) for value in values] if coded else None,
        "hidden": max(one.number - len(one.above), 0),
        "scale": None if one.amax is None else one.scale,
        "curve": [[x, error] for x, error in one.curve],
    }
