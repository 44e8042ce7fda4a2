"""A Brownian path that is drawn step by step."""

import functools as ft
import inspect

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree

import lrnde

named = pytest.mark.parametrize
AREAS = [diffrax.SpaceTimeLevyArea, diffrax.BrownianIncrement]


def terms(path, sign=1):
    """dy = sin(a y) dt + 0.7 cos(y) dW, the noise diagonal; `sign` is the drift's."""
    return diffrax.MultiTerm(
        diffrax.ODETerm(
            lambda t, y, a: jax.tree.map(lambda y: sign * jnp.sin(a * y), y)
        ),
        diffrax.ControlTerm(
            lambda t, y, a: lx.DiagonalLinearOperator(
                jax.tree.map(lambda y: 0.7 * jnp.cos(y), y)
            ),
            path,
        ),
    )


Y0 = np.linspace(0.2, 1, 4)


def solve(
    path, *, solver=None, a=1.0, t1=1.0, dt0=0.7, y0=Y0, tolerance=0.05, **kwargs
):
    return lrnde.diffeqsolve(
        path if isinstance(path, diffrax.MultiTerm) else terms(path),
        lrnde.SOSRI() if solver is None else solver,
        0.0,
        t1,
        dt0,
        jax.tree.map(jnp.asarray, y0),
        a,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=128,
        **kwargs,
    )


def path(area=AREAS[0], **kwargs):
    return lrnde.BrownianPath((4,), jr.key(0), area, **kwargs)


def tree():
    return diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (4,), jr.key(0), AREAS[0])


@named("area", AREAS)
def test_the_parts_of_an_interval_make_the_whole(area, float64):
    drawn = path(area)
    whole = drawn.draw(jr.key(1), jnp.array(0.3))
    for a in (0.0, 0.1, 0.3):
        left, right = drawn.split(jr.key(2), whole, jnp.array(a), jnp.array(0.3 - a))
        again = drawn.join(left, right, jnp.array(a), jnp.array(0.3 - a))
        jax.tree.map(np.testing.assert_allclose, again, whole)


def test_parts_are_distributed_as_if_drawn_alone(float64):
    """Drawing the whole first and splitting it leaves independent Gaussian parts."""
    a, b, n = 0.25, 0.75, 200_000
    drawn = lrnde.BrownianPath((n,), jr.key(0))
    whole = drawn.draw(jr.key(1), jnp.array(a + b))
    left, right = drawn.split(jr.key(2), whole, jnp.array(a), jnp.array(b))
    found = np.cov([left.w, left.area, right.w, right.area])
    deviations = np.sqrt([a, a / 12, b, b / 12])
    scaled = found / np.outer(deviations, deviations)
    np.testing.assert_allclose(scaled, np.eye(4), atol=5 / np.sqrt(n))


@named(
    "y0",
    [Y0, {"matrix": Y0[1:, None], "number": (Y0[0],)}],
    ids=["array", "tree"],
)
def test_the_noise_adds_up(y0, float64):
    """Over steps that were tried and rejected, the path stays one path."""
    shape = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype), y0)
    trace = []

    class Watched(lrnde.SOSRI):
        def step(self, terms, t0, t1, y0, args, state, made_jump):
            noise = terms.terms[1].contr(t0, t1, use_levy=True)
            parts = [ravel_pytree(x)[0] for x in (noise.W, noise.H)]
            jax.debug.callback(lambda *x: trace.append(x), t0, t1, *parts)
            return super().step(terms, t0, t1, y0, args, state, made_jump)

    drawn = lrnde.BrownianPath(shape, jr.key(0))
    sol, _ = solve(drawn, solver=Watched(), y0=y0, tolerance=0.02)
    assert jax.tree.map(lambda y: y[0].shape, sol.ys) == jax.tree.map(np.shape, y0)
    jax.effects_barrier()
    assert sol.stats["num_rejected_steps"] >= 3
    trace = [tuple(np.asarray(x) for x in step) for step in trace]
    kept = [
        step
        for step, after in zip(trace, [*trace[1:], None], strict=True)
        if after is None or after[0] == step[1]
    ]
    rejected = [step for step in trace if not any(step is other for other in kept)]
    assert len(rejected) == sol.stats["num_rejected_steps"]
    for start, end, w, area in rejected:  # callbacks see single precision
        inside = [step for step in kept if start <= step[0] and step[1] <= end]
        assert inside[-1][1] == end  # some later step ends where this one ended
        time, total, integral = start, 0.0, 0.0  # the integral of W over the interval
        for t0, t1, dw, dh in inside:
            assert t0 == time
            integral = integral + (t1 - t0) * (total + dw / 2 + dh)
            time, total = t1, total + dw
        np.testing.assert_allclose(total, w, atol=1e-6)
        np.testing.assert_allclose(integral, (end - start) * (w / 2 + area), atol=1e-6)


