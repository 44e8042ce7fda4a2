"""Time series with a latent ODE: PhysioNet 2012, and oscillators in its place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Bool, Float

from .. import data
from .._random import draw, GENERATOR
from ..models import LatentODE
from ..objectives import (
    gaussian_log_likelihood,
    kl_annealing,
    kl_divergence,
    squared_error,
)
from ..training import shardings
from ._config import DatasetConfig
from ._evaluation import by_part, check_solved, evaluation_of, in_batches, MAX_STEPS

# Of the observed entries, how many interpolation hides from the encoder.
_HIDDEN = 0.2

# Parts of the time for which a record counts the steps.
_WINDOWS = 16


class Task(NamedTuple):
    """Which entries the encoder sees, and which ones a prediction is judged by."""

    seen: Bool[np.ndarray, "series times channels"]
    asked: Bool[np.ndarray, "series times channels"]


def tasks(
    times: Float[np.ndarray, " times"],
    mask: Bool[np.ndarray, "series times channels"],
) -> dict[str, Task]:
    """The three tasks of a latent ODE, whose errors are never mixed.

    - `reconstruction`: All observed entries are seen, and asked for.
    - `interpolation`: One observed entry in five, drawn at random and always the same,
        is hidden from the encoder; those are asked for.
    - `extrapolation`: What was observed up to the middle of the time is seen; what was
        observed later is asked for.
    """
    # In single precision and with this generator: the same entries are hidden in double
    # precision, and whatever generator JAX is told to use.
    key = jr.key(0, impl=GENERATOR)
    hidden = np.asarray(draw(jr.bernoulli, key, mask.shape, p=jnp.float32(_HIDDEN)))
    late = (times > (times[0] + times[-1]) / 2)[:, None]
    return {
        "reconstruction": Task(mask, mask),
        "interpolation": Task(mask & ~hidden, mask & hidden),
        "extrapolation": Task(mask & ~late, mask & late),
    }


class SeriesScores(NamedTuple):
    """Means over the series of which an entry was asked for.

    - `loss`: The objective of the training, with the divergence at weight one, and with
        the mean of the initial state in place of a draw.
    - `mse`: The masked mean squared error, `lrnde.objectives.squared_error`.
    - `nfe`: Mean over batches.
    """

    loss: float
    mse: float
    nfe: float


@eqx.filter_jit
def _score(model, times, x, task, deviation):
    out = model(times, x, task.seen, max_steps=MAX_STEPS)
    likelihood = gaussian_log_likelihood(out.x, x, task.asked, deviation)
    loss = kl_divergence(*out.posterior) - likelihood
    error = squared_error(out.x, x, task.asked)
    return (loss, error), out.nfe, out.successful


def evaluate_series(
    model: LatentODE,
    times: Float[np.ndarray, " times"],
    x: Float[np.ndarray, "series times channels"],
    task: Task,
    batch_size: int,
    deviation: float,
) -> SeriesScores:
    """Evaluates a latent ODE at the means of its initial states; no regularizer.

    **Arguments:**

    - `model`: The latent ODE.
    - `times`, `x`: The series.
    - `task`: What is seen and what is asked for; see `tasks`.
    - `batch_size`: Series in one solve, which the NFE depends on.
    - `deviation`: Standard deviation of the observations.

    **Raises:**

    - `RuntimeError` if a solve does not reach its end.
    """

    def score(number, rows, mask):
        part = Task(task.seen[rows], task.asked[rows])
        found, *cost = _score(model, times, x[rows], part, deviation)
        counted = mask & part.asked.any(axis=(1, 2))
        return [np.asarray(values)[counted] for values in found], *cost

    scores, nfe = in_batches(score, len(x), batch_size)
    loss, mse = (
        float(np.concatenate(column).mean(dtype=float))
        for column in zip(*scores, strict=True)
    )
    return SeriesScores(loss, mse, nfe)


def steps_along(
    model: LatentODE,
    times: Float[np.ndarray, " times"],
    x: Float[np.ndarray, "batch times channels"],
    mask: Bool[np.ndarray, "batch times channels"],
    windows: int,
) -> Float[np.ndarray, " windows"]:
    """Where a solve spends its steps.

    **Arguments:**

    - `model`: The latent ODE.
    - `times`, `x`, `mask`: A batch of series.
    - `windows`: Into how many parts of equal length the time is divided.

    **Returns:**

    The accepted steps in each part, $\\int dt / h(t)$: a step that lies in two counts
    in both by the share of its length. They add up to the steps of the solve.
    """
    y0 = model.encode(*map(jnp.asarray, (times, x, mask))).mean
    saveat = diffrax.SaveAt(t0=True, steps=True, fn=lambda t, y, args: t)
    solve = eqx.filter_jit(model.ode.solve)
    span = {"t0": float(times[0]), "t1": float(times[-1])}
    sol, _ = solve(y0, **span, saveat=saveat, max_steps=MAX_STEPS)
    check_solved(bool(diffrax.is_successful(sol.result)))
    ends = np.asarray(sol.ts)[: int(sol.stats["num_accepted_steps"]) + 1]
    edges = np.linspace(times[0], times[-1], windows + 1)
    return np.diff(np.interp(edges, ends, np.arange(len(ends))))


def _predict(times, x, mask, model):
    return model(times, x, mask, max_steps=MAX_STEPS).x


@dataclass(frozen=True)
class PhysioNet(DatasetConfig):
    """A latent ODE, the third experiment of Pal et al. (2023).

    **Arguments:** those of `DatasetConfig`, and

    - `latent`: Length of the state.
    - `hidden`, `depth`: Width and number of the vector field's blocks.
    - `encoder_size`, `encoder_hidden`: Length of either vector of the encoder, and
        width of its hidden layers.
    - `deviation`: Standard deviation of the observations in the likelihood.
    - `kl_wait`, `kl_rate`: See `lrnde.objectives.kl_annealing`.
    """

    data_type = data.TimeSeries
    least = DatasetConfig.least | {"kl_wait": 0}

    experiment: str = "physionet"
    dataset: str = "oscillators"
    optimizer: str = "adamax"
    latent: int = 20
    hidden: int = 40
    depth: int = 4
    encoder_size: int = 50
    encoder_hidden: int = 40
    deviation: float = 0.01
    kl_wait: int = 100
    kl_rate: float = 0.99

    def __post_init__(self):
        super().__post_init__()
        if self.deviation <= 0:
            raise ValueError(f"deviation={self.deviation} must be positive.")
        if not 0 <= self.kl_rate < 1:
            raise ValueError(f"kl_rate={self.kl_rate} must be in [0, 1).")

    def make_model(self, dataset) -> LatentODE:
        """The untrained model."""
        return LatentODE(
            len(dataset.channels),
            latent=self.latent,
            hidden=self.hidden,
            depth=self.depth,
            encoder_size=self.encoder_size,
            encoder_hidden=self.encoder_hidden,
            solver=self.make_solver(),
            tolerance=self.tolerance,
            key=self.key(0),
        )

    def batches(self, dataset):
        times, x, mask = map(
            jnp.asarray, (dataset.times, dataset.x_train, dataset.mask_train)
        )
        order = self.order(dataset)

        def batch(step):
            rows = jnp.asarray(order[step])
            # An array, so that a new weight compiles nothing anew.
            weight = jnp.asarray(kl_annealing(step, self.kl_wait, self.kl_rate))
            return times, x[rows], mask[rows], weight

        return batch

    def sharding(self):
        split, whole = shardings(self.batch_size)
        return whole, split, split, whole

    def objective(self, model, batch, **kwargs):
        times, x, mask, kl_weight = batch
        out = model(times, x, mask, **kwargs)
        likelihood = gaussian_log_likelihood(out.x, x, mask, self.deviation)
        divergence = kl_divergence(*out.posterior)
        merits = {
            "mse": jnp.mean(squared_error(out.x, x, mask)),
            "kl": jnp.mean(divergence),
        }
        return evaluation_of(jnp.mean(kl_weight * divergence - likelihood), merits, out)

    def metrics(self, model, dataset):
        head = slice(self.eval_train_size)
        mask = dataset.mask_train[head]
        test = tasks(dataset.times, dataset.mask_test)

        def score(x, task):
            return evaluate_series(
                model, dataset.times, x, task, self.eval_batch_size, self.deviation
            )

        scores = {
            "train": score(dataset.x_train[head], Task(mask, mask)),
            "test": score(dataset.x_test, test["reconstruction"]),
        }
        errors = {
            f"test_{name}_mse": score(dataset.x_test, test[name]).mse
            for name in ("interpolation", "extrapolation")
        }
        first = slice(self.eval_batch_size)
        steps = steps_along(
            model,
            dataset.times,
            dataset.x_test[first],
            dataset.mask_test[first],
            _WINDOWS,
        )
        along = {f"test_steps_{k:02}": float(n) for k, n in enumerate(steps, 1)}
        return by_part(scores) | errors | along

    def prediction(self, dataset) -> tuple[Callable[[LatentODE], Any], int]:
        head = slice(self.eval_batch_size)
        times, x, mask = map(
            jnp.asarray, (dataset.times, dataset.x_test[head], dataset.mask_test[head])
        )
        # The data are arguments, too: as constants they take the compiler seconds.
        return jtu.Partial(_predict, times, x, mask), len(x)
