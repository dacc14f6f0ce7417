"""A page of runs (`report.py --html`): how large, how quick, and pictures of it, in the system's chromium.

`python bench/page.py runs/many` makes the page of these records and opens it, so many times each, and prints medians
and ranges: megabytes; seconds of `report.py`, its start included; seconds in the browser, from the beginning of loading
until the text and tables stand, and until the first chart does. `--pictures images` makes the pictures of docs/page.md.
playwright is needed, which requirements-test.txt has.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1400, 900
# Notes when text and first chart stand: the page tells both by attributes.
NOTE = """new MutationObserver(() => {
  if (document.body?.dataset.ready) window.textStands ??= performance.now();
  if (document.querySelector(".plot[data-drawn]")) window.chartStands ??= performance.now();
}).observe(document, { subtree: true, attributes: true, childList: true })"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/page.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("records", nargs="+", type=Path, help="record folders, or folders of them")
    parser.add_argument("--repeats", type=int, default=5, help="0: pictures alone [default: 5]")
    parser.add_argument("--pictures", type=Path, help="a folder for page.png and page_layers.png")
    asked = parser.parse_args(argv)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("bench/page.py: error: it needs playwright, which requirements-test.txt has", file=sys.stderr)
        return 2
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("bench/page.py: error: it needs chromium: apt-get install chromium", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "page.html"
        built = [build(asked.records, file) for _ in range(max(1, asked.repeats))]
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opened = [opening(browser, file) for _ in range(asked.repeats)]
        if opened:
            print(f"size: {file.stat().st_size / 1e6:.2f} MB (n = {asked.repeats}, {os.cpu_count()} processors)")
            told("report.py", built)
            told("text stands", [text for text, _ in opened])
            told("first chart stands", [chart for _, chart in opened])
        if asked.pictures:
            pictures(browser, file, asked.pictures)
        browser.close()
    return 0


def build(records: Sequence[Path], file: Path) -> float:
    started = time.perf_counter()
    command = [sys.executable, ROOT / "report.py", *records, "--html", file]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def opening(browser: Any, file: Path) -> tuple[float, float]:
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.add_init_script(NOTE)
    page.goto(file.as_uri(), wait_until="commit")
    page.wait_for_function("() => window.chartStands")
    text, chart = page.evaluate("[window.textStands, window.chartStands]")
    page.close()
    return text / 1000, chart / 1000


def told(name: str, seconds: Sequence[float]) -> None:
    print(f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


def pictures(browser: Any, file: Path, folder: Path) -> None:
    """page.png: from the top to where the runs end, light. page_layers.png: the watched layers, dark."""
    for name, scheme, first, last in (
        ("page.png", "light", "body", "#runs .plot"),
        ("page_layers.png", "dark", "#layers", "#layers"),
    ):
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-ready]")
        # The list of sections stays above what is scrolled to, and would cover it.
        page.add_style_tag(content="header { position: static !important; }")
        for plot in page.locator(".plot").all():
            if plot.is_visible():
                plot.scroll_into_view_if_needed()
                page.wait_for_function("plot => plot.dataset.drawn", arg=plot.element_handle())
        page.evaluate("scrollTo(0, 0)")
        top, bottom = page.locator(first).bounding_box()["y"], page.locator(last).first.bounding_box()
        clip = {"x": 0, "y": top, "width": WIDTH, "height": bottom["y"] + bottom["height"] - top}
        page.screenshot(path=folder / name, full_page=True, clip=clip)
        page.close()
        smaller(folder / name)


def smaller(path: Path) -> None:
    """The same picture, in as few bytes as PNG can."""
    from PIL import Image  # matplotlib brings it

    Image.open(path).convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
