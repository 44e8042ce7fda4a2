"""The tape adjoint: the gradient of checkpointing, without computing anything twice."""

import functools as ft

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from problems import CONTROLLER, forced, matrix, problem, Y0

import lrnde
from lrnde._tape import taped_while_loop

MAX_STEPS = 128
END = diffrax.SaveAt(t1=True)


def solve(a, y0, adjoint, saveat=END, solver=None):
    return diffrax.diffeqsolve(
        *problem(solver or lrnde.Bosh3(), a=a)[:5],
        y0,
        a,
        saveat=saveat,
        stepsize_controller=CONTROLLER,
        adjoint=adjoint,
        max_steps=MAX_STEPS,
    )


def loss(a, y0, *args):
    return jnp.sum(solve(a, y0, *args).ys ** 2)


def test_the_gradient_is_that_of_checkpointing(float64):
    """That of each output: the end, given times, every step, and a time in between."""
    subs = [
        diffrax.SubSaveAt(t1=True),
        diffrax.SubSaveAt(ts=jnp.linspace(0.1, 1.9, 5)),
        diffrax.SubSaveAt(t0=True, steps=True),
    ]
    saveat = diffrax.SaveAt(subs=subs, dense=True)

    def gradients(adjoint):
        @jax.jit
        @ft.partial(jax.grad, argnums=(0, 1))
        def gradient(a, y0, weights):
            sol = solve(a, y0, adjoint, saveat)
            outputs = [*sol.ys, sol.evaluate(1.234)]
            # Steps that were not taken have no state.
            outputs = [jnp.where(jnp.isfinite(ys), ys, 0) for ys in outputs]
            return weights @ jnp.stack([jnp.sum(ys**2) for ys in outputs])

        y0 = jnp.asarray(Y0, float)
        return [gradient(matrix(), y0, weights) for weights in jnp.eye(4)]

    expected = gradients(diffrax.RecursiveCheckpointAdjoint())
    for rows in (MAX_STEPS, 7):
        found = gradients(lrnde.TapeAdjoint(rows=rows))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rows", [MAX_STEPS, 7])
def test_one_solve_is_differentiated_in_several_ways(rows, float64):
    def function(a, y0):
        return loss(a, y0, lrnde.TapeAdjoint(rows=rows))

    arguments = matrix(), jnp.asarray(Y0, float)
    plain = [jax.grad(function, argnum)(*arguments) for argnum in (0, 1)]
    # Here JAX goes back to the forward pass of each, kept from above.
    again = [jax.grad(jax.checkpoint(function), n)(*arguments) for n in (0, 1)]
    for a, b in zip(again, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@jax.custom_vjp
def saving_much(z):
    return -z


saving_much.defvjp(
    lambda z: (-z, [jnp.sin(k * z) for k in range(40)]),
    lambda residuals, cotangent: (-cotangent + 0 * sum(residuals),),
)


def test_a_derivative_may_save_any_number_of_arrays():
    @jax.jit
    def end(x, z):
        found = taped_while_loop(
            lambda val: True,
            lambda val: (jnp.sin(val[0]), saving_much(val[1])),
            (x, z),
            max_steps=3,
            buffers=None,
            rows=2,
        )
        return sum(found)

    jax.clear_caches()
    jax.grad(end)(0.5, 0.7)
    assert jax.grad(end, 1)(0.5, 0.7) == -1
    # Where they are the first, there is room for them in what is read again.
    jax.clear_caches()
    jax.grad(end, 1)(0.5, 0.7)
    jax.grad(end)(0.5, 0.7)
    assert jax.grad(jax.checkpoint(end), 1)(0.5, 0.7) == -1


def test_batched_solves_of_different_lengths(float64):
    scales = jnp.array([0.1, 1.0, 4.0])

    def gradient(adjoint, scale):
        return jax.grad(lambda a: loss(scale * a, Y0, adjoint))(matrix())

    def steps(scale):
        return solve(scale * matrix(), Y0, diffrax.DirectAdjoint()).stats["num_steps"]

    assert len(set(jax.vmap(steps)(scales).tolist())) == 3
    found, expected = (
        jax.jit(jax.vmap(ft.partial(gradient, adjoint)))(scales)
        for adjoint in (
            lrnde.TapeAdjoint(rows=7),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("solver", [diffrax.Bosh3(), diffrax.Kvaerno5()], ids=repr)
def test_solvers_of_diffrax(solver, float64):
    gradient = jax.jit(jax.grad(loss), static_argnums=(2, 3, 4))
    found, expected = (
        gradient(matrix(), Y0, adjoint, END, solver)
        for adjoint in (lrnde.TapeAdjoint(), diffrax.RecursiveCheckpointAdjoint())
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_stochastic_differential_equation(float64):
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), jr.key(0))
    noise = diffrax.ControlTerm(lambda t, y, a: a * jnp.sin(y), path)
    terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, a: -a * y), noise)

    def end(a, adjoint):
        return diffrax.diffeqsolve(
            terms, diffrax.Heun(), 0.0, 1.0, 0.05, 1.0, a, adjoint=adjoint, max_steps=32
        ).ys[0]

    gradient = jax.jit(jax.grad(end), static_argnums=1)
    found, expected = (
        gradient(1.3, adjoint)
        for adjoint in (
            lrnde.TapeAdjoint(rows=6),
            diffrax.RecursiveCheckpointAdjoint(),
        )
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("rows", [64, 7])
def test_evaluations_of_a_gradient(rows):
    """One forward pass, and one more of all stretches but the last."""
    count = 0

    def note(_):
        nonlocal count
        count += 1

    def counted(t, y, a):
        jax.debug.callback(note, t)
        return forced(t, y, a)

    def loss(a, adjoint):
        sol, _ = lrnde.diffeqsolve(
            diffrax.ODETerm(counted),
            *problem(lrnde.Tsit5())[1:6],
            a,
            stepsize_controller=CONTROLLER,
            adjoint=adjoint,
            max_steps=64,
        )
        return jnp.sum(sol.ys**2), sol.stats

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    _, stats = gradient(matrix(), lrnde.TapeAdjoint(rows=rows))
    jax.effects_barrier()
    steps = int(stats["num_steps"])
    again = (steps - 1) // rows * rows
    assert count == int(stats["nfe"]) + 6 * again


def test_parameters_are_not_on_the_tape():
    """A row costs a few states, however many parameters there are."""
    weight = jnp.ones((256, 4))
    y0 = jnp.ones(4)

    def loss(weight, rows):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, w: jnp.tanh(jnp.sin(w) @ y)[:4]),
            lrnde.Tsit5(),
            0.0,
            1.0,
            None,
            y0,
            weight,
            stepsize_controller=CONTROLLER,
            adjoint=lrnde.TapeAdjoint(rows=rows),
            max_steps=64,
        )
        return jnp.sum(sol.ys)

    def memory(rows):
        program = jax.jit(jax.grad(loss), static_argnums=1).lower(weight, rows)
        return program.compile().memory_analysis().temp_size_in_bytes

    row = (memory(64) - memory(32)) / 32
    hidden = 2 * 6 * 256 * weight.itemsize  # what the derivative of tanh needs
    assert row < hidden + 12 * y0.nbytes < weight.nbytes + hidden


