"""Neural SDEs, and the spiral that one of them learns."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import scipy.integrate
import scipy.stats
from problems import random_parameters

import lrnde
from lrnde import objectives, simulated
from lrnde._random import GENERATOR
from lrnde.models import NeuralSDEClassifier, SpiralSDE

TIMES = jnp.array([0.2, 0.25, 0.6, 0.9])


def make_classifier():
    return random_parameters(
        NeuralSDEClassifier, 3, 2, 4, 2, solver=lrnde.SOSRI(), tolerance=0.1
    )


def make_spiral():
    return random_parameters(SpiralSDE, 3, solver=lrnde.SOSRI(), tolerance=0.5)


def inputs():
    return jnp.asarray(np.random.default_rng(1).standard_normal((50, 3)), float)


@eqx.filter_jit
def predict(model, x, key):
    """A prediction from four paths of each input, and where these paths end."""
    error = lrnde.LocalError()
    out = model(x, key=key, regularizer=error, trajectories=4, max_steps=64)
    y0 = jnp.repeat(model.embedding(x), 4, axis=0)
    sol, _ = model.sde.solve(y0, key=key, max_steps=64)
    return out, sol.ys[0]


def with_diffusion(model, weight, bias):
    diffusion = lambda m: (m.sde.diffusion.weight, m.sde.diffusion.bias)  # noqa: E731
    new = jnp.full((2, 2), weight), jnp.full(2, bias)
    return eqx.tree_at(diffusion, model, new)


def in_numpy(tree):
    return jax.tree.map(lambda a: np.asarray(a, float) if eqx.is_array(a) else a, tree)


def affine(layer, x):
    return x @ layer.weight + layer.bias


def mlp(layers, x):
    return affine(layers.second, np.tanh(affine(layers.first, x)))


# The classifier


def test_logits_are_means_over_the_readouts_of_the_paths():
    model = with_diffusion(make_classifier(), 0.1, 0.3)
    out, ends = predict(model, inputs(), jr.key(0))
    readouts = affine(in_numpy(model.readout), np.asarray(ends)).reshape(50, 4, 2)
    expected = readouts.mean(axis=1)
    np.testing.assert_allclose(out.logits, expected, rtol=1e-4, atol=1e-5)
    assert np.all(readouts.std(axis=1) > 0.01)
    assert out.successful and out.penalty > 0


def test_without_noise_the_state_follows_the_drift_from_0_to_1():
    model, x = with_diffusion(make_classifier(), 0.0, 0.0), inputs()
    out, _ = predict(model, x, jr.key(0))
    model = in_numpy(model)
    y0 = affine(model.embedding, np.asarray(x))
    end = scipy.integrate.solve_ivp(
        lambda t, y: mlp(model.sde.drift, y.reshape(-1, 2)).ravel(),
        (0, 1),
        y0.ravel(),
        rtol=1e-6,
    ).y[:, -1]
    expected = affine(model.readout, end.reshape(-1, 2))
    np.testing.assert_allclose(out.logits, expected, atol=1e-3)
    assert out.successful


def test_every_entry_of_every_path_has_noise_of_its_own():
    model = with_diffusion(make_classifier(), 0.0, 0.5)
    last = lambda m: (m.sde.drift.second.weight, m.sde.drift.second.bias)  # noqa: E731
    model, x = eqx.tree_at(last, model, replace_fn=jnp.zeros_like), inputs()
    out, ends = predict(model, x, jr.key(0))
    y0 = affine(in_numpy(model.embedding), np.asarray(x))
    noise = (np.asarray(ends) - np.repeat(y0, 4, axis=0)).ravel() / 0.5
    assert scipy.stats.kstest(noise, "norm").pvalue > 0.01
    assert np.diff(np.sort(noise)).min() > 1e-6
    assert out.successful


def test_a_solve_of_too_many_steps_ends_without_an_error():
    out, _ = predict(with_diffusion(make_classifier(), 5.0, 0.0), inputs(), jr.key(0))
    assert not out.successful and out.num_steps == 64


def test_the_equations_of_the_models(float64):
    y = np.random.default_rng(2).standard_normal((5, 2))
    path = lrnde.BrownianPath((5, 2), jr.key(0))
    for model, power in ((make_classifier(), 1), (make_spiral(), 3)):
        drift, diffusion = (
            term.vf(jnp.zeros(()), jnp.asarray(y), None)
            for term in model.sde.terms(path).terms
        )
        sde = in_numpy(model.sde)
        layers = sde.drift if power == 1 else sde.drift.mlp
        np.testing.assert_allclose(drift, mlp(layers, y**power), rtol=1e-9)
        expected = affine(sde.diffusion, y)
        np.testing.assert_allclose(diffusion.diagonal, expected, rtol=1e-9)


# The spiral


@eqx.filter_jit
def draw_paths(model, key):
    y0 = jnp.array([2.0, -1.0])
    paths = model(y0, TIMES, key=key, trajectories=5, max_steps=64)
    sol, _ = model.sde.solve(
        jnp.tile(y0, (5, 1)),
        key=key,
        max_steps=64,
        saveat=diffrax.SaveAt(steps=True),
        step_ts=TIMES,
    )
    return paths, sol


def test_steps_end_when_the_paths_are_looked_at():
    paths, sol = draw_paths(make_spiral(), jr.key(1))
    at = np.searchsorted(sol.ts, TIMES)
    np.testing.assert_array_equal(sol.ts[at], TIMES)
    assert np.all(np.diff(at) > 0) and paths.num_steps > len(TIMES)
    np.testing.assert_allclose(paths.states, np.swapaxes(sol.ys[at], 0, 1), rtol=1e-5)
    assert paths.successful and paths.penalty == 0
    assert len(np.unique(paths.states)) == paths.states.size


def test_the_distance_of_moments_is_its_formula():
    rng = np.random.default_rng(0)
    paths = rng.standard_normal((7, 4, 2)).astype(np.float32)
    means, variances = rng.random((2, 4, 2), np.float32)
    expected = np.mean((paths.mean(axis=0) - means) ** 2) + np.mean(
        (paths.var(axis=0, ddof=1) - variances) ** 2
    )
    found = objectives.moment_distance(*map(jnp.asarray, (paths, means, variances)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def simulate(trajectories, steps):
    """The spiral by Euler and Maruyama, with Heun's rule for the drift."""
    rng = np.random.default_rng(0)
    h = 1 / steps

    def drift(u):
        u1, u2 = u.T**3
        return np.stack([-0.1 * u1 + 2 * u2, -2 * u1 - 0.1 * u2], axis=1)

    u = [np.tile([2.0, 0.0], (trajectories, 1))]
    for _ in range(steps):
        noise = 0.2 * u[-1] * np.sqrt(h) * rng.standard_normal(u[-1].shape)
        slope = drift(u[-1])
        slope = (slope + drift(u[-1] + h * slope + noise)) / 2
        u.append(u[-1] + h * slope + noise)
    return np.stack(u, axis=1)


def test_the_moments_of_the_spiral_are_those_of_its_equation():
    moments = simulated.spiral(4, 2000)
    np.testing.assert_allclose(moments.times, np.arange(4) / 3, rtol=1e-6)
    np.testing.assert_array_equal(moments.means[0], moments.y0)
    assert moments.y0.tolist() == [2, 0] and not moments.variances[0].any()
    paths = np.asarray(simulated.spiral_paths(jr.key(0, impl=GENERATOR), 4, 2000))
    np.testing.assert_allclose(moments.means, paths.mean(axis=0), atol=1e-4)
    variances = paths.var(axis=0, ddof=1)
    np.testing.assert_allclose(moments.variances, variances, rtol=1e-4)

    ours, theirs = paths[:, 1:], simulate(2000, 300)[:, 100::100]
    squares = [(x - x.mean(axis=0)) ** 2 for x in (ours, theirs)]
    for a, b in (ours, theirs), squares:
        error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / 2000)
        assert np.all(np.abs(a.mean(axis=0) - b.mean(axis=0)) < 4 * error)
