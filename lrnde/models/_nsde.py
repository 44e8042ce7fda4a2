"""Neural SDEs."""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real

from .._adjoint import TapeAdjoint
from .._brownian import BrownianPath
from .._regularizers import Regularizers
from .._solve import diffeqsolve
from ._layers import Linear, MLP
from ._node import make_prediction, Prediction


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
        regularizer: Regularizers = None,
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
        regularizer: Regularizers = None,
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
        return make_prediction(logits.mean(axis=1), sol, penalty)


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
        regularizer: Regularizers = None,
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
