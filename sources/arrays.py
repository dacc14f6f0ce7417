"""What a data set's function gives, checked and as numpy arrays: what is wrong is one line. No torch here."""

from __future__ import annotations

from typing import Any

import numpy as np

from low_precision.errors import SettingError, shown

LARGEST = 1e150  # of float64: the squares of larger ones, of which deviations are made, overflow
FORM = "(features, targets), or (train features, train targets, test features, test targets)"


def checked(name: str, result: Any) -> tuple[np.ndarray, ...]:
    """Features and targets, or those of the training and of the test rows, from what the data set `name` gives.

    result: a tuple or list of 2 or 4 arrays, tensors, or what numpy makes an array of.
    Features, any shape (n, ...): floats become float64; bytes (n, channels, height, width) stay as images; other whole
    numbers become int64. Of shape (n,) they become (n, 1). Targets (n,) or (n, 1): floats become float64 (n,), whole
    numbers int64 (n,): classes from 0 on.
    SettingError for the setting "dataset".
    """
    if not isinstance(result, tuple | list) or len(result) not in (2, 4):
        what = f"{len(result)} things" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
        raise _wrong(name, f"which gives {what}", FORM)
    arrays = [_array(name, thing, what) for thing, what in zip(result, _words(len(result)), strict=True)]
    halves = [(_features(name, x), _targets(name, y)) for x, y in zip(arrays[::2], arrays[1::2], strict=True)]
    for x, y in halves:
        if len(x) != len(y):
            raise _wrong(name, f"which gives {len(x)} samples and {len(y)} targets", "as many of one as of the other")
    if len(halves) == 2:
        (x, y), (test_x, test_y) = halves
        if x.shape[1:] != test_x.shape[1:] or x.dtype != test_x.dtype or y.dtype != test_y.dtype:
            kinds = " and ".join(f"{x.dtype} {x.shape} with targets {y.dtype}" for x, y in halves)
            raise _wrong(name, f"which gives {kinds}", "training and test samples of one kind and shape")
    _check_targets(name, np.concatenate([y for _, y in halves]))
    return tuple(array for half in halves for array in half)


def _wrong(name: str, what: str, allowed: str) -> SettingError:
    return SettingError("dataset", f"{name}, {what}", allowed)


def _words(count: int) -> list[str]:
    words = ["features", "targets"]
    return words if count == 2 else [f"{half} {word}" for half in ("train", "test") for word in words]


def _array(name: str, thing: Any, what: str) -> np.ndarray:
    if hasattr(thing, "detach") and hasattr(thing, "numpy"):  # a tensor; numpy knows no bfloat16
        if str(thing.layout) != "torch.strided":
            raise _wrong(name, f"whose {what} are a tensor of the layout {thing.layout}", "a dense one: to_dense()")
        thing = thing.detach().cpu()
        thing = thing.float().numpy() if thing.is_floating_point() and thing.itemsize < 4 else thing.numpy()
    if np.ma.is_masked(thing):  # the numbers behind a mask are nobody's, and an array without it would have them
        raise _wrong(name, f"whose {what} are masked in places", "a number in each place")
    try:
        array = np.asarray(thing)
    except (ValueError, TypeError):  # of rows of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "fiub":
        kind = f"{type(thing).__name__} of {array.dtype}" if array.dtype.kind in "OUSc" else str(array.dtype)
        raise _wrong(name, f"whose {what} are a {kind}", "an array of numbers")
    if array.ndim == 0 or array.size == 0:
        raise _wrong(name, f"whose {what} have the shape {array.shape}", "one row at least: (n, ...)")
    finite = np.isfinite(array)
    if array.dtype.kind == "f" and array.itemsize >= 8:
        finite &= np.abs(array) <= LARGEST
    if not finite.all():
        place = np.unravel_index(int(np.argmin(finite)), array.shape)
        raise _wrong(name, f"whose {what} are {array[place]} in row {place[0]}", f"finite numbers, up to {LARGEST:g}")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise _wrong(name, f"one of whose {what} is {array.max()}", "whole numbers of int64")
    return array


def _features(name: str, x: np.ndarray) -> np.ndarray:
    x = x[:, None] if x.ndim == 1 else x
    if x.dtype.kind in "fb":
        return np.ascontiguousarray(x, np.float64)
    is_images = x.dtype == np.uint8 and x.ndim == 4
    return np.array(x, np.uint8) if is_images else np.ascontiguousarray(x, np.int64)


def _targets(name: str, y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise _wrong(name, f"whose targets have the shape {y.shape}", "one number a sample: (n,)")
    return y.astype(np.float64 if y.dtype.kind == "f" else np.int64)


def _check_targets(name: str, y: np.ndarray) -> None:
    """y: of all rows."""
    if y.min() == y.max():
        raise _wrong(name, f"whose targets are all {shown(y[0])}", "targets that differ")
    if y.dtype.kind == "i" and y.min() < 0:
        raise _wrong(name, f"one of whose classes is {y.min()}", "classes from 0 on, or floats for regression")
    if y.dtype.kind == "i" and y.max() >= len(y):
        what = f"one of whose classes is {y.max()} with {len(y)} rows"
        raise _wrong(name, what, "as many classes as rows at most, from 0 on, or floats for regression")
