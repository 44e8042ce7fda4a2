"""How long predictions and training steps of trained models take."""

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from .._random import GENERATOR
from ..timing import interleave
from ..training import schedule
from ._config import Config
from ._train import load_state, train_step


def time_predictions(
    predict: Callable[[eqx.Module], Any],
    models: Mapping[str, eqx.Module],
    repeats: int = 20,
) -> dict[str, float]:
    """Times predictions of several models side by side.

    The models take turns, so that a change in the machine's speed meets all of them.

    **Arguments:**

    - `predict`: What to time, a function of the model.
    - `models`: From a name to a model.
    - `repeats`: How often every model is timed, after a run that compiles.

    **Returns:**

    From the name to the median wall time of one prediction, in seconds.
    """
    calls = {
        name: functools.partial(_predict, predict, model)
        for name, model in models.items()
    }
    return _medians(interleave(calls, repeats))


@eqx.filter_jit
def _predict(predict, model):
    # The runs of an experiment ask for equal predictions, a `jax.tree_util.Partial` of
    # one function, and so compile them once.
    return predict(model)


def _medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(times) for name, times in seconds.items()}


class Times(NamedTuple):
    """Median wall times of a trained model, in seconds.

    - `predict_seconds`: One prediction, `Config.prediction`.
    - `train_step_seconds`: One training step, as the next one would be.
    """

    predict_seconds: float
    train_step_seconds: float


def measure(
    configs: list[Config], checkpoints: Callable[[Config], Path], repeats: int = 20
) -> dict[str, Times]:
    """Times trained models side by side, on a machine that does nothing else.

    The models take turns, so that a change in the machine's speed meets all of them.

    **Arguments:**

    - `configs`: Runs that have finished, of one experiment and tier.
    - `checkpoints`: From a configuration to its checkpoint.
    - `repeats`: How often each is timed.

    **Returns:**

    From `Config.name` to its `Times`.

    **Raises:**

    - `ValueError` if the runs differ in what they are timed on: data, the sizes of
        batches or precision.
    - `lrnde.training.TrainingError` and `FileNotFoundError` as `load_state`.
    - `lrnde.data.DataError` if the data cannot be had.
    """
    first = configs[0]
    for name in first.timed_on:
        values = {getattr(config, name) for config in configs}
        if len(values) > 1:
            raise ValueError(
                f"{first.experiment}: runs with different {name} cannot be timed side "
                f"by side: {', '.join(map(str, values))}."
            )
    dataset = first.load_data()
    states = {c.name: load_state(c, dataset, checkpoints(c)) for c in configs}
    with jax.default_matmul_precision(first.precision):
        predict = time_predictions(
            first.prediction(dataset)[0],
            {name: state.model for name, state in states.items()},
            repeats,
        )
        train = _time_train_steps(configs, states, dataset, repeats)
    return {name: Times(predict[name], train[name]) for name in states}


def _time_train_steps(configs, states, dataset, repeats) -> dict[str, float]:
    batch = configs[0].batches(dataset)(0)
    keys = itertools.count()

    def next_step(config):
        state, seed = states[config.name], next(keys) // len(configs)
        key = jr.key(seed, impl=GENERATOR)
        weight = schedule(config.weight, config.steps)(state.step)
        numbers = key, jnp.asarray(state.step), jnp.asarray(weight, float)
        while True:
            trained, outcome = train_step(config)(
                state.model, state.opt_state, batch, *numbers, state.budget.steps
            )
            # As in training. If it happens, then in few of the rounds.
            if outcome.evaluation.successful or not state.budget.grow():
                return trained, outcome

    calls = {c.name: functools.partial(next_step, c) for c in configs}
    return _medians(interleave(calls, repeats))
