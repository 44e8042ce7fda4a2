"""Global, Taylor, kinetic and STEER regularizers, each against something else."""

import inspect
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import lineax
import numpy as np
import pytest
from problems import CONTROLLER, forced, matrix, problem, SPLIT, TERM, Y0
from test_regularizers import errors_and_lengths, saved_steps, type_name

import lrnde
from lrnde._plan import _check_key, _pairs
from lrnde._random import draw

named = pytest.mark.parametrize
STEP_BY_STEP = [
    diffrax.RecursiveCheckpointAdjoint(),
    diffrax.DirectAdjoint(),
    lrnde.TapeAdjoint(),
]
LOOSE = diffrax.PIDController(rtol=1e-3, atol=1e-3)


def penalty_of(a, regularizer, solver=None, key=None, **kwargs):
    arguments = problem(solver or lrnde.Tsit5(), a=a)
    kwargs = {"stepsize_controller": CONTROLLER, "max_steps": 128, **kwargs}
    return lrnde.diffeqsolve(*arguments, regularizer=regularizer, key=key, **kwargs)[1]


def close(x, y, rtol=1e-6):
    np.testing.assert_allclose(x, y, rtol=rtol)


def each(penalty, *regularizers):
    """The penalty with each of them alone; only the weights change, which are data."""
    return [
        penalty(list(zip(weights, regularizers, strict=True)))
        for weights in jnp.eye(len(regularizers))
    ]


class Held(diffrax.AbstractAdaptiveStepSizeController):
    """Steps where it is told, with tolerances for the measure."""

    steps: diffrax.StepTo
    rtol: float = CONTROLLER.rtol
    atol: float = CONTROLLER.atol
    norm: object = eqx.field(static=True, default=CONTROLLER.norm)

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.steps.init(terms, t0, t1, y0, dt0, args, func, error_order)

    def adapt_step_size(self, t0, t1, y0, y1, args, y_error, order, state):
        return self.steps.adapt_step_size(t0, t1, y0, y1, args, y_error, order, state)


# Global regularizers


@named(
    ("solver", "adjoint"),
    [
        *((lrnde.Tsit5(), adjoint) for adjoint in STEP_BY_STEP),
        (diffrax.HalfSolver(diffrax.Midpoint()), STEP_BY_STEP[0]),
    ],
    ids=type_name,
)
def test_global_error_is_the_sum_over_saved_steps(solver, adjoint, float64):
    errors, lengths = errors_and_lengths(solver)
    expected = {
        "sum": np.sum(errors * lengths),
        "mean": np.mean(errors * lengths),
        "squared": np.sum(errors**2 * lengths),
    }
    penalty = partial(penalty_of, None, solver=solver, adjoint=adjoint)
    found = each(penalty, *map(lrnde.GlobalError, expected))
    close(found, list(expected.values()))


def stiffness_of_step(a, t0, t1, y0):
    """The last two stages of Tsit5, written out with the tableau alone."""
    tableau, h, ks, gs = diffrax.Tsit5.tableau, t1 - t0, [], []
    for c, row in zip([0, *tableau.c], [[], *tableau.a_lower], strict=True):
        g = y0 + h * sum(x * k for x, k in zip(row, ks, strict=True))
        ks.append(forced(t0 + c * h, g, a))
        gs.append(g)
    dk, dg = ks[-1] - ks[-2], gs[-1] - gs[-2]
    ratio = jnp.linalg.norm(dk) / jnp.linalg.norm(dg)
    return ratio / lrnde.stability_interval(diffrax.Tsit5)


def test_global_stiffness_is_the_sum_over_saved_steps(float64):
    steps = zip(*saved_steps(lrnde.Tsit5(), matrix(), Y0), strict=True)
    values = np.array([stiffness_of_step(matrix(), *step) for step in steps])
    forms = lrnde.GlobalStiffness(), lrnde.GlobalStiffness("max")
    found = each(partial(penalty_of, None), *forms)
    close(found, [values.sum(), values.max()], 1e-5)


