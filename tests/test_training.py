"""Training: schedules, the step budget, checkpoints, and runs that are killed."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lrnde
from lrnde import data, experiments, training
from lrnde.experiments import classification, MNISTNode
from lrnde.models import NeuralODEClassifier
from lrnde.training import (
    _fit,
    fit,
    History,
    progress_of,
    schedule,
    State,
    StepBudget,
    TrainingError,
)


def make_model(tolerance=1e-3):
    return NeuralODEClassifier(
        6, 8, 3, solver=lrnde.Bosh3(), tolerance=tolerance, key=jr.key(0)
    )


def batches(step):
    """A batch of 16 points; the class is the largest of three coordinates."""
    x = jr.normal(jr.fold_in(jr.key(5), step), (16, 6))
    return x, jnp.argmax(x[:, :3], axis=1)


small_model = cache(make_model)
OPTIMIZER = optax.adam(1e-2)


@cache
def step_for(regularizer):
    """Compiled once for all tests."""
    return training.make_step(classification, OPTIMIZER, regularizer)


def train(steps=20, *, model=None, batches=batches, regularizer=None, **kwargs):
    return fit(
        model or make_model(),
        classification,
        batches,
        steps=steps,
        optimizer=OPTIMIZER,
        key=jr.key(1),
        regularizer=regularizer,
        train_step=step_for(regularizer),
        progress=False,
        **kwargs,
    )


def assert_same_state(a: State, b: State):
    assert eqx.tree_equal((a.model, a.opt_state), (b.model, b.opt_state))
    assert (a.step, a.history) == (b.step, b.history)


values = st.floats(1e-3, 1.0)


@given(start=values, end=values, steps=st.integers(2, 1000))
def test_schedules_start_and_end_where_they_should(start, end, steps):
    for kind in ("exponential", "cosine"):
        value = schedule({"kind": kind, "start": start, "end": end}, steps)
        np.testing.assert_allclose(value(0), start, rtol=1e-5)
        np.testing.assert_allclose(value(steps), end, rtol=1e-4)
    to_zero = schedule({"kind": "cosine", "start": start, "end": 0.0}, steps)
    np.testing.assert_allclose(to_zero(steps), 0, atol=1e-6)
    constant = schedule({"kind": "constant", "value": start}, steps)
    assert constant(0) == constant(steps) == start
    inverse = schedule({"kind": "inverse", "start": start, "rate": end}, steps)
    np.testing.assert_allclose(inverse(steps), start / (1 + end * steps), rtol=1e-6)


def test_a_schedule_does_not_change_with_what_it_was_made_from():
    for spec in (
        {"kind": "inverse", "start": 1.0, "rate": 0.5},
        {"kind": "cosine", "start": 1.0, "end": 0.5},
    ):
        value = schedule(spec, 10)
        spec["start"] = 5.0
        assert value(0) == 1


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"kind": "linear", "start": 1, "end": 0}, "must be one of constant"),
        ({"value": 1}, "must be one of constant"),
        ({"kind": "constant"}, "constant takes value"),
        ({"kind": "cosine", "start": 1.0, "end": 0.1, "steps": 3}, "takes end, start"),
        ({"kind": "exponential", "start": 1.0, "end": 0.0}, "must be positive"),
        ({"kind": "cosine", "start": 0.0, "end": 0.1}, "start must be positive"),
        ({"kind": "constant", "value": "1e-3"}, "value is not a finite.*1.0e-3"),
        ({"kind": "constant", "value": math.nan}, "value is not a finite number"),
        ({"kind": "inverse", "start": 1.0, "rate": -0.1}, "rate must not be negative"),
    ],
)
def test_a_wrong_schedule_is_explained(spec, says):
    with pytest.raises(ValueError, match=says):
        schedule(spec, 10)


@given(used=st.lists(st.integers(1, 20) | st.integers(1, 300), max_size=60))
def test_the_budget_always_suffices_and_is_halved_when_idle_for_long(used):
    budget, idle = StepBudget(patience=3), 0
    for steps in used:
        while steps > budget.steps:
            assert budget.grow()
            idle = 0
        before = budget.steps
        idle = idle + 1 if 2 * steps <= before else 0
        budget.note(steps)
        if idle < 3 or before == budget.smallest:
            assert budget.steps == before
        else:
            assert budget.steps == max(before // 2, budget.smallest)
            idle = 0


@pytest.mark.parametrize(
    "numbers", [dict(steps=0), dict(steps=64, limit=4), dict(smallest=0)]
)
def test_a_budget_that_cannot_be_kept_is_refused(numbers):
    with pytest.raises(ValueError, match="StepBudget"):
        StepBudget(**numbers)


def test_a_solve_that_runs_out_of_steps_is_tried_again_and_changes_nothing():
    given = StepBudget(steps=4, smallest=4)
    tight = train(budget=given)
    assert given == StepBudget(steps=4, smallest=4)  # it may be used again
    roomy = train(budget=StepBudget(steps=64))
    assert tight.budget.steps > 4
    assert tight.step == roomy.step == 20
    for a, b in zip(
        jax.tree.leaves(eqx.filter(tight.model, eqx.is_array)),
        jax.tree.leaves(eqx.filter(roomy.model, eqx.is_array)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_solve_beyond_the_limit_stops_with_the_state_kept(tmp_path):
    path = tmp_path / "run.ckpt"
    budget = StepBudget(steps=2, limit=4)
    with pytest.raises(TrainingError, match=r"step 0: .*more than 4 steps.*run\.ckpt"):
        train(model=make_model(1e-7), budget=budget, checkpoint=path)
    assert path.exists()


def test_a_raised_limit_lets_a_stopped_run_go_on(tmp_path):
    path = tmp_path / "run.ckpt"
    kwargs = dict(model=make_model(1e-4), checkpoint=path)
    with pytest.raises(TrainingError, match="more than 4 steps"):
        train(1, budget=StepBudget(steps=4, limit=4), **kwargs)
    assert train(1, budget=StepBudget(steps=4, limit=64), **kwargs).step == 1
    # And a lowered one holds, too.
    with pytest.raises(TrainingError, match="more than 4 steps"):
        train(2, budget=StepBudget(steps=4, limit=4), **kwargs)


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(tmp_path):
    path = tmp_path / "run.ckpt"

    def poisoned(step):
        x, y = batches(step)
        return (x, y) if step < 7 else (x * jnp.nan, y)

    def objective(model, batch, **kwargs):
        # The solve of the poisoned batch would only run out of steps.
        x, y = batch
        evaluation = classification(model, (jnp.nan_to_num(x), y), **kwargs)
        return evaluation._replace(loss=evaluation.loss + jnp.sum(0 * x))

    kwargs = dict(optimizer=OPTIMIZER, key=jr.key(1), progress=False)
    kwargs["train_step"] = training.make_step(objective, OPTIMIZER, None)
    with pytest.raises(TrainingError, match="step 7: .*not finite"):
        fit(make_model(), objective, poisoned, steps=20, checkpoint=path, **kwargs)
    good = fit(make_model(), objective, batches, steps=7, **kwargs)
    assert_same_state(training.load_checkpoint(path, good, ""), good)


class Decay(eqx.Module):
    """A model with a random key among its leaves."""

    rate: jax.Array
    key: jax.Array

    def __call__(self, t, y, args):
        return -self.rate * y


def decay_objective(solver):
    def objective(model, batch, **kwargs):
        sol, penalty = lrnde.diffeqsolve(
            diffrax.ODETerm(model),
            solver,
            0.0,
            1.0,
            None,
            batch,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
            throw=False,
            **kwargs,
        )
        done = diffrax.is_successful(sol.result)
        loss, stats = jnp.mean(sol.ys[-1] ** 2), sol.stats
        return training.Evaluation(
            loss, penalty, {}, stats["nfe"], stats["num_steps"], done
        )

    return objective


def train_decay(objective, steps=20, batches=lambda step: jnp.ones(2), **kwargs):
    settings = dict(optimizer=OPTIMIZER, key=jr.key(1), progress=False)
    model = Decay(jnp.array(1.0), jr.key(7))
    return fit(model, objective, batches, steps=steps, **settings | kwargs)


def test_an_implicit_solver_trains_without_a_curve_of_its_nfe():
    state = train_decay(decay_objective(diffrax.Kvaerno3()))
    assert state.history.curves.keys() == {"step", "loss", "penalty"}
    assert state.history.curves["step"] == [10, 20]


def test_random_keys_are_kept_in_a_checkpoint(tmp_path):
    noisy = dict(optimizer=optax.noisy_sgd(0.1, key=jr.key(1)), weight=0.5)
    objective = decay_objective(lrnde.Bosh3())
    noisy["train_step"] = training.make_step(objective, noisy["optimizer"], None)
    whole = train_decay(objective, 6, **noisy)
    path = str(tmp_path / "run.ckpt")
    train_decay(objective, 2, **noisy, checkpoint=path)
    assert_same_state(train_decay(objective, 6, **noisy, checkpoint=path), whole)


def test_a_step_goes_down_the_loss_and_the_weighted_penalty():
    regularizer, weight, rate = lrnde.LocalError("biased"), 0.3, 0.1
    objective, key = decay_objective(lrnde.Bosh3()), jr.key(1)
    before, batch = Decay(jnp.array(1.0), jr.key(7)), jnp.array([1.0, 2.0])

    def loss(of):
        model = Decay(of, jr.key(7))
        # Step 0 has a key of its own.
        kwargs = dict(regularizer=regularizer, key=jr.fold_in(key, 0), max_steps=32)
        found = objective(model, batch, **kwargs)
        return found.loss + weight * found.penalty

    state = train_decay(
        objective,
        1,
        optimizer=optax.sgd(rate),
        regularizer=regularizer,
        weight=weight,
        batches=lambda step: batch,
    )
    expected = before.rate - rate * jax.grad(loss)(before.rate)
    np.testing.assert_allclose(state.model.rate, expected, rtol=1e-6)


@given(
    losses=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=25),
    every=st.integers(1, 6),
)
def test_curves_are_means_over_intervals(losses, every):
    history = History(every=every)
    for step, loss in enumerate(losses, 1):
        history.add(step, training.Evaluation(loss, 2 * loss, {}, None, 1, True))
    whole = len(losses) // every
    means = np.reshape(losses[: whole * every], (whole, every)).mean(axis=1)
    assert history.curves["step"] == [every * (k + 1) for k in range(whole)]
    np.testing.assert_allclose(history.curves["loss"], means, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(history.curves["penalty"], 2 * means, atol=1e-9)
    assert "nfe" not in history.curves


def test_what_an_objective_must_give_is_said():
    one = decay_objective(lrnde.Bosh3())

    def many(model, batch, **kwargs):
        return one(model, batch, **kwargs)._replace(nfe=jnp.ones(5))

    with pytest.raises(ValueError, match=r"nfe of the evaluation has shape \(5,\)"):
        train_decay(many)

    def twice(model, batch, **kwargs):
        return one(model, batch, **kwargs)._replace(merits={"loss": jnp.ones(())})

    with pytest.raises(ValueError, match="loss: the history has a curve"):
        train_decay(twice)


def test_a_checkpoint_that_is_further_on_is_not_taken_for_this_run(tmp_path):
    objective, path = decay_objective(lrnde.Bosh3()), str(tmp_path / "run.ckpt")
    train_decay(objective, 4, checkpoint=path)
    with pytest.raises(TrainingError, match="4 training steps behind it"):
        train_decay(objective, 3, checkpoint=path)
    assert progress_of(Path(path)).step == 4


def test_a_training_has_the_precision_of_its_configuration():
    seen = []

    class Watched(MNISTNode):
        def objective(self, model, batch, **kwargs):
            seen.append(jax.config.jax_default_matmul_precision)
            return super().objective(model, batch, **kwargs)

    config = Watched(steps=1, hidden=4, precision="high")
    experiments.train(config, data.digits(), progress=False)
    assert set(seen) == {"high"}


def test_one_compilation_once_the_budget_has_settled():
    traces = 0

    def counting(model, batch, **kwargs):
        nonlocal traces
        traces += 1
        return classification(model, batch, **kwargs)

    kwargs = dict(optimizer=OPTIMIZER, key=jr.key(1), progress=False)
    fit(
        make_model(),
        counting,
        batches,
        steps=30,
        regularizer=lrnde.LocalError("biased"),
        weight=schedule({"kind": "exponential", "start": 1.0, "end": 0.1}, 30),
        **kwargs,
    )
    assert traces == 1


def test_each_step_has_its_own_weight():
    """Trainings with different weights share what is compiled."""

    def trained(steps, weight):
        return train(steps, regularizer=lrnde.LocalError("biased"), weight=weight).model

    def late(step):
        return 10.0 if step == 1 else 0.0

    def never(step):
        return 0.0

    assert eqx.tree_equal(trained(1, late), trained(1, never))
    assert not eqx.tree_equal(trained(2, late), trained(2, never))


def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path):
    path = tmp_path / "run.ckpt"
    regularizer = lrnde.LocalError("biased")
    whole = train(30, regularizer=regularizer)
    train(13, regularizer=regularizer, checkpoint=path)
    resumed = train(30, regularizer=regularizer, checkpoint=path)
    assert_same_state(resumed, whole)


def test_a_deadline_stops_cleanly(tmp_path, monkeypatch):
    path, now = tmp_path / "run.ckpt", [0.0]

    def slow(step):
        now[0] += 1
        return batches(step)

    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(_fit, "time", clock)
    stopped = train(10**6, batches=slow, checkpoint=path, deadline=6.5)
    assert stopped.step == 7
    assert_same_state(training.load_checkpoint(path, stopped, ""), stopped)


def interrupting(step, number=signal.SIGINT):
    """A batch; with the sixth one, somebody presses Ctrl-C, or kills the process."""
    if step == 5:
        os.kill(os.getpid(), number)
    return batches(step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_returns_what_there_is(number):
    before = signal.getsignal(number)
    assert train(100, batches=partial(interrupting, number=number)).step == 6
    assert signal.getsignal(number) is before


def test_a_checkpoint_knows_who_trained_it(tmp_path):
    path = tmp_path / "run.ckpt"
    train(0, checkpoint=path, origin={"host": "idle"})
    train(4, checkpoint=path, origin={"host": "first"})
    train(4, checkpoint=path, origin={"host": "idle"})
    state = train(6, checkpoint=path, origin={"host": "second"})
    assert state.origins == [{"host": "first"}, {"host": "second"}]
    assert training.load_checkpoint(path, state, "").origins == state.origins


def test_ctrl_c_in_the_last_step_ends_what_comes_after_it(tmp_path):
    path = tmp_path / "run.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(6, batches=interrupting, checkpoint=path)
    assert progress_of(path).step == 6
    assert train(6, batches=interrupting).step == 6  # it would be lost


@given(
    curves=st.lists(st.floats(allow_nan=False), max_size=5),
    step=st.integers(0, 10**6),
)
def test_checkpoints_round_trip(tmp_path_factory, curves, step):
    path, model = tmp_path_factory.mktemp("checkpoints") / "a.ckpt", small_model()
    history = History(curves={"loss": curves})
    state = State(model, None, step, StepBudget(), history, 1.0, 2.0, [{"device": "a"}])
    training.save_checkpoint(path, state, "me")
    loaded = training.load_checkpoint(path, State(model, None), "me")
    assert_same_state(loaded, state)
    assert replace(loaded, model=None) == replace(state, model=None)


@given(data=st.data())
def test_damaged_checkpoints_are_refused(tmp_path_factory, data):
    """One wrong bit is enough, wherever it is."""
    path = tmp_path_factory.mktemp("damaged") / "run.ckpt"
    like = State(small_model(), 0)
    training.save_checkpoint(path, like, "me")
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"run\.ckpt"):
        training.load_checkpoint(path, like, "me")
    with pytest.raises(TrainingError, match=r"run\.ckpt"):
        progress_of(path)


def test_foreign_checkpoints_are_refused(tmp_path):
    path, like = tmp_path / "run.ckpt", State(make_model(), None)
    training.save_checkpoint(path, like, "me")
    whole = path.read_bytes()
    with pytest.raises(TrainingError, match=r"other settings.*run\.ckpt"):
        training.load_checkpoint(path, like, "you")
    for content in (b"", b"GIF89a", whole[:-1], whole[:40], whole + b"\n"):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match=r"run\.ckpt"):
            training.load_checkpoint(path, like, "me")
    path.write_bytes(whole)
    with jax.enable_x64(True), pytest.raises(TrainingError, match="JAX_ENABLE_X64"):
        # JAX would take one for the other without a word.
        double = jax.tree.map(
            lambda x: x.astype(float), eqx.filter(like.model, eqx.is_array)
        )
        training.load_checkpoint(path, State(double, None), "me")
    path.unlink()
    path.mkdir()
    with pytest.raises(TrainingError, match="is a folder"):
        progress_of(path)


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, like = tmp_path / "run.ckpt", State(make_model(), None)
    training.save_checkpoint(path, like, "me")
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        training.save_checkpoint(path, State(make_model(), None, 9), "me")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_evaluation_does_not_depend_on_the_padding():
    """Every example counts once, whatever the batch size."""
    model = make_model(1e-6)
    x, y = (np.asarray(z) for z in batches(0))
    whole = experiments.evaluate(model, x, y, 16)
    parts = experiments.evaluate(model, x, y, 5)
    logits = model(jnp.asarray(x)).logits
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-4)
    assert parts.accuracy == whole.accuracy == np.mean(logits.argmax(1) == y)


def test_the_model_is_its_equations(float64):
    """Against the same mathematics with the time appended to every layer's input."""
    model = make_model(1e-8)
    first, second = model.ode.vector_field.first, model.ode.vector_field.second

    def dense(layer, t, x):
        weight = jnp.concatenate([layer.weight, layer.time[None]])
        t = jnp.full((*x.shape[:-1], 1), t)
        return jnp.concatenate([x, t], axis=-1) @ weight + layer.bias

    term = diffrax.ODETerm(
        lambda t, x, args: dense(second, t, jnp.tanh(dense(first, t, x)))
    )
    x, _ = batches(0)
    sol = diffrax.diffeqsolve(
        term,
        diffrax.Tsit5(),
        0.0,
        1.0,
        None,
        x,
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
    )
    expected = sol.ys[0] @ model.readout.weight + model.readout.bias
    np.testing.assert_allclose(model(x).logits, expected, atol=1e-6)


