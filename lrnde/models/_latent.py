"""Latent ODEs: models of irregularly observed time series."""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real

from .._adjoint import TapeAdjoint
from .._regularizers import Regularizers
from ._layers import glorot_uniform, Linear, MLP
from ._node import NeuralODE


class Posterior(NamedTuple):
    """A normal distribution of initial states, given the observations.

    - `mean`: Its means, a row a series.
    - `log_variance`: The logarithms of its variances; coordinates are independent.
    """

    mean: Float[Array, "batch latent"]
    log_variance: Float[Array, "batch latent"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "batch latent"]:
        """Draws a state for each series, differentiable in both fields."""
        noise = jr.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_variance / 2) * noise


class Reconstruction(NamedTuple):
    """Series that a latent ODE makes of observations, and what the solve cost.

    - `x`: The series at every time.
    - `posterior`: The distribution of the initial state.
    - `penalty`, `nfe`, `num_steps`, `successful`: See `Prediction`.
    """

    x: Float[Array, "batch times channels"]
    posterior: Posterior
    penalty: Real[Array, ""]
    nfe: Int[Array, ""] | None
    num_steps: Int[Array, ""]
    successful: Bool[Array, ""]


class GRUEncoder(eqx.Module):
    """Reads observations backwards in time, with a gated recurrent unit.

    A series has two vectors $p$ and $q$ of `size` numbers each, zero at first. Let $v$
    be the values, the mask and the time since the observation that was read before. At
    a time with an observation

    - $g = \\mathrm{sigmoid}(\\tanh([p, q, v] A_g + a_g) B_g + b_g)$ and $r$, of the
        same form with weights of its own, are the two gates,
    - $\\tilde p, \\tilde q = \\tanh([r p, r q, v] A + a) B + b$ is the proposal,
    - $p \\leftarrow (1 - g) \\tilde p + g p$, and likewise $q$.

    At other times $p$ and $q$ stay as they are. This is the unit of Rubanova et al.
    (2019) without the differential equation between observations, as in Pal et al.
    (2021).

    What missing entries hold has no effect.

    **Arguments:**

    - `channels`: Number of channels.
    - `size`: Length of $p$ and of $q$.
    - `hidden`: Width of the hidden layers.
    - `key`: A `jax.random.key` for the initial parameters.
    """

    inputs: Linear
    gates: Float[Array, "state twice_hidden"]
    update: Linear
    reset: Linear
    candidate: Float[Array, "state hidden"]
    proposal: Linear

    def __init__(self, channels: int, size: int, hidden: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 6)
        # The parts of the weights that belong to v are applied to all times at once.
        self.inputs = Linear(2 * channels + 1, 3 * hidden, key=keys[0])
        self.gates = glorot_uniform(keys[1], 2 * size, 2 * hidden)
        self.update = Linear(hidden, size, key=keys[2])
        self.reset = Linear(hidden, size, key=keys[3])
        self.candidate = glorot_uniform(keys[4], 2 * size, hidden)
        self.proposal = Linear(hidden, 2 * size, key=keys[5])

    def __call__(
        self,
        times: Float[Array, " times"],
        x: Float[Array, "batch times channels"],
        mask: Bool[Array, "batch times channels"],
    ) -> Float[Array, "batch state"]:
        """Encodes a batch; returns $[p, q]$ once the first time has been read."""
        values = jnp.where(mask, x, 0)
        observed = mask.any(axis=-1)
        gaps = time_gaps(times, observed)[..., None]
        v = jnp.concatenate([values, mask.astype(x.dtype), gaps], axis=-1)
        v = jnp.swapaxes(self.inputs(v), 0, 1)

        def read(state, seen):
            v, observed = seen
            new = self._unit(state, v)
            return jnp.where(observed[:, None], new, state), None

        state = jnp.zeros((len(x), len(self.gates)), v.dtype)
        state, _ = lax.scan(read, state, (v, observed.T), reverse=True)
        return state

    def _unit(self, state, v):
        hidden = self.candidate.shape[1]
        for_gates, for_candidate = v[:, : 2 * hidden], v[:, 2 * hidden :]
        inner = jnp.tanh(state @ self.gates + for_gates)
        update = jax.nn.sigmoid(self.update(inner[:, :hidden]))
        reset = jax.nn.sigmoid(self.reset(inner[:, hidden:]))
        # Both halves of the state, p and q, go through the same gate.
        twice = lambda gate: jnp.concatenate([gate, gate], axis=-1)  # noqa: E731
        inner = jnp.tanh((twice(reset) * state) @ self.candidate + for_candidate)
        return state + twice(1 - update) * (self.proposal(inner) - state)


def time_gaps(
    times: Float[Array, " times"], observed: Bool[Array, "batch times"]
) -> Float[Array, "batch times"]:
    """The time from each time to the next one with an observation; 0 after the last."""

    def step(next_time, at):
        time, observed = at
        gap = jnp.where(jnp.isnan(next_time), 0, next_time - time)
        return jnp.where(observed, time, next_time), gap

    start = jnp.full(len(observed), jnp.nan, times.dtype)
    _, gaps = lax.scan(step, start, (times, observed.T), reverse=True)
    return gaps.T


