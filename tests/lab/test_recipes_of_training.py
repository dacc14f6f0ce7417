"""Schedules, groups of parameters, clipping and Muon: each beside a few lines of plain PyTorch, bit for bit."""

import math

import pytest
import torch
import torch.nn.functional as F
from run_helpers import bits, is_refused, only, stopped
from torch import nn

import data
import models
from lab import optimizers
from lab.batches import row_numbers
from lab.muon import MuonAdamW, hidden_matrices
from settings.config import Config
from settings.models import HEADS, MODEL_NAMES

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = ["--dataset", "digits", "--model", "mlp", "--batch-size", 64, "--learning-rate", 0.001]


# The learning rate


def rates(steps, groups=1, **settings):
    """The learning rate of each step, and of what would be the next one."""
    config = Config(**settings)
    tensors = [torch.zeros(1, requires_grad=True) for _ in range(groups)]
    optimizer = torch.optim.SGD([{"params": [t]} for t in tensors], lr=config.learning_rate)
    schedule, made = optimizers.schedule(config, optimizer, steps), []
    for _ in range(steps + 1):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        made.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule:
            schedule.step()
    return made


def test_the_learning_rates_of_nanogpt():
    """Its shakespeare_char on a CPU: the formula of RECIPES, written again here, of every step."""
    peak, warmup, steps, end = 1e-3, 100, 2000, 1e-4
    made = rates(
        steps, 2, learning_rate=peak, warmup=warmup, schedule="cosine", final_learning_rate=end, optimizer="adamw"
    )
    assert made[0] == 1e-3 * 1 / 101
    assert made[99] == 1e-3 * 100 / 101
    assert made[100] == 1e-3
    for step in range(warmup, steps):
        coefficient = 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / (steps - warmup))))
        assert made[step] == end + coefficient * (peak - end)
    assert made[1050] == pytest.approx(5.5e-4)  # half way
    assert made[steps] == end  # which nanoGPT uses once more, in update 2001


def test_warmups_and_ends():
    assert rates(6, warmup=3, learning_rate=0.4) == [0.1, 0.2, pytest.approx(0.3), 0.4, 0.4, 0.4, 0.4]
    assert rates(3, warmup=3, learning_rate=0.4, schedule="cosine")[:3] == [0.1, 0.2, pytest.approx(0.3)]
    falling = rates(50, learning_rate=0.1, schedule="cosine", final_learning_rate=0.02)
    assert (falling[0], falling[25], falling[50]) == (0.1, pytest.approx(0.06), 0.02)
    assert falling == sorted(falling, reverse=True)
    assert rates(4, learning_rate=0.1, schedule="cosine", final_learning_rate=0.1) == [0.1] * 5
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    plain = optimizers.schedule(Config(schedule="cosine"), optimizer, 9)
    assert type(plain) is torch.optim.lr_scheduler.CosineAnnealingLR  # whose bits earlier runs have


def test_a_warmup_that_is_longer_than_the_run(cli, tmp_path):
    is_refused(cli("--warmup", 3), "--warmup: given 3", "at most 2")
    assert list(tmp_path.iterdir()) == []


# A whole run


def plain_run(seed, steps, make_optimizer, rate, clip=None, micro=None):
    """The weights after so many steps, and the norms of the gradients."""
    config = Config(dataset="digits", model="mlp", batch_size=64, seed=seed)
    split = data.load("digits", seed=seed)
    model = models.build("mlp", (1, 8, 8), 10, seed)
    optimizer, done, norms, epoch = make_optimizer(model), 0, [], 0
    while done < steps:
        epoch += 1
        for rows in row_numbers(len(split.train_x), config, epoch, torch.device("cpu"))[: steps - done]:
            for group in optimizer.param_groups:
                group["lr"] = rate(done)
            optimizer.zero_grad()
            for part in rows.split(micro or len(rows)):
                loss = F.cross_entropy(model(split.train_x[part]), split.train_y[part])
                (loss if len(part) == len(rows) else loss * (len(part) / len(rows))).backward()
            if clip:
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
            done += 1
    return model.state_dict(), norms


def same_weights(folder, expected) -> bool:
    made = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    return made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