def test_permuting_the_batch_permutes_the_prediction():
    model, (x, _) = make_model(1e-5), batches(0)
    order = jr.permutation(jr.key(3), len(x))
    np.testing.assert_allclose(
        model(x[order]).logits, model(x).logits[order], atol=1e-5
    )


def test_seeds_and_weights_share_what_is_compiled_and_nothing_else(monkeypatch):
    config = MNISTNode(method="unbiased", steps=3, hidden=4, tolerance=1e-2)
    weight = {"kind": "exponential", "start": 2.0, "end": 0.5}
    other = replace(config, seed=1, weight=weight)
    shared = experiments.train_step(config)
    assert experiments.train_step(other) is shared
    faster = replace(config, learning_rate={"kind": "constant", "value": 0.1})
    assert experiments.train_step(faster) is not shared
    with monkeypatch.context() as patch:
        anew = lrnde.LocalError("unbiased", samples=2)
        patch.setitem(experiments.REGULARIZERS, "unbiased", anew)
        assert experiments.train_step(config) is not shared
    assert experiments.train_step(config) is shared

    dataset = data.digits()
    after = [experiments.train(c, dataset, progress=False) for c in (config, other)]
    alone = fit(
        other.make_model(dataset),
        other.objective,
        other.batches(dataset),
        steps=other.steps,
        optimizer=other.make_optimizer(),
        key=other.key(1),
        regularizer=experiments.REGULARIZERS[other.method],
        weight=schedule(other.weight, other.steps),
        progress=False,
    )
    assert_same_state(after[1], alone)
    assert after[1].history != after[0].history


