"""Neural differential equation models. They know nothing of data sets or training."""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real

from ._adjoint import TapeAdjoint
from ._regularizers import AbstractRegularizer
from ._solve import diffeqsolve


class Prediction(NamedTuple):
    """What a model makes of one batch, and what the solve cost.

    - `logits`: Unnormalised log-probabilities, a row an example.
    - `penalty`: The regularizer's penalty, zero without one.
    - `nfe`: Vector field evaluations of the solve.
    - `num_steps`: Steps of the solve, rejected ones included.
    - `successful`: Whether the solve reached its end within `max_steps`.
    """

    logits: Float[Array, "batch classes"]
    penalty: Real[Array, ""]
    nfe: Int[Array, ""]
    num_steps: Int[Array, ""]
    successful: Bool[Array, ""]


def _glorot_uniform(key, fan_in, fan_out):
    return jax.nn.initializers.glorot_uniform()(key, (fan_in, fan_out))


class Linear(eqx.Module):
    """An affine map of the last axis; the weight is stored as it is used."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, *, key: PRNGKeyArray):
        self.weight = _glorot_uniform(key, inputs, outputs)
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
        weight = _glorot_uniform(key, inputs + 1, outputs)
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


class NeuralODEClassifier(eqx.Module):
    """Flow the input from time 0 to 1, then read the classes off linearly.

    The whole batch is one state of one solve: the step size controller sees the root
    mean square of the error over every entry of every example.

    **Arguments:**

    - `size`: Length of an input.
    - `hidden`: Width of the vector field's hidden layer.
    - `classes`: Number of classes.
    - `solver`: A diffrax solver with an embedded error estimate.
    - `tolerance`: Relative and absolute tolerance of the solve.
    - `adjoint`: How the gradient goes through the solve.
    - `key`: A `jax.random.key` for the initial parameters.
    """

    vector_field: TimeMLP
    readout: Linear
    solver: diffrax.AbstractSolver
    adjoint: diffrax.AbstractAdjoint
    tolerance: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        hidden: int,
        classes: int,
        *,
        solver: diffrax.AbstractSolver,
        tolerance: float,
        adjoint: diffrax.AbstractAdjoint = TapeAdjoint(),  # noqa: B008
        key: PRNGKeyArray,
    ):
        field_key, readout_key = jr.split(key)
        self.vector_field = TimeMLP(size, hidden, key=field_key)
        self.readout = Linear(size, classes, key=readout_key)
        self.solver = solver
        self.adjoint = adjoint
        self.tolerance = tolerance

    def solve(
        self,
        x: Float[Array, "batch size"],
        *,
        regularizer: AbstractRegularizer | None = None,
        key: PRNGKeyArray | None = None,
        max_steps: int = 4096,
        saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),  # noqa: B008
    ) -> tuple[diffrax.Solution, Real[Array, ""]]:
        """Solves the model's differential equation; see `lrnde.diffeqsolve`."""
        return diffeqsolve(
            diffrax.ODETerm(self.vector_field),
            self.solver,
            0.0,
            1.0,
            None,
            x,
            regularizer=regularizer,
            key=key,
            saveat=saveat,
            stepsize_controller=diffrax.PIDController(
                rtol=self.tolerance, atol=self.tolerance
            ),
            adjoint=self.adjoint,
            max_steps=max_steps,
            throw=False,
        )

    def __call__(
        self,
        x: Float[Array, "batch size"],
        *,
        regularizer: AbstractRegularizer | None = None,
        key: PRNGKeyArray | None = None,
        max_steps: int = 4096,
    ) -> Prediction:
        """Classifies a batch.

        **Arguments:**

        - `x`: Inputs, a row an example.
        - `regularizer`, `key`: As for `lrnde.diffeqsolve`.
        - `max_steps`: Steps after which the solve gives up, which `successful` tells.

        **Returns:**

        A `Prediction`.
        """
        sol, penalty = self.solve(
            x, regularizer=regularizer, key=key, max_steps=max_steps
        )
        return Prediction(
            logits=self.readout(sol.ys[0]),
            penalty=penalty,
            nfe=sol.stats["nfe"],
            num_steps=sol.stats["num_steps"],
            successful=diffrax.is_successful(sol.result),
        )
