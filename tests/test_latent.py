"""Latent ODEs: the encoder, the model, its objectives and its evaluation."""

import functools as ft

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.flatten_util import ravel_pytree
from problems import random_parameters

import lrnde
from lrnde import experiments, objectives, simulated
from lrnde._random import draw
from lrnde.experiments import evaluate_series, PhysioNet, steps_along, Task, tasks
from lrnde.models import LatentODE, Posterior
from lrnde.models._latent import time_gaps
from lrnde.training import StepBudget

BATCH, TIMES, CHANNELS = 6, 9, 3
TS = jnp.linspace(0, 1, TIMES) ** 1.5  # uneven


def make_model(tolerance=1e-5):
    return random_parameters(
        LatentODE,
        CHANNELS,
        latent=4,
        hidden=5,
        depth=2,
        encoder_size=5,
        encoder_hidden=4,
        solver=lrnde.Bosh3(),
        tolerance=tolerance,
    )


@eqx.filter_jit
def reconstruct(model, x, mask):
    return model(TS, x, mask)


def observations(seed=0):
    """Series of which the last has no observation, and times at which none has."""
    shape = BATCH, TIMES, CHANNELS
    x = draw(jr.normal, jr.key(seed), shape)
    mask = draw(jr.bernoulli, jr.key(seed + 1), shape, p=0.4)
    return x, mask.at[-1].set(False).at[:, 3].set(False)


masks = hnp.arrays(bool, (BATCH, TIMES, CHANNELS))


# The encoder


def read_backwards(encoder, times, x, mask):
    """The encoder's equations for one series, a time after the other."""
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    hidden = encoder.candidate.shape[1]
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), encoder)
    inputs, gates = weights.inputs, weights.gates
    state = np.zeros(len(gates))
    size = len(state) // 2
    last = None
    for i in reversed(range(len(times))):
        if not mask[i].any():
            continue
        gap = 0.0 if last is None else last - times[i]
        last = times[i]
        v = np.concatenate([np.where(mask[i], x[i], 0.0), mask[i], [gap]])

        def layer(part, state, weight, v=v):
            columns = slice(part * hidden, (part + 1) * hidden)
            from_v = v @ inputs.weight[:, columns] + inputs.bias[columns]
            return np.tanh(state @ weight + from_v)

        u = layer(0, state, gates[:, :hidden])
        u = sigmoid(u @ weights.update.weight + weights.update.bias)
        r = layer(1, state, gates[:, hidden:])
        r = sigmoid(r @ weights.reset.weight + weights.reset.bias)
        m, s = state[:size], state[size:]
        new = layer(2, np.concatenate([r * m, r * s]), weights.candidate)
        new = new @ weights.proposal.weight + weights.proposal.bias
        state = np.concatenate(
            [(1 - u) * new[:size] + u * m, (1 - u) * new[size:] + u * s]
        )
    return state


@given(mask=masks)
@settings(max_examples=20)
def test_the_encoder_is_its_equations(mask):
    x, _ = observations()
    encoder = make_model().encoder
    states = eqx.filter_jit(encoder)(TS, x, jnp.asarray(mask))
    for i in range(BATCH):
        expected = read_backwards(encoder, np.asarray(TS), np.asarray(x[i]), mask[i])
        np.testing.assert_allclose(states[i], expected, rtol=1e-4, atol=1e-5)


def test_a_model_in_double_precision_reads_data_in_single(float64):
    x, mask = observations()
    encoder = eqx.filter_jit(make_model().encoder)
    double, single = (encoder(TS, x.astype(t), mask) for t in (float, np.float32))
    assert single.dtype == double.dtype == np.float64
    np.testing.assert_allclose(single, double, rtol=1e-6)


