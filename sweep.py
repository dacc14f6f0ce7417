"""A grid of runs, in parallel: `python sweep.py --dataset boston --precision float8,float32 --seed 0:100 --epochs 30`.

Each flag of main.py takes several values, and each combination of them is a run. A run that is complete is not run
again: the same command goes on where a sweep was stopped, killed or lost its machine. What other code made (another
model, data set, loop or library; comments do not count) is trained anew and replaced, unless --keep is given.

On a cluster, the checkout and the records must lie in a file system that all its machines share.

Exit status: 0; 1 if a run failed, the others having gone on; 2 for a wrong argument; 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lab.console import command, in_a_line, say
from lab.fingerprint import fingerprint_of_run, fingerprints_of_runs
from lab.record import CHECKPOINTS, REPLACING, summary_of, unfinished
from lab.step_lines import lacking
from low_precision.errors import SettingError, nearest, shown
from settings.config import Config, ConfigError, flag, refused
from settings.flags import REPEATABLE, TABLES, flags_of, parser
from settings.recipes import with_recipe

# Whose values have commas themselves: there, a semicolon is between two values.
LISTS = ("quantize", "layers", "site", "transform", "watch_also", "model_options", "betas")
CLUSTERS = ("ray",)
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


def grid(argv: Sequence[str]) -> tuple[list[Config], argparse.Namespace]:
    """The runs that the arguments ask for, each once, and the sweep's own settings."""
    flags = parser()
    flags.prog, flags.description, flags.epilog = "sweep.py", __doc__, None
    flags.add_argument("file", nargs="?", help="a YAML file in the form of wandb's sweeps; flags win over it")
    flags.add_argument("--jobs", default="-1", help="runs at a time [default: one for each core]")
    flags.add_argument("--keep", action="store_true", help="keep the records that other code made, and go on with them")
    flags.add_argument("--cluster", help="ray: on a Ray cluster [default: processes of this machine]")
    settings = flags.values(argv)
    for name in ("resume", *TABLES):
        if settings.pop(name, None):
            raise ConfigError(flag(name), "it", "with main.py alone")
    sweep = argparse.Namespace(jobs=_jobs(settings.pop("jobs")), cluster=settings.pop("cluster", None))
    sweep.debug, sweep.keep = settings.pop("debug", False), settings.pop("keep", False)
    if sweep.cluster not in (None, *CLUSTERS):
        raise refused("cluster", sweep.cluster, ", ".join(CLUSTERS), nearest(sweep.cluster, CLUSTERS))
    file = settings.pop("file", None)
    choices = _from_file(Path(file).expanduser()) if file else {}
    choices |= {name: _values(name, text) for name, text in settings.items()}
    choices.setdefault("wandb", ["disabled"])
    runs: dict[str, Config] = {}
    for values in itertools.product(*choices.values()):
        chosen = {name: value for name, value in zip(choices, values, strict=True) if value is not None}
        config = Config.make(**with_recipe(chosen.pop("recipe", None), chosen)).resolved()
        runs.setdefault(config.folder_name, config)  # combinations that differ in nothing that matters are one run
    return list(runs.values()), sweep


def _jobs(text: str) -> int:
    with suppress(ValueError):
        if int(text) == -1 or int(text) > 0:
            return int(text)
    raise refused("jobs", text, "a whole number >= 1, or -1 for one a core")


def _values(name: str, value: str | list[str] | bool) -> list[Any]:
    """Several values of a flag: "1,2,3", "0:100" (0 to 99) or "0:100:10" for whole numbers, ";" between lists."""
    if isinstance(value, bool):
        return [value]
    if name in LISTS:
        texts = [text for part in ([value] if isinstance(value, str) else value) for text in part.split(";")]
        return [tuple(text.split(",")) if name in REPEATABLE and text else text or () for text in texts]
    values: list[Any] = []
    for text in value.split(","):
        if match := re.fullmatch(r"(\d+):(\d+)(?::([1-9]\d*))?", text):
            start, stop, step = int(match[1]), int(match[2]), int(match[3] or 1)
            if start >= stop:
                raise refused(name, text, "START:STOP or START:STOP:STEP, START below STOP")
            values += range(start, stop, step)
        else:
            values.append(text)
    return values