class LatentField(eqx.Module):
    """A bounded autonomous vector field: $\\tanh$, then blocks of two layers.

    A block is $y \\mapsto \\tanh(\\tanh(y W_1 + b_1) W_2 + b_2)$.
    """

    blocks: list[MLP]

    def __init__(self, size: int, hidden: int, depth: int, *, key: PRNGKeyArray):
        self.blocks = [MLP(size, hidden, key=k) for k in jr.split(key, depth)]

    def __call__(
        self, t: Real[Array, ""], y: Float[Array, "... size"], args: None = None
    ) -> Float[Array, "... size"]:
        y = jnp.tanh(y)
        for block in self.blocks:
            y = jnp.tanh(block(y))
        return y


class LatentODE(eqx.Module):
    """A latent ODE (Rubanova et al., 2019): encode, solve, read off.

    Observations are read backwards in time and give a `Posterior` of the initial state.
    The state follows an autonomous differential equation, and at every time the
    channels are read off linearly. A batch of states is one state of one solve.

    A series without any observation has the prior, $N(0, 1)$ in each coordinate.

    **Arguments:**

    - `channels`: Number of channels.
    - `latent`: Length of the state.
    - `hidden`: Width of the vector field's hidden layers.
    - `depth`: Number of the vector field's blocks.
    - `encoder_size`, `encoder_hidden`: `size` and `hidden` of the `GRUEncoder`.
    - `solver`, `tolerance`, `adjoint`: As for `NeuralODE`.
    - `key`: A `jax.random.key` for the initial parameters.
    """

    encoder: GRUEncoder
    first: Linear
    second: Linear
    ode: NeuralODE
    readout: Linear

    def __init__(
        self,
        channels: int,
        *,
        latent: int = 20,
        hidden: int = 40,
        depth: int = 4,
        encoder_size: int = 50,
        encoder_hidden: int = 40,
        solver: diffrax.AbstractSolver,
        tolerance: float,
        adjoint: diffrax.AbstractAdjoint = TapeAdjoint(),  # noqa: B008
        key: PRNGKeyArray,
    ):
        keys = jr.split(key, 5)
        self.encoder = GRUEncoder(channels, encoder_size, encoder_hidden, key=keys[0])
        self.first = Linear(2 * encoder_size, encoder_size, key=keys[1])
        self.second = Linear(encoder_size, 2 * latent, key=keys[2])
        vector_field = LatentField(latent, hidden, depth, key=keys[3])
        self.ode = NeuralODE(vector_field, solver, tolerance, adjoint)
        self.readout = Linear(latent, channels, key=keys[4])

    def encode(
        self,
        times: Float[Array, " times"],
        x: Float[Array, "batch times channels"],
        mask: Bool[Array, "batch times channels"],
    ) -> Posterior:
        """The distribution of the state at the first time.

        **Arguments:**

        - `times`: When the series may have been observed.
        - `x`: What was observed; entries outside the mask have no effect.
        - `mask`: Which entries were observed.
        """
        out = self.second(jnp.tanh(self.first(self.encoder(times, x, mask))))
        seen = mask.any(axis=(1, 2))[:, None]
        return Posterior(*jnp.split(jnp.where(seen, out, 0), 2, axis=-1))

    def __call__(
        self,
        times: Float[Array, " times"],
        x: Float[Array, "batch times channels"],
        mask: Bool[Array, "batch times channels"],
        *,
        key: PRNGKeyArray | None = None,
        regularizer: Regularizers = None,
        max_steps: int = 4096,
    ) -> Reconstruction:
        """Reconstructs a batch of series.

        **Arguments:**

        - `times`, `x`, `mask`: As for `encode`.
        - `key`: A `jax.random.key` that draws the initial state and the step that is
            measured. Without it the initial state is the mean of its distribution.
        - `regularizer`: As for `lrnde.diffeqsolve`.
        - `max_steps`: Steps after which the solve gives up, which `successful` tells.
        """
        posterior = self.encode(times, x, mask)
        if key is None:
            y0, sample = posterior.mean, None
        else:
            draw, sample = jr.split(key)
            y0 = posterior.sample(draw)
        sol, penalty = self.ode.solve(
            y0,
            t0=times[0],
            t1=times[-1],
            regularizer=regularizer,
            key=sample,
            max_steps=max_steps,
            saveat=diffrax.SaveAt(ts=times),
        )
        return Reconstruction(
            x=self.readout(jnp.swapaxes(sol.ys, 0, 1)),
            posterior=posterior,
            penalty=penalty,
            nfe=sol.stats["nfe"],
            num_steps=sol.stats["num_steps"],
            successful=diffrax.is_successful(sol.result),
        )