@given(observed=hnp.arrays(bool, (2, TIMES)))
@settings(max_examples=20)
def test_gaps_lead_to_the_next_observation(observed):
    times = np.asarray(TS)
    gaps = np.asarray(jax.jit(time_gaps)(TS, jnp.asarray(observed)))
    for row, gap in zip(observed, gaps, strict=True):
        for i in range(TIMES):
            later = times[i + 1 :][row[i + 1 :]]
            expected = later[0] - times[i] if len(later) else 0.0
            assert gap[i] == pytest.approx(expected, abs=1e-6)


@eqx.filter_jit
@eqx.filter_value_and_grad
def loss_and_gradient(model_and_x, mask):
    model, x = model_and_x
    out = model(TS, x, mask, key=jr.key(1), max_steps=32)
    likelihood = objectives.gaussian_log_likelihood(out.x, x, mask, 0.1)
    return jnp.mean(objectives.kl_divergence(*out.posterior) - likelihood)


@pytest.mark.parametrize("filling", [np.nan, np.inf, 1e6])
def test_masked_values_have_no_effect_at_all(filling):
    model, (x, mask) = make_model(1e-2), observations()
    expected = loss_and_gradient((model, x), mask)
    found = loss_and_gradient((model, jnp.where(mask, x, filling)), mask)
    assert eqx.tree_equal(found, expected)
    _, (_, by_x) = found
    assert jnp.all(jnp.where(mask, 0, by_x) == 0)
    assert jnp.all(jnp.isfinite(by_x)) and jnp.any(by_x != 0)


def test_a_series_without_observation_has_the_prior():
    model, (x, mask) = make_model(), observations()
    posterior = model.encode(TS, x, mask)
    assert jnp.all(posterior.mean[-1] == 0) and jnp.all(posterior.log_variance[-1] == 0)
    assert jnp.all(jnp.abs(posterior.mean[:-1]) > 0)
    assert objectives.kl_divergence(*posterior)[-1] == 0
    layers = jax.tree.map(np.asarray, (model.first, model.second))
    for i in range(BATCH - 1):
        y = read_backwards(model.encoder, *map(np.asarray, (TS, x[i], mask[i])))
        for activation, layer in zip((np.tanh, np.asarray), layers, strict=True):
            y = activation(y @ layer.weight + layer.bias)
        found = np.concatenate([posterior.mean[i], posterior.log_variance[i]])
        np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-5)
    samples = jax.vmap(lambda key: posterior.sample(key)[-1])(jr.split(jr.key(2), 2000))
    assert scipy.stats.kstest(np.ravel(samples), "norm").pvalue > 0.01


def test_permuting_the_batch_permutes_the_result(float64):
    x, mask = (jnp.asarray(a) for a in observations())
    model, x = make_model(), x.astype(float)
    order = np.random.default_rng(0).permutation(BATCH)
    out, permuted = (reconstruct(model, x[i], mask[i]) for i in (slice(None), order))
    np.testing.assert_allclose(permuted.x, out.x[order], rtol=1e-9)
    for a, b in zip(permuted.posterior, out.posterior, strict=True):
        np.testing.assert_allclose(a, b[order], rtol=1e-12)
    assert permuted.nfe == out.nfe


# The model


def apply_field(field, y):
    y = np.tanh(y)
    for block in jax.tree.map(np.asarray, field).blocks:
        inner = np.tanh(y @ block.first.weight + block.first.bias)
        y = np.tanh(inner @ block.second.weight + block.second.bias)
    return y


def test_the_latent_field_is_its_equation(float64):
    field = make_model().ode.vector_field
    y = np.random.default_rng(1).standard_normal((BATCH, 4))
    found = field(jnp.asarray(0.3), jnp.asarray(y))
    np.testing.assert_allclose(found, apply_field(field, y), rtol=1e-9)


