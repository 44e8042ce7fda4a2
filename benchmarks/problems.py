"""The vector fields that are timed, and what the times are measured against."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Real

import lrnde
from lrnde.models import NeuralSDEClassifier, TimeLinear, TimeMLP


class Problem(NamedTuple):
    """A differential equation over the times 0 to 1, solved for a batch at once.

    - `name`: What to call it.
    - `field`: The vector field, an `equinox.Module`.
    - `y0`: Initial states, the batch first.
    - `tolerance`: Relative and absolute tolerance.
    """

    name: str
    field: eqx.Module
    y0: Float[Array, "batch ..."]
    tolerance: float


class DeepMLP(eqx.Module):
    """As `lrnde.models.TimeMLP`, with any number of hidden layers."""

    layers: list[TimeLinear]

    def __init__(self, size: int, hidden: int, depth: int, *, key: PRNGKeyArray):
        widths = [size, *depth * [hidden], size]
        keys = jr.split(key, depth + 1)
        self.layers = [
            TimeLinear(a, b, key=key)
            for a, b, key in zip(widths[:-1], widths[1:], keys, strict=True)
        ]

    def __call__(self, t, y, args=None):
        for layer in self.layers[:-1]:
            y = jnp.tanh(layer(t, y))
        return self.layers[-1](t, y)


class TimeConv(eqx.Module):
    """A 3x3 convolution of (image, time), channels last."""

    kernel: Float[Array, "3 3 inputs outputs"]
    time: Float[Array, " outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, *, key: PRNGKeyArray):
        kernel_key, time_key = jr.split(key)
        init = jax.nn.initializers.glorot_uniform()
        self.kernel = init(kernel_key, (3, 3, inputs, outputs))
        self.time = init(time_key, (1, outputs))[0]
        self.bias = jnp.zeros(outputs)

    def __call__(self, t, y):
        convolved = lax.conv_general_dilated(
            y, self.kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return convolved + (t * self.time + self.bias)


class ConvNet(eqx.Module):
    """A vector field of two 3x3 convolutions with a tanh between them."""

    first: TimeConv
    second: TimeConv

    def __init__(self, channels: int, hidden: int, *, key: PRNGKeyArray):
        first, second = jr.split(key)
        self.first = TimeConv(channels, hidden, key=first)
        self.second = TimeConv(hidden, channels, key=second)

    def __call__(self, t, y, args=None):
        return self.second(t, jnp.tanh(self.first(t, y)))


def _stretch(field: PyTree, factor: float) -> PyTree:
    """Larger weights make dynamics that take more steps."""
    return jax.tree.map(lambda x: factor * x, field)


def mlp(
    batch: int,
    size: int = 784,
    hidden: int = 100,
    depth: int = 1,
    tolerance: float = 1e-6,
) -> Problem:
    """The vector field of the MNIST model, with weights five times Glorot's.

    More hidden layers get smaller weights, or the dynamics would turn chaotic.
    """
    key, y_key = jr.split(jr.key(0))
    if depth == 1:
        field = TimeMLP(size, hidden, key=key)
    else:
        field = DeepMLP(size, hidden, depth, key=key)
    y0 = jr.uniform(y_key, (batch, size))
    return Problem("mlp", _stretch(field, 5.0 / depth**0.5), y0, tolerance)


def conv(batch: int, tolerance: float = 1e-4) -> Problem:
    """A convolutional field on 14 x 14 images of 4 channels: 784 numbers, too."""
    key, y_key = jr.split(jr.key(0))
    field = ConvNet(4, 8, key=key)
    y0 = jr.uniform(y_key, (batch, 14, 14, 4))
    return Problem("conv", _stretch(field, 3.0), y0, tolerance)


def sde(batch: int) -> Problem:
    """The neural SDE of the MNIST model, with the drift's weights twice Glorot's."""
    key, y_key = jr.split(jr.key(0))
    model = NeuralSDEClassifier(
        784, 32, 64, 10, solver=lrnde.SOSRI(), tolerance=0.14, key=key
    ).sde
    model = eqx.tree_at(lambda m: m.drift, model, _stretch(model.drift, 2.0))
    return Problem("sde", model, jr.normal(y_key, (batch, 32)), model.tolerance)


def separate_arrays(field: TimeMLP):
    """The mathematics of a `TimeMLP`, its arrays written out by hand."""
    w1, c1, b1 = field.first.weight, field.first.time, field.first.bias
    w2, c2, b2 = field.second.weight, field.second.time, field.second.bias

    def call(t: Real[Array, ""], y: Float[Array, "batch size"], args=None):
        return jnp.tanh(y @ w1 + (t * c1 + b1)) @ w2 + (t * c2 + b2)

    return call


def appended_time(field: TimeMLP):
    """The same mathematics with the time appended to the input of every layer."""
    w1 = jnp.concatenate([field.first.weight, field.first.time[None]])
    w2 = jnp.concatenate([field.second.weight, field.second.time[None]])

    def with_time(t, x):
        return jnp.concatenate([x, jnp.full((len(x), 1), t)], axis=1)

    def call(t: Real[Array, ""], y: Float[Array, "batch size"], args=None):
        hidden = jnp.tanh(with_time(t, y) @ w1 + field.first.bias)
        return with_time(t, hidden) @ w2 + field.second.bias

    return call