def test_the_loop_itself():
    """Against `lax.scan`, with a leaf that is only counted and one that is constant."""

    def body(carry):
        x, scale, n = carry
        return jnp.sin(scale * x) + x, scale, n + 1

    def taped(x, scale, rows):
        return taped_while_loop(
            lambda carry: carry[2] < 10,
            body,
            (x, scale, 0),
            max_steps=16,
            buffers=None,
            rows=rows,
        )[0]

    def scanned(x, scale):
        return lax.scan(lambda c, _: (body(c), None), (x, scale, 0), length=10)[0][0]

    expected = jax.grad(scanned, argnums=(0, 1))(0.3, 0.7)
    for rows in (1, 3, 16):
        found = jax.grad(taped, argnums=(0, 1))(0.3, 0.7, rows)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_progress_meter_has_no_derivative(float64):
    def end(y0, **kwargs):
        return diffrax.diffeqsolve(
            *problem(lrnde.Bosh3())[:5],
            y0,
            matrix(),
            stepsize_controller=CONTROLLER,
            adjoint=lrnde.TapeAdjoint(),
            **kwargs,
        ).ys.sum()

    meter = diffrax.TextProgressMeter()
    shown = jax.jit(jax.grad(lambda y0: end(y0, progress_meter=meter)))(Y0)
    np.testing.assert_allclose(shown, jax.jit(jax.grad(end))(Y0), rtol=1e-6)


def test_what_cannot_be_taped():
    with pytest.raises(ValueError, match="at least one row"):
        lrnde.TapeAdjoint(rows=0)
    path = diffrax.UnsafeBrownianPath((), jr.key(0))
    term = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, y, a: -y),
        diffrax.ControlTerm(lambda t, y, a: 1.0, path),
    )
    with pytest.raises(ValueError, match="VirtualBrownianTree"):
        diffrax.diffeqsolve(
            term, diffrax.Euler(), 0, 1, 0.1, 1.0, adjoint=lrnde.TapeAdjoint()
        )

    def unbounded(y0):
        return diffrax.diffeqsolve(
            *problem(lrnde.Tsit5())[:5],
            y0,
            matrix(),
            stepsize_controller=CONTROLLER,
            adjoint=lrnde.TapeAdjoint(),
            max_steps=None,
        ).ys.sum()

    assert jnp.isfinite(unbounded(Y0))
    with pytest.raises(RuntimeError, match="bound the number of steps"):
        jax.grad(unbounded)(Y0)
