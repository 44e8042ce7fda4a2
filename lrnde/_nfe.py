"""How many vector field evaluations a solve has cost."""

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from ._explicit import AbstractExplicitRungeKutta


def evaluates_first_stage(
    solver: diffrax.AbstractSolver, solver_state: PyTree, made_jump
) -> Bool[Array, ""]:
    """Whether the first step has to evaluate its first stage, or has it already.

    **Arguments:**

    - `solver`: The solver.
    - `solver_state`, `made_jump`: As passed to `diffrax.diffeqsolve`.
    """
    jumped = jnp.asarray(False if made_jump is None else made_jump)
    inner = solver
    while isinstance(inner, diffrax.HalfSolver):
        inner = inner.solver
    if isinstance(inner, AbstractExplicitRungeKutta):
        return jumped
    if isinstance(inner, diffrax.AbstractRungeKutta) and solver_state is not None:
        return solver_state[0] | jumped
    return jnp.array(True)


class _Cost:
    """Evaluations: once a solve, a step, and a step whose first stage is not reused."""

    def __init__(self, solve: int, step: int, first_stage: int):
        self.solve, self.step, self.first_stage = solve, step, first_stage


def _solver_cost(solver: diffrax.AbstractSolver) -> _Cost | None:
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        # How often the root finder calls the vector field is not visible from outside.
        return None
    if isinstance(solver, diffrax.HalfSolver):
        cost = _solver_cost(solver.solver)
        # Two half steps and a whole one. The second half step follows the first, so
        # it has no first stage to evaluate anew.
        return cost and _Cost(cost.solve, 3 * cost.step, 2 * cost.first_stage)
    if isinstance(solver, AbstractExplicitRungeKutta):
        fsal = int(solver.tableau.fsal)
        return _Cost(fsal, solver.tableau.num_stages - fsal, fsal)
    if isinstance(solver, diffrax.AbstractRungeKutta):
        tableau = solver.tableau
        if not isinstance(tableau, diffrax.ButcherTableau):
            return None
        fsal = int(tableau.fsal)
        return _Cost(0, tableau.num_stages - fsal, fsal)
    if isinstance(solver, diffrax.ReversibleHeun):
        return _Cost(1, 1, 0)
    if isinstance(solver, diffrax.Euler | diffrax.LeapfrogMidpoint):
        return _Cost(0, 1, 0)
    return None


def _initial_step_cost(
    terms: diffrax.AbstractTerm,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    t0,
    t1,
    dt0,
    y0: PyTree,
    args: PyTree,
) -> int:
    """Evaluations that the controller's choice of the first step takes.

    The algorithm of Hairer, Norsett and Wanner (II.4) takes two. Whether diffrax runs
    it depends on the terms, so look whether it asks for the vector field at all.
    """
    if dt0 is not None or not isinstance(
        controller, diffrax.AbstractAdaptiveStepSizeController
    ):
        return 0
    asked = False

    def func(*arguments):
        nonlocal asked
        asked = True
        return solver.func(*arguments)

    def init(t0, t1, y0, args):
        order = solver.error_order(terms)
        return controller.init(terms, t0, t1, y0, None, args, func, order)[0]

    eqx.filter_eval_shape(init, t0, t1, y0, args)
    return 2 if asked else 0


def count_evaluations(
    terms: diffrax.AbstractTerm,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    t0,
    t1,
    dt0,
    y0: PyTree,
    args: PyTree,
    num_steps: Int[Array, ""],
    first_stages: Int[Array, ""],
    resumed: bool,
) -> Int[Array, ""] | None:
    """The number of vector field evaluations of a solve.

    **Arguments:**

    - `terms`, `solver`, `controller`, `t0`, `t1`, `dt0`, `y0`, `args`: The problem, as
        `diffrax.diffeqsolve` saw it.
    - `num_steps`: Steps tried, rejected ones included.
    - `first_stages`: In how many of them a first-same-as-last solver had to evaluate
        its first stage anew.
    - `resumed`: Whether the solver went on from a state of an earlier solve.

    **Returns:**

    An integer; `None` for a solver whose evaluations cannot be counted from outside
    (an implicit one: its root finder decides).
    """
    cost = _solver_cost(solver)
    if cost is None:
        return None
    initial = _initial_step_cost(terms, solver, controller, t0, t1, dt0, y0, args)
    constant = jnp.asarray(initial + (0 if resumed else cost.solve), jnp.int32)
    return constant + cost.step * num_steps + cost.first_stage * first_stages
