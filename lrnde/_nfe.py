"""How many vector field evaluations a solve has cost."""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
from diffrax._heuristics import is_sde
from jaxtyping import Array, Bool, Int, PyTree

from ._explicit import AbstractExplicitRungeKutta
from ._sri import AbstractSRI


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
    if isinstance(inner, AbstractExplicitRungeKutta | diffrax.ReversibleHeun):
        return jumped
    if isinstance(inner, diffrax.AbstractRungeKutta) and solver_state is not None:
        return solver_state[0] | jumped
    return jnp.array(True)


class _Cost(NamedTuple):
    """Evaluations: once a solve, a step, and a step whose first stage is not reused."""

    solve: int = 0
    step: int = 0
    first_stage: int = 0


def _solver_costs(solver: diffrax.AbstractSolver) -> tuple[_Cost, _Cost] | None:
    """The cost in evaluations of the drift and of the diffusion.

    For an ordinary differential equation they are the same.
    """
    # First of all, since it passes for an instance of its solver's class, too.
    if isinstance(solver, diffrax.HalfSolver):
        costs = _solver_costs(solver.solver)
        # Two half steps and a whole one. The second half step follows the first, so
        # it has no first stage to evaluate anew.
        return costs and tuple(
            _Cost(cost.solve, 3 * cost.step, 2 * cost.first_stage) for cost in costs
        )
    if isinstance(solver, AbstractSRI):
        tableau = solver.tableau
        return (
            _Cost(step=tableau.drift_evaluations),
            _Cost(step=tableau.diffusion_evaluations),
        )
    if isinstance(solver, diffrax.AbstractSRK):
        return _srk_costs(solver.tableau)
    if isinstance(solver, diffrax.EulerHeun):
        return _Cost(step=1), _Cost(step=2)
    cost = _solver_cost(solver)
    return cost and (cost, cost)


def _srk_costs(tableau: diffrax.StochasticButcherTableau) -> tuple[_Cost, _Cost]:
    stages = len(tableau.b_sol)

    def evaluations(ignored):
        return stages - (0 if ignored is None else int(sum(ignored)))

    drift = evaluations(tableau.ignore_stage_f)
    # The diffusion of additive noise depends on time alone, so its ends suffice.
    additive = tableau.is_additive_noise()
    diffusion = 2 if additive else evaluations(tableau.ignore_stage_g)
    return _Cost(step=drift), _Cost(step=diffusion)


def _solver_cost(solver: diffrax.AbstractSolver) -> _Cost | None:
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        # How often the root finder calls the vector field is not visible from outside.
        return None
    ours = isinstance(solver, AbstractExplicitRungeKutta)
    if ours or isinstance(solver, diffrax.AbstractRungeKutta):
        tableau = solver.tableau
        if not isinstance(tableau, diffrax.ButcherTableau):
            return None
        fsal = int(tableau.fsal)
        # Ours evaluates the first stage of a solve before its first step.
        before = fsal if ours else 0
        return _Cost(before, tableau.num_stages - fsal, fsal)
    if isinstance(solver, diffrax.ReversibleHeun):
        return _Cost(1, 1, 1)
    if isinstance(solver, diffrax.Euler | diffrax.LeapfrogMidpoint):
        return _Cost(step=1)
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
) -> dict[str, Int[Array, ""] | None]:
    """The number of vector field evaluations of a solve.

    **Arguments:**

    - `terms`, `solver`, `controller`, `t0`, `t1`, `dt0`, `y0`, `args`: The problem, as
        `diffrax.diffeqsolve` saw it.
    - `num_steps`: Steps tried, rejected ones included.
    - `first_stages`: In how many of them a first-same-as-last solver had to evaluate
        its first stage anew.
    - `resumed`: Whether the solver went on from a state of an earlier solve.

    **Returns:**

    `"nfe"`, an integer; `None` for a solver whose evaluations cannot be counted from
    outside (an implicit one: its root finder decides; and some rarely used ones). For a
    stochastic differential equation with a drift and a diffusion, also `"nfe_drift"`,
    which is the same, and `"nfe_diffusion"`.
    """
    stochastic = is_sde(terms) and isinstance(terms, diffrax.MultiTerm)
    names = ("nfe_drift", "nfe_diffusion") if stochastic else ("nfe",)
    costs = _solver_costs(solver)
    if costs is None:
        return dict.fromkeys(("nfe", *names))
    initial = _initial_step_cost(terms, solver, controller, t0, t1, dt0, y0, args)

    def total(cost):
        constant = jnp.asarray(initial + (0 if resumed else cost.solve), jnp.int32)
        return constant + cost.step * num_steps + cost.first_stage * first_stages

    counts = dict(zip(names, map(total, costs), strict=False))
    return {"nfe": counts[names[0]], **counts}
