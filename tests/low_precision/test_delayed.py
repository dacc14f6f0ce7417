"""Delayed scaling against TransformerEngine's rules, told once more in plain Python with torch's own float8 types."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_helpers import equal_bits

import low_precision as lp
from low_precision.delayed import DelayedScale, DelayedScales, Rule, largest_magnitude, moved
from low_precision.errors import SettingError
from low_precision.formats import format_named
from low_precision.optimizer import EXTRA_STATE

pytestmark = pytest.mark.usefixtures("one_thread")

INF, NAN = math.inf, math.nan
TYPES = {"float8_e4m3fn": (torch.float8_e4m3fn, 448.0), "float8_e5m2": (torch.float8_e5m2, 57344.0)}
RULES = {
    "forward.inputs": "float8_e4m3fn@tensor@delayed4",
    "forward.weights": "float8_e4m3fn@tensor@delayed1",
    "dgrad.errors": "float8_e5m2@tensor@delayed3recent",
    "dgrad.weights": "float8_e4m3fn@tensor@delayed16+2",
    "wgrad.errors": "float8_e5m2@tensor@delayed5+1",
    "wgrad.inputs": "float8_e4m3fn@tensor@delayed2",
}


class Told:
    """One scale. The history's first place is where a step's largest magnitude is put; the oldest is in the second."""

    def __init__(self, rule):
        element, _, scaling = rule.split("@")
        self.type, self.largest = TYPES[element]
        steps, _, margin = scaling.removeprefix("delayed").partition("+")
        self.recent = steps.endswith("recent")
        self.history = [0.0] * int(steps.removesuffix("recent"))
        self.scaled_largest = self.largest / 2 ** int(margin or 0)
        self.scale = torch.tensor(1.0)

    def rounded(self, x):
        """As the cast does it: with the scale of the steps before, noting the largest magnitude, NaNs aside."""
        for value in x.abs().flatten().tolist():
            if value > self.history[0]:
                self.history[0] = value
        z = (x * self.scale).clamp(-self.largest, self.largest)
        return z.to(self.type).float() / self.scale

    def step(self):
        newest = self.history[0]
        if newest == 0:
            return
        amax = newest if self.recent else max(self.history)
        if len(self.history) > 1:
            self.history = [0.0, *self.history[2:], newest]
        else:
            self.history = [0.0]
        if 0 < amax < INF:
            quotient = torch.tensor(self.scaled_largest).div(torch.tensor(amax))
            self.scale = quotient if quotient < INF else torch.tensor(torch.finfo(torch.float32).max)


# The rule alone


@pytest.mark.parametrize("rule", [*RULES.values(), "float8_e4m3fn@tensor@delayed3", "float8_e4m3fn@tensor@delayed7+3"])
def test_the_move_at_a_step_is_transformer_engines(rule):
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([0.0, 0.0, INF, 1e-45, 2.0**-140, 3e38, 448.0])
    told, ours = Told(rule), DelayedScale(Rule.of(format_named(rule)), torch.device("cpu"))
    for _ in range(400):
        amax = torch.randn((), generator=generator).exp2() * torch.randn((), generator=generator).abs()
        if torch.rand((), generator=generator) < 0.3:
            amax = extremes[torch.randint(len(extremes), (), generator=generator)]
        told.history[0] = float(amax)
        told.step()
        steps, scaled_largest, recent = ours.rule
        assert len(ours.history) == steps
        history, scale = moved(ours.history[None], ours.scale[None], amax[None], scaled_largest, recent)
        ours.set(history[0], scale[0])
        assert equal_bits([ours.scale], [told.scale])


def test_the_quotient_is_one_division():
    """torch divides a number by a tensor as a product with its reciprocal, which rounds twice."""
    amax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 3
    _, scale = moved(torch.zeros(1000, 2), torch.ones(1000), amax, 448.0, False)
    exact = (448.0 / amax.double()).float()  # float64 has the digits for it
    assert torch.equal(scale, exact)
    assert not torch.equal(448.0 / amax, exact)


def test_largest_magnitude():
    assert float(largest_magnitude(torch.tensor([1.0, NAN, -3.0]))) == 3.0
    assert float(largest_magnitude(torch.tensor([1.0, NAN, -INF]))) == INF
    assert float(largest_magnitude(torch.tensor([NAN]))) == 0.0
    assert float(largest_magnitude(torch.zeros(0, 3))) == 0.0
    assert largest_magnitude(torch.ones(2, dtype=torch.float64)).dtype == torch.float32


# A layer in training


def linear():
    torch.manual_seed(1)
    return nn.Linear(12, 7)


def quantized(rules=RULES, **settings):
    model = lp.quantize_model(linear(), **rules, seed=0)
    return model, lp.quantize_optimizer(torch.optim.SGD(model.parameters(), 0.05, 0.9), model, **settings)


def numbers(step):
    """x and dy of a step: of changing size; some are zero, infinite or no number."""
    generator = torch.Generator().manual_seed(step)
    x, dy = torch.randn(9, 12, generator=generator), torch.randn(9, 7, generator=generator) * 0.01
    x *= 2.0 ** (step % 5)
    if step in (7, 8, 30):
        x.zero_()
    if step in (9, 31):
        dy.zero_()
    if step in (12, 33):
        x[2, 3], dy[1, 1] = -INF, INF
    if step == 20:
        x[1, 0], dy[3, 3] = NAN, NAN
    return x, dy


def train(model, optimizer, steps, parts=1, how=lambda model, x: model(x)):
    for step in steps:
        optimizer.zero_grad()
        x, dy = numbers(step)
        for part_x, part_dy in zip(x.chunk(parts), dy.chunk(parts), strict=True):
            how(model, part_x.requires_grad_()).backward(part_dy)
        for p in model.parameters():
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()


def delayed(optimizer):
    return optimizer.state_dict()[EXTRA_STATE]["delayed"]


def of_step(optimizer):
    """All that decides what comes next."""
    return [held[name] for _, held in sorted(delayed(optimizer).items()) for name in ("scale", "amax", "history")]


def train_told(steps, rules=RULES, reads=None):
    """reads: the operands that are another one's numbers."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    told = {site: Told(rule) for site, rule in rules.items()}
    w = model.weight
    for step in range(steps):
        optimizer.zero_grad()
        x, dy = numbers(step)
        read = {
            site: told[site].rounded({"inputs": x, "weights": w.detach(), "errors": dy}[site.partition(".")[2]])
            for site in rules
        }
        read |= {site: read[other] for site, other in (reads or {}).items()}
        y = nn.functional.linear(read["forward.inputs"], read["forward.weights"], model.bias.detach())
        assert not y.requires_grad
        w.grad = read["wgrad.errors"].t() @ read["wgrad.inputs"]
        model.bias.grad = dy.sum(0)
        for p in model.parameters():
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()
        for scale in told.values():
            scale.step()
    return model, told


