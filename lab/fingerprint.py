"""The fingerprint of the code that decides a run's result. Files that differ in nothing but comments have the same.

What decides a result is the library, the models, the data sets with the files they read, the training loop, and what
the loop uses of lab/ and settings/. Of a Python file its syntax tree counts, without docstrings; it is written out by
hand, because `ast.dump` writes the same tree differently in different versions of Python. Of any other file every byte
counts, but how the lines of a table end. No torch here: sweep.py and report.py ask before anything is trained.

A run that names a file of its user's own (FILE.py:FUNCTION, FILE.csv:TARGET, FILE.txt) has a second fingerprint behind
that of the code, of these files alone: CODE.FILES.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import low_precision
from data import DATASETS
from lab.files import write_whole
from settings.config import Config
from sources.named_file import named_file

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(low_precision.__file__).resolve().parent  # it may be installed elsewhere
SCRIPTS = ("data.py", "models.py", "quant.py", "train.py")
# What surrounds a run and decides no number of it. Every other file of these folders counts, a new one too. What flags,
# kinds and recipes make of a command line is in the record's settings, and so in the hash of its name.
SURROUNDING = {
    "lab": (
        *("advice", "checkpoint", "console", "files", "fingerprint", "interrupt", "layers", "record", "remarks"),
        *("resume", "sample", "session", "shadow", "step_lines", "wandb_run"),
    ),
    "settings": ("checks", "errors", "files", "flags", "kinds", "qtorch", "recipes", "records", "setting", "stdout"),
    "low_precision": (
        *("apart", "facts", "format_pages", "format_text", "group_facts", "losses", "losses_report", "recipe"),
        *("recipes", "tried", "watcher", "what_if"),
    ),
}
UNKNOWN = "unknown"  # in the place of the fingerprint of a version that recorded none
LENGTH = 16  # hex digits of a fingerprint
_OF_FILES = rf"\.[0-9a-f]{{{LENGTH}}}"
_CHECKOUT = {*SURROUNDING, "sources", *(name.removesuffix(".py") for name in SCRIPTS)}  # modules that count anyhow
_LEFT_OUT = ("ctx", "kind", "type_comment", "type_ignores")  # fields of a syntax tree that change nothing


def fingerprint_of_run(config: Config) -> str:
    """That of the code, and behind a dot that of the user's own files which the run names, as they are now."""
    files: dict[str, Path] = {}
    for name in (config.dataset, config.model_name, config.optimizer):
        if file := named_file(config.placed(name)):
            files[str(file.path)] = file.path.absolute()
        elif path := _added_at_run_time(name):
            files[str(path)] = path
    return fingerprint() + (f".{_fingerprint_of_files(files.values())}" if files else "")


def fingerprints_of_runs(configs: Iterable[Config]) -> list[str]:
    """Of each of them; files that several runs name are read once."""
    of_names: dict[tuple[str, ...], str] = {}
    codes = []
    for config in configs:
        names = tuple(map(config.placed, (config.dataset, config.model_name, config.optimizer)))
        if names not in of_names:
            of_names[names] = fingerprint_of_run(config)
        codes.append(of_names[names])
    return codes


def split_code(code: str) -> tuple[str, str]:
    """The fingerprint of a record without those of its user's own files, and these alone; "" where there are none."""
    return re.sub(_OF_FILES, "", code), "+".join(re.findall(_OF_FILES, code))


