"""A neural SDE learns the means and variances of a spiral."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from .. import simulated
from ..models import SpiralSDE
from ..objectives import moment_distance
from ..training import StepBudget
from ._config import Config, constant
from ._evaluation import check_solved, evaluation_of, MAX_STEPS


def _objective(model, batch, **kwargs):
    y0, times, means, variances = batch
    paths = model(y0, times, **kwargs)
    return evaluation_of(moment_distance(paths.states, means, variances), {}, paths)


# Functions of their own, so that the runs of one process compile them once.
@eqx.filter_jit
def _evaluate(model, batch, key, trajectories):
    return _objective(
        model, batch, key=key, trajectories=trajectories, max_steps=MAX_STEPS
    )


def _paths(y0, times, key, trajectories, model):
    return model(y0, times, key=key, trajectories=trajectories, max_steps=MAX_STEPS)


@dataclass(frozen=True)
class Spiral(Config):
    """A neural SDE on the spiral of Pal et al. (2021).

    **Arguments:** those of `Config`, and

    - `hidden`: Width of the drift's hidden layer.
    - `times`: How many times the moments are compared at.
    - `trajectories`: Paths in one solve.
    - `truth`: Paths that the true moments are made from.
    - `evaluations`: Solves that the reported loss is the mean of, each with new noise.
    """

    least = Config.least | {"times": 2, "trajectories": 2, "truth": 2}
    timed_on = (*Config.timed_on, "times", "trajectories")

    experiment: str = "spiral-sde"
    solver: str = "sosri"
    tolerance: float = 0.3
    steps: int = 250
    optimizer: str = "adabelief"
    learning_rate: dict[str, Any] = constant(1e-2)
    weight: dict[str, Any] = constant(0.1)
    hidden: int = 50
    times: int = 30
    trajectories: int = 100
    truth: int = 10_000
    evaluations: int = 20

    def load_data(self) -> simulated.Moments:
        """True means and variances."""
        return simulated.spiral(self.times, self.truth)

    def make_model(self, dataset) -> SpiralSDE:
        """The untrained model."""
        return SpiralSDE(
            self.hidden,
            solver=self.make_solver(),
            tolerance=self.tolerance,
            key=self.key(0),
        )

    def batches(self, dataset):
        batch = tuple(jnp.asarray(x) for x in dataset)
        return lambda step: batch

    def budget(self):
        # What a trained model takes; each smaller budget would be compiled in vain.
        return StepBudget(steps=128)

    def objective(self, model, batch, **kwargs):
        return _objective(model, batch, trajectories=self.trajectories, **kwargs)

    def metrics(self, model, dataset):
        """The loss with fresh noise, under the names of training and test.

        There is one initial state, so training and test differ in their noise alone.
        """
        batch = self.batches(dataset)(0)

        scores = {}
        for part, name in enumerate(("train", "test")):
            keys = jr.split(jr.fold_in(self.key(2), part), self.evaluations)
            found = [_evaluate(model, batch, key, self.trajectories) for key in keys]
            for metric in ("loss", "nfe"):
                values = [float(getattr(x, metric)) for x in found]
                scores[f"{name}_{metric}"] = sum(values) / len(values)
            check_solved(all(x.successful for x in found))
        return scores

    def prediction(self, dataset):
        y0, times, *_ = self.batches(dataset)(0)
        settings = y0, times, self.key(2), self.trajectories
        return jtu.Partial(_paths, *settings), self.trajectories
