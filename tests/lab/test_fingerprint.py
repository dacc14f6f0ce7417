"""The fingerprint of the code: what changes it, what does not, and that it is the same everywhere."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT

from lab.fingerprint import LIBRARY, SURROUNDING, fingerprint_of, words

SOURCE = '''
"""About the module."""
from __future__ import annotations
import a.b as c, d
from e import (f, g as h)
from . import i

LIMIT: float = 1e-3
TABLE = {"a": 1, **c, 2: [x for x in range(3) if x], 3: {*d}, 4: (yes := not 5), None: ..., b"\\x00": 1j}

@c.cache(size=-1)
class A(d, metaclass=h):
    """About the class."""

    x: int = 0
    """About x."""

    async def f(self, p, /, q=1, *rest: int, k, l=2.0, **others) -> None:
        """About the function."""
        global LIMIT
        async with p as (m, n), q:
            await p(*rest, k=1, **others)
        async for o in p:
            yield o
        else:
            raise ValueError(f"{o!r:>{k}} of {l:.2f}{q=}" "and" f" more {{}}") from None

def g(x):
    try:
        y = x[1:2, ..., ::3] @ x.T if x else lambda z=1: z ** 2 // 3
        y += -x; del x
    except (ValueError, TypeError) as error:
        assert error, "text \\u00e9"
    finally:
        pass
    match y:
        case [1, *z] | {"k": None, **z} | A(x=True, y="s") if z: return z
        case _: pass
    while 1 < y <= 2 is not None:
        nonlocal_ = y and x or not z
        continue
    return
'''


def digest(text: str) -> str:
    return hashlib.sha256("\n".join(words(ast.parse(text))).encode()).hexdigest()


def test_the_words_of_a_syntax_tree_are_those_of_other_versions_of_python():
    """Made once, with Python 3.11, and the same with 3.10, 3.12 and 3.13."""
    assert digest(SOURCE) == "b374c078f24e2a64b7b5f8d496ca7249bcaff2ccc4ecbedf8ec8335fa8e058a6"


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("x = 1", "x = 1  # one\n\n\n"),
        ("x = 'a'", 'x = ("a")'),
        ("f(1, 2)", "f(\n    1,\n    2,\n)"),
        ("def f():\n    return 1", 'def f():\n    """One."""\n    return 1'),
        ("def f(): pass", 'def f():\n    """Nothing."""'),
        ('"""Old."""\nx = 1', '"""New, and\nlonger."""\nx = 1'),
        ("class A:\n    x = 1", 'class A:\n    """An A."""\n\n    x = 1\n    "of one"'),
        ("x = 1_000; y = 0x10", "x = 1000\ny = 16"),
        ("x = f'{a}' 'b'", "x = f'{a}b'"),
        ("x = 'a' 'b'", "x = 'ab'"),
        ("if a:\n\tb", "if a:\n        b"),
        ("x = 1\r\ny = 2\r\n", "x = 1\ny = 2\n"),
    ],
)
def test_what_changes_nothing(text, other):
    assert digest(text) == digest(other)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("x = 1", "x = 2"),
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = 1", "x = '1'"),
        ("x = 'a'", "x = b'a'"),
        ("x = 'a'", "x = a"),
        ("x = 0.1", "x = 0.1000000000000001"),
        ("x = a + b", "x = a - b"),
        ("x = a + b", "x = b + a"),
        ("x = (a + b) * c", "x = a + b * c"),
        ("f(a, b=c)", "f(a, c)"),
        ("def f(a, b=1): return a", "def f(a, *, b=1): return a"),
        ("def f(a, /): return a", "def f(a): return a"),
        ("def f(): return", "async def f(): return"),
        ("if a:\n    b\nc", "if a:\n    b\n    c"),
        ("if a:\n    b", "while a:\n    b"),
        ("if a:\n    b\nelse:\n    c", "if a:\n    c\nelse:\n    b"),
        ("x = [1, [2], 3]", "x = [1, [2, 3]]"),
        ("x = {**a}", "x = {None: a}"),
        ("x[a:b]", "x[a::b]"),
        ("from a import b", "from .a import b"),
        ("import a", "import a as b"),
        ("x = f'{a}b'", "x = f'{a}c'"),
        ("x = f'{a!r}'", "x = f'{a}'"),
        ("x = f'{a:3}'", "x = f'{a:4}'"),
        ("def f():\n    'text'\n    return 1", "def f():\n    return 'text'"),
        ("x = 'a\\nb'", "x = 'a b'"),
        ("match x:\n    case None: y", "match x:\n    case True: y"),
        ("@a\ndef f(): return", "def f(): return"),
        ("a; b", "b; a"),
    ],
)
def test_what_changes_it(text, other):
    assert digest(text) != digest(other)


def pythons() -> list[str]:
    """The interpreters of this machine that can run lab/fingerprint.py."""
    known = {sys.executable, *(shutil.which(f"python3.{minor}") for minor in range(10, 16))} - {None}
    return sorted(path for path in known if subprocess.run([path, "-V"], capture_output=True).returncode == 0)


def test_every_python_of_this_machine_finds_the_same(tmp_path):
    script = tmp_path / "all.py"
    script.write_text(
        f"import ast, hashlib, pathlib, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from lab.fingerprint import LIBRARY, ROOT, fingerprint_of, words\n"
        "print(fingerprint_of(ROOT, LIBRARY))\n"
        "for path in sorted(pathlib.Path(ROOT, 'tests').rglob('*.py')):\n"
        "    print(hashlib.sha256('\\n'.join(words(ast.parse(path.read_bytes()))).encode()).hexdigest())\n"
    )
    ran = [subprocess.run([path, "-B", script], capture_output=True, text=True, check=True) for path in pythons()]
    assert len({one.stdout for one in ran}) == 1
    assert len(ran[0].stdout.split()) > 40


# Which files count


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A small tree in the form of a checkout."""
    root = tmp_path / "checkout"
    files = {
        "low_precision/__init__.py": "",
        "low_precision/rounding.py": "ROUND = 1",
        "low_precision/engines/eager.py": "EAGER = 1",
        "sources/boston.csv": "a,b\n1,2\n",
        "sources/cifar10.py": "SIZE = 10",
        "settings/config.py": "LIMIT = 1",
        "settings/flags.py": "HELP = 1",
        "lab/metrics.py": "from data import DATASETS",
        "lab/console.py": "COLUMNS = 80",
        "data.py": "DATASETS = {}",
        "models.py": "import torch\nMODELS = {}",
        "quant.py": "import low_precision.rounding",
        "train.py": "from lab import metrics",
        "main.py": "import train",
        "mine.py": "import deeper.net\nMINE = 1",
        "other.py": "OTHER = 1",
        "deeper/__init__.py": "",
        "deeper/net.py": "from . import layers",
        "deeper/layers.py": "import other",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def of(root: Path) -> str:
    return fingerprint_of(root, root / "low_precision")


DECIDING = ["low_precision/rounding.py", "low_precision/engines/eager.py", "sources/cifar10.py", "settings/config.py"]
DECIDING += ["lab/metrics.py", "data.py", "models.py", "quant.py", "train.py"]


@pytest.mark.parametrize("name", DECIDING)
def test_a_file_that_decides_a_result_counts(checkout, name):
    before = of(checkout)
    with open(checkout / name, "a") as file:
        file.write("\n# a comment\n")
    assert of(checkout) == before
    with open(checkout / name, "a") as file:
        file.write("\nMORE = 1\n")
    assert of(checkout) != before


def test_a_data_file_counts_by_its_bytes(checkout):
    before = of(checkout)
    (checkout / "sources" / "boston.csv").write_bytes(b"a,b\r\n1,2\r\n")  # as git may write it on Windows
    assert of(checkout) == before
    (checkout / "sources" / "boston.csv").write_text("a,b\n1,3\n")
    assert of(checkout) != before


DECIDING_NOTHING = ["settings/flags.py", "lab/console.py", "main.py", "mine.py", "deeper/net.py", "runs/notes.py"]
DECIDING_NOTHING += ["lab/.x.py", "lab/__pycache__/x.py", "sources/__pycache__/x.pyc", "sources/.boston.csv.swp"]


@pytest.mark.parametrize("name", DECIDING_NOTHING)
def test_a_file_that_decides_nothing_does_not(checkout, name):
    before = of(checkout)
    (checkout / name).parent.mkdir(exist_ok=True)
    (checkout / name).write_text("X = 2")
    assert of(checkout) == before


@pytest.mark.parametrize("name", ["lab/new.py", "settings/new.py", "low_precision/engines/new.py", "sources/new.csv"])
def test_a_new_file_counts(checkout, name):
    before = of(checkout)
    (checkout / name).write_text("X = 2")
    assert of(checkout) != before


def test_a_name_counts(checkout):
    """The same code in another file is other code: somebody imports it from there."""
    before = of(checkout)
    (checkout / "lab" / "metrics.py").rename(checkout / "lab" / "measures.py")
    assert of(checkout) != before


@pytest.mark.parametrize("name", ["mine.py", "deeper/net.py", "deeper/layers.py", "other.py"])
def test_what_a_model_imports_from_the_checkout_counts(checkout, name):
    (checkout / "models.py").write_text("def net():\n    from mine import MINE\n    return MINE\n")
    before = of(checkout)
    (checkout / name).write_text((checkout / name).read_text() + "\nMORE = 1\n")
    assert of(checkout) != before


def test_a_file_that_is_no_python_counts_by_its_bytes(checkout):
    (checkout / "sources" / "half.py").write_text("def f(:")
    before = of(checkout)
    (checkout / "sources" / "half.py").write_text("def g(:")
    assert of(checkout) != before


def test_the_library_may_lie_elsewhere(checkout, tmp_path):
    before = of(checkout)
    moved = tmp_path / "site-packages" / "low_precision"
    shutil.copytree(checkout / "low_precision", moved)
    assert fingerprint_of(checkout, moved) == before
    (checkout / "low_precision" / "rounding.py").write_text("ROUND = 2")  # nobody imports this one
    assert fingerprint_of(checkout, moved) == before
    (moved / "rounding.py").write_text("ROUND = 2")
    assert fingerprint_of(checkout, moved) != before


def test_the_files_that_are_said_to_decide_nothing_are_there():
    assert LIBRARY == ROOT / "low_precision"
    for folder, names in SURROUNDING.items():
        assert [name for name in names if not (ROOT / folder / f"{name}.py").is_file()] == []


# What is kept between processes


def test_files_are_parsed_once(checkout, tmp_path, monkeypatch):
    kept = tmp_path / "made" / "kept.json"
    expected = fingerprint_of(checkout, checkout / "low_precision", kept)
    assert expected == of(checkout)
    written = kept.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", None)
        assert fingerprint_of(checkout, checkout / "low_precision", kept) == expected
    assert kept.stat().st_mtime_ns == written
    times = (checkout / "data.py").stat()
    (checkout / "data.py").write_text("DATASETS = []")  # of the same size and at the same time
    os.utime(checkout / "data.py", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint_of(checkout, checkout / "low_precision", kept) == of(checkout) != expected


@pytest.mark.parametrize("text", ["", "[", "[]", "3", '{"made_by": 1}', '{"files": {}}', "\x00"])
def test_what_is_kept_may_be_damaged(checkout, tmp_path, text):
    kept = tmp_path / "kept.json"
    kept.write_text(text)
    assert fingerprint_of(checkout, checkout / "low_precision", kept) == of(checkout)
    assert json.loads(kept.read_text())["files"]


@pytest.mark.parametrize("entry", [None, 3, ["x"], {"a": 1}])
def test_an_entry_may_be_damaged(checkout, tmp_path, entry):
    kept = tmp_path / "kept.json"
    fingerprint_of(checkout, checkout / "low_precision", kept)
    text = json.loads(kept.read_text())
    kept.write_text(json.dumps(text | {"files": dict.fromkeys(text["files"], entry)}))
    assert fingerprint_of(checkout, checkout / "low_precision", kept) == of(checkout)


def test_it_need_not_be_kept(checkout, tmp_path):
    (tmp_path / "file").write_text("")
    assert fingerprint_of(checkout, checkout / "low_precision", tmp_path / "file" / "kept.json") == of(checkout)


def test_it_is_kept_where_python_keeps_compiled_code(tmp_path):
    """In a process that has none yet: the first call writes it."""
    code = "from lab.fingerprint import fingerprint; print(fingerprint())"
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == fingerprint_of(ROOT, LIBRARY)
        (kept,) = tmp_path.rglob("fingerprint.*.json")
        assert len(json.loads(kept.read_text())["files"]) > 40