def test_a_draw_has_the_mean_and_the_variance_of_its_posterior():
    noise = Posterior(*jnp.zeros((2, BATCH, 4))).sample(jr.key(0))
    mean, log_variance = np.random.default_rng(0).standard_normal((2, BATCH, 4))
    found = Posterior(jnp.asarray(mean, float), jnp.asarray(log_variance, float))
    expected = mean + np.exp(log_variance / 2) * noise
    np.testing.assert_allclose(found.sample(jr.key(0)), expected, rtol=1e-5, atol=1e-6)


def test_the_published_size():
    make = ft.partial(LatentODE, 37, solver=lrnde.Tsit5(), tolerance=1e-3)
    model = eqx.filter_eval_shape(make, key=jr.key(0))
    sizes = [x.size for x in jax.tree.leaves(model) if hasattr(x, "size")]
    into = 2 * 50 + 2 * 37 + 1  # state, values, mask and gap
    gates = 2 * ((into * 40 + 40) + (40 * 50 + 50))
    proposal = (into * 40 + 40) + (40 * 100 + 100)
    posterior = (100 * 50 + 50) + (50 * 40 + 40)
    field = 4 * ((20 * 40 + 40) + (40 * 20 + 20))
    assert sum(sizes) == gates + proposal + posterior + field + (20 * 37 + 37) == 43_827


def test_the_measured_step_is_the_solvers_own_whatever_is_saved():
    model = make_model(1e-7)
    y0 = jr.normal(jr.key(4), (BATCH, 4))
    samplings = "unbiased", "biased", "error"

    @eqx.filter_jit
    def solve(key, saveat, weights):
        regularizer = [
            (weight, lrnde.LocalError(sampling))
            for weight, sampling in zip(weights, samplings, strict=True)
        ]
        sol, penalty = model.ode.solve(
            y0, regularizer=regularizer, key=key, saveat=saveat
        )
        return penalty, sol.stats["nfe"]

    keys = jr.split(jr.key(5), 20)
    for weights in jnp.eye(3):
        at_times = [solve(key, diffrax.SaveAt(ts=TS), weights) for key in keys]
        at_end = [solve(key, diffrax.SaveAt(t1=True), weights) for key in keys]
        np.testing.assert_allclose(np.array(at_times), np.array(at_end), rtol=1e-5)
        assert len({float(penalty) for penalty, _ in at_end}) > 2


def test_a_reconstruction_is_the_readout_of_the_solve():
    model, (x, mask) = make_model(1e-7), observations()
    out = reconstruct(model, x, mask)
    y = scipy.integrate.solve_ivp(
        lambda t, y: apply_field(model.ode.vector_field, y.reshape(BATCH, 4)).ravel(),
        (0, 1),
        np.ravel(out.posterior.mean),
        t_eval=TS,
        rtol=1e-8,
        atol=1e-8,
    ).y
    readout = jax.tree.map(np.asarray, model.readout)
    expected = y.T.reshape(TIMES, BATCH, 4) @ readout.weight + readout.bias
    np.testing.assert_allclose(out.x, np.swapaxes(expected, 0, 1), atol=3e-5)
    assert out.successful and out.penalty == 0


def test_gradient_of_the_objective_against_finite_differences(float64):
    config = PhysioNet(deviation=0.3)
    x, mask = observations()
    batch = (TS, x.astype(float), mask, jnp.asarray(0.7))
    params, static = eqx.partition(make_model(1e-10), eqx.is_inexact_array)
    flat, unravel = ravel_pytree(params)
    direction = jr.normal(jr.key(7), flat.shape)

    @jax.jit
    @jax.value_and_grad
    def loss(scale):
        model = eqx.combine(unravel(flat + scale * direction), static)
        return config.objective(model, batch, key=jr.key(1), max_steps=128).loss

    h = 1e-4
    expected = (loss(h)[0] - loss(-h)[0]) / (2 * h)
    np.testing.assert_allclose(loss(0.0)[1], expected, rtol=1e-5)


# Objectives


