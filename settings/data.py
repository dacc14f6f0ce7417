"""The settings of the data."""

from __future__ import annotations

from dataclasses import dataclass

from data import TEST_SPLIT
from settings import kinds
from settings.setting import of_group

setting = of_group("data")


@dataclass(frozen=True)
class DataSettings:
    """What is learned from."""

    dataset: str = setting("toy", kinds.DATASET, "data set")
    test_split: float = setting(
        TEST_SPLIT,
        kinds.number("a fraction, 0 < f < 1; not of a set that has its own split", lambda f: 0 < f < 1),
        "share of the rows kept for testing",
    )
    scale_on: str = setting("train", kinds.one_of("train", "all"), "rows on which the scalers are fitted")
    data_dir: str | None = setting(
        None,
        kinds.or_none(kinds.FOLDER),
        "where downloads are kept, or already lie",
        default_text="the user's cache folder",
    )
    files_dir: str | None = setting(
        None,
        kinds.or_none(kinds.FOLDER),
        "from where a relative FILE of dataset, model or optimizer is taken",
        default_text="the current folder",
    )
