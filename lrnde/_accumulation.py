"""A solver that adds up what its steps measure."""

import diffrax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._integrals import strip
from ._regularizers import AbstractGlobalRegularizer, single, TakenStep
from ._wrapped import AbstractTransparentSolver


class AccumulatingSolver(AbstractTransparentSolver):
    """Measures each step as it is taken.

    The solver's state is a pair of the stepper's state and, for each regularizer, what
    the accepted steps so far have come to. diffrax puts a solver's state back when a
    step is rejected, so rejected steps do not count.

    **Arguments:**

    - `stepper`: The solver to wrap.
    - `controller`: The step size controller, whose tolerances and norm the measures
        are in.
    - `regularizers`: What to measure.
    """

    stepper: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    regularizers: tuple[AbstractGlobalRegularizer, ...]

    def start(self, solver_state, t0, y0):
        """The state to start with, given the stepper's."""
        dtypes = [jnp.finfo(y.dtype).dtype for y in jtu.tree_leaves(y0)]
        zero = jnp.zeros((), jnp.result_type(t0, *dtypes))
        return solver_state, tuple(zero for _ in self.regularizers)

    def init(self, terms, t0, t1, y0, args):
        return self.start(self.stepper.init(terms, t0, t1, y0, args), t0, y0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        inner, totals = solver_state
        y1, y_error, dense_info, inner, result = self.stepper.step(
            terms, t0, t1, y0, args, inner, made_jump
        )
        # A step that did not work out, and so will be rejected, has an infinite error.
        # What it measures is thrown away, but its derivative, infinity times zero,
        # would not be.
        outcome = jtu.tree_map(_finite, (y1, y_error, dense_info))
        terms, y0, outcome = strip((terms, y0, outcome))
        step = TakenStep(
            terms, self.stepper, self.controller, args, t0, t1, y0, *outcome
        )
        totals = tuple(
            x.add(total, single(x, x.measure(step))).astype(total.dtype)
            for x, total in zip(self.regularizers, totals, strict=True)
        )
        return y1, y_error, dense_info, (inner, totals), result


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0)
