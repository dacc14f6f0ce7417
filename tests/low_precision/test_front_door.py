"""What quantize() does with tensors that are no plain memory, and while somebody watches torch: right, or refused.

The same whichever engine is in use, so that a call which works in the first second works after `auto` has switched.
"""

import importlib.util
import json
import subprocess
import sys
from functools import partial

import front_door
import pytest
import torch
from run_helpers import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from low_precision import noise, tensor, torch_private
from low_precision.engines import choice, door
from low_precision.formats import format_named
from low_precision.tensor import quantize
from low_precision.wrap import quantize_model

X = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
FORMATS = ["float8", "fixed8.4", "mxfp8_e4m3", "nvfp4", "bfp8", "bfp8_row", "bfp8_column"]


@pytest.fixture(params=sorted(front_door.ENGINES))
def backend(request, monkeypatch):
    """The name of an engine, and the time that it takes `auto` to load the fused one."""
    spent = choice.LOAD_SECONDS if request.param == "auto, after" else 0.0
    monkeypatch.setattr(choice, "_spent", spent)
    return front_door.ENGINES[request.param]


@pytest.mark.parametrize("draws", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_calls(draws, tmp_path):
    """Random kinds of tensors, modes and engines, in a process that may end."""
    case = tmp_path / "case"
    command = [sys.executable, str(ROOT / "tests/front_door.py"), str(draws), str(case)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, f"{case.read_text()}\n{ran.stdout[-3000:]}{ran.stderr[-6000:]}"
    counts = json.loads(ran.stdout)
    assert sum(counts.values()) == draws
    assert counts["rounded"] > draws / 2


# Transforms of torch.func


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "stochastic:4"])
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_rounds_each_sample_as_it_is_rounded_alone(name, rounding, dim, backend):
    rounds = partial(quantize, format=name, rounding=rounding, key=7)
    alone = torch.stack([rounds(sample, backend="eager") for sample in X.unbind(dim)], dim)
    together = torch.vmap(partial(rounds, backend=backend), in_dims=dim, out_dims=dim)
    assert torch.equal(together(X), alone)
    pairs = torch.stack([X, -X])
    nested = torch.vmap(together)(pairs)
    assert torch.equal(nested[0], alone)
    assert torch.equal(together(X[:0] if dim == 0 else X[:, :0]), X[:0] if dim == 0 else X[:, :0])


def test_vmap_rounds_each_samples_gradient_as_it_is_rounded_alone(backend):
    def loss(x):
        return (quantize(x, "float8", "stochastic", 7, backward="mxfp4:stochastic", backend=backend) * X[0]).sum()

    alone = torch.stack([torch.func.grad(loss)(sample) for sample in X])
    assert torch.equal(torch.vmap(torch.func.grad(loss))(X), alone)
    assert torch.equal(alone[0], quantize(X[0], "mxfp4", "stochastic", noise.Key.of(7, "backward")))
    assert torch.equal(torch.func.jacfwd(loss)(X[0]), X[0])  # forwards it passes straight through


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_models_transforms_are_the_same_before_and_after_the_switch(rounding, monkeypatch):
    rule, results = f"float8:{rounding}", []
    for spent in (0.0, choice.LOAD_SECONDS):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 5), nn.ReLU(), nn.Linear(5, 3))
        quantize_model(model, weights="float8", inputs=rule, activations="bfp8", errors=rule, seed=1)
        monkeypatch.setattr(choice, "_spent", spent)
        results.append([torch.func.jacrev(model)(X[:2]), torch.vmap(model)(X[:, None])])
    assert all(map(torch.equal, *results))
    assert results[0][0].shape == (2, 3, 2, 40)
    assert results[0][0].any()


def test_what_belongs_to_no_transform_is_rounded_as_without(backend):
    """A captured tensor, in place too, which torch does not let a transform change."""
    expected, mine = quantize(X, "mxfp4", backend="eager"), X.clone()

    def function(x):
        quantize(mine, "mxfp4", backend=backend, out=mine)
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    assert torch.equal(mine, expected)
    trained = X.clone().requires_grad_()
    torch.vmap(lambda x: x * quantize(trained, "mxfp4", backend=backend))(torch.ones(2)).sum().backward()
    assert torch.equal(trained.grad, torch.full_like(X, 2.0))


def test_forward_mode_gradients_pass_straight_through(backend):
    tangent = torch.randn_like(X)
    for function in (partial(quantize, format="float8", backend=backend), partial(quantize, format="float32")):
        assert torch.equal(torch.func.jvp(function, (X,), (tangent,))[1], tangent)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(X, tangent)
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(function(dual)).tangent, tangent)
            into = torch.empty_like(X)
            function(dual, out=into)
            assert torch.autograd.forward_ad.unpack_dual(into).tangent is None


# What a script sets for the whole process


