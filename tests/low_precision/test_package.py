"""The library as a package: installed into a folder, beside a user's own modules of the same names as our files."""

import os
import shutil
import subprocess
import sys

import pytest
from run_helpers import ROOT, names

import low_precision as lp

# What the laboratory has at the top, what it had there, and what a user is likely to have.
CLASHING = [
    *("config", "console", "data", "engines", "formats", "lab", "main", "models", "optim", "quant", "report"),
    *("settings", "sources", "sweep", "track", "train", "analysis", "datasets", "kernels", "utils", "kinds", "sites"),
]
STEP = """
import sys
import torch
import low_precision as lp

torch.manual_seed(0)
assert lp.quantize(torch.tensor([0.3]), "float8").item() == 0.3125
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
model = lp.quantize_model(model, weights="float8", inputs="float8", activations="float8", errors="float8", seed=1)
optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
lp.quantize_optimizer(optimizer, model, gradients="float8", momentum="float16:stochastic", loss_scale=8)
before = [p.detach().clone() for p in model.parameters()]
optimizer.loss_scale.scale(model(torch.ones(3, 4)).square().mean()).backward()
optimizer.step()
assert any(not torch.equal(p, then) for p, then in zip(model.parameters(), before))
assert all(torch.equal(lp.quantize(p, "float8"), p) for p in model.parameters())
print(lp.__file__)
print([name for name in NAMES if name in sys.modules])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which pip has installed a copy of the checkout, without a network."""
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "runs", "wandb", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    ran = subprocess.run([*pip, "--target", str(target), str(copy)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return target


def run_in(folder, installed, code):
    """Python in another folder, with what is installed on its path and nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(installed)
    (folder / "script.py").write_text(code)
    command = [sys.executable, "script.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_package_holds_the_library_alone(installed):
    (facts,) = [name for name in names(installed) if name.endswith(".dist-info")]
    assert [name for name in names(installed) if name != facts] == ["low_precision"]
    here = {path.relative_to(ROOT) for path in (ROOT / "low_precision").rglob("*.py")}
    there = {path.relative_to(installed) for path in installed.rglob("*.py")}
    assert there == here
    assert (installed / "low_precision" / "py.typed").exists()
    assert f"Version: {lp.__version__}\n" in (installed / facts / "METADATA").read_text()


def test_it_works_beside_a_users_own_modules(installed, tmp_path):
    """Some are files, some are folders; to import one of them is an error."""
    for number, name in enumerate(CLASHING):
        path = tmp_path / name / "__init__.py" if number % 2 else tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise RuntimeError('{name} is the user\\'s own')\n")
    ran = run_in(tmp_path, installed, STEP.replace("NAMES", repr(CLASHING)))
    assert ran.returncode == 0, ran.stderr
    file, clashes = ran.stdout.splitlines()
    assert file == str(installed / "low_precision" / "__init__.py")
    assert clashes == "[]"


def test_it_works_where_torch_and_numpy_are_all_there_is(installed, tmp_path):
    """Without the extras the eager engine rounds, and says so where the fused one would."""
    extras = ["numba", "llvmlite", "qtorch", "sklearn", "wandb", "tqdm", "joblib", "yaml", "matplotlib", "pooch"]
    hidden = f"import sys\nsys.modules |= dict.fromkeys({extras})\n"
    at_once = "from low_precision.engines import choice\nchoice.LOAD_SECONDS = 0.0\n"
    ran = run_in(tmp_path, installed, hidden + at_once + STEP.replace("NAMES", "[]"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("rounding with the slower eager engine") == 1


# Names that are loaded on first use


def test_importing_it_loads_no_torch(tmp_path):
    code = """
import sys
import low_precision as lp
assert dir(lp) and lp.__version__
heavy = {"torch", "numpy", "numba"}
assert not heavy & set(sys.modules)
assert lp.format_named("float8").mantissa_bits == 2
assert str(lp.rule_of("float8:stochastic")) == "float8:stochastic"
assert lp.SITES and lp.Rounding.NEAREST and lp.SettingError
assert not heavy & set(sys.modules)
lp.quantize
assert "torch" in sys.modules
"""
    ran = run_in(tmp_path, ROOT, code)
    assert ran.returncode == 0, ran.stderr


def test_every_public_name_loads_and_is_listed():
    assert len(lp.__all__) == len(set(lp.__all__))
    for name in lp.__all__:
        thing = getattr(lp, name)
        assert getattr(thing, "__module__", "low_precision.").startswith("low_precision.")
        assert dir(lp).count(name) == 1
    assert {"quantize", "quantize_model", "quantize_optimizer", "SettingError", "__version__"} <= set(dir(lp))
    names_of_all: dict = {}
    exec("from low_precision import *", names_of_all)
    assert set(lp.__all__) <= set(names_of_all)


def test_a_type_checker_sees_the_same_names():
    text = (ROOT / "low_precision" / "__init__.py").read_text()
    seen = {line.split(" as ")[-1] for line in text.splitlines() if line.startswith("    from low_precision.")}
    assert seen == set(lp.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"low_precision.*quantise"):
        lp.quantise  # noqa: B018
    assert not hasattr(lp, "Config")
    with pytest.raises(ImportError, match="quantise"):
        exec("from low_precision import quantise")
