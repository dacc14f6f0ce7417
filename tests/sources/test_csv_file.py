"""CSV files of people's own: what is read of right ones, and the one line about each wrong one."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from low_precision.errors import SettingError
from sources import csv_file
from sources.named_file import named_file

FLOWERS = """length,width,species
5.1,3.5,setosa
4.9,3.0,setosa
7.0,3.2,versicolor
6.4,3.2,versicolor
"""


def read(tmp_path, content, target, as_classes=False):
    path = tmp_path / "mine.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return csv_file.read(path, target, as_classes)


def test_a_target_of_text_is_classes(tmp_path):
    x, y = read(tmp_path, FLOWERS, "species")
    assert (x.dtype, y.dtype) == (np.float64, np.int64)
    assert x.tolist() == [[5.1, 3.5], [4.9, 3.0], [7.0, 3.2], [6.4, 3.2]]
    assert y.tolist() == [0, 0, 1, 1]


def test_a_target_of_numbers_is_regression_and_may_stand_in_any_column(tmp_path):
    x, y = read(tmp_path, "a,b,c\n1,2,3\n-4,+5e1,6.\n.5,1E-3,0\n", "b")
    assert x.tolist() == [[1, 3], [-4, 6], [0.5, 0]]
    assert (y.dtype, y.tolist()) == (np.float64, [2, 50, 0.001])


def test_numbers_as_classes_are_in_the_order_of_their_values(tmp_path):
    _, y = read(tmp_path, "a,b\n1,10\n1,9\n1,9.0\n1,10\n1,-1\n1,-1\n", "b", as_classes=True)
    assert y.tolist() == [2, 1, 1, 2, 0, 0]


def test_numbers_and_text_are_classes_where_that_is_asked_for(tmp_path):
    assert read(tmp_path, "a,b\n1,2\n1,x\n2,x\n3,2\n", "b", as_classes=True)[1].tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "content",
    [
        FLOWERS.encode("utf-8-sig"),
        FLOWERS.replace("\n", "\r\n"),
        FLOWERS.replace("\n", "\r"),
        FLOWERS.replace("\n", "\n\n") + "\n  \n,,\n",
        FLOWERS.replace(",", " , "),
        FLOWERS.rstrip(),
        '"length","width","species"\n' + FLOWERS.partition("\n")[2].replace("setosa", '"setosa"'),
    ],
    ids=["bom", "crlf", "cr", "empty lines", "spaces", "no end", "quotes"],
)
def test_other_ways_to_write_the_same(tmp_path, content):
    x, y = read(tmp_path, content, "species")
    expected_x, expected_y = read(tmp_path, FLOWERS, "species")
    assert (x == expected_x).all()
    assert (y == expected_y).all()


def test_commas_quotes_and_line_ends_in_quotes(tmp_path):
    content = 'a,"b, ""c""\nd"\n1,"x,\ny"\n2,"x,\ny"\n3,z\n4,z\n'
    assert read(tmp_path, content, 'b, "c"\nd')[1].tolist() == [0, 0, 1, 1]


def test_a_changed_file_is_read_again(tmp_path):
    first = read(tmp_path, "a,b\n1,2\n3,4\n", "b")
    second = read(tmp_path, "a,b\n1,2\n3,5\n", "b")
    assert (first[1].tolist(), second[1].tolist()) == ([2, 4], [2, 5])


WRONG = {
    "empty": ("", "b", ["which is empty"]),
    "a head alone": ("a,b\n", "b", ["of 0 rows", "at least 2"]),
    "one row": ("a,b\n1,2\n", "b", ["of 1 rows", "at least 2"]),
    "no such column": (
        "age,height\n1,2\n3,4\n",
        "hieght",
        ["column 'hieght'", "mean height?", "age, height"],
    ),
    "the target alone": ("b\n1\n2\n", "b", ["whose only column is b"]),
    "text": ("a,b\n1,2\nx,4\n", "b", ["line 3, column a: 'x'", "a finite number"]),
    "missing": ("a,b\n1,2\n,4\n", "b", ["line 3, column a: nothing", "must be filled in"]),
    "NA": ("a,b\n1,2\nNA,4\n", "b", ["line 3, column a: 'NA'", "must be filled in"]),
    "nan": ("a,b\n1,2\nnan,4\n", "b", ["column a: 'nan'"]),
    "infinity": ("a,b\n1,2\ninf,4\n", "b", ["column a: 'inf'"]),
    "beyond float64": ("a,b\n1,2\n1e999,4\n", "b", ["column a: '1e999'"]),
    "Python's numbers": ("a,b\n1,2\n1_000,4\n", "b", ["column a: '1_000'"]),
    "other digits": ("a,b\n1,2\n٣,4\n", "b", ["line 3, column a"]),
    "a decimal comma": ('a,b\n1,2\n"1,5",4\n', "b", ["column a: '1,5'"]),
    "missing target": ("a,b\n1,2\n3,\n", "b", ["line 3, column b: nothing", "a target in every row"]),
    "mixed target": ("a,b\n1,2\n3,x\n", "b", ["column b: 2 in line 2, but 'x' in line 3", "FILE.csv:b:classes"]),
    "constant target": ("a,b\n1,2\n3,2.0\n", "b", ["column b: 2 in every row"]),
    "one class": ("a,b\n1,x\n3,x\n", "b", ["column b: x in every row"]),
    "a name in every row": ("a,b\n1,x\n3,y\n4,z\n", "b", ["3 classes in 3 rows"]),
    "too short": ("a,b,c\n1,2,3\n4,5\n", "b", ["line 3: 2 values", "3, as there are names"]),
    "too long": ("a,b\n1,2\n4,5,6\n", "b", ["line 3: 3 values"]),
    "twice": ("a,b,a\n1,2,3\n4,5,6\n", "b", ["line 1: a stands there twice"]),
    "no name": ("a,,b\n1,2,3\n4,5,6\n", "b", ["line 1: column 2 has no name"]),
    "an index of pandas": (",a,b\n0,2,3\n1,5,6\n", "b", ["column 1 has no name", "index=False"]),
    "semicolons": ("a;b\n1;2\n3;4\n", "b", ["separated by semicolons"]),
    "tabs": ("a\tb\n1\t2\n3\t4\n", "b", ["separated by tabs"]),
    "an open quote": ('a,b\n1,"2\n3,4\n', "b", ["line 3", "a CSV file"]),
    "utf-16": (FLOWERS.encode("utf-16"), "species", ["UTF-16", "UTF-8"]),
    "utf-16 without a mark": (FLOWERS.encode("utf-16-le"), "species", ["UTF-16"]),
    "latin-1": ("a,b\n1,Zürich\n2,Genf\n".encode("latin-1"), "b", ["line 2: the byte 0xfc", "UTF-8"]),
}


@pytest.mark.parametrize(("content", "target", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_one_line(tmp_path, content, target, words):
    with pytest.raises(SettingError) as caught:
        read(tmp_path, content, target)
    line = str(caught.value)
    assert line.startswith(f"dataset: given {tmp_path / 'mine.csv'}")
    assert len(line.splitlines()) == 1
    assert [word for word in ["allowed", *words] if word not in line] == [], line


def test_no_such_file(tmp_path):
    with pytest.raises(SettingError, match="No such file"):
        csv_file.read(tmp_path / "nowhere.csv", "b")
    with pytest.raises(SettingError, match="a file that can be read"):
        csv_file.read(tmp_path, "b")


NAMES = st.lists(st.text(st.characters(codec="utf-8", categories=["L", "P"]), min_size=1), min_size=2, unique=True)


@settings(max_examples=50)
@given(st.data(), NAMES)
def test_what_pythons_csv_writes_is_read(tmp_path_factory, draw, names):
    numbers = st.floats(allow_nan=False, allow_infinity=False)
    rows = draw.draw(st.lists(st.lists(numbers, min_size=len(names), max_size=len(names)), min_size=2, max_size=6))
    rows[0][0], rows[1][0] = 0.0, 1.0  # a target that differs
    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    x, y = read(tmp_path_factory.mktemp("csv"), text.getvalue(), names[0])
    assert np.column_stack([y, x]).tolist() == rows


@pytest.mark.parametrize(
    ("name", "suffix", "part", "as_classes"),
    [
        ("data/FLOWERS.CSV:species", ".csv", "species", False),
        ("Flowers.Csv:a:b:classes", ".csv", "a:b", True),
        ("VERSES.TXT", ".txt", "", False),
        ("mine.py:make", ".py", "make", False),
    ],
)
def test_a_suffix_may_be_in_capitals(name, suffix, part, as_classes):
    file = named_file(name)
    assert (file.suffix, file.part, file.as_classes) == (suffix, part, as_classes)
    assert str(file) == name
