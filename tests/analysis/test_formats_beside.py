"""`report.py --formats`: formats beside each other, as text, figure and page."""

import json
import math
import subprocess
import sys

import pytest
from run_helpers import ROOT

import report
from analysis import format_data, format_page
from low_precision import facts, format_text, group_facts
from low_precision.formats import format_named
from low_precision.rules import rule_of


def text_of(capsys, *words: str) -> str:
    assert report.main(list(words)) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def row(text: str, name: str) -> list[str]:
    """The cells of the first row of that name."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [cell for cell in line.strip().split("  ") if cell]


def cells(text: str, name: str) -> list[str]:
    return [cell.strip() for cell in row(text, name)]


def test_formats_beside_each_other(capsys):
    text = text_of(capsys, "--formats", "float8_e4m3fn,mxfp4:stochastic, nf4")
    assert cells(text, "float8_e4m3fn") == ["float8_e4m3fn", "mxfp4", "nf4"]
    assert cells(text, "rounding") == ["rounding", "nearest", "stochastic", "nearest"]
    assert cells(text, "largest") == ["largest", "448", "6", "1"]
    line = text[text.index("values from 0 to the largest of each") :].splitlines()
    marks = line[2].removeprefix("  mxfp4          ").removesuffix("  1")
    assert [n / 60 for n, mark in enumerate(marks) if mark == "|"] == pytest.approx(
        [value / 8 for value in (0, 1, 2, 3, 4, 6, 8)],
        abs=1 / 119,  # half a place, and a little for ties
    )
    errors = text[text.index("relative error") :]
    assert cells(errors, "2^-9 to 2^-8") == ["2^-9 to 2^-8", "33.3 %", "up to 200 %", "100 %"]
    assert cells(errors, "2^0 to 2^9") == ["2^0 to 2^9", "5.88 %", "-", "beyond"]


def test_a_long_list_is_read_on_a_narrow_screen(capsys):
    """Twenty formats, of which one stands twice: in blocks, with the same rows in each."""
    names = "float32,fp16,bfloat16,tf32,float8,float16,nf4,hif8,int8,fixed8.4,posit8_table,e3m4,binary8p4se,mxfp4,nvfp4"
    text = text_of(capsys, "--formats", f"{names},mxint8,bfp8,int8@row,nf4@64,mxfp4")
    assert max(map(len, text.splitlines())) <= 100
    errors = text[text.index("relative error") :]
    assert errors.count("mxfp4:nearest") == 2
    blocks = [[line.split("  ")[1] for line in block.splitlines() if " to " in line] for block in errors.split("\n\n")]
    assert len(blocks) > 3
    assert all(block == blocks[0] for block in blocks)


def test_neighbours_that_fall_are_one_row_of_a_long_table():
    assert format_text.stretches("aab", [(1.0,), (1.0,), (2.0,)]) == [[0, 1], [2]]
    falling = [(1.0 / n, "-") for n in range(1, 18)]
    assert format_text.stretches(range(17), falling) == [list(range(17))]
    assert format_text.stretches(range(16), falling[:16]) == [[n] for n in range(16)]
    rising = falling[::-1]
    assert format_text.stretches(range(17), rising) == [[n] for n in range(17)]


def test_one_format_is_what_quant_shows(capsys):
    text = text_of(capsys, "--formats", "nvfp4")
    ran = subprocess.run([sys.executable, "quant.py", "--show", "nvfp4"], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--formats", "float8,float9"], "format: given float9 (did you mean float8?), allowed: "),
        (["--formats", ""], "format: given '', allowed: "),
        (["--formats", "float8,"], "format: given '', allowed: "),
        (["--formats", "nf4:stohastic"], "rounding: given stohastic (did you mean stochastic?), allowed: "),
        (["--formats", "mxfp4", "--amax", "-1"], "--amax: given -1, allowed: a number above 0"),
        (["--formats", "mxfp4", "--amax", "x"], "--amax: given x, allowed: a number above 0"),
        (["--formats", "mxfp4", "--amax", "1e-60"], "--amax: given 1e-60, allowed: a number above 0"),
        (["runs", "--amax", "1"], "--amax: given 1, allowed: with --formats alone"),
        (["runs", "--formats", "mxfp4"], "--formats: given it beside paths, allowed: it alone, or with --figure"),
        (["--formats", "mxfp4", "--metric", "loss"], "--formats: given it beside --metric, allowed: "),
        (["--formats", "mxfp4", "--at", "3"], "--formats: given it beside --at, allowed: "),
        (["--formats", "mxfp4", "--figure", "a.pdf"], "--figure: given a.pdf, allowed: a name in .png or .svg"),
        (["--fromats", "mxfp4"], "given --fromats (did you mean --formats?), allowed: a known flag"),
    ],
)
def test_wrong_words_are_one_line(capsys, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"report.py: error: {said}")
    assert len(shown.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["figure.png", "figure.svg"])
def test_the_figure(capsys, tmp_path, name):
    """The same bytes each time, of every kind of format."""
    formats = "float8,fixed8.4,int4,binary8p1ue,nf4,fp16,float32,nvfp4,int8@row:stochastic,float8_e4m3fn@flat128@expand"
    for folder in ("a", "b"):
        text_of(capsys, "--formats", formats, "--figure", str(tmp_path / folder / name), "--title", "All of them")
    first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
    assert first == second
    assert len(first) > 10_000
    if name.endswith("svg"):
        assert b"All of them" in first


def test_what_is_drawn():
    plain = format_data.drawn(rule_of("float4_e2m1fn"), 1.0)
    assert (plain.above, plain.below, plain.zero) == ([0.5, 1, 1.5, 2, 3, 4, 6], [0.5, 1, 1.5, 2, 3, 4, 6], True)
    assert plain.curve[3] == (1.75, 0.25 / 1.75)
    assert plain.curve[-1] == (12.0, 0.5)  # twice the largest value becomes that
    group = format_data.drawn(rule_of("mxfp4"), 3.0)
    assert (group.scale, group.amax) == (0.5, 3.0)
    assert group.above == group.below == [0.25, 0.5, 0.75, 1, 1.5, 2, 3]
    positive = format_data.drawn(rule_of("binary6p2ue"), 1.0)
    assert (positive.below, positive.zero) == ([], True)
    other = format_data.drawn(rule_of("nf4@64"), 2.0)
    assert other.below == pytest.approx([-2 * v for v in reversed(format_named("nf4").values) if v < 0])


@pytest.mark.parametrize("name", ["fp16", "float32", "posit16_table", "int24", "binary16p5se", "int24@row"])
def test_of_many_values_some_are_drawn(name):
    """Values of the format, to its ends, and never far from the next one."""
    drawn = format_data.drawn(rule_of(name), 1.0)
    assert drawn.number > len(drawn.above) < 8000
    fmt = rule_of(name).format
    if hasattr(fmt, "element"):
        assert drawn.above[-1] == 1.0
        return
    line = facts.side(fmt)
    assert (drawn.above[0], drawn.above[-1]) == (line.smallest(), line.last)
    assert all(line.at_or_below(value) == value for value in drawn.above)
    steps = [high - low for low, high in zip(drawn.above, drawn.above[1:], strict=False)]
    if name not in ("posit16_table", "binary16p5se"):  # whose largest values lie further apart than that
        assert max(steps) <= line.last / 1000
    if name == "binary16p5se":  # all of the largest, which no product of theirs with a place may overflow
        assert drawn.above[-3:] == [line.last / 30 * place for place in (28, 29, 30)]


def test_data_of_the_page():
    rules = [rule_of(name) for name in ("float8_e4m3fn", "mxfp4", "fixed4.1", "float32")]
    data = format_page.page_data(rules, 2.0, "")
    json.dumps(data, allow_nan=False)
    e4m3, mxfp4, fixed, float32 = data["formats"]
    by_value = dict(zip(e4m3["shown"][0]["values"], e4m3["shown"][0]["codes"], strict=True))
    assert (by_value[448.0], by_value[-1.0], by_value[2.0**-9], by_value[0.0]) == (
        *("01111110", "10111000", "00000001", "00000000"),
    )
    assert dict(zip(fixed["shown"][0]["values"], fixed["shown"][0]["codes"], strict=True)) == {
        n / 2: f"{n % 16:04b}" for n in range(-8, 8)
    }
    assert [amax for _, amax in data["amaxes"]] == ["2", "2.5", "3", "3.5", "3.984375"]
    assert [shown["scale"] for shown in mxfp4["shown"]] == [0.5] * 5
    assert (mxfp4["shown"][0]["codes"], float32["shown"][0]["codes"]) == (None, None)
    assert float32["shown"][0]["hidden"] > 2**30
    assert [line[0] for line in data["facts"]][:3] == ["rounding", "bits", "group"]
    assert all(len(line) == 5 for line in data["facts"])


@pytest.mark.parametrize("name", ["float8_e5m2", "float6_e2m3fn", "binary8p4se", "binary8p3uf", "fp16"])
def test_the_bits_of_values(name):
    """The code of each positive value is its place; a sign bit before it."""
    fmt = format_named(name)
    above = [value for value in facts.values(fmt) if value >= 0]
    width = facts.width(fmt)
    assert [int(facts.code_of(fmt, value), 2) for value in above] == list(range(len(above)))
    assert {len(facts.code_of(fmt, value)) for value in above} == {width}
    if fmt.signed:
        assert facts.code_of(fmt, -above[5]) == f"{2 ** (width - 1) + 5:0{width}b}"


def test_the_page_needs_nothing(capsys, tmp_path):
    text_of(capsys, "--formats", "float8,nvfp4", "--html", str(tmp_path / "page.html"), "--title", "<b>A & B</b>")
    page = (tmp_path / "page.html").read_text()
    assert "<title>&lt;b&gt;A &amp; B&lt;/b&gt;</title>" in page
    assert "default-src 'none'" in page
    assert math.log10(len(page)) < 6.6  # of which plotly's script is two million


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "float4_e2m1fn@16@binary8p1ue", "tf32@8@e8m0", "int8@row"])
@pytest.mark.parametrize("amax", ["3e38", "1.4e-45", "1"])
def test_groups_at_the_ends_of_float32(capsys, name, amax):
    """Groups beside the one that was asked for are left out where float32 has no such numbers."""
    text = text_of(capsys, "--formats", f"{name},{name}", "--amax", amax)
    assert max(map(len, text.splitlines())) <= 100
    assert "smallest above 0" in text_of(capsys, "--formats", name, "--amax", amax)
    data = format_page.page_data([rule_of(name)], group_facts.float32(float(amax)))
    assert len(data["amaxes"]) == len(data["formats"][0]["shown"]) == (1 if amax == "3e38" else 5)
