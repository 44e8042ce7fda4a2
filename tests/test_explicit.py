"""The solvers with unrolled stages against those of diffrax, and against theory."""

import functools as ft
from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CONTROLLER, matrix, problem, TERM, Y0

import lrnde


class Heun(lrnde.AbstractExplicitRungeKutta):
    """A pair whose solution and whose next first stage are none of its stages."""

    tableau: ClassVar = diffrax.Heun.tableau
    interpolation_cls: ClassVar = diffrax.Heun.interpolation_cls

    def order(self, terms):
        return 2


PAIRS = [
    (lrnde.Tsit5, diffrax.Tsit5),
    (lrnde.Dopri5, diffrax.Dopri5),
    (lrnde.Bosh3, diffrax.Bosh3),
    (lrnde.Dopri8, diffrax.Dopri8),
    (Heun, diffrax.Heun),
]
both = pytest.mark.parametrize(
    ("ours", "theirs"), PAIRS, ids=[ours.__name__ for ours, _ in PAIRS]
)


@both
def test_order_of_convergence(ours, theirs, float64):
    """The slope of the error over fixed step sizes, by regression."""
    order = ours().order(TERM)
    counts = np.array([8, 12, 16, 24] if order == 8 else [32, 64, 128, 256])

    @jax.jit
    def end(dt):
        return diffrax.diffeqsolve(
            TERM, ours(), 0.0, 1.0, dt, Y0, matrix(), max_steps=4096
        ).ys[0]

    exact = diffrax.diffeqsolve(
        TERM, theirs(), 0.0, 1.0, 1 / 2048, Y0, matrix(), max_steps=4096
    ).ys[0]
    errors = [jnp.abs(end(1.0 / n) - exact).max() for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.35


@both
def test_same_steps_values_and_derivatives_as_diffrax(ours, theirs, float64):
    ts = jnp.linspace(0.1, 1.9, 5)
    controller = diffrax.ClipStepSizeController(CONTROLLER, jump_ts=[0.7])

    def solve(a, solver):
        sol = diffrax.diffeqsolve(
            *problem(solver, a=a),
            saveat=diffrax.SaveAt(ts=ts, dense=True),
            stepsize_controller=controller,
            adjoint=diffrax.ForwardMode(),
            max_steps=1024,
        )
        ys = jnp.concatenate([sol.ys, sol.evaluate(1.234)[None]])
        return ys, sol.stats["num_steps"]

    @ft.partial(jax.jit, static_argnums=0)
    def along(solver):
        direction = jr.normal(jr.key(1), (3, 3))
        solve_with = ft.partial(solve, solver=solver)
        return jax.jvp(solve_with, (matrix(),), (direction,), has_aux=True)

    ys, dys, steps = along(ours())
    expected, expected_dys, expected_steps = along(theirs())
    assert steps == expected_steps
    np.testing.assert_allclose(ys, expected, rtol=1e-10)
    np.testing.assert_allclose(dys, expected_dys, rtol=1e-8, atol=1e-10)


def test_every_adjoint(float64):
    """Against the gradient of diffrax's own solver by its own adjoint."""
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-9)

    def gradient(solver, adjoint):
        def loss(a):
            sol = diffrax.diffeqsolve(
                *problem(solver, a=a),
                stepsize_controller=controller,
                adjoint=adjoint,
                max_steps=512,
            )
            return jnp.sum(sol.ys**2)

        return jax.jit(jax.grad(loss))(matrix())

    checkpointing = diffrax.RecursiveCheckpointAdjoint()
    expected = gradient(diffrax.Tsit5(), checkpointing)
    for adjoint in (
        checkpointing,
        diffrax.DirectAdjoint(),
        diffrax.BacksolveAdjoint(),
    ):
        found = gradient(lrnde.Tsit5(), adjoint)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=repr(adjoint))


shapes = st.lists(st.integers(0, 3), max_size=2).map(tuple)
trees = st.recursive(
    shapes.map(lambda shape: [shape]), lambda t: st.lists(t, max_size=2), max_leaves=3
)
dtypes = st.sampled_from(["float32", "float64", "complex64", "complex128"])


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
@given(tree=trees, dtype=dtypes, seed=st.integers(0, 100))
@settings(max_examples=6)
def test_any_tree_of_any_dtype(tree, dtype, seed):
    """One step from a random state agrees with diffrax's, dtypes included."""
    with jax.enable_x64(True):
        is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
        key = jr.key(seed)
        y0 = jax.tree.map(lambda x: jr.normal(key, x, dtype), tree, is_leaf=is_leaf)
        term = diffrax.ODETerm(lambda t, y, args: jax.tree.map(lambda x: -(x**2), y))

        @ft.partial(jax.jit, static_argnums=0)
        def step(solver, y0):
            t0, t1 = jnp.zeros((), dtype).real, jnp.full((), 0.1, dtype).real
            state = solver.init(term, t0, t1, y0, None)
            out = solver.step(term, t0, t1, y0, None, state, made_jump=True)
            return out[0], out[1]

        outs, expected = step(lrnde.Dopri5(), y0), step(diffrax.Dopri5(), y0)
        assert jax.tree.structure(outs) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(outs), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            tolerance = 1e-5 if a.dtype in (jnp.float32, jnp.complex64) else 1e-12
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


OPERATORS = {
    "diagonal": lambda t, y, args: lx.DiagonalLinearOperator(jnp.sin(t + y)),
    "matrix": lambda t, y, args: lx.MatrixLinearOperator(jnp.outer(y, jnp.cos(t + y))),
    "product": lambda t, y, args: lx.DiagonalLinearOperator(y) * jnp.sin(t + 1),
    "composition": lambda t, y, args: (
        lx.DiagonalLinearOperator(y) @ lx.DiagonalLinearOperator(jnp.cos(y))
    ),
    "identity": lambda t, y, args: lx.IdentityLinearOperator(jax.eval_shape(lambda: y)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_vector_field_may_be_any_linear_operator(name, float64):
    values = jnp.array([[0.0, 0.0], [0.9, -0.4], [0.5, 0.8]])
    path = diffrax.LinearInterpolation(jnp.array([0.0, 0.6, 1.0]), values)
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, args: -y),
        diffrax.ControlTerm(OPERATORS[name], path),
    )
    ours, theirs = (
        diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.25, jnp.array([0.3, -0.4])).ys
        for solver in (lrnde.Bosh3(), diffrax.Bosh3())
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
