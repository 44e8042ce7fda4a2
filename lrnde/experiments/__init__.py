"""Experiments: from a configuration to a trained model and a record.

The notebooks and `python -m lrnde.run` both call `run`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ._classification import CIFAR10 as CIFAR10
from ._classification import CIFAR10MultiScale as CIFAR10MultiScale
from ._classification import classification as classification
from ._classification import Classifier as Classifier
from ._classification import evaluate as evaluate
from ._classification import MNISTNode as MNISTNode
from ._classification import MNISTNSDE as MNISTNSDE
from ._classification import Scores as Scores
from ._config import Config as Config
from ._config import DatasetConfig as DatasetConfig
from ._config import OPTIMIZERS as OPTIMIZERS
from ._config import REGULARIZERS as REGULARIZERS
from ._config import SOLVERS as SOLVERS
from ._physionet import evaluate_series as evaluate_series
from ._physionet import PhysioNet as PhysioNet
from ._physionet import SeriesScores as SeriesScores
from ._physionet import steps_along as steps_along
from ._physionet import Task as Task
from ._physionet import tasks as tasks
from ._run import Run as Run
from ._run import run as run
from ._spiral import Spiral as Spiral
from ._times import measure as measure
from ._times import time_predictions as time_predictions
from ._times import Times as Times
from ._train import load_state as load_state
from ._train import train as train
from ._train import train_step as train_step

EXPERIMENTS: dict[str, type[Config]] = {
    config.experiment: config
    for config in (
        MNISTNode,
        MNISTNSDE,
        PhysioNet,
        CIFAR10,
        CIFAR10MultiScale,
        Spiral,
    )
}


def configs(settings: Mapping[str, Any]) -> list[Config]:
    """One configuration for each method and seed of a parameters file.

    **Arguments:**

    - `settings`: `experiment`, one of `EXPERIMENTS`, and the fields of its `Config`,
        with `methods` and `seeds` (lists) in place of `method` and `seed`. `weights`
        maps a method to its own `weight`.

    **Returns:**

    A list, seeds first: all methods of the first seed, then those of the second.

    **Raises:**

    - `ValueError` without lists of methods and seeds, for an unknown experiment or
        setting, for a weight of a method that is not there, and as `Config`.
    """
    settings = dict(settings)
    for name in ("experiment", "methods", "seeds"):
        if name not in settings:
            raise ValueError(f"no {name} in these settings: {', '.join(settings)}.")
    if settings["experiment"] not in EXPERIMENTS:
        raise ValueError(
            f"experiment={settings['experiment']!r} is not known; choose one of "
            f"{', '.join(EXPERIMENTS)}."
        )
    make = EXPERIMENTS[settings["experiment"]]
    methods, seeds = settings.pop("methods"), settings.pop("seeds")
    weights = settings.pop("weights", None) or {}
    for name, value in {"methods": methods, "seeds": seeds}.items():
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}={value!r} must be a list.")
    if surplus := set(settings) - {field.name for field in fields(make)}:
        raise ValueError(
            f"{settings['experiment']} has no setting {', '.join(sorted(surplus))}."
        )
    unknown = set(weights) - set(methods)
    if unknown:
        raise ValueError(f"weights of {sorted(unknown)}, which are not in methods.")

    def own(method):
        return {"weight": weights[method]} if method in weights else {}

    return [
        make(**{**settings, **own(method), "method": method, "seed": seed})
        for seed in seeds
        for method in methods
    ]
