"""CollageAdamW against the same steps told in exact fractions, and what the second bfloat16 number is there for."""

import copy
from fractions import Fraction
from math import sqrt

import pytest
import torch
from torch import nn

import low_precision as lp
from low_precision.errors import SettingError

STEPS, NUMBERS = 20, 24


def digits(x: Fraction, count: int, smallest: int) -> Fraction:
    """x to so many binary digits, none below 2**smallest: to nearest, ties to even."""
    if x == 0:
        return x
    exponent = 0
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    last = Fraction(2) ** max(exponent - count + 1, smallest)
    return round(x / last) * last  # Python rounds a half to even


def float32(x) -> Fraction:
    return digits(Fraction(x), 24, -149)


def bf16(x: Fraction) -> Fraction:
    """As two roundings, to float32 before: that is what each line of the docstring says."""
    return digits(float32(x), 8, -133)


def two_sum(h, dx):
    x = bf16(h + dx)
    return x, bf16(dx - bf16(x - h))


def grow(x, dx, y):
    h = bf16(x + y)
    return two_sum(h, bf16(dx + bf16(y - bf16(h - x))))


def step(w, dw, m, v, dv, g, t, lr, beta1, beta2, eps, decay, plus):
    """One number of one step, after the docstring of CollageAdamW. -> the five numbers after it."""
    m = bf16(m * float32(beta1))
    m = bf16(m + float32(float32(1 - beta1) * g))
    square = float32(float32(float32(1 - beta2) * g) * g)
    if plus:
        b = bf16(Fraction(beta2))
        db = bf16(Fraction(beta2) - b)
        h = bf16(v * b)
        e = v * b - h
        assert bf16(e) == e
        dv = bf16(dv * b)
        dv = bf16(dv + v * db)
        dv = bf16(dv + e)
        v, dv = two_sum(h, dv)
        v, dv = grow(v, dv, bf16(square))
    else:
        v = bf16(v * float32(beta2))
        v = bf16(v + square)
    n = bf16(Fraction(float(torch.tensor(float(v)).sqrt())))  # IEEE's square root of a float32 number
    n = bf16(n + float32(eps))
    s = lr * sqrt(1 - beta2**t) / (1 - beta1**t)
    u = bf16(-float32(s) * m)
    u = bf16(u / n)
    if decay:
        u = bf16(u - bf16(float32(lr * decay) * w))
    w, dw = grow(w, dw, u)
    return w, dw, m, v, dv


def gradients(t: int) -> torch.Tensor:
    """Of step t, in bfloat16: of many sizes, with zeros, and some that do not change."""
    g = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(t)) * 2.0 ** (torch.arange(NUMBERS) % 12 - 8)
    g[3::5], g[4] = 0.5, 0.0
    return g.bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("variant", "decay"), [("plus", 0.0), ("plus", 0.1), ("light", 0.1)])
def test_twenty_steps_in_fractions(variant, decay, dtype):
    start = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)).bfloat16()
    p = nn.Parameter(start.to(dtype))
    lr, betas, eps = 2.0**-7, (0.9, 0.999), 1e-6
    optimizer = lp.CollageAdamW([p], lr, betas, eps, decay, variant=variant)
    told = [[Fraction(float(w)), *[Fraction(0)] * 4] for w in start]
    for t in range(1, STEPS + 1):
        g = gradients(t)
        p.grad = g.to(dtype)
        optimizer.step()
        told = [
            step(*numbers, Fraction(float(x)), t, lr, *betas, eps, decay, variant == "plus")
            for numbers, x in zip(told, g, strict=True)
        ]
    state = optimizer.state[p]
    kept = [p, state["weight_rest"], state["exp_avg"], state["exp_avg_sq"]]
    kept += [state["exp_avg_sq_rest"]] if variant == "plus" else []
    for i, tensor in enumerate(kept):
        assert tensor.dtype == dtype
        assert tensor.tolist() == [float(numbers[i]) for numbers in told]
    assert any(numbers[1] for numbers in told)  # the second number of a weight is at work
    assert (variant == "light") != any(numbers[4] for numbers in told)


def decayed(variant: str, steps: int) -> float:
    """The second moment that began at 1, after so many steps without a gradient."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = lp.CollageAdamW([p], variant=variant)
    p.grad = torch.zeros(1)
    optimizer.step()
    state = optimizer.state[p]
    state["exp_avg_sq"].fill_(1.0)
    for _ in range(steps):
        optimizer.step()
    return float(state["exp_avg_sq"]) + (float(state["exp_avg_sq_rest"]) if variant == "plus" else 0.0)


def test_without_a_pair_the_second_moment_never_decays():
    assert float(torch.tensor(0.999).bfloat16()) == 1.0
    assert decayed("light", 2000) == 1.0
    for steps in (100, 2000):
        assert decayed("plus", steps) == pytest.approx(0.999**steps, rel=2e-3)


def test_without_a_pair_small_updates_are_lost():
    moved = {}
    for second in (True, False):
        p = nn.Parameter(torch.ones(1))
        optimizer = lp.CollageAdamW([p], lr=1e-4)
        for _ in range(200):
            p.grad = torch.ones(1)
            optimizer.step()
            if not second:
                optimizer.state[p]["weight_rest"].zero_()
        moved[second] = 1 - float(p.detach()) - float(optimizer.state[p]["weight_rest"])
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(200 * 1e-4, rel=0.02)


def test_a_resumed_run_and_a_copy_have_its_bits():
    def run(p, optimizer, steps):
        for t in steps:
            p.grad = gradients(t).float()
            optimizer.step()

    p = nn.Parameter(torch.randn(NUMBERS, generator=torch.Generator().manual_seed(1)).bfloat16().float())
    optimizer = lp.CollageAdamW([p], weight_decay=0.1)
    run(p, optimizer, range(5))
    resumed_p = nn.Parameter(p.detach().clone())
    resumed = lp.CollageAdamW([resumed_p], weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(p, optimizer, range(5, 9))
    run(resumed_p, resumed, range(5, 9))
    assert torch.equal(p, resumed_p)
    for name, value in optimizer.state[p].items():
        assert torch.equal(value, resumed.state[resumed_p][name])


def test_rounded_by_the_sites_too_it_stays_as_it_is():
    """Its numbers are of bfloat16 already, so rounding them to it changes nothing."""

    def train(with_sites):
        torch.manual_seed(2)
        model = nn.Linear(8, 4)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.bfloat16())
        optimizer = lp.CollageAdamW(model.parameters(), lr=0.01)
        if with_sites:
            lp.quantize_model(model, weights="bfloat16")
            lp.quantize_optimizer(optimizer, model, gradients="bfloat16", momentum="bfloat16")
        for t in range(6):
            optimizer.zero_grad()
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(t))
            model(x).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for ours, plain in zip(train(True), train(False), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": float("nan")}, "eps"),
        ({"variant": "puls"}, "variant"),
    ],
)
def test_wrong_settings(settings, setting):
    with pytest.raises(SettingError) as error:
        lp.CollageAdamW([nn.Parameter(torch.zeros(1))], **settings)
    assert error.value.setting == setting
    with pytest.raises(SettingError):
        lp.CollageAdamW([{"params": [nn.Parameter(torch.zeros(1))], **settings}])


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_parameters_that_do_not_hold_bfloat16s_numbers_are_refused(dtype):
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=f"a parameter of {dtype}, allowed: float32, bfloat16"):
        lp.CollageAdamW([p]).step()