@jax.jit
def error_and_likelihood(prediction, x, mask):
    error = objectives.squared_error(prediction, x, mask)
    return error, objectives.gaussian_log_likelihood(prediction, x, mask, 0.2)


@given(mask=masks)
@settings(max_examples=30)
def test_likelihood_and_error_are_means_over_the_mask(mask):
    x, prediction = (observations(seed)[0] for seed in (0, 10))
    filled = jnp.where(mask, x, jnp.nan)
    found = error_and_likelihood(prediction, filled, jnp.asarray(mask))
    for i, (error, likelihood) in enumerate(zip(*found, strict=True)):
        if not mask[i].any():
            assert error == 0
            continue
        a, b = np.asarray(prediction[i])[mask[i]], np.asarray(x[i])[mask[i]]
        np.testing.assert_allclose(error, np.mean((a - b) ** 2), rtol=1e-4)
        expected = scipy.stats.norm.logpdf(b, a, 0.2).mean()
        np.testing.assert_allclose(likelihood, expected, rtol=1e-3)


@given(mean=st.floats(-3, 3), log_variance=st.floats(-6, 2))
def test_divergence_is_its_integral(mean, log_variance):
    deviation = np.exp(log_variance / 2)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    z, logpdf = mean + deviation * nodes, scipy.stats.norm.logpdf
    expected = weights @ (logpdf(z, mean, deviation) - logpdf(z)) / np.sqrt(2 * np.pi)
    # Beside a coordinate that has the prior, which adds nothing.
    found = objectives.kl_divergence(
        jnp.array([[mean, 0.0]]), jnp.array([[log_variance, 0.0]])
    )
    np.testing.assert_allclose(found, [expected / 2], rtol=1e-3, atol=1e-5)


@given(wait=st.integers(0, 5000), rate=st.floats(0.5, 0.999))
def test_annealing_rises_from_zero_to_one(wait, rate):
    weights = [objectives.kl_annealing(step, wait, rate) for step in range(wait + 50)]
    assert not any(weights[: wait + 1])
    assert all(a < b for a, b in zip(weights[wait:], weights[wait + 1 :], strict=False))
    assert weights[-1] < 1
    assert objectives.kl_annealing(10**6, wait, rate) == pytest.approx(1)


# The experiment


@given(mask=masks)
@settings(max_examples=20)
def test_no_entry_is_both_seen_and_asked_for(mask):
    times = np.asarray(TS)
    found = tasks(times, mask)
    np.testing.assert_array_equal(found["reconstruction"].asked, mask)
    np.testing.assert_array_equal(found["reconstruction"].seen, mask)
    for name in ("interpolation", "extrapolation"):
        seen, asked = found[name]
        assert not np.any(seen & asked)
        np.testing.assert_array_equal(seen | asked, mask)
    late = np.nonzero(found["extrapolation"].asked)[1]
    early = np.nonzero(found["extrapolation"].seen)[1]
    assert np.all(times[late] > 0.5) and np.all(times[early] <= 0.5)


def test_one_observation_in_five_is_hidden(float64):
    found, again = (
        tasks(np.asarray(TS), np.ones((200, TIMES, CHANNELS), bool)) for _ in range(2)
    )
    hidden = found["interpolation"].asked
    np.testing.assert_array_equal(hidden, again["interpolation"].asked)
    assert abs(hidden.mean() - 0.2) < 0.02


