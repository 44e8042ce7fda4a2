"""Parts of a training set."""

from dataclasses import fields, replace
from typing import TypeVar

import numpy as np

from ._batches import permutation
from ._images import Dataset
from ._series import TimeSeries

_Data = TypeVar("_Data", Dataset, TimeSeries)


def validation_split(dataset: _Data, size: int, seed: int) -> _Data:
    """Hold out a part of the training set, to choose settings by.

    The test set plays no part in the result, so nothing can be tuned on it.

    **Arguments:**

    - `dataset`: The data set whose training part is split.
    - `size`: Number of training rows to hold out.
    - `seed`: The held-out rows are a function of this alone.

    **Returns:**

    A data set of the same kind that trains on the rows that remain and whose test
    part is the rows held out. Its name ends in `-validation`.

    **Raises:**

    - `ValueError` unless at least one row is held out and at least one remains.
    """
    held_out = _drawn(dataset, size, seed)
    parts = {}
    for name, rows in _training_part(dataset).items():
        parts[name] = rows[~held_out]
        parts[name.removesuffix("train") + "test"] = rows[held_out]
    return replace(dataset, **parts, name=f"{dataset.name}-validation")


def training_subset(dataset: _Data, size: int, seed: int) -> _Data:
    """Keep a part of the training set, and the whole test set.

    **Arguments:**

    - `dataset`: The data set whose training part is made smaller.
    - `size`: Number of training rows to keep.
    - `seed`: The kept rows are a function of this alone.

    **Returns:**

    A data set of the same kind, the kept rows in their order, with their number at the
    end of its name.

    **Raises:**

    - `ValueError` unless at least one row is kept and at least one is not.
    """
    kept = _drawn(dataset, size, seed)
    parts = {name: rows[kept] for name, rows in _training_part(dataset).items()}
    return replace(dataset, **parts, name=f"{dataset.name}-{size}")


def _drawn(dataset, size: int, seed: int) -> np.ndarray:
    n = len(dataset.x_train)
    if not 0 < size < n:
        raise ValueError(f"size must be from 1 to {n - 1}, not {size}")
    drawn = np.zeros(n, bool)
    drawn[permutation(n, seed, 0)[:size]] = True
    return drawn


def _training_part(dataset) -> dict[str, np.ndarray]:
    names = (field.name for field in fields(dataset) if field.name.endswith("_train"))
    rows = {name: getattr(dataset, name) for name in names}
    return {name: part for name, part in rows.items() if part is not None}
