"""Weights that are swapped for an evaluation and come back, and what ends rounding: a run stays the run it was."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training_helpers import AROUND, FLOAT8, batch, equal, holds, nearest, parameters, rounded, small, train

from low_precision.formats import format_named
from low_precision.optimizer import EXTRA_STATE
from low_precision.wrap import Quantize, plain_copy, quantize_model, quantize_optimizer, remove, unquantized

pytestmark = pytest.mark.usefixtures("one_thread")

OTHER = 0.77  # times the weights: other ones, no numbers of their format


def pair(lr=0.01, **sites):
    """A rounded model and its optimizer."""
    model = quantize_model(small(), seed=1, **sites)
    return model, quantize_optimizer(torch.optim.SGD(model.parameters(), lr, 0.9), model)


def evaluate(model):
    model.eval()
    with torch.no_grad():
        y = model(batch()[0])
    model.train()
    return y


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def all_state(model, optimizer):
    extra = optimizer.state_dict()[EXTRA_STATE]
    return [*parameters(model), *(x.clone() for site in ("accumulator", "compensation") for x in extra[site].values())]


# Swaps, in the manners of users


def by_state_dict(model, factor=OTHER):
    kept = snapshot(model)
    model.load_state_dict({name: x * factor for name, x in kept.items()})
    evaluate(model)
    model.load_state_dict(kept)


def to_numbers_of_the_format(model):
    by_state_dict(model, 0.5)


def in_place(model):
    kept = parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * OTHER)
        evaluate(model)
        for p, before in zip(model.parameters(), kept, strict=True):
            p.copy_(before)


def by_vector(model):
    with torch.no_grad():
        kept = parameters_to_vector(model.parameters()).clone()
        vector_to_parameters(kept * OTHER, model.parameters())
        evaluate(model)
        vector_to_parameters(kept, model.parameters())


def by_data(model):
    kept = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data * OTHER
    evaluate(model)
    for p, before in zip(model.parameters(), kept, strict=True):
        p.data = before


def by_functional_call(model):
    model.eval()  # training passes have noise of their own, and this is not one of the run
    with torch.no_grad():
        torch.func.functional_call(model, {name: x * OTHER for name, x in snapshot(model).items()}, (batch()[0],))
    model.train()


def several(model):
    kept = snapshot(model)
    for factor in (0.5, OTHER, 0.5, 1.5):
        model.load_state_dict({name: x * factor for name, x in kept.items()})
        evaluate(model)
    model.load_state_dict(kept)
    evaluate(model)
    by_state_dict(model)


def part_by_part(model):
    kept = snapshot(model)
    model.load_state_dict({name: x * OTHER for name, x in kept.items()})
    for name in kept:
        evaluate(model)
        model.load_state_dict({name: kept[name]}, strict=False)


def in_inference_mode(model):
    with torch.inference_mode():
        by_state_dict(model)


def without_rounding(model):
    kept = snapshot(model)
    with unquantized(model):
        model.load_state_dict({name: x * OTHER for name, x in kept.items()})
        evaluate(model)
        assert all(torch.equal(x, kept[name] * OTHER) for name, x in model.state_dict().items())  # as they stand
        model.load_state_dict(kept)


class Average:
    """An average of weights as timm and diffusers write it: shadow tensors, copied in and out."""

    def __init__(self, model):
        self.shadow = parameters(model)

    def update(self, model):
        for mean, p in zip(self.shadow, model.parameters(), strict=True):
            mean.sub_(0.1 * (mean - p.detach()))

    def copy_to(self, model):
        for mean, p in zip(self.shadow, model.parameters(), strict=True):
            p.data.copy_(mean)

    def store(self, model):
        self.kept = [p.detach().cpu().clone() for p in model.parameters()]

    def restore(self, model):
        for before, p in zip(self.kept, model.parameters(), strict=True):
            p.data.copy_(before)


def by_an_average(model):
    average = Average(model)
    average.shadow = [x * OTHER for x in average.shadow]
    average.update(model)
    average.store(model)
    average.copy_to(model)
    evaluate(model)
    average.restore(model)


SWAPS = [
    *(by_state_dict, to_numbers_of_the_format, in_place, by_vector, by_data, by_functional_call, several, part_by_part),
    *(in_inference_mode, without_rounding, by_an_average),
]
SCHEMES = {
    "weights": {"weights": "float8"},
    "weights, stochastic": {"weights": "float8:stochastic"},
    "float32 accumulator": {"weights": "float8", "accumulator": "float32"},
    "float32 accumulator, stochastic": {"weights": "float8:stochastic", "accumulator": "float32"},
    "float16 accumulator, stochastic": {"weights": "float8", "accumulator": "float16", "rounding": "stochastic"},
    "float8 accumulator": {"weights": "float8", "accumulator": "float8"},
    "accumulator alone": {"accumulator": "float16"},
    "compensation": {"weights": "float8", "compensation": "float32"},
    "compensation, stochastic": {"weights": "float8", "compensation": "float16", "rounding": "stochastic"},
    "nvfp4": {"weights": "nvfp4", "rounding": "stochastic"},
    "nvfp4 accumulator": {"weights": "nvfp4", "accumulator": "nvfp4", "rounding": "stochastic"},
    "nvfp4 compensation": {"weights": "nvfp4", "compensation": "nvfp4", "rounding": "stochastic"},
    "all sites": {"weights": "float8", "accumulator": "float32", **dict.fromkeys(AROUND, "float8:stochastic")},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_swap_for_an_evaluation_leaves_the_run_what_it_was(scheme):
    alone = pair(**SCHEMES[scheme])
    train(*alone, range(4))
    for swap in SWAPS:
        model, optimizer = pair(**SCHEMES[scheme])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(4):
                train(model, optimizer, [step])
                if step % 2:
                    swap(model)
                    before = snapshot(model)
                    evaluate(model)
                    assert equal(list(before.values()), list(snapshot(model).values())), swap.__name__
        assert equal(all_state(model, optimizer), all_state(*alone)), swap.__name__


@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("kept", ["accumulator", "compensation"])
def test_a_swap_before_the_first_step_of_a_resumed_run(kept, optimizer_first):
    sites = {"weights": "float8", kept: "float32"}
    model, optimizer = pair(**sites)
    train(model, optimizer, range(3))
    saved, saved_optimizer = snapshot(model), copy.deepcopy(optimizer.state_dict())
    expected = all_state(model, optimizer)
    assert any(bool((x != 0).any()) for x in saved_optimizer[EXTRA_STATE][kept].values())
    model, optimizer = pair(**sites)
    if optimizer_first:
        optimizer.load_state_dict(saved_optimizer)
    model.load_state_dict(saved)
    if not optimizer_first:
        optimizer.load_state_dict(saved_optimizer)
    by_state_dict(model)
    evaluate(model)
    assert equal(all_state(model, optimizer), expected)


@pytest.mark.parametrize(("kept", "factor"), [("accumulator", OTHER), ("accumulator", 0.5), ("compensation", OTHER)])
def test_training_goes_on_from_the_weights_that_were_swapped_in(kept, factor):
    """What stands behind a weight belongs to it: the accumulator is the new weight, and nothing was cut off of it."""
    model, optimizer = pair(weights="float8", **{kept: "float32"})
    train(model, optimizer, range(3))
    new = {name: x * factor for name, x in snapshot(model).items()}
    model.load_state_dict(new)
    evaluate(model)
    behind = optimizer.state_dict()[EXTRA_STATE][kept]
    for name, x in new.items():
        assert torch.equal(behind[name], x if kept == "accumulator" else torch.zeros_like(x)), name
        assert torch.equal(model.state_dict()[name], nearest(x, FLOAT8))
    fresh, fresh_optimizer = pair(weights="float8", **{kept: "float32"})  # with these weights from the beginning
    fresh.load_state_dict(new)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        fresh_optimizer.state[q]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
    train(model, optimizer, [3])
    train(fresh, fresh_optimizer, [3])
    assert equal(all_state(model, optimizer), all_state(fresh, fresh_optimizer))


# Without rounding


def test_unquantized_computes_as_the_plain_model_and_moves_no_noise():
    sites = dict.fromkeys(("weights", "inputs", "activations", "errors"), "float8:stochastic")
    alone, (model, optimizer) = pair(**sites), pair(**sites)
    train(*alone, range(4))
    plain = small()
    for step in range(4):
        train(model, optimizer, [step])
        plain.load_state_dict(model.state_dict())
        with unquantized(model):
            for m in (plain, model):
                m.zero_grad()
                F.cross_entropy(m(batch()[0]), batch()[1]).backward()
        assert equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert equal(parameters(model), parameters(alone[0]))
    with unquantized(model), unquantized(model):
        pass
    assert holds(evaluate(model), FLOAT8)


def test_unquantized_ends_by_an_error_too():
    model, _ = pair(activations="float8")
    with pytest.raises(ZeroDivisionError), unquantized(model):
        raise ZeroDivisionError
    assert holds(evaluate(model), FLOAT8)


@pytest.mark.parametrize("call", [unquantized, plain_copy])
def test_what_stands_inside_another_module_is_meant_too(call):
    """A quantized model in a Sequential with a Quantize: without rounding is without all of it, or refused."""
    model, _ = pair(activations="float8")
    around = nn.Sequential(model, nn.Identity())
    expected = remove(copy.deepcopy(model))(batch()[0])
    if call is plain_copy:
        assert torch.equal(plain_copy(around)(batch()[0]), expected)
        return
    around = nn.Sequential(Quantize("float8"), model)
    with unquantized(around):
        assert torch.equal(around(batch()[0]), expected)


# Averages of weights


def average_of(base, model, optimizer, steps=4):
    """The average by torch's own class, and what it should be."""
    average = AveragedModel(base, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    exact = None
    for step in range(steps):
        train(model, optimizer, [step])
        average.update_parameters(model)
        now = parameters(model)
        exact = now if exact is None else [torch.lerp(mean, p, 0.1) for mean, p in zip(exact, now, strict=True)]
        evaluate(average)
    return parameters(average.module), exact


def test_an_average_in_a_plain_copy_is_exact_and_one_in_a_rounded_copy_is_warned_of():
    sites = {"weights": "float8", "activations": "float8", "accumulator": "float32"}
    model, optimizer = pair(lr=1.0, **sites)
    average, exact = average_of(plain_copy(model), model, optimizer)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(average, exact, strict=True))
    assert not all(holds(a, FLOAT8) for a in average)
    model, optimizer = pair(lr=1.0, **sites)
    with pytest.warns(UserWarning, match="plain_copy"):
        average, exact = average_of(model, model, optimizer)
    assert all(holds(a, FLOAT8) for a in average)


