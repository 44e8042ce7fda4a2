"""Experiments: from a configuration to a trained model and a record.

The notebooks and `python -m lrnde.run` both call `run`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from . import _explicit, data, records
from ._regularizers import AbstractRegularizer, LocalError, LocalStiffness
from .models import NeuralODEClassifier
from .objectives import accuracy, correct, cross_entropy
from .timing import interleave
from .training import (
    Evaluation,
    fit,
    load_checkpoint,
    make_step,
    schedule,
    State,
    StepBudget,
)

REGULARIZERS: dict[str, AbstractRegularizer | None] = {
    "vanilla": None,
    "unbiased": LocalError("unbiased"),
    "biased": LocalError("biased"),
    "error": LocalError("error"),
    "stiffness-unbiased": LocalStiffness("unbiased"),
    "stiffness-biased": LocalStiffness("biased"),
}

SOLVERS = {
    "tsit5": _explicit.Tsit5,
    "dopri5": _explicit.Dopri5,
    "bosh3": _explicit.Bosh3,
    "dopri8": _explicit.Dopri8,
}

OPTIMIZERS = {"adam": optax.adam, "adamax": optax.adamax, "adabelief": optax.adabelief}


# What training may use, evaluation may use: it sets no memory aside for its steps.
_MAX_STEPS = StepBudget().limit


def _constant(value: float):
    return field(default_factory=lambda: {"kind": "constant", "value": value})


@dataclass(frozen=True)
class Config:
    """Everything that decides the outcome of a run.

    **Arguments:**

    - `experiment`: Name of the experiment; the first folder of its records.
    - `tier`: Size of the run: smoke, book, cpu or paper.
    - `method`: One of `REGULARIZERS`.
    - `seed`: Decides initial parameters, order of the data and sampled steps.
    - `dataset`: A data set of `lrnde.data.load`.
    - `validation`: Hold out that many training examples and report on them in place of
        the test set; for choosing settings. 0 reports on the test set.
    - `hidden`: Width of the vector field's hidden layer.
    - `solver`: One of `SOLVERS`.
    - `tolerance`: Relative and absolute tolerance of the solves.
    - `batch_size`: Training examples in one batch, which is one solve.
    - `steps`: Training steps.
    - `optimizer`: One of `OPTIMIZERS`.
    - `learning_rate`: A `lrnde.training.schedule`.
    - `weight`: A `lrnde.training.schedule` of the penalty's weight. Without effect for
        the method "vanilla".
    - `eval_batch_size`: Examples in one batch of the evaluation.
    - `eval_train_size`: Training examples used for the training metrics.
    - `precision`: Precision of matrix products, as in `jax.default_matmul_precision`.
    """

    experiment: str = "mnist-node"
    tier: str = "book"
    method: str = "vanilla"
    seed: int = 0
    dataset: str = "digits"
    validation: int = 0
    hidden: int = 100
    solver: str = "tsit5"
    tolerance: float = 1e-6
    batch_size: int = 128
    steps: int = 1000
    optimizer: str = "adam"
    learning_rate: dict[str, Any] = _constant(1e-3)
    weight: dict[str, Any] = _constant(1.0)
    eval_batch_size: int = 512
    eval_train_size: int = 10_000
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
        for name in (
            "batch_size",
            "steps",
            "hidden",
            "eval_batch_size",
            "eval_train_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1.")

    @property
    def name(self) -> str:
        """Names the run within its experiment and tier."""
        return f"{self.method}-seed{self.seed}"


def configs(settings: Mapping[str, Any]) -> list[Config]:
    """One configuration for each method and seed of a parameters file.

    **Arguments:**

    - `settings`: The fields of `Config`, with `methods` and `seeds` (lists) in place of
        `method` and `seed`.

    **Returns:**

    A list, seeds first: all methods of the first seed, then those of the second.

    **Raises:**

    - `ValueError` without methods or seeds, and as `Config`.
    """
    settings = dict(settings)
    for name in ("methods", "seeds"):
        if name not in settings:
            raise ValueError(f"no {name} in these settings: {', '.join(settings)}.")
    methods, seeds = settings.pop("methods"), settings.pop("seeds")
    return [
        Config(**settings, method=method, seed=seed)
        for seed in seeds
        for method in methods
    ]


def load_data(config: Config) -> data.Dataset:
    """The data set of a run, its test part replaced if validation is asked for."""
    dataset = data.load(config.dataset)
    if config.validation:
        return data.validation_split(dataset, config.validation, seed=0)
    return dataset


def make_model(config: Config, dataset: data.Dataset) -> NeuralODEClassifier:
    """The untrained model of a run."""
    return NeuralODEClassifier(
        size=dataset.x_train.shape[1],
        hidden=config.hidden,
        classes=dataset.num_classes,
        solver=SOLVERS[config.solver](),
        tolerance=config.tolerance,
        key=jr.fold_in(jr.key(config.seed), 0),
    )


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimiser of a run, its learning rate schedule included."""
    return OPTIMIZERS[config.optimizer](schedule(config.learning_rate, config.steps))


