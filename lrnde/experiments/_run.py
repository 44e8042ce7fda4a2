"""Experiments: from a configuration to a trained model and a record.

The notebooks and `python -m lrnde.run` both call `run`. An experiment is a subclass of
`Config`, which says what its data, model, objective and metrics are.
"""

import abc
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import PyTree

from .. import _explicit, _sri, data, records
from .._integrals import Kinetic, Taylor
from .._random import GENERATOR
from .._regularizers import (
    GlobalError,
    GlobalStiffness,
    LocalError,
    LocalStiffness,
    Regularizers,
)
from .._steer import Steer
from ..timing import interleave
from ..training import (
    Evaluation,
    fit,
    load_checkpoint,
    make_step,
    schedule,
    shardings,
    State,
    StepBudget,
)

REGULARIZERS: dict[str, Regularizers] = {
    "vanilla": None,
    "unbiased": LocalError("unbiased"),
    "biased": LocalError("biased"),
    "error": LocalError("error"),
    "unbiased-4": LocalError("unbiased", samples=4),
    "stiffness-unbiased": LocalStiffness("unbiased"),
    "stiffness-biased": LocalStiffness("biased"),
    "global-error": GlobalError(),
    "global-stiffness": GlobalStiffness(),
    "steer": Steer(),
    "taylor": Taylor(),
    "kinetic": Kinetic(),
    "steer+global-error": [Steer(), GlobalError()],
    "steer+global-stiffness": [Steer(), GlobalStiffness()],
    "global-stiffness+global-error": [GlobalError(), (0.1, GlobalStiffness())],
    "steer+unbiased": [Steer(), LocalError("unbiased")],
}

SOLVERS = {
    "tsit5": _explicit.Tsit5,
    "dopri5": _explicit.Dopri5,
    "bosh3": _explicit.Bosh3,
    "dopri8": _explicit.Dopri8,
    "sosri": _sri.SOSRI,
    "sosri2": _sri.SOSRI2,
    "sriw2": _sri.SRIW2,
}

OPTIMIZERS = {"adam": optax.adam, "adamax": optax.adamax, "adabelief": optax.adabelief}


# What training may use, evaluation may use: it sets no memory aside for its steps.
MAX_STEPS = StepBudget().limit


def check_solved(successful: bool) -> None:
    """Raises a `RuntimeError` if a solve of the evaluation did not reach its end."""
    if not successful:
        raise RuntimeError(
            f"evaluation: a solve needs more than {MAX_STEPS} steps, the limit of the "
            "training. Loosen the tolerance or train with a larger weight."
        )


def constant(value: float):
    """A field of a configuration that holds a constant schedule."""
    return field(default_factory=lambda: {"kind": "constant", "value": value})


@dataclass(frozen=True)
class Config(abc.ABC):
    """Everything that decides the outcome of a run.

    Subclasses are experiments. They add settings of their own.

    **Arguments:**

    - `experiment`: Name of the experiment; the first folder of its records.
    - `tier`: Size of the run: smoke, book, cpu or paper.
    - `method`: One of `REGULARIZERS`.
    - `seed`: Decides initial parameters, order of the data, noise and sampled steps.
    - `solver`: One of `SOLVERS`.
    - `tolerance`: Relative and absolute tolerance of the solves.
    - `steps`: Training steps.
    - `optimizer`: One of `OPTIMIZERS`.
    - `learning_rate`: A `lrnde.training.schedule`.
    - `weight`: A `lrnde.training.schedule` of the penalty's weight. Without effect for
        the methods "vanilla" and "steer".
    - `precision`: Precision of matrix products, as in `jax.default_matmul_precision`.

    **Raises:**

    - `ValueError` for a setting that is none of the choices or out of its range.
    """

    experiment: str
    tier: str = "book"
    method: str = "vanilla"
    seed: int = 0
    solver: str = "tsit5"
    tolerance: float = 1e-6
    steps: int = 1000
    optimizer: str = "adam"
    learning_rate: dict[str, Any] = constant(1e-3)
    weight: dict[str, Any] = constant(1.0)
    precision: str = "highest"

    def __post_init__(self):
        for name, choices in (
            ("method", REGULARIZERS),
            ("solver", SOLVERS),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not known; choose one of "
                    f"{', '.join(choices)}."
                )
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} must be a whole number, from 0 on.")
        for name in self.counts():
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                problem = "must be a whole number, and at least 1."
                raise ValueError(f"{name}={getattr(self, name)!r}: {problem}")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.type is float and not isinstance(value, int | float):
                raise ValueError(
                    f"{setting.name}={value!r} must be a number. (YAML takes 1e-3 for "
                    "a text; write 1.0e-3.)"
                )
        if not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance} must be positive.")
        for spec in (self.learning_rate, self.weight):
            schedule(spec, self.steps)  # tells what is wrong with it

    @classmethod
    def counts(cls) -> tuple[str, ...]:
        """Settings that have to be at least one."""
        return ("steps",)

    @property
    def name(self) -> str:
        """Names the run within its experiment and tier."""
        return f"{self.method}-seed{self.seed}"

    @abc.abstractmethod
    def load_data(self) -> Any:
        """The data of the run."""

    @abc.abstractmethod
    def make_model(self, dataset: Any) -> eqx.Module:
        """The untrained model."""

    @abc.abstractmethod
    def batches(self, dataset: Any) -> Callable[[int], PyTree]:
        """From a training step to its batch."""

    @abc.abstractmethod
    def objective(self, model: eqx.Module, batch: PyTree, **kwargs) -> Evaluation:
        """What to train for; see `lrnde.training.fit`."""

    @abc.abstractmethod
    def metrics(self, model: eqx.Module, dataset: Any) -> dict[str, float]:
        """Losses, NFE and more of a trained model, on training and test data."""

    @abc.abstractmethod
    def prediction(self, dataset: Any) -> tuple[Callable[[eqx.Module], Any], int]:
        """A prediction to time, a function of the model, and how large its batch is."""

    def sharding(self) -> PyTree[jax.sharding.NamedSharding]:
        """How to lay a batch over all devices, with the structure of a batch.

        **Raises:**

        - `ValueError` if it cannot be divided among them.
        """
        raise ValueError(
            f"{self.experiment} has no batch to divide: every training step takes all "
            "of its data."
        )

    def make_solver(self) -> diffrax.AbstractSolver:
        """The solver."""
        return SOLVERS[self.solver]()

    def make_optimizer(self) -> optax.GradientTransformation:
        """The optimiser, its learning rate schedule included."""
        return OPTIMIZERS[self.optimizer](schedule(self.learning_rate, self.steps))

    def budget(self) -> StepBudget:
        """The step budget to start with."""
        return StepBudget()

    def key(self, purpose: int) -> jax.Array:
        """A key of the run: 0 for its parameters, 1 for training, 2 for evaluation."""
        return jr.fold_in(jr.key(self.seed, impl=GENERATOR), purpose)