def test_a_copy_that_takes_the_models_own_weights_says_nothing():
    """A snapshot of the best weights: they are numbers of the format, and nothing is rounded again."""
    model, optimizer = pair(weights="float8", accumulator="float32")
    best = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            train(model, optimizer, [step])
            best.load_state_dict(model.state_dict())
            evaluate(best)
    assert equal(parameters(best), parameters(model))


# The end of rounding


def everything(model=None):
    sites = dict.fromkeys((*AROUND, "weights"), "float8:stochastic") | {"accumulator": "float16"}
    return quantize_model(model or small("cnn"), seed=1, **sites)


@pytest.mark.parametrize("how", ["remove", "plain_copy", "plain_copy of compiled", "plain_copy of DataParallel"])
def test_a_model_without_rounding_is_the_plain_one(how):
    plain = small("cnn")
    text, names = str(plain), list(plain.state_dict())
    model = everything()
    evaluated = model
    before = snapshot(model)
    if how == "remove":
        assert remove(model) is model
        without = model
    elif how == "plain_copy":
        without = plain_copy(model)
    elif how == "plain_copy of compiled":
        without = plain_copy(torch.compile(model, backend="eager"))._orig_mod
    else:
        without = plain_copy(nn.DataParallel(model)).module
    assert str(without) == text
    assert list(without.state_dict()) == names
    assert all(torch.equal(x, before[name]) for name, x in without.state_dict().items())
    assert vars(without).keys() - {"_is_torch_compile"} == vars(plain).keys()
    for module, other in zip(without.modules(), plain.modules(), strict=True):
        tables = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks")
        assert all(len(getattr(module, table)) == len(getattr(other, table)) for table in tables)
    plain.load_state_dict(before)
    x, y = batch("cnn")
    for m in (without, plain):
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        F.cross_entropy(m(x), y).backward()
        optimizer.step()
        m(x)
    assert equal(parameters(without), parameters(plain))
    if how != "remove":  # the model itself goes on as it was
        assert evaluated is model
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        with torch.no_grad():
            assert holds(model(x), FLOAT8)