def _from_file(path: Path) -> dict[str, list[Any]]:
    """The parameters of a wandb sweep of the method grid, by field."""
    import yaml

    try:
        sweep = yaml.safe_load(path.read_text())
        if not isinstance(sweep, dict) or sweep.get("method", "grid") != "grid":
            raise ValueError("its method is not grid")
        choices = {
            name.replace("-", "_"): list(choice["values"]) if "values" in choice else [choice["value"]]
            for name, choice in sweep["parameters"].items()
        }
    except OSError as error:
        raise ConfigError(None, f"{path} ({error.strerror})", "a file that can be read") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        form = "method: grid, parameters: {NAME: {values: [...]} or {value: ...}}"
        raise ConfigError(None, f"{path} ({' '.join(str(error).split())})", form) from None
    known = {f.name for f in fields(Config)} | {"recipe"}
    if unknown := sorted(set(choices) - known):
        what = f"the parameter {shown(unknown[0])} in {path}"
        raise ConfigError(None, what, "the flags of main.py", nearest(unknown[0], known))
    return choices


def run_one(
    settings: dict[str, Any], started_by: str, place: str, imports: list[str], keep: bool
) -> tuple[str, str | None, bool]:
    """One run, in a process of the pool -> its name, what went wrong, and whether other code had begun it.

    place, imports: the sweep's own folder and sys.path, as a cluster's processes may have been started elsewhere.
    keep: go on with an unfinished record that other code began, instead of beginning anew.
    """
    sys.path += [path for path in imports if path not in sys.path]
    os.chdir(place)
    import torch

    import train
    from lab.checkpoint import code_of

    torch.set_num_threads(1)  # a process has a core of its own
    config, wrong, other_code = Config.make(**settings), None, False
    try:
        begun = [folder for folder, _ in unfinished(config.output_dir, config.folder_name)]
        begun = [folder for folder in begun if any((folder / name).exists() for name in CHECKPOINTS)]
        begun = [folder for folder in begun if not lacking(folder, config)]
        by_this_code = [folder for folder in begun if code_of(folder) == fingerprint_of_run(config)]
        other_code = bool(begun and not by_this_code)
        resume = next(iter(by_this_code or (begun if keep else [])), None)
        train.run(config, started_by, resume, quiet=True)
    except SettingError as error:  # of the library too, where only the model could tell
        wrong = str(ConfigError.of(error))
    except Exception as error:
        wrong = in_a_line(error)
    return config.folder_name, wrong, other_code


@contextmanager
def backend(cluster: str | None) -> Iterator[None]:
    """joblib's backend for the cluster: within, its runs go there. ConfigError where it is not installed."""
    from joblib import parallel_config

    if cluster is None:
        yield
        return
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError:
        raise refused("cluster", "ray", "ray after pip install -r requirements-cluster.txt") from None
    register_ray()
    # The cluster of RAY_ADDRESS, or one that runs here already, or a new one on this machine's cores.
    ray.init(log_to_driver=False, logging_level="error", namespace="low_precision_ml")
    try:
        with parallel_config("ray"):
            yield
    finally:
        ray.shutdown()


def to_train(configs: Sequence[Config], keep: bool) -> list[Config]:
    """The runs without a record that ended by itself, made by this code or kept, with every file that is asked for.

    Says how many other code made, and what others lack.
    """
    todo, others, without, lack = [], 0, 0, Counter[str]()
    for config, code in zip(configs, fingerprints_of_runs(configs), strict=True):
        folder = Path(config.output_dir) / config.folder_name
        summary = summary_of(folder)
        finished = summary.get("status") in REPLACING
        other = finished and summary.get("code") != code
        others, without = others + other, without + (other and "code" not in summary)
        missing = lacking(folder, config) if finished else []
        if finished and len(summary.get("sample", "")) < config.sample and summary["status"] != "diverged":
            missing.append("sample")
        if not finished or (other and not keep) or missing:
            todo.append(config)
        lack.update(missing)
    if others:
        note = f" ({without} of them by a version that recorded no fingerprint of it)" if without else ""
        what = "they are kept" if keep else "they are trained anew; --keep keeps them"
        say(f"{others} of {len(configs)} runs were made by other code{note}: {what}")
    for name, count in lack.items():
        say(f"{count} of {len(configs)} runs have no {name}, which is asked for: they are trained anew")
    return todo


