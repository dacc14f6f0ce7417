"""Each kind of layer with products, and an input for it."""

from __future__ import annotations

import torch
from torch import nn

LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (40, 12)),
    "linear, three dimensions": (lambda: nn.Linear(12, 20), (3, 5, 12)),
    "linear, one vector": (lambda: nn.Linear(12, 20, bias=False), (12,)),
    "conv1d, same": (lambda: nn.Conv1d(4, 6, 2, padding="same"), (3, 4, 9)),
    "conv1d, same, one side": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (3, 4, 8, 8)),
    "conv2d, groups, no bias": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (3, 4, 8, 8)),
    "conv2d, circular": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (3, 4, 5, 5)),
    "conv2d, one image": (lambda: nn.Conv2d(4, 8, 1), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 2), (2, 4, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (3, 4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (3, 4, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
}


def layer_and_input(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make(), torch.randn(shape)
