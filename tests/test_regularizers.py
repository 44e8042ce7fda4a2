"""The penalty: its distribution over keys, its gradient, its memory."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from problems import CONTROLLER, matrix, problem, TERM, Y0

import lrnde
from lrnde._random import draw

ADJOINTS = [
    diffrax.RecursiveCheckpointAdjoint(),
    diffrax.DirectAdjoint(),
    diffrax.BacksolveAdjoint(),
    lrnde.TapeAdjoint(),
]
TSIT5 = lrnde.Tsit5()
named = pytest.mark.parametrize


def type_name(x):
    return type(x).__name__


def penalty_of(
    a,
    y0,
    key,
    regularizer,
    adjoint=ADJOINTS[0],
    solver=TSIT5,
    controller=CONTROLLER,
):
    _, penalty = lrnde.diffeqsolve(
        TERM,
        solver,
        0.0,
        2.0,
        None,
        y0,
        a,
        regularizer=regularizer,
        key=key,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=128,
    )
    return penalty


def saved_steps(solver, a, y0):
    """Every step (t0, t1, y0, y1) of a solve by diffrax, from what it saves."""
    sol = diffrax.diffeqsolve(
        TERM,
        solver,
        0.0,
        2.0,
        None,
        y0,
        a,
        stepsize_controller=CONTROLLER,
        saveat=diffrax.SaveAt(t0=True, steps=True),
        max_steps=128,
    )
    n = int(sol.stats["num_accepted_steps"])
    ts, ys = sol.ts[: n + 1], sol.ys[: n + 1]
    return ts[:-1], ts[1:], ys[:-1]


@ft.partial(jax.jit, static_argnums=0)
def retake(solver, a, t0, t1, y0):
    """The scaled error of one step, written out with NumPy-like operations alone."""
    state = solver.init(TERM, t0, t1, y0, a)
    y1, error, *_ = solver.step(TERM, t0, t1, y0, a, state, made_jump=False)
    tolerance = CONTROLLER.atol + CONTROLLER.rtol * jnp.maximum(abs(y0), abs(y1))
    return jnp.sqrt(jnp.mean((error / tolerance) ** 2))


def errors_and_lengths(solver, a=None, y0=Y0):
    a = matrix() if a is None else a
    t0, t1, ys = saved_steps(solver, a, y0)
    errors = jnp.stack(
        [retake(solver, a, *step) for step in zip(t0, t1, ys, strict=True)]
    )
    return np.asarray(errors, np.float64), np.asarray(t1 - t0, np.float64)


@ft.cache
def sampled_penalties(sampling, count=4000):
    keys = jr.split(jr.key(7), count)
    sample = ft.partial(penalty_of, regularizer=lrnde.LocalError(sampling))
    penalties = eqx.filter_jit(jax.vmap(sample, in_axes=(None, None, 0)))
    return np.asarray(penalties(matrix(), Y0, keys), np.float64)


@named("sampling", ["unbiased", "biased", "error"])
def test_mean_penalty_is_the_weighted_mean_over_steps(sampling):
    """4,000 keys; for "unbiased" this is the global regularizer, sum E_j h_j."""
    penalties = sampled_penalties(sampling)
    errors, lengths = errors_and_lengths(lrnde.Tsit5())
    weights = {"unbiased": lengths, "biased": np.ones_like(errors), "error": errors}
    expected = 2.0 * np.average(errors, weights=weights[sampling])
    if sampling == "unbiased":
        np.testing.assert_allclose(expected, np.sum(errors * lengths))
    standard_error = penalties.std(ddof=1) / np.sqrt(len(penalties))
    assert abs(penalties.mean() - expected) < 3 * standard_error


@named("sampling", ["unbiased", "biased", "error"])
def test_every_step_is_drawn_as_often_as_its_weight_says(sampling):
    penalties = sampled_penalties(sampling) / 2.0
    errors, lengths = errors_and_lengths(lrnde.Tsit5())
    weights = {"unbiased": lengths, "biased": np.ones_like(errors), "error": errors}
    probability = weights[sampling] / weights[sampling].sum()
    drawn = np.abs(penalties[:, None] - errors[None, :]).argmin(axis=1)
    counts = np.bincount(drawn, minlength=len(errors))
    expected = probability * len(penalties)
    # Chi-squared over the steps that are drawn often enough for it.
    often = expected > 5
    chi2 = np.sum((counts - expected)[often] ** 2 / expected[often])
    freedom = often.sum() - 1
    assert freedom > 5
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


class Start(lrnde.AbstractLocalRegularizer):
    """The time at which the measured step starts."""

    def measure(self, step):
        return step.t0


def test_a_restarted_step_starts_at_a_uniform_time(float64, getkey):
    """Under "unbiased", Kolmogorov and Smirnov's test against the uniform law."""
    keys, regularizer = jr.split(getkey(), 2000), Start(step="restarted")
    start = jax.vmap(ft.partial(penalty_of, matrix(), Y0, regularizer=regularizer))
    # The measure comes back times the length of the interval, 2: divide by its square.
    uniform = np.sort(start(keys)) / 4
    grid = (np.arange(2000) + 0.5) / 2000
    assert np.abs(uniform - grid).max() < 1.95 / np.sqrt(2000)