def of_nanogpt(model):
    """AdamW as nanoGPT makes it: decay for what has two dimensions or more."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))


@pytest.mark.parametrize("micro", [None, 24])
def test_a_run_of_nanogpts_kind_is_a_plain_run(cli, micro):
    def rate(step):
        if step < 10:
            return 1e-3 * (step + 1) / 11
        return 1e-4 + 0.5 * (1.0 + math.cos(math.pi * (step - 10) / 30)) * (1e-3 - 1e-4)

    expected, norms = plain_run(42, 40, of_nanogpt, rate, clip=0.5, micro=micro)
    flags = ["--steps", 40, "--evaluate-every", 20, "--optimizer", "adamw", "--betas", "0.9,0.99", "--clip-norm", 0.5]
    flags += ["--weight-decay", 0.1, "--decay", "matrices", "--warmup", 10, "--schedule", "cosine"]
    flags += ["--final-learning-rate", 1e-4, *(["--micro-batch", micro] if micro else [])]
    ran = cli(*DIGITS, *flags)
    assert same_weights(ran.folder, expected)
    for line, part in zip(ran.metrics, (norms[:20], norms[20:]), strict=True):
        assert line["gradient_norm"] == pytest.approx(sum(part) / 20, rel=1e-6)
        assert line["clipped"] == sum(norm > 0.5 for norm in part) / 20
    assert same_weights(cli(*DIGITS, *flags, "--loss-scale", 1024, "--output-dir", "scaled").folder, expected)
    dynamic = cli(*DIGITS, *flags, "--loss-scale", "dynamic", "--output-dir", "dynamic")
    assert same_weights(dynamic.folder, expected)  # a power of two, divided out before the norm is taken


def test_a_shadow_clips_decays_and_adds_as_the_run_does(cli):
    flags = [*DIGITS, "--steps", 12, "--optimizer", "adamw", "--weight-decay", 0.1, "--decay", "matrices"]
    flags += ["--clip-norm", 0.3, "--micro-batch", 10, "--warmup", 4]
    plain = torch.load(cli(*flags).folder / "checkpoint.pt", weights_only=True)["model"]
    ran = cli(*flags, "--precision", "float8", "--shadow")
    shadow = torch.load(ran.folder / "checkpoint.pt", weights_only=True)["shadow"]["model"]
    assert all(torch.equal(shadow[name], plain[name]) for name in plain)


def test_a_skipped_step_is_skipped_and_does_not_count(cli):
    flags = ["--dataset", "boston", "--precision", "float8_e4m3fn", "--loss-scale", "dynamic", "--steps", 30]
    ran = cli(*flags, "--evaluate-every", 5, "--clip-norm", 0.1)
    first, last = ran.metrics[0], ran.metrics[-1]
    assert 0 < last["skipped_steps"] < 30
    assert (first["skipped_steps"], first["gradient_norm"], first["clipped"]) == (5, None, None)
    assert 0 < last["gradient_norm"] < 10
    assert ran.summary["status"] == "complete"


# Groups and Muon


def test_decay_of_matrices_alone():
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7))
    model[2].weight = model[0].weight  # a tied head is there once
    config = Config(optimizer="adamw", weight_decay=0.1, decay="matrices")
    decaying, others = optimizers.build(config, model).param_groups
    assert [p.shape for p in decaying["params"]] == [(7, 4)]
    assert [p.shape for p in others["params"]] == [(4,), (4,), (7,)]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    for settings in ({"decay": "all", "weight_decay": 0.1}, {"decay": "matrices"}):
        (group,) = optimizers.build(Config(optimizer="sgd", **settings), model).param_groups
        assert group["weight_decay"] == settings.get("weight_decay", 0)
    assert Config(decay="matrices").folder_name == Config().folder_name  # nothing decays


class Transformer(nn.Module):
    """A little one with everything in it that hidden_matrices tells apart."""

    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(11, 8), nn.Parameter(torch.zeros(5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.memory, self.kernel = nn.LSTM(8, 8), nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 11, bias=False)


def test_what_is_hidden():
    model = Transformer()
    hidden = {id(p) for p in hidden_matrices(model)}
    names = [name for name, p in model.named_parameters() if id(p) in hidden]
    assert names == [
        *("block.self_attn.in_proj_weight", "block.self_attn.out_proj.weight", "block.linear1.weight"),
        *("block.linear2.weight", "memory.weight_ih_l0", "memory.weight_hh_l0"),
    ]
    model.block.linear1.weight = nn.Parameter(torch.zeros(11, 8))
    model.embedding.weight = model.block.linear1.weight  # an embedding's too
    assert id(model.embedding.weight) not in {id(p) for p in hidden_matrices(model)}
    hidden = hidden_matrices(models.build("mlp", (13,), 1, 0))
    assert [tuple(p.shape) for p in hidden] == [(128, 13), (128, 128)]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_what_is_hidden_in_our_models(name):
    """All matrices of the blocks, and nothing of the head, which has its name in HEADS."""
    shape, outputs = {"gpt": ((8,), 20), "linear": ((13,), 1), "mlp": ((13,), 1)}.get(name, ((3, 8, 8), 10))
    model = models.build(name, shape, outputs, 0)
    hidden = {id(p) for p in hidden_matrices(model)}
    names = {n for n, p in model.named_parameters() if id(p) in hidden}
    blocks = {n for n, p in model.named_parameters() if n.startswith(("blocks.", "hidden")) and p.ndim == 2}
    assert names == blocks
    assert not any(n.startswith(f"{HEADS[name]}.") for n in names)
    if name in ("gpt", "vit"):
        assert len(names) == 4 * len(model.blocks)


def test_muon_is_torchs_two_optimizers(cli):
    class Both:
        def __init__(self, model):
            hidden = [model.hidden1.weight, model.hidden2.weight]
            others = [p for p in model.parameters() if all(p is not h for h in hidden)]
            muon = torch.optim.Muon(hidden, lr=0.001, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            matrices = {"params": [model.output.weight], "weight_decay": 0.1}
            rest = {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0}
            self.parts = muon, torch.optim.AdamW([matrices, rest], lr=0.001, betas=(0.8, 0.9))
            self.param_groups = [group for part in self.parts for group in part.param_groups]

        def zero_grad(self):
            for part in self.parts:
                part.zero_grad()

        def step(self):
            for part in self.parts:
                part.step()

    expected, _ = plain_run(42, 30, Both, lambda step: 0.001)
    flags = ["--steps", 30, "--optimizer", "muon", "--weight-decay", 0.1, "--decay", "matrices", "--betas", "0.8,0.9"]
    ran = cli(*DIGITS, *flags)
    assert same_weights(ran.folder, expected)


def test_muon_rounded_and_resumed(cli, monkeypatch):
    flags = [*DIGITS, "--steps", 20, "--optimizer", "muon", "--precision", "bfloat16", "--rounding", "stochastic"]
    flags += ["--site", "momentum.momentum_buffer=float8", "--site", "accumulator=float16", "--loss-scale", 64]
    straight = cli(*flags, "--output-dir", "straight").folder
    state = torch.load(straight / "checkpoint.pt", weights_only=True)["optimizer"]
    kept = [set(moments) for moments in state["state"].values()]
    assert kept == [{"momentum_buffer"}] * 2 + [{"step", "exp_avg", "exp_avg_sq"}] * 4
    buffer = state["state"][0]["momentum_buffer"]
    assert torch.equal(buffer.to(torch.float8_e5m2).float(), buffer)
    assert not torch.equal(state["state"][2]["exp_avg"].to(torch.float8_e5m2).float(), state["state"][2]["exp_avg"])
    folder = stopped(cli, monkeypatch, *flags, steps=11)
    assert bits(cli("--resume", folder).folder) == bits(straight)


def test_muon_steps_with_a_closure_and_copies():
    import copy

    model = models.build("mlp", (13,), 1, 0)
    hidden = {"params": hidden_matrices(model), "weight_decay": 0.0}
    others = [p for p in model.parameters() if all(p is not h for h in hidden["params"])]
    optimizer = MuonAdamW([hidden], [{"params": others, "weight_decay": 0.0}], 1e-4, (0.9, 0.999))
    x = torch.randn(8, 13, generator=torch.Generator().manual_seed(0))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    assert len(optimizer.state) == 6
    optimizer.step(closure)


@pytest.mark.parametrize("flags", [[], ["--dataset", "digits"], ["--dataset", "digits", "--model", "resnet20"]])
def test_a_model_without_hidden_matrices_has_no_use_for_muon(cli, tmp_path, flags):
    is_refused(cli(*flags, "--optimizer", "muon"), "--optimizer: given muon", "no matrix between its inputs")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_a_model_of_hidden_matrices_alone_is_all_muons(decay):
    model = nn.RNN(3, 5, bias=False)
    optimizer = optimizers.build(Config(optimizer="muon", weight_decay=0.1, decay=decay), model)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]
    model(torch.ones(2, 4, 3))[0].sum().backward()
    before = model.weight_ih_l0.detach().clone()
    optimizer.step()
    assert not torch.equal(model.weight_ih_l0, before)


def test_betas(cli):
    for name in ("adam", "adamw", "collage"):
        config = Config(optimizer=name, betas=(0.8, 0.95))
        model = models.build("linear", (3,), 1, 0)
        assert optimizers.build(config, model).param_groups[0]["betas"] == (0.8, 0.95)
        assert optimizers.build(Config(optimizer=name), model).param_groups[0]["betas"] == (0.9, 0.999)
    assert Config(optimizer="adam", betas=(0.9, 0.999)).folder_name == Config(optimizer="adam").folder_name
    ran = cli("--optimizer", "adam", "--betas", "0.5,0.7")
    assert ran.config["betas"] == [0.5, 0.7]
    assert only(ran.folder.parent) == ran.folder
