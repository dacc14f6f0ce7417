"""Activation checkpointing: what is computed again has the bits of the first time, and so have all gradients."""

import copy
import pickle
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._composable import checkpoint as composable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from training_helpers import AROUND, equal_bits, parameters

from low_precision import clock
from low_precision.engines import choice
from low_precision.wrap import Quantize, quantize_model, quantize_optimizer, unquantized

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(use_reentrant|requires_grad=True|None of the inputs)"),
]

FORMATS = ["float8", "mxfp4", "nvfp4"]
WIDTH = 32
REENTRANT = [True, False]
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


def plainly(function, *arguments):
    return function(*arguments)


def nested(outer: bool, inner: bool):
    def run(function, *arguments):
        return checkpoint(lambda *x: checkpoint(function, *x, use_reentrant=inner), *arguments, use_reentrant=outer)

    return run


def selective(policy):
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def always(answer: CheckpointPolicy):
    return selective(lambda context, operation, *arguments, **named: answer)


WAYS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant, its random numbers not kept": partial(checkpoint, use_reentrant=True, preserve_rng_state=False),
    "random numbers not kept": partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
    "not checked": partial(checkpoint, use_reentrant=False, determinism_check="none"),
    **{f"{outer} around {inner}": nested(outer, inner) for outer in REENTRANT for inner in REENTRANT},
    "products are kept": selective(PRODUCTS),
    "products are preferred": selective(
        lambda context, operation, *arguments, **named: (
            CheckpointPolicy.PREFER_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
        )
    ),
    "nothing is kept": always(CheckpointPolicy.MUST_RECOMPUTE),
}


class Net(nn.Module):
    """Two parts, each computed by `way`."""

    def __init__(self, way=plainly, dropout: float = 0.0, batch_norm: bool = False, quantize: str | None = None):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        noise = [Quantize(quantize, backward=quantize, seed=seed) if quantize else nn.Identity() for seed in (5, 6)]
        self.first, self.second = noise
        self.way = way

    def part(self, x):
        return self.second(self.norm(self.dropout(F.relu(self.b(self.first(F.gelu(self.a(x))))))))

    def forward(self, x):
        return self.way(self.c, self.way(self.part, x))


def rounded(model: nn.Module, fmt: str = "float8", seed: int = 1) -> nn.Module:
    """Stochastically, at all sites around its layers."""
    return quantize_model(model, **dict.fromkeys(AROUND, fmt), rounding="stochastic", seed=seed)


def net(way=plainly, fmt: str = "float8", **settings) -> nn.Module:
    torch.manual_seed(0)
    return rounded(Net(way, **settings), fmt)


def layers(count: int = 2, fmt: str = "float8", seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return rounded(
        nn.Sequential(*[part for _ in range(count) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())]), fmt, seed
    )


def leaf(seed: int = 1) -> torch.Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(forward, *models: nn.Module, passes: int = 1, backward_passes: int = 1) -> list[torch.Tensor]:
    """Those with respect to input and parameters, added up over the backward passes; the input's of the last pass."""
    torch.manual_seed(2)
    for number in range(passes):
        x = leaf(number)
        loss = forward(x).sin().sum()
        for left in reversed(range(backward_passes)):
            loss.backward(retain_graph=left > 0)
    grads = [x.grad, *(p.grad for model in models for p in model.parameters())]
    return [grad.clone() for grad in grads if grad is not None]


def of(model: nn.Module, **passes: int) -> list[torch.Tensor]:
    return gradients(model, model, **passes)


# Ways


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", WAYS)
def test_gradients_are_those_without_checkpointing(name, fmt):
    expected = of(net(fmt=fmt), passes=2)
    assert len(expected) == 7
    assert equal_bits(of(net(WAYS[name], fmt), passes=2), expected)
    with set_checkpoint_early_stop(False):
        assert equal_bits(of(net(WAYS[name], fmt), passes=2), expected)


def test_these_gradients_show_noise():
    """Else the tests here could not fail: another seed, and another forward pass, give others."""
    assert not equal_bits(of(net()), of(rounded(copy_of_plain(), seed=2)))
    model = net()
    first = of(model)
    model.zero_grad()
    assert not equal_bits(first, of(model))


