"""Solvers for stochastic differential equations: order, error estimate, gradients."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
import scipy.stats
from jax import lax
from problems import Counter

import lrnde
from lrnde._brownian import show

SOLVERS = [lrnde.SOSRI(), lrnde.SOSRI2(), lrnde.SRIW2()]
named = pytest.mark.parametrize


def type_name(x):
    return type(x).__name__


def tree(key):
    area = diffrax.SpaceTimeLevyArea
    return diffrax.VirtualBrownianTree(0.0, 1.0, 2.0**-13, (), key, levy_area=area)


class Wave(diffrax.AbstractBrownianPath):
    """A path that looks like noise at the scale of a few steps, and compiles fast.

    - `phases`: One for each component.
    """

    phases: jax.Array
    levy_area: type = diffrax.SpaceTimeLevyArea
    t0 = 0.0
    t1 = 1.0

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        h = t1 - t0
        w = jnp.sin(40 * t1 + self.phases) - jnp.sin(40 * t0 + self.phases)
        if not use_levy:
            return w
        area = 0.3 * jnp.sqrt(jnp.abs(h)) * jnp.cos(90 * t0 + self.phases)
        return diffrax.SpaceTimeLevyArea(dt=h, W=w, H=area)


def diagonal(diffusion):
    return lambda t, y, args: lx.DiagonalLinearOperator(diffusion(y, args))


def equation(drift, diffusion, path):
    """dy = drift(y, args) dt + diffusion(y, args) dW, the noise diagonal."""
    return diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: drift(y, args)),
        diffrax.ControlTerm(diagonal(diffusion), path),
    )


def geometric(path):
    """dy = 1.5 y dt + 0.8 y dW."""
    return equation(lambda y, _: 1.5 * y, lambda y, _: 0.8 * y, path)


def geometric_end(w):
    return jnp.exp(1.5 - 0.8**2 / 2 + 0.8 * w)


def nonlinear(path):
    return equation(
        lambda y, _: jnp.sin(2 * y) + 1, lambda y, _: 0.8 / (1 + y**2), path
    )


def slope(steps, errors):
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


@named("solver", SOLVERS, ids=type_name)
def test_order_conditions(solver):
    """Consistency, and that stage times are what the stages of y' = 1 make them."""
    t = solver.tableau
    assert np.isclose(sum(t.alpha), 1) and np.isclose(sum(t.beta1), 1)
    for beta in (t.beta2, t.beta3, t.beta4):
        assert np.isclose(sum(beta), 0, atol=1e-12)
    c0, b0, b1 = (
        np.array([0, *(sum(row) for row in rows)]) for rows in (t.a0, t.b0, t.b1)
    )
    # Roessler (2010), Theorem 5.2: order 2 without noise, and the first conditions
    # for strong order 1.5.
    assert np.isclose(np.dot(t.alpha, c0), 0.5)
    assert np.isclose(np.dot(t.alpha, b0), 1)
    assert np.isclose(np.dot(t.alpha, b0**2), 1.5)
    assert np.isclose(np.dot(t.beta1, b1), 0, atol=1e-12)
    assert np.isclose(np.dot(t.beta2, b1), 1)
    assert np.isclose(np.dot(t.beta3, b1), 0, atol=1e-12)
    assert np.isclose(np.dot(t.beta4, b1**2), 2)


LEVELS = range(4, 9)
FINEST = 11
PATHS = 1000


def halved(noise):
    """The noise of steps twice as long, by Chen's relation."""
    left = jax.tree.map(lambda x: x[0::2], noise)
    right = jax.tree.map(lambda x: x[1::2], noise)
    half = jnp.array(0.5)
    return lrnde.BrownianPath.join(left, right, half, half)


@pytest.fixture(scope="module")
def noises():
    """The noise of the same paths, for 2**level steps of one size."""
    with jax.enable_x64(True):
        path = lrnde.BrownianPath((2**FINEST, PATHS), jr.key(0))
        found = {FINEST: path.draw(path.key, jnp.asarray(2.0**-FINEST))}
        for level in reversed(range(min(LEVELS), FINEST)):
            found[level] = halved(found[level + 1])
    return found


