"""A torch that lacks a private name: slower perhaps, and the same bits."""

import subprocess
import sys

import pytest
import torch
from run_helpers import ROOT
from torch import nn
from training_helpers import AROUND, FLOAT8, batch, equal_bits, everything, holds, parameters, rounded, small, train

from low_precision import torch_private
from low_precision.scheme import Quantizer

pytestmark = pytest.mark.usefixtures("one_thread")

# By getattr, so that a test can hide them; "_LAYER_BACKWARDS" are names of classes of autograd's.
NAMES = [
    *("_are_functorch_transforms_active", "_global_forward_hooks", "_global_backward_hooks", "_forward_hooks"),
    *("_forward_pre_hooks", "_backward_hooks", "_parameters", "_version", "_is_replica", "_orig_mod"),
    *("_len_torch_dispatch_stack", "_current_graph_task_id", "_execution_engine", "found_inf"),
    *("_functorch", "get_interpreter_stack", "get_proxy_mode", "is_functorch_wrapped_tensor", "_current_level"),
    *("temporarily_clear_interpreter_stack", "DisableTorchFunction", "_DisableTorchDispatch", "FakeTensor"),
    "_call_impl",
]
# Asked for once a process: tests of their own hide them.
ONCE = ["_disable_dynamo", "CheckpointFunction", "_checkpoint_without_reentrant_generator"]
ONCE += ["_is_tracing", "_len_torch_function_stack", "__code__", "__globals__", "_grouped_mm", "skip_code"]


def hide(monkeypatch, *names: str) -> None:
    """From now on torch_private finds none of these."""

    def without(thing, name, *default):
        if name in names:
            return default[0]  # an IndexError, should there be no answer for it
        return getattr(thing, name, *default)

    monkeypatch.setattr(torch_private, "getattr", without, raising=False)


def trained(kind: str) -> list[torch.Tensor]:
    """Losses and weights of a few steps, weights written by hand in between."""
    model, optimizer = everything(small(kind), loss_scale="dynamic")
    losses = train(model, optimizer, range(2), kind)
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    losses += train(model, optimizer, range(2, 4), kind)
    return [*losses, *parameters(model)]


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("name", [*NAMES, "all of them"])
def test_without_a_private_name_the_bits_are_the_same(name, kind, monkeypatch):
    expected = trained(kind)
    if name == "all of them":
        monkeypatch.setattr(torch_private, "_LAYER_BACKWARDS", ())
    hide(monkeypatch, *(NAMES if name == "all of them" else [name]))
    assert equal_bits(trained(kind), expected)


def test_every_private_name_is_hidden_above():
    text = (ROOT / "low_precision" / "torch_private.py").read_text()
    asked = {line.partition('"')[2].partition('"')[0] for line in text.splitlines() if "getattr(" in line}
    assert asked == {*NAMES, *ONCE}


@pytest.mark.parametrize("name", ["_transforms", "_dispatch_modes", "_function_modes", "_tracing"])
def test_where_nobody_can_say_who_watches_the_bits_are_the_same(name, monkeypatch):
    """Each rounding then goes the way of one that is watched."""
    expected = trained("mlp")
    monkeypatch.setattr(torch_private, name, None)
    assert torch_private.somebody_watches()
    assert equal_bits(trained("mlp"), expected)


@pytest.mark.parametrize("name", ["CheckpointFunction", "_checkpoint_without_reentrant_generator"])
def test_another_torch_utils_checkpoint_is_told(name, monkeypatch):
    hide(monkeypatch, name)
    with pytest.warns(UserWarning, match="another torch.utils.checkpoint than low_precision knows"):
        torch_private.wrap_checkpointing(lambda run: run, lambda run: run)


@pytest.mark.parametrize("name", ["_forward_hooks", "_backward_hooks", "_global_forward_hooks"])
def test_where_hooks_cannot_be_seen_nothing_is_rounded_in_place(name, monkeypatch):
    def in_place() -> int:
        rounded_in_place = []
        model = rounded(small(), *AROUND)
        call = Quantizer.__call__

        def watched(quantizer, x, *arguments, out=None, **named):
            rounded_in_place.append(out is not None)
            return call(quantizer, x, *arguments, out=out, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Quantizer, "__call__", watched)
            model(batch()[0]).sum().backward()
        return sum(rounded_in_place)

    assert in_place() == 5  # three outputs, and the errors of two inputs
    hide(monkeypatch, name)
    assert in_place() == (3 if name == "_backward_hooks" else 0)


def test_writes_are_seen_where_torch_does_not_count_them(monkeypatch):
    hide(monkeypatch, "_version")
    model, optimizer = everything()
    accumulators = [master.clone() for master in model.low_precision.kept()]
    model(batch()[0])
    assert all(map(torch.equal, accumulators, model.low_precision.kept()))  # nobody wrote: they stay
    with torch.no_grad():
        model.hidden1.weight.fill_(0.3)
    model(batch()[0])
    assert holds(model.hidden1.weight, FLOAT8)
    assert set(model.hidden1.weight.unique().tolist()) <= {0.25, 0.3125}
    train(model, optimizer, range(2))


@pytest.mark.slow
def test_without_disable_dynamo():
    """It is asked for when the library is imported: so in a process of its own. Compiled or not, the same bits."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from low_precision import torch_private
ask, lost = getattr, "_disable_dynamo"  # hidden from us alone: torch's compiler needs it
torch_private.getattr = lambda thing, name, default: None if name == lost else ask(thing, name, default)
from training_helpers import equal, everything, parameters, train
met = []
for compiled in (False, True):
    model, optimizer = everything()
    forward = torch.compile(model, backend="eager") if compiled else model
    met.append([*train(model, optimizer, range(3), forward=forward), *parameters(model)])
assert equal(*met)
print([x.flatten().tolist() for x in met[0]])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    model, optimizer = everything()
    expected = [*train(model, optimizer, range(3)), *parameters(model)]
    assert ran.stdout.strip() == str([x.flatten().tolist() for x in expected])


def test_a_compiled_wrapper_is_seen_through():
    plain = nn.Linear(2, 2)
    assert torch_private.inside_compiled(torch.compile(plain, backend="eager")) is plain
    assert torch_private.inside_compiled(plain) is None
