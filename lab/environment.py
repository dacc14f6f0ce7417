"""What a result depends on, beside its settings: device, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lab.processes import Processes
from low_precision.engines import choice
from settings.config import Config, refused

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "qtorch", "scikit-learn", "numpy", "wandb")  # whose versions a record names


def device_of(name: str) -> torch.device:
    """The device that --device asks for, its operations set to give the same bits every time. ConfigError."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise refused("device", "cuda", "auto, cpu (PyTorch finds no CUDA device here)")
    device = torch.device("cuda" if there and name != "cpu" else "cpu")
    if device.type == "cuda":  # the same bits every time, and float32 that is float32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def environment(config: Config, processes: Processes) -> dict[str, Any]:
    """For the record."""
    device = processes.device
    return {
        "versions": _versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": processes.count,
        "engine": choice.in_use(config.backend, device),
        "commit": _commit(),
    }


@cache
def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


@cache
def _commit() -> str | None:
    """The commit of this code, "-dirty" where files differ from it; None outside a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", ROOT, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
        )
    except OSError:  # no git
        return None
    return described.stdout.strip() or None
