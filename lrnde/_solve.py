"""`lrnde.diffeqsolve`: `diffrax.diffeqsolve` with regularizers."""

import warnings
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from diffrax._root_finder import use_stepsize_tol
from diffrax._term import WrapTerm
from jaxtyping import Array, PRNGKeyArray, PyTree, Real

from ._accumulation import AccumulatingSolver
from ._adjoint import CheckpointAdjoint, SteadyStateAdjoint, TapeAdjoint
from ._brownian import find_path, RememberingSolver, show
from ._integrals import augment, Problem, read_integrals
from ._local import local_penalty, World
from ._nfe import count_evaluations, evaluates_first_stage
from ._plan import check_plan, make_plan, Plan
from ._regularizers import Regularizers
from ._sampling import draw_uniforms, StepSampler


@eqx.filter_jit
def diffeqsolve(
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: Any,
    t1: Any,
    dt0: Any,
    y0: PyTree,
    args: PyTree = None,
    *,
    regularizer: Regularizers = None,
    key: PRNGKeyArray | None = None,
    saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),  # noqa: B008
    stepsize_controller: diffrax.AbstractStepSizeController = (
        diffrax.ConstantStepSize()  # noqa: B008
    ),
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),  # noqa: B008
    event: diffrax.Event | None = None,
    controller_state: PyTree = None,
    solver_state: PyTree = None,
    made_jump: Any = None,
    throw: bool = True,
    **kwargs: Any,
) -> tuple[diffrax.Solution, Real[Array, ""]]:
    """Solves a differential equation and measures how hard that was.

    A drop-in for `diffrax.diffeqsolve`: every argument not described here is as there.
    The solve itself is diffrax's, step by step; add `weight * penalty` to a loss and
    training moves towards dynamics that take fewer steps.

    **Arguments:**

    - `regularizer`: What to measure, for example `lrnde.LocalError()`; a pair
        `(weight, regularizer)`; or a list of such. With `None` the penalty
        is zero and nothing is computed for it. A weight that changes should be an
        array: a new Python number compiles the solve anew. (Keyword-only argument.)
    - `key`: A `jax.random.key`, needed with a regularizer that draws random numbers,
        such as the step that is measured: a new one for every solve. (Keyword-only
        argument.)

    Under `jax.vmap` every solve has its own steps, key and penalty; take the mean of
    the penalties. On a GPU ask JAX for full precision of matrix products, by
    `jax.config.update("jax_default_matmul_precision", "highest")`: the rounding of TF32
    drowns the error estimate, and the penalty then does next to nothing. Where nothing
    is set, a warning says so.

    **Returns:**

    A pair of

    - the `diffrax.Solution`. Its `stats` also hold `"nfe"`, the number of vector field
        evaluations of the solve: rejected steps, the first stage and the choice of the
        first step included, what an event evaluates left out; `None` where it cannot be
        counted (implicit solvers and some others). For a stochastic differential
        equation it counts the drift, and `"nfe_drift"` and
        `"nfe_diffusion"` stand beside it.
    - the penalty, a real scalar: the weighted sum over regularizers. The gradient of a
        local one reaches `terms` and `args` through the step that is measured; it is
        zero with respect to `y0`. That of the others goes through the solve.

    **Raises:**

    - `ValueError`: if there is no key for a regularizer that draws random numbers; if a
        regularizer measures steps and the step size controller does not adapt them; if
        the controller adapts and the solver estimates no error; if the adjoint or a
        `solver_state` does not go with a regularizer or a `lrnde.BrownianPath`; if
        `dt0` leads away from `t1`.
    - `TypeError`: if `regularizer` is not a regularizer, or does not work with this
        kind of solver or terms, or does not measure a single number; if a weight is not
        a single real number, or `key` not one key.
    - Whatever `diffrax.diffeqsolve` raises.
    """
    plan = make_plan(regularizer, key)
    check_plan(
        plan,
        terms,
        solver,
        stepsize_controller,
        adjoint,
        solver_state,
        kwargs.get("discrete_terminating_event"),
    )
    adaptive = isinstance(
        stepsize_controller, diffrax.AbstractAdaptiveStepSizeController
    )
    first = evaluates_first_stage(solver, solver_state, made_jump)
    _check_direction(t0, t1, dt0)
    t0, t1, dt0, y0 = _promote(t0, t1, dt0, y0, saveat)
    _warn_of_rounding(plan, y0)
    for item in plan.steer:
        t1, saveat = item.regularizer.jitter(item.key, t0, t1, saveat)
    direction = jnp.where(t0 < t1, 1, -1)
    path = find_path(terms)
    adjoint = _aware(adjoint, plan, path)
    if path is not None:
        _check_path(solver, solver_state, adjoint)
        terms = show(terms, path.draw(path.key, jnp.ones_like(t0)))
    problem = Problem(terms, y0, saveat, stepsize_controller, event)
    if plan.integrals:
        _, regularizers, keys = zip(*plan.integrals, strict=True)
        problem = augment(problem, regularizers, keys, adjoint)
    sampler = problem.controller
    if adaptive:
        sampler = _make_sampler(sampler, plan, first, t0.dtype)
        if controller_state is not None:
            controller_state = sampler.init_state(controller_state, t0, problem.y0)
    stepper, resumed = solver, solver_state is not None
    if plan.sums:
        stepper = _accumulate(solver, problem.controller.wrap(direction), adjoint, plan)
        if resumed:
            solver_state = stepper.start(solver_state, t0, problem.y0)
    if path is not None:
        stepper = RememberingSolver(stepper, path, len(plan.local))
    sol = diffrax.diffeqsolve(
        problem.terms,
        stepper,
        t0,
        t1,
        dt0,
        problem.y0,
        args,
        saveat=eqx.tree_at(
            lambda s: (s.controller_state, s.solver_state),
            problem.saveat,
            (True, saveat.solver_state or stepper is not solver),
        ),
        stepsize_controller=sampler,
        adjoint=adjoint,
        event=problem.event,
        controller_state=controller_state,
        solver_state=solver_state,
        # As an array: what diffrax knows to be true it takes to be true of each step.
        made_jump=made_jump if made_jump is None else jnp.asarray(made_jump),
        throw=throw,
        **kwargs,
    )
    integrals = totals = ()
    if plan.integrals:
        sol, integrals = read_integrals(sol, adjoint)
    solver_state, noise = sol.solver_state, [None] * len(plan.local)
    if path is not None:
        solver_state, memory = solver_state
        sol = _check_memory(sol, memory.overflowed, throw)
        noise = memory.samples
    if plan.sums:
        solver_state, totals = solver_state
    terms, controller = _as_diffrax_sees_them(terms, stepsize_controller, direction)
    nfe = count_evaluations(
        terms,
        solver,
        controller,
        t0 * direction,
        t1 * direction,
        dt0,
        y0,
        args,
        sol.stats["num_steps"],
        sol.controller_state.first_stages
        if adaptive
        else jnp.minimum(first, sol.stats["num_steps"]),
        resumed=resumed,
    )
    penalty = jnp.zeros((), t0.dtype)
    for item, x in zip(plan.integrals, integrals, strict=True):
        penalty = penalty + item.weight * (x * direction)
    for item, total in zip(plan.sums, totals, strict=True):
        x = item.regularizer.finish(total, sol.stats["num_accepted_steps"])
        penalty = penalty + item.weight * x
    if plan.local:
        taker = _prepare_solver(solver, controller, adjoint)
        world = World(terms, taker, controller, args, path, t1 * direction)
        reservoirs = sol.controller_state.reservoirs
        for item, *sample in zip(plan.local, reservoirs, noise, strict=True):
            penalty = penalty + item.weight * local_penalty(world, item, *sample)
    sol = _finish(sol, saveat, solver_state, adaptive, nfe)
    return sol, penalty


