"""What report.py writes: whole or not at all, where a path says, and nothing beside it."""

import pytest

import report
from analysis import figures, runs
from analysis.runs import Run
from settings.config import Config


@pytest.fixture
def made():
    configs = [Config.make(precision=precision, seed=seed) for precision in ("float32", "float8") for seed in (1, 2)]
    return [Run(config, "complete", 0.5, [{"epoch": 1, "testing_mse": float(config.seed)}]) for config in configs]


def test_a_home_folder_is_expanded(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    runs.save(made, tmp_path / "some.csv")
    arguments = ["~/some.csv", "--save", "~/new/all.csv", "--figure", "~/new/x.svg", "--output", "~/report"]
    assert report.main(arguments) == 0
    assert (tmp_path / "new" / "all.csv").read_text() == (tmp_path / "some.csv").read_text()
    assert (tmp_path / "new" / "x.svg").exists()
    assert (tmp_path / "report" / "table.csv").exists()


def test_a_figure_that_cannot_be_drawn_leaves_the_older_one(made, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.png"
    path.write_bytes(b"older")
    runs.save(made, tmp_path / "some.csv")

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert report.main([str(tmp_path / "some.csv"), "--figure", str(path)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert path.read_bytes() == b"older"
    assert {one.name for one in tmp_path.iterdir()} == {"x.png", "some.csv"}


def test_a_link_stays_one(made, tmp_path):
    (tmp_path / "there.csv").write_text("older")
    (tmp_path / "here.csv").symlink_to("there.csv")
    runs.save(made, tmp_path / "here.csv")
    assert (tmp_path / "here.csv").is_symlink()
    assert [run.config for run in runs.read([tmp_path / "there.csv"]).runs] == [run.config for run in made]


def test_no_page_is_rewritten_where_a_block_of_one_cannot_be_made(made, tmp_path, capsys):
    runs.save(made, tmp_path / "some.csv")
    pages = {"a.md": "<!-- report.py some.csv -->\n<!-- end -->\n", "b.md": "<!-- report.py no.csv -->\n<!-- end -->\n"}
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    assert report.main(["--readme", str(tmp_path)]) == 2
    assert "b.md" in capsys.readouterr().err
    assert {name: (tmp_path / name).read_text() for name in pages} == pages


def test_a_folder_without_pages_is_one_line(tmp_path, capsys):
    assert report.main(["--readme", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_of_an_earlier_version_is_one_line(tmp_path, capsys):
    """Its names were texts for people; taken for a table of something else, it would be printed as it stands."""
    older = tmp_path / "older.csv"
    older.write_text("setting,seed,rounding_seed,status,seconds,epoch,testing_mse\nfloat32,0,0,complete,1,30,0.3\n")
    assert report.main([str(older)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "columns begin with flags" in printed.err


def test_settings_of_one_look_are_told_apart_in_a_figure():
    """Where only the training differs, the rules give one look to all of them."""
    configs = [Config.make(learning_rate=rate) for rate in (0.1, 0.01, 0.001)]
    settings = runs.settings_of([Run(config, "complete", 0.5, []) for config in configs])
    assert len({figures.look(setting) for setting in settings}) == 1
    assert len({look.colour for look in figures._looks(settings)}) == 3


def test_of_many_settings_the_best_and_the_worst_are_drawn(tmp_path):
    made = [
        Run(Config.make(precision=f"e{e}m{m}"), "complete", 0.5, [{"epoch": 1, "testing_mse": float(10 * e + m)}])
        for e in range(2, 9)
        for m in range(10)
    ]
    figures.curves(made, "testing_mse", tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    assert "<!-- e2m0 nearest -->" in drawn
    assert "<!-- e8m9 nearest -->" in drawn
    assert "<!-- e5m5 nearest -->" not in drawn
    assert "30 settings between the best and the worst are not shown" in drawn