@ft.partial(jax.jit, static_argnums=(0, 1))
def ends_of(solver, make, y0, noise, num):
    # Milstein's method of diffrax wants one path at a time.
    @ft.partial(jax.vmap, in_axes=1)
    def end(noise):
        h = 1 / num

        def step(i, y):
            known = jax.tree.map(lambda x: x[i], noise)
            terms = show(make(lrnde.BrownianPath((), jr.key(0))), known)
            return solver.step(terms, i * h, (i + 1) * h, y, None, None, False)[0]

        return lax.fori_loop(0, num, step, y0)

    return end(noise)


def ends(solver, make, y0, noise):
    """The ends of all paths, with constant steps."""
    # One program for every number of steps: what is too short is filled up.
    num = len(noise.w)
    full = jax.tree.map(lambda x: jnp.zeros((2**FINEST, PATHS)).at[:num].set(x), noise)
    return ends_of(solver, make, y0, full, num)


def test_strong_order(float64, noises):
    """Geometric Brownian motion exactly; a nonlinear equation by a fine reference."""
    exact = geometric_end(noises[FINEST].w.sum(axis=0))
    fine = ends(lrnde.SRIW2(), nonlinear, 0.3, noises[FINEST])
    steps = [2.0**-level for level in LEVELS]
    for solver in (*SOLVERS, diffrax.ItoMilstein()):
        for make, y0, truth in ((geometric, 1.0, exact), (nonlinear, 0.3, fine)):
            found = [ends(solver, make, y0, noises[level]) for level in LEVELS]
            order = slope(steps, [np.mean(np.abs(x - truth)) for x in found])
            if solver in SOLVERS:
                assert order >= 1.35, (solver, make)
                assert abs(np.mean(found[-1] - truth)) < abs(np.mean(found[0] - truth))
            else:
                assert 0.8 < order < 1.2  # the yardstick


def test_a_tree_is_walked_back_as_it_was_drawn(float64):
    """Backwards in time the order is the same; with another area it is 1."""

    @jax.jit
    @ft.partial(jax.vmap, in_axes=(0, None))
    def end(key, steps):
        sol, _ = lrnde.diffeqsolve(
            nonlinear(tree(key)), lrnde.SOSRI(), 1.0, 0.0, -1 / steps, 1.0
        )
        return sol.ys[-1]

    keys = jr.split(jr.key(0), 200)
    truth = end(keys, 512.0)
    errors = [np.mean(np.abs(end(keys, steps) - truth)) for steps in (16.0, 64.0)]
    assert slope([1 / 16, 1 / 64], errors) > 1.3


@named("solver", SOLVERS, ids=type_name)
def test_order_without_noise(solver, float64):
    path = Wave(jnp.array(0.0))
    term = equation(lambda y, _: jnp.cos(y), lambda y, _: 0 * y, path)

    @jax.jit
    def error(step):
        sol = diffrax.diffeqsolve(term, solver, 0.0, 1.0, step, 0.0, max_steps=512)
        return jnp.abs(sol.ys[0] - 2 * jnp.arctan(jnp.tanh(0.5)))

    steps = [2.0**-level for level in LEVELS]
    order = slope(steps, [error(step) for step in steps])
    assert order > (2.8 if isinstance(solver, lrnde.SRIW2) else 1.9)


def adaptive_end(path, tolerance, dt0=0.1):
    """The end of a geometric Brownian motion, and that of the one that drives it."""
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: y * jnp.array([1.5, 0.0])),
        diffrax.ControlTerm(
            lambda t, y, args: jnp.stack([0.8 * y[0], jnp.ones_like(y[1])]), path
        ),
    )
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    if isinstance(path, diffrax.VirtualBrownianTree):
        controller = diffrax.ClipStepSizeController(controller, store_rejected_steps=32)
    sol, _ = lrnde.diffeqsolve(
        terms,
        SOLVERS[0],
        0.0,
        1.0,
        dt0,
        jnp.array([1.0, 0.0]),
        stepsize_controller=controller,
        max_steps=2**14,
    )
    return *sol.ys[0], sol.stats["num_rejected_steps"]