def _check_direction(t0, t1, dt0) -> None:
    """As diffrax does, which sees arrays and so would name no numbers."""
    numbers = all(isinstance(t, int | float) for t in (t0, t1, dt0))
    if numbers and (t1 - t0) * dt0 < 0:
        raise ValueError(
            f"A first step of dt0={dt0} leads from t0={t0} away from t1={t1}. Give "
            "`dt0` the sign of `t1 - t0`."
        )


def _promote(t0, t1, dt0, y0, saveat):
    """Promotes times and state to the dtypes that diffrax gives them."""
    is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)  # noqa: E731
    saved = [sub.ts for sub in jtu.tree_leaves(saveat.subs, is_leaf=is_sub)]
    with jax.numpy_dtype_promotion("standard"):
        times = [t for t in (t0, t1, dt0, *saved) if t is not None]
        dtype = jnp.result_type(*times)
        if jnp.issubdtype(dtype, jnp.integer):
            dtype = jnp.result_type(float)
        promote = lambda y: jnp.asarray(y, jnp.result_type(y, dtype))  # noqa: E731
        y0 = jtu.tree_map(promote, y0)
    dt0 = None if dt0 is None else jnp.asarray(dt0, dtype)
    return jnp.asarray(t0, dtype), jnp.asarray(t1, dtype), dt0, y0


