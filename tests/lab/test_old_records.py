"""Records that the version before wrote: records_of_0.1/make.py says how they were made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_helpers import only

from settings.config import Config


@pytest.mark.parametrize("name", ["accumulator", "compensation"])
def test_records_of_version_0_1_go_on_to_the_same_end(cli, tmp_path, name):
    """To the bit with the same PyTorch on such a processor; another one may sum in another order."""
    made = Path(__file__).parent / "records_of_0.1" / name
    shutil.copytree(made, tmp_path / "runs")
    expected = json.loads((tmp_path / "runs" / "expected.json").read_text())
    (tmp_path / "runs" / "expected.json").unlink()
    ran = cli("--resume", only(tmp_path / "runs"))
    assert (ran.status, ran.summary["status"]) == (0, "complete")
    assert ran.summary["resumed"] == [{"accumulator": 17, "compensation": 31}[name]]
    assert ran.folder == only(tmp_path / "runs")
    assert Config.from_json((ran.folder / "config.json").read_text()).folder_name == ran.folder.name
    lines = (ran.folder / "metrics.jsonl").read_text().splitlines()
    model = torch.load(ran.folder / "checkpoint.pt", weights_only=True)["model"]
    weights = {key: tensor.flatten().tolist() for key, tensor in model.items()}
    if [torch.__version__.partition("+")[0], torch.backends.cpu.get_cpu_capability()] == expected["computed_by"]:
        assert (lines, weights) == (expected["metrics"], expected["weights"])
    for line, theirs in zip(map(json.loads, lines), map(json.loads, expected["metrics"]), strict=True):
        assert line == pytest.approx(theirs, rel=1e-5)
    assert weights.keys() == expected["weights"].keys()
    for key, values in weights.items():
        assert values == pytest.approx(expected["weights"][key], rel=1e-5)