def test_remove_takes_the_rounding_off_every_optimizer_and_a_model_can_be_rounded_again():
    model = quantize_model(small(), weights="float8", accumulator="float32", seed=1)
    halves = [torch.optim.Adam(p, 0.01) for p in (list(model.parameters())[:2], list(model.parameters())[2:])]
    for optimizer in halves:
        quantize_optimizer(optimizer, model, gradients="float8", momentum="float8", loss_scale=8.0)
    plain_attributes = vars(torch.optim.Adam(small().parameters(), 0.01)).keys()
    remove(model)
    twin = small()
    twin.load_state_dict(model.state_dict())
    theirs = torch.optim.Adam(twin.parameters(), 0.01)
    for m, optimizers in ((model, halves), (twin, [theirs])):
        F.cross_entropy(m(batch()[0]), batch()[1]).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert equal(parameters(model), parameters(twin))
    for optimizer in halves:
        assert vars(optimizer).keys() == plain_attributes
        assert EXTRA_STATE not in optimizer.state_dict()
    quantize_model(model, weights="float8", seed=1)
    for optimizer in halves:
        quantize_optimizer(optimizer, model, momentum="float8")
    model.zero_grad()
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    for optimizer in halves:
        optimizer.step()
        assert all(holds(state["exp_avg"], FLOAT8) for state in optimizer.state.values())
    assert all(holds(p, FLOAT8) for p in model.parameters())


@pytest.mark.parametrize("call", [remove, lambda model: unquantized(model).__enter__()])
def test_a_model_that_is_not_rounded_is_refused(call):
    with pytest.raises(ValueError, match="this model is not rounded"):
        call(small())


def test_a_plain_copy_of_a_plain_model_is_a_copy():
    model = small()
    duplicate = plain_copy(model)
    assert equal(parameters(duplicate), parameters(model))
    assert next(duplicate.parameters()) is not next(model.parameters())


def test_swapped_weights_of_a_block_format_are_not_rounded_twice():
    model = rounded(small(), "weights", fmt="nvfp4")
    kept = snapshot(model)
    by_state_dict(model)
    assert equal(list(snapshot(model).values()), list(kept.values()))
    assert format_named("nvfp4").scale is not None
