"""Neural differential equation models. They know nothing of data sets or training."""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real

from ._adjoint import TapeAdjoint
from ._brownian import BrownianPath
from ._regularizers import AbstractRegularizer
from ._solve import diffeqsolve


class Prediction(NamedTuple):
    """What a model makes of one batch, and what the solve cost.

    - `logits`: Unnormalised log-probabilities, a row an example.
    - `penalty`: The regularizer's penalty, zero without one.
    - `nfe`: Vector field evaluations of the solve (of the drift, for an SDE).
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
        return _prediction(self.readout(sol.ys[0]), sol, penalty)


def _prediction(logits, sol: diffrax.Solution, penalty) -> Prediction:
    return Prediction(
        logits=logits,
        penalty=penalty,
        nfe=sol.stats["nfe"],
        num_steps=sol.stats["num_steps"],
        successful=diffrax.is_successful(sol.result),
    )


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


class NeuralSDE(eqx.Module):
    """An autonomous stochastic differential equation with diagonal noise.

    $dy = f(y) dt + g(y) dW$ in the sense of Ito. A batch of states is one state of one
    solve, and every entry of it has a Brownian motion of its own.

    **Arguments:**

    - `drift`, `diffusion`: Maps from a state to an array like it.
    - `solver`: A solver for Ito equations that estimates its error, such as
        `lrnde.SOSRI()`.
    - `tolerance`: Relative and absolute tolerance of the solve.
    - `adjoint`: How the gradient goes through the solve.
    """

    drift: Callable
    diffusion: Callable
    solver: diffrax.AbstractSolver
    tolerance: float = eqx.field(static=True)
    adjoint: diffrax.AbstractAdjoint = TapeAdjoint()  # noqa: RUF009

    def terms(self, path: diffrax.AbstractBrownianPath) -> diffrax.MultiTerm:
        """The equation, driven by a Brownian path."""

        def diffusion(t, y, args):
            return lx.DiagonalLinearOperator(self.diffusion(y))

        return diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: self.drift(y)),
            diffrax.ControlTerm(diffusion, path),
        )

    def solve(
        self,
        y0: Float[Array, "batch size"],
        *,
        key: PRNGKeyArray,
        regularizer: AbstractRegularizer | None = None,
        max_steps: int = 4096,
        saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),  # noqa: B008
        step_ts: Float[Array, " times"] | None = None,
    ) -> tuple[diffrax.Solution, Real[Array, ""]]:
        """Solves the equation from time 0 to 1; see `lrnde.diffeqsolve`.

        **Arguments:**

        - `y0`: Initial states.
        - `key`: A `jax.random.key` for the noise and for the step that is measured.
        - `regularizer`, `max_steps`, `saveat`: As for `lrnde.diffeqsolve`.
        - `step_ts`: Times that a step has to end at.
        """
        noise, sample = jr.split(key)
        controller = diffrax.PIDController(rtol=self.tolerance, atol=self.tolerance)
        if step_ts is not None:
            controller = diffrax.ClipStepSizeController(controller, step_ts=step_ts)
        return diffeqsolve(
            self.terms(BrownianPath(y0.shape, noise)),
            self.solver,
            0.0,
            1.0,
            None,
            y0,
            regularizer=regularizer,
            key=sample,
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=self.adjoint,
            max_steps=max_steps,
            throw=False,
        )


class NeuralSDEClassifier(eqx.Module):
    """Embed the input, let it follow a neural SDE, then read the classes off linearly.

    **Arguments:**

    - `inputs`: Length of an input.
    - `size`: Length of the state of the SDE.
    - `hidden`: Width of the drift's hidden layer. The diffusion is affine.
    - `classes`: Number of classes.
    - `solver`, `tolerance`: As for `NeuralSDE`.
    - `key`: A `jax.random.key` for the initial parameters.
    """

    embedding: Linear
    sde: NeuralSDE
    readout: Linear

    def __init__(
        self,
        inputs: int,
        size: int,
        hidden: int,
        classes: int,
        *,
        solver: diffrax.AbstractSolver,
        tolerance: float,
        key: PRNGKeyArray,
    ):
        keys = jr.split(key, 4)
        self.embedding = Linear(inputs, size, key=keys[0])
        drift = MLP(size, hidden, key=keys[1])
        diffusion = Linear(size, size, key=keys[2])
        self.sde = NeuralSDE(drift, diffusion, solver, tolerance)
        self.readout = Linear(size, classes, key=keys[3])

    def __call__(
        self,
        x: Float[Array, "batch inputs"],
        *,
        key: PRNGKeyArray,
        regularizer: AbstractRegularizer | None = None,
        max_steps: int = 4096,
        trajectories: int = 1,
    ) -> Prediction:
        """Classifies a batch.

        **Arguments:**

        - `x`: Inputs, a row an example.
        - `key`: A `jax.random.key` for the noise and for the step that is measured.
        - `regularizer`, `max_steps`: As for `lrnde.diffeqsolve`.
        - `trajectories`: Paths of each input, all in one solve. The logits are their
            means.

        **Returns:**

        A `Prediction`.
        """
        y0 = jnp.repeat(self.embedding(x), trajectories, axis=0)
        sol, penalty = self.sde.solve(
            y0, key=key, regularizer=regularizer, max_steps=max_steps
        )
        logits = self.readout(sol.ys[0]).reshape(len(x), trajectories, -1)
        return _prediction(logits.mean(axis=1), sol, penalty)


class Paths(NamedTuple):
    """Paths of an SDE, and what the solve cost; see `Prediction`."""

    states: Float[Array, "trajectories times size"]
    penalty: Real[Array, ""]
    nfe: Int[Array, ""]
    num_steps: Int[Array, ""]
    successful: Bool[Array, ""]


class _CubicMLP(eqx.Module):
    """An `MLP` of the cubes of the state."""

    mlp: MLP

    def __call__(self, y):
        return self.mlp(y**3)


class SpiralSDE(eqx.Module):
    """A neural SDE for the spiral of Pal et al. (2021).

    The drift is an `MLP` of the cubes of the state, the diffusion is affine.

    **Arguments:**

    - `hidden`: Width of the drift's hidden layer.
    - `solver`, `tolerance`: As for `NeuralSDE`.
    - `key`: A `jax.random.key` for the initial parameters.
    """

    sde: NeuralSDE

    def __init__(
        self,
        hidden: int,
        *,
        solver: diffrax.AbstractSolver,
        tolerance: float,
        key: PRNGKeyArray,
    ):
        drift, diffusion = jr.split(key)
        self.sde = NeuralSDE(
            _CubicMLP(MLP(2, hidden, key=drift)),
            Linear(2, 2, key=diffusion),
            solver,
            tolerance,
        )

    def __call__(
        self,
        y0: Float[Array, "2"],
        times: Float[Array, " times"],
        *,
        key: PRNGKeyArray,
        regularizer: AbstractRegularizer | None = None,
        max_steps: int = 4096,
        trajectories: int = 100,
    ) -> Paths:
        """Draws paths from one initial state, all in one solve.

        **Arguments:**

        - `y0`: The initial state.
        - `times`: When to look at the paths, within [0, 1]. Steps end there, so nothing
            is interpolated.
        - `key`, `regularizer`, `max_steps`: As for `NeuralSDEClassifier`.
        - `trajectories`: How many paths.
        """
        sol, penalty = self.sde.solve(
            jnp.tile(y0, (trajectories, 1)),
            key=key,
            regularizer=regularizer,
            max_steps=max_steps,
            saveat=diffrax.SaveAt(ts=times),
            step_ts=times,
        )
        stats = sol.stats
        return Paths(
            states=jnp.swapaxes(sol.ys, 0, 1),
            penalty=penalty,
            nfe=stats["nfe"],
            num_steps=stats["num_steps"],
            successful=diffrax.is_successful(sol.result),
        )