@dataclass(frozen=True)
class DatasetConfig(Config):
    """An experiment that takes its batches from a data set.

    **Arguments:** those of `Config`, and

    - `dataset`: A data set of `lrnde.data.load`.
    - `validation`: Hold out that many training examples and report on them in place of
        the test set; for choosing settings. 0 reports on the test set.
    - `batch_size`: Training examples in one batch, which is one solve.
    - `eval_batch_size`: Examples in one batch of the evaluation.
    - `eval_train_size`: Training examples used for the training metrics.
    """

    data_type: ClassVar[type]

    dataset: str = "digits"
    validation: int = 0
    batch_size: int = 128
    eval_batch_size: int = 512
    eval_train_size: int = 10_000

    @classmethod
    def counts(cls):
        sizes = ("batch_size", "eval_batch_size", "eval_train_size")
        return (*super().counts(), *sizes)

    def load_data(self) -> data.Dataset | data.TimeSeries:
        """The data set, its test part replaced if validation is asked for.

        **Raises:**

        - `ValueError` if it is not of this experiment's `data_type`.
        """
        dataset = data.load(self.dataset)
        if not isinstance(dataset, self.data_type):
            raise ValueError(
                f"dataset={self.dataset!r} is a {type(dataset).__name__}; "
                f"{type(self).__name__} needs a {self.data_type.__name__}."
            )
        if self.validation:
            return data.validation_split(dataset, self.validation, seed=0)
        return dataset

    def sharding(self):
        return shardings(self.batch_size).split

    def order(self, dataset: data.Dataset | data.TimeSeries) -> data.Batches:
        """Which training examples are in which batch."""
        return data.Batches(len(dataset.x_train), self.batch_size, self.seed)


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
    """
    origin = _origin(config, shard)
    with jax.default_matmul_precision(config.precision):
        dataset = config.load_data()
        state = train(config, dataset, checkpoint, deadline, progress, shard)
        if state.step < config.steps:
            return None
        provenance = records.joined([*state.origins, origin])
        return Run(state.model, _record(config, dataset, state, provenance))


def _origin(config: Config, shard: bool) -> dict[str, Any]:
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
            identity=records.config_hash(asdict(config)),
            origin=_origin(config, shard),
            deadline=deadline,
            progress=progress,
        )


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


class Times(NamedTuple):
    """Median wall times of a trained model, in seconds.

    - `predict_seconds`: One prediction, `Config.prediction`.
    - `train_step_seconds`: One training step, as the next one would be.
    """

    predict_seconds: float
    train_step_seconds: float


def load_state(config: Config, dataset: Any, checkpoint: Path) -> State:
    """What a run has come to, from its checkpoint."""
    model = config.make_model(dataset)
    params = eqx.filter(model, eqx.is_inexact_array)
    like = State(model, config.make_optimizer().init(params))
    return load_checkpoint(checkpoint, like, records.config_hash(asdict(config)))


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
    """
    first = configs[0]
    images = ("dataset", "validation", "train_size", "averaging")
    sizes = ("batch_size", "eval_batch_size", "trajectories", "times")
    for name in (*images, *sizes, "precision"):
        values = {getattr(config, name, None) for config in configs}
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