def run(configs: Iterable[Config], jobs: int, cluster: str | None = None, keep: bool = False) -> dict[str, str]:
    """Runs what is not complete, `jobs` at a time -> what went wrong, by the run's name.

    keep: what other code made counts as well.
    """
    from joblib import Parallel, delayed
    from tqdm import tqdm

    todo = to_train(list(configs), keep)
    tasks = (
        delayed(run_one)(asdict(config), command("main.py", *flags_of(config)), os.getcwd(), sys.path, keep)
        for config in todo
    )
    bar = tqdm(total=len(todo), unit="run", desc="sweep", disable=None)

    class Counted(Parallel):
        """Each of joblib's backends calls this at the end of a run; not each gives results before the last one."""

        def print_progress(self) -> None:
            bar.update(self.n_completed_tasks - bar.n)

    with backend(cluster), bar:
        parallel = Counted(n_jobs=jobs)
        with _lines(lambda: f"{parallel.n_completed_tasks} of {len(todo)} runs", bar.disable):
            results = parallel(tasks)
    if begun := sum(other_code for _, _, other_code in results):
        what = "of other code went on with this code" if keep else "without a checkpoint of this code began anew"
        say(f"{begun} unfinished runs {what}")
    return {name: wrong for name, wrong, _ in results if wrong}


@contextmanager
def _lines(line: Callable[[], str], wanted: bool) -> Iterator[None]:
    """Where lines are wanted, as there is no terminal: one every half minute, however long a run takes."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(LINE_SECONDS):
            say(line())

    if wanted:
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        configs, sweep = grid(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        say(f"sweep.py: error: {error}")
        return 2
    started = time.monotonic()
    try:
        failures = run(configs, sweep.jobs, sweep.cluster, sweep.keep)
    except ConfigError as error:
        say(f"sweep.py: error: {error}")
        return 2
    except Exception as error:  # of the pool itself, as a worker killed for its memory; a run's own are in `failures`
        if sweep.debug:
            raise
        say(f"stopped: {' '.join(str(error).split()) or type(error).__name__}: the same command goes on")
        return 1
    except KeyboardInterrupt:
        say("interrupted: the same command goes on")
        return 128 + signal.SIGINT
    ended = _say_how_it_ended(configs, failures, sweep.keep)
    print(f"{len(configs)} runs: {ended}; {time.monotonic() - started:.1f} s")
    return 1 if failures else 0


def _say_how_it_ended(configs: Sequence[Config], failures: dict[str, str], keep: bool) -> str:
    """Says what somebody should know of some of the runs -> how many ended in which way."""
    for name, wrong in failures.items():
        say(f"failed: {name}: {wrong}")
    summaries = {c.folder_name: summary_of(Path(c.output_dir) / c.folder_name) for c in configs}
    if not keep:
        names = [config.folder_name for config in configs]
        codes = [
            (summaries[name].get("code"), code)
            for name, code in zip(names, fingerprints_of_runs(configs), strict=True)
            if name not in failures
        ]
        if changed := sum(made_by not in (None, code) for made_by, code in codes):
            say(f"the code changed meanwhile: {changed} runs are of other code; the same command trains them anew")
    if remarks := [(name, text) for name, summary in summaries.items() for text in summary.get("remarks", [])[:1]]:
        say(f"{len(remarks)} of {len(configs)} runs have remarks in their summary.json, as {': '.join(remarks[0])}")
    statuses = [summary.get("status") for summary in summaries.values()]
    return ", ".join([*(f"{statuses.count(ended)} {ended}" for ended in REPLACING), f"{len(failures)} failed"])


if __name__ == "__main__":
    sys.exit(main())