def test_global_gradients_go_through_the_whole_solve(float64, getkey):
    """Finite differences of a solve whose steps are held at fixed lengths."""
    ts, ends, _ = saved_steps(lrnde.Tsit5(), matrix(), Y0)
    controller = Held(diffrax.StepTo(jnp.append(ts, ends[-1])))
    directions = draw(jr.normal, getkey(), (2, 3, 3))

    def penalty(a, weights, **kwargs):
        regularizers = lrnde.GlobalError("squared"), lrnde.GlobalStiffness()
        return penalty_of(a, list(zip(weights, regularizers, strict=True)), **kwargs)

    def with_gradient(**kwargs):
        return jax.jit(jax.value_and_grad(partial(penalty, **kwargs)))

    held = with_gradient(stepsize_controller=controller)
    free = [
        with_gradient(adjoint=adjoint)
        for adjoint in (diffrax.RecursiveCheckpointAdjoint(), lrnde.TapeAdjoint())
    ]
    forward = jax.jit(jax.jacfwd(partial(penalty, adjoint=diffrax.ForwardMode())))
    for weights in jnp.eye(2):
        value, gradient = held(matrix(), weights)
        tolerance = 1e-7 * abs(gradient).max()
        for function in free:
            found = function(matrix(), weights)
            close(found[0], value)
            np.testing.assert_allclose(found[1], gradient, atol=tolerance)
        found = forward(matrix(), weights)
        np.testing.assert_allclose(found, gradient, atol=tolerance)
        for direction in directions:
            shift = 1e-5 * direction
            after, before = (held(matrix() + x, weights)[0] for x in (shift, -shift))
            error = (after - before) / 2e-5 - jnp.vdot(gradient, direction)
            assert abs(error) < 1e-5 * jnp.linalg.norm(gradient)


def test_global_error_is_the_mean_of_unbiased_local_errors(float64, getkey):
    """Over many samples, each a step of that very solve."""
    keys = jr.split(getkey(), 300)

    @jax.vmap
    def penalties(key):
        kwargs = dict(solver=lrnde.Bosh3(), stepsize_controller=LOOSE, key=key)
        local = partial(lrnde.LocalError, "unbiased")
        regularizers = lrnde.GlobalError(), local(), local(samples=16)
        return each(partial(penalty_of, None, **kwargs), *regularizers)

    exact, one, sixteen = penalties(keys)
    close(exact, exact[0])
    for found in (one, sixteen):
        assert abs(found.mean() - exact[0]) < 3 * found.std(ddof=1) / len(keys) ** 0.5
    # The mean of sixteen samples has a quarter of the deviation of one.
    assert 3 < one.std() / sixteen.std() < 5


def noisy(path):
    return diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.ControlTerm(
            lambda t, y, args: lineax.DiagonalLinearOperator(0.3 * jnp.cos(y)), path
        ),
    )


def noisy_solve(solve, path, **kwargs):
    return solve(
        noisy(path),
        lrnde.SOSRI(),
        0.0,
        1.0,
        0.05,
        jnp.ones(3),
        stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-2),
        max_steps=256,
        **kwargs,
    )


def test_global_error_of_a_stochastic_equation(float64):
    """The sum over saved steps, each taken again with its noise from the tree."""
    tree = diffrax.VirtualBrownianTree(
        0.0, 1.0, 1e-6, (3,), jr.key(1), diffrax.SpaceTimeLevyArea
    )
    terms, solver = noisy(tree), lrnde.SOSRI()
    sol, found = noisy_solve(
        lrnde.diffeqsolve,
        tree,
        regularizer=lrnde.GlobalError(),
        saveat=diffrax.SaveAt(t0=True, steps=True),
    )
    n = int(sol.stats["num_accepted_steps"])
    controller = diffrax.PIDController(rtol=1e-2, atol=1e-2)

    def term_of_sum(t0, t1, y0):
        state = solver.init(terms, t0, t1, y0, None)
        y1, error, *_ = solver.step(terms, t0, t1, y0, None, state, False)
        return lrnde.scaled_error(controller, y0, y1, error) * (t1 - t0)

    expected = jax.vmap(term_of_sum)(sol.ts[:n], sol.ts[1 : n + 1], sol.ys[:n])
    assert n > 3
    close(found, expected.sum())


