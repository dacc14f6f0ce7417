"""Compiled loops that cannot be cached, are damaged, or cannot be compiled at all: a warning, and never a run's end."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import ROOT

# What a run does, in short; its warnings come out as JSON, with the name of the engine that is in use at the end.
CODE = """
import json, sys, warnings
sys.path.insert(0, {library!r})
{before}
import torch
from low_precision.engines import choice
from low_precision.tensor import quantize
choice.LOAD_SECONDS = 0.0
x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for rounding in {roundings}:
        for _ in range(2):
            mine = x.clone()
            quantize(mine, "float8", rounding, 1, backend={backend!r}, out=mine)
            assert torch.equal(mine, quantize(x, "float8", rounding, 1, backend="eager"))
print(json.dumps([choice.in_use("auto", x.device), *(str(warning.message) for warning in caught)]))
"""


class Runs:
    """Calls of CODE with a cache of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"

    def __call__(
        self,
        before: str = "",
        backend: str = "auto",
        library: Path = ROOT,
        roundings: tuple[str, ...] = ("nearest",),
        environment: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess:
        code = CODE.format(before=before, backend=backend, library=str(library), roundings=roundings)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "XDG"))}
        variables |= {"NUMBA_CACHE_DIR": str(self.cache)} if environment is None else environment
        command = [sys.executable, "-B", "-c", code]
        return subprocess.run(command, env=variables, cwd=self.folder, capture_output=True, text=True, timeout=300)

    def engine_and_warnings(self, **named) -> list[str]:
        ran = self(**named)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    def files(self, suffix: str) -> list[Path]:
        files = [path for path in self.cache.rglob("*") if path.suffix == suffix]
        assert files
        return files


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A cache that a run has left, to be copied."""
    runs = Runs(tmp_path_factory.mktemp("cached"))
    assert runs.engine_and_warnings() == ["fused"]
    return runs.cache


def no_place(folder: Path) -> Path:
    """A copy of the library beside which nothing can be cached, whoever runs the test."""
    shutil.copytree(ROOT / "low_precision", folder / "low_precision", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "low_precision/engines/__pycache__").write_text("a file in the place of the folder")
    return folder


NOWHERE = os.path.join(os.devnull, "nowhere")  # root, too, can make no such folder


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": NOWHERE},
        pytest.param({"HOME": NOWHERE, "NUMBA_CACHE_DIR": NOWHERE}, marks=pytest.mark.slow),
    ],
)
def test_where_there_is_no_place_for_a_cache(runs, environment):
    library = no_place(runs.folder / "library")
    engine, *told = runs.engine_and_warnings(
        library=library, environment=environment, roundings=("nearest", "stochastic")
    )
    assert engine == "fused"
    (warning,) = told
    assert "no locator available" in warning
    assert "NUMBA_CACHE_DIR" in warning


def test_a_full_disk(runs):
    """Files of this process cannot grow, which is what a full disk comes to."""
    before = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    engine, *told = runs.engine_and_warnings(before=before, roundings=("nearest", "stochastic"))
    assert engine == "fused"
    (warning,) = told
    assert "too large" in warning


def flipped(data: bytes, start: int, end: int) -> bytes:
    """Every bit from `start` to `end` turned over."""
    return data[:start] + bytes(byte ^ 255 for byte in data[start:end]) + data[end:]


DAMAGES = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "garbage": lambda data: random.Random(0).randbytes(len(data)),
    "zeros at the end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "text": lambda data: b"hello\n" * 100,
    # A part well inside the file: in the .nbc's machine code, which can still be read, LLVM would end the process.
    "flipped": lambda data: flipped(data, min(2000, len(data) // 8), len(data) // 4),
}
QUICK = [("garbage", ".nbi"), ("flipped", ".nbc")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "suffix"),
    [
        pytest.param(damage, suffix, marks=() if (damage, suffix) in QUICK else pytest.mark.slow)
        for damage in DAMAGES
        for suffix in (".nbi", ".nbc")  # numba's index, and machine code
    ],
)
def test_damaged_files_are_told_of_and_made_anew(runs, cached, damage, suffix):
    shutil.copytree(cached, runs.cache)
    for file in runs.files(suffix):
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    engine, *told = runs.engine_and_warnings()
    assert engine == "fused"
    assert len(told) == 1
    assert "numba's cache of compiled loops fails" in told[0]
    assert runs.engine_and_warnings() == ["fused"]  # there is a good one again


@pytest.mark.slow
def test_folders_in_place_of_the_files(runs, cached):
    shutil.copytree(cached, runs.cache)
    for file in runs.files(".nbi") + runs.files(".nbc"):
        file.unlink()
        file.mkdir()
    engine, *told = runs.engine_and_warnings()
    assert (engine, len(told)) == ("fused", 1)


NO_COMPILER = {
    "no numba": "sys.modules['numba'] = None",
    "a broken llvmlite": "sys.modules['llvmlite'] = None",
    "no executable memory": """
from numba.core import ccallback
def refuse(*_): raise OSError("no executable memory\\nat all")
ccallback.CFunc.compile = refuse""",
    "not the second loop": """
from numba.core import ccallback
compile_one, done = ccallback.CFunc.compile, []
def compile_first(self):
    if done: raise MemoryError
    done.append(compile_one(self))
ccallback.CFunc.compile = compile_first""",
}


@pytest.mark.parametrize("reason", NO_COMPILER)
def test_where_nothing_can_be_compiled_the_eager_engine_rounds(runs, reason):
    """With one warning, for good; and the bits are the same, in place too."""
    engine, *told = runs.engine_and_warnings(before=NO_COMPILER[reason], roundings=("nearest", "stochastic", "up"))
    assert engine == "eager"
    (warning,) = told
    assert warning.startswith("low_precision: the engine fused cannot be used (")
    assert warning.endswith("); rounding with the slower eager engine")
    assert "\n" not in warning


@pytest.mark.parametrize("reason", ["no numba", "no executable memory"])
def test_a_fused_engine_that_is_asked_for_by_name_is_a_clear_error(runs, reason):
    ran = runs(before=NO_COMPILER[reason], backend="fused")
    assert ran.returncode == 1
    last = ran.stderr.splitlines()[-1]
    assert "CannotCompile: backend: given fused, which cannot be used here (" in last
    assert last.endswith("), allowed: auto, eager")
