"""A page opened, hovered, clicked and walked through by keyboard, in a real browser that may reach nothing."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
from pathlib import Path

import pytest
from page_helpers import LAYERS, layer_lines, shadow_lines, write_lines, write_record

import report
from settings.config import Config

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here, which drives a browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no chromium here, in which pages are tested")]

HOSTILE = "<img src=x onerror=alert(1)></script><b>fc</b>"  # a layer may have any name
STEPS = (0, 50, 100, 150)
EPOCHS = 6
# Where a value lies in the window, by plotly's own axes.
PLACE = """([plot, x, y]) => {
  const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
  return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
}"""
FOCUS = """() => {
  const one = document.activeElement, style = getComputedStyle(one);
  return { name: one.id || one.getAttribute("aria-label") || one.textContent.trim().slice(0, 60), tag: one.tagName,
    visible: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    section: one.closest("section")?.id ?? "" };
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A page alone in a folder: four seeds of two settings, watched ones among them."""
    folder = tmp_path_factory.mktemp("records")
    for seed in range(4):
        for precision in ("float32", "float8"):
            config = Config.make(dataset="boston", epochs=EPOCHS, seed=seed, precision=precision)
            record = write_record(folder / "runs", config)
            if seed == 0:
                rule = {"float32": "float32", "float8": "float8:nearest"}[precision]
                lines = layer_lines(rule, (*LAYERS, HOSTILE), STEPS)
                if precision == "float32":
                    lines += layer_lines("nvfp4:nearest", LAYERS, STEPS, also="nvfp4")
                write_lines(record / "layers.jsonl", lines)
                write_lines(record / "shadow.jsonl", shadow_lines(steps=STEPS))
    assert report.main([str(folder / "runs"), "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


class Opened:
    """A page in a window of its own, and all that it asked for or complained of."""

    def __init__(self, browser, file: Path, width: int = 1400, scheme: str = "light"):
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.context.route("**/*", self._route)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("dialog", lambda dialog: (self.complaints.append("a dialog"), dialog.dismiss()))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("body[data-ready]")

    def _route(self, route) -> None:
        self.requests.append(route.request.url)
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            route.abort()

    def chart(self, section: str, number: int = 0):
        """One of a section's charts, drawn."""
        chart = self.page.locator(f"#{section} .plot").nth(number)
        chart.scroll_into_view_if_needed()
        self.page.wait_for_function("plot => plot.dataset.drawn", arg=chart.element_handle())
        return chart

    def drawn_again(self, chart, action) -> None:
        """Wait until the action has drawn that chart anew."""
        before = chart.get_attribute("data-drawn")
        action()
        self.page.wait_for_function("([plot, n]) => plot.dataset.drawn !== n", arg=[chart.element_handle(), before])

    def readout(self, chart) -> str:
        return chart.locator("xpath=../p[@class='readout']").inner_text()

    def go_to(self, chart, x: float, y: float) -> tuple[float, float]:
        """Move the mouse to a value of a chart."""
        left, top = self.page.evaluate(PLACE, [chart.element_handle(), x, y])
        self.page.mouse.move(left - 3, top)
        self.page.mouse.move(left, top, steps=2)
        return left, top

    def focus(self) -> dict:
        return self.page.evaluate(FOCUS)


@pytest.fixture
def opened(browser, file):
    one = Opened(browser, file)
    yield one
    assert one.complaints == []
    assert one.requests == [file.as_uri()]
    one.context.close()


def median_at(epoch: int, worse: float) -> float:
    return statistics.median(1 / epoch + seed / 1000 + worse for seed in range(4))


def test_it_loads_nothing_and_shows_everything(opened, file):
    page = opened.page
    assert page.locator("h1").inner_text() == page.title()
    assert "2 settings, 8 runs: 8 complete." in page.locator("main").inner_text()
    assert page.locator("nav a").all_inner_texts() == [
        "Settings",
        "Curves",
        "Runs",
        "Layers",
        "Shadow",
        "About this page",
    ]
    for section, charts in {"curves": 1, "runs": 1, "layers": 3, "shadow": 1}.items():
        visible = [
            i
            for i in range(page.locator(f"#{section} .plot").count())
            if page.locator(f"#{section} .plot").nth(i).is_visible()
        ]
        assert len(visible) == charts
        for number in visible:
            opened.chart(section, number)
    assert page.locator("#settings-table tbody tr").count() == 2
    links = page.locator("#runs-table a")
    assert links.count() == 8
    for i in range(8):
        target = file.parent / links.nth(i).get_attribute("href")
        assert (target / "config.json").is_file()


def test_the_mouse_reads_a_median(opened):
    chart = opened.chart("curves")
    for epoch, worse, name in ((3, 0.4, "float8 nearest"), (6, 0.0, "float32")):
        opened.go_to(chart, epoch, median_at(epoch, worse))
        hover = chart.locator(".hoverlayer .hovertext")
        hover.wait_for()
        opened.page.wait_for_function(
            "([plot, text]) => plot.nextSibling.textContent.includes(text)",
            arg=[chart.element_handle(), f"epoch {epoch}:"],
        )
        said = opened.readout(chart)
        value = float(re.search(rf"epoch {epoch}: ([\d.]+)", said)[1])
        assert value == pytest.approx(median_at(epoch, worse), rel=5e-4)
        assert said.startswith(name)
        assert "4 of 4 runs" in said
        assert f"epoch {epoch}: {value:g}" in hover.text_content()


def test_a_click_on_a_run_marks_its_record(opened):
    chart = opened.chart("runs")
    x, y = chart.evaluate(
        """plot => {
          const trace = plot.data.find((one) => one.text[2].includes("float8"));
          return [trace.x[2], trace.y[2]];
        }"""
    )
    left, top = opened.go_to(chart, x, y)
    chart.locator(".hoverlayer .hovertext").wait_for()
    opened.page.mouse.click(left, top)
    marked = opened.page.locator("#runs-table tr.marked")
    marked.wait_for()
    assert marked.locator("td").all_inner_texts()[1:4] == ["2", f"{1 / EPOCHS + 0.402:.4g}", "complete"]


def test_a_click_on_a_cell_shows_its_exponents_over_the_range(opened):
    chart = opened.chart("layers")
    chosen = opened.page.locator("#layers-run").evaluate("one => one.selectedOptions[0].text")
    assert chosen == "float8 nearest, seed 0"  # what rounds comes before what was tried
    opened.drawn_again(chart, lambda: opened.page.select_option("#layers-statistic", "flushed"))
    layer = len(LAYERS) - 1  # the last but the hostile one, which is the lowest row
    left, top = opened.go_to(chart, 2, 1)
    chart.locator(".hoverlayer .hovertext").wait_for()
    flushed = 0.2 * (layer + 1) / (len(LAYERS) + 2)
    assert opened.readout(chart) == f"{LAYERS[layer]} weights, step 100: {100 * flushed:.3g} %, float8:nearest"
    exponents = opened.chart("layers", 2)
    chart.scroll_into_view_if_needed()
    left, top = opened.go_to(chart, 2, 1)
    opened.drawn_again(exponents, lambda: opened.page.mouse.click(left, top))
    assert opened.page.locator("#layers-detail").inner_text() == f"{LAYERS[layer]} weights: float8:nearest"
    drawn = exponents.evaluate(
        "plot => ({ bars: plot.data[0], shapes: plot.layout.shapes, title: plot.layout.xaxis.title.text })"
    )
    assert drawn["title"].endswith("step 100")
    line = next(
        one
        for one in layer_lines("float8:nearest", (*LAYERS, HOSTILE), STEPS)
        if one["layer"] == LAYERS[layer] and one["step"] == 100
    )
    counts, lowest = line["exponents"]["counts"], line["exponents"]["lowest"]
    assert drawn["bars"]["y"] == pytest.approx([100 * count / sum(counts) for count in counts])
    assert drawn["bars"]["x"] == [lowest + i + 0.5 for i in range(len(counts))]
    # float8 is 1-5-2 with a bias of 15: subnormals from 2**-16, normal numbers from 2**-14 to 1.75 * 2**16.
    largest = round(math.log2(1.75 * 2**16), 3)
    assert [(shape["x0"], shape["x1"]) for shape in drawn["shapes"]] == [
        (-16, -14),
        (-14, largest),
        (-16, -16),
        (largest, largest),
    ]


def test_two_runs_stand_side_by_side_in_one_scale_of_colours(opened):
    opened.chart("layers")  # drawn alone, and wider, before
    opened.page.select_option("#layers-beside", label="float32, seed 0, as nvfp4 would round it")
    charts = [opened.chart("layers", k) for k in (0, 1)]
    opened.page.wait_for_function("() => document.querySelectorAll('#layers .plot')[1].data?.length")
    boxes = [chart.bounding_box() for chart in charts]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    opened.page.wait_for_function("() => document.querySelectorAll('#layers .plot')[0].dataset.drawn > 1")
    drawn = [chart.locator(".main-svg").first.bounding_box() for chart in charts]
    assert [one["width"] for one in drawn] == [pytest.approx(box["width"], abs=1) for box in boxes]
    assert [one["height"] for one in drawn] == [pytest.approx(box["height"], abs=1) for box in boxes]
    scales = [chart.evaluate("plot => [plot.data[0].zmin, plot.data[0].zmax]") for chart in charts]
    assert scales[0] == scales[1]


def test_a_map_becomes_curves_and_a_map_again(opened):
    """The axis has its title below its numbers, and clicks are heard, after each."""
    chart = opened.chart("layers")
    for kind in ("scatter", "heatmap"):
        opened.drawn_again(chart, lambda: opened.page.locator("#layers-curves").click())
        assert chart.evaluate("plot => plot._fullData[0].type") == kind
        if kind == "scatter":
            title = chart.locator(".xtitle").bounding_box()
            number = chart.locator(".xtick text").first.bounding_box()
            assert title["y"] >= number["y"] + number["height"] - 1
    left, top = opened.go_to(chart, 1, 2)
    chart.locator(".hoverlayer .hovertext").wait_for()
    assert "trace" not in chart.locator(".hoverlayer").text_content()  # plotly's name of a curve without one
    exponents = opened.chart("layers", 2)
    chart.scroll_into_view_if_needed()
    left, top = opened.go_to(chart, 1, 2)
    opened.drawn_again(exponents, lambda: opened.page.mouse.click(left, top))


def test_the_name_of_a_layer_is_text(opened):
    chart = opened.chart("layers")
    opened.go_to(chart, 0, 0)
    chart.locator(".hoverlayer .hovertext").wait_for()
    assert opened.readout(chart).startswith(f"{HOSTILE} weights, step 0")
    assert opened.page.locator("main img").count() == 0


def test_everything_is_reached_and_seen_by_keyboard(opened):
    """Tab goes through all that can be used, in the order of the page, each with a visible mark; then it leaves."""
    page = opened.page
    for section in ("curves", "runs", "layers", "shadow"):
        opened.chart(section)
    page.evaluate("scrollTo(0, 0)")
    walked = []
    for _ in range(200):
        page.keyboard.press("Tab")
        one = opened.focus()
        if one["tag"] == "BODY" or (walked and one == walked[0]):
            break
        walked.append(one)
    assert walked[0]["name"] == "Skip to the content"
    assert [one for one in walked if not one["visible"]] == []
    order = list(dict.fromkeys(one["section"] for one in walked))
    assert order == ["", "settings", "curves", "runs", "layers", "shadow"]
    names = {one["name"] for one in walked}
    assert {
        "theme",
        "settings-table-filter",
        "metric",
        "each-run",
        "layers-run",
        "layers-statistic",
        "shadow-log",
    } <= names
    usable = page.evaluate("""() => [...document.querySelectorAll("a[href], button, input, select, [tabindex='0']")]
      .filter((one) => one.checkVisibility() && !one.disabled).length""")
    assert len(walked) == usable
    labels = page.evaluate("""() => [...document.querySelectorAll("button, input, select, .plot")]
      .filter((one) => one.checkVisibility())
      .filter((one) => !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim()))
      .map((one) => one.outerHTML)""")
    assert labels == []


def test_arrow_keys_read_a_chart_and_enter_chooses(opened):
    page = opened.page
    curves = opened.chart("curves")
    curves.focus()
    for key, epoch, name in (
        ("ArrowRight", 1, "float32"),
        ("ArrowRight", 2, "float32"),
        ("ArrowDown", 2, "float8"),
        ("End", EPOCHS, "float8"),
    ):
        page.keyboard.press(key)
        said = opened.readout(curves)
        assert said.startswith(name)
        assert f"epoch {epoch}:" in said
        assert page.locator("#said").inner_text() == said  # what a screen reader says
        assert curves.locator(".hoverlayer .hovertext").count() == 1
    page.keyboard.press("Escape")
    assert opened.readout(curves) == ""
    layers = opened.chart("layers")
    other = "float32, seed 0, as nvfp4 would round it"
    opened.drawn_again(layers, lambda: page.select_option("#layers-run", label=other))
    layers.focus()
    page.keyboard.press("ArrowRight")
    assert opened.readout(layers).startswith(f"{LAYERS[0]} weights as nvfp4, step 0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    assert opened.readout(layers).startswith(f"{LAYERS[1]} weights as nvfp4, step 150")
    page.keyboard.press("Enter")
    assert page.locator("#layers-detail").inner_text() == f"{LAYERS[1]} weights as nvfp4: nvfp4:nearest"
    exponents = opened.chart("layers", 2)
    page.wait_for_function("plot => plot.layout.xaxis.title.text.endsWith('step 150')", arg=exponents.element_handle())
    # float4_e2m1fn has 0.5 to 6, of which 1 is the smallest normal number; its scales there are 2**-12 and 2**-6.
    largest = round(math.log2(6), 3)
    bands = [(low - by, high - by) for by in (12, 6) for low, high in ((-1, 0), (0, largest))]
    shapes = exponents.evaluate("plot => plot.layout.shapes.map((one) => [one.x0, one.x1, one.y0, one.y1])")
    assert [tuple(shape[:2]) for shape in shapes[:4]] == [
        pytest.approx(band, abs=0.008) for band in bands
    ]  # three digits
    assert [tuple(shape[2:]) for shape in shapes[:4]] == [(0, 0.5), (0, 0.5), (0.5, 1), (0.5, 1)]
    ends = opened.chart("runs")
    ends.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#runs-table tr.marked td").nth(1).inner_text() == "1"


def test_controls_do_what_they_say(opened):
    page = opened.page
    curves = opened.chart("curves")
    traces = lambda: curves.evaluate("plot => plot.data.length")  # noqa: E731
    assert traces() == 2 * 3  # a median, and the ends of its band
    opened.drawn_again(curves, lambda: page.get_by_label("each run").check())
    assert traces() == 8
    opened.drawn_again(curves, lambda: page.get_by_label("draw float32").uncheck())
    assert traces() == 4
    opened.drawn_again(curves, lambda: page.get_by_label("logarithmic values").check())
    assert curves.evaluate("plot => plot._fullLayout.yaxis.type") == "log"
    opened.drawn_again(curves, lambda: page.select_option("#metric", "training_mse"))
    assert "training MSE" in curves.get_attribute("aria-label")
    assert page.locator("#settings-table tbody td").nth(5).inner_text() == f"{median_at(EPOCHS, 0) / 2:.4g}"
    head = page.get_by_role("button", name="median", exact=True)
    for expected in ("ascending", "descending"):
        head.focus()
        page.keyboard.press("Enter")
        assert page.locator("#settings-table th[aria-sort]").get_attribute("aria-sort") == expected
    assert page.locator("#settings-table tbody tr").first.locator("td").nth(1).inner_text() == "float8 nearest"
    page.locator("#runs-table-filter").fill("float32 seed 3")
    assert page.locator("#runs-table tbody tr").count() == 1
    opened.drawn_again(curves, lambda: page.get_by_role("button", name="Draw what is listed").click())
    assert traces() == 8
    layers = opened.chart("layers")
    opened.drawn_again(layers, lambda: page.select_option("#layers-statistic", "error"))
    assert page.locator("#layers-log").is_checked()
    assert page.locator("#layers-site").input_value() in ("forward", "dgrad", "wgrad")


def test_the_theme_follows_the_system_and_the_switch(browser, file):
    opened = Opened(browser, file, scheme="dark")
    page = opened.page
    back = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    chart = opened.chart("curves")
    ink = lambda: chart.evaluate("plot => getComputedStyle(plot.querySelector('.xtick text')).fill")  # noqa: E731
    dark = back(), ink()
    assert dark[0] == "rgb(20, 24, 29)"
    opened.drawn_again(chart, lambda: page.select_option("#theme", "light"))
    assert back() == "rgb(255, 255, 255)"
    assert ink() != dark[1]
    opened.drawn_again(chart, lambda: page.select_option("#theme", ""))
    assert (back(), ink()) == dark
    opened.drawn_again(chart, lambda: page.emulate_media(color_scheme="light"))
    assert back() == "rgb(255, 255, 255)"
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(browser, file, width, tmp_path):
    opened = Opened(browser, file, width)
    page = opened.page
    for section in ("curves", "runs", "layers", "shadow"):
        chart = opened.chart(section)
        box = chart.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        letters = page.evaluate("""plot => [...plot.querySelectorAll("svg text")].filter((one) => one.textContent)
          .map((one) => one.getBoundingClientRect())
          .filter((box) => box.left < 0 || box.right > innerWidth + 1).length""",
          chart.element_handle())  # fmt: skip
        assert letters == 0
        assert page.evaluate("plot => plot._fullLayout._size.w", chart.element_handle()) > 0.45 * width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if kept := os.environ.get("SCREENSHOTS"):  # a folder: for a person to look at
        page.screenshot(path=Path(kept) / f"page_{width}.png", full_page=True)
    assert opened.complaints == []
    opened.context.close()


def test_what_the_file_says_of_the_browser_it_needs(file):
    """The policy that forbids every request stands before anything that could make one."""
    text = file.read_text()
    policy = text.index("default-src 'none'")
    assert policy < text.index("<style>") < text.index("<script")
    assert json.dumps("http") not in text[:policy]