def test_a_wrapped_solver_of_a_stochastic_equation_is_what_it_is_to_diffrax():
    tree = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (3,), jr.key(1))

    def solve(solver):
        return lrnde.diffeqsolve(
            noisy(tree),
            diffrax.HalfSolver(solver),
            0.0,
            1.0,
            0.1,
            jnp.ones(3),
            stepsize_controller=diffrax.PIDController(rtol=0.1, atol=0.1),
            regularizer=lrnde.GlobalError(),
        )

    assert solve(diffrax.EulerHeun())[1] > 0  # without a warning, which would raise
    with pytest.raises(ValueError, match="Euler's method"):
        solve(diffrax.Euler())


def test_global_error_on_a_path_drawn_as_the_solve_goes(float64, getkey):
    """Its mean over samples of the same solve: path, global and local go together."""
    path = lrnde.BrownianPath((3,), jr.key(1))
    _, exact = noisy_solve(lrnde.diffeqsolve, path, regularizer=lrnde.GlobalError())

    def local(key):
        regularizer = [lrnde.LocalError(samples=8), (0.0, lrnde.GlobalError())]
        return noisy_solve(lrnde.diffeqsolve, path, regularizer=regularizer, key=key)[1]

    found = jax.vmap(local)(jr.split(getkey(), 200))
    assert abs(found.mean() - exact) < 3 * found.std(ddof=1) / 200**0.5


@named(
    "adjoint", [diffrax.BacksolveAdjoint(), diffrax.ImplicitAdjoint()], ids=type_name
)
@named("regularizer", [lrnde.GlobalError(), lrnde.GlobalStiffness()], ids=type_name)
def test_adjoints_that_see_no_steps_are_refused(regularizer, adjoint):
    with pytest.raises(ValueError, match="differentiated through every step"):
        penalty_of(None, regularizer, adjoint=adjoint)


def test_global_regularizers_go_on_from_an_earlier_solve(float64):
    """The sums of two parts are that of the whole, the solver's state handed on."""
    ts, ends, _ = saved_steps(lrnde.Tsit5(), matrix(), Y0)
    ts = jnp.append(ts, ends[-1])
    term, solver, _, _, dt0, y0, a = problem(lrnde.Tsit5())

    def part(ts, y0, regularizer=None, state=None):
        return lrnde.diffeqsolve(
            term,
            solver,
            ts[0],
            ts[-1],
            dt0,
            y0,
            a,
            regularizer=regularizer,
            stepsize_controller=Held(diffrax.StepTo(ts)),
            saveat=diffrax.SaveAt(t1=True, solver_state=True),
            solver_state=state,
        )

    _, whole = part(ts, y0, lrnde.GlobalError())
    sol, first = part(ts[:5], y0, lrnde.GlobalError())
    plain, _ = part(ts[:5], y0)
    close(sol.solver_state, plain.solver_state, 1e-12)
    _, second = part(ts[4:], sol.ys[-1], lrnde.GlobalError(), sol.solver_state)
    close(first + second, whole, 1e-9)


# Taylor and kinetic regularizers


def nested_derivative(field, order):
    """d^K y / dt^K by `jax.jvp` of `jax.jvp` of ..., with t' = 1 and y' = f."""

    def total(g):
        def derivative(t, y):
            return jax.jvp(g, (t, y), (jnp.ones_like(t), field(t, y)))[1]

        return derivative

    g = field
    for _ in range(order - 1):
        g = total(g)
    return g