def _warn_of_rounding(plan: Plan, y0) -> None:
    """Says so if what is measured may be the rounding of matrix products."""
    said = jax.config.jax_default_matmul_precision is not None
    if said or jax.default_backend() != "gpu" or not (plan.local or plan.sums):
        return
    if any(y.dtype in (jnp.float32, jnp.complex64) for y in jtu.tree_leaves(y0)):
        warnings.warn(
            "By default JAX rounds matrix products on a GPU, which drowns the error "
            "estimate and leaves the penalty without effect. Set "
            "`jax.config.update('jax_default_matmul_precision', 'highest')`; any "
            "setting silences this.",
            stacklevel=2,
        )


def _make_sampler(controller, plan: Plan, evaluate_first_stage, dtype) -> StepSampler:
    samplings = tuple(item.regularizer.sampling for item in plan.local)
    uniforms = tuple(draw_uniforms(item.key, dtype) for item in plan.local)
    return StepSampler(controller, samplings, uniforms, evaluate_first_stage)


def _accumulate(solver, controller, adjoint, plan: Plan) -> AccumulatingSolver:
    solver = _prepare_solver(solver, controller, adjoint)
    regularizers = tuple(item.regularizer for item in plan.sums)
    return AccumulatingSolver(solver, controller, regularizers)


def _aware(adjoint, plan: Plan, path):
    """An adjoint that knows what this package does between steps."""
    special = bool(plan.local) or path is not None
    if special and type(adjoint) is diffrax.RecursiveCheckpointAdjoint:
        return CheckpointAdjoint(adjoint.checkpoints)
    if type(adjoint) is diffrax.ImplicitAdjoint:
        return SteadyStateAdjoint(adjoint.linear_solver, adjoint.tags)
    return adjoint


def _check_path(solver, solver_state, adjoint) -> None:
    remedy = "Use `diffrax.VirtualBrownianTree` in place of `lrnde.BrownianPath`"
    if not isinstance(adjoint, TapeAdjoint | CheckpointAdjoint):
        raise ValueError(
            f"{type(adjoint).__name__} does not know what to do between steps. {remedy}"
            ", or `adjoint=lrnde.TapeAdjoint()`."
        )
    if isinstance(solver, diffrax.HalfSolver | diffrax.LeapfrogMidpoint):
        raise ValueError(
            f"{type(solver).__name__} asks for the noise of other intervals than its "
            f"steps. {remedy}."
        )
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        raise ValueError(
            f"{type(solver).__name__} is implicit and does not solve stochastic "
            "equations. Use for example `lrnde.SOSRI()`."
        )
    if solver_state is not None:
        raise ValueError(f"`lrnde.BrownianPath` starts at the start. {remedy}.")


def _check_memory(sol, overflowed, throw):
    failed = diffrax.RESULTS.max_steps_rejected
    result = diffrax.RESULTS.where(overflowed, failed, sol.result)
    sol = eqx.tree_at(lambda s: s.result, sol, result)
    if not throw:
        return sol
    return eqx.error_if(
        sol,
        overflowed,
        "The solve rejected too many steps, one within the other, to remember them all."
        " Start with a smaller `dt0`, or use `lrnde.BrownianPath(memory=...)`.",
    )


def _as_diffrax_sees_them(terms, controller, direction):
    """Terms and controller in the solve's own time, which always increases."""
    terms = jtu.tree_map(
        lambda term: WrapTerm(term, direction),
        terms,
        is_leaf=lambda x: (
            isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)
        ),
    )
    return terms, controller.wrap(direction)


def _prepare_solver(solver, controller, adjoint):
    """The solver as inside the solve: tolerances filled in, the right kind of loop."""
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        names = [
            name
            for name in ("rtol", "atol", "norm")
            if getattr(solver.root_finder, name) is use_stepsize_tol
        ]
        solver = eqx.tree_at(
            lambda s: [getattr(s.root_finder, name) for name in names],
            solver,
            [getattr(controller, name) for name in names],
        )
    forward = isinstance(adjoint, diffrax.DirectAdjoint | diffrax.ForwardMode)
    if forward and getattr(solver, "scan_kind", "") is None:
        # The default loop over stages knows no forward-mode derivative.
        solver = eqx.tree_at(
            lambda s: s.scan_kind, solver, "bounded", is_leaf=lambda x: x is None
        )
    return solver


def _finish(sol, saveat, solver_state, adaptive, nfe) -> diffrax.Solution:
    """Hands back what was asked for, without the sampler's own state."""
    inner = sol.controller_state.inner if adaptive else sol.controller_state
    asked = inner if saveat.controller_state else None
    solver_state = solver_state if saveat.solver_state else None
    return eqx.tree_at(
        lambda s: (s.controller_state, s.solver_state, s.stats),
        sol,
        (asked, solver_state, {**sol.stats, **nfe}),
        is_leaf=lambda x: x is None,
    )
