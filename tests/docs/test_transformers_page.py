"""The script of docs/transformers.md runs as it stands, and does what the page says."""

import re

import pytest
import torch
from run_helpers import ROOT

import low_precision as lp

pytest.importorskip("transformers")

PAGE = (ROOT / "docs" / "transformers.md").read_text()


def test_the_ten_lines_train_and_leave_no_number_in_float32(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    names: dict = {}
    exec(re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1], names)
    assert "no number is left in float32" in capsys.readouterr().out
    losses = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
    assert len(losses) == 4
    assert losses[3] < losses[0] - 0.5  # it learns the eight rows by heart
    for name, p in names["model"].named_parameters():
        assert torch.equal(p, lp.quantize(p, "float8")), name
    moments = [state["exp_avg_sq"] for state in names["optimizer"].state.values()]
    assert moments
    assert all(torch.equal(x, lp.quantize(x, "bfloat16")) for x in moments)