@named("order", [1, 2, 3, 4])
def test_the_total_derivative_is_that_of_nested_jvps(order, float64, getkey):
    """A field with a custom derivative inside, `jax.nn.softplus`, among others."""

    def field(t, y):
        return jnp.tanh(matrix() @ y) * jax.nn.softplus(y) + jnp.cos(3 * t) * y**3.0

    t, y = jnp.array(0.3), jr.normal(getkey(), (3,))
    found = lrnde.total_derivative(field, t, y, order)
    close(found, nested_derivative(field, order)(t, y), 1e-9)


def test_the_total_derivative_of_pieces(float64, getkey):
    """Operations that Taylor mode alone gets wrong, or only knows for equal shapes."""

    def field(t, y):
        inside = jnp.clip(y, -0.5, 1.0) * y + jnp.hypot(y, 1.0)
        neighbour = y[(jnp.arange(4) + 1) % 4]
        return inside * jax.nn.celu(y) + jnp.fmod(y, 0.6) * neighbour

    t, y = jnp.array(0.3), jnp.array([-1.7, -0.4, 0.2, 1.3])
    found = lrnde.total_derivative(field, t, y, 3)
    close(found, nested_derivative(field, 3)(t, y), 1e-9)


def test_the_total_derivative_of_a_known_solution(float64):
    """y = sin(w t) with its derivative: the K-th derivative is known."""

    def field(t, y):
        return {"y": y["v"], "v": -4 * y["y"]}

    t = jnp.array(0.7)
    y = {"y": jnp.sin(2 * t), "v": 2 * jnp.cos(2 * t)}
    found = lrnde.total_derivative(field, t, y, 3)
    close(found["y"], -8 * jnp.cos(2 * t), 1e-12)
    close(found["v"], 16 * jnp.sin(2 * t), 1e-12)


def test_taylor_mode_names_what_it_does_not_know():
    def field(t, y, args):
        return jax.lax.fori_loop(0, 2, lambda i, x: x * 1.1, y)

    with pytest.raises(NotImplementedError, match="Taylor mode does not know"):
        lrnde.diffeqsolve(
            diffrax.ODETerm(field),
            lrnde.Tsit5(),
            0.0,
            1.0,
            0.1,
            Y0,
            regularizer=lrnde.Taylor(2),
        )


def along_the_solution(a, integrand, points=4001):
    """The integral of a function of (t, y) along a tight solve, by Simpson's rule."""
    ts = jnp.linspace(0.0, 2.0, points)
    sol = diffrax.diffeqsolve(
        *problem(diffrax.Dopri8(), a=a),
        stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-10),
        saveat=diffrax.SaveAt(ts=ts),
    )
    values = jax.jit(jax.vmap(integrand))(ts, sol.ys)
    weights = jnp.ones(points).at[1:-1:2].set(4).at[2:-1:2].set(2)
    return weights @ values * (ts[1] - ts[0]) / 3


def test_the_taylor_penalty_is_the_integral_along_the_solution(float64):
    orders = 1, 2, 3

    def integrand(t, y):
        field = partial(forced, a=matrix())
        derivatives = [nested_derivative(field, order)(t, y) for order in orders]
        return jnp.mean(jnp.stack(derivatives) ** 2, axis=1)

    expected = along_the_solution(matrix(), integrand)
    found = each(partial(penalty_of, None), *map(lrnde.Taylor, orders))
    close(found, expected, 1e-4)