def test_a_restarted_step_is_the_step_of_a_new_solve(float64, getkey):
    """From a step of the solve, with the first step size that the controller picks."""
    regularizer = lrnde.LocalError("biased", "restarted")
    penalties = [penalty_of(matrix(), Y0, getkey(), regularizer) for _ in range(5)]
    t0, _, ys = saved_steps(lrnde.Tsit5(), matrix(), Y0)

    @jax.jit
    def fresh(t, y):
        order = lrnde.Tsit5().error_order(TERM)
        func = lrnde.Tsit5().func
        t1, _ = CONTROLLER.init(TERM, t, 2.0, y, None, matrix(), func, order)
        return 2.0 * retake(lrnde.Tsit5(), matrix(), t, jnp.minimum(t1, 2.0), y)

    possible = np.array([fresh(t, y) for t, y in zip(t0, ys, strict=True)])
    for penalty in penalties:
        assert np.abs(possible / penalty - 1).min() < 1e-6


def test_gradient_against_finite_differences(float64, getkey):
    """Central differences of the one step, where it starts and ends held fixed."""
    key, held, kinds = getkey(), {}, (lrnde.LocalError, lrnde.LocalStiffness)

    def watched(kind, taken):
        class Watched(kind):
            def measure(self, step):
                def hold(*where):
                    held[kind, taken] = where

                jax.debug.callback(hold, step.t0, step.t1, step.y0)
                return super().measure(step)

        return Watched("error", taken)  # hardly ever draws the tiny first step

    cases = [(kind, taken) for kind in kinds for taken in ("taken", "restarted")]
    regularizers = [watched(*case) for case in cases]

    @jax.jit
    @jax.value_and_grad
    def penalty(a, weights):
        pairs = list(zip(weights, regularizers, strict=True))
        return penalty_of(a, Y0, key, pairs)

    @ft.partial(jax.jit, static_argnums=0)
    def of_step(kind, a, t0, t1, y0):
        solver = lrnde.Tsit5()
        state = solver.init(TERM, t0, t1, y0, a)
        y1, error, dense, *_ = solver.step(TERM, t0, t1, y0, a, state, False)
        taken = lrnde.TakenStep(
            TERM, solver, CONTROLLER, a, t0, t1, y0, y1, error, dense
        )
        return 2.0 * kind().measure(taken)

    a, eps, shifts = matrix(), 2e-3, (-2, -1, 1, 2)
    directions = draw(jr.normal, getkey(), (3, 3, 3))
    for case, weights in zip(cases, jnp.eye(len(cases)), strict=True):
        value, gradient = penalty(a, weights)
        jax.effects_barrier()
        kind, where = case[0], held[case]
        np.testing.assert_allclose(value, of_step(kind, a, *where), rtol=1e-7)
        for direction in directions:
            values = [
                of_step(kind, a + shift * eps * direction, *where) for shift in shifts
            ]
            # Central differences of order four: rounding asks for a large `eps`.
            difference = jnp.array([1, -8, 8, -1]) @ jnp.stack(values) / (12 * eps)
            exact = jnp.vdot(gradient, direction)
            assert abs(difference - exact) < 1e-5 * jnp.linalg.norm(gradient)


