"""`lrnde.diffeqsolve` is `diffrax.diffeqsolve`, and counts what it costs."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from problems import CONTROLLER, Counter, problem, SPLIT, TERM, TOLERANCE, Y0
from test_explicit import Heun
from test_regularizers import Start

import lrnde

SOLVERS = [
    lrnde.Tsit5(),
    lrnde.Dopri8(),
    Heun(),
    diffrax.Tsit5(),
    diffrax.Bosh3(),
    diffrax.Heun(),
    diffrax.HalfSolver(diffrax.Bosh3()),
    diffrax.HalfSolver(lrnde.Bosh3()),
    diffrax.HalfSolver(diffrax.Euler()),
]
named = pytest.mark.parametrize


def solver_id(solver):
    inner = getattr(solver, "solver", None)
    module = type(solver).__module__.split(".")[0]
    suffix = f"-{solver_id(inner)}" if inner is not None else ""
    return f"{module}.{type(solver).__name__}{suffix}"


@named("dt0", [None, 1.5], ids=["first-step-chosen", "first-step-rejected"])
@named("solver", SOLVERS, ids=solver_id)
def test_nfe_equals_a_counting_vector_field(solver, dt0):
    counter = Counter(TERM.vector_field)
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    _, _, t0, t1, _, y0, a = problem(solver)
    sol, _ = lrnde.diffeqsolve(
        diffrax.ODETerm(counter),
        solver,
        t0,
        t1,
        dt0,
        y0,
        a,
        stepsize_controller=controller,
    )
    assert sol.stats["nfe"] == counter.total()
    assert dt0 is None or sol.stats["num_rejected_steps"] > 0


JUMPING = [lrnde.Tsit5(), diffrax.Tsit5(), diffrax.Heun(), diffrax.ReversibleHeun()]


@named("solver", JUMPING, ids=solver_id)
def test_nfe_counts_the_stages_after_a_jump(solver):
    counter = Counter(TERM.vector_field)
    controller = diffrax.ClipStepSizeController(CONTROLLER, jump_ts=[0.5, 1.2])
    _, _, t0, t1, _, y0, a = problem(solver)
    args = (diffrax.ODETerm(counter), solver, t0, t1, 0.1, y0, a)
    sol, _ = lrnde.diffeqsolve(*args, stepsize_controller=controller)
    assert sol.stats["nfe"] == counter.total()


CONSTANT = [
    lrnde.Tsit5(),
    diffrax.Tsit5(),
    diffrax.Euler(),
    diffrax.LeapfrogMidpoint(),
]


@named("made_jump", [None, True])
@named("solver", CONSTANT, ids=solver_id)
def test_nfe_of_constant_steps(solver, made_jump):
    counter = Counter(TERM.vector_field)
    _, _, t0, t1, _, y0, a = problem(solver)
    args = (diffrax.ODETerm(counter), solver, t0, t1, 0.125, y0, a)
    sol, _ = lrnde.diffeqsolve(*args, made_jump=made_jump)
    assert sol.stats["nfe"] == counter.total()


@named("solver", [lrnde.Tsit5(), diffrax.Tsit5()], ids=solver_id)
def test_nfe_of_a_solve_of_no_length(solver):
    counter = Counter(TERM.vector_field)
    _, _, t0, _, _, y0, a = problem(solver)
    sol, _ = lrnde.diffeqsolve(diffrax.ODETerm(counter), solver, t0, t0, 0.1, y0, a)
    assert sol.stats["nfe"] == counter.total()


def test_nfe_leaves_out_what_an_event_evaluates():
    counter = Counter(TERM.vector_field)
    speed = Counter(lambda t, y, given: jnp.abs(given[0].vf(t, y, given[1])).max())
    event = diffrax.Event(
        lambda t, y, args, *, terms, **kwargs: speed(t, y, (terms, args)) < 1.0
    )
    _, solver, t0, t1, dt0, y0, a = problem(lrnde.Tsit5())
    args = (diffrax.ODETerm(counter), solver, t0, t1, dt0, y0, a)
    sol, _ = lrnde.diffeqsolve(*args, event=event, stepsize_controller=CONTROLLER)
    assert 5 < sol.stats["num_steps"] <= speed.total()
    assert sol.stats["nfe"] == counter.total() - speed.total()


def test_nfe_does_not_include_the_measured_step(getkey):
    args = problem(lrnde.Tsit5())
    plain, _ = lrnde.diffeqsolve(*args, stepsize_controller=CONTROLLER)
    measured, _ = lrnde.diffeqsolve(
        *args,
        stepsize_controller=CONTROLLER,
        regularizer=lrnde.LocalError(),
        key=getkey(),
    )
    assert measured.stats["nfe"] == plain.stats["nfe"]


def test_nfe_of_an_implicit_solver_is_not_guessed():
    args = problem(diffrax.Kvaerno3())
    sol, _ = lrnde.diffeqsolve(*args, stepsize_controller=CONTROLLER)
    assert sol.stats["nfe"] is None


@named("regularizer", [None, lrnde.LocalError()], ids=["plain", "regularized"])
@named("solver", [lrnde.Tsit5(), diffrax.Tsit5(), diffrax.Kvaerno3()], ids=solver_id)
def test_the_solve_is_that_of_diffrax(solver, regularizer, getkey):
    ts = jnp.linspace(0.0, 2.0, 7)
    subs = [diffrax.SubSaveAt(ts=ts), diffrax.SubSaveAt(steps=True)]
    kwargs = dict(
        saveat=diffrax.SaveAt(subs=subs, dense=True),
        stepsize_controller=CONTROLLER,
        max_steps=256,
    )
    args = problem(solver)
    expected = diffrax.diffeqsolve(*args, **kwargs)
    sol, _ = lrnde.diffeqsolve(*args, regularizer=regularizer, key=getkey(), **kwargs)
    # To rounding, not to the bit: a different program may fuse its operations
    # differently.
    for a, b in zip(jax.tree.leaves(sol.ys), jax.tree.leaves(expected.ys), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sol.ts[1], expected.ts[1], rtol=1e-4)
    for name, value in expected.stats.items():
        assert sol.stats[name] == value
    middle = sol.evaluate(0.77), expected.evaluate(0.77)
    np.testing.assert_allclose(*middle, rtol=1e-5, atol=1e-6)


@named("regularizer", [None, lrnde.LocalError(), lrnde.GlobalError()])
@named("precision", [None, "highest"])
def test_rounded_products_on_a_gpu_are_warned_of(
    regularizer, precision, getkey, monkeypatch
):
    def penalty():
        return lrnde.diffeqsolve(
            *problem(lrnde.Tsit5(), t1=0.1),
            regularizer=regularizer,
            key=getkey(),
            stepsize_controller=CONTROLLER,
        )[1]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_matmul_precision(precision):
        if regularizer is None or precision:
            jax.eval_shape(penalty)  # a warning would be an error
        else:
            with pytest.warns(UserWarning, match="rounds matrix products on a GPU"):
                jax.eval_shape(penalty)


def test_without_a_regularizer_the_penalty_is_zero():
    _, penalty = lrnde.diffeqsolve(
        *problem(lrnde.Tsit5()), stepsize_controller=CONTROLLER
    )
    assert penalty == 0


def test_resuming_equals_going_on(float64, getkey):
    """`solver_state` and `controller_state` of one solve start the next.

    With a controller that looks at earlier steps, too.
    """
    controller = diffrax.PIDController(
        rtol=TOLERANCE, atol=TOLERANCE, pcoeff=0.3, icoeff=0.4
    )
    states = dict(solver_state=True, controller_state=True)
    save = diffrax.SaveAt(steps=True, **states)

    def part(solve, field, t0, t1, y0, before=None, **kwargs):
        if before is not None:
            kwargs |= {name: getattr(before, name) for name in states}
        return solve(
            diffrax.ODETerm(field),
            lrnde.Tsit5(),
            jnp.array(t0),
            jnp.array(t1),
            jnp.array(0.1),
            y0,
            problem(None)[-1],
            saveat=save,
            stepsize_controller=controller,
            max_steps=128,
            **kwargs,
        )

    def both_parts(solve, field, **kwargs):
        half = part(solve, field, 0.0, 1.0, Y0, **kwargs)
        n = int(half.stats["num_accepted_steps"])
        return half, part(solve, field, 1.0, 2.0, half.ys[n - 1], half, **kwargs)

    def ours(*args, **kwargs):
        sol, penalty = lrnde.diffeqsolve(*args, **kwargs)
        assert penalty > 0
        return sol

    counter = Counter(TERM.vector_field)
    found = both_parts(ours, counter, regularizer=lrnde.LocalError(), key=getkey())
    expected = both_parts(diffrax.diffeqsolve, TERM.vector_field)
    for x, y in zip(found, expected, strict=True):
        assert x.stats["num_steps"] == y.stats["num_steps"]
        names = "ts", "ys", *states
        x, y = ([getattr(sol, name) for name in names] for sol in (x, y))
        assert jax.tree.structure(x) == jax.tree.structure(y)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), x, y)
    _, rest = found
    whole = part(diffrax.diffeqsolve, TERM.vector_field, 0.0, 2.0, Y0)
    end = rest.ys[rest.ts == 2.0], whole.ys[whole.ts == 2.0]
    np.testing.assert_allclose(*end, rtol=1e-3)
    measured = 7  # the stages of the measured step of each part
    assert sum(sol.stats["nfe"] + measured for sol in found) == counter.total()
    # Nothing is evaluated twice: all stages but the first, which the first half left.
    assert rest.stats["nfe"] == 6 * rest.stats["num_steps"]


def test_backwards_in_time(float64, getkey):
    """Integrating from 2 to 0 takes the steps of the mirrored problem."""
    mirrored = diffrax.ODETerm(lambda s, y, a: -TERM.vector_field(2.0 - s, y, a))
    a, key = problem(None)[-1], getkey()
    kwargs = dict(stepsize_controller=CONTROLLER, regularizer=lrnde.LocalError())
    backward, penalty = lrnde.diffeqsolve(
        TERM, lrnde.Tsit5(), 2.0, 0.0, None, Y0, a, key=key, **kwargs
    )
    forward, expected = lrnde.diffeqsolve(
        mirrored, lrnde.Tsit5(), 0.0, 2.0, None, Y0, a, key=key, **kwargs
    )
    np.testing.assert_allclose(backward.ys, forward.ys, rtol=1e-10)
    np.testing.assert_allclose(penalty, expected, rtol=1e-6)
    assert backward.stats["nfe"] == forward.stats["nfe"]


def test_vmap_over_states_and_keys(float64, getkey):
    """A vmapped solve is many solves: each with its own steps, sample and penalty."""
    y0s = Y0 * jnp.array([[0.5], [1.0], [3.0]])
    keys = jr.split(getkey(), 3)
    a = problem(None)[-1]

    @jax.jit
    def solve(y0, key):
        sol, penalty = lrnde.diffeqsolve(
            TERM,
            lrnde.Tsit5(),
            0.0,
            2.0,
            None,
            y0,
            a,
            regularizer=lrnde.LocalError("biased"),
            key=key,
            stepsize_controller=CONTROLLER,
        )
        return sol.ys, penalty, sol.stats["num_steps"]

    batched = jax.vmap(solve)(y0s, keys)
    for i in range(3):
        alone = solve(y0s[i], keys[i])
        for x, y in zip(batched, alone, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-6)


def test_a_failed_solve_is_reported_as_by_diffrax(getkey):
    kwargs = dict(stepsize_controller=CONTROLLER, max_steps=4, key=getkey())
    args = problem(lrnde.Tsit5())
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of solver steps"):
        lrnde.diffeqsolve(*args, regularizer=lrnde.LocalError(), **kwargs)
    sol, penalty = lrnde.diffeqsolve(
        *args, regularizer=lrnde.LocalError(), throw=False, **kwargs
    )
    assert sol.result == diffrax.RESULTS.max_steps_reached
    assert jnp.isfinite(penalty)


def test_an_event_ends_the_solve_and_the_sample_is_from_before_it(getkey):
    """In a batch, too, where those that have ended wait for the others."""
    term = diffrax.ODETerm(lambda t, y, args: TERM.vector_field(t, y, args[0]))
    event = diffrax.Event(lambda t, y, args, **kwargs: t > args[1])
    _, solver, t0, t1, dt0, y0, a = problem(lrnde.Tsit5())

    @jax.jit
    @jax.vmap
    def solve(end, key):
        sol, penalty = lrnde.diffeqsolve(
            *(term, solver, t0, t1, dt0, y0, (a, end)),
            stepsize_controller=CONTROLLER,
            event=event,
            regularizer=Start(),
            key=key,
        )
        # The penalty is the measure times the length of the solve.
        length = sol.ts[-1]
        return sol.result == diffrax.RESULTS.event_occurred, length, penalty / length

    ends = jnp.repeat(jnp.array([0.1, 0.8, 1.5]), 100)
    occurred, found, starts = solve(ends, jr.split(getkey(), 300))
    assert jnp.all(occurred) and jnp.all((ends < found) & (found < ends + 0.5))
    assert jnp.all((0 <= starts) & (starts < ends))
    for start, end in zip(starts.reshape(3, 100), ends[::100], strict=True):
        # Anywhere before the event: the latest and the mean of 100 uniform times.
        assert start.max() > 0.7 * end and abs(start.mean() / end - 0.5) < 0.2


def test_the_length_of_a_solve_ends_with_its_event(getkey):
    """A steady state is found no later because one is ready to wait longer."""
    key = getkey()

    def solve(t1, adjoint):
        _, penalty = lrnde.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            lrnde.Tsit5(),
            0.0,
            t1,
            0.1,
            Y0,
            regularizer=lrnde.LocalError(),
            key=key,
            event=diffrax.Event(diffrax.steady_state_event()),
            stepsize_controller=CONTROLLER,
            adjoint=adjoint,
        )
        return penalty

    penalties = [
        solve(100.0, diffrax.RecursiveCheckpointAdjoint()),
        solve(jnp.inf, diffrax.RecursiveCheckpointAdjoint()),
        solve(jnp.inf, diffrax.ImplicitAdjoint()),
    ]
    assert 0 < penalties[0] < jnp.inf
    np.testing.assert_allclose(penalties, penalties[0], rtol=1e-4)


def test_an_empty_interval_has_no_error(getkey):
    sol, penalty = lrnde.diffeqsolve(
        TERM,
        lrnde.Tsit5(),
        1.0,
        1.0,
        None,
        Y0,
        problem(None)[-1],
        stepsize_controller=CONTROLLER,
        regularizer=lrnde.LocalError(),
        key=getkey(),
    )
    assert penalty == 0 and sol.stats["num_steps"] == 0


@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_types_are_promoted_by_nobody_else(promotion):
    with jax.numpy_dtype_promotion(promotion):
        sol, penalty = lrnde.diffeqsolve(
            *problem(diffrax.Bosh3()),
            stepsize_controller=CONTROLLER,
            regularizer=[lrnde.LocalError(), lrnde.GlobalError()],
            key=jr.key(0),
        )
    assert penalty > 0 and sol.stats["nfe"] > 4


@named(
    ("change", "error", "says"),
    [
        (dict(key=None), ValueError, "key=jax.random.key"),
        (
            dict(stepsize_controller=diffrax.ConstantStepSize()),
            ValueError,
            "PIDController",
        ),
        (dict(solver=diffrax.Euler()), TypeError, "embedded error"),
        (dict(dt0=-0.1), ValueError, "the sign of"),
        (
            dict(solver=diffrax.Kvaerno3(), regularizer=lrnde.LocalStiffness()),
            TypeError,
            "explicit Runge-Kutta",
        ),
    ],
)
def test_misuse_says_what_to_change(change, error, says, getkey):
    arguments = dict(
        solver=lrnde.Tsit5(),
        dt0=0.1,
        regularizer=lrnde.LocalError(),
        key=getkey(),
        stepsize_controller=CONTROLLER,
    )
    arguments |= change
    solver, dt0 = arguments.pop("solver"), arguments.pop("dt0")
    with pytest.raises(error, match=says):
        lrnde.diffeqsolve(
            TERM, solver, 0.0, 1.0, dt0, Y0, problem(None)[-1], **arguments
        )


def test_a_solver_without_error_estimate_cannot_adapt():
    with pytest.raises(ValueError, match="no embedded error estimate"):
        lrnde.diffeqsolve(*problem(diffrax.Euler()), stepsize_controller=CONTROLLER)


@named("name", ["sampling", "step"])
@named("regularizer", [lrnde.LocalError, lrnde.LocalStiffness])
def test_unknown_names_are_refused(regularizer, name):
    with pytest.raises(ValueError, match="'unbiassed' is not known; choose one of"):
        regularizer(**{name: "unbiassed"})


def test_implicit_explicit_terms(float64, getkey):
    a, save = problem(None)[-1], diffrax.SaveAt(t0=True, steps=True)
    sol, penalty = lrnde.diffeqsolve(
        SPLIT,
        diffrax.KenCarp4(),
        0.0,
        2.0,
        None,
        Y0,
        a,
        stepsize_controller=CONTROLLER,
        regularizer=lrnde.LocalError(),
        key=getkey(),
        saveat=save,
        max_steps=128,
    )
    n = int(sol.stats["num_accepted_steps"])
    expected = diffrax.diffeqsolve(
        *problem(lrnde.Tsit5()), stepsize_controller=CONTROLLER
    )
    np.testing.assert_allclose(sol.ys[n], expected.ys[0], rtol=1e-2)

    # As the root finder is told by the controller, unless it is told otherwise.
    root_finder = diffrax.VeryChord(TOLERANCE, TOLERANCE, norm=CONTROLLER.norm)
    solver = diffrax.KenCarp4(root_finder=root_finder)

    @jax.jit
    @jax.vmap
    def retake(t0, t1, y0):
        state = solver.init(SPLIT, t0, t1, y0, a)
        y1, error, *_ = solver.step(SPLIT, t0, t1, y0, a, state, made_jump=False)
        scale = TOLERANCE + TOLERANCE * jnp.maximum(abs(y0), abs(y1))
        return 2.0 * jnp.sqrt(jnp.mean((error / scale) ** 2))

    possible = retake(sol.ts[:n], sol.ts[1 : n + 1], sol.ys[:n])
    assert 0 < penalty < 2
    assert jnp.abs(possible / penalty - 1).min() < 1e-6