@named(("energy", "jacobian"), [(3.0, 0.0), (0.5, 2.0)])
def test_the_kinetic_penalty_is_the_integral_along_the_solution(
    energy, jacobian, float64, getkey
):
    """Its mean over keys; the Jacobian's part with the exact Frobenius norm."""

    def integrand(t, y):
        f = forced(t, y, matrix())
        j = jax.jacfwd(lambda y: forced(t, y, matrix()))(y)
        return energy * jnp.mean(f**2) + jacobian * jnp.sum(j**2) / 3

    expected = along_the_solution(matrix(), integrand)
    regularizer = lrnde.Kinetic(energy, jacobian)
    penalty = jax.vmap(lambda key: penalty_of(None, regularizer, key=key))
    found = np.asarray(penalty(jr.split(getkey(), 200)))
    standard_error = found.std(ddof=1) / 200**0.5
    assert (standard_error > 1e-12) == (jacobian > 0)
    assert abs(found.mean() - expected) < 3 * standard_error + 1e-4 * expected


INTEGRALS = [lrnde.Taylor(2), (3.0, lrnde.Kinetic())]


def test_integrals_leave_the_solve_alone(float64, getkey):
    """Solution, steps and what is handed back are those of a solve without them."""
    condition = diffrax.Event(lambda t, y, args, **kwargs: y[0] < 0.5)
    subs = [
        diffrax.SubSaveAt(ts=jnp.linspace(0, 1, 5)),
        diffrax.SubSaveAt(t0=True, steps=True, fn=lambda t, y, args: y[:1]),
    ]
    everything = dict(dense=True, solver_state=True, controller_state=True)
    clipped = diffrax.ClipStepSizeController(CONTROLLER)
    for kwargs in (
        dict(
            saveat=diffrax.SaveAt(t1=True, steps=True),
            stepsize_controller=CONTROLLER,
            event=condition,
        ),
        dict(
            saveat=diffrax.SaveAt(subs=subs, **everything), stepsize_controller=clipped
        ),
    ):
        solve = partial(lrnde.diffeqsolve, *problem(lrnde.Tsit5()), max_steps=128)
        plain, _ = solve(**kwargs)
        sol, penalty = solve(regularizer=INTEGRALS, key=getkey(), **kwargs)
        assert penalty > 0
        assert jtu.tree_structure(sol) == jtu.tree_structure(plain)
        for x, y in zip(jtu.tree_leaves(sol), jtu.tree_leaves(plain), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12)


def test_integrals_agree_under_different_adjoints(float64, getkey):
    key = getkey()
    tight = diffrax.PIDController(rtol=1e-7, atol=1e-7)

    def gradient(adjoint):
        kwargs = dict(key=key, stepsize_controller=tight, max_steps=1024)
        penalty = partial(
            penalty_of,
            regularizer=INTEGRALS,
            solver=lrnde.Bosh3(),
            adjoint=adjoint,
            **kwargs,
        )
        return jax.jit(jax.grad(penalty))(matrix())

    first = gradient(diffrax.RecursiveCheckpointAdjoint())
    tape = gradient(lrnde.TapeAdjoint())
    np.testing.assert_allclose(tape, first, atol=1e-8 * abs(first).max())
    backsolve = gradient(diffrax.BacksolveAdjoint())
    np.testing.assert_allclose(backsolve, first, atol=1e-4 * abs(first).max())


@named(
    ("adjoint", "end"),
    [(diffrax.BacksolveAdjoint(), 1.0), (diffrax.RecursiveCheckpointAdjoint(), 2.0)],
    ids=["saved", "solve"],
)
def test_an_integral_ends_with_the_solve_or_what_is_saved_of_it(adjoint, end):
    """The energy of y' = 1 is the time that it is integrated over."""
    _, penalty = lrnde.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.ones_like(y)),
        lrnde.Bosh3(),
        0.0,
        2.0,
        0.1,
        Y0,
        regularizer=lrnde.Kinetic(jacobian=0.0),
        key=jr.key(0),
        saveat=diffrax.SaveAt(ts=jnp.array([0.5, 1.0])),
        adjoint=adjoint,
    )
    close(penalty, end, 1e-5)