def check_told(model, optimizer, steps):
    expected, told = train_told(steps)
    ours = delayed(optimizer)
    assert {name.partition(" ")[0] for name in ours} == set(RULES)
    for name, held in ours.items():
        scale = told[name.partition(" ")[0]]
        assert equal_bits([held["scale"]], [scale.scale]), name
        newest_first = [0.0, *held["history"].tolist()[1:]]
        assert newest_first == scale.history, name
        assert float(held["amax"]) == 0.0
    assert equal_bits([*model.parameters()], [*expected.parameters()])


def test_fifty_steps_of_a_linear_layer():
    model, optimizer = quantized()
    train(model, optimizer, range(50))
    check_told(model, optimizer, 50)


def test_the_recipe_has_one_scale_for_what_two_products_read():
    model = lp.quantize_model(linear(), recipe="te-delayed")
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), 0.05, 0.9), model)
    train(model, optimizer, range(12))
    sites = ("forward.inputs", "forward.weights", "dgrad.errors")
    elements = ("float8_e4m3fn", "float8_e4m3fn", "float8_e5m2")
    rules = {site: f"{element}@tensor@delayed1024" for site, element in zip(sites, elements, strict=True)}
    reads = {"wgrad.inputs": "forward.inputs", "dgrad.weights": "forward.weights", "wgrad.errors": "dgrad.errors"}
    expected, told = train_told(12, rules, reads)
    assert set(delayed(optimizer)) == {f"{site} " for site in sites}
    assert equal_bits([delayed(optimizer)[f"{site} "]["scale"] for site in sites], [told[s].scale for s in sites])
    assert equal_bits([*model.parameters()], [*expected.parameters()])


