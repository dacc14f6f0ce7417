"""Moments in 8 bits: with scales, for states that are large enough, in any optimizer of torch."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from training_helpers import equal_bits

import low_precision as lp
from low_precision.errors import SettingError
from low_precision.optimizer import EXTRA_STATE
from settings.config import Config, ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {"momentum.exp_avg": "float8_e4m3fn@flat64", "momentum.exp_avg_sq": "float8_e4m3fn@flat64@expand"}


def made(smallest=None, rules=RULES, kind=torch.optim.Adam):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 4))
    lp.quantize_model(model, seed=0)
    optimizer = kind(model.parameters(), lr=0.01)
    return model, lp.quantize_optimizer(optimizer, model, smallest_state=smallest, **rules)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(8, 20, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def states(optimizer):
    return [x.clone() for held in optimizer.state.values() for x in held.values()]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_states_are_rounded_in_groups_of_the_flattened_state(kind):
    model, optimizer = made(kind=kind)
    plain_model, plain = made(kind=kind, rules={"momentum.exp_avg": "float32"})
    train(model, optimizer, [0])
    train(plain_model, plain, [0])
    for p, q in zip(model.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(p, q)  # the first step reads what it has not rounded yet
        for name, rule in RULES.items():
            state = name.removeprefix("momentum.")
            assert equal_bits([optimizer.state[p][state]], [lp.quantize(plain.state[q][state], rule)])


def test_small_states_stay_in_float32_and_a_warning_names_them_once():
    text = r"^momentum: states of fewer than 41 numbers stay in float32, those of 0\.bias, 1\.weight, 1\.bias$"
    model, optimizer = made(41)
    with pytest.warns(UserWarning, match=text):
        train(model, optimizer, [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, [1, 2])
    reference = made(rules={"momentum.exp_avg": "float32"})
    train(*reference, [0])
    model, optimizer = made(41)
    with pytest.warns(UserWarning, match="fewer than 41"):
        train(model, optimizer, [0])
    for p, q in zip(model.parameters(), reference[0].parameters(), strict=True):
        same = torch.equal(optimizer.state[p]["exp_avg"], reference[1].state[q]["exp_avg"])
        assert same == (p.numel() < 41)


@pytest.mark.parametrize("smallest", [None, 0, 11, 41])
@pytest.mark.filterwarnings("ignore:momentum. states of fewer")
def test_a_resumed_run_is_the_run_that_was_left_alone(smallest):
    model, optimizer = made(smallest)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    then = states(optimizer)
    train(model, optimizer, range(3, 6))
    file.seek(0)
    of_model, of_optimizer = torch.load(file, weights_only=True)
    assert of_optimizer[EXTRA_STATE]["smallest_state"] == (smallest or 0)
    resumed_model, resumed = made(smallest)
    resumed_model.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    assert equal_bits(states(resumed), then)
    train(resumed_model, resumed, range(3, 6))
    assert equal_bits(states(resumed), states(optimizer))
    assert equal_bits([*resumed_model.parameters()], [*model.parameters()])


@pytest.mark.filterwarnings("ignore:momentum. states of fewer")
def test_a_state_that_was_too_small_then_is_rounded_when_it_is_loaded():
    model, optimizer = made(41)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    _, other = made(11)
    other.load_state_dict(copy.deepcopy(saved))
    for number, held in enumerate(other.state.values()):
        before = saved["state"][number]["exp_avg"]
        expected = lp.quantize(before, RULES["momentum.exp_avg"]) if 11 <= before.numel() < 41 else before
        assert equal_bits([held["exp_avg"]], [expected])


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "4096"])
def test_what_is_no_number_of_numbers(wrong):
    with pytest.raises(SettingError, match="smallest_state"):
        made(wrong)
    with pytest.raises(ConfigError, match="--smallest-state"):
        Config.make(smallest_state="-1" if wrong == "4096" else wrong)


def test_it_is_in_the_hash_only_where_it_decides_something():
    assert Config(smallest_state=5).folder_name == Config().folder_name
    rounded = Config(precision="float8", momentum=0.9)
    assert Config(precision="float8", momentum=0.9, smallest_state=5).folder_name != rounded.folder_name
    by_layer = Config(momentum=0.9, site=("a/momentum=float8",))
    assert Config(momentum=0.9, site=("a/momentum=float8",), smallest_state=5).folder_name != by_layer.folder_name


def test_smallest_state_in_a_run(cli):
    arguments = ["--dataset", "boston", "--optimizer", "adam", "--epochs", 3, "--site", "momentum=float8_e4m3fn@flat64"]
    run = cli(*arguments, "--smallest-state", 10)
    assert run.config["smallest_state"] == 10
    assert run.summary["testing_mse"] != cli(*arguments).summary["testing_mse"]
