"""A layer's error is rounded in place where nobody else has it: the same bits, and nothing that others see changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_helpers import equal_bits

import models
from low_precision.formats import NAMED
from low_precision.layers import LayerRounding
from low_precision.model import LowPrecision
from low_precision.rounding import Rounding
from low_precision.rules import ALL_SITES, Rule
from low_precision.scheme import Quantizer, Scheme

pytestmark = pytest.mark.usefixtures("one_thread")

NOISY = dict.fromkeys(ALL_SITES, Rule(NAMED["float8"], Rounding.STOCHASTIC))
ERRORS = {"errors": NOISY["errors"]}
ENGINES = pytest.mark.parametrize("backend", ["eager", "fused"])


class Twice(nn.Module):
    """A layer called twice, and an input that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.first(x))
        return self.second(self.first(y)) + self.other(y)


def padded(**settings) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 4, **settings), nn.ReLU(), nn.Conv2d(4, 4, 2, **settings))


MODELS = {
    "resnet20": (lambda: models.resnet20((4, 8, 8), 4), (4, 8, 8)),
    "twice": (Twice, (4, 8, 8)),
    "circular": (lambda: padded(padding=1, padding_mode="circular"), (4, 8, 8)),
    "same, an even kernel": (lambda: padded(padding="same"), (4, 8, 8)),
    "groups": (lambda: padded(groups=2, stride=2, padding=2), (4, 8, 8)),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3)), (4, 9)),
    "three": (lambda: nn.Sequential(nn.Conv3d(4, 4, 2), nn.ReLU(), nn.Conv3d(4, 4, 2)), (4, 5, 5, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)), (4, 9)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (4, 8)),
}


def made(name: str, backend: str = "fused", rules: dict[str, Rule] = NOISY) -> tuple[nn.Module, LowPrecision]:
    torch.manual_seed(1)
    model = MODELS[name][0]()
    return model, LowPrecision(model, Scheme(rules, seed=5, backend=backend))


def batch(name: str) -> torch.Tensor:
    return torch.randn(6, *MODELS[name][1], generator=torch.Generator().manual_seed(2))


def trained(name: str, backend: str, layout: torch.memory_format) -> list[torch.Tensor]:
    """Gradients of an input and weights after two steps, the second with two passes before they go back together."""
    model, low = made(name, backend)
    model.to(memory_format=layout)
    optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.1, 0.9), 64.0)
    x = batch(name).to(memory_format=layout).requires_grad_()
    met = []
    for passes in (1, 2):
        optimizer.zero_grad()
        x.grad = None
        low.scale(sum(model(x).square().mean() for _ in range(passes))).backward()
        optimizer.step()
        met += [x.grad.clone(), *(p.detach().clone() for p in model.parameters())]
    return met


def out_of_place(monkeypatch) -> None:
    monkeypatch.setattr(LayerRounding, "_has_private_error", lambda rounding, layer: False)


@ENGINES
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_as_out_of_place(name, backend, monkeypatch):
    layouts = [torch.contiguous_format] + [torch.channels_last] * (len(MODELS[name][1]) == 3)
    expected = [trained(name, backend, layout) for layout in layouts]
    out_of_place(monkeypatch)
    assert all(equal_bits(trained(name, backend, layout), bits) for layout, bits in zip(layouts, expected, strict=True))


def watched_roundings(model: nn.Module, x: torch.Tensor, monkeypatch) -> list[bool]:
    """Of each rounding of a step, whether it was done in place."""
    in_place = []
    call = Quantizer.__call__

    def watched(quantizer, x, *arguments, out=None, **named):
        in_place.append(out is x)
        return call(quantizer, x, *arguments, out=out, **named)

    monkeypatch.setattr(Quantizer, "__call__", watched)
    model(x).sum().backward()
    return in_place


def test_it_is_done_in_place(monkeypatch):
    model, _ = made("resnet20", rules=ERRORS)
    in_place = watched_roundings(model, batch("resnet20"), monkeypatch)
    assert (len(in_place), sum(in_place)) == (22 + 21, 21)  # of outputs, and of inputs but the images


class OtherLinear(nn.Linear):
    pass


def nothing(*arguments) -> None:
    pass


SEEN = {
    "forward hook": lambda layer: layer.register_forward_hook(nothing),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(nothing),
    "backward hook": lambda layer: layer.register_full_backward_hook(nothing),
    "every forward hook": lambda layer: nn.modules.module.register_module_forward_hook(nothing),
    "every backward hook": lambda layer: nn.modules.module.register_module_full_backward_hook(nothing),
    "a forward of its own": lambda layer: setattr(layer, "forward", lambda x: F.linear(x, layer.weight) + x.sum()),
    "a class of its own": lambda layer: None,
}


@pytest.mark.parametrize("seen", SEEN)
def test_not_where_somebody_may_see_it(seen, monkeypatch):
    layer = OtherLinear(3, 3) if seen == "a class of its own" else nn.Linear(3, 3)
    model = nn.Sequential(layer)
    LowPrecision(model, Scheme(ERRORS, seed=5))
    handle = SEEN[seen](layer)
    try:
        in_place = watched_roundings(model, torch.ones(2, 3, requires_grad=True), monkeypatch)
    finally:
        if handle:
            handle.remove()
    assert in_place == [False, False]


@ENGINES
def test_a_loss_on_what_a_layer_reads(backend):
    """Seen by a hook, twice: both gradients are one tensor of autograd's, and that of `beside` too."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    LowPrecision(model, Scheme(ERRORS, seed=5, backend=backend))
    read, beside = [], torch.full((6, 4), 0.3, requires_grad=True)
    model[2].register_forward_hook(lambda layer, inputs, output: read.append(inputs[0]))
    for _ in range(2):
        model(torch.ones(6, 4))
    loss = (read[0] + read[1] + beside * 1).square().sum()
    (expected,) = torch.autograd.grad(loss, read[0], retain_graph=True)
    loss.backward()
    assert torch.equal(beside.grad, expected)
    assert not torch.equal(expected, expected.to(torch.float8_e5m2).float())  # it is not rounded


@ENGINES
def test_gradients_of_gradients(backend, monkeypatch):
    met = []
    for in_place in (True, False):
        if not in_place:
            out_of_place(monkeypatch)
        model, _ = made("twice", backend)
        x = batch("twice").requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        met.append([x.grad, *(p.grad for p in model.parameters())])
        assert met[-1][0].abs().sum() > 0
    assert equal_bits(*met)