def test_fifty_steps_resumed_in_the_middle():
    for optimizer_first in (False, True):
        model, optimizer = quantized()
        train(model, optimizer, range(21))
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        train(model, optimizer, range(21, 24))  # what is saved does not move with it
        file.seek(0)
        of_model, of_optimizer = torch.load(file, weights_only=True)
        model, optimizer = quantized()
        loads = [(model, of_model), (optimizer, of_optimizer)]
        for target, values in reversed(loads) if optimizer_first else loads:
            target.load_state_dict(values)
        train(model, optimizer, range(21, 50))
        check_told(model, optimizer, 50)


def test_what_is_loaded_replaces_what_there_was():
    model, optimizer = quantized()
    train(model, optimizer, range(3))
    then = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    expected = of_step(optimizer)
    for _ in range(2):
        model.load_state_dict(then[0])
        optimizer.load_state_dict(copy.deepcopy(then[1]))
        train(model, optimizer, range(3, 6))
        assert equal_bits(of_step(optimizer), expected)
    fresh = torch.optim.SGD(model.parameters(), 0.05, 0.9).state_dict() | {
        EXTRA_STATE: {**then[1][EXTRA_STATE], "delayed": {}}
    }
    optimizer.load_state_dict(fresh)
    assert delayed(optimizer) == {}


@pytest.mark.parametrize(("before", "now"), [(5, 3), (3, 5)])
def test_a_history_of_another_length_gives_its_last_steps(before, now):
    scale = DelayedScale(Rule(before, 448.0, False), torch.device("cpu"))
    scale.set(torch.arange(1.0, before + 1), torch.tensor(2.0))
    scales = DelayedScales()
    scales.load_state_dict({"x": scale.state_dict()})
    x = torch.tensor([-7.0, 3.0])
    assert float(scales.read("x", format_named(f"float8_e5m2@tensor@delayed{now}"), x, True)) == 2.0
    other = scales.state_dict()["x"]
    assert other["history"].tolist() == [3.0, 4.0, 5.0] if now == 3 else [0.0, 0.0, 1.0, 2.0, 3.0]
    assert (float(other["amax"]), other["scaled_largest"]) == (7.0, 57344.0)


def test_a_copied_and_a_pickled_pair_go_on_with_the_same_bits():
    model, optimizer = quantized()
    train(model, optimizer, range(5))
    copied = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for pair in ((model, optimizer), copied, pickled):
        train(*pair, range(5, 50))
        check_told(*pair, 50)


def test_micro_batches_give_the_largest_of_all():
    together, apart = quantized(), quantized()
    for step in (0, 1, 2):
        train(*together, [step])
        train(*apart, [step], parts=3)
        for name, held in delayed(together[1]).items():
            if ".weights" not in name:
                assert equal_bits([held["history"]], [delayed(apart[1])[name]["history"]])
        apart[0].load_state_dict(together[0].state_dict())  # whose gradients were added in another order
    assert equal_bits(of_step(together[1]), of_step(apart[1]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_changes_nothing(reentrant):
    def again(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    model, optimizer = quantized()
    train(model, optimizer, range(50), how=again)
    check_told(model, optimizer, 50)


def test_evaluation_uses_the_scale_as_it_stands_and_notes_nothing():
    model, optimizer = quantized()
    for step in range(50):
        train(model, optimizer, [step])
        before = of_step(optimizer)
        x = torch.full((2, 12), 1e6)
        rounded = Told(RULES["forward.inputs"])
        rounded.scale = delayed(optimizer)["forward.inputs "]["scale"]
        model.eval()
        y = model(x)
        model.train()
        with torch.no_grad():
            assert torch.equal(model(x), y)
        assert y.unique(dim=0).shape == (1, 7)
        assert not torch.equal(rounded.rounded(x), x)  # it is far beyond the scale's reach
        with lp.unquantized(model):
            model(x)
        lp.coverage(model, x)
        assert equal_bits(of_step(optimizer), before)
    check_told(model, optimizer, 50)


def test_an_evaluation_before_the_first_training_pass():
    model, optimizer = quantized()
    model.eval()
    model(torch.ones(2, 12))
    with torch.inference_mode():
        model(torch.ones(2, 12))
    model.train()
    train(model, optimizer, range(50))
    check_told(model, optimizer, 50)


def test_of_two_optimizers_of_a_model_the_second_one_moves_nothing():
    model = lp.quantize_model(linear(), **RULES, seed=0)
    optimizers = [lp.quantize_optimizer(torch.optim.SGD([p], 0.05, 0.9), model) for p in model.parameters()]

    class Both:
        def zero_grad(self):
            model.zero_grad()

        def step(self):
            for optimizer in optimizers:
                optimizer.step()

    train(model, Both(), range(50))
    check_told(model, optimizers[1], 50)


def test_a_tensor_that_does_not_come_keeps_its_scale_and_history():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    lp.quantize_model(model, **{"forward.inputs": "float8_e4m3fn@tensor@delayed2"})
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), 0.01), model)
    for names in ("a", "ab", "a", "a", "b"):
        optimizer.zero_grad()
        sum(model[name](torch.full((2, 4), 2.0)).sum() for name in names).backward()
        before = delayed(optimizer)
        optimizer.step()
        for name in set("ab") - set(names):
            if f"forward.inputs {name}" in before:
                assert equal_bits(
                    [before[f"forward.inputs {name}"]["history"], before[f"forward.inputs {name}"]["scale"]],
                    [delayed(optimizer)[f"forward.inputs {name}"][key] for key in ("history", "scale")],
                )
    assert delayed(optimizer)["forward.inputs b"]["history"].tolist() == [2.0, 2.0]


