"""What every script here does with its findings: prints them, claim beside measurement, and keeps them as CSV.

A script says for each claim of its paper what was measured, with n and spread, and whether it holds; the test of that
stands in the script, beside its number. `--save` and `--figure` write the files that README shows.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the project's is not


class Claims:
    """with Claims(__doc__) as claims: claims.add("what the paper says", "what came out", holds)"""

    def __init__(self, about: str) -> None:
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--save", type=Path, help="a CSV file of the claims")
        parser.add_argument("--figure", type=Path, help="a PNG or SVG file")
        parser.add_argument("--quick", action="store_true", help="smaller and fewer: to see it run, not to believe it")
        self.given = parser.parse_args()
        self.rows: list[tuple[str, str, str]] = []
        self.started = time.monotonic()

    def __enter__(self) -> Claims:
        return self

    def add(self, claim: str, measured: str, holds: bool) -> None:
        row = claim, measured, "yes" if holds else "**no**"
        self.rows.append(row)
        print(f"claim:    {row[0]}\nmeasured: {row[1]}\nholds:    {row[2].strip('*')}\n", flush=True)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            print(f"{time.monotonic() - self.started:.0f} s")
            if self.given.save:
                self.given.save.parent.mkdir(parents=True, exist_ok=True)
                with open(self.given.save, "w", newline="") as file:
                    rows = csv.writer(file, lineterminator="\n")
                    rows.writerows([("claim", "measured here", "holds"), *self.rows])


def slope(x: list[float], y: list[float]) -> float:
    """Of the straight line through (log x, log y): the exponent of a power law. Least squares."""
    import numpy as np

    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def trained(folder: str, *commands: str) -> dict[str, list]:
    """Sweeps (the arguments of sweep.py, but for the folder): runs by setting. What is complete is not run again."""
    import sweep
    from analysis import runs as records

    asked = {}
    for command in commands:
        configs, own = sweep.grid([*command.split(), "--output-dir", folder])
        asked |= {config.folder_name: config for config in configs}
    failures = sweep.run(asked.values(), own.jobs)
    if failures:
        raise RuntimeError(f"{len(failures)} runs failed: {next(iter(failures.items()))}")
    return records.by_setting(records.read(Path(folder) / name for name in asked))


def spread(runs: list, metric: str, factor: float = 1.0, form: str = ".3g") -> str:
    """The median of the last values and, in brackets, the 5th and the 95th percentile."""
    import statistics

    from analysis import figures

    values = [factor * v for run in runs if (v := run.value(metric)) is not None]
    low, high = figures.band(values)
    return f"{statistics.median(values):{form}} ({low:{form}} - {high:{form}})"
