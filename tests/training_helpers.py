"""What tests of training share: small models and their batches, rules, and a rounding that is written by hand.

`nearest` shares no code with the engines: it computes in float64, where all of it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from low_precision.formats import NAMED, Format, format_named
from low_precision.model import LowPrecision
from low_precision.rounding import Rounding
from low_precision.rules import ALL_SITES, Rule
from low_precision.scheme import Scheme
from low_precision.tensor import quantize
from low_precision.wrap import quantize_model, quantize_optimizer

FLOAT8, FLOAT16 = NAMED["float8"], NAMED["float16"]
SITES = (*ALL_SITES, "accumulator")  # a compensation would stand in the accumulator's place
AROUND = ("inputs", "activations", "errors")  # the sites around layers


# Rounding by hand, and rules


def nearest(x: Tensor, fmt: Format) -> Tensor:
    """Round to nearest, ties to even, saturating: by its definition, in float64."""
    exact = x.detach().double().numpy()
    exponent = np.maximum(np.frexp(exact)[1] - 1, 1 - fmt.bias)
    last = np.ldexp(1.0, exponent - fmt.mantissa_bits)
    rounded = np.clip(np.rint(exact / last) * last, -fmt.largest, fmt.largest)
    return torch.from_numpy(np.asarray(rounded)).float()


def holds(x: Tensor, fmt: Format) -> bool:
    """Whether every element is a value of the format."""
    return torch.equal(nearest(x, fmt), x.detach())


def rule(name: str, rounding: str = "nearest") -> Rule:
    return Rule(format_named(name), Rounding(rounding))


def rules(sites: Iterable[str], name: str = "float8", rounding: str = "nearest") -> dict[str, Rule]:
    """The same rule for each of these sites."""
    return dict.fromkeys(sites, rule(name, rounding))


# Small models, and how they are trained


def small(kind: str = "mlp") -> nn.Module:
    """A small "mlp" or "cnn", always with the same weights."""
    torch.manual_seed(3)
    return models.mlp((5,), 3, width=8) if kind == "mlp" else models.cnn((1, 8, 8), 3)


def batch(kind: str = "mlp", step: int = 0, n: int = 7) -> tuple[Tensor, Tensor]:
    """What such a model reads at that step, and the right classes."""
    torch.manual_seed(100 + step)
    return torch.randn(n, *((5,) if kind == "mlp" else (1, 8, 8))), torch.randint(0, 3, (n,))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    kind: str = "mlp",
    forward: Callable[[Tensor], Tensor] | None = None,
    evaluate: bool = False,
) -> list[Tensor]:
    """The losses of these steps. forward: what computes, the model itself unless given. evaluate: after each step."""
    scale = optimizer.loss_scale.scale if hasattr(optimizer, "loss_scale") else lambda loss: loss
    losses = []
    for step in steps:
        x, y = batch(kind, step)
        optimizer.zero_grad()
        loss = F.cross_entropy((forward or model)(x), y)
        scale(loss).backward()
        optimizer.step()
        losses.append(loss.detach())
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(x)
                model(x[:2])
            model.train()
    return losses


def parameters(model: nn.Module) -> list[Tensor]:
    """Copies of its parameters."""
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists hold equal tensors."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def equal_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists hold float32 tensors of the same bits, in which -0 is not 0."""
    return equal([x.detach().view(torch.int32) for x in a], [y.detach().view(torch.int32) for y in b])


# The two calls of the library


def rounded(model: nn.Module, *sites: str, rounding: str = "stochastic", fmt: str = "float8", **settings) -> nn.Module:
    """The model, with these sites rounded."""
    settings = dict.fromkeys(sites, fmt) | {"rounding": rounding, "seed": 1} | settings
    return quantize_model(model, **settings)


def rounded_sgd(model: nn.Module, lr: float = 0.1, loss_scale: float | str = 1.0) -> torch.optim.Optimizer:
    """SGD with momentum around a rounded model, gradients and momentum in float8."""
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9)
    return quantize_optimizer(optimizer, model, gradients="float8", momentum="float8", loss_scale=loss_scale)


def everything(
    model: nn.Module | None = None, seed: int = 1, loss_scale: float | str = 1.0, lr: float = 0.1
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer, every site rounded stochastically."""
    model = rounded(small() if model is None else model, "weights", *AROUND, seed=seed, accumulator="float16")
    return model, rounded_sgd(model, lr, loss_scale)


# Optimizers


def rounded_mlp(
    scheme: dict[str, Rule], optimizer: Callable[..., torch.optim.Optimizer] | None = None, scale: float | str = 1.0
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model with these rules, and its optimizer, which `optimizer` makes of the parameters."""
    model = small()
    low = LowPrecision(model, Scheme(scheme, seed=1))
    return model, low.attach((optimizer or sgd)(model.parameters()), scale)


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=0.01)


def optimizer_state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All tensors that the optimizer remembers, step counts too."""
    return [
        v.clone() for held in optimizer.state.values() for _, v in sorted(held.items()) if isinstance(v, torch.Tensor)
    ]


def set_gradients(model: nn.Module, value: float) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, value)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, 0.9, dampening=0.5),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True),
    "foreach": lambda p: torch.optim.SGD(p, 0.1, 0.9, foreach=True),
    "maximize": lambda p: torch.optim.SGD(p, 0.1, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "radam, foreach": lambda p: torch.optim.RAdam(p, 0.01, foreach=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "rmsprop, foreach": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True, foreach=True),
    "sgd, fused": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, fused=True),
    "adam, fused": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, fused=True),
    "adagrad, fused": lambda p: torch.optim.Adagrad(p, 0.01, fused=True),
}


def two_layers(scale: float | str = 1024.0, seed: int = 1, errors: str | None = "float8_e4m3fn", make=None):
    """A model and its optimizer with a loss scale."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    quantize_model(model, errors=errors, seed=1)
    optimizer = (make or (lambda p: torch.optim.SGD(p, 0.1)))(model.parameters())
    return model, quantize_optimizer(optimizer, model, loss_scale=scale)


def _along(x: Tensor, fmt: str, dim: int) -> Tensor:
    return quantize(x.detach(), fmt, dim=dim)


class ReadRounded(torch.autograd.Function):
    """a b of matrices whose three products read rounded operands, written by hand."""

    @staticmethod
    def forward(ctx, a, b, fmt):
        ctx.save_for_backward(a, b)
        ctx.fmt = fmt
        return _along(a, fmt, -1) @ _along(b, fmt, -2)

    @staticmethod
    def backward(ctx, e):
        (a, b), fmt = ctx.saved_tensors, ctx.fmt
        return _along(e, fmt, -1) @ _along(b, fmt, -1).mT, _along(a, fmt, -2).mT @ _along(e, fmt, -2), None