# Compilation takes long: one solver meets every adjoint, the others some.
@named(
    ("solver", "adjoints"),
    [
        (lrnde.Bosh3(), ADJOINTS),
        (diffrax.HalfSolver(diffrax.Euler()), ADJOINTS[:1]),
        (diffrax.Kvaerno3(), ADJOINTS[2:]),
    ],
    ids=type_name,
)
def test_gradients_agree_under_every_adjoint(solver, adjoints, float64, getkey):
    key, regularizer = getkey(), lrnde.LocalError()
    loose = diffrax.PIDController(rtol=1e-3, atol=1e-3)

    def penalty(a, y0, adjoint):
        return penalty_of(a, y0, key, regularizer, adjoint, solver, loose)

    @jax.jit
    def gradients(a, y0):
        reverse = [jax.grad(penalty, (0, 1))(a, y0, adjoint) for adjoint in adjoints]
        return reverse, jax.jacfwd(penalty)(a, y0, diffrax.ForwardMode())

    reverse, forward = gradients(matrix(), Y0)
    for of_parameters, of_input in reverse:
        scale = jnp.abs(forward).max()
        assert scale > 0
        np.testing.assert_allclose(of_parameters, forward, atol=1e-8 * scale)
        assert jnp.all(of_input == 0)


@named(
    "solver, order, tolerance",
    [(TSIT5, 5, 1e-6), (lrnde.Bosh3(), 3, 1e-5)],
    ids=["Tsit5", "Bosh3"],
)
def test_the_gradient_is_that_of_the_logarithm_of_the_number_of_steps(
    solver, order, tolerance, float64, getkey
):
    # Equation (weight-trade) of the book, where it is exact but for the ends of the
    # solve and higher powers of the step size: on a circle all steps are of one length
    # and have one error, so all ways of drawing a step agree.
    def rotation(t, y, log_speed):
        return jnp.exp(log_speed) * jnp.stack([-y[1], y[0]])

    @jax.jit
    @ft.partial(jax.value_and_grad, has_aux=True)
    def solve(log_speed):
        sol, penalty = lrnde.diffeqsolve(
            diffrax.ODETerm(rotation),
            solver,
            0.0,
            10.0,
            0.01,
            Y0[:2],
            log_speed,
            stepsize_controller=diffrax.PIDController(rtol=0.0, atol=tolerance),
            regularizer=lrnde.LocalError(),
            key=getkey(),
        )
        return penalty, sol.stats["num_accepted_steps"]

    (penalty, steps), gradient = solve(3.0)
    (_, more), _ = solve(3.1)
    (_, fewer), _ = solve(2.9)
    slope = (np.log(more) - np.log(fewer)) / 0.2
    assert steps > 200
    np.testing.assert_allclose(gradient, order * penalty * slope, rtol=0.01)


def test_the_solve_itself_keeps_its_gradient(float64, getkey):
    """Adding a regularizer does not change the gradient of what was there before."""

    @ft.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(a, regularizer):
        sol, _ = lrnde.diffeqsolve(
            *problem(lrnde.Tsit5(), a=a),
            regularizer=regularizer,
            key=getkey(),
            stepsize_controller=CONTROLLER,
        )
        return jnp.sum(sol.ys**2)

    plain = gradient(matrix(), None)
    regularized = gradient(matrix(), lrnde.LocalError())
    np.testing.assert_allclose(regularized, plain, rtol=1e-10)