@named("regularizer", [lrnde.GlobalError(), INTEGRALS], ids=["sums", "integrals"])
def test_the_direction_of_time_does_not_matter(regularizer, float64, getkey):
    """The same equation with time reversed has the same penalty."""
    key, (_, solver, t0, t1, dt0, y0, a) = getkey(), problem(lrnde.Tsit5())
    back = diffrax.ODETerm(lambda t, y, a: -forced(-t, y, a))
    kwargs = dict(regularizer=regularizer, key=key, stepsize_controller=CONTROLLER)
    _, forward = lrnde.diffeqsolve(TERM, solver, t0, t1, dt0, y0, a, **kwargs)
    _, backward = lrnde.diffeqsolve(back, solver, -t0, -t1, dt0, y0, a, **kwargs)
    close(backward, forward, 1e-9)


@named("regularizer", [lrnde.Taylor(2), lrnde.Kinetic()], ids=type_name)
def test_integrals_refuse_what_they_cannot_do(regularizer, getkey):
    kwargs = dict(key=getkey(), regularizer=regularizer)
    arguments = (0.0, 1.0, 0.1, Y0, matrix())
    with pytest.raises(TypeError, match="one `diffrax.ODETerm`"):
        lrnde.diffeqsolve(SPLIT, diffrax.KenCarp3(), *arguments, **kwargs)
    with pytest.raises(ValueError, match="cannot go on"):
        state = forced(0.0, Y0, matrix())
        lrnde.diffeqsolve(TERM, lrnde.Tsit5(), *arguments, solver_state=state, **kwargs)
    with pytest.raises(ValueError, match="ImplicitAdjoint"):
        adjoint = diffrax.ImplicitAdjoint()
        lrnde.diffeqsolve(TERM, lrnde.Tsit5(), *arguments, adjoint=adjoint, **kwargs)
    with pytest.raises(ValueError, match=r"event=diffrax\.Event"):
        kwargs["discrete_terminating_event"] = diffrax.SteadyStateEvent()
        lrnde.diffeqsolve(TERM, lrnde.Tsit5(), *arguments, **kwargs)


@pytest.mark.filterwarnings("ignore:Complex dtype")
def test_integrals_beside_a_complex_state(float64, getkey):
    def penalty(solver):
        return lrnde.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: 1j * y),
            solver,
            0.0,
            2.0,
            None,
            jnp.array([1.0 + 1.0j, 2.0]),
            regularizer=[lrnde.Kinetic(), lrnde.Taylor(2)],
            key=getkey(),
            stepsize_controller=CONTROLLER,
        )[1]

    # |y| and so the integrands are constant: 3 for the energy, the Jacobian's 1, and 3.
    close(penalty(diffrax.Bosh3()), 2 * (3 + 1 + 3), 1e-3)
    close(penalty(lrnde.Bosh3()), 2 * (3 + 1 + 3), 1e-3)


# STEER


def end_of(key, t0=0.0, t1=1.0, width=0.5, ts=None):
    saveat = diffrax.SaveAt(ts=ts) if ts is not None else diffrax.SaveAt(t1=True)
    sol, penalty = lrnde.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: jnp.ones_like(y)),
        lrnde.Tsit5(),
        t0,
        t1,
        None,
        jnp.array(0.0),
        regularizer=lrnde.Steer(width),
        key=key,
        saveat=saveat,
        stepsize_controller=CONTROLLER,
        max_steps=64,
    )
    # y = t - t0: the solution has to be the one at the new time.
    return sol.ts, sol.ys, penalty


@named("ends", [(0.0, 1.0), (2.0, -1.0)])
def test_steer_ends_at_a_uniform_time(ends, float64, getkey):
    """Kolmogorov and Smirnov's test against U(t1 - b, t1 + b)."""
    keys = jr.split(getkey(), 1000)
    ts, ys, penalty = jax.vmap(lambda key: end_of(key, *ends))(keys)
    np.testing.assert_allclose(ys, ts - ends[0], rtol=1e-9)
    assert jnp.all(penalty == 0)
    uniform = np.sort(ts[:, 0] - ends[1] + 0.5)
    grid = (np.arange(1000) + 0.5) / 1000
    assert np.abs(uniform - grid).max() < 1.95 / 1000**0.5


