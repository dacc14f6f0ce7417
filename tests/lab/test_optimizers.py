"""Optimizers that start fast: the same as torch's to the bit, and no run imports the compiler."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from run_helpers import ROOT
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from training_helpers import equal, parameters

from lab.lean import lean

KINDS = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    (Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    (AdamW, {"lr": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01}),
    (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
]
X, Y = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0)).unbind()


def start(kind, settings):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    return model, kind(model.parameters(), **settings)


def step(model, optimizer):
    """One step with a closure; returns the loss that the optimizer returns."""

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert torch.is_grad_enabled()
    return float(loss.detach())


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("schedule", [lambda o: CosineAnnealingLR(o, 10), lambda o: OneCycleLR(o, 0.1, 10)])
def test_steps_closures_and_schedules_give_the_bits_of_torchs_own(kind, settings, schedule):
    if kind is torch.optim.LBFGS:  # which has no momentum to cycle
        schedule = None
    runs = []
    for made in (kind, lean(kind)):
        model, optimizer = start(made, settings)
        scheduler = schedule and schedule(optimizer)
        losses = []
        for _ in range(8):
            losses.append(step(model, optimizer))
            if scheduler:
                scheduler.step()
        runs.append((model, losses))
    (model, losses), (lean_model, lean_losses) = runs
    assert losses == lean_losses
    assert len(set(losses)) == 8  # it moves
    assert equal(parameters(model), parameters(lean_model))


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("back", [False, True])
def test_states_go_from_one_to_the_other(kind, settings, back):
    first, second = (lean(kind), kind) if back else (kind, lean(kind))
    model, optimizer = start(first, settings)
    step(model, optimizer)
    copy, continued = start(second, {**settings, "lr": 1.0})
    copy.load_state_dict(model.state_dict())
    continued.load_state_dict(deepcopy(optimizer.state_dict()))
    for _ in range(3):
        assert step(model, optimizer) == step(copy, continued)
    assert equal(parameters(model), parameters(copy))


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_hooks_names_and_groups_are_those_of_the_optimizer(kind):
    model, optimizer = start(lean(kind), {"lr": 0.1})
    assert isinstance(optimizer, kind)
    assert repr(optimizer) == repr(start(kind, {"lr": 0.1})[1])
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5})
    step(model, optimizer)
    assert called == ["before", "after"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_differentiable_step_can_be_differentiated():
    rate = torch.tensor(0.5, requires_grad=True)
    moved = torch.ones(1, requires_grad=True).clone()
    moved.grad = torch.full_like(moved, 3.0)
    optimizer = lean(SGD)([torch.zeros(1, requires_grad=True)], lr=rate, differentiable=True)
    optimizer.param_groups[0]["params"] = [moved]
    optimizer.step()
    (slope,) = torch.autograd.grad(moved.sum(), rate)
    assert float(slope) == -3.0  # p - rate * 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--optimizer", "sgd", "--momentum", "0.9", "--schedule", "onecycle"],
        ["--optimizer", "adam", "--schedule", "cosine", "--loss-scale", "dynamic"],
        ["--optimizer", "adamw", "--dataset", "digits", "--site", "accumulator=float16:stochastic"],
        ["--optimizer", "muon", "--dataset", "digits", "--model", "vit", "--clip-norm", "1", "--steps", "2"],
    ],
)
def test_a_run_does_not_import_the_compiler(tmp_path, arguments):
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import main
assert main.main(sys.argv[2:]) == 0
print([name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))])
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), "--precision", "float8", "--wandb", "disabled", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"
