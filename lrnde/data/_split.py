"""Holding out a part of a training set."""

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

    A `ValueError` unless at least one row is held out and at least one remains.
    """
    n = len(dataset.x_train)
    if not 0 < size < n:
        raise ValueError(f"size must be from 1 to {n - 1}, not {size}")
    held_out = np.zeros(n, bool)
    held_out[permutation(n, seed, 0)[:size]] = True
    parts = {}
    for name in (field.name for field in fields(dataset)):
        rows = getattr(dataset, name)
        if name.endswith("_train") and rows is not None:
            parts[name] = rows[~held_out]
            parts[name.removesuffix("train") + "test"] = rows[held_out]
    return replace(dataset, **parts, name=f"{dataset.name}-validation")
