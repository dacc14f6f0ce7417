"""lp.Quantize: a module that rounds, anywhere in a model, with a fresh key at each call."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_helpers import FLOAT8, holds, nearest

from low_precision.errors import SettingError
from low_precision.tensor import quantize
from low_precision.wrap import Quantize, plain_copy, quantize_model, unquantized

pytestmark = pytest.mark.usefixtures("one_thread")

NOISY = "float8:stochastic"


def x(rows: int = 32) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(3))


def called(module: nn.Module, training: int = 0, evaluation: int = 0) -> nn.Module:
    """The module after so many calls."""
    for mode, calls in ((True, training), (False, evaluation)):
        module.train(mode)
        for _ in range(calls):
            module(x())
    return module.train()


def test_it_rounds_as_quantize_does():
    for spec in ("float8", "float8_e4m3fn:toward_zero", "mxfp8_e4m3", "nvfp4"):
        for dim in (-1, 0):
            name, _, rounding = spec.partition(":")
            assert torch.equal(Quantize(spec, dim=dim)(x()), quantize(x(), name, rounding or "nearest", dim=dim))
    assert torch.equal(Quantize("float8")(x()), nearest(x(), FLOAT8))
    assert holds(Quantize(NOISY)(x()), FLOAT8)


def test_float32_leaves_the_tensor_alone():
    y = x()
    assert Quantize("float32")(y) is y


def test_a_loop_is_not_biased():
    """With a constant key, 0.01 added a hundred times to 1 never gets far: each addition is rounded alike."""
    rounded, w = Quantize("float8:stochastic", seed=1), torch.ones(4096)
    for _ in range(100):
        w = rounded(w + 0.01)
    # Below 4, each addition moves a number by 1/4 or 1/2, or not at all: its variance is at most 1/2 * 0.01.
    assert abs(w.mean() - 2) < 5 * (100 * 0.5 * 0.01 / 4096) ** 0.5


def test_each_call_has_another_key_and_the_seed_repeats_them():
    first, second = Quantize(NOISY, seed=1), Quantize(NOISY, seed=1)
    results = [first(x()) for _ in range(3)]
    assert all(torch.equal(second(x()), result) for result in results)
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], Quantize(NOISY, seed=2)(x()))
    assert not torch.equal(Quantize(NOISY)(x()), Quantize(NOISY)(x()))


def test_evaluation_takes_no_noise_of_training():
    alone, module = Quantize(NOISY, seed=1), Quantize(NOISY, seed=1)
    expected = [alone(x()) for _ in range(2)]
    assert torch.equal(module(x()), expected[0])
    assert not torch.equal(called(module, evaluation=3).eval()(x()), expected[1])
    assert torch.equal(module.train()(x()), expected[1])


def test_gradients_pass_straight_through_or_are_rounded():
    gradient = torch.full((32, 64), 1.1)
    for backward in (None, "float8", NOISY):
        module, a = Quantize(NOISY, backward=backward, seed=1), x().requires_grad_()
        module(a).backward(gradient)
        if backward is None:
            assert torch.equal(a.grad, gradient)
        else:
            assert set(a.grad.unique().tolist()) == ({1.0} if backward == "float8" else {1.0, 1.25})


def test_a_gradient_alone_is_rounded():
    a = x().requires_grad_()
    y = Quantize("float32", backward="float8")(a)
    y.backward(torch.full_like(y, 1.1))
    assert torch.equal(y, a)
    assert a.grad.eq(1.0).all()


def test_it_leaves_its_input_alone():
    a = x()
    Quantize(NOISY)(a)
    assert torch.equal(a, x())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    expected = Quantize(NOISY, seed=1)(x())
    with mode():
        y = Quantize(NOISY, seed=1)(x().requires_grad_())
    assert torch.equal(y, expected)
    assert not y.requires_grad


def test_other_dtypes_and_shapes():
    assert torch.equal(Quantize("float8")(x().double()), nearest(x(), FLOAT8).double())
    half = x().bfloat16()
    assert torch.equal(Quantize("float8")(half), nearest(half.float(), FLOAT8).bfloat16())
    assert Quantize("float8")(torch.tensor(1.1)).item() == 1.0
    assert Quantize(NOISY)(torch.empty(0, 3)).shape == (0, 3)
    for other in (torch.ones(3, dtype=torch.int64), 1.1, None):
        with pytest.raises(TypeError, match="float32"):
            Quantize("float8")(other)


# What it keeps


def through_a_state(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = called(Quantize(NOISY), training=2)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return other


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("resumed", [through_a_state, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("seed", [5, None, 2**63 - 1])
def test_it_resumes(resumed, seed):
    module = called(Quantize(NOISY, seed=seed), training=3, evaluation=1)
    other = resumed(module)
    for training in (True, False, True):
        assert torch.equal(module.train(training)(x()), other.train(training)(x()))
    assert torch.equal(module.get_extra_state(), other.get_extra_state())


def test_its_state_goes_back_in_time():
    module = called(Quantize(NOISY, seed=1), training=2)
    state = module.state_dict()
    first = module(x())
    module.load_state_dict(state)
    assert torch.equal(module(x()), first)


def test_a_given_seed_stays():
    module = Quantize(NOISY, seed=8)
    module.load_state_dict(Quantize(NOISY, seed=7).state_dict())
    assert torch.equal(module(x()), Quantize(NOISY, seed=8)(x()))


def test_a_copy_made_inside_an_unquantized_block_rounds():
    module = Quantize(NOISY, seed=1)
    with unquantized(module):
        other = copy.deepcopy(module)
        y = x()
        assert module(y) is y
    assert torch.equal(other(x()), Quantize(NOISY, seed=1)(x()))
    assert torch.equal(module(x()), Quantize(NOISY, seed=1)(x()))


# In models


def net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), Quantize(NOISY, backward=NOISY, seed=seed), nn.Linear(64, 64))


def gradients(model: nn.Module, forward) -> list[torch.Tensor]:
    a = x().requires_grad_()
    forward(a).sin().sum().backward()
    return [a.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_part(reentrant):
    expected, model = net(), net()
    for _ in range(2):
        ways = [expected, lambda a: checkpoint(model, a, use_reentrant=reentrant)]
        first, second = (gradients(one, way) for one, way in zip((expected, model), ways, strict=True))
        assert all(map(torch.equal, first, second))
    assert torch.equal(expected[1].get_extra_state(), model[1].get_extra_state())  # recomputing is no call


@pytest.mark.slow
def test_a_compiled_model():
    expected, model = net(), net()
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        assert all(map(torch.equal, gradients(expected, expected), gradients(model, compiled)))


def test_inside_a_rounded_model_and_its_plain_copy(recwarn):
    model = quantize_model(net(), inputs=NOISY, seed=1)
    model(x())
    assert "Quantize(float8:stochastic, backward=float8:stochastic)" in str(model)
    assert not recwarn.list
    assert holds(plain_copy(model)[1](x()), FLOAT8)  # it is the model's own, not ours


def test_what_is_unquantized():
    model = net()
    with unquantized(model):
        assert torch.equal(model(x()), model[2](model[0](x())))
    assert torch.equal(model(x()), net()(x()))  # and that was no call
    with pytest.raises(ValueError, match="not rounded"), unquantized(nn.Linear(2, 2)):
        pass


def test_replicas_of_data_parallel(monkeypatch):
    """As nn.DataParallel makes them: each has noise of its own, and together they make one call."""
    module, results = Quantize(NOISY, seed=1), []
    for number in range(2):
        replica = module._replicate_for_data_parallel()
        monkeypatch.setattr("low_precision.wrap.replica_of", lambda layer, x, number=number: number)
        results.append(replica(x()))
    assert not torch.equal(*results)
    assert module.get_extra_state().tolist() == [1, 1, 0]


@pytest.mark.parametrize("spec", ["float8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("along", [0, 1, 2])
def test_vmap_rounds_each_sample_as_alone(spec, dim, along):
    batch = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(0))
    module = Quantize(spec, dim=dim)
    expected = torch.stack([module(sample) for sample in batch.unbind(along)], along)
    assert torch.equal(torch.vmap(module, in_dims=along, out_dims=along)(batch), expected)


def test_on_another_device_it_has_a_state():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), Quantize(NOISY, seed=3))
    assert model.state_dict()["1._extra_state"].tolist() == [3, 0, 0]
    assert model(torch.empty(2, 8, device="meta")).shape == (2, 8)


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spec": "float9"}, "format: given float9.*float8"),
        ({"spec": "float8:sometimes"}, "rounding: given sometimes"),
        ({"spec": "float8", "backward": "float9"}, "backward: format: given float9"),
        ({"spec": "float8", "rounding": "x"}, "rounding: given x"),
        ({"spec": "float8", "backend": "x"}, "backend: given 'x'"),
        ({"spec": "float8", "seed": -1}, "seed: given -1"),
        ({"spec": "float8", "seed": 2**63}, "seed: given 9223372036854775808"),
        ({"spec": "float8", "seed": True}, "seed: given True"),
        ({"spec": "float8", "overflow": "infinity"}, "overflow: given infinity.*float8 has no infinity"),
    ],
)
def test_settings_that_are_refused(arguments, words):
    with pytest.raises(SettingError, match=words) as raised:
        Quantize(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("spec", [None, 3])
def test_a_rule_is_needed(spec):
    with pytest.raises(TypeError, match=f"given {spec}, allowed"):
        Quantize(spec)
