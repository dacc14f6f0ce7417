"""A grid of runs, in parallel: `python sweep.py --dataset boston --precision float8,float32 --seed 0:100 --epochs 30`.

Each flag of main.py takes several values, and each combination of them is a run. A run that is complete is not run
again: the same command goes on where a sweep was stopped, killed or lost its machine.

On a cluster, the checkout and the records must lie in a file system that all its machines share.

Exit status: 0; 1 if a run failed, the others having gone on; 2 for a wrong argument; 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import main as single
from lab import console
from lab import record as track
from settings.config import Config, ConfigError, flag, refused
from settings.recipes import with_recipe

LISTS = ("quantize", "layers", "site")  # whose values have commas themselves: there, a semicolon is between two values
CLUSTERS = ("ray",)
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


def grid(argv: Sequence[str]) -> tuple[list[Config], argparse.Namespace]:
    """The runs that the arguments ask for, each once, and the sweep's own settings."""
    parser = single.parser()
    parser.prog, parser.description, parser.epilog = "sweep.py", __doc__, None
    parser.add_argument("file", nargs="?", help="a YAML file in the form of wandb's sweeps; flags win over it")
    parser.add_argument("--jobs", default="-1", help="runs at a time [default: one for each core]")
    parser.add_argument("--cluster", help="ray: on a Ray cluster [default: processes of this machine]")
    given = vars(parser.parse_args(argv))
    for name in ("resume", "list_formats", "list_recipes"):
        if given.pop(name, None):
            raise ConfigError(f"{flag(name)}: allowed: with main.py")
    own = argparse.Namespace(jobs=_jobs(given.pop("jobs")), cluster=given.pop("cluster", None))
    own.debug = given.pop("debug", False)
    if own.cluster not in (None, *CLUSTERS):
        raise refused("cluster", own.cluster, ", ".join(CLUSTERS))
    file = given.pop("file", None)
    choices = _from_file(Path(file)) if file else {}
    choices |= {name: _values(name, text) for name, text in given.items()}
    choices.setdefault("wandb", ["disabled"])
    runs: dict[str, Config] = {}
    for values in itertools.product(*choices.values()):
        settings = {name: value for name, value in zip(choices, values, strict=True) if value is not None}
        config = Config.make(**with_recipe(settings.pop("recipe", None), settings)).resolved()
        runs.setdefault(config.folder_name, config)  # combinations that differ in nothing that matters are one run
    return list(runs.values()), own


def _jobs(given: str) -> int:
    with suppress(ValueError):
        if int(given) == -1 or int(given) > 0:
            return int(given)
    raise refused("jobs", given, "a whole number >= 1, or -1 for one a core")


def _values(name: str, given: str | list[str]) -> list[Any]:
    """Several values of a flag: "1,2,3", "0:100" (0 to 99) or "0:100:10" for whole numbers, ";" between lists."""
    if name in LISTS:
        texts = [text for part in ([given] if isinstance(given, str) else given) for text in part.split(";")]
        return [tuple(text.split(",")) if name == "site" and text else text or () for text in texts]
    found: list[Any] = []
    for text in given.split(","):
        if match := re.fullmatch(r"(\d+):(\d+)(?::([1-9]\d*))?", text):
            start, stop, step = int(match[1]), int(match[2]), int(match[3] or 1)
            if start >= stop:
                raise refused(name, text, "START:STOP or START:STOP:STEP, START below STOP")
            found += range(start, stop, step)
        else:
            found.append(text)
    return found


def _from_file(path: Path) -> dict[str, list[Any]]:
    """The parameters of a wandb sweep of the method grid, by field."""
    import yaml

    try:
        read = yaml.safe_load(path.read_text())
        if not isinstance(read, dict) or read.get("method", "grid") != "grid":
            raise ValueError("its method is not grid")
        parameters = read["parameters"]
        found = {}
        for name, choice in parameters.items():
            found[name.replace("-", "_")] = list(choice["values"]) if "values" in choice else [choice["value"]]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        form = "method: grid, parameters: {NAME: {values: [...]} or {value: ...}}"
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; allowed: {form}") from None
    known = {f.name for f in fields(Config)} | {"recipe"}
    if unknown := sorted(set(found) - known):
        raise ConfigError(f"{path}: parameter {unknown[0]!r}, allowed: the flags of main.py")
    return found


