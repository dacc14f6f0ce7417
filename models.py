"""The models: plain PyTorch, knowing nothing of quantization. A new one is a function and a row of `MODELS`."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Linear (or softmax) regression."""
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(math.prod(shape), outputs)))


def mlp(shape: tuple[int, ...], outputs: int, width: int = 128) -> nn.Module:
    """Two hidden layers of ReLUs."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden1=nn.Linear(math.prod(shape), width),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(width, width),
            relu2=nn.ReLU(),
            output=nn.Linear(width, outputs),
        )
    )


def cnn(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Three convolutions and a pooling between them: small, for 8x8 digits."""
    pooled = (shape[1] // 2) * (shape[2] // 2)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape[0], 16, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 32, 3, padding=1),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            output=nn.Linear(32 * pooled, outputs),
        )
    )


class _Block(nn.Module):
    """Pre-activation residual block: x + conv(relu(bn(conv(relu(bn(x)))))) (He et al. 2016, arXiv:1603.05027)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # In place wherever no backward pass reads what is overwritten.
        y = self.conv1(F.relu(self.bn1(x), inplace=True))
        y = self.conv2(F.relu(self.bn2(y), inplace=True))
        return y.add_(self.shortcut(x))


class ResNet20(nn.Module):
    """The pre-activation ResNet-20 for CIFAR: three stages of three blocks, 16, 32 and 64 channels, 1x1 shortcuts."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.stage1 = nn.Sequential(_Block(16, 16, 1), _Block(16, 16, 1), _Block(16, 16, 1))  # (n, 16, 32, 32)
        self.stage2 = nn.Sequential(_Block(16, 32, 2), _Block(32, 32, 1), _Block(32, 32, 1))  # (n, 32, 16, 16)
        self.stage3 = nn.Sequential(_Block(32, 64, 2), _Block(64, 64, 1), _Block(64, 64, 1))  # (n, 64, 8, 8)
        self.bn = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.conv(x))))
        x = F.relu(self.bn(x), inplace=True).mean((2, 3))  # (n, 64)
        return self.fc(x)


def resnet20(shape: tuple[int, ...], outputs: int) -> nn.Module:
    return ResNet20(shape[0], outputs)


MODELS = {"linear": linear, "mlp": mlp, "cnn": cnn, "resnet20": resnet20}


def build(
    name: str, shape: tuple[int, ...], outputs: int, seed: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """A model for samples of that shape; its initial weights depend on the seed alone.

    options: keyword parameters of the function in `MODELS`.
    """
    torch.manual_seed(seed)
    return MODELS[name](shape, outputs, **(options or {}))
