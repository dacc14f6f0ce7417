"""One HTML file that needs nothing else: no network, no other file, no server.

Templates are in templates/. The data, and the plotting library, are in the file compressed, and the browser unpacks
them: plotly's script alone is 4.8 MB, and 2.0 MB as it is here. A policy in the page's head forbids the browser to load
anything from anywhere.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.page_data import page_data
from analysis.runs import Run, write

TEMPLATES = Path(__file__).parent / "templates"
# Of a page of runs, beside those of every page.
RUNS_SCRIPTS = ("settings.js", "curves.js", "ends.js", "exponents.js", "layers.js", "runs.js")
NEEDED = "plotly, which `pip install plotly` installs"


def write_page(runs: Sequence[Run], metric: str, path: Path, title: str = "") -> None:
    """A page of these runs. ValueError, in a line, where plotly is not installed."""
    data = page_data(runs, metric, path.resolve().parent, title)
    write(path, document(data["title"], data, RUNS_SCRIPTS))


def document(title: str, data: dict[str, Any], scripts: Sequence[str]) -> str:
    """The whole file. scripts: of templates/, beside those of every page; the last one draws `data`."""
    parts = {
        "style": _template("page.css"),
        "data": packed(json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)),
        "plotly": packed(plotly_script()),
        "script": "\n".join(_template(name) for name in ("dom.js", "table.js", "chart.js", *scripts)),
        "title": html.escape(title),  # last: nothing is looked for in what it brings
    }
    text = _template("page.html")
    for name, part in parts.items():
        before, mark, after = text.partition(f"{{{{ {name} }}}}")
        assert mark, name
        text = before + part + after
    return text


def plotly_script() -> str:
    """The library that draws, as one script. ValueError where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError(f"--html needs {NEEDED}") from None
    return str(get_plotlyjs())


def packed(text: str) -> str:
    """gzip in base64: the same text of the same text, without anything that HTML could take for a tag."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
