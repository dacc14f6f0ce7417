"""Digests of the P3109 group's value tables: python bench/p3109.py CHECKOUT > tests/low_precision/p3109.json

CHECKOUT: a checkout of https://github.com/P3109/Public. tests/low_precision/test_p3109.py compares our formats with the
numbers in the file, without the tables: for each format whose values are float64 numbers, a digest of the value of each
code, in order, as float64 numbers of eight bytes, the highest first.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import struct
from fractions import Fraction
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    tables = sorted(parser.parse_args().checkout.glob("Value Tables/Hexadecimal/K*/P*/*/*.csv"), key=_order)
    digests = {}
    for path in tables:
        with path.open() as file:
            values = [_number(row["value"]) for row in csv.DictReader(file)]
        if all(value is not None for value in values):
            digests[path.stem.lower()] = digest([value for value in values if value is not None])
    print(json.dumps({"source": "P3109 value tables", "digests": digests}, indent=0))


def digest(values: list[float]) -> str:
    """Of the values of all codes of a format; all NaNs are one."""
    numbers = b"".join(struct.pack(">d", math.nan if math.isnan(value) else value) for value in values)
    return hashlib.sha256(numbers).hexdigest()[:16]


def _number(text: str) -> float | None:
    """The number of a text such as -0x1.8p-3 or Inf; None where it is no float64 number."""
    if "x" not in text:
        return float(text)
    digits, _, exponent = text.replace("0x", "").partition("p")
    whole, _, fraction = digits.partition(".")
    exact = Fraction(int(whole + fraction, 16)) * Fraction(2) ** (int(exponent) - 4 * len(fraction))
    try:
        number = float(exact)
    except OverflowError:
        return None
    return number if Fraction(number) == exact else None


def _order(path: Path) -> tuple[int, int, str]:
    width, _, precision = path.stem.lower().removeprefix("binary")[:-2].partition("p")
    return int(width), int(precision), path.stem


if __name__ == "__main__":
    main()
