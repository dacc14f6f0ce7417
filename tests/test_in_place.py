"""A layer's error is rounded in place where nobody else has it: the same bits, and nothing that others see changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
import sites
from formats import ALL_SITES, NAMED, Rounding, Rule
from quant import LowPrecision, Quantizer, Scheme

NOISY = Scheme(dict.fromkeys(ALL_SITES, Rule(NAMED["float8"], Rounding.STOCHASTIC)), seed=5)


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


def made(name: str, scheme: Scheme = NOISY) -> tuple[nn.Module, LowPrecision]:
    torch.manual_seed(1)
    model = MODELS[name][0]()
    return model, LowPrecision(model, scheme)


def batch(name: str) -> torch.Tensor:
    return torch.randn(6, *MODELS[name][1], generator=torch.Generator().manual_seed(2))


def trained(name: str, layout: torch.memory_format = torch.contiguous_format) -> list[torch.Tensor]:
    """Gradients of an input and weights after two steps, the second with two passes before they go back together."""
    model, low = made(name)
    model.to(memory_format=layout)
    optimizer = low.attach(torch.optim.SGD(model.parameters(), 0.1, 0.9), 64.0)
    x = batch(name).to(memory_format=layout).requires_grad_()
    found = []
    for passes in (1, 2):
        optimizer.zero_grad()
        x.grad = None
        low.scale(sum(model(x).square().mean() for _ in range(passes))).backward()
        optimizer.step()
        found += [x.grad.clone(), *(p.detach().clone() for p in model.parameters())]
    return found


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))


def out_of_place(monkeypatch) -> None:
    monkeypatch.setattr(sites, "_gives_a_new_error", lambda layer: False)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_as_out_of_place(name, monkeypatch):
    layouts = [torch.contiguous_format] + [torch.channels_last] * (len(MODELS[name][1]) == 3)
    found = [trained(name, layout) for layout in layouts]
    out_of_place(monkeypatch)
    assert all(same(trained(name, layout), those) for layout, those in zip(layouts, found, strict=True))


def test_it_is_done_in_place(monkeypatch):
    places = []
    call = Quantizer.__call__

    def watched(quantizer, x, *given, out=None, **named):
        places.append((x, out))
        return call(quantizer, x, *given, out=out, **named)

    model, _ = made("resnet20", Scheme({"errors": NOISY.rules["errors"]}, seed=5))
    monkeypatch.setattr(Quantizer, "__call__", watched)
    model(batch("resnet20")).sum().backward()
    assert len(places) == 22 + 21  # of outputs, and of inputs but the images
    assert sum(out is x for x, out in places) == 21


def test_gradients_of_gradients(monkeypatch):
    found = []
    for in_place in (True, False):
        if not in_place:
            out_of_place(monkeypatch)
        model, _ = made("twice")
        x = batch("twice").requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
        assert found[-1][0].abs().sum() > 0
    assert same(*found)


def test_an_error_that_a_hook_has_seen_stays_as_it_was():
    seen = []
    model, _ = made("twice", Scheme({"errors": NOISY.rules["errors"]}, seed=5))
    model.second.register_full_backward_hook(
        lambda layer, inputs, outputs: seen.append((inputs[0], inputs[0].detach().clone()))
    )
    model(batch("twice").requires_grad_()).square().sum().backward()
    ((error, then),) = seen
    assert torch.equal(error, then)
    assert not torch.equal(error, error.to(torch.float8_e5m2).float())  # seen before it was rounded
