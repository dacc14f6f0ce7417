"""The flags of training: what they take, what they refuse in one line, and what a sweep makes of them."""

import json

import pytest
from run_helpers import is_refused

import sweep
from settings.config import Config, ConfigError
from settings.flags import config_of, flags_of

WRONG = {
    "--steps -1": "a whole number >= 0",
    "--steps 1.5": "a whole number >= 0",
    "--steps 10 --epochs 3": "none with --epochs 3",
    "--epochs 2 --steps 10": "none with --epochs 2",  # the default, said all the same
    "--evaluate-every 0": "a whole number >= 1",
    "--evaluate-every 5s": "a whole number >= 1",
    "--micro-batch 0": "a whole number >= 1",
    "--betas 0.9,0.99": "none (sgd has no moments of Adam)",
    "--optimizer adam --betas 0.9": "two numbers A,B, each 0 <= x < 1",
    "--optimizer adam --betas 0.9,1": "two numbers A,B, each 0 <= x < 1",
    "--optimizer adamw --betas 0.9,0.95,0.99": "two numbers A,B, each 0 <= x < 1",
    "--optimizer adamw --betas 0.9,x": "two numbers A,B, each 0 <= x < 1",
    "--decay matrix": "did you mean matrices?",
    "--clip-norm 0": "a number > 0",
    "--clip-norm nan": "a number > 0",
    "--clip-norm 1 --backend qtorch --precision float8": "no clipping",
    "--optimizer muon --backend qtorch --dataset digits --model mlp --precision float8": "no muon",
    "--warmup 5 --schedule onecycle": "0 (onecycle has a warmup of its own)",
    "--warmup 5 --steps 4": "at most 4, the steps of the run",
    "--warmup -1": "a whole number >= 0",
    "--final-learning-rate 0.001": "0 (with constant; cosine has one)",
    "--final-learning-rate 0.001 --schedule onecycle": "0 (with onecycle; cosine has one)",
    "--final-learning-rate 0.1 --schedule cosine": "at most 0.01, --learning-rate",
    "--final-learning-rate -1 --schedule cosine": "a number >= 0",
    "--optimizer moun": "did you mean muon?",
    "--optimizer muon --momentum 0.9": "0 (muon has moments of its own)",
    "--optimizer muon --site momentum.max_exp_avg_sq=float16": "momentum.momentum_buffer",
    "--stepps 5": "did you mean --steps?",
    "--evaluate_every 5": "did you mean --evaluate-every?",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_ones_are_told_in_one_line_and_write_nothing(cli, tmp_path, line):
    is_refused(cli(*line.split()), WRONG[line])
    assert list(tmp_path.iterdir()) == []


def test_what_decides_nothing_is_not_in_the_name():
    plain = Config.make(optimizer="adamw", batch_size=64, weight_decay=0.1)
    idle = [{"micro_batch": 64}, {"micro_batch": 100}, {"betas": "0.9,0.999"}, {"decay": "all"}, {"warmup": 0}]
    for settings in idle:
        config = Config.make(optimizer="adamw", batch_size=64, weight_decay=0.1, **settings)
        assert config.folder_name == plain.folder_name
    decisive = [{"micro_batch": 63}, {"betas": "0.9,0.99"}, {"decay": "matrices"}, {"warmup": 1}, {"clip_norm": 1}]
    decisive += [{"evaluate_every": 3}, {"steps": 5}, {"schedule": "cosine", "final_learning_rate": 0.001}]
    names = {
        Config.make(**{"optimizer": "adamw", "batch_size": 64, "weight_decay": 0.1} | s).folder_name for s in decisive
    }
    assert len(names | {plain.folder_name}) == len(decisive) + 1


def test_what_an_optimizer_of_somebodys_own_is_told_is_in_the_name():
    """Its own betas and weight decay, of which nothing is known here, may be others than ours."""
    said = [{}, {"betas": "0.9,0.999"}, {"decay": "matrices"}]
    assert len({Config.make(optimizer="mine.py:lion", **settings).folder_name for settings in said}) == 3


def test_records_of_before_keep_their_bytes():
    """None of the settings is in a record at its default."""
    settings = json.loads(Config().to_json())
    assert list(settings)[4:10] == ["model", "epochs", "batch_size", "optimizer", "learning_rate", "momentum"]
    assert list(settings)[10:14] == ["weight_decay", "schedule", "average_last", "seed"]
    config = Config.make(steps=7, betas=[0.5, 0.25], optimizer="adam")
    assert Config.from_json(config.to_json()) == config
    assert config.betas == (0.5, 0.25)


def test_the_command_of_a_run():
    config = Config.make(steps=9, evaluate_every=2, betas="0.9,0.95", optimizer="muon", clip_norm=1, warmup=3)
    words = flags_of(config)
    assert words[words.index("--betas") :][:2] == ["--betas", "0.9,0.95"]
    assert "--epochs" not in words
    assert config_of(words) == config


def test_a_sweep_parts_betas_by_semicolons():
    line = "--optimizer adamw --betas 0.9,0.99;0.8,0.95 --steps 5,10 --micro-batch 8,16"
    configs, _ = sweep.grid(line.split())
    assert len(configs) == 8
    assert {config.betas for config in configs} == {(0.9, 0.99), (0.8, 0.95)}
    assert {config.steps for config in configs} == {5, 10}
    with pytest.raises(ConfigError, match="--steps"):
        sweep.grid(["--steps", "5", "--epochs", "2"])


def test_a_sweep_file_of_steps(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("parameters: {steps: {values: [5, 6]}, optimizer: {value: adam}, betas: {values: [[0.9, 0.5]]}}\n")
    configs, _ = sweep.grid([str(file)])
    assert [(config.steps, config.betas) for config in configs] == [(5, (0.9, 0.5)), (6, (0.9, 0.5))]
