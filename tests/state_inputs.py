"""Numbers for tests of moments in 8 bits; bench/optimizer_states.py has other projects round the same ones."""

from __future__ import annotations

import torch
from torch import Tensor

from low_precision.formats import format_named

SHAPE = (64, 80)  # of a parameter: 20 groups of 256
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
STEPS = (1, 10)  # after which states are compared


TIES = 20  # the group of them


def groups(unsigned: bool) -> Tensor:
    """float32 (24, 256): moments of many sizes, groups with zeros, of few magnitudes, or all equal; and the middles of
    neighbours in 8-bit Adam's table, of which some are no float32 numbers.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 256, generator=generator)
    x[1:8] *= torch.exp2(torch.arange(7.0) * 9 - 40)[:, None]
    x[8:12] = x[8:12] * x[8:12].abs() * 10.0 ** -(torch.arange(256.0) / 50)
    x[12, ::3] = 0.0
    x[13] = x[13].sign() * 0.3
    x[14] = torch.linspace(-1, 1, 256)
    x[15] = torch.linspace(0, 1, 256)
    x[16, 1:] *= 1e-7
    x[17] = x[17].square()
    x[18, 3] = 100.0
    x[19] = x[19].round()
    values = torch.tensor(format_named("dynamic8u" if unsigned else "dynamic8").values)  # type: ignore[union-attr]
    x = x.abs() if unsigned else x
    x[TIES, 0], x[TIES, 1:] = 1.0, (values[1:] + values[:-1]) / 2
    return x


def start() -> Tensor:
    """A parameter."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def gradient(step: int) -> Tensor:
    """Of that step, from 1 on; the same whatever the parameter is, so that states can be compared."""
    generator = torch.Generator().manual_seed(100 + step)
    sizes = torch.exp2(torch.randn(SHAPE[0], 1, generator=torch.Generator().manual_seed(2)) * 3)
    return torch.randn(SHAPE, generator=generator) * sizes
