"""How large the rooms of the house are: lines, files, the longest file and the longest function of each, as Markdown.

`python bench/sizes.py [CHECKOUT]`: of this checkout, or of another, also of one from before the rooms were built.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

# A room is a folder, or files at the top. The names after the first are those of the files before the rooms were built.
ROOMS = {
    "low_precision/": (
        "low_precision",
        "kernels",
        *("formats.py", "quant.py", "sites.py", "optim.py", "engines.py", "tracing.py"),
    ),
    "settings/": ("settings", "config.py", "kinds.py", "recipes.py"),
    "lab/": ("lab", "track.py", "checkpoint.py", "wandb_run.py", "parallel.py", "measure.py", "console.py"),
    "analysis/": ("analysis", "records.py", "figures.py"),
    "sources/, data.py, models.py": ("sources", "data.py", "models.py", "cifar10.py"),
    "train.py": ("train.py",),
    "main.py, sweep.py, report.py, reproduce.py": ("main.py", "sweep.py", "report.py", "reproduce.py"),
    "bench/, experiments/, examples/": ("bench", "experiments", "examples"),
    "tests/": ("tests",),
}
TOP_QUANT = "quant.py"  # since the rooms were built, it belongs to the laboratory


def functions(path: Path) -> list[tuple[int, str]]:
    """Lines and name of each function of a file, docstring and decorators included."""
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(node.end_lineno - node.lineno + 1, node.name) for node in ast.walk(tree) if isinstance(node, kinds)]


def rows(root: Path) -> list[list[str]]:
    lines = [["room", "files", "lines", "longest file", "longest function"]]
    for room, places in ROOMS.items():
        paths: list[Path] = []
        for place in places:
            path = root / place
            if (root / "low_precision").is_dir() and place == TOP_QUANT:
                continue
            paths += sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.is_file()
        if room == "train.py" and (root / "low_precision").is_dir():
            paths.append(root / TOP_QUANT)
        if not paths:
            continue
        sizes = {path: len(path.read_text().splitlines()) for path in paths}
        longest = max(sizes, key=lambda path: sizes[path])
        length, name, home = max((*function, path.name) for path in paths for function in functions(path) or [(0, "-")])
        name_of_room = "train.py, quant.py" if len(paths) == 2 and room == "train.py" else room
        cells = [len(paths), sum(sizes.values()), f"{longest.name}: {sizes[longest]}", f"{home} `{name}`: {length}"]
        lines.append([name_of_room, *map(str, cells)])
    return lines


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    head, *body = rows(root)
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in body), sep="\n")


if __name__ == "__main__":
    main()
