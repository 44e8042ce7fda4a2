"""Differential equations and models that several test files solve."""

from functools import cache

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

TOLERANCE = 1e-5
CONTROLLER = diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)


def forced(t, y, a):
    """A forced, damped, nonlinear field with the matrix `a` as its parameters."""
    return jnp.tanh(a @ y) * 3 + jnp.cos(8 * t) - y


TERM = diffrax.ODETerm(forced)
Y0 = jnp.array([1.0, -0.5, 0.25])


def matrix(seed=0):
    return jr.normal(jr.key(seed), (3, 3))


def problem(solver, t1=2.0, a=None):
    """The arguments of `diffeqsolve` for `forced`."""
    a = matrix() if a is None else a
    return TERM, solver, 0.0, t1, None, Y0, a


# An implicit-explicit solver takes its terms in two parts.
SPLIT = diffrax.MultiTerm(
    diffrax.ODETerm(lambda t, y, a: jnp.cos(8 * t) * jnp.ones_like(y)),
    diffrax.ODETerm(lambda t, y, a: jnp.tanh(a @ y) * 3 - y),
)


@cache
def _shapes(make, *args, **kwargs):
    model = eqx.filter_eval_shape(make, *args, **kwargs, key=jr.key(0))
    return eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))


def random_parameters(make, *args, **kwargs):
    """What would be made, but for its parameters, of which each is random.

    They are drawn by NumPy: XLA would compile the draw anew for every shape.
    """
    params, static = _shapes(make, *args, **kwargs)
    numbers = np.random.default_rng(0).standard_normal
    drawn = lambda a: jnp.asarray(numbers(a.shape) / 2, float)  # noqa: E731
    return eqx.combine(jax.tree.map(drawn, params), static)


class Counter:
    """Counts evaluations of a vector field while the program runs."""

    def __init__(self, field):
        self.field = field
        self.count = 0

    def __call__(self, t, y, args):
        jax.debug.callback(self._add)
        return self.field(t, y, args)

    def _add(self):
        self.count += 1

    def total(self):
        jax.effects_barrier()
        return self.count
