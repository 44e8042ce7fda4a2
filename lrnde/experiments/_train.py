"""Training the model of a configuration."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from .. import records
from ..training import fit, load_checkpoint, make_step, new_state, schedule, State
from ._config import Config, REGULARIZERS


def origin(config: Config, shard: bool) -> dict[str, Any]:
    """Where and with what code this process trains, `lrnde.records.provenance`."""
    devices = jax.device_count() if shard else 1
    return records.provenance(config.precision, devices)


def train(
    config: Config,
    dataset: Any,
    checkpoint: Path | None = None,
    deadline: float = math.inf,
    progress: bool = True,
    shard: bool = False,
) -> State:
    """Trains the model of a configuration; see `run` and `lrnde.training.fit`."""
    with jax.default_matmul_precision(config.precision):
        return fit(
            config.make_model(dataset),
            config.objective,
            config.batches(dataset),
            steps=config.steps,
            optimizer=config.make_optimizer(),
            key=config.key(1),
            regularizer=REGULARIZERS[config.method],
            weight=schedule(config.weight, config.steps),
            train_step=train_step(config),
            budget=config.budget(),
            sharding=config.sharding() if shard else None,
            checkpoint=checkpoint,
            identity=config.identity,
            origin=origin(config, shard),
            deadline=deadline,
            progress=progress,
        )


def load_state(config: Config, dataset: Any, checkpoint: Path) -> State:
    """What a run has come to, from its checkpoint.

    **Raises:**

    - `lrnde.training.TrainingError` as `lrnde.training.load_checkpoint`;
        `FileNotFoundError` if there is none.
    """
    like = new_state(config.make_model(dataset), config.make_optimizer())
    return load_checkpoint(checkpoint, like, config.identity)


_TRAIN_STEPS: dict[tuple, Callable] = {}


def train_step(config: Config) -> Callable:
    """The training step of a configuration; see `lrnde.training.make_step`.

    Configurations that differ in nothing but the seed and the weight get the same
    function, so one process compiles it once for all seeds of a method.
    """
    different = {"seed": None, "weight": None}
    settings = json.dumps(asdict(config) | different, sort_keys=True)
    # In a notebook, a class or a regularizer may be made anew under its old name.
    regularizer = REGULARIZERS[config.method]
    same = type(config), id(regularizer), settings
    if same not in _TRAIN_STEPS:
        _TRAIN_STEPS[same] = make_step(
            config.objective, config.make_optimizer(), regularizer
        )
    return _TRAIN_STEPS[same]