def _fingerprint_of_files(paths: Iterable[Path]) -> str:
    """Of files, wherever they lie: their names, and what is in them and in what they import from beside them."""
    cache, lines = _Cache(None), set()
    for path in paths:
        todo, followed = {path.name: path}, set(_CHECKOUT)
        while todo:
            name, place = todo.popitem()
            try:
                facts = cache.of(place)
            except OSError:  # which says itself what is wrong when it is loaded
                facts = _Facts("cannot be read")
            lines.add(f"{name} {facts.digest}\n")
            for module in facts.imports:
                if module not in followed and module != path.stem:
                    followed.add(module)
                    todo |= _module_files(path.parent, module)
    return hashlib.sha256("".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()[:LENGTH]


def _added_at_run_time(name: str) -> Path | None:
    """The file of a function that somebody's own program put into a table of ours; None of our own ones."""
    spec = DATASETS.get(name)
    functions = [spec.rows, spec.downloaded, spec.text] if spec else []
    functions.append(getattr(sys.modules.get("models"), "MODELS", {}).get(name))
    for function in functions:
        with contextlib.suppress(TypeError, OSError):
            path = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").absolute()
            if path.is_file() and path not in [ROOT / script for script in SCRIPTS]:
                return path
    return None


@functools.cache
def fingerprint() -> str:
    """That of the code as its files are at the first call: a run calls it at its beginning, just after loading them."""
    return fingerprint_of(ROOT, LIBRARY, _cache_file())


def fingerprint_of(root: Path, library: Path, cache_file: Path | None = None) -> str:
    """That of a checkout and of the library's folder. cache_file: keeps what was made of each file's bytes."""
    cache = _Cache(cache_file)
    files = _files(root, library)
    digests: dict[str, str] = {}
    followed = set(_CHECKOUT)
    while files:
        name, path = files.popitem()
        facts = cache.of(path)
        digests[name] = facts.digest
        for module in facts.imports:  # a model may lie in a file of the user's own
            if module not in followed:
                followed.add(module)
                files |= _module_files(root, module)
    cache.write()
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def _files(root: Path, library: Path) -> dict[str, Path]:
    """The files that decide a result, by the names that they have in a checkout."""
    files = {path.relative_to(root).as_posix(): path for path in _visible(root / "sources", "*")}
    for folder, surrounding in SURROUNDING.items():
        place = library if folder == "low_precision" else root / folder
        paths = [path for path in _visible(place, "*.py") if path.stem not in surrounding]
        files |= {f"{folder}/{path.relative_to(place).as_posix()}": path for path in paths}
    return files | {name: root / name for name in SCRIPTS}


def _module_files(root: Path, module: str) -> dict[str, Path]:
    """The files of a module or package that lies in the checkout: all of a package's."""
    paths = [root / f"{module}.py"] if (root / f"{module}.py").is_file() else list(_visible(root / module, "*.py"))
    return {path.relative_to(root).as_posix(): path for path in paths}


def _visible(folder: Path, pattern: str) -> Iterator[Path]:
    """The files below a folder but for hidden ones and Python's caches."""
    for path in folder.rglob(pattern):
        parts = path.relative_to(folder).parts
        if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
            yield path


@dataclass(frozen=True)
class _Facts:
    """digest: of a file's syntax tree, or of its bytes. imports: the top names of the modules that it imports."""

    digest: str
    imports: tuple[str, ...] = ()


def _facts(name: str, raw: bytes) -> _Facts:
    tree = None
    if name.endswith(".py"):
        with contextlib.suppress(SyntaxError, ValueError, RecursionError):  # a file that nothing can import counts too
            tree = ast.parse(raw)
    if tree is None:
        # git may change how the lines of a table end; those of a text are characters that a model learns.
        raw = raw if name.endswith(".txt") else raw.replace(b"\r\n", b"\n")
        return _Facts(hashlib.sha256(raw).hexdigest())
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
    tops = sorted({module.partition(".")[0] for module in modules})
    return _Facts(hashlib.sha256("\n".join(words(tree)).encode()).hexdigest(), tuple(tops))


def words(tree: ast.AST) -> Iterator[str]:
    """A syntax tree as words, each without a line end: the same for every version of Python that parses the source.

    Fields without a value are left out, as newer versions have more of them, and so are docstrings and other statements
    that do nothing.
    """
    todo: list[Any] = [tree]
    while todo:
        item = todo.pop()
        if isinstance(item, _Word):
            yield item
        elif isinstance(item, ast.Constant):
            yield f"{type(item.value).__name__} {item.value!a}"
        elif isinstance(item, ast.AST):
            yield f"({type(item).__name__}"
            parts: list[Any] = []
            for field in sorted(item._fields):
                value = getattr(item, field, None)
                if isinstance(item, ast.JoinedStr):
                    value = list(_joined(value))
                elif isinstance(value, list):
                    value = [one for one in value if not _does_nothing(one)]
                if field not in _LEFT_OUT and value not in (None, [], ""):
                    parts += [_Word(field), *([_Word("["), *value, _Word("]")] if isinstance(value, list) else [value])]
            todo += reversed([*parts, _Word(")")])
        else:  # a name, a count, or None in a list
            yield ascii(item)


class _Word(str):
    """A word that is ready, apart from the strings of a syntax tree."""


def _does_nothing(item: Any) -> bool:
    return isinstance(item, ast.Pass) or (isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant))


def _joined(parts: list[ast.expr]) -> Iterator[ast.expr]:
    """The parts of an f-string. Python 3.12 cuts its constant texts elsewhere, and adds empty ones."""
    text = ""
    for part in parts:
        if isinstance(part, ast.Constant):
            text += part.value
            continue
        if text:
            yield ast.Constant(text)
        text = ""
        yield part
    if text:
        yield ast.Constant(text)


def _cache_file() -> Path | None:
    """Beside the compiled code of this file, wherever Python keeps that; None where it has no such place."""
    try:
        return Path(importlib.util.cache_from_source(__file__)).with_suffix(".json")
    except NotImplementedError:
        return None


class _Cache:
    """What was made of files, by their bytes: it cannot be out of date. Parsing takes a hundred times as long.

    path: None for nothing kept. A file that cannot be read or written costs time and nothing else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._used, self._new = path, {}, False
        self._made_by = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        self._kept: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
            kept = json.loads(path.read_bytes()) if path else {}
            if kept.get("made_by") == self._made_by:
                self._kept = dict(kept["files"])

    def of(self, path: Path) -> _Facts:
        raw = path.read_bytes()
        key = f"{path.suffix} {hashlib.sha256(raw).hexdigest()}"
        try:
            digest, imports = self._kept[key]
            facts = _Facts(digest, tuple(imports))
        except (KeyError, TypeError, ValueError):
            facts, self._new = _facts(path.name, raw), True
        self._used[key] = (facts.digest, facts.imports)
        return facts

    def write(self) -> None:
        if self._path and self._new:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._path, json.dumps({"made_by": self._made_by, "files": self._used}))