def test_adaptive_error_falls_with_the_tolerance(float64):
    @eqx.filter_jit
    def error(tolerance):
        def one(key):
            y, w, _ = adaptive_end(lrnde.BrownianPath((), key), tolerance)
            return jnp.abs(y - geometric_end(w))

        return jnp.mean(jax.vmap(one)(jr.split(jr.key(1), 100)))

    tolerances = [1.0, 0.1, 0.01, 0.001]
    errors = [error(jnp.asarray(tolerance)) for tolerance in tolerances]
    assert all(a > 3 * b for a, b in zip(errors[:-1], errors[1:], strict=True))


def path(key):
    return lrnde.BrownianPath((), key)


@named("make", [tree, path])
def test_adaptive_steps_do_not_bias_the_distribution(make):
    """Many steps are rejected, for what they showed of the path."""

    @eqx.filter_jit
    def end(keys):
        return jax.vmap(lambda key: adaptive_end(make(key), 0.05, dt0=1.0))(keys)

    found, w, rejected = end(jr.split(jr.key(2), 2000))
    assert np.mean(rejected) > 3
    for sample, mean, deviation in (
        (np.log(found), 1.5 - 0.8**2 / 2, 0.8),
        (w, 0.0, 1.0),
    ):
        standard = (np.asarray(sample) - mean) / deviation
        assert scipy.stats.kstest(standard, "norm").pvalue > 0.01


STRATONOVICH = [
    diffrax.Heun(),
    diffrax.SPaRK(),
    diffrax.HalfSolver(diffrax.EulerHeun()),
]


@named("solver", [*SOLVERS, *STRATONOVICH, diffrax.Euler()], ids=type_name)
def test_drift_and_diffusion_are_counted_apart(solver):
    drift = Counter(lambda t, y, args: -y)
    diffusion = Counter(diagonal(lambda y, _: jnp.cos(y)))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, Wave(jnp.arange(3.0)))
    )
    controller = diffrax.PIDController(rtol=0.1, atol=0.1)
    if isinstance(solver, diffrax.Euler):
        controller = diffrax.ConstantStepSize()
    sol, _ = lrnde.diffeqsolve(
        terms, solver, 0.0, 1.0, 0.2, jnp.ones(3), stepsize_controller=controller
    )
    assert sol.stats["nfe_drift"] == sol.stats["nfe"] == drift.total()
    # diffrax multiplies the diffusion by W and by H and evaluates it anew for either,
    # which the compiler makes one.
    written = 2 if isinstance(solver, diffrax.SPaRK) else 1
    assert written * sol.stats["nfe_diffusion"] == diffusion.total()


def solve(terms, y0, solver=SOLVERS[0], args=None, **kwargs):
    controller = diffrax.PIDController(rtol=0.05, atol=0.05)
    return lrnde.diffeqsolve(
        terms,
        solver,
        0.0,
        1.0,
        0.1,
        y0,
        args,
        stepsize_controller=kwargs.pop("controller", controller),
        max_steps=256,
        **kwargs,
    )


def test_additive_noise_is_counted_at_both_ends_of_each_step():
    times = []

    def diffusion(t, y, args):
        jax.debug.callback(times.append, t)
        return lx.DiagonalLinearOperator(0.3 * jnp.ones(3))

    drift = Counter(lambda t, y, args: -y)
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, Wave(jnp.arange(3.0)))
    )
    sol, _ = solve(terms, jnp.ones(3), diffrax.ShARK())
    assert sol.stats["nfe_drift"] == drift.total()
    # At the start diffrax looks once whether it depends on the state.
    assert sol.stats["nfe_diffusion"] == len(times) - 1