def classification(model: NeuralODEClassifier, batch, **kwargs) -> Evaluation:
    """The objective of a classifier: cross-entropy, with the accuracy beside it."""
    x, y = batch
    prediction = model(x, **kwargs)
    return Evaluation(
        loss=cross_entropy(prediction.logits, y),
        penalty=prediction.penalty,
        accuracy=accuracy(prediction.logits, y),
        nfe=prediction.nfe,
        num_steps=prediction.num_steps,
        successful=prediction.successful,
    )


class Scores(NamedTuple):
    """Loss and accuracy over examples, mean NFE over batches."""

    loss: float
    accuracy: float
    nfe: float


@eqx.filter_jit
def _score(model, x, y, mask):
    prediction = model(x, max_steps=_MAX_STEPS)
    losses = optax.softmax_cross_entropy_with_integer_labels(prediction.logits, y)
    hits = correct(prediction.logits, y)
    sums = jnp.sum(losses * mask), jnp.sum(hits & mask)
    return *sums, prediction.nfe, prediction.successful


def evaluate(
    model: NeuralODEClassifier, x: np.ndarray, y: np.ndarray, batch_size: int
) -> Scores:
    """Evaluates a classifier, without any regularizer.

    **Arguments:**

    - `model`: The classifier.
    - `x`: Inputs, a row an example.
    - `y`: Labels.
    - `batch_size`: Examples in one solve. The NFE depends on it, since the error of a
        step is a mean over the batch.

    **Raises:**

    - `RuntimeError` if a solve does not reach its end.
    """
    loss, hits, nfes = 0.0, 0, []
    for rows, mask in data.padded_batches(len(x), min(batch_size, len(x))):
        out = jax.device_get(_score(model, x[rows], y[rows], mask))
        if not out[3]:
            raise RuntimeError(
                f"evaluation: a solve needs more than {_MAX_STEPS} steps, the limit of "
                "the training. Loosen the tolerance or train with a larger weight."
            )
        loss, hits = loss + float(out[0]), hits + int(out[1])
        nfes.append(int(out[2]))
    return Scores(loss / len(x), hits / len(x), sum(nfes) / len(nfes))


@eqx.filter_jit
def _predict(model, x):
    return model(x, max_steps=_MAX_STEPS).logits


def time_predictions(
    models: Mapping[str, Callable], x: np.ndarray, repeats: int = 20
) -> dict[str, float]:
    """Times predictions of several models side by side.

    The models take turns, so that a change in the machine's speed meets all of them.

    **Arguments:**

    - `models`: From a name to a model.
    - `x`: One batch.
    - `repeats`: How often every model is timed, after a run that compiles.

    **Returns:**

    From the name to the median wall time of one prediction, in seconds.
    """
    x = jnp.asarray(x)
    calls = {
        name: functools.partial(_predict, model, x) for name, model in models.items()
    }
    return _medians(interleave(calls, repeats))


def _medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(times) for name, times in seconds.items()}


class Run(NamedTuple):
    """A finished run: the trained model and its record."""

    model: NeuralODEClassifier
    record: dict[str, Any]


