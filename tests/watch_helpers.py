"""A model with all kinds of products, its training, and what is compared of it: for the tests of what listens."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import low_precision as lp

RULES = {
    "float8": {"weights": "float8", "inputs": "float8", "activations": "float8", "errors": "float8"},
    "stochastic": {"weights": "float8:stochastic", "products": "mxfp4:stochastic", "elementwise": "bfloat16"},
    "accumulator": {"weights": "float8", "accumulator": "float16", "products": "float8"},
    "compensation": {"weights": "bfloat16", "compensation": "bfloat16"},
    "nvfp4": {"recipe": "nvfp4"},
    "te-delayed": {"recipe": "te-delayed"},
    "quartet": {"recipe": "quartet"},
}
OF_OPTIMIZER = {"gradients": "float8:stochastic", "momentum": "float8"}


class Net(nn.Module):
    """Linear layers, attention, a product by hand, and a part that is checkpointed."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.2, batch_first=True)
        self.reentrant = reentrant

    def middle(self, x):
        y = torch.relu(self.attention(x, x, x)[0])
        return x + y @ y.mT @ y / 64

    def forward(self, x):
        x = self.first(x)
        x = self.middle(x) if self.reentrant is None else checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.last(x)


def trained(rules, watched, steps=4, reentrant=None, loss_scale=None, every=1, **of_watch):
    """The model after some steps of two micro-batches each, its optimizer, its watcher, and what it gave between."""
    torch.manual_seed(0)
    model = lp.quantize_model(Net(reentrant), seed=1, **rules)
    of_optimizer = {} if "recipe" in rules else OF_OPTIMIZER
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    lp.quantize_optimizer(optimizer, model, loss_scale=loss_scale, **of_optimizer)
    watcher = lp.watch(model, every, **of_watch) if watched else None
    generator, given = torch.Generator().manual_seed(2), []
    for _ in range(steps):
        for _ in range(2):
            x = torch.randn(3, 8, 16, generator=generator)
            optimizer.loss_scale.scale(model(x).square().mean()).backward()
        model.eval()
        with torch.no_grad():
            given.append(model(x))
        model.train()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, watcher, given


def state_of(model, optimizer, given):
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return [*model.parameters(), *moments, *given, torch.get_rng_state()]
