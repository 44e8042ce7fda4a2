"""Neural ODEs, and a classifier that is one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Real

from .._adjoint import TapeAdjoint
from .._regularizers import Regularizers
from .._solve import diffeqsolve
from ._layers import Linear, TimeMLP


class Prediction(NamedTuple):
    """What a model makes of one batch, and what the solve cost.

    - `logits`: Unnormalised log-probabilities, a row an example.
    - `penalty`: The regularizer's penalty, zero without one.
    - `nfe`: Vector field evaluations of the solve (of the drift, for an SDE); `None`
        with an implicit solver, where they cannot be counted.
    - `num_steps`: Steps of the solve, rejected ones included.
    - `successful`: Whether the solve reached its end within `max_steps`.
    """

    logits: Float[Array, "batch classes"]
    penalty: Real[Array, ""]
    nfe: Int[Array, ""] | None
    num_steps: Int[Array, ""]
    successful: Bool[Array, ""]


class NeuralODE(eqx.Module):
    """An ordinary differential equation $dy/dt = f(t, y)$ with a trained vector field.

    A batch of states is one state of one solve: the step size controller sees the root
    mean square of the error over every entry of every example.

    **Arguments:**

    - `vector_field`: Called as `vector_field(t, y, args)`.
    - `solver`: A diffrax solver with an embedded error estimate.
    - `tolerance`: Relative and absolute tolerance of the solve.
    - `adjoint`: How the gradient goes through the solve.
    """

    vector_field: Callable
    solver: diffrax.AbstractSolver
    tolerance: float = eqx.field(static=True)
    adjoint: diffrax.AbstractAdjoint = TapeAdjoint()  # noqa: RUF009

    def solve(
        self,
        y0: PyTree[Array],
        args: PyTree = None,
        *,
        t0: Any = 0.0,
        t1: Any = 1.0,
        regularizer: Regularizers = None,
        key: PRNGKeyArray | None = None,
        max_steps: int = 4096,
        saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),  # noqa: B008
    ) -> tuple[diffrax.Solution, Real[Array, ""]]:
        """Solves the equation; see `lrnde.diffeqsolve`.

        A solve that needs more than `max_steps` ends early and without an error; ask
        `diffrax.is_successful(sol.result)`.
        """
        return diffeqsolve(
            diffrax.ODETerm(self.vector_field),
            self.solver,
            t0,
            t1,
            None,
            y0,
            args,
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


class NeuralODEClassifier(eqx.Module):
    """Flow the input from time 0 to 1, then read the classes off linearly.

    **Arguments:**

    - `size`: Length of an input.
    - `hidden`: Width of the vector field's hidden layer.
    - `classes`: Number of classes.
    - `solver`, `tolerance`, `adjoint`: As for `NeuralODE`.
    - `key`: A `jax.random.key` for the initial parameters.
    """

    ode: NeuralODE
    readout: Linear

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
        vector_field = TimeMLP(size, hidden, key=field_key)
        self.ode = NeuralODE(vector_field, solver, tolerance, adjoint)
        self.readout = Linear(size, classes, key=readout_key)

    def __call__(
        self,
        x: Float[Array, "batch size"],
        *,
        regularizer: Regularizers = None,
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
        sol, penalty = self.ode.solve(
            x, regularizer=regularizer, key=key, max_steps=max_steps
        )
        return make_prediction(self.readout(sol.ys[0]), sol, penalty)


def make_prediction(logits, sol: diffrax.Solution, penalty) -> Prediction:
    return Prediction(
        logits=logits,
        penalty=penalty,
        nfe=sol.stats["nfe"],
        num_steps=sol.stats["num_steps"],
        successful=diffrax.is_successful(sol.result),
    )
