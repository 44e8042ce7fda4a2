"""Time series with missing values."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from ._batches import permutation


@dataclass(frozen=True, eq=False, repr=False)
class TimeSeries:
    """Series that are observed at some of a common grid of times.

    They are split into a training and a test part. Values are normalised channel by
    channel: a value is `low + x * (high - low)`.

    **Arguments:**

    - `times`: The grid of times, increasing, within [0, 1].
    - `x_train`: Normalised values of the training series, 0 where not observed.
    - `mask_train`: Where the training series are observed.
    - `x_test`: Values of the test series, as `x_train`.
    - `mask_test`: Where the test series are observed.
    - `channels`: Names of the channels.
    - `low`: What 0 stands for in each channel.
    - `high`: What 1 stands for in each channel.
    - `name`: What the data set is called in tables and records.
    - `counts`: What was found and done while the data was read.
    - `truth_train`: Values of the training series at all times and free of noise, as
        `x_train`, where they are known.
    - `truth_test`: Those of the test series.

    **Raises:**

    - `ValueError` if the arrays do not fit together.
    """

    times: Float[np.ndarray, " times"]
    x_train: Float[np.ndarray, "n_train times channels"]
    mask_train: Bool[np.ndarray, "n_train times channels"]
    x_test: Float[np.ndarray, "n_test times channels"]
    mask_test: Bool[np.ndarray, "n_test times channels"]
    channels: tuple[str, ...]
    low: Float[np.ndarray, " channels"]
    high: Float[np.ndarray, " channels"]
    name: str
    counts: Mapping[str, int] = field(default_factory=dict)
    truth_train: Float[np.ndarray, "n_train times channels"] | None = None
    truth_test: Float[np.ndarray, "n_test times channels"] | None = None

    def __post_init__(self):
        grid = len(self.times), len(self.channels)
        shapes = {"low": grid[1:], "high": grid[1:]}
        for part in ("train", "test"):
            shape = len(getattr(self, f"x_{part}")), *grid
            shapes |= {f"{kind}_{part}": shape for kind in ("x", "mask", "truth")}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(
                    f"{name} of {self.name!r} has shape {array.shape}; {grid[0]} times "
                    f"and {grid[1]} channels need {shape}"
                )
        if (self.truth_train is None) != (self.truth_test is None):
            raise ValueError(f"only one part of {self.name!r} has its truth")
        within = np.all((0 <= self.times) & (self.times <= 1))
        if not (within and np.all(np.diff(self.times) > 0)):
            raise ValueError(f"times of {self.name!r} must increase within [0, 1]")

    def __repr__(self):
        train, test = self.mask_train, self.mask_test
        observed = (train.sum() + test.sum()) / (train.size + test.size)
        counts = (f"\n  {name}: {count:,}" for name, count in self.counts.items())
        return (
            f"{self.name}: {len(train):,} training and {len(test):,} test series of "
            f"{len(self.channels)} channels at {len(self.times)} times, "
            f"{100 * observed:.1f} % observed{''.join(counts)}"
        )


def normalised_split(
    name: str,
    times: Float[np.ndarray, " times"],
    values: Float[np.ndarray, "n times channels"],
    mask: Bool[np.ndarray, "n times channels"],
    channels: tuple[str, ...],
    seed: int = 0,
    truth: Float[np.ndarray, "n times channels"] | None = None,
    counts: Mapping[str, int] | None = None,
) -> TimeSeries:
    """Split series into a training and a test part and normalise their values.

    One series in five is held out for testing. Within a channel, 0 and 1 stand for
    the least and the largest value observed in the training part; the test part plays
    no role. A channel that is constant there is only shifted, and one that is never
    observed there is left as it is.

    **Arguments:**

    - `name`, `times`, `channels`, `counts`: As in `TimeSeries`.
    - `values`: The values; those not observed may be anything.
    - `mask`: Where they are observed.
    - `seed`: The split is a function of this and the number of series alone.
    - `truth`: Values at all times and free of noise, where they are known.

    **Returns:**

    The `TimeSeries`. In both parts the series keep their order.

    **Raises:**

    - `ValueError` if there are fewer than three series, too few to split.
    """
    n = len(values)
    if n < 3:
        raise ValueError(f"{name!r} has {n} series; three or more can be split")
    test = np.zeros(n, bool)
    test[permutation(n, seed, 0)[: round(n / 5)]] = True
    low, high = _range(values, mask & ~test[:, None, None])

    def normalise(x):
        return ((x - low) / (high - low)).astype(np.float32)

    parts = {}
    for part, rows in ("train", ~test), ("test", test):
        parts[f"x_{part}"] = normalise(np.where(mask[rows], values[rows], low))
        parts[f"mask_{part}"] = mask[rows]
        parts[f"truth_{part}"] = None if truth is None else normalise(truth[rows])
    return TimeSeries(
        times=times,
        channels=channels,
        low=low,
        high=high,
        name=name,
        counts={} if counts is None else counts,
        **parts,
    )


def _range(
    values: Float[np.ndarray, "n times channels"],
    mask: Bool[np.ndarray, "n times channels"],
) -> tuple[Float[np.ndarray, " channels"], Float[np.ndarray, " channels"]]:
    """The least and the largest observed value of each channel, always apart."""
    low = np.min(values, axis=(0, 1), where=mask, initial=np.inf)
    high = np.max(values, axis=(0, 1), where=mask, initial=-np.inf)
    low[~np.any(mask, axis=(0, 1))] = 0
    return low, np.where(high > low, high, low + 1)