# Stored sites and the optimizer


EVERYWHERE = "float8_e4m3fn@tensor@delayed3"


def test_each_stored_tensor_has_a_scale_of_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    sites = dict.fromkeys(("weights", "inputs", "activations", "errors"), EVERYWHERE)
    lp.quantize_model(model, **sites)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    lp.quantize_optimizer(optimizer, model, gradients=EVERYWHERE, momentum=EVERYWHERE)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    names = set(delayed(optimizer))
    parameters = [name for name, _ in model.named_parameters()]
    sites_of_parameters = ("weights", "gradients", "momentum.exp_avg", "momentum.exp_avg_sq")
    expected = {f"{site} {p}" for site in sites_of_parameters for p in parameters}
    expected |= {f"{site} {layer}" for site in ("inputs", "activations") for layer in "02"}
    expected |= {"errors 0.output", "errors 2.output", "errors 2.input"}
    assert names == expected
    for name, p in model.named_parameters():
        scale = delayed(optimizer)[f"weights {name}"]["scale"]
        assert torch.equal((p.detach() * scale).to(torch.float8_e4m3fn).float() / scale, p.detach())


@pytest.mark.parametrize("kept", [{}, {"accumulator": "float32"}, {"compensation": "bfloat16"}])
def test_weights_that_no_step_changes_stay_while_their_scale_moves(kept):
    torch.manual_seed(0)
    model = lp.quantize_model(nn.Linear(6, 5), weights=EVERYWHERE, **kept)
    optimizer = lp.quantize_optimizer(torch.optim.SGD(model.parameters(), 0.0), model)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        if "accumulator" not in kept:
            assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True)), step
    replaced = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():  # as an evaluation of other weights does
        for p in model.parameters():
            p.fill_(1.0)
        model(torch.ones(1, 6))
        for name, p in model.named_parameters():
            p.copy_(replaced[name])
        masters = copy.deepcopy(optimizer.state_dict()[EXTRA_STATE]["accumulator"])
        model(torch.ones(1, 6))
    assert all(torch.equal(p, replaced[name]) for name, p in model.named_parameters())
    for name, master in optimizer.state_dict()[EXTRA_STATE]["accumulator"].items():
        assert torch.equal(master, masters[name])
        assert not torch.equal(master, replaced[name])


def test_the_scale_follows_the_scaled_loss_and_a_skipped_step_moves_it_too():
    model, optimizer = quantized({"dgrad.errors": "float8_e5m2@tensor@delayed4"}, loss_scale="dynamic")

    def step(size):
        optimizer.zero_grad()
        x = torch.ones(2, 12, requires_grad=True)
        optimizer.loss_scale.scale((model(x) * size).sum()).backward()
        optimizer.step()
        return delayed(optimizer)["dgrad.errors "]["history"].tolist()

    assert step(2.0)[-1] == 2.0 * 65536
    before = [p.detach().clone() for p in model.parameters()]
    assert step(INF)[-2:] == [2.0 * 65536, INF]
    assert optimizer.loss_scale.skipped == 1
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True))
    scale = delayed(optimizer)["dgrad.errors "]["scale"]
    for _ in range(3):  # as long as the infinity is in the history, the scale stands still
        step(1.0)
        assert delayed(optimizer)["dgrad.errors "]["scale"] == scale
    step(1.0)
    assert delayed(optimizer)["dgrad.errors "]["scale"] == 57344 / 32768


