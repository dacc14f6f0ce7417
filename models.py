"""The models: plain PyTorch, knowing nothing of quantization. A new one is a function and a row of `MODELS`.

A function takes the shape of a sample and the number of outputs, and options by keyword.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from low_precision.errors import SettingError, nearest, shown
from sources import python_file
from sources.named_file import FORMS

TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}  # of options, in words


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
    """Three convolutions and a pooling between them: small, for images of few pixels."""
    _check_image("cnn", shape)
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
    """ResNet20 for images of any size."""
    _check_image("resnet20", shape)
    return ResNet20(shape[0], outputs)


class _Attention(nn.Module):
    """Self-attention of several heads, without biases. causal: no position reads a later one."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        each = self.queries_keys_values(x).split(width, 2)
        q, k, v = (part.view(n, length, self.heads, -1).transpose(1, 2) for part in each)  # (n, heads, length, size)
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        return self.dropout(self.output(y.transpose(1, 2).reshape(n, length, width)))


class _MLP(nn.Sequential):
    """Two layers without biases, the hidden one four times as wide, a GELU (the exact one) between them."""

    def __init__(self, width: int, dropout: float) -> None:
        up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        super().__init__(OrderedDict(up=up, gelu=nn.GELU(), down=down, dropout=nn.Dropout(dropout)))


class _TransformerBlock(nn.Module):
    """Attention, then an MLP; each reads what is normalized, and is added to what it read (pre-norm)."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attention = _Attention(width, heads, dropout, causal)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = _MLP(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _initialize(model: nn.Module, blocks: nn.Sequential) -> None:
    """GPT-2's initial weights: N(0, 0.02); of layers that are added to the path, narrower, as there are two a block."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for block in blocks:
        for layer in (block.attention.output, block.mlp.down):
            nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * len(blocks)))


class GPT(nn.Module):
    """A GPT-2 without biases, as nanoGPT trains it: token numbers int64 (n, length) -> logits (n, length, symbols)."""

    def __init__(self, symbols: int, context: int, layers: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.positions = nn.Embedding(context, width)  # learned
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads, dropout, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, symbols, bias=False)
        self.head.weight = self.embedding.weight
        _initialize(self, self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x) + self.positions.weight[: x.shape[1]]  # (n, length, width)
        return self.head(self.norm(self.blocks(self.dropout(y))))