def run_one(settings: dict[str, Any], command: str, place: str, imports: list[str]) -> tuple[str, str | None]:
    """One run, in a process of the pool -> its name, and what went wrong.

    place, imports: the sweep's own folder and sys.path, as a cluster's processes may have been started elsewhere.
    """
    sys.path += [path for path in imports if path not in sys.path]
    os.chdir(place)
    import torch

    import train

    torch.set_num_threads(1)  # a process has a core of its own
    config = Config.make(**settings)
    try:
        unfinished = [folder for folder, _ in track.unfinished(config.output_dir, config.folder_name)]
        resume = next((folder for folder in unfinished if any((folder / c).exists() for c in track.CHECKPOINTS)), None)
        train.run(config, command, resume, quiet=True)
    except Exception as error:
        return config.folder_name, " ".join(str(error).split()) or type(error).__name__
    return config.folder_name, None


def command_of(config: Config) -> str:
    """The command line of this run alone."""
    words = ["python", "main.py"]
    for f in fields(Config):
        value = getattr(config, f.name)
        if value != f.default:
            for text in value if f.name == "site" else [",".join(value) if isinstance(value, tuple) else value]:
                words += [flag(f.name), str(text)]
    return shlex.join(words)


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
        raise refused("cluster", "ray", "that after pip install -r requirements-cluster.txt") from None
    register_ray()
    # The cluster of RAY_ADDRESS, or one that runs here already, or a new one on this machine's cores.
    ray.init(log_to_driver=False, logging_level="error", namespace="low_precision_ml")
    try:
        with parallel_config("ray"):
            yield
    finally:
        ray.shutdown()


def run(configs: Iterable[Config], jobs: int, cluster: str | None = None) -> dict[str, str]:
    """Runs what is not complete, `jobs` at a time -> what went wrong, by the run's name."""
    from joblib import Parallel, delayed
    from tqdm import tqdm

    todo = [c for c in configs if track.status(Path(c.output_dir) / c.folder_name) not in track.REPLACING]
    tasks = (delayed(run_one)(asdict(config), command_of(config), os.getcwd(), sys.path) for config in todo)
    bar = tqdm(total=len(todo), unit="run", desc="sweep", disable=None)

    class Shown(Parallel):
        """Each of joblib's backends calls this at the end of a run; not each gives results before the last one."""

        said = time.monotonic()

        def print_progress(self) -> None:
            bar.update(self.n_completed_tasks - bar.n)
            if bar.disable and time.monotonic() - self.said > LINE_SECONDS:
                console.say(f"{self.n_completed_tasks} of {len(todo)} runs")
                self.said = time.monotonic()

    with backend(cluster), bar:
        results = Shown(n_jobs=jobs)(tasks)
    return {name: wrong for name, wrong in results if wrong}


def main(argv: Sequence[str] | None = None) -> int:
    try:
        configs, own = grid(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        console.say(f"sweep.py: error: {error}")
        return 2
    started = time.monotonic()
    try:
        failures = run(configs, own.jobs, own.cluster)
    except ConfigError as error:
        console.say(f"sweep.py: error: {error}")
        return 2
    except Exception as error:  # of the pool itself, as a worker killed for its memory; a run's own are in `failures`
        if own.debug:
            raise
        console.say(f"stopped: {' '.join(str(error).split()) or type(error).__name__}: the same command goes on")
        return 1
    except KeyboardInterrupt:
        console.say("interrupted: the same command goes on")
        return 128 + signal.SIGINT
    for name, wrong in failures.items():
        console.say(f"failed: {name}: {wrong}")
    statuses = [track.status(Path(c.output_dir) / c.folder_name) for c in configs]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in ("complete", "diverged"))
    print(f"{len(configs)} runs: {counts}, {len(failures)} failed; {time.monotonic() - started:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
