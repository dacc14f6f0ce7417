"""What is drawn from torch's own generators: in a step, as by dropout, and beside the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from low_precision.noise import Key


@contextmanager
def drawn(seed: int, step: int, first_row: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators begin where (seed, step, first row of the part) say; afterwards they are as before.

    So nothing of them has to be saved, and what is drawn does not depend on what was evaluated, watched or interrupted.
    It does depend on the parts of a batch: those of other processes, or of gradient accumulation, draw anew.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(Key.of(seed, "dropout", step, first_row).value)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def draws_kept(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside, from torch's generators of the CPU and of that device, is drawn again after it.

    The devices are named, because torch warns where it would keep those of many.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
