"""Data that is made here, whose truth is known."""

from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ._brownian import BrownianPath
from ._random import draw, GENERATOR
from ._solve import diffeqsolve
from ._sri import SRIW2
from .data import normalised_split, TimeSeries

# Steps between two times at which the truth is looked at.
_STEPS = 32


class Moments(NamedTuple):
    """Means and variances of paths from one initial state.

    - `y0`: The initial state.
    - `times`: The times.
    - `means`, `variances`: Of the states at these times, over paths.
    """

    y0: Float[Array, " size"]
    times: Float[Array, " times"]
    means: Float[Array, "times size"]
    variances: Float[Array, "times size"]


def spiral_terms(path: diffrax.AbstractBrownianPath) -> diffrax.MultiTerm:
    """The spiral of Pal et al. (2021), driven by a Brownian path.

    $du_1 = (-0.1 u_1^3 + 2 u_2^3) dt + 0.2 u_1 dW_1$,
    $du_2 = (-2 u_1^3 - 0.1 u_2^3) dt + 0.2 u_2 dW_2$, in the sense of Ito.
    """

    def drift(t, u, args):
        u1, u2 = u[..., 0] ** 3, u[..., 1] ** 3
        return jnp.stack([-0.1 * u1 + 2.0 * u2, -2.0 * u1 - 0.1 * u2], axis=-1)

    def diffusion(t, u, args):
        return lx.DiagonalLinearOperator(0.2 * u)

    return diffrax.MultiTerm(
        diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path)
    )


@jax.jit(static_argnames=("times", "trajectories"))
def spiral_paths(
    key: PRNGKeyArray, times: int, trajectories: int
) -> Float[Array, "trajectories times 2"]:
    """Paths of the spiral from (2, 0), at evenly spaced times from 0 to 1.

    **Arguments:**

    - `key`: A `jax.random.key`.
    - `times`: How many times; at least two.
    - `trajectories`: How many paths.
    """
    # In single precision throughout, so that the paths are the same in double.
    float32 = jnp.float32
    y0 = jnp.tile(jnp.array([2.0, 0.0], float32), (trajectories, 1))
    ts = jnp.linspace(0, 1, _STEPS * (times - 1) + 1, dtype=float32)
    noise = jax.ShapeDtypeStruct(y0.shape, float32)
    sol, _ = diffeqsolve(
        spiral_terms(BrownianPath(noise, key)),
        SRIW2(),
        0.0,
        1.0,
        None,
        y0,
        saveat=diffrax.SaveAt(ts=ts[::_STEPS]),
        stepsize_controller=diffrax.StepTo(ts=ts),
        max_steps=None,
    )
    return jnp.swapaxes(sol.ys, 0, 1)


def spiral(times: int, trajectories: int) -> Moments:
    """Means and variances of the spiral, from simulated paths; always the same.

    **Arguments:** as for `spiral_paths`.
    """
    paths = spiral_paths(jr.key(0, impl=GENERATOR), times, trajectories)
    return Moments(
        y0=paths[0, 0],
        times=jnp.linspace(0, 1, times, dtype=paths.dtype),
        means=paths.mean(axis=0),
        variances=paths.var(axis=0, ddof=1),
    )


# Of each channel of the oscillators: how often it is observed at a time that is.
_RATES = {"cosine": 0.9, "sine": 0.6, "sum": 0.6, "energy": 0.2}


def oscillators(series: int = 1000) -> TimeSeries:
    """Damped oscillators, each observed at times of its own; always the same.

    With $r = a e^{-\\gamma t}$, $\\alpha = \\omega t + \\varphi$ the channels are the
    cosine part $q = r \\cos\\alpha$, the sine part $p = -r \\sin\\alpha$, their sum and
    the energy $q^2 + p^2$. Amplitude $a$, rate of damping $\\gamma$, frequency
    $\\omega$ and phase $\\varphi$ are drawn anew for each series. Half of the 49 times
    are observed, and at these each channel with a probability of its own, with Gaussian
    noise of standard deviation 0.03.

    **Arguments:**

    - `series`: How many series; one in five is for testing.

    **Returns:**

    A `lrnde.data.TimeSeries` with its truth.
    """
    # In single precision throughout, so that the draws are the same in double.
    keys, float32 = jr.split(jr.key(0, impl=GENERATOR), 4), jnp.float32
    times = jnp.linspace(0, 1, 49, dtype=float32)
    low = jnp.array([0.5, 0.2, 2.0, 0.0], float32)
    high = jnp.array([1.0, 1.0, 5.0, 2 * jnp.pi], float32)
    parameters = jr.uniform(keys[0], (series, 4), float32, low, high)
    amplitude, damping, frequency, phase = jnp.split(parameters, 4, axis=1)
    size = amplitude * jnp.exp(-damping * times)
    q = size * jnp.cos(frequency * times + phase)
    p = -size * jnp.sin(frequency * times + phase)
    truth = jnp.stack([q, p, q + p, q**2 + p**2], axis=-1)
    values = truth + 0.03 * draw(jr.normal, keys[1], truth.shape, dtype=float32)
    seen = (series, len(times), 1)
    mask = draw(jr.bernoulli, keys[2], seen, p=float32(0.5))
    rates = jnp.array(list(_RATES.values()), float32)
    # As `jr.bernoulli`, of which `draw` takes a single rate.
    mask &= draw(jr.uniform, keys[3], truth.shape, dtype=float32) < rates
    return normalised_split(
        "oscillators",
        *map(np.asarray, (times, values, mask)),
        channels=tuple(_RATES),
        truth=np.asarray(truth),
    )