@pytest.mark.parametrize("context", [c for c in front_door.CONTEXTS if "default" in c or "meta" in c])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8_e4m3", "bfp8", "float8"])
def test_defaults_of_dtype_and_device_change_nothing(context, name, backend):
    x = X * 10.0 ** torch.randint(-8, 6, X.shape, generator=torch.Generator().manual_seed(1))
    others = [x.bfloat16()] if choice.holds(torch.bfloat16, format_named(name)) else []
    for numbers in (x, *others, X.repeat(1, 300)):  # the last one is a block that threads share
        expected = quantize(numbers, name, "stochastic", 3, backend="eager")
        with front_door.CONTEXTS[context]():
            rounded = quantize(numbers, name, "stochastic", 3, backend=backend)
        assert torch.equal(rounded, expected)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "nvfp4", "bfp8", "bfp24", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_flushing_of_subnormals_changes_nothing_in_blocks_and_other_types(name, dtype, backend):
    """The threads of an engine have modes of the processor of their own, and would not agree."""
    if not choice.holds(dtype, format_named(name)):
        return
    x = (torch.arange(1, 3201, dtype=torch.float64) * torch.finfo(dtype).smallest_normal / 1000).to(dtype)
    expected = quantize(x, name, "up", backend="eager")
    assert (expected > 0).any()
    with front_door.flushing():
        rounded = quantize(x, name, "up", backend=backend)
        assert torch.zeros(1).add(1e-42).item() == 0  # flushing is still in force
    assert torch.equal(rounded.view(torch.uint8), expected.view(torch.uint8))


# Modes and tracers


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["float8", "mxfp4"])
def test_a_mode_sees_the_same_whichever_engine_rounds(name, backend):
    with Count() as mode:
        rounded = quantize(X, name, "stochastic", 7, backend=backend)
    assert mode.seen == 0
    assert torch.equal(rounded, quantize(X, name, "stochastic", 7, backend="eager"))


def test_no_tensor_of_a_mode_is_kept_for_later_calls(backend):
    """Counters are cached: one that a mode or a class had a hand in must not come back."""
    x = torch.ones(4321)
    noise._counter.cache_clear()
    quantize(x.as_subclass(front_door.KINDS["logged"](x).__class__), "float8", "stochastic", 7, backend="eager")
    with FakeTensorMode():
        quantize(x, "float8", "stochastic", 7, backend="eager")
    torch.vmap(lambda v: quantize(v, "float8", "stochastic", 7, backend="eager"))(x[None])
    assert noise._counter.cache_info().currsize <= 1
    assert type(noise._counter(4321, torch.device("cpu"))) is torch.Tensor
    with torch.inference_mode():
        quantize(x, "float8", "stochastic", 7, backend="eager")
    trained = x.clone().requires_grad_()
    quantize(trained, "float8", "stochastic", 7, backend=backend).sum().backward()
    assert torch.equal(trained.grad, x)


@pytest.mark.parametrize("tracer", sorted(front_door.TRACERS))
def test_tracers_are_refused_in_a_sentence(tracer, backend):
    with pytest.raises(
        RuntimeError, match=r"^quantize: given a call (that \S+ records|under torch\.func\S+), allowed: "
    ):
        front_door.TRACERS[tracer](partial(quantize, format="float8", backend=backend), X)


def test_a_models_trace_is_refused_in_a_sentence():
    model = quantize_model(nn.Linear(40, 2), activations="float8")
    with pytest.raises(RuntimeError, match=r"^quantize: given a call that torch\.jit\.trace records, allowed: "):
        torch.jit.trace(model, X)


@pytest.mark.parametrize("name", ["float8", "nvfp4"])
def test_without_numbers_it_is_the_shape_that_comes_out(name, backend):
    rounds = partial(quantize, format=name, rounding="stochastic", key=3, backend=backend)
    on_meta = torch.empty(3, 4, device="meta", requires_grad=True)
    assert (rounds(on_meta).shape, rounds(on_meta).device.type) == ((3, 4), "meta")
    assert rounds(on_meta).requires_grad
    with FakeTensorMode():
        dtype = torch.bfloat16 if choice.holds(torch.bfloat16, format_named(name)) else torch.float32
        x = torch.empty(3, 4, dtype=dtype)
        for rounded in (rounds(x), torch.vmap(rounds)(x)):
            assert (type(rounded), rounded.shape, rounded.dtype) == (FakeTensor, (3, 4), dtype)
        assert rounds(x, out=x) is x
    with pytest.raises(TypeError, match="no numbers"):
        rounds(X[:3, :4].to(dtype), out=x)


# Memory