def test_scores_are_means_over_series_that_were_asked_about():
    model, (x, mask) = make_model(1e-7), map(np.asarray, observations())
    task = tasks(np.asarray(TS), mask)["interpolation"]
    asked = task.asked.copy()
    asked[0] = False
    task = Task(task.seen, asked)
    scores = evaluate_series(model, np.asarray(TS), x, task, BATCH, 0.1)
    out = reconstruct(model, *map(jnp.asarray, (x, task.seen)))
    errors = [
        np.mean((out.x[i] - x[i])[asked[i]] ** 2)
        for i in range(BATCH)
        if asked[i].any()
    ]
    assert 0 < len(errors) < BATCH - 1  # the first and the last are left out
    assert scores.mse == pytest.approx(np.mean(errors), rel=1e-4)
    assert scores.nfe == float(out.nfe)
    # What was asked for is not seen: another value there changes no prediction.
    other = evaluate_series(
        model, np.asarray(TS), np.where(asked, x + 1, x), task, BATCH, 0.1
    )
    shifted = [
        np.mean((out.x[i] - x[i] - 1)[asked[i]] ** 2)
        for i in range(BATCH)
        if asked[i].any()
    ]
    assert other.mse == pytest.approx(np.mean(shifted), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_scores_do_not_depend_on_the_padding(batch_size):
    model, (x, mask) = make_model(1e-7), map(np.asarray, observations())
    task = Task(mask, mask)
    whole = evaluate_series(model, np.asarray(TS), x, task, BATCH, 0.1)
    parts = evaluate_series(model, np.asarray(TS), x, task, batch_size, 0.1)
    assert parts.mse == pytest.approx(whole.mse, rel=1e-3)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-3)


def test_steps_along_the_time_add_up_to_those_of_the_solve():
    model, (x, mask) = make_model(1e-7), map(np.asarray, observations())
    ts = np.asarray(TS)
    out = reconstruct(model, *map(jnp.asarray, (x, mask)))
    whole, halves, parts = (steps_along(model, ts, x, mask, n) for n in (1, 2, 8))
    assert whole.sum() == out.num_steps  # this solve rejects none
    np.testing.assert_allclose(halves.sum(), whole.sum(), rtol=1e-6)
    np.testing.assert_allclose(parts.reshape(2, 4).sum(axis=1), halves, rtol=1e-6)
    assert np.all(parts > 0) and parts[0] == max(parts)  # the first step is short


def small_experiment():
    return PhysioNet(
        latent=4,
        hidden=5,
        depth=1,
        encoder_size=4,
        encoder_hidden=4,
        tolerance=1e-3,
        eval_batch_size=200,
        eval_train_size=200,
    )


def test_metrics_are_those_of_their_tasks():
    config = small_experiment()
    dataset = config.load_data()
    model = config.make_model(dataset)
    metrics = config.metrics(model, dataset)
    found = tasks(dataset.times, dataset.mask_test)
    for name, task in found.items():
        scores = evaluate_series(
            model, dataset.times, dataset.x_test, task, 200, config.deviation
        )
        key = "test_mse" if name == "reconstruction" else f"test_{name}_mse"
        assert metrics[key] == pytest.approx(scores.mse)
    assert len({metrics[f"test_{n}mse"] for n in ("", "interpolation_")}) == 2
    seen = Task(*2 * (dataset.mask_train[:200],))
    x = dataset.x_train[:200]
    train = evaluate_series(model, dataset.times, x, seen, 200, config.deviation)
    assert metrics["train_mse"] == pytest.approx(train.mse)
    steps = [value for name, value in metrics.items() if "_steps_" in name]
    assert len(steps) == 16 and sum(steps) == pytest.approx(round(sum(steps)))


def test_a_batch_has_its_rows_and_the_weight_of_its_step():
    config = small_experiment()
    dataset = config.load_data()
    batches = config.batches(dataset)
    for step in (0, 150):
        times, x, mask, weight = batches(step)
        rows = config.order(dataset)[step]
        np.testing.assert_array_equal(x, dataset.x_train[rows])
        np.testing.assert_array_equal(mask, dataset.mask_train[rows])
        np.testing.assert_allclose(times, dataset.times, rtol=1e-6)
        assert weight == pytest.approx(objectives.kl_annealing(step, 100, 0.99))
    predict, size = config.prediction(dataset)
    model = config.make_model(dataset)
    batch = map(jnp.asarray, (dataset.times, dataset.x_test, dataset.mask_test))
    expected = model(*batch, max_steps=StepBudget().limit)
    assert size == len(dataset.x_test)
    np.testing.assert_allclose(predict(model), expected.x, rtol=1e-5)


