"""The order in which rows are seen."""

import functools
import math
import operator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int


@dataclass(frozen=True)
class Batches:
    """An endless sequence of training batches with random access.

    `batches[step]` holds the row numbers of batch number `step`. Each epoch is a
    fresh permutation of all rows; the epochs are laid end to end and cut every
    `batch_size` rows, so the rows left over at the end of an epoch open the batch
    that continues with the next one. No row is dropped and every batch has the same
    shape. Nothing is replayed to reach a batch: a run that resumes at step k gets
    the very same batch k.

    **Arguments:**

    - `n`: Number of rows.
    - `batch_size`: Rows in a batch.
    - `seed`: The order is a function of this alone.

    **Raises:**

    - `ValueError` if `n` or `batch_size` is below one, or `seed` is negative.
    """

    n: int
    batch_size: int
    seed: int

    def __post_init__(self):
        _check_at_least("n", self.n, 1)
        _check_at_least("batch_size", self.batch_size, 1)
        _check_at_least("seed", self.seed, 0)

    def __getitem__(self, step: int) -> Int[np.ndarray, " batch_size"]:
        if operator.index(step) < 0:
            raise IndexError(f"step must not be negative, got {step}")
        start = operator.index(step) * self.batch_size
        stop = start + self.batch_size
        epochs = range(start // self.n, (stop - 1) // self.n + 1)
        rows = np.concatenate([permutation(self.n, self.seed, e) for e in epochs])
        return rows[start % self.n :][: self.batch_size]


def padded_batches(
    n: int, batch_size: int
) -> list[tuple[Int[np.ndarray, " batch_size"], Bool[np.ndarray, " batch_size"]]]:
    """Batches for evaluation: every row once and in order, all of one shape.

    The last batch is filled up with rows from the beginning, whose mask is `False`.
    (Real rows rather than zeros: a batch is one ODE state, so what it is filled up
    with takes part in the choice of step sizes.)

    **Arguments:**

    - `n`: Number of rows.
    - `batch_size`: Rows in a batch.

    **Returns:**

    A list of pairs `(indices, mask)`; the rows `indices[mask]` of all pairs together
    are 0 to n - 1.

    **Raises:**

    - `ValueError` if `n` or `batch_size` is below one.
    """
    _check_at_least("n", n, 1)
    _check_at_least("batch_size", batch_size, 1)
    positions = np.arange(math.ceil(n / batch_size) * batch_size)
    positions = positions.reshape(-1, batch_size)
    return list(zip(positions % n, positions < n, strict=True))


def _check_at_least(name: str, value: int, least: int) -> None:
    if operator.index(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


@functools.lru_cache(maxsize=8)
def permutation(n: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    # Sorting raw bits, not `Generator.permutation`: NumPy keeps the bit stream of a
    # seed the same in every version, but not what a Generator makes of it.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(n), kind="stable")
