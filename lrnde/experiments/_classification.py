"""Experiments that classify images: MNIST and CIFAR10."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax

from .. import data
from ..models import (
    ConvODEClassifier,
    MultiScaleODEClassifier,
    NeuralODEClassifier,
    NeuralSDEClassifier,
)
from ..objectives import accuracy, correct, cross_entropy
from ..training import Evaluation
from ._config import constant, DatasetConfig
from ._evaluation import by_part, evaluation_of, in_batches, MAX_STEPS


class Scores(NamedTuple):
    """Loss and accuracy over examples, mean NFE over batches (NaN if not counted)."""

    loss: float
    accuracy: float
    nfe: float


def classification(model: eqx.Module, batch, **kwargs) -> Evaluation:
    """The objective of a classifier: cross-entropy, with the accuracy beside it."""
    x, y = batch
    prediction = model(x, **kwargs)
    merits = {"accuracy": accuracy(prediction.logits, y)}
    return evaluation_of(cross_entropy(prediction.logits, y), merits, prediction)


@eqx.filter_jit
def _score(model, x, y, mask, kwargs):
    prediction = model(x, max_steps=MAX_STEPS, **kwargs)
    losses = optax.softmax_cross_entropy_with_integer_labels(prediction.logits, y)
    hits = correct(prediction.logits, y)
    sums = jnp.sum(losses * mask), jnp.sum(hits & mask)
    return sums, prediction.nfe, prediction.successful


def evaluate(
    model: eqx.Module,
    x: np.ndarray,
    y: np.ndarray,
    batch_size: int,
    key: jax.Array | None = None,
    **kwargs: Any,
) -> Scores:
    """Evaluates a classifier, without any regularizer.

    **Arguments:**

    - `model`: The classifier.
    - `x`: Inputs, a row an example.
    - `y`: Labels.
    - `batch_size`: Examples in one solve. The NFE depends on it, since the error of a
        step is a mean over the batch; the logits do as well if the model has a batch
        norm.
    - `key`: A `jax.random.key` for a stochastic model.
    - `kwargs`: What else the model is called with.

    **Raises:**

    - `RuntimeError` if a solve does not reach its end.
    """

    def score(number, rows, mask):
        own = kwargs if key is None else kwargs | {"key": jr.fold_in(key, number)}
        return _score(model, x[rows], y[rows], mask, own)

    sums, nfe = in_batches(score, len(x), batch_size)
    loss, hits = (sum(map(float, column)) for column in zip(*sums, strict=True))
    return Scores(loss / len(x), hits / len(x), nfe)


def _logits(x, key, model):
    return model(x, key=key, max_steps=MAX_STEPS).logits


@dataclass(frozen=True)
class Classifier(DatasetConfig):
    """A classifier of images.

    **Arguments:** those of `DatasetConfig`, and

    - `hidden`: Width of the hidden layer of the vector field.
    """

    data_type = data.Dataset

    hidden: int = 100

    def batches(self, dataset):
        x, y = jnp.asarray(dataset.x_train), jnp.asarray(dataset.y_train)
        order = self.order(dataset)

        def batch(step):
            rows = jnp.asarray(order[step])
            return x[rows], y[rows]

        return batch

    def objective(self, model, batch, **kwargs):
        return classification(model, batch, **kwargs)

    def evaluation(self) -> dict[str, Any]:
        """What `evaluate` is called with, besides model, data and batch size."""
        return {}

    def metrics(self, model, dataset):
        head = slice(self.eval_train_size)
        parts = {
            "train": (dataset.x_train[head], dataset.y_train[head]),
            "test": (dataset.x_test, dataset.y_test),
        }
        settings = self.evaluation()
        scores = {
            part: evaluate(model, x, y, self.eval_batch_size, **settings)
            for part, (x, y) in parts.items()
        }
        return by_part(scores)

    def prediction(self, dataset) -> tuple[Callable, int]:
        x = jnp.asarray(dataset.x_test[: self.eval_batch_size])
        key = self.evaluation().get("key")
        return jtu.Partial(_logits, x, key), len(x)


@dataclass(frozen=True)
class MNISTNode(Classifier):
    """A neural ODE on flattened images, the first experiment of Pal et al. (2023)."""

    experiment: str = "mnist-node"

    def make_model(self, dataset) -> NeuralODEClassifier:
        """The untrained model."""
        return NeuralODEClassifier(
            size=dataset.x_train.shape[1],
            hidden=self.hidden,
            classes=dataset.num_classes,
            solver=self.make_solver(),
            tolerance=self.tolerance,
            key=self.key(0),
        )


@dataclass(frozen=True)
class MNISTNSDE(Classifier):
    """A neural SDE on flattened images, the second experiment of Pal et al. (2023).

    **Arguments:** those of `Classifier`, and

    - `size`: Length of the state.
    - `trajectories`: Paths of each image in the evaluation. Training and timing take
        one.
    """

    experiment: str = "mnist-nsde"
    size: int = 32
    hidden: int = 64
    trajectories: int = 10
    solver: str = "sosri"
    tolerance: float = 0.14
    learning_rate: dict[str, Any] = constant(1e-2)

    def make_model(self, dataset) -> NeuralSDEClassifier:
        """The untrained model."""
        return NeuralSDEClassifier(
            inputs=dataset.x_train.shape[1],
            size=self.size,
            hidden=self.hidden,
            classes=dataset.num_classes,
            solver=self.make_solver(),
            tolerance=self.tolerance,
            key=self.key(0),
        )

    def evaluation(self):
        return {"key": self.key(2), "trajectories": self.trajectories}


@dataclass(frozen=True)
class CIFAR10(Classifier):
    """A convolutional neural ODE, the fourth experiment of Pal et al. (2023).

    The images are standardised after they were made smaller.

    **Arguments:** those of `Classifier`, and

    - `channels`: Channels of the state. `hidden` counts those inside the vector field.
    - `train_size`: Training images, the same for every seed; 0 for all there are.
    - `averaging`: Rows and columns of the blocks of pixels that are averaged to one.
    """

    least = Classifier.least | {"train_size": 0}
    timed_on = (*Classifier.timed_on, "train_size", "averaging")

    experiment: str = "cifar10"
    hidden: int = 64
    channels: int = 8
    train_size: int = 0
    averaging: int = 1
    tolerance: float = 1e-4

    def load_data(self):
        dataset = super().load_data()
        if self.train_size:
            dataset = data.training_subset(dataset, self.train_size, seed=0)
        if self.averaging > 1:
            dataset = data.averaged_down(dataset, self.averaging)
        return data.standardised(dataset)

    def make_model(self, dataset) -> ConvODEClassifier:
        """The untrained model."""
        return ConvODEClassifier(**self.model_settings(dataset))

    def model_settings(self, dataset) -> dict[str, Any]:
        """What the model is made from."""
        return dict(
            # Grey images have one channel.
            image_shape=(*dataset.image_shape, 1)[:3],
            channels=self.channels,
            hidden=self.hidden,
            classes=dataset.num_classes,
            solver=self.make_solver(),
            tolerance=self.tolerance,
            key=self.key(0),
        )


@dataclass(frozen=True)
class CIFAR10MultiScale(CIFAR10):
    """A neural ODE at two resolutions, the last experiment of Pal et al. (2023).

    **Arguments:** those of `CIFAR10`; `channels` counts those of either state.
    """

    experiment: str = "cifar10-multiscale"
    hidden: int = 120
    channels: int = 24
    solver: str = "bosh3"
    tolerance: float = 0.05

    def make_model(self, dataset) -> MultiScaleODEClassifier:
        """The untrained model."""
        return MultiScaleODEClassifier(**self.model_settings(dataset))