RUN = """
import json, sys
from pathlib import Path
from lrnde import experiments
config = experiments.MNISTNode(**json.loads(sys.argv[1]))
run = experiments.run(config, checkpoint=Path(sys.argv[2]), progress=False)
record = {k: run.record[k] for k in ("config", "metrics", "curves", "config_hash")}
record["step"] = run.record["curves"]["step"]
Path(sys.argv[3]).write_text(json.dumps(record, sort_keys=True))
"""


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    """SIGKILL five times, at random moments: same parameters, same record."""
    config = dict(method="unbiased", steps=1500, hidden=8, batch_size=16)
    config |= dict(tolerance=1e-3, solver="bosh3", eval_batch_size=360)
    # Seven processes compile once, which JAX allows where errors do not call the host.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "EQX_ON_ERROR": "nan",
    }

    def start(name):
        command = [sys.executable, "-c", RUN, json.dumps(config)]
        command += [str(tmp_path / f"{name}.ckpt"), str(tmp_path / f"{name}.json")]
        return subprocess.Popen(command, cwd=Path(__file__).parents[1], env=environment)

    checkpoint, moments = tmp_path / "killed.ckpt", random.Random(0)

    def wait_for_a_checkpoint(process, after):
        while progress_of(checkpoint).step == after:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.005)
        return time.monotonic()

    undisturbed, interval = start("whole"), None
    for _ in range(5):
        process, before = start("killed"), progress_of(checkpoint).step
        # So that each one goes on from the last.
        saved = wait_for_a_checkpoint(process, before)
        if interval is None:  # between two checkpoints, however fast this machine is
            interval = wait_for_a_checkpoint(process, before + 100) - saved
        time.sleep(moments.uniform(0, interval))
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
        assert before < progress_of(checkpoint).step < config["steps"]
    assert start("killed").wait() == 0
    assert undisturbed.wait() == 0
    whole, killed = (tmp_path / f"{name}.json" for name in ("whole", "killed"))
    assert whole.read_text() == killed.read_text()
    states = [
        experiments.load_state(MNISTNode(**config), data.digits(), path)
        for path in (tmp_path / "whole.ckpt", checkpoint)
    ]
    assert_same_state(*states)
    assert math.isfinite(states[0].history.curves["loss"][-1])