@named("direction", [1, -1])
def test_steer_moves_save_times_within_their_cells(direction, float64, getkey):
    """The first stays at `t0`; others are uniform up to the middle to a neighbour."""
    ts = jnp.array([0.0, 0.2, 0.3, 1.0]) * direction
    keys = jr.split(getkey(), 1000)
    moved, ys, _ = jax.vmap(lambda key: end_of(key, t1=ts[-1], width=0.3, ts=ts))(keys)
    np.testing.assert_allclose(ys, moved, rtol=1e-9, atol=1e-12)
    assert jnp.all(moved[:, 0] == 0)
    cells = [(0.1, 0.25), (0.25, 0.6), (0.7, 1.3)]  # 0.35 is more than the width
    for times, (low, high) in zip(moved.T[1:] * direction, cells, strict=True):
        uniform = np.sort((times - low) / (high - low))
        grid = (np.arange(1000) + 0.5) / 1000
        assert np.abs(uniform - grid).max() < 1.95 / 1000**0.5


@named("end", [0.9, 1.0])
def test_steer_keeps_saves_inside_the_solve(end, float64, getkey):
    """Two outputs at once; the shared times stay shared, the end moves if it is one."""
    ts = jnp.array([0.5, end])
    subs = {
        "y": diffrax.SubSaveAt(ts=ts),
        "z": diffrax.SubSaveAt(ts=ts, fn=lambda t, y, args: 2 * y),
        "early": diffrax.SubSaveAt(ts=ts[:1]),
    }

    def moved(key):
        t1, saveat = lrnde.Steer(0.5).jitter(
            key, jnp.array(0.0), jnp.array(1.0), diffrax.SaveAt(subs=subs)
        )
        return t1, {name: sub.ts for name, sub in saveat.subs.items()}

    t1, found = jax.vmap(moved)(jr.split(getkey(), 500))
    assert jnp.all(found["y"] == found["z"])
    for times in found.values():
        assert jnp.all(times[:, -1] <= t1)
    assert jnp.all(t1 == 1) == (end < 1)
    assert jnp.all((t1 == found["y"][:, -1]) | (end < 1) | (t1 == found["early"][:, 0]))


def test_steer_refuses_to_end_before_the_start(getkey):
    with pytest.raises(ValueError, match="not positive"):
        lrnde.Steer(0.0)
    with pytest.raises(RuntimeError, match="must be below"):
        end_of(getkey(), width=1.0)


# Several at once


def test_penalties_add_up_with_their_weights(float64, getkey):
    several = [
        lrnde.GlobalError(),
        (0.5, lrnde.GlobalStiffness("max")),
        (0.1, lrnde.Taylor(2)),
        (2.0, lrnde.Kinetic(jacobian=0.0)),
    ]
    regularizers = [several[0], *(x for _, x in several[1:])]
    alone = [penalty_of(None, x, key=getkey()) for x in regularizers]
    together = penalty_of(None, several, key=getkey())
    close(together, alone[0] + 0.5 * alone[1] + 0.1 * alone[2] + 2 * alone[3], 1e-9)


class WorkDone(lrnde.AbstractGlobalRegularizer):
    """Looks at all parts of a step."""

    def measure(self, step):
        k = step.terms.vf(step.t0, step.y0, step.args)
        stages = step.dense_info["k"].sum(0)
        return jnp.sum(step.y1 * k) + jnp.sum(step.y_error**2 * stages)


def test_an_integral_does_not_show_in_the_steps(float64, getkey):
    beside = [WorkDone(), (0.0, lrnde.Kinetic())]
    close(penalty_of(None, beside, key=getkey()), penalty_of(None, WorkDone()), 1e-9)


