"""`lrnde.diffeqsolve`: `diffrax.diffeqsolve` with a local regularizer."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from diffrax._root_finder import use_stepsize_tol
from diffrax._term import WrapTerm
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree, Real

from ._adjoint import CheckpointAdjoint, SteadyStateAdjoint, TapeAdjoint
from ._brownian import find_path, Increment, RememberingSolver, show
from ._nfe import count_evaluations, evaluates_first_stage
from ._regularizers import AbstractRegularizer, TakenStep
from ._sampling import ControllerState, draw_uniforms, Step, StepSampler


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
    regularizer: AbstractRegularizer | None = None,
    key: PRNGKeyArray | None = None,
    saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),  # noqa: B008
    stepsize_controller: diffrax.AbstractStepSizeController = (
        diffrax.ConstantStepSize()  # noqa: B008
    ),
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),  # noqa: B008
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

    - `regularizer`: What to measure, for example `lrnde.LocalError()`. With `None` the
        penalty is zero and nothing is computed for it. (Keyword-only argument.)
    - `key`: A `jax.random.key`, needed with a regularizer: it draws the step that is
        measured. (Keyword-only argument.)

    **Returns:**

    A pair of

    - the `diffrax.Solution`. Its `stats` also hold `"nfe"`, the number of vector field
        evaluations of the solve: rejected steps, the first stage and the choice of the
        first step included; `None` where it cannot be counted (implicit solvers). For
        a stochastic differential equation it counts the drift, and `"nfe_drift"` and
        `"nfe_diffusion"` stand beside it.
    - the penalty, a real scalar. Its gradient reaches `terms` and `args` through the
        one step that is measured; it is zero with respect to `y0`.

    **Raises:**

    - `ValueError`: if a regularizer is given with no `key` or with a step size
        controller that does not adapt; if the controller adapts and the solver
        estimates no error.
    - `TypeError`: if `regularizer` is not a regularizer, or does not work with this
        kind of solver.
    - Whatever `diffrax.diffeqsolve` raises.
    """
    if regularizer is not None:
        _check(regularizer, key, solver, stepsize_controller)
    adaptive = isinstance(
        stepsize_controller, diffrax.AbstractAdaptiveStepSizeController
    )
    first = evaluates_first_stage(solver, solver_state, made_jump)
    t0, t1, dt0, y0 = _promote(t0, t1, dt0, y0, saveat)
    if adaptive:
        sampler = _make_sampler(stepsize_controller, regularizer, key, first, t0.dtype)
        if controller_state is not None:
            controller_state = sampler.init_state(controller_state, t0, y0)
    else:
        sampler = stepsize_controller
    path = find_path(terms)
    adjoint = _aware(adjoint, regularizer, path)
    stepper = solver
    if path is not None:
        _check_path(solver, solver_state, adjoint)
        stepper = RememberingSolver(solver, path, sampled=regularizer is not None)
        terms = show(terms, path.draw(path.key, jnp.ones_like(t0)))
    sol = diffrax.diffeqsolve(
        terms,
        stepper,
        t0,
        t1,
        dt0,
        y0,
        args,
        saveat=eqx.tree_at(
            lambda s: (s.controller_state, s.solver_state),
            saveat,
            (True, saveat.solver_state or path is not None),
        ),
        stepsize_controller=sampler,
        adjoint=adjoint,
        controller_state=controller_state,
        solver_state=solver_state,
        made_jump=made_jump,
        throw=throw,
        **kwargs,
    )
    state = sol.controller_state
    first_stages = state.first_stages if adaptive else first.astype(jnp.int32)
    direction = jnp.where(t0 < t1, 1, -1)
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
        first_stages,
        resumed=solver_state is not None,
    )
    memory = None if path is None else sol.solver_state[1]
    penalty = jnp.zeros((), t0.dtype)
    if regularizer is not None:
        stepper = _prepare_solver(stepper, controller, adjoint)
        problem = (terms, stepper, controller, args)
        noise = memory and jtu.tree_map(lambda x: x[0], memory.samples)
        penalty = _penalty(regularizer, problem, state, noise, t0, t1, key)
    if memory is not None:
        sol = _check_memory(sol, memory.overflowed, throw)
    return _finish(sol, saveat, state, adaptive, nfe), penalty


