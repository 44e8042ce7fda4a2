"""From a parameters file to configurations."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ._classification import CIFAR10, CIFAR10MultiScale, MNISTNode, MNISTNSDE
from ._config import Config
from ._physionet import PhysioNet
from ._spiral import Spiral

# The experiments, by name, in the order in which they are run.
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
