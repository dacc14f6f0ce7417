"""`python quant.py FORMAT NUMBER ...`: what rounding makes of numbers, and a run's rounding from its settings."""

import math
import subprocess
import sys

import pytest
import torch
from run_helpers import ROOT

import quant
from low_precision.model import LowPrecision
from settings.config import Config, ConfigError


def table_of(capsys, *words) -> tuple[str, list[dict[str, str]]]:
    """The first line, and the table's rows by the names of its columns."""
    assert quant.main([str(word) for word in words]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    first, head, *rows = said.out.splitlines()
    columns = head.replace("relative error", "error").replace("probability of above", "probability").split()
    return first, [dict(zip(columns, row.split(), strict=True)) for row in rows]


def test_numbers_and_their_neighbours(capsys):
    first, rows = table_of(capsys, "float8", 0.3, 1.1, -0.3, 1e9, 0)
    assert first == "float8 (1-5-2), nearest"
    assert rows[0] == {"number": "0.3", "rounded": "0.3125", "below": "0.25", "above": "0.3125", "error": "+0.042"}
    assert rows[1] == {"number": "1.1", "rounded": "1", "below": "1", "above": "1.25", "error": "-0.091"}
    assert (rows[2]["rounded"], rows[2]["below"], rows[2]["above"]) == ("-0.3125", "-0.3125", "-0.25")
    assert (rows[3]["rounded"], rows[3]["below"], rows[3]["above"]) == ("114688",) * 3
    assert (rows[4]["rounded"], rows[4]["error"]) == ("0", "-")


def test_stochastic_rounding_says_how_probable_it_is(capsys):
    first, rows = table_of(capsys, "float8:stochastic", 0.3, 1.0, "--key", 3)
    assert first == "float8 (1-5-2), stochastic, key 3"
    assert rows[0]["probability"] == "0.8"
    assert rows[0]["rounded"] in ("0.25", "0.3125")
    assert rows[1]["probability"] == "-"  # a value of the format stays
    met = {table_of(capsys, "float8:stochastic", 0.3, "--key", key)[1][0]["rounded"] for key in range(20)}
    assert met == {"0.25", "0.3125"}
    first, rows = table_of(capsys, "float8:stochastic:4:half", 0.3)
    assert first == "float8 (1-5-2), stochastic:4:half, key 0"
    assert "probability" not in rows[0]


def test_the_numbers_are_one_tensor_in_a_block_format(capsys):
    first, alone = table_of(capsys, "mxfp4", 0.3)
    assert first == "mxfp4 (1-2-1 per 32), nearest, one tensor"
    _, beside = table_of(capsys, "mxfp4", 0.3, 100)
    assert (alone[0]["rounded"], beside[0]["rounded"]) == ("0.25", "0")  # the larger one's scale is theirs


@pytest.mark.parametrize(
    ("number", "rounded"),
    [
        ("-1e-9", "-0"),
        ("-3", "-3"),
        ("-.5", "-0.5"),
        ("-inf", "-114688"),
        ("nan", "nan"),
        ("-nan", "nan"),
        ("1e400", "114688"),
    ],
)
def test_numbers_that_look_like_flags_and_special_ones(capsys, number, rounded):
    _, (row,) = table_of(capsys, "float8", number)
    assert row["rounded"] == rounded
    assert (row["number"] == "nan") == math.isnan(float(number))


def test_an_infinity_stays_where_the_format_has_one(capsys):
    """Overflow saturates here, as everywhere unless somebody asks for another way."""
    _, rows = table_of(capsys, "fp16", "inf", "-0.0")
    assert [row["rounded"] for row in rows] == ["65504", "-0"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["float9", "1"], "format: given float9 (did you mean float8?), allowed: "),
        (["float8:stohastic", "1"], "rounding: given stohastic (did you mean stochastic?), allowed: "),
        (["float8", "0.3", "x"], "NUMBER: given x, allowed: a number"),
        (["float8", ""], "NUMBER: given '', allowed: a number"),
        (["float8", "1", "--key", "-1"], "--key: given -1, allowed: a whole number below 2**64"),
        (["float8", "1", "--key", str(2**64)], f"--key: given {2**64}, allowed: "),
        (["float8", "1", "--key", "1.5"], "--key: given 1.5, allowed: "),
    ],
)
def test_wrong_words_are_one_line(capsys, words, said):
    assert quant.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"quant.py: error: {said}")
    assert len(shown.err.splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["float8"], ["float8", "1", "--kye", "3"], ["float8", "1", "--k", "3"]])
def test_missing_words_and_unknown_flags(capsys, words):
    with pytest.raises(SystemExit) as end:
        quant.main(words)
    assert end.value.code == 2
    assert capsys.readouterr().out == ""


def test_from_the_shell(tmp_path):
    command = [sys.executable, str(ROOT / "quant.py")]
    ran = subprocess.run([*command, "float8", "0.3", "-1e-9"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.count("\n") == 4
    assert subprocess.run([*command, "float9", "0.3"], cwd=tmp_path, capture_output=True).returncode == 2


# A run's rounding


def test_the_three_calls_are_those_of_the_library():
    import low_precision as lp

    for name in ("quantize", "quantize_model", "quantize_optimizer"):
        assert getattr(quant, name) is getattr(lp, name)


def test_the_rounding_of_a_run_is_that_of_its_settings():
    config = Config.make(
        precision="float8",
        rounding="stochastic",
        site=("accumulator=float16:stochastic",),
        loss_scale=8,
        rounding_seed=7,
        backend="eager",
        layers="0",
    )
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    plain = torch.optim.SGD(model.parameters(), 0.1)
    rounding = quant.round_run(config, model, plain)
    low = model.low_precision
    assert isinstance(low, LowPrecision)
    assert rounding.optimizer is plain
    assert (low.scheme.seed, low.scheme.backend, low.scheme.rules) == (7, "eager", config.rules())
    assert rounding.loss_scale.value == 8
    assert float(rounding.scale(torch.tensor(2.0))) == 16
    assert [tensor.shape for tensor in rounding.kept()] == [p.shape for p in model[0].parameters()]
    assert "(rounding)" in str(model[0])
    assert "(rounding)" not in str(model[1])


def test_a_pattern_that_matches_nothing_is_a_wrong_flag():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with pytest.raises(ConfigError, match=r"^--layers: given 'fc', allowed: a pattern that matches one of: 0$"):
        quant.round_run(Config(precision="float8", layers=("fc",)), model, torch.optim.SGD(model.parameters(), 0.1))


def test_what_a_format_can_hold(capsys):
    """Of E2M1 every value; the errors of numbers in the middle between two of them."""
    assert quant.main(["--show", "float4_e2m1fn"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "finite values 15: 0 0.5 1 1.5 2 3 4 6, and below 0 the same" in lines
    assert "becomes 0 up to 0.25" in lines
    assert lines[-2:] == ["2^-1 to 2^0 1 2^-1 33.3 %", "2^0 to 1.5 * 2^2 2 each 2^-1 .. 2^1 20 %"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--show", "float9"], "format: given float9 (did you mean float8?), allowed: "),
        (["--show", ""], "format: given '', allowed: "),
        (["--show", "mxfp4", "--amax", "0"], "--amax: given 0, allowed: a number above 0"),
        (["--show", "mxfp4", "0.3"], "--show: given 0.3 beside it, allowed: no numbers to round"),
        (["float8", "0.3", "--amax", "1"], "--amax: given 1, allowed: with --show alone"),
    ],
)
def test_wrong_words_beside_show(capsys, words, said):
    assert quant.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"quant.py: error: {said}")
    assert len(shown.err.splitlines()) == 1