def _check(regularizer, key, solver, controller) -> None:
    if not isinstance(regularizer, AbstractRegularizer):
        raise TypeError(
            f"regularizer={regularizer!r} is not a regularizer; pass an instance, for "
            "example `regularizer=lrnde.LocalError()`."
        )
    name = type(regularizer).__name__
    if not isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        raise ValueError(
            f"{name} measures the error of adaptive steps, but "
            f"{type(controller).__name__} does not adapt them. Pass for example "
            "`stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6)`."
        )
    if key is None:
        raise ValueError(
            f"{name} draws a random step. Pass `key=jax.random.key(...)`, a new one "
            "for every solve."
        )
    regularizer.check(solver)


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


def _make_sampler(controller, regularizer, key, evaluate_first_stage, dtype):
    if regularizer is None:
        return StepSampler(controller, None, None, evaluate_first_stage)
    uniforms = draw_uniforms(key, dtype)
    return StepSampler(controller, regularizer.sampling, uniforms, evaluate_first_stage)


def _aware(adjoint, regularizer, path):
    """An adjoint that knows what this package does between steps."""
    special = regularizer is not None or path is not None
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


def _penalty(regularizer, problem, state: ControllerState, noise, t0, t1, key):
    step = jtu.tree_map(lambda x: x[0], state.reservoir.slots)
    step, noise = lax.stop_gradient((step, noise))
    if regularizer.step == "restarted":
        # As in the solve, time increases: it is negated if t1 lies before t0.
        t_end = jnp.where(t0 < t1, t1, -t1)
        step = _restart(problem, step, noise, t_end, regularizer.sampling, key)
        if noise is not None:
            # A new step has new noise.
            path = problem[1].path
            noise = path.draw(jr.fold_in(key, 2), step.t1 - step.t0)
    taken = _take(problem, step, noise)
    # Not |t1 - t0|: an event may have ended the solve before t1.
    return lax.stop_gradient(state.reservoir.length) * regularizer.measure(taken)


def _take(problem, step: Step, noise: Increment | None) -> TakenStep:
    terms, solver, controller, args = problem
    if noise is not None:
        terms, solver = show(terms, noise), solver.solver
    solver_state = solver.init(terms, step.t0, step.t1, step.y0, args)
    y1, y_error, dense_info, _, _ = solver.step(
        terms, step.t0, step.t1, step.y0, args, solver_state, made_jump=False
    )
    return TakenStep(terms, solver, controller, args, *step, y1, y_error, dense_info)


def _restart(problem, step: Step, noise, t_end, sampling, key) -> Step:
    """A new step with a step size of its own, from a time inside a step of the solve.

    Nothing here is differentiated: where the new step starts and how long it is are
    data, as in the solve.
    """
    terms, solver, controller, args = jtu.tree_map(
        lambda x: lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, problem
    )
    if sampling == "unbiased":
        # The step is drawn in proportion to its length, so a uniform time inside it
        # is a uniform time of the whole solve.
        fraction = jr.uniform(jr.fold_in(key, 1), dtype=step.t0.dtype)
        taken = _take((terms, solver, controller, args), step, noise)
        t = step.t0 + fraction * (step.t1 - step.t0)
        interpolation = solver.interpolation_cls(
            t0=step.t0, t1=step.t1, **taken.dense_info
        )
        start = t, interpolation.evaluate(t)
    else:
        start = step.t0, step.y0
    t, y = start
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


def _finish(sol, saveat, state, adaptive, nfe) -> diffrax.Solution:
    """Hands back what was asked for, without the sampler's own state."""
    inner = state.inner if adaptive else state
    asked = inner if saveat.controller_state else None
    solver_state = sol.solver_state if saveat.solver_state else None
    stats = {**sol.stats, **nfe}
    return eqx.tree_at(
        lambda s: (s.controller_state, s.solver_state, s.stats),
        sol,
        (asked, solver_state, stats),
        is_leaf=lambda x: x is None,
    )