@pytest.mark.parametrize(
    "setting", [{"deviation": 0.0}, {"kl_rate": 1.5}, {"kl_wait": -1}]
)
def test_settings_without_sense_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        PhysioNet(**setting)


@pytest.mark.parametrize("name", ["deviation", "tolerance"])
def test_a_text_is_not_taken_for_a_number(name):
    config = PhysioNet()
    object.__setattr__(config, name, "1e-2")  # past the type check of these tests
    with pytest.raises(ValueError, match=f"{name}='1e-2' must be a number"):
        config.__post_init__()


@pytest.mark.parametrize(
    "config",
    [PhysioNet(dataset="digits"), experiments.MNISTNode(dataset="oscillators")],
)
def test_another_kind_of_data_is_refused(config):
    with pytest.raises(ValueError, match=f"'{config.dataset}' is a .*; .* needs a"):
        config.load_data()


def test_the_data_do_not_depend_on_the_generator():
    times, mask = np.linspace(0, 1, 9), np.ones((20, 9, 4), bool)

    def made():
        series = simulated.oscillators(20)
        hidden = tasks(times, mask)["interpolation"].seen
        return series.x_train, hidden, simulated.spiral(4, 10).means

    with jax.default_prng_impl("rbg"):
        others = made()
        key = experiments.MNISTNode().key(1)
    jax.tree.map(np.testing.assert_array_equal, others, made())
    assert key == experiments.MNISTNode().key(1)


def test_the_data_do_not_depend_on_the_precision_of_other_numbers():
    def made():
        return simulated.spiral(4, 10), simulated.oscillators(20).x_train

    with jax.enable_x64(True):
        others = made()
    close = ft.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, others, made())


def test_a_spiral_has_two_of_everything_that_has_a_variance():
    for name in ("times", "trajectories", "truth"):
        with pytest.raises(ValueError, match=f"{name}=1 .*at least 2"):
            experiments.Spiral(**{name: 1})


def test_the_oscillators_are_observed_truth():
    dataset = experiments.configs(
        {"experiment": "physionet", "methods": ["vanilla"], "seeds": [0]}
    )[0].load_data()
    assert dataset.name == "oscillators"
    for part in ("train", "test"):
        x, mask, truth = (
            getattr(dataset, f"{n}_{part}") for n in ("x", "mask", "truth")
        )
        noise = (x - truth) * (dataset.high - dataset.low)
        np.testing.assert_allclose(noise[mask].std(), 0.03, rtol=0.02)
        assert not x[~mask].any()
        assert np.all(0.05 < mask.mean(axis=(0, 1))) and np.all(
            mask.mean(axis=(0, 1)) < 0.5
        )
        q, p, total, energy = np.moveaxis(mask, -1, 0)
        together = (q & p).mean(), (p & total).mean(), (q & energy).mean()
        np.testing.assert_allclose(together, (0.27, 0.18, 0.09), atol=0.02)
        q, p, total, energy = np.moveaxis(
            dataset.low + truth * (dataset.high - dataset.low), -1, 0
        )
        np.testing.assert_allclose(q + p, total, atol=1e-5)
        np.testing.assert_allclose(q**2 + p**2, energy, atol=1e-5)
        damping = -24 * np.diff(np.log(energy))
        frequency = 48 * np.diff(np.unwrap(np.arctan2(-p, q)))
        for found, low, high in ((damping, 0.2, 1), (frequency, 2, 5)):
            np.testing.assert_allclose(found, found[:, :1].repeat(48, 1), atol=0.02)
            np.testing.assert_allclose(found.min(), low, atol=0.1)
            np.testing.assert_allclose(found.max(), high, atol=0.1)
