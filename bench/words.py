"""The random words of stochastic rounding, for tests of random numbers: python bench/words.py one | dieharder -a -g 200

one     the words of one key: those of the elements of one tensor, element after element
many    1,000 words of each of the keys of steps 0, 1, 2, ... of one tensor, as a training run takes them

Writes 32-bit words to the standard output until nobody reads them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np

from low_precision.noise import Key, words

COUNT = 2**20


def stream(kind: str) -> Iterator[np.ndarray]:
    key = Key.of(42, "weights", "weight")
    for number in itertools.count():
        if kind == "one":
            yield words(key, number * COUNT, COUNT).numpy()
        else:
            yield np.concatenate([words(key.fold(1000 * number + step), 0, 1000).numpy() for step in range(1000)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("one", "many"))
    kind = parser.parse_args().kind
    with suppress(BrokenPipeError):
        for part in stream(kind):
            sys.stdout.buffer.write(part.tobytes())
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