def test_adjoints_agree(float64):
    def loss(adjoint, a):
        sol, penalty = solve(
            path(),
            a=a,
            adjoint=adjoint,
            regularizer=lrnde.LocalError("biased"),
            key=jr.key(3),
        )
        return jnp.sum(sol.ys[0]) + penalty

    found = [
        jax.jit(jax.value_and_grad(ft.partial(loss, adjoint)))(1.0)
        for adjoint in (
            lrnde.TapeAdjoint(),
            lrnde.TapeAdjoint(rows=3),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    ]
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-10)


@named("area", AREAS)
def test_the_measured_step_has_the_noise_that_it_had(area, float64):
    """One step makes the whole solve, so it is the one that is measured."""
    solver = lrnde.SOSRI() if area is AREAS[0] else diffrax.Heun()
    drawn = path(area)
    sol, penalty = solve(
        drawn,
        solver=solver,
        tolerance=100.0,
        dt0=1.0,
        regularizer=lrnde.LocalError(),
        key=jr.key(3),
    )
    assert sol.stats["num_steps"] == 1
    noise = drawn.draw(jr.fold_in(drawn.key, 0), jnp.array(1.0))
    y1, error, *_ = solver.step(
        terms(drawn.given(noise)), 0.0, 1.0, jnp.asarray(Y0), 1.0, None, False
    )
    np.testing.assert_allclose(sol.ys[0], y1, rtol=1e-12)
    scale = 100 + 100 * jnp.maximum(abs(Y0), abs(y1))
    np.testing.assert_allclose(penalty, jnp.sqrt(jnp.mean((error / scale) ** 2)))


class Noise(lrnde.AbstractLocalRegularizer):
    """The noise of the measured step, in standard deviations."""

    def measure(self, step):
        noise = step.terms.terms[1].contr(step.t0, step.t1)
        return noise[0] / jnp.sqrt(step.t1 - step.t0)


def test_a_restarted_step_has_new_noise(float64):
    """All solves have one path, with few steps; over keys the noise is normal."""
    regularizers = [make(step="restarted") for make in (Noise, lrnde.LocalError)]

    @jax.jit
    @ft.partial(jax.vmap, in_axes=(0, None))
    def penalties(key, weights):
        pairs = list(zip(weights, regularizers, strict=True))
        return solve(path(), regularizer=pairs, key=key)[1]

    keys = jr.split(jr.key(1), 2000)
    noise, errors = (penalties(keys, weights) for weights in jnp.eye(2))
    assert scipy.stats.kstest(noise, "norm").pvalue > 0.01
    assert np.all(np.isfinite(errors)) and len(np.unique(errors)) == len(keys)


class Turned(diffrax.AbstractBrownianPath):
    """Another path with its signs turned around."""

    path: lrnde.BrownianPath
    levy_area: type = diffrax.SpaceTimeLevyArea
    t0 = -jnp.inf
    t1 = jnp.inf

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        found = self.path.evaluate(t0, t1, left, use_levy=True)
        w, area = jax.tree.map(jnp.negative, (found.W, found.H))
        return diffrax.SpaceTimeLevyArea(found.dt, w, area) if use_levy else w


def test_backwards_in_time(float64):
    """The steps of the mirrored problem, whose path is turned around."""
    kwargs = dict(regularizer=lrnde.LocalError(), key=jr.key(3), tolerance=0.02)
    backward, found = solve(path(), t1=-1.0, dt0=-0.7, **kwargs)
    forward, expected = solve(terms(Turned(path()), sign=-1), **kwargs)
    assert backward.stats["num_rejected_steps"] > 2
    assert backward.stats["num_steps"] == forward.stats["num_steps"]
    np.testing.assert_allclose(backward.ys, forward.ys, rtol=1e-10)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_a_regularizer_changes_nothing_of_the_solve(float64):
    plain, _ = solve(path())
    watched, _ = solve(path(), regularizer=lrnde.LocalError("error"), key=jr.key(3))
    np.testing.assert_array_equal(plain.ys, watched.ys)
    assert plain.stats["num_steps"] == watched.stats["num_steps"]


@named("make", [path, tree])
def test_a_solve_of_no_length_in_a_batch_has_no_error(make, float64):
    """It is stepped along with the others, by less than nothing."""

    def loss(a, t1):
        sol, penalty = solve(
            make(), a=a, t1=t1, key=jr.key(1), regularizer=lrnde.LocalError()
        )
        return jnp.sum(sol.ys) + penalty

    batched = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))
    values, gradients = batched(1.0, jnp.array([1.0, 0.0]))
    assert jnp.all(jnp.isfinite(jnp.stack([values, gradients])))
    np.testing.assert_allclose(values[1], Y0.sum())
    assert gradients[1] == 0 != gradients[0]