def copy_of_plain() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("fmt", ["float8", "nvfp4"])
@pytest.mark.parametrize("name", [name for name in WAYS if "products" not in name])  # torch refuses those
def test_a_second_backward_pass_has_noise_of_its_own_and_the_same_one(name, fmt):
    expected = of(net(fmt=fmt), backward_passes=2)
    assert equal_bits(of(net(WAYS[name], fmt), backward_passes=2), expected)
    once = of(net(fmt=fmt))
    assert not equal_bits(expected, [2 * gradient for gradient in once])


INSIDE: list[dict] = [{"dropout": 0.3}, {"batch_norm": True}, {"quantize": "float4_e2m1fn:stochastic"}]


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, inside) for name in WAYS for inside in INSIDE if not ("not kept" in name and "dropout" in inside)],
)
def test_with_other_modules_inside(name, settings):
    expected = of(net(**settings), passes=2)
    assert equal_bits(of(net(WAYS[name], **settings), passes=2), expected)


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_checkpoint_sequential(segments, reentrant):
    expected = of(layers(4))
    model = layers(4)
    run = partial(checkpoint_sequential, model, segments, use_reentrant=reentrant)
    assert equal_bits(gradients(lambda x: run(x), model), expected)


@pytest.mark.parametrize("place", ["model", "layer"])
@pytest.mark.parametrize("first", ["checkpoint", "rounding"])
def test_composable_checkpoint(place, first):
    expected = of(layers())
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU())
    calls = [lambda: composable(model if place == "model" else model[2]), lambda: rounded(model)]
    for call in calls if first == "checkpoint" else reversed(calls):
        call()
    assert equal_bits(of(model), expected)


@pytest.mark.parametrize("kind", CheckpointImpl)
def test_checkpoint_wrapper(kind):
    expected = of(layers())
    model = layers()
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=kind),
        check_fn=lambda module: isinstance(module, nn.Linear),
    )
    assert equal_bits(of(model), expected)


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_the_engine_may_change_before_the_recomputation(reentrant, monkeypatch):
    def run(way) -> list[torch.Tensor]:
        model, x = net(way), leaf()
        monkeypatch.setattr(choice, "_spent", 0.0)  # eager
        loss = model(x).sin().sum()
        monkeypatch.setattr(choice, "_spent", choice.LOAD_SECONDS)  # fused, where it is installed
        loss.backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    assert equal_bits(run(partial(checkpoint, use_reentrant=reentrant)), run(plainly))


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", REENTRANT)
def test_compiled(reentrant):
    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=reentrant).relu())

    met = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = rounded(Compiled())
        met.append(gradients(torch.compile(model, backend="eager") if compiled else model, model, passes=3))
    assert equal_bits(*met)


# What is inside


def two_models(models, x, way):
    return way(lambda y: models[1](models[0](y)), x)


def twice_in_one(models, x, way):
    return way(lambda y: models[0](models[0](y)), x)


def twice_in_two(models, x, way):
    return way(models[0], way(models[0], x))


def inside_and_outside(models, x, way):
    return models[0](way(models[0], models[0](x)))


def one_layer_inside_and_outside(models, x, way):
    return models[0][0](way(models[0][0], models[0][0](x)))


def unquantized_inside(models, x, way):
    def part(y):
        with unquantized(models[0]):
            y = models[0](y)
        return models[0](y)

    return way(part, x)


def unquantized_around(models, x, way):
    with unquantized(models[0]):
        x = way(models[0], x)
    return way(models[0], x)


def in_evaluation(models, x, way):
    models[0].eval()
    return way(models[0], x)


