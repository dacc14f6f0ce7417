"""No two roundings share random bits, unless they are one rounding computed again, or somebody asked for one seed."""

import copy
import math
import queue

import pytest
import torch
from torch import nn
from training_helpers import rounded

from low_precision import clock
from low_precision.clock import BatchPart
from low_precision.noise import Key
from low_precision.tensor import quantize
from low_precision.wrap import Quantize, quantize_model, quantize_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 64
SAME, ALONE = 1.0, 5 / math.sqrt(WIDTH * WIDTH)  # a correlation of independent bits: a false alarm in 10**6


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.detach().flatten(), b.detach().flatten()]))[0, 1].item()


def share(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the noise in two roundings of one number is the same. AssertionError for anything between."""
    both = correlation(a, b)
    assert abs(both) < ALONE or both > 0.999
    return both > 0.999


def x() -> torch.Tensor:
    return torch.full((WIDTH, WIDTH), 1.1, requires_grad=True)  # float8 has 1 and 1.25


def net(*sites: str, **settings) -> nn.Module:
    """One layer that gives what it gets, so that what comes out is what was rounded."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(WIDTH))
    return rounded(nn.Sequential().append(layer), *sites, **settings)


FLOWING = ["inputs", "activations"]


# Models


@pytest.mark.parametrize("site", FLOWING)
def test_models_without_a_seed_have_noise_of_their_own(site):
    models = [net(site, seed=None) for _ in range(3)]
    first, second, third = (model(x()) for model in models)
    assert not share(first, second)
    assert not share(first, third)
    assert not share(second, third)


@pytest.mark.parametrize("site", FLOWING)
def test_models_of_one_seed_have_the_same_bits(site):
    """Whatever the process has made before."""
    first = net(site, seed=7)
    net(site, seed=None)
    assert torch.equal(first(x()), net(site, seed=7)(x()))
    assert not share(first(x()), net(site, seed=8)(x()))


def test_calls_modes_and_sites_have_noise_of_their_own():
    model = net("inputs")
    results = [model(x()), model(x())]
    model.eval()
    results += [model(x()), model(x())]
    results.append(net("activations")(x()))
    assert not any(share(a, b) for i, a in enumerate(results) for b in results[:i])


def test_an_evaluation_between_training_passes_changes_no_bit():
    alone, model = net("inputs", "errors"), net("inputs", "errors")
    for step in range(3):
        model.eval()
        for _ in range(step):
            model(x())
        model.train()
        met = []
        for one in (alone, model):
            a = x()
            y = one(a)
            (gradient,) = torch.autograd.grad(y, a, torch.full_like(y, 1.1))
            met.append((y, gradient))
        assert torch.equal(met[0][0], met[1][0])
        assert torch.equal(met[0][1], met[1][1])


def test_a_copy_goes_on_like_the_model():
    model = net("inputs", seed=None)
    model(x())
    other = copy.deepcopy(model)
    assert torch.equal(model(x()), other(x()))


def test_a_state_brings_its_seed():
    """A model without a seed that goes on with the state of another one goes on with its bits."""
    made = []
    for _ in range(2):
        model = net("inputs", seed=None)
        made.append((model, quantize_optimizer(torch.optim.SGD(model.parameters(), 0.1), model)))
    (first, optimizer), (second, other) = made
    assert not share(first(x()), second(x()))
    other.load_state_dict(optimizer.state_dict())
    first.low_precision.clock.move_to(0)
    assert torch.equal(first(x()), second(x()))


# Backward passes


@pytest.mark.parametrize("sites", [["errors"], ["errors", "activations"], ["errors", "inputs"], ["errors", *FLOWING]])
def test_backward_passes_of_one_forward_pass(sites):
    model, a = net(*sites), x()
    y = model(a)
    one = torch.full_like(y, 1.1)
    passes = [torch.autograd.grad(y, a, one, retain_graph=True)[0] for _ in range(3)]
    passes.append(torch.autograd.grad(model(a), a, one)[0])
    assert not any(share(p, q) for i, p in enumerate(passes) for q in passes[:i])


def test_the_first_backward_pass_does_not_know_of_a_second():
    expected, other = net("errors"), net("errors")
    a, b = x(), x()
    one = torch.full((WIDTH, WIDTH), 1.1)
    for _ in range(2):  # forward passes
        y, z = expected(a), other(b)
        first = torch.autograd.grad(y, a, one)[0]
        again = torch.autograd.grad(z, b, one, retain_graph=True)[0]
        torch.autograd.grad(z, b, one)
        assert torch.equal(first, again)


def test_the_keys_of_the_first_and_the_second_backward_pass():
    """The first one's is that of (seed, site, tensor, step, call), which records of runs rest on."""
    model, a = net("errors"), x()
    y = model(a)
    first, second = (torch.autograd.grad(y, a, torch.full_like(y, 1.1), retain_graph=True)[0] for _ in range(2))
    key = Key.of(1, "errors", "0.output").fold(0).fold(1)  # step 0; the first call in training
    for gradient, its_key in ((first, key), (second, key.fold(1))):
        assert torch.equal(gradient, quantize(torch.full((WIDTH, WIDTH), 1.1), "float8", "stochastic", its_key))


def test_rows_of_a_jacobian():
    model = net("errors")
    rows = torch.autograd.functional.jacobian(lambda a: (model(a) * 1.1).sum() * torch.ones(2), x())
    assert not share(rows[0], rows[1])


def test_gradients_of_gradients_pass_straight_through():
    model, a = net("errors"), x()
    y = model(a)
    v = torch.full_like(y, 1.1, requires_grad=True)
    (first,) = torch.autograd.grad(y, a, v, create_graph=True)
    assert not first.eq(1.1).any()
    (second,) = torch.autograd.grad(first, v, torch.full_like(first, 1.1))
    assert second.eq(torch.tensor(1.1)).all()


def test_gradients_that_a_closure_or_unscale_rounds_again_within_a_step():
    class Twice(torch.optim.SGD):
        """Asks for the gradients twice, as LBFGS does."""

        def step(self, closure):
            for _ in range(2):
                closure()
                seen.append(model[0].weight.grad.clone())

    for unscale in (False, True):
        seen: list[torch.Tensor] = []
        model = net("inputs")
        optimizer = Twice(model.parameters(), 0.0)
        quantize_optimizer(optimizer, model, gradients="float8:stochastic", loss_scale=8.0)

        def closure(unscale=unscale, model=model, optimizer=optimizer):
            model[0].weight.grad = torch.full((WIDTH, WIDTH), 8 * 1.1)
            if unscale:
                optimizer.loss_scale.unscale(optimizer)

        optimizer.step(closure)
        optimizer.step(closure)
        assert len(seen) == 4
        assert not any(share(p, q) for i, p in enumerate(seen) for q in seen[:i])


# Processes


def of_rank(monkeypatch, rank: int, part: BatchPart | None = None, sites: tuple[str, ...] = ("inputs",)) -> nn.Module:
    monkeypatch.setattr(clock, "process_rank", lambda: rank)
    model = net(*sites)
    if part:
        model.low_precision.clock.part = part
    return model


def test_one_process_is_rank_0(monkeypatch):
    assert torch.equal(net("inputs")(x()), of_rank(monkeypatch, 0)(x()))


@pytest.mark.parametrize("site", FLOWING)
@pytest.mark.parametrize("training", [True, False])
def test_the_rank_is_in_the_noise_of_what_flows(site, training, monkeypatch):
    def results(part: BatchPart | None = None) -> list[torch.Tensor]:
        return [of_rank(monkeypatch, rank, part, (site,)).train(training)(x()) for rank in range(3)]

    a, b, c = results()
    assert not share(a, b)
    assert not share(a, c)
    assert not share(b, c)
    same = results(BatchPart(rank=0))  # as tensor parallelism needs it
    assert torch.equal(same[0], a)
    assert torch.equal(same[0], same[2])


def test_the_rank_is_in_the_noise_of_a_part_that_is_called_alone(monkeypatch):
    """As a container's layers are, or an encoder."""
    results = []
    for rank in range(2):
        model = of_rank(monkeypatch, rank)
        results.append(model[0](x()))
    assert not share(*results)


def test_the_rank_is_in_the_noise_of_errors_and_not_of_weights(monkeypatch):
    gradients, weights = [], []
    for rank in range(2):
        model, a = of_rank(monkeypatch, rank, sites=("errors",)), x()
        y = model(a)
        gradients.append(torch.autograd.grad(y, a, torch.full_like(y, 1.1))[0])
        layer = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            layer.weight.fill_(1.1)
        weights.append(rounded(layer, "weights").weight)
    assert not share(*gradients)
    assert torch.equal(*weights)
    assert len(weights[0].unique()) == 2


def test_the_rank_is_in_the_noise_of_quantize(monkeypatch):
    results = []
    for rank in range(2):
        monkeypatch.setattr(clock, "process_rank", lambda rank=rank: rank)
        results.append(Quantize("float8:stochastic", seed=1)(x()))
    assert not share(*results)


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    tensors = [torch.empty_like(tensor) for _ in range(2)]
    torch.distributed.all_gather(tensors, tensor.detach().contiguous())
    return tensors


def in_two_processes(rank: int, file: str, results) -> None:
    """Trains one model in each of two processes, by DistributedDataParallel or by hand, and tells what differs."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    told: dict[str, object] = {}
    for wrapped in (True, False):
        for overflow in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            sites = dict.fromkeys(("weights", "inputs", "activations", "errors"), "float8:stochastic")
            quantize_model(model, **sites, seed=1)
            forward = nn.parallel.DistributedDataParallel(model) if wrapped else model
            optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
            quantize_optimizer(optimizer, model, momentum="float8:stochastic", loss_scale="dynamic")
            seen = []
            hook = model[0].register_forward_hook(lambda module, read, made, seen=seen: seen.append(read[0].clone()))
            forward(torch.full((WIDTH, 8), 1.1))
            hook.remove()
            for step in range(4):
                torch.manual_seed(2 * step + rank)
                optimizer.zero_grad()
                loss = forward(torch.randn(16, 8)).square().mean()
                if overflow and step == 2 and rank == 1:
                    loss = loss * 1e3  # its errors saturate, and its gradients stay finite
                optimizer.loss_scale.scale(loss).backward()
                if not wrapped:
                    for p in model.parameters():
                        torch.distributed.all_reduce(p.grad)
                        p.grad /= 2
                optimizer.step()
            state = torch.tensor([optimizer.loss_scale.value, float(optimizer.loss_scale.skipped)])
            told[f"wrapped {wrapped}, overflow {overflow}"] = (
                all(torch.equal(*gathered(p)) for p in model.parameters()),
                [one.tolist() for one in gathered(state)],
                correlation(*gathered(seen[0])),
            )
    if rank == 0:
        results.put(told)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_round_apart_and_stay_equal(tmp_path):
    """Activations' noise differs between them, weights stay equal bit for bit, and they skip the same steps."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=in_two_processes, args=(r, str(tmp_path / "met"), results)) for r in range(2)]
    for process in processes:
        process.start()
    try:
        told = results.get(timeout=120)
    except queue.Empty:
        told = {}
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(told) == 4
    for name, (equal, states, noise) in told.items():
        assert equal, name
        assert states[0] == states[1], name
        assert states[0][1] == (1.0 if "overflow True" in name else 0.0), name
        assert abs(noise) < 5 / math.sqrt(WIDTH * 8), name
