"""AdamW in bfloat16 alone: what one bfloat16 number cannot hold is kept in a second one, as Collage has it.

bfloat16 has 8 digits, and two things fail in it. An update below 1/512 of its weight is lost. And bfloat16(0.999) is 1,
so a second moment would never decay. Collage (Yu et al. 2024, arXiv:2405.03637) keeps such a number as the sum of two
bfloat16 numbers, the second one below the last digit of the first. `light` does that for the weights, `plus` for the
second moment and its factor beta2 too. Nothing is kept, or computed, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from low_precision.errors import SettingError, nearest

_VARIANTS = ("plus", "light")
_TYPES = (torch.float32, torch.float64, torch.bfloat16)  # that hold all numbers of bfloat16


class CollageAdamW(torch.optim.Optimizer):
    """AdamW whose every number is one of bfloat16, or a pair of them.

    params: float32 or bfloat16; values of bfloat16 alone (others are rounded to it by the first step). betas, eps,
    weight_decay: as torch.optim.AdamW; eps is Collage's own default. variant: "plus", or "light". SettingError for
    numbers out of range and unknown words, in a group of its own too; TypeError for parameters of other types,
    RuntimeError for a sparse gradient.

    The state of a parameter w, of its type: exp_avg m; exp_avg_sq v; weight_rest dw, so that the weight is w + dw; and
    with "plus" exp_avg_sq_rest dv, so that the second moment is v + dv. What stands between semicolons is computed in
    float32, operation by operation, and rounded to bfloat16, to nearest, ties to even; lr, betas, eps, weight_decay and
    what follows from them alone are numbers of float32, but beta2 in "plus" is a pair of bfloat16, b + db:

        m  = m beta1;  m = m + (1 - beta1) g
        plus:  h = v b;  e = v b - h (exact);  dv = dv b;  dv = dv + v db;  dv = dv + e;  v, dv = two_sum(h, dv)
               v, dv = grow(v, dv, (1 - beta2) g g)
        light: v = v beta2;  v = v + (1 - beta2) g g
        n  = sqrt(v);  n = n + eps;  u = -s m;  u = u / n;  d = lr weight_decay w;  u = u - d
        w, dw = grow(w, dw, u)
        grow(x, dx, y):   h = x + y;  t = h - x;  t = y - t;  dx = dx + t;  two_sum(h, dx)
        two_sum(h, dx):   x = h + dx;  t = x - h;  dx = dx - t

    with s = lr sqrt(1 - beta2**t) / (1 - beta1**t) at step t. Source: Collage's own code at 0b92da7,
    roBERTa/utils/adamw_collage.py, with its decay "compact". There the product h overwrites v before e is computed,
    which makes v negative in a hundred steps; here it does not, as the paper has it.

        optimizer = lp.CollageAdamW(model.parameters(), lr=1e-3)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        variant: str = "plus",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "variant": variant}
        _check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):  # else torch says so
            _check(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.dtype not in _TYPES:
                    raise TypeError(f"CollageAdamW: given a parameter of {p.dtype}, allowed: float32, bfloat16")
                if p.grad.layout != torch.strided:
                    raise RuntimeError("CollageAdamW: given a sparse gradient, allowed: a dense one")
                self._update(p, self._state_of(p, group["variant"]), group)
        return loss

    def _state_of(self, p: Tensor, variant: str) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            names = ["exp_avg", "exp_avg_sq", "weight_rest", *(["exp_avg_sq_rest"] if variant == "plus" else [])]
            state["step"] = torch.zeros(())  # on the CPU, as torch's own: nobody waits for it
            state |= {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names}
        return state

    def _update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] += 1
        steps, lr, (beta1, beta2) = float(state["step"]), float(group["lr"]), map(float, group["betas"])
        w, g = _rounded(p.float()), _rounded(p.grad.float())  # type: ignore[union-attr]
        m, v = state["exp_avg"].float(), state["exp_avg_sq"].float()
        m = _rounded(_rounded(m * beta1) + (1 - beta1) * g)
        square = (1 - beta2) * g * g
        if group["variant"] == "plus":
            v, rest = _product(v, state["exp_avg_sq_rest"].float(), beta2)
            v, rest = grow(v, rest, _rounded(square))
            state["exp_avg_sq_rest"].copy_(rest)
        else:
            v = _rounded(_rounded(v * beta2) + square)
        step_size = lr * math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
        update = _rounded(_rounded(m * -step_size) / _rounded(_rounded(v.sqrt()) + group["eps"]))
        if group["weight_decay"]:
            update = _rounded(update - _rounded(w * (lr * group["weight_decay"])))
        w, rest = grow(w, state["weight_rest"].float(), update)
        for kept, value in ((state["exp_avg"], m), (state["exp_avg_sq"], v), (state["weight_rest"], rest), (p, w)):
            kept.copy_(value)


def _check(group: dict[str, Any]) -> None:
    """SettingError for what a group of parameters cannot have."""
    for name in ("lr", "eps", "weight_decay"):
        if not (isinstance(group[name], int | float | Tensor) and 0 <= group[name] < math.inf):
            raise SettingError(name, repr(group[name]), "a number >= 0")
    betas, variant = group["betas"], group["variant"]
    is_pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not (is_pair and all(isinstance(beta, int | float | Tensor) and 0 <= beta < 1 for beta in betas)):
        raise SettingError("betas", repr(betas), "two numbers, 0 <= beta < 1")
    if variant not in _VARIANTS:
        raise SettingError("variant", repr(variant), ", ".join(_VARIANTS), nearest(str(variant), _VARIANTS))


def grow(x: Tensor, rest: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The pair x + rest, plus y: bfloat16 numbers in float32 tensors, as everything here. |x| >= |y| or x = 0."""
    total = _rounded(x + y)
    lost = _rounded(y - _rounded(total - x))
    return _two_sum(total, _rounded(rest + lost))


def _product(x: Tensor, rest: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The pair x + rest, times a number that becomes a pair itself."""
    b = float(torch.tensor(factor, dtype=torch.float64).bfloat16())
    db = float(torch.tensor(factor - b, dtype=torch.float64).bfloat16())
    product = x * b  # exact: 16 digits
    total = _rounded(product)
    rest = _rounded(_rounded(rest * b) + x * db)
    return _two_sum(total, _rounded(rest + _rounded(product - total)))


def _two_sum(total: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    x = _rounded(total + rest)
    return x, _rounded(rest - _rounded(x - total))


def _rounded(x: Tensor) -> Tensor:
    """To bfloat16 and back. Of one operation on bfloat16 numbers, that is its correctly rounded result: float32 has
    more than twice as many digits and two (Figueroa 1995).
    """
    return x.bfloat16().float()
