"""What is said of people's own models, data sets and optimizers that are wrong: one line, theirs."""

import subprocess
import sys

import pytest
from run_helpers import OWN_FILE, has_failed, is_refused, names, only, resumable, write_own_files

import main
import sweep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mine(cli, tmp_path):
    """The folder in which the command line runs, with mine.py and house.csv in it."""
    write_own_files(tmp_path)
    return tmp_path


# Wrong ones. Each is FILE.py's text, the flags, and words of the one line; exit status 2, and nothing is written.

NET = "from torch import nn\nimport torch\n"
REFUSED = {
    "no such file": ("", ["--model", "nowhere.py:net"], ["--model: given nowhere.py:net", "No such file"]),
    "no such function": (
        "def net(s, o): 0",
        ["--model", "f.py:nett"],
        ["(did you mean net?)", "of f.py: net"],
    ),
    "no function at all": ("x = 1", ["--dataset", "f.py:rows"], ["f.py:rows", "which has none"]),
    "no callable": ("rows = [1, 2]", ["--dataset", "f.py:rows"], ["f.py:rows", "a function of f.py"]),
    "a folder": ("", ["--model", "folder.py:net"], ["folder.py", "Is a directory"]),
    "too few arguments": ("def net(s): pass", ["--model", "f.py:net"], ["too many positional arguments", "((1,), 1)"]),
    "no module": ("def net(s, o): return 3", ["--model", "f.py:net"], ["gives a int", "torch.nn.Module"]),
    "no parameters": (NET + "def net(s, o): return nn.Flatten()", ["--model", "f.py:net"], ["has no parameters"]),
    "lazy": (NET + "def net(s, o): return nn.LazyLinear(o)", ["--model", "f.py:net"], ["lazy layers"]),
    "other outputs": (NET + "def net(s, o): return nn.Linear(*s, 3)", ["--model", "f.py:net"], ["(2, 3)", "(2, 1)"]),
    "no output": (
        NET + "class net(nn.Linear):\n def __init__(self, s, o): super().__init__(*s, o)\n"
        " def forward(self, x): return x, 1",
        ["--model", "f.py:net"],
        ["which gives a tuple"],
    ),
    "other outputs in training": (
        NET + "class net(nn.Linear):\n def __init__(self, s, o): super().__init__(*s, o)\n"
        " def forward(self, x): return super().forward(x)[:, 0] if self.training else super().forward(x)",
        ["--model", "f.py:net"],
        ["which gives float32 (2,)", "in training", "(2, 1)"],
    ),
    "no gradients": (
        NET + "class net(nn.Linear):\n def __init__(self, s, o): super().__init__(*s, o)\n"
        " def forward(self, x): return super().forward(x).detach()",
        ["--model", "f.py:net"],
        ["without gradients"],
    ),
    "its input": (
        NET + "class net(nn.Linear):\n def __init__(self, s, o): super().__init__(*s, o)\n"
        " def forward(self, x): return super().forward(x.mul_(0.5))",
        ["--model", "f.py:net"],
        ["writes into what it reads"],
    ),
    "other parameters": (
        NET + "def net(s, o): return nn.Linear(*s, o).double()",
        ["--model", "f.py:net"],
        ["whose parameter weight is float64", "float32"],
    ),
    "a model and no function": (
        NET + "net = nn.Linear(1, 1)",
        ["--model", "f.py:net"],
        ["which is a Linear", "a function that gives one"],
    ),
    "not two": ("def rows(): return 1, 2, 3", ["--dataset", "f.py:rows"], ["gives 3 things", "(features, targets)"]),
    "a dict": ("def rows(): return {}", ["--dataset", "f.py:rows"], ["gives a dict", "(features, targets)"]),
    "an argument": ("def rows(n): return 0", ["--dataset", "f.py:rows"], ["missing a required argument: 'n'"]),
    "text": ("def rows(): return [['a'], ['b']], [1, 2]", ["--dataset", "f.py:rows"], ["array of numbers"]),
    "ragged": ("def rows(): return [[1], [2, 3]], [1, 2]", ["--dataset", "f.py:rows"], ["array of numbers"]),
    "lengths": ("def rows(): return [[1.], [2.]], [1, 2, 3]", ["--dataset", "f.py:rows"], ["2 samples and 3 targets"]),
    "nan": ("def rows(): return [[1.], [float('nan')]], [1, 2]", ["--dataset", "f.py:rows"], ["are nan in row 1"]),
    "too large": (
        "def rows(): return [[1e308], [-1e308]], [1., 2.]",
        ["--dataset", "f.py:rows"],
        ["are 1e+308 in row 0", "up to 1e+150"],
    ),
    "too large in a table": ("a,b\n1e308,2\n-1e308,3", ["--dataset", "f.py.csv:b"], ["are 1e+308 in row 0"]),
    "sparse": (
        NET + "def rows(): return torch.eye(4).to_sparse(), torch.arange(4.0)",
        ["--dataset", "f.py:rows"],
        ["features are a tensor of the layout torch.sparse_coo", "to_dense()"],
    ),
    "masked": (
        "import numpy as np\ndef rows(): return np.ma.masked_less(np.eye(4), 0.5), np.arange(4.0)",
        ["--dataset", "f.py:rows"],
        ["features are masked in places"],
    ),
    "larger than int64": (
        "import numpy as np\ndef rows(): return np.full((4, 1), 2**63, np.uint64), np.arange(4.0)",
        ["--dataset", "f.py:rows"],
        ["one of whose features is 9223372036854775808", "int64"],
    ),
    "constant": ("def rows(): return [[1.], [2.]], [5., 5.]", ["--dataset", "f.py:rows"], ["targets are all 5.0"]),
    "classes": ("def rows(): return [[1.], [2.]], [-1, 1]", ["--dataset", "f.py:rows"], ["classes is -1"]),
    "far classes": (
        "def rows(): return [[1.], [2.]], [0, 900]",
        ["--dataset", "f.py:rows"],
        ["900", "2 rows"],
    ),
    "several targets": ("def rows(): return [[1.]] * 2, [[1., 2.]] * 2", ["--dataset", "f.py:rows"], ["shape (2, 2)"]),
    "two kinds": (
        "def rows(): return [[1.]], [1.], [[1., 2.]], [2.]",
        ["--dataset", "f.py:rows"],
        ["(1, 1)", "(1, 2)", "of one kind and shape"],
    ),
    "a split of its own": (
        "def rows(): return [[1.], [3.]], [1., 3.], [[2.]], [2.]",
        ["--dataset", "f.py:rows", "--test-split", "0.5"],
        ["--test-split: given 0.5", "f.py:rows has its own split (2 + 1)"],
    ),
    "no row left": (
        "def rows(): return [[1.], [3.]], [1., 3.]",
        ["--dataset", "f.py:rows", "--test-split", "0.9"],
        ["--test-split", "leaves a training row of the 2"],
    ),
    "no images": (
        "def rows(): return [[1.], [3.], [4.]], [1, 0, 1]",
        ["--dataset", "f.py:rows", "--model", "cnn"],
        ["--model: given cnn for samples of the shape (1,)"],
    ),
    "whole numbers for a model of ours": (
        "def rows(): return [[1], [3], [4]], [1, 0, 1]",
        ["--dataset", "f.py:rows"],
        ["--model: given mlp", "int64 (1,), or floats as features"],
    ),
    "no optimizer": ("def opt(p, lr): return None", ["--optimizer", "f.py:opt"], ["gives a NoneType", "Optimizer"]),
    "no weight decay": (
        "import torch\ndef opt(p, lr): return torch.optim.Rprop(p, lr=lr)",
        ["--optimizer", "f.py:opt", "--weight-decay", "0.1"],
        ["--weight-decay: given 0.1", "no parameter weight_decay"],
    ),
    "half of the parameters": (
        "import torch\ndef opt(p, lr): return torch.optim.SGD(p[:1], lr=lr)",
        ["--optimizer", "f.py:opt"],
        ["updates 1 of 2 parameters"],
    ),
    "a closure": (
        "import torch\ndef opt(p, lr): return torch.optim.LBFGS(p)",
        ["--optimizer", "f.py:opt"],
        ["closure"],
    ),
    "no such column": ("", ["--dataset", "house.csv:prize"], ["house.csv", "did you mean price?", "rooms, age, price"]),
    "no target": ("", ["--dataset", "house.csv"], ["--dataset: given house.csv", "FILE.csv:TARGET[:classes]"]),
    "no number": ("a,b\n1,2\nx,3", ["--dataset", "f.py.csv:b"], ["line 3, column a: 'x'", "a finite number"]),
}


