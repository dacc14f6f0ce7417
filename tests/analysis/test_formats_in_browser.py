"""The page of formats opened, pointed at and walked through by keyboard, in a real browser that may reach nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import report

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")]
# Where a value lies in the window, by plotly's own axes.
PLACE = """([plot, x, y]) => {
  const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
  return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
}"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "formats.html"
    assert report.main(["--formats", "float8_e4m3fn,nf4:stochastic,mxfp4,float32", "--html", str(path)]) == 0
    return path


@pytest.fixture(params=[(1400, "light"), (400, "dark")], ids=str)
def page(request, file):
    """It may ask for no other file, and complain of nothing."""
    width, scheme = request.param
    asked, complaints = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-ready]")
        yield page
        browser.close()
    assert asked == [file.as_uri()]
    assert complaints == []


def chart(page, section: str):
    """A section's chart, drawn."""
    found = page.locator(f"#{section} .plot")
    found.scroll_into_view_if_needed()
    page.wait_for_function("plot => plot.dataset.drawn", arg=found.element_handle())
    return found


def read(found) -> str:
    return found.locator("xpath=../p[@class='readout']").inner_text()


def chosen(page, found, control: str, value: str) -> None:
    """Wait until a control has drawn a chart anew."""
    before = found.get_attribute("data-drawn")
    page.select_option(control, value)
    page.wait_for_function("([plot, n]) => plot.dataset.drawn !== n", arg=[found.element_handle(), before])


def test_the_page_of_formats(page):
    assert page.locator("nav a").all_inner_texts() == [
        *("Range", "Number line", "Relative error", "Groups that share a scale", "About this page"),
    ]
    largest = page.locator("#facts-table tr", has=page.locator("th", has_text="largest")).first
    assert largest.locator("td").all_inner_texts() == ["448", "1", "6", "3.402823e+38"]
    line = chart(page, "line")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]

    left, top = page.evaluate(PLACE, [line.element_handle(), 416 / 448, 3])
    page.mouse.move(left - 3, top)
    page.mouse.move(left, top, steps=2)
    line.locator(".hoverlayer .hovertext").wait_for()
    assert read(line) == "float8_e4m3fn, 416 = 1.625 · 2⁸, bits 01111101, to the next 32 = 2⁵"

    line.focus()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")  # to the first value of the first format
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Home")
    assert read(line).startswith("nf4, -1, ") or read(line).startswith("nf4, -1 = ")

    chosen(page, line, "#line-group", "2")  # a group with amax 1.5, whose scale is 2^-2 too
    assert page.locator("#errors-group").input_value() == "2"
    line.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    assert read(line) == "mxfp4, 1.5 = 1.5 · 2⁰, element 6"
    chosen(page, line, "#axis", "powers")
    assert min(line.evaluate("plot => plot.data[2].x")) == 0.125


def test_errors_of_formats(page):
    errors = chart(page, "errors")
    points = errors.evaluate("plot => plot.data.map((one) => one.x.map((x, i) => [x, one.y[i]]))")
    middle = dict(map(tuple, points[0]))[1.0625]  # of 1 and 1.125
    assert middle == pytest.approx(100 * 0.0625 / 1.0625)
    reach = errors.evaluate("plot => plot._fullLayout.xaxis.range")
    chosen(page, errors, "#reach", "2")
    narrow = errors.evaluate("plot => plot._fullLayout.xaxis.range")
    assert narrow[1] - narrow[0] < 0.1 * (reach[1] - reach[0])
    errors.focus()
    page.keyboard.press("ArrowRight")
    assert read(errors).startswith("float8_e4m3fn:nearest, at ")
    assert "largest error 100 %" in read(errors)
