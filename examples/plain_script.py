"""Plain PyTorch, and the two calls that make it train in low precision.

After `pip install .`: python examples/plain_script.py; without, from the checkout: PYTHONPATH=. python ...
"""

import torch
from torch import nn

import low_precision as lp


def train(rounding: str | None = None, accumulator: str | None = None) -> float:
    """The mean square error of a linear regression after 100 steps: in float32, or every number in float8."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x @ torch.linspace(-1, 1, 8)[:, None] + 0.1 * torch.randn(256, 1)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    if rounding:
        sites = dict.fromkeys(("weights", "inputs", "activations", "errors"), "float8")
        lp.quantize_model(model, **sites, accumulator=accumulator, rounding=rounding, seed=1)
        lp.quantize_optimizer(optimizer, model, gradients="float8", momentum="float8")
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


print(f"float32                              {train():.3f}")
print(f"float8, nearest                      {train('nearest'):.3f}")
print(f"float8, stochastic                   {train('stochastic'):.3f}")
print(f"float8, nearest, float16 accumulator {train('nearest', 'float16'):.3f}")