def test_pytree_states(getkey):
    """Splitting a state into a tree changes no number."""
    key = getkey()

    def split(y):
        return {"first": y[:1], "rest": (y[1:],)}

    def join(tree):
        return jnp.concatenate([tree["first"], *tree["rest"]])

    term = diffrax.ODETerm(lambda t, y, a: split(TERM.vector_field(t, join(y), a)))
    _, _, t0, t1, dt0, y0, a = problem(None)
    kwargs = dict(
        regularizer=lrnde.LocalError("error"), key=key, stepsize_controller=CONTROLLER
    )
    flat = lrnde.diffeqsolve(TERM, lrnde.Tsit5(), t0, t1, dt0, y0, a, **kwargs)
    tree = lrnde.diffeqsolve(term, lrnde.Tsit5(), t0, t1, dt0, split(y0), a, **kwargs)
    np.testing.assert_allclose(tree[1], flat[1], rtol=1e-3)
    leaf = jtu.tree_map(lambda y: y[0], tree[0].ys)
    np.testing.assert_allclose(join(leaf), flat[0].ys[0], rtol=1e-5)


@named("solver", [diffrax.Tsit5, diffrax.Dopri5, lrnde.Bosh3, diffrax.Heun])
def test_stiffness_of_a_linear_field_is_its_eigenvalue(solver, float64, getkey):
    """For y' = -r y every estimate is r over the stability interval, exactly."""
    rate = 3.7
    _, penalty = lrnde.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -rate * y),
        solver(),
        0.0,
        2.0,
        0.01,
        Y0,
        regularizer=lrnde.LocalStiffness(),
        key=getkey(),
        stepsize_controller=CONTROLLER,
    )
    expected = 2.0 * rate / lrnde.stability_interval(solver)
    np.testing.assert_allclose(penalty, expected, rtol=1e-6)


@named("regularizer", [lrnde.LocalStiffness(), lrnde.GlobalStiffness()])
def test_stiffness_of_a_stochastic_equation_is_refused(regularizer, getkey):
    """Its noise is among the stages, so the estimate would grow with small steps."""
    tree = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (), getkey())
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.ControlTerm(lambda t, y, args: 0.5 * y, tree),
    )
    with pytest.raises(TypeError, match="LocalError"):
        lrnde.diffeqsolve(
            terms,
            diffrax.Heun(),
            0.0,
            1.0,
            0.1,
            jnp.array(1.0),
            stepsize_controller=CONTROLLER,
            regularizer=regularizer,
            key=getkey(),
        )


def test_stiffness_of_a_field_at_rest_is_zero(getkey):
    def penalty(rate):
        return lrnde.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: rate * jnp.zeros_like(y)),
            lrnde.Tsit5(),
            0.0,
            1.0,
            None,
            Y0,
            rate,
            regularizer=lrnde.LocalStiffness(),
            key=getkey(),
            stepsize_controller=CONTROLLER,
        )[1]

    value, gradient = jax.jit(jax.value_and_grad(penalty))(1.0)
    assert value == 0 and gradient == 0


def test_stiffness_in_a_batch_has_the_gradient_of_each():
    """With a norm that is not smooth; the first of the two arrives much sooner."""
    controller = diffrax.PIDController(
        rtol=1e-3, atol=1e-3, norm=lambda y: jnp.max(jnp.abs(y))
    )

    def penalty(rate, weights):
        regularizers = lrnde.LocalStiffness(), lrnde.GlobalStiffness()
        return lrnde.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: jnp.sin(rate * t) * y),
            lrnde.Tsit5(),
            0.0,
            2.0,
            None,
            jnp.ones(2),
            rate,
            regularizer=list(zip(weights, regularizers, strict=True)),
            key=jr.key(0),
            stepsize_controller=controller,
        )[1]

    rates = jnp.array([0.5, 20.0])
    gradient = jax.jit(jax.grad(penalty))
    batched = jax.jit(jax.vmap(jax.grad(penalty), in_axes=(0, None)))
    for weights in jnp.eye(2):
        alone = [gradient(rate, weights) for rate in rates]
        np.testing.assert_allclose(batched(rates, weights), alone, rtol=1e-4)