def run(
    config: Config,
    *,
    checkpoint: Path | None = None,
    deadline: float = math.inf,
    progress: bool = True,
) -> Run | None:
    """Trains and evaluates one model.

    **Arguments:**

    - `config`: What to run.
    - `checkpoint`: A file to resume from and to write to.
    - `deadline`: Stop cleanly at this `time.monotonic()`.
    - `progress`: Whether to show a progress bar.

    **Returns:**

    A `Run`; `None` if the training was stopped before its end.
    """
    provenance = records.provenance(config.precision)
    with jax.default_matmul_precision(config.precision):
        dataset = load_data(config)
        state = train(config, dataset, checkpoint, deadline, progress)
        if state.step < config.steps:
            return None
        return Run(state.model, _record(config, dataset, state, provenance))


def train(
    config: Config,
    dataset: data.Dataset,
    checkpoint: Path | None = None,
    deadline: float = math.inf,
    progress: bool = True,
) -> State:
    """Trains the model of a configuration; see `run`."""
    x, y = jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train)
    order = data.Batches(len(x), config.batch_size, config.seed)

    def batches(step):
        rows = jnp.asarray(order[step])
        return x[rows], y[rows]

    return fit(
        make_model(config, dataset),
        classification,
        batches,
        steps=config.steps,
        optimizer=make_optimizer(config),
        key=jr.fold_in(jr.key(config.seed), 1),
        regularizer=REGULARIZERS[config.method],
        weight=schedule(config.weight, config.steps),
        budget=StepBudget(),
        checkpoint=checkpoint,
        identity=records.config_hash(asdict(config)),
        deadline=deadline,
        progress=progress,
    )


def _record(config: Config, dataset, state: State, provenance) -> dict[str, Any]:
    size = config.eval_batch_size
    head = slice(config.eval_train_size)
    train_scores = evaluate(
        state.model, dataset.x_train[head], dataset.y_train[head], size
    )
    test_scores = evaluate(state.model, dataset.x_test, dataset.y_test, size)
    batch = dataset.x_test[:size]
    predict = time_predictions({"model": state.model}, batch)["model"]
    metrics = {
        f"{part}_{name}": value
        for part, scores in (("train", train_scores), ("test", test_scores))
        for name, value in scores._asdict().items()
    }
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
                predict_seconds=predict,
                predict_batch=len(batch),
            ),
            curves=state.history.curves,
            provenance=provenance,
        )
    )


class Times(NamedTuple):
    """Median wall times of a trained model, in seconds.

    - `predict_seconds`: One prediction for `eval_batch_size` test examples.
    - `train_step_seconds`: One training step, as the next one would be.
    """

    predict_seconds: float
    train_step_seconds: float


def load_state(config: Config, dataset: data.Dataset, checkpoint: Path) -> State:
    """What a run has come to, from its checkpoint."""
    model = make_model(config, dataset)
    params = eqx.filter(model, eqx.is_inexact_array)
    like = State(model, make_optimizer(config).init(params))
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
    """
    first = configs[0]
    dataset = load_data(first)
    states = {c.name: load_state(c, dataset, checkpoints(c)) for c in configs}
    with jax.default_matmul_precision(first.precision):
        predict = time_predictions(
            {name: state.model for name, state in states.items()},
            dataset.x_test[: first.eval_batch_size],
            repeats,
        )
        train = _time_train_steps(configs, states, dataset, repeats)
    return {name: Times(predict[name], train[name]) for name in states}


def _time_train_steps(configs, states, dataset, repeats) -> dict[str, float]:
    # Seeds of one method share a compiled step.
    steps = {
        c.method: make_step(
            classification,
            make_optimizer(c),
            schedule(c.weight, c.steps),
            REGULARIZERS[c.method],
        )
        for c in configs
    }
    rows = slice(configs[0].batch_size)
    batch = jnp.asarray(dataset.x_train[rows]), jnp.asarray(dataset.y_train[rows])
    keys = itertools.count()

    def train_step(config):
        state = states[config.name]
        return steps[config.method](
            state.model,
            state.opt_state,
            batch,
            jr.key(next(keys) // len(configs)),
            jnp.asarray(state.step),
            state.budget.steps,
        )

    calls = {c.name: functools.partial(train_step, c) for c in configs}
    return _medians(interleave(calls, repeats))