CASES = [
    *(two_models, twice_in_one, twice_in_two, inside_and_outside, one_layer_inside_and_outside, unquantized_inside),
    *(unquantized_around, in_evaluation),
]


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("fmt", ["float8", "nvfp4"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_inside(case, fmt, reentrant):
    for backward_passes in (1, 2):
        met = []
        for way in (plainly, partial(checkpoint, use_reentrant=reentrant)):
            models = [layers(fmt=fmt, seed=seed) for seed in (1, 2)]
            forward = partial(case, models, way=way)
            met.append(gradients(forward, *models, backward_passes=backward_passes))
        (x, *expected), (x_again, *again) = met
        assert equal_bits([x], [x_again])
        # Those of parameters that are used twice are added up in another order.
        torch.testing.assert_close(again, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_what_happens_between_forward_and_backward(reentrant):
    """An evaluation, a training pass, an unquantized block, and the step of another pass's gradients."""
    met = []
    for way in (plainly, partial(checkpoint, use_reentrant=reentrant)):
        model, x = layers(), leaf()
        optimizer = quantize_optimizer(torch.optim.SGD(model.parameters(), 0.0), model)
        loss = way(model, x).sin().sum()
        model.eval()
        model(x)
        model.train()
        model(x)
        optimizer.step()  # moves the clock, and with this learning rate nothing else
        with unquantized(model):
            loss.backward()
        met.append([x.grad, *(p.grad for p in model.parameters())])
    assert equal_bits(*met)


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_the_first_pass_of_another_rank(reentrant, monkeypatch):
    monkeypatch.setattr(clock, "process_rank", lambda: 1)
    for quantize in (None, "float4_e2m1fn:stochastic"):
        model = net(quantize=quantize)
        way = partial(checkpoint, model, use_reentrant=reentrant)
        assert equal_bits(gradients(lambda x, way=way: way(x), model), of(net(quantize=quantize)))


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_accumulated_steps_with_a_dynamic_loss_scale(reentrant):
    """The weights of such a run, and what its loss scale became: overflows inside a checkpointed part count."""
    met = []
    for way in (plainly, partial(checkpoint, use_reentrant=reentrant)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        every = dict.fromkeys(("weights", *AROUND), "float8")
        quantize_model(model, **every, rounding="stochastic", seed=1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        quantize_optimizer(optimizer, model, gradients="float8", momentum="float8", loss_scale="dynamic")
        for step in range(6):
            optimizer.zero_grad()
            for number in range(2):
                y = way(model[2], way(model[:2], leaf(10 * step + number)))
                optimizer.loss_scale.scale(y.square().mean() * (1e6 if step == 3 else 1.0)).backward()
            optimizer.loss_scale.unscale(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        met.append([*parameters(model), torch.tensor([optimizer.loss_scale.value, optimizer.loss_scale.skipped])])
    assert equal_bits(*met)
    assert met[0][-1][1] > 0


def test_gradients_of_gradients():
    met = []
    for way in (plainly, partial(checkpoint, use_reentrant=False)):
        model, x = layers(), leaf()
        y = way(model, x).sin().sum()
        first = torch.autograd.grad(y, x, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), [x, model[0].weight, model[2].weight])
        met.append([first.detach(), *second])
    assert equal_bits(*met)


@pytest.mark.filterwarnings("ignore:.*not rounded")
@pytest.mark.parametrize("reentrant", REENTRANT)
def test_a_transformer_layer(reentrant):
    met = []
    for way in (plainly, partial(checkpoint, use_reentrant=reentrant)):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        rounded(model)
        torch.manual_seed(1)
        x = torch.randn(3, 5, 16, requires_grad=True)
        way(model, x).sin().sum().backward()
        met.append([x.grad, *(p.grad for p in model.parameters())])
    assert equal_bits(*met)


# What surrounds it


def test_threads_keep_to_themselves():
    """A recomputation in one thread does not change the time of what another thread runs."""
    expected = {seed: of(layers(seed=seed), passes=5) for seed in (1, 2, 3)}
    models = {seed: layers(seed=seed) for seed in expected}  # made here: torch's generator is the threads' too
    met = {}

    def work(seed: int) -> None:
        way = partial(checkpoint, models[seed], use_reentrant=seed == 1)
        met[seed] = gradients(lambda x: way(x), models[seed], passes=5)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal_bits(met[seed], expected[seed]) for seed in expected)


def test_an_error_in_the_recomputation_ends_it():
    model, failing = layers(), []

    def part(x):
        y = model[0](x)
        if failing:  # before torch has all that it needs, and stops
            raise ZeroDivisionError
        return model[1:](y)

    for reentrant in REENTRANT:
        failing.clear()
        loss = checkpoint(part, leaf(), use_reentrant=reentrant).sum()
        failing.append(True)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
    model.zero_grad()
    other = layers()
    other(leaf()), other(leaf())
    assert equal_bits(of(model), of(other))  # the clock, not the recomputation's: this is the third pass of both


def test_named_arguments_reach_the_function():
    x = leaf()
    named = dict.fromkeys(("run", "arguments", "named"), 2.0)
    checkpoint(
        lambda x, run, arguments, named: x * run * arguments * named, x, use_reentrant=False, **named
    ).sum().backward()
    assert x.grad.eq(8.0).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_an_unquantized_block_rounds(copied):
    model = layers()
    with unquantized(model):
        other = copied(model)
    assert equal_bits([other(leaf())], [layers()(leaf())])