def test_local_regularizers_draw_steps_of_their_own(float64, getkey):
    """Two of the same kind in one solve are independent of each other."""
    pair = [lrnde.LocalError("biased"), (1000.0, lrnde.LocalError("biased"))]
    errors, _ = errors_and_lengths(lrnde.Tsit5())
    penalty = jax.vmap(lambda key: penalty_of(None, pair, key=key))
    found = np.asarray(penalty(jr.split(getkey(), 500))) / 2
    second = np.abs(found[:, None] / 1000 - errors).argmin(axis=1)
    first = found - 1000 * errors[second]
    first = np.abs(first[:, None] - errors).argmin(axis=1)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / 500**0.5
    assert 0.5 < first.mean() / second.mean() < 2


@named("regularizer", [3, "biased", [lrnde.LocalError], (lrnde.LocalError(), 1.0)])
def test_what_is_not_a_regularizer_is_named(regularizer):
    pairs = inspect.unwrap(_pairs)  # the tests' type checker would come before it
    with pytest.raises(TypeError, match="is not a regularizer; pass an instance"):
        pairs(regularizer)


@named(
    "weight", [None, "1", 1j, jnp.ones(2)], ids=["none", "text", "complex", "vector"]
)
def test_a_weight_is_a_number(weight, getkey):
    with pytest.raises(TypeError, match="is not a single real number"):
        penalty_of(None, [(weight, lrnde.LocalError())], key=getkey())


@named("key", [0, jr.split(jr.key(0), 3)], ids=["seed", "batch"])
def test_a_key_is_one_key(key):
    with pytest.raises(TypeError, match="is not one random key"):
        _check_key(key)  # the tests' type checker would not let it come so far


def test_keys_of_all_kinds_are_keys():
    for make in (jr.key, jr.PRNGKey):
        for generator in ("threefry2x32", "rbg"):
            key = make(0, impl=generator)
            _check_key(key)
            jax.vmap(_check_key)(jnp.stack([key, key]))


def test_a_regularizer_of_no_kind_is_refused():
    class Nothing(lrnde.AbstractRegularizer):
        random = False

    with pytest.raises(TypeError, match="derives from"):
        penalty_of(None, Nothing())


@named(
    "make",
    [
        lambda: lrnde.GlobalError("median"),
        lambda: lrnde.GlobalStiffness("mean"),
        lambda: lrnde.LocalError(samples=0),
        lambda: lrnde.Taylor(0),
    ],
)
def test_unknown_choices_are_refused(make):
    with pytest.raises(ValueError):
        make()


@named("regularizer", [lrnde.Steer(), lrnde.Kinetic(), lrnde.LocalError()])
def test_a_key_is_asked_for_where_numbers_are_drawn(regularizer):
    with pytest.raises(ValueError, match="Pass `key="):
        penalty_of(None, regularizer)


def test_a_step_that_did_not_work_out_leaves_no_trace():
    """Not in the gradient either; where the root finder fails, E is infinite."""

    def penalty(scale, adjoint):
        sol, penalty = lrnde.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -scale * y**5),
            diffrax.Kvaerno3(),
            0.0,
            1.0,
            1.0,
            jnp.array(30.0),
            regularizer=lrnde.GlobalError(),
            stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-2),
            adjoint=adjoint,
            max_steps=256,
        )
        return penalty, sol.stats["num_rejected_steps"]

    def derivative(transform, adjoint):
        function = partial(penalty, adjoint=adjoint)
        return jax.jit(transform(function, has_aux=True))(1.3)

    gradient, rejected = derivative(jax.grad, diffrax.RecursiveCheckpointAdjoint())
    assert rejected > 0
    forward, _ = derivative(jax.jacfwd, diffrax.ForwardMode())
    assert jnp.isfinite(forward)
    close(gradient, forward, 1e-3)