@pytest.mark.parametrize("kind", sorted(front_door.REFUSED))
def test_what_cannot_be_rounded_is_refused_in_a_sentence(kind, backend):
    x = front_door.REFUSED[kind](X.clone())
    with pytest.raises((TypeError, ValueError), match=r"^[^\n]*given [^\n]*, allowed: [^\n]*$"):
        quantize(x, "float8", backend=backend)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", ["float8", "float32", "mxfp4", "bfp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_out_may_share_memory_with_x(name, rounding, dtype, backend):
    numbers = X.flatten().to(dtype)
    for x_part, out_part in ((slice(0, -1), slice(1, None)), (slice(1, None), slice(0, -1)), (slice(0, 120),) * 2):
        expected = quantize(numbers[x_part].clone(), name, rounding, 7, backend="eager")
        mine = numbers.clone()
        quantize(mine[x_part], name, rounding, 7, backend=backend, out=mine[out_part])
        assert torch.equal(mine[out_part], expected)
    square = X[:, :6].to(dtype).contiguous()
    expected = quantize(square, name, rounding, 7, backend="eager")
    quantize(square, name, rounding, 7, backend=backend, out=square.T)
    assert torch.equal(square.T, expected)
    images = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    pair = torch.cat([images, images[:1]]).to(memory_format=torch.channels_last)
    expected = quantize(pair[:-1].clone(), name, rounding, 7, backend="eager")
    quantize(pair[:-1], name, rounding, 7, backend=backend, out=pair[1:])
    assert torch.equal(pair[1:], expected)


@pytest.mark.parametrize(
    ("shape", "stride", "repeats"),
    [
        ((6, 40), (0, 1), True), ((3, 3), (1, 1), True), ((3, 2), (2, 3), False), ((4, 2), (2, 3), False),
        ((4, 3), (2, 3), True), ((2, 3), (1, 2), False), ((1, 3), (0, 1), False), ((3, 3, 2), (3, 4, 30), False),
    ],
)  # fmt: skip
def test_out_with_two_elements_in_one_place_is_refused(shape, stride, repeats, backend):
    x, out = X.flatten()[: torch.Size(shape).numel()].view(shape), torch.empty(300).as_strided(shape, stride)
    places = torch.arange(300).as_strided(shape, stride)
    assert (len(places.unique()) < places.numel()) == repeats
    if repeats:
        with pytest.raises(ValueError, match="several elements in one place"):
            quantize(x, "float8", backend=backend, out=out)
    else:
        quantize(x, "float8", backend=backend, out=out)
        assert torch.equal(out, quantize(x, "float8"))


def test_out_that_must_not_be_written_to_is_refused(backend):
    parameter = nn.Parameter(X.clone())
    for out in (parameter, parameter * 1):
        with pytest.raises(ValueError, match="out: given a tensor that requires a gradient"):
            quantize(X, "float8", backend=backend, out=out)
    with torch.no_grad():
        quantize(parameter, "float8", backend=backend, out=parameter)
    assert torch.equal(parameter, quantize(X, "float8"))
    with torch.inference_mode():
        frozen = X.clone()
        assert quantize(X, "float8", backend=backend, out=frozen) is frozen
    with pytest.raises(ValueError, match="inference mode"):
        quantize(X, "float8", backend=backend, out=frozen)


def test_every_other_number_of_one_block(backend):
    """A view of one block that is not contiguous: reshape gives another view, not a copy."""
    for view in (X.flatten()[::2], X.T[3], X[:, ::2], X[1:, 3]):
        for name in ("bfp8", "bfp8_column", "bfp8_row", "nvfp4", "mxfp4"):
            expected = quantize(view.contiguous(), name, "stochastic", 3, backend="eager")
            assert torch.equal(quantize(view, name, "stochastic", 3, backend=backend), expected)


# A torch that lacks a name

NAMES = ["get_proxy_mode", "DisableTorchFunction", "_DisableTorchDispatch", "temporarily_clear_interpreter_stack"]
NAMES += ["_functorch", "is_functorch_wrapped_tensor", "get_interpreter_stack", "FakeTensor", "_current_level"]
NAMES += ["_len_torch_function_stack", "_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_is_tracing"]


@pytest.mark.parametrize("name", NAMES)
def test_without_a_private_name_it_is_right_and_slower(name, monkeypatch, backend):
    """Plain calls, in place too, gradients, transforms and modes; what needs the name to be refused is not asked."""
    specification = importlib.util.spec_from_file_location("torch_private_without", torch_private.__file__)
    lacking = importlib.util.module_from_spec(specification)
    lacking.getattr = lambda thing, wanted, *default: default[0] if wanted == name else getattr(thing, wanted, *default)
    specification.loader.exec_module(lacking)
    for module in (tensor, door, noise):
        monkeypatch.setattr(module, "torch_private", lacking)
    rounds = partial(quantize, format="mxfp4", rounding="stochastic", key=3)
    expected = quantize(X, "mxfp4", "stochastic", 3, backend="eager")
    mine, trained = X.clone(), X.clone().requires_grad_()
    assert torch.equal(rounds(X, backend=backend), expected)
    assert rounds(mine, backend=backend, out=mine) is mine
    assert torch.equal(mine, expected)
    rounds(trained, backend=backend).sum().backward()
    assert torch.equal(trained.grad, torch.ones_like(X))
    alone = torch.stack([rounds(sample, backend=backend) for sample in X])
    assert torch.equal(torch.vmap(partial(rounds, backend=backend))(X), alone)
    with Count(), torch.device("meta"):
        assert torch.equal(rounds(X, backend=backend), expected)
