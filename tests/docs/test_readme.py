"""README and docs say what is true: their Python runs, commands and links are valid, their tables are up to date."""

import re
import shlex
from dataclasses import fields

import pytest
from run_helpers import ROOT

import main
import quant
import report
import reproduce
import sweep
from data import DATASETS
from low_precision.formats import BLOCKS, NAMED
from low_precision.rounding import Rounding
from low_precision.rules import SITES
from settings.config import MODEL_NAMES, Config, flag
from settings.recipes import RECIPES

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
page_ids = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def commands(page) -> list[list[str]]:
    """The words of each command that calls a script of this project with `python`."""
    text = page.read_text()
    lines = [line for code in blocks(page, "shell") for line in code.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python [^`]+)`", re.sub(FENCE, "", text).replace("\n", " "))
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    return [one[1:] for one in words if one[1:] and one[1].endswith(".py")]


def anchors(page) -> set[str]:
    """What GitHub makes of its headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(FENCE, "", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return set(plain)


@page_ids
def test_links_lead_somewhere(page):
    text = re.sub(FENCE, "", page.read_text())
    wrong = []
    for target in LINK.findall(text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            wrong.append(target)
    assert wrong == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 32_000


@pytest.mark.parametrize("name", ["README.md", "docs/python.md"])
def test_the_python_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(ROOT / name, "python"):
        exec(code.replace("range(200)", "range(2)"), names)
    assert names["lp"].quantize(names["torch"].tensor([0.3]), "float8").item() == 0.3125
    if name != "README.md":
        assert names["result"].summary["status"] == "complete"


@page_ids
def test_commands_are_valid(page):
    for script, *arguments in commands(page):
        assert (ROOT / script).exists(), script
        if any(word.isupper() or "..." in word for word in arguments) or not arguments:  # a placeholder, as FOLDER
            continue
        if script == "main.py" and not {"--help", "--resume"} & set(arguments):
            main.configure(arguments)
        elif script == "sweep.py" and "--help" not in arguments:
            configs, _ = sweep.grid([str(ROOT / word) if word.startswith("sweeps/") else word for word in arguments])
            assert configs
        elif script == "report.py":
            report.Asked.of(arguments)
        elif script == "reproduce.py":
            assert set(arguments) <= {*reproduce.SECTIONS, "all"}
        elif script == "quant.py":
            assert quant.main(arguments) == 0


def test_the_commands_are_the_fifteen_experiments():
    runs = set()
    for script, *arguments in commands(ROOT / "README.md"):
        if script != "main.py" or "--dataset" not in arguments:
            continue
        config, _ = main.configure(arguments)
        if config.dataset not in ("cifar10", "shakespeare") and "--batch-size" in arguments:
            assert (config.epochs, config.learning_rate, config.seed) == (30, 0.01, 42)
            assert config.batch_size == (32 if config.dataset == "toy" else 512)
            runs.add(config.name)
    assert len(runs) == 15


def test_the_first_run_has_the_name_that_it_gets():
    assert f"runs/{Config.make(dataset='boston', precision='float8').folder_name}\n" in README


@pytest.mark.parametrize("f", fields(Config), ids=lambda f: f.name)
def test_every_flag_is_in_the_table_with_its_default(f):
    (row,) = [line for line in README.splitlines() if line.startswith("| `--") and f"`{flag(f.name)}`" in line]
    default = f.metadata["default"].removesuffix(".0")
    if default not in ("none", "the data set's own", "wandb's own setting"):  # there, the table says more
        assert row.split("|")[-2].strip().startswith(default)


@page_ids
def test_flags_and_files_that_are_named_exist(page):
    """CHANGELOG may name what was; the others name what is."""
    if page.name == "CHANGELOG.md":
        return
    text = page.read_text()
    code = [*(c for _, c in FENCE.findall(text)), *re.findall(r"`([^`\n]+)`", re.sub(FENCE, "", text))]
    scripts = "".join((ROOT / name).read_text() for name in ("settings/flags.py", "sweep.py", "report.py", "quant.py"))
    scripts += "".join(
        path.read_text() for path in [*(ROOT / "bench").glob("*.py"), *(ROOT / "experiments").glob("*.py")]
    )
    ours = {flag(f.name) for f in fields(Config)}
    ours |= {"--" + name for name in re.findall(r"\"--([a-z][a-z-]*)\"", scripts)}
    of_others = {"--nproc-per-node", "--no-deps", "--durations", "--fix", "--check", "--help"}
    flags = {name for one in code for name in re.findall(r"(?<![\w-])--[a-z][a-z-]+", one)}
    assert flags - ours - of_others == set()
    rooms = (
        "low_precision",
        "settings",
        "lab",
        "analysis",
        "sources",
        "sweeps",
        "bench",
        "experiments",
        "examples",
        "docs",
    )
    paths = {name for one in code for name in re.findall(rf"(?<![\w/.])(?:{'|'.join(rooms)})/[\w/.]*\w", one)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()] == []


def test_every_name_is_there():
    names = [*DATASETS, *MODEL_NAMES, *NAMED, *BLOCKS, *SITES, *RECIPES, *(rounding.value for rounding in Rounding)]
    assert [name for name in names if name not in README] == []


def test_tables_are_those_of_the_records():
    texts = {page: page.read_text() for page in PAGES}
    count = sum(text.count("\n<!-- report.py ") for text in texts.values())
    assert sum(len(report.BLOCK.findall(text)) for text in texts.values()) == count >= 12
    for page, text in texts.items():
        assert report.rewritten(text, page.parent) == text, page.name