def test_samples_of_vmap_and_functions_of_torch_func_are_noted():
    model, optimizer = quantized()
    x = torch.randn(4, 5, 12)
    torch.vmap(model)(x)
    noted = optimizer.low_precision.clock.delayed.state_dict()["forward.inputs "]["amax"]
    assert float(noted) == float(x.abs().max())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (3 * x[0],)).sum())(parameters)
    assert gradients["weight"].isfinite().all()
    assert float(optimizer.low_precision.clock.delayed.state_dict()["forward.inputs "]["amax"]) == float(
        max(x.abs().max(), 3 * x[0].abs().max())
    )


# What is refused, and what takes it away


def test_a_forgotten_quantize_optimizer_is_an_error_at_the_second_training_pass():
    model = lp.quantize_model(linear(), **RULES)
    lp.coverage(model, torch.ones(2, 12))
    model.eval()
    model(torch.ones(2, 12))
    model.train()
    model(torch.ones(2, 12))
    with torch.no_grad():
        model(torch.ones(2, 12))
    with pytest.raises(RuntimeError, match=r"^delayed scales move.*quantize_optimizer\(optimizer, model\)"):
        model(torch.ones(2, 12))
    lp.quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model)
    model(torch.ones(2, 12))
    plain = lp.quantize_model(linear(), **dict.fromkeys(RULES, "float8_e4m3fn@tensor"))
    for _ in range(3):
        plain(torch.ones(2, 12))


def test_where_nobody_moves_a_scale_it_is_refused():
    with pytest.raises(SettingError, match=r"delayed4.*optimizer"):
        lp.Quantize("float8_e4m3fn@tensor@delayed4")
    with pytest.raises(SettingError, match="delayed4"):
        lp.quantize(torch.ones(2), "float8_e4m3fn@tensor@delayed4")


def test_remove_and_plain_copy():
    model, optimizer = quantized()
    train(model, optimizer, range(3))
    x = torch.randn(2, 12)
    plain = lp.plain_copy(model)
    expected = nn.functional.linear(x, model.weight, model.bias)
    assert torch.equal(plain(x), expected)
    lp.remove(model)
    assert torch.equal(model(x), expected)
    assert EXTRA_STATE not in optimizer.state_dict()
    train(model, optimizer, range(3))


# Several processes


def in_processes(rank, port, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, optimizer = quantized()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(step)) * (rank + 1)
        wrapped(x.requires_grad_()).square().mean().backward()
        optimizer.step()
    results[rank] = copy.deepcopy(delayed(optimizer)), [p.detach() for p in model.parameters()]
    scales = DelayedScales()  # of which one process has another one than the other
    scales.is_used = True
    format = format_named("float8_e4m3fn@tensor@delayed2")
    for name in ("both", f"only {rank}"):
        scales.read(name, format, torch.tensor(1.0 + rank), True)
    scales.move()
    results[rank] = (*results[rank], scales.state_dict())
    torch.distributed.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_have_the_scale_of_the_largest_of_both():
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(partial(in_processes), (free_port(), results), nprocs=2)
        (first, weights, own), (second, other_weights, other_own) = results[0], results[1]
    assert equal_bits(weights, other_weights)
    for name, held in first.items():
        assert all(equal_bits([held[key]], [second[name][key]]) for key in ("scale", "history"))
    inputs = [2 * torch.randn(4, 12, generator=torch.Generator().manual_seed(step)).abs().max() for step in range(3)]
    assert first["forward.inputs "]["history"].tolist() == [0.0, *map(float, inputs)]
    assert own["both"]["history"].tolist() == other_own["both"]["history"].tolist() == [0.0, 2.0]
    assert own["only 0"]["history"].tolist() == [0.0, 1.0]
    assert other_own["only 1"]["history"].tolist() == [0.0, 2.0]
