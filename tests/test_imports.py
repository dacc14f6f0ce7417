"""The direction of imports, read from the files: who may import whom, and who alone knows what is private in torch."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest
from run_helpers import ROOT

# Each line may import what stands above it, and a room also itself.
ORDER = [
    {"low_precision"},
    {"sources"},
    {"data", "models"},
    {"settings"},
    {"quant"},
    {"lab"},
    {"analysis"},
    {"train"},
    {"main", "sweep", "report"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# These are called from outside and may use all of it; nothing imports them.
OUTSIDE = {"reproduce", "bench", "experiments", "examples", "tests"}
FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0].removesuffix(".py") in RANK and not path.is_relative_to(ROOT / ".venv")
]
PRIVATE_IN_TORCH = {
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_parameters", "_modules"),
    *("_buffers", "_global_forward_hooks", "_global_backward_hooks", "_disable_dynamo", "_C", "_version", "_orig_mod"),
    *(
        "_is_replica",
        "_are_functorch_transforms_active",
        "_dynamo",
        "_inductor",
        "_functorch",
        "_load_state_dict_hooks",
    ),
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room(path: Path) -> str:
    """The top folder or top file that it is in."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    """The name under which it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """The full names of the modules that a file imports, those of its functions too."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from a import b` imports a, and a.b where that is a module.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_room_has_its_place():
    tops = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py"}
    tops |= {path.parent.name for path in ROOT.glob("*/*.py")}
    assert tops - OUTSIDE == set(RANK)
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_go_one_way(path):
    others = {name.partition(".")[0] for name in imported(path)} - {room(path)}
    assert {name for name in others if RANK.get(name, -1) >= RANK[room(path)]} == set()
    assert not others & OUTSIDE


def test_the_laboratory_imports_no_private_name_of_another_file():
    """What begins with an underscore is a file's own."""
    wrong = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in RANK:
                wrong += [f"{module(path)}: {node.module}.{a.name}" for a in node.names if a.name.startswith("_")]
    assert wrong == []


def test_no_test_imports_another_one():
    """What several need is in the helpers beside this file; fixtures are in conftest.py, which nobody imports."""
    for path in (ROOT / "tests").rglob("*.py"):
        names = {name.partition(".")[0] for name in imported(path)}
        assert not [name for name in names if name.startswith("test_") or name == "conftest"], path


def test_the_process_of_wandb_starts_without_the_rest():
    """lab/wandb_run.py is run as a script too: what it imported would be loaded a second time."""
    assert not {name.partition(".")[0] for name in imported(ROOT / "lab" / "wandb_run.py")} & RANK.keys()


def test_the_library_has_no_circle():
    files = {module(path): path for path in FILES if room(path) == "low_precision"}
    del files["low_precision"]  # the face: it loads the others on first use, and none of them needs it
    needs = {name: imported(path) & files.keys() for name, path in files.items()}
    engines = {name for name in files if name.startswith("low_precision.engines.")}
    choice = "low_precision.engines.choice"
    needs[choice] |= {name for name in engines if name != choice}  # by their names, when they are needed
    while free := [name for name, needed in needs.items() if not needed & needs.keys() - {name}]:
        assert not any(name in needs[name] for name in free)
        for name in free:
            del needs[name]
    assert needs == {}


EXTRAS = {"numba": "fused", "llvmlite": "fused", "qtorch": "qtorch", "triton": "cuda"}  # and the engines that need them


def test_the_library_needs_torch_and_numpy_alone():
    """What else it imports is an engine's own affair, loaded where that engine is asked for."""
    for path in FILES:
        if room(path) == "low_precision":
            needs = {name.partition(".")[0] for name in imported(path)} - {"torch", "numpy", "low_precision"}
            needs -= sys.stdlib_module_names
            assert needs <= EXTRAS.keys(), path
            assert not needs or path.parent.name == "engines", path


def private_names(path: Path) -> set[str]:
    """Private names that a file asks other objects for: x._name, getattr(x, "_name"), import _name."""
    asked = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            asked.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            asked |= {word.value for word in node.args[1:2] if isinstance(word, ast.Constant)}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            asked |= {part for name in names for part in name.split(".")}
    return {name for name in asked if name.startswith("_") and not name.endswith("__")}


def defined_names(path: Path) -> set[str]:
    """The names of its functions, classes and attributes."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def test_one_file_knows_what_is_private_in_torch():
    knows = {module(path): private_names(path) & PRIVATE_IN_TORCH for path in FILES}
    assert {name for name, words in knows.items() if words} == {"low_precision.torch_private"}
    assert len(knows["low_precision.torch_private"]) >= 9
    for path in FILES:  # in texts too: sys.modules, names of grad_fn's classes
        if path.name != "torch_private.py":
            texts = [node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant)]
            texts = [text for text in texts if isinstance(text, str) and "\n" not in text and " " not in text]
            assert [text for text in texts if text.startswith("torch._") or text.endswith("Backward0")] == [], path


def test_what_the_library_asks_others_for_is_public_or_its_own():
    """A private name that nobody in the library defines is somebody else's, and may be gone in their next version."""
    files = [path for path in FILES if room(path) == "low_precision" and path.name != "torch_private.py"]
    ours = set().union(*map(defined_names, files))
    documented = {"_fields", "_fields_", "_asdict", "_replace"}  # of named tuples and ctypes, to which they are public
    assert {name: words for name in files if (words := private_names(name) - ours - documented)} == {}