def test_too_many_rejected_steps_are_no_success():
    sol, _ = solve(path(memory=1), tolerance=0.03, throw=False)
    assert sol.result == diffrax.RESULTS.max_steps_rejected
    with pytest.raises(RuntimeError, match=r"BrownianPath\(memory"):
        solve(path(memory=1), tolerance=0.03)
    assert diffrax.is_successful(solve(path(memory=8), tolerance=0.03)[0].result)


@named(
    "change, says",
    [
        (dict(adjoint=diffrax.BacksolveAdjoint()), "VirtualBrownianTree"),
        (dict(adjoint=diffrax.DirectAdjoint()), "TapeAdjoint"),
        (dict(solver=diffrax.HalfSolver(diffrax.EulerHeun())), "other intervals"),
        (dict(solver=diffrax.Kvaerno3()), "implicit"),
        (dict(solver_state=(None, None)), "starts at the start"),
    ],
    ids=["backsolve", "direct", "half-solver", "implicit", "resumed"],
)
def test_misuse_says_what_to_change(change, says):
    with pytest.raises(ValueError, match=says):
        solve(path(), **change)


def test_it_is_for_this_package_alone():
    with pytest.raises(ValueError, match=r"lrnde\.diffeqsolve"):
        diffrax.diffeqsolve(
            terms(path()), lrnde.SOSRI(), 0.0, 1.0, 0.1, jnp.ones(4), 1.0
        )
    with pytest.raises(ValueError, match="levy_area"):
        path(diffrax.SpaceTimeTimeLevyArea)
    with pytest.raises(ValueError, match="several"):
        both = diffrax.MultiTerm(*terms(path()).terms, terms(path()).terms[1])
        lrnde.diffeqsolve(both, diffrax.Heun(), 0.0, 1.0, 0.1, jnp.ones(4), 1.0)


def test_the_leaves_of_a_tree_are_drawn_independently(float64):
    n = 10_000
    leaf = jax.ShapeDtypeStruct((n,), jnp.float64)
    drawn = lrnde.BrownianPath({"a": leaf, "b": (leaf,)}, jr.key(0))
    noise = drawn.draw(jr.key(1), jnp.array(1.0))
    assert jax.tree.structure(noise.w) == jax.tree.structure(drawn.shape)
    correlations = np.corrcoef(jax.tree.leaves(noise))
    np.testing.assert_allclose(correlations, np.eye(4), atol=4 / n**0.5)


@named("shape", [(2.5,), [3], "3"], ids=repr)
def test_a_shape_is_of_an_array_or_of_a_tree_of_them(shape):
    make = inspect.unwrap(lrnde.BrownianPath.__init__)  # before the type checker
    with pytest.raises(TypeError, match="must be a tuple of whole numbers"):
        make(None, shape, jr.key(0))


def test_at_least_one_rejected_step_is_remembered():
    with pytest.raises(ValueError, match="at least one step is remembered"):
        path(memory=0)


@named("dtype", [jnp.float32, jnp.float64])
def test_increment_and_area_are_independent_normals(dtype, float64):
    """In single precision they come from the two words of one block of Threefry."""
    n, h = 100_000, 0.5
    shape = jax.ShapeDtypeStruct((n,), dtype)
    drawn = lrnde.BrownianPath(shape, jr.key(0)).draw(jr.key(1), jnp.array(h))
    w, area = np.float64(drawn.w) / h**0.5, np.float64(drawn.area) * (12 / h) ** 0.5
    assert drawn.w.dtype == drawn.area.dtype == dtype
    for sample in (w, area):
        assert scipy.stats.kstest(sample, "norm").pvalue > 0.01
        assert abs(np.corrcoef(sample[1:], sample[:-1])[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(w, area)[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(w**2, area**2)[0, 1]) < 4 / n**0.5


def test_single_precision_noise_with_double_precision_times(float64):
    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    sol, _ = solve(lrnde.BrownianPath(shape, jr.key(0)), y0=np.float32(Y0))
    assert np.all(np.isfinite(sol.ys)) and sol.stats["num_rejected_steps"] > 0


def test_times_are_not_differentiated(float64):
    def end(t1):
        sol, _ = lrnde.diffeqsolve(
            terms(path()), lrnde.SOSRI(), 0.0, t1, 0.1, jnp.ones(4), 1.0
        )
        return jnp.sum(sol.ys)

    with pytest.raises(RuntimeError, match="length of a step"):
        jax.grad(end)(1.0)