def test_a_tree_of_states_is_its_concatenation(float64):
    whole = Wave(jnp.arange(5.0))
    w = whole.evaluate  # one noise for both

    class Parts(diffrax.AbstractBrownianPath):
        levy_area: type = diffrax.SpaceTimeLevyArea
        t0 = 0.0
        t1 = 1.0

        def evaluate(self, t0, t1=None, left=True, use_levy=False):
            found = w(t0, t1, left, use_levy=True)

            def cut(x):
                return {"a": x[:2], "b": x[2:].reshape(3, 1)}

            dt = {"a": found.dt, "b": found.dt}
            area = diffrax.SpaceTimeLevyArea(dt=dt, W=cut(found.W), H=cut(found.H))
            return area if use_levy else area.W

    def drift(y, args):
        return jax.tree.map(jnp.sin, y)

    def diffusion(y, args):
        return jax.tree.map(jnp.cos, y)

    y0 = jnp.linspace(0, 1, 5)
    parts = {"a": y0[:2], "b": y0[2:].reshape(3, 1)}
    one, _ = solve(equation(drift, diffusion, whole), y0)
    two, _ = solve(equation(drift, diffusion, Parts()), parts)
    found = jnp.concatenate([two.ys["a"][0], two.ys["b"][0, :, 0]])
    np.testing.assert_allclose(found, one.ys[0], rtol=1e-10)
    assert one.stats["num_steps"] == two.stats["num_steps"]


def test_a_constant_diffusion_may_be_a_plain_number(float64):
    one, end = jnp.ones((), jnp.float32), jnp.float32(1)  # narrower than the number
    noise = jax.ShapeDtypeStruct((), jnp.float32)

    def solved(g):
        path = lrnde.BrownianPath(noise, jr.key(0))
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.ControlTerm(lambda t, y, args: g, path),
        )
        return lrnde.diffeqsolve(terms, SOLVERS[0], 0.0, end, 0.1, one)[0].ys[0]

    assert solved(0.3) == solved(jnp.array(0.3, jnp.float32))


def test_one_brownian_motion_for_all_components(float64):
    """The same as diagonal noise with the same motion in every component."""
    path = Wave(jnp.array(0.5))
    y0 = jnp.array([1.0, 2.0])
    scalar = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.ControlTerm(lambda t, y, args: 0.5 * y, path),
    )
    each = []
    controller = diffrax.StepTo(jnp.linspace(0, 1, 41))
    both, _ = lrnde.diffeqsolve(
        scalar, SOLVERS[0], 0.0, 1.0, None, y0, stepsize_controller=controller
    )
    for start in y0:
        terms = equation(lambda y, _: -y, lambda y, _: 0.5 * y, path)
        sol, _ = lrnde.diffeqsolve(
            terms, SOLVERS[0], 0.0, 1.0, None, start, stepsize_controller=controller
        )
        each.append(sol.ys[0])
    np.testing.assert_allclose(both.ys[0], np.array(each), rtol=1e-10)


def with_diffusion(diffusion, path):
    return diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -y), diffrax.ControlTerm(diffusion, path)
    )


AREA = {"levy_area": diffrax.SpaceTimeLevyArea}


@named(
    "terms, says",
    [
        (
            with_diffusion(
                diagonal(lambda y, _: y),
                diffrax.VirtualBrownianTree(0.0, 1.0, 0.01, (2,), jr.key(0)),
            ),
            "levy_area=diffrax.SpaceTimeLevyArea",
        ),
        (
            with_diffusion(diagonal(lambda y, _: y), lambda t0, t1: jnp.ones(2)),
            "levy_area=diffrax.SpaceTimeLevyArea",
        ),
        (
            with_diffusion(
                lambda t, y, args: jnp.ones((2, 3)),
                diffrax.VirtualBrownianTree(0.0, 1.0, 0.01, (3,), jr.key(0), **AREA),
            ),
            "DiagonalLinearOperator",
        ),
        (
            with_diffusion(
                lambda t, y, args: lx.MatrixLinearOperator(jnp.ones((2, 2))),
                diffrax.VirtualBrownianTree(0.0, 1.0, 0.01, (2,), jr.key(0), **AREA),
            ),
            "DiagonalLinearOperator",
        ),
    ],
    ids=["no-area", "no-brownian-motion", "matrix", "operator"],
)
@named("solver", SOLVERS[:1], ids=type_name)
def test_noise_that_does_not_fit_says_what_to_change(solver, terms, says):
    with pytest.raises(ValueError, match=says):
        solve(terms, jnp.ones(2), solver)


def test_an_ordinary_equation_is_refused():
    with pytest.raises(ValueError, match="MultiTerm"):
        solve(diffrax.ODETerm(lambda t, y, args: -y), jnp.ones(2))