class ViT(nn.Module):
    """A vision transformer: GPT's blocks over the patches of images, each of which reads all others.

    Positions are learned, and the mean over all patches is what the head reads: no class token (Beyer et al. 2022,
    arXiv:2205.01580).
    """

    def __init__(
        self, shape: tuple[int, ...], outputs: int, patch: int, layers: int, heads: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        channels, height, across = shape
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Embedding(height // patch * (across // patch), width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads, dropout, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, outputs)
        _initialize(self, self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2) + self.positions.weight  # (n, patches, width)
        return self.head(self.norm(self.blocks(self.dropout(y))).mean(1))


def gpt(
    shape: tuple[int, ...],
    outputs: int,
    layers: int = 4,
    heads: int = 4,
    width: int = 128,
    context: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """GPT. shape: (context,), the most tokens that it reads at a time; context: the same again. outputs: symbols."""
    _check(layers, heads, width, dropout)
    if len(shape) != 1:
        raise SettingError("model", f"gpt for samples of the shape {shape}", "a text, whose samples are (context,)")
    if context not in (None, *shape):
        raise _refused(f"context={context}", f"that of the text, whose samples have the shape {shape}")
    return GPT(outputs, shape[0], layers, heads, width, dropout)


def vit(
    shape: tuple[int, ...],
    outputs: int,
    layers: int = 4,
    heads: int = 4,
    width: int = 128,
    patch: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """A vision transformer of GPT's blocks; patch: pixels of a side of each patch."""
    _check_image("vit", shape)
    _check(layers, heads, width, dropout)
    if patch < 1 or shape[1] % patch or shape[2] % patch:
        raise _refused(f"patch={patch}", f"a divisor of the sides of an image, {shape[1]} and {shape[2]}")
    return ViT(shape, outputs, patch, layers, heads, width, dropout)


def _check(layers: int, heads: int, width: int, dropout: float) -> None:
    """SettingError for a transformer that cannot be."""
    for name, value in (("layers", layers), ("heads", heads), ("width", width)):
        if value < 1:
            raise _refused(f"{name}={value}", "a whole number >= 1")
    if width % heads:
        raise _refused(f"heads={heads}", f"a divisor of width={width}")
    if not 0 <= dropout < 1:
        raise _refused(f"dropout={dropout:g}", "a number, 0 <= p < 1")


def _refused(value: str, allowed: str, nearest_word: str | None = None) -> SettingError:
    return SettingError("model_options", value, allowed, nearest_word)


# A model for rows (n, *shape) gives (n, outputs), one for text (n, length, outputs). What is between a transformer's
# first and last block is named `blocks`, and its last layer `head`.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "cnn": cnn,
    "resnet20": resnet20,
    "vit": vit,
    "gpt": gpt,
}


def build(
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    of_data: Collection[str] = (),
) -> nn.Module:
    """A model for samples of that shape; its initial weights depend on the seed alone.

    name: a row of `MODELS`, or FILE.py:FUNCTION. options: keyword parameters of the function that have a default, each
    of the default's type. of_data: the names of those that the data are made by, which a function need not take.
    SettingError for a function that does not take these, or gives no model.
    """
    if name not in MODELS and not python_file.is_function(name):
        raise SettingError("model", shown(name), ", ".join((*MODELS, FORMS[".py"])), nearest(name, MODELS))
    function = MODELS[name] if name in MODELS else python_file.function_named("model", name)
    if isinstance(function, nn.Module):  # it can be called, as a function can
        raise SettingError("model", f"{name}, which is a {type(function).__name__}", "a function that gives one")
    fitting = _fitting(name, function, options or {}, of_data)
    torch.manual_seed(seed)
    model = python_file.call("model", name, function, shape, outputs, **fitting)
    if not isinstance(model, nn.Module):
        raise SettingError("model", f"{name}, which gives a {type(model).__name__}", "what gives a torch.nn.Module")
    if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in model.parameters()):
        raise SettingError("model", f"{name}, which has lazy layers", "layers whose sizes are known")
    if not any(p.requires_grad for p in model.parameters()):
        raise SettingError("model", f"{name}, which has no parameters", "a model with parameters to be trained")
    for parameter, values in model.named_parameters():
        if values.dtype != torch.float32:
            what = f"{name}, whose parameter {parameter} is {str(values.dtype).removeprefix('torch.')}"
            raise SettingError("model", what, "parameters in float32: formats are what the other flags say")
    return model


def _fitting(
    name: str, function: Callable[..., Any], options: Mapping[str, Any], of_data: Collection[str]
) -> dict[str, Any]:
    """The options as the model's function takes them: a whole number is a number too."""
    if not options:
        return {}  # a function may be none whose parameters can be read
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    fitting = {}
    for option, value in options.items():
        kind = type(defaults.get(option))
        if option not in defaults and option in of_data:
            continue
        if option not in defaults and not takes_all:
            allowed = f"{', '.join(defaults)} ({name}'s)" if defaults else f"none ({name} has no options)"
            raise _refused(option, allowed, nearest(option, defaults))
        if kind is float and type(value) is int:
            value = float(value)
        if kind in TYPES and type(value) is not kind:
            raise _refused(f"{option}={value}", TYPES[kind])
        fitting[option] = value
    return fitting


def _check_image(name: str, shape: tuple[int, ...]) -> None:
    """SettingError for samples that are no images of 2 x 2 pixels or more."""
    if len(shape) != 3 or min(shape[1:]) < 2:
        raise SettingError("model", f"{name} for samples of the shape {shape}", "linear, mlp, or images (c, h, w)")
