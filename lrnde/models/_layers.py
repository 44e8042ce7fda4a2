"""Layers; their weights are stored as they are used."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, Real


def glorot_uniform(key, fan_in, fan_out):
    return jax.nn.initializers.glorot_uniform()(key, (fan_in, fan_out))


class Linear(eqx.Module):
    """An affine map of the last axis; the weight is stored as it is used."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, *, key: PRNGKeyArray):
        self.weight = glorot_uniform(key, inputs, outputs)
        self.bias = jnp.zeros(outputs)

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        return x @ self.weight + self.bias


class TimeLinear(eqx.Module):
    """An affine map of (state, time), the time being one more input.

    The column of the weight matrix that belongs to the time is kept as a vector of its
    own: appending the time to the state would copy the state, and slicing the matrix
    would copy the matrix, at every evaluation.
    """

    weight: Float[Array, "inputs outputs"]
    time: Float[Array, " outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, *, key: PRNGKeyArray):
        weight = glorot_uniform(key, inputs + 1, outputs)
        self.weight, self.time = weight[:-1], weight[-1]
        self.bias = jnp.zeros(outputs)

    def __call__(
        self, t: Real[Array, ""], x: Float[Array, "... inputs"]
    ) -> Float[Array, "... outputs"]:
        return x @ self.weight + (t * self.time + self.bias)


class TimeMLP(eqx.Module):
    """A vector field with one hidden layer; the time is an input of both layers.

    $f(t, y) = [\\tanh([y, t] W_1 + b_1), t] W_2 + b_2$.
    """

    first: TimeLinear
    second: TimeLinear

    def __init__(self, size: int, hidden: int, *, key: PRNGKeyArray):
        first, second = jr.split(key)
        self.first = TimeLinear(size, hidden, key=first)
        self.second = TimeLinear(hidden, size, key=second)

    def __call__(
        self, t: Real[Array, ""], y: Float[Array, "... size"], args: None = None
    ) -> Float[Array, "... size"]:
        return self.second(t, jnp.tanh(self.first(t, y)))


class MLP(eqx.Module):
    """A map with one hidden layer, $x \\mapsto \\tanh(x W_1 + b_1) W_2 + b_2$."""

    first: Linear
    second: Linear

    def __init__(self, size: int, hidden: int, *, key: PRNGKeyArray):
        first, second = jr.split(key)
        self.first = Linear(size, hidden, key=first)
        self.second = Linear(hidden, size, key=second)

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        return self.second(jnp.tanh(self.first(x)))