@named("solver", [diffrax.Kvaerno3, diffrax.Euler])
def test_other_methods_have_no_stability_interval(solver):
    with pytest.raises(TypeError, match="not an explicit Runge-Kutta"):
        lrnde.stability_interval(solver)


class PowerOfError(lrnde.AbstractLocalRegularizer):
    power: int

    def measure(self, step):
        error = lrnde.scaled_error(step.controller, step.y0, step.y1, step.y_error)
        return error**self.power


def test_a_regularizer_of_ones_own_needs_nothing_but_its_measure(getkey):
    key, a = getkey(), matrix()
    errors = penalty_of(a, Y0, key, lrnde.LocalError()) / 2.0
    squares = penalty_of(a, Y0, key, PowerOfError(2)) / 2.0
    np.testing.assert_allclose(squares, errors**2, rtol=1e-5)


class Errors(lrnde.AbstractLocalRegularizer):
    def measure(self, step):
        return step.y_error


class AllErrors(lrnde.AbstractGlobalRegularizer):
    def measure(self, step):
        return step.y_error


class Path(lrnde.AbstractIntegralRegularizer):
    def integrand(self, field, t, y, drawn):
        return y


@named("regularizer", [Errors(), AllErrors(), Path()], ids=type_name)
def test_a_measure_that_is_no_number_is_named(regularizer, getkey):
    with pytest.raises(TypeError, match=r"measures an array of shape \(3,\)"):
        penalty_of(matrix(), Y0, getkey(), regularizer)


def test_a_pair_needs_no_list_around_it(getkey):
    key, a = getkey(), matrix()
    alone = penalty_of(a, Y0, key, (0.5, lrnde.LocalError()))
    assert alone == penalty_of(a, Y0, key, [(0.5, lrnde.LocalError())])
    two = lrnde.GlobalError(), lrnde.GlobalStiffness()
    both = penalty_of(a, Y0, key, two)
    np.testing.assert_allclose(both, penalty_of(a, Y0, key, list(two)), rtol=1e-6)


@named("solver", [lrnde.Tsit5, diffrax.Dopri5, lrnde.Bosh3, diffrax.Heun])
def test_stability_interval_is_where_the_method_stops_damping(solver, float64):
    """One step of y' = -x y shrinks the state just inside it and grows it outside."""

    @jax.jit
    def growth(x):
        term = diffrax.ODETerm(lambda t, y, args: -x * y)
        one = jnp.array(1.0)
        state = solver().init(term, 0.0, 1.0, one, None)
        return solver().step(term, 0.0, 1.0, one, None, state, False)[0]

    edge = lrnde.stability_interval(solver)
    inside = jnp.linspace(0.01, 0.999, 50) * edge
    assert max(abs(growth(x)) for x in inside) < 1 < abs(growth(1.001 * edge))


def test_extra_memory_does_not_grow_with_the_number_of_steps():
    few, many = extra_bytes(16), extra_bytes(256)
    state = 4 * 64 * 100
    assert 0 < few < 20 * state  # the stages of one step and their derivatives
    assert many < 1.05 * few


def extra_bytes(max_steps):
    """Temporary memory of a gradient with a sampled step, less that without."""
    y0 = jnp.ones((64, 100))

    def loss(w, key, regularizer):
        sol, penalty = lrnde.diffeqsolve(
            diffrax.ODETerm(lambda t, y, w: jnp.tanh(y @ w)),
            lrnde.Bosh3(),
            0.0,
            1.0,
            None,
            y0,
            w,
            regularizer=regularizer,
            key=key,
            stepsize_controller=CONTROLLER,
            max_steps=max_steps,
            throw=False,
        )
        return jnp.mean(sol.ys**2) + penalty

    def temporary_bytes(regularizer):
        gradient = jax.jit(jax.grad(ft.partial(loss, regularizer=regularizer)))
        compiled = gradient.lower(jnp.eye(100), jr.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    return temporary_bytes(lrnde.LocalError("biased")) - temporary_bytes(None)