@pytest.mark.parametrize(("text", "flags", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_one_is_one_line_and_writes_nothing(cli, mine, text, flags, words):
    (mine / "folder.py").mkdir()
    (mine / ("f.py.csv" if text.startswith("a,b") else "f.py")).write_text(text)
    before = names(mine)
    is_refused(cli(*flags), *words)
    assert [name for name in names(mine) if name not in (*before, "__pycache__")] == []


FAILING = {
    "syntax": ("def net(s, o)\n    return 1", "--model", "net", ["f.py:1: SyntaxError"]),
    "a null byte": ("def net(s, o):\n    return 1\0", "--model", "net", ["f.py: ", "null byte"]),
    "import": (
        "import torch\nimport nowhere_at_all",
        "--model",
        "net",
        ["f.py:2: ModuleNotFoundError", "nowhere_at_all"],
    ),
    "at the top": ("x = 1\ny = x / 0", "--dataset", "rows", ["f.py:2: ZeroDivisionError: division by zero"]),
    "in the function": (
        "def rows():\n    a = {}\n    return a['b']",
        "--dataset",
        "rows",
        ["f.py:3, in rows: KeyError: 'b'"],
    ),
    "the end": ("import sys\nsys.exit(3)", "--model", "net", ["f.py:2: RuntimeError: it ends the program (3)"]),
    "before a line of theirs": (
        NET + "class net(nn.Linear): pass",
        "--model",
        "net",
        ["f.py:3, in net: TypeError"],
    ),
    "in the model": (
        NET + "class net(nn.Linear):\n    def __init__(self, s, o):\n        super().__init__(7, o)\n"
        "    def forward(self, x):\n        return super().forward(x)",
        "--model",
        "net",
        ["f.py:7, in forward: RuntimeError", "shapes cannot be multiplied"],
    ),
    "in the optimizer": (
        "import torch\ndef opt(p, lr):\n    return torch.optim.SGD(p, lr=-lr)",
        "--optimizer",
        "opt",
        ["f.py:3, in opt: ValueError: Invalid learning rate"],
    ),
}


@pytest.mark.parametrize(("text", "flag", "name", "words"), FAILING.values(), ids=FAILING.keys())
def test_what_their_code_raises_is_told_with_its_line(cli, mine, text, flag, name, words):
    (mine / "f.py").write_text(text)
    has_failed(cli(flag, f"f.py:{name}"), *words)
    assert not (mine / "runs").exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 - with --debug, whatever it was
        main.main([flag, f"f.py:{name}", "--debug"])


def test_what_fails_in_training_is_told_and_recorded(cli, mine):
    (mine / "late.py").write_text(
        NET + "class net(nn.Linear):\n    calls = 0\n    def __init__(self, s, o):\n        super().__init__(*s, o)\n"
        "    def forward(self, x):\n        self.calls += 1\n        assert self.calls < 9, 'worn out'\n"
        "        return super().forward(x)\n"
    )
    ran = cli("--model", "late.py:net", "--epochs", 20)
    assert ran.status == 1
    last = ran.err.splitlines()[-1]
    assert last.startswith("main.py: error: late.py:9, in forward: AssertionError: worn out; recorded so far in runs/")
    assert resumable(last.partition(" (--debug")[0]).is_dir()


def test_a_sweep_names_the_line_too(mine, capsys):
    (mine / "f.py").write_text("def net(shape, outputs):\n    raise OSError('no')\n")
    assert sweep.main(["--model", "linear,f.py:net", "--jobs", "1", "--epochs", "1"]) == 1
    assert "f.py:2, in net: OSError: no" in capsys.readouterr().err
    assert only(mine / "runs").name.startswith("toy-float32-42")


def test_a_file_named_as_one_of_ours_and_run_from_elsewhere(tmp_path, monkeypatch):
    """In a process of its own, without the help of this one's imports."""
    (tmp_path / "models.py").write_text(OWN_FILE)
    flags = ["--dataset", f"{tmp_path / 'models.py'}:circles", "--model", f"{tmp_path / 'models.py'}:net"]
    ran = subprocess.run(
        [sys.executable, main.__file__, *flags, "--output-dir", tmp_path / "runs"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert "models-circles-float32-42: complete" in ran.stdout
