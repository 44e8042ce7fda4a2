"""What a run is made of: the configurations of experiments."""

import abc
from collections.abc import Callable
from dataclasses import asdict, dataclass, Field, field, fields
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
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
from ..training import Evaluation, schedule, shardings, StepBudget

# The methods, by name.
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

# The solvers, by name.
SOLVERS = {
    "tsit5": _explicit.Tsit5,
    "dopri5": _explicit.Dopri5,
    "bosh3": _explicit.Bosh3,
    "dopri8": _explicit.Dopri8,
    "sosri": _sri.SOSRI,
    "sosri2": _sri.SOSRI2,
    "sriw2": _sri.SRIW2,
}

# The optimisers, by name.
OPTIMIZERS = {"adam": optax.adam, "adamax": optax.adamax, "adabelief": optax.adabelief}


def constant(value: float):
    """A field of a configuration that holds a constant schedule."""
    return field(default_factory=lambda: {"kind": "constant", "value": value})


def _check_number(setting: Field, value: Any, least: int) -> None:
    if setting.type is float and not isinstance(value, int | float):
        raise ValueError(
            f"{setting.name}={value!r} must be a number. (YAML takes 1e-3 for a text; "
            "write 1.0e-3.)"
        )
    if setting.type is int and (type(value) is not int or value < least):
        raise ValueError(
            f"{setting.name}={value!r} must be a whole number, and at least {least}."
        )


@dataclass(frozen=True)
class Config(abc.ABC):
    """Everything that decides the outcome of a run.

    Subclasses are experiments. They add settings of their own. A whole number is at
    least 1, or what `least` says of it; `timed_on` names the settings that have to
    agree where times are compared.

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

    least: ClassVar[dict[str, int]] = {"seed": 0}
    timed_on: ClassVar[tuple[str, ...]] = ("precision",)

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
        for setting in fields(self):
            least = self.least.get(setting.name, 1)
            _check_number(setting, getattr(self, setting.name), least)
        if not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance} must be positive.")
        for spec in (self.learning_rate, self.weight):
            schedule(spec, self.steps)  # tells what is wrong with it

    @property
    def name(self) -> str:
        """Names the run within its experiment and tier."""
        return f"{self.method}-seed{self.seed}"

    @property
    def identity(self) -> str:
        """Names all settings: the hash of a record, and whose a checkpoint is."""
        return records.config_hash(asdict(self))

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
    least = Config.least | {"validation": 0}
    timed_on = (
        *Config.timed_on,
        "dataset",
        "validation",
        "batch_size",
        "eval_batch_size",
    )

    dataset: str = "digits"
    validation: int = 0
    batch_size: int = 128
    eval_batch_size: int = 512
    eval_train_size: int = 10_000

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