def test_backsolve_is_refused_for_ito():
    terms = geometric(Wave(jnp.array(0.0)))
    with pytest.raises(NotImplementedError, match="Stratonovich"):
        jax.grad(
            lambda y: solve(terms, y, adjoint=diffrax.BacksolveAdjoint())[0].ys[0]
        )(1.0)


def parametrised(path):
    return equation(
        lambda y, a: jnp.tanh(a[0] * y), lambda y, a: 0.5 * jnp.sin(a[1] * y), path
    )


ARGS = jnp.array([1.3, 0.7])


def finite_difference(f, x, h=1e-6):
    eye = np.eye(len(x)) * h
    return np.array([(f(x + e) - f(x - e)) / (2 * h) for e in eye])


@named("solver", SOLVERS[1:], ids=type_name)
def test_gradient_of_the_solve(solver, float64):
    """Against finite differences on a fixed path with fixed steps."""
    terms, y0 = parametrised(Wave(jnp.arange(4.0))), jnp.linspace(0.1, 1, 4)
    controller = diffrax.StepTo(jnp.linspace(0, 1, 12) ** 1.5)

    @jax.jit
    def end(args):
        sol, _ = lrnde.diffeqsolve(
            terms,
            solver,
            0.0,
            1.0,
            None,
            y0,
            args,
            stepsize_controller=controller,
            adjoint=lrnde.TapeAdjoint(),
            max_steps=16,
        )
        return jnp.sum(sol.ys[0] ** 2)

    expected = finite_difference(end, ARGS)
    np.testing.assert_allclose(jax.jit(jax.grad(end))(ARGS), expected, rtol=1e-6)


@named(
    "solver, sampling",
    [(SOLVERS[0], "unbiased"), (STRATONOVICH[0], "biased"), (STRATONOVICH[1], "error")],
    ids=str,
)
def test_gradient_of_the_penalty(solver, sampling, float64):
    """Against finite differences of the step that was sampled, its noise held fixed."""
    path, y0 = Wave(jnp.arange(4.0)), jnp.linspace(0.1, 1, 4)
    regularizer = lrnde.LocalError(sampling)
    terms = parametrised(path)

    @jax.jit
    @ft.partial(jax.value_and_grad, has_aux=True)
    def penalty(args):
        saveat = diffrax.SaveAt(t0=True, steps=True)
        kwargs = dict(regularizer=regularizer, key=jr.key(7), saveat=saveat)
        return solve(terms, y0, solver, args, **kwargs)[::-1]

    (value, sol), gradient = penalty(ARGS)
    ts, ys = sol.ts[: sol.stats["num_accepted_steps"] + 1], sol.ys

    @jax.jit
    def error(args, j):
        t0, t1 = ts[j], ts[j + 1]
        state = solver.init(terms, t0, t1, ys[j], args)
        y1, e, *_ = solver.step(terms, t0, t1, ys[j], args, state, False)
        scale = 0.05 + 0.05 * jnp.maximum(abs(ys[j]), abs(y1))
        return jnp.sqrt(jnp.mean((e / scale) ** 2))

    errors = np.array([error(ARGS, j) for j in range(len(ts) - 1)])
    (j,) = np.nonzero(np.isclose(errors, value, rtol=1e-6))[0]
    expected = finite_difference(lambda args: error(args, j), ARGS)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_backsolve_of_a_stratonovich_solve_has_the_penalty():
    """Only the penalty's own step reaches the parameters, so any adjoint will do."""
    path, y0 = Wave(jnp.arange(4.0)), jnp.linspace(0.1, 1, 4)

    def penalty(args, adjoint):
        return solve(
            parametrised(path),
            y0,
            diffrax.Heun(),
            args,
            regularizer=lrnde.LocalError(),
            key=jr.key(7),
            adjoint=adjoint,
        )[1]

    gradients = [
        jax.jit(jax.grad(ft.partial(penalty, adjoint=adjoint)))(ARGS)
        for adjoint in (diffrax.BacksolveAdjoint(), lrnde.TapeAdjoint())
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-4)
