"""The penalty of one step, after the solve."""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from diffrax._term import WrapTerm
from jax import lax
from jaxtyping import Array, PyTree, Real

from ._brownian import BrownianPath, Increment, show
from ._plan import Item
from ._regularizers import single, TakenStep
from ._sampling import Reservoir, Step


class World(NamedTuple):
    """All that a step depends on besides its start and its length.

    - `terms`, `solver`, `controller`, `args`: As inside the solve.
    - `path`: The `BrownianPath` of the terms, if there is one.
    - `t1`: Where the solve was to end, in its own time, which increases.
    """

    terms: PyTree[diffrax.AbstractTerm]
    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractAdaptiveStepSizeController
    args: PyTree
    path: BrownianPath | None
    t1: Real[Array, ""]


def local_penalty(
    world: World, item: Item, reservoir: Reservoir, noise: Increment | None
) -> Real[Array, ""]:
    """Takes the sampled step once more and measures it; differentiable.

    **Arguments:**

    - `world`: What the step depends on.
    - `item`: The local regularizer, and its key.
    - `reservoir`: The sampled step.
    - `noise`: Its noise, if the terms have a `BrownianPath`; as the sample, the first
        of two rows.

    **Returns:**

    The measure times the length of the solve, not yet weighted.
    """
    regularizer, key = item.regularizer, item.key
    step, noise = jtu.tree_map(lambda x: x[0], (reservoir.slots, noise))
    step, noise = lax.stop_gradient((step, noise))
    if regularizer.step == "restarted":
        step = _restart(world, step, noise, regularizer.sampling, key)
        if noise is not None:
            # A new step has new noise.
            noise = world.path.draw(jr.fold_in(key, 2), step.t1 - step.t0)
    # Not |t1 - t0|: an event may have ended the solve before t1. The step that it ended
    # was taken as a whole, and may have been drawn.
    length = lax.stop_gradient(reservoir.length)
    return length * single(regularizer, regularizer.measure(_take(world, step, noise)))


def _take(world: World, step: Step, noise: Increment | None) -> TakenStep:
    terms, solver, controller, args, *_ = world
    if noise is not None:
        terms = show(terms, noise)
    solver_state = solver.init(terms, step.t0, step.t1, step.y0, args)
    y1, y_error, dense_info, _, _ = solver.step(
        terms, step.t0, step.t1, step.y0, args, solver_state, made_jump=False
    )
    return TakenStep(terms, solver, controller, args, *step, y1, y_error, dense_info)


def _restart(world: World, step: Step, noise, sampling, key) -> Step:
    """A new step with a step size of its own, from a time inside a step of the solve.

    Nothing here is differentiated: where the new step starts and how long it is are
    data, as in the solve.
    """
    world = jtu.tree_map(
        lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, world
    )
    terms, solver, controller, args, _, t_end = world
    if sampling == "unbiased":
        # The step is drawn in proportion to its length, so a uniform time inside it
        # is a uniform time of the whole solve.
        fraction = jr.uniform(jr.fold_in(key, 1), dtype=step.t0.dtype)
        taken = _take(world, step, noise)
        t = step.t0 + fraction * (step.t1 - step.t0)
        interpolation = solver.interpolation_cls(
            t0=step.t0, t1=step.t1, **taken.dense_info
        )
        y = interpolation.evaluate(t)
    else:
        t, y = step.t0, step.y0
    tnext, _ = controller.init(
        _plain(terms), t, t_end, y, None, args, solver.func, solver.error_order(terms)
    )
    return lax.stop_gradient(Step(t, jnp.minimum(tnext, t_end), y))


def _plain(terms):
    """An `ODETerm` again: diffrax picks a first step size for no other kind of term."""
    if isinstance(terms, WrapTerm) and isinstance(terms.term, diffrax.ODETerm):
        return diffrax.ODETerm(
            lambda t, y, args: terms.prod(
                terms.vf(t, y, args), jnp.asarray(terms.direction, t.dtype)
            )
        )
    return terms
