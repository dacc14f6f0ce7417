"""What every script here does with its findings: prints them, claim beside measurement, and keeps them as CSV.

A script says for each claim of its paper what was measured, with n and spread, and whether it holds; the test of that
stands in the script, beside its number. Where an interval has both answers in it, the size of the experiment does not
decide, and that is what is said. `--save` and `--figure` write the files that README shows.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, the project's is not

if TYPE_CHECKING:
    from analysis.run import Run
    from analysis.runs import Setting
    from low_precision.rules import Rule


UNDECIDED = "cannot be seen at this size"


class Claims:
    """with Claims(__doc__) as claims: claims.add("what the paper says", "what came out", holds)"""

    def __init__(self, about: str) -> None:
        parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--save", type=Path, help="a CSV file of the claims")
        parser.add_argument("--figure", type=Path, help="a PNG or SVG file")
        parser.add_argument("--quick", action="store_true", help="smaller and fewer: to see it run, not to believe it")
        self.asked = parser.parse_args()
        self.rows: list[tuple[str, str, str]] = []
        self.started = time.monotonic()

    def __enter__(self) -> Claims:
        return self

    def add(self, claim: str, measured: str, holds: bool | None) -> None:
        """holds: None where what was measured does not decide."""
        row = claim, measured, UNDECIDED if holds is None else "yes" if holds else "**no**"
        self.rows.append(row)
        print(f"claim:    {row[0]}\nmeasured: {row[1]}\nholds:    {row[2].strip('*')}\n", flush=True)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            print(f"{time.monotonic() - self.started:.0f} s")
            if self.asked.save:
                save([("claim", "measured here", "holds"), *self.rows], self.asked.save)


def slope(x: list[float], y: list[float]) -> float:
    """Of the straight line through (log x, log y): the exponent of a power law. Least squares."""
    import numpy as np

    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def save(rows: Sequence[Sequence[str]], path: Path) -> None:
    """A CSV file, whole or not at all."""
    from analysis.runs import write

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write(path, text.getvalue())


def trained(folder: str, *commands: str) -> list[Setting]:
    """The settings that sweeps trained (the arguments of sweep.py, but for the folder); what is complete stays."""
    from analysis import runs as records

    once = {run.config.folder_name: run for runs in trained_runs(folder, *commands) for run in runs}
    return records.settings_of(once.values())


def trained_runs(folder: str, *commands: str) -> list[list[Run]]:
    """The runs of each command, as `trained` trains them, in the order of the first command that asks for them."""
    import sweep
    from analysis import runs as records

    asked = [sweep.grid([*command.split(), "--output-dir", folder]) for command in commands]
    configs = {config.folder_name: config for configs, _ in asked for config in configs}
    failures = sweep.run(configs.values(), asked[0][1].jobs)
    if failures:
        raise RuntimeError(f"{len(failures)} runs failed: {next(iter(failures.items()))}")
    return [records.read(Path(folder) / config.folder_name for config in configs).runs for configs, _ in asked]


def small_training(training: str, folder: str) -> str:
    """These flags of shakespeare's training for --quick: a small model, and a text that is here, this file's."""
    from analysis.runs import write

    path = Path(folder) / "small.txt"
    write(path, Path(__file__).read_text())
    small = f"--dataset {path} --model-options heads=2,width=32,context=16"
    return training.replace("--dataset shakespeare", small).replace("--warmup 100", "--warmup 0")


def by_rule(settings: Sequence[Setting], sites: Sequence[str] | None = None) -> dict[Rule, Setting]:
    """Settings by the one rule of all `sites` (None: those of `--quantize all`); without the settings of several rules.

    The setting that rounds nothing is there under `rule_of("float32")`.
    """
    from analysis.runs import uniform_rule
    from low_precision.rules import ALL_SITES

    rules = [None if setting.lines else uniform_rule(setting.rules, sites or ALL_SITES) for setting in settings]
    return {rule: setting for rule, setting in zip(rules, settings, strict=True) if rule}


def spread(setting: Setting, metric: str, factor: float = 1.0, form: str = ".3g") -> str:
    """The median of the last values and, in brackets, the 5th and the 95th percentile."""
    from analysis.tables import band

    values = [factor * value for value in setting.values(metric)]
    low, high = band(values)
    return f"{statistics.median(values):{form}} ({low:{form}} - {high:{form}})"
