"""From a configuration to a trained model and a record."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax

from .. import records
from ..training import State
from ._config import Config
from ._times import time_predictions
from ._train import origin, train


class Run(NamedTuple):
    """A finished run: the trained model and its record."""

    model: eqx.Module
    record: dict[str, Any]


def run(
    config: Config,
    *,
    checkpoint: Path | None = None,
    deadline: float = math.inf,
    progress: bool = True,
    shard: bool = False,
) -> Run | None:
    """Trains and evaluates one model.

    **Arguments:**

    - `config`: What to run.
    - `checkpoint`: A file to resume from and to write to.
    - `deadline`: Stop cleanly at this `time.monotonic()`.
    - `progress`: Whether to show a progress bar.
    - `shard`: Whether to divide every training batch over all devices.

    **Returns:**

    A `Run`; `None` if the training was stopped before its end.

    **Raises:**

    - `lrnde.training.TrainingError` if it cannot go on, and `RuntimeError` if a solve
        of the evaluation does not reach its end.
    - `lrnde.data.DataError` if the data cannot be had; `ValueError` if they are not of
        this experiment's kind, or a batch cannot be divided (`shard`).
    """
    last = origin(config, shard)
    with jax.default_matmul_precision(config.precision):
        dataset = config.load_data()
        state = train(config, dataset, checkpoint, deadline, progress, shard)
        if state.step < config.steps:
            return None
        provenance = records.joined([*state.origins, last])
        return Run(state.model, _record(config, dataset, state, provenance))


def _record(config: Config, dataset, state: State, provenance) -> dict[str, Any]:
    metrics = config.metrics(state.model, dataset)
    predict, size = config.prediction(dataset)
    seconds = time_predictions(predict, {"model": state.model})["model"]
    return records.seal(
        dict(
            experiment=config.experiment,
            tier=config.tier,
            method=config.method,
            seed=config.seed,
            config=asdict(config),
            metrics=metrics,
            times=dict(
                compile_seconds=state.compile_seconds,
                train_seconds=state.seconds,
                train_step_seconds=state.seconds / config.steps,
                predict_seconds=seconds,
                predict_batch=size,
            ),
            curves=state.history.curves,
            provenance=provenance,
        )
    )
