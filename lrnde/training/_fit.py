"""The training loop."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import PRNGKeyArray, PyTree
from tqdm import tqdm

from .._regularizers import Regularizers
from ._checkpoint import load_checkpoint, remedy
from ._devices import on_all_devices, on_one_device
from ._processes import Processes
from ._state import Evaluation, new_state, State, StepBudget, TrainingError
from ._step import make_step, Outcome


def fit(
    model: PyTree,
    objective: Callable[..., Evaluation],
    batches: Callable[[int], PyTree],
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    regularizer: Regularizers = None,
    weight: float | optax.Schedule = 1.0,
    train_step: Callable | None = None,
    budget: StepBudget | None = None,
    sharding: PyTree[NamedSharding] | None = None,
    checkpoint: str | os.PathLike | None = None,
    identity: str = "",
    origin: dict[str, Any] | None = None,
    checkpoint_every: int = 100,
    deadline: float = math.inf,
    progress: bool = True,
) -> State:
    """Trains a model.

    The loss is `objective` plus, with a regularizer, `weight(step) * penalty`. A solve
    that runs out of steps is tried again with a larger budget, so no batch is lost.

    **Arguments:**

    - `model`: An `equinox.Module`; its inexact arrays are trained.
    - `objective`: Called as `objective(model, batch, regularizer=..., key=...,
        max_steps=...)`; returns an `Evaluation`. It hands the three on to its solve,
        with `throw=False`, so that a solve that runs out of steps can be tried again.
    - `batches`: From the step to its batch. All batches have the same shapes.
    - `steps`: How many training steps.
    - `optimizer`: An optax optimiser.
    - `key`: A `jax.random.key`; step `k` uses `jax.random.fold_in(key, k)`.
    - `regularizer`: As for `lrnde.diffeqsolve`.
    - `weight`: The weight of the penalty, a number or a function of the step.
    - `train_step`: The `make_step` of this objective, optimizer and regularizer, if
        there is one already: trainings that are given the same one share what it has
        compiled.
    - `budget`: The step budget to start with.
    - `sharding`: How to lay a batch over devices, `lrnde.training.shardings`: one for
        all of its arrays, or a tree of them with the structure of a batch. The model is
        copied to all devices. `None` trains on one. With devices of several processes
        (`jax.distributed`) each calls this with the same arguments, a deadline by its
        own clock. The first one writes the checkpoint, which all have to be able to
        read. A signal or deadline that meets one stops all after the same step; one
        that waits for another notices a signal when that comes. JAX's own handler of
        SIGTERM, if there are several processes, is gone afterwards.
    - `checkpoint`: A file to resume from if it exists, and to write to.
    - `identity`: Whose checkpoint it is; one of another identity is refused.
    - `origin`: Where this process trains, for `State.origins`; something that JSON can
        hold, such as `lrnde.records.provenance`.
    - `checkpoint_every`: Training steps between checkpoints.
    - `deadline`: Stop cleanly at this `time.monotonic()`.
    - `progress`: Whether to show a progress bar.

    **Returns:**

    The final `State`. Where `state.step < steps` the training was interrupted (Ctrl-C,
    SIGTERM or the deadline). A signal during the last step raises `KeyboardInterrupt`,
    if there is a checkpoint to keep its result.

    **Raises:**

    - `TrainingError` if the loss or its gradient is not finite, or a solve needs more
        steps than the budget's limit. The last good state is in the checkpoint. If the
        checkpoint is damaged, of another identity, or has more than `steps` behind it.
        With several processes also if the checkpoint cannot be written, or is not the
        same for all.
    - `ValueError` if a part of an `Evaluation` is not a single number, or a merit has
        the name of another curve.

    ```python
    def objective(model, batch, **kwargs):  # regularizer, key and max_steps
        y0, target = batch
        sol, penalty = lrnde.diffeqsolve(
            diffrax.ODETerm(model), diffrax.Tsit5(), 0.0, 1.0, None, y0,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
            throw=False, **kwargs,
        )
        return Evaluation(
            loss=jnp.mean((sol.ys[-1] - target) ** 2),
            penalty=penalty,
            merits={},
            nfe=sol.stats["nfe"],
            num_steps=sol.stats["num_steps"],
            successful=diffrax.is_successful(sol.result),
        )
    ```
    """
    if not callable(weight):
        weight = optax.constant_schedule(weight)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    state = new_state(model, optimizer)
    if budget is not None:
        state.budget = replace(budget)  # that of the caller may be used again
    if checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint, state, identity)
    processes = Processes(sharding)
    _check_start(state, steps, checkpoint, processes)
    if train_step is None:
        train_step = make_step(objective, optimizer, regularizer)
    resumed_at, compiled = state.step, set()
    trees = state.model, state.opt_state
    state.model, state.opt_state = on_all_devices(trees, sharding)
    bar = tqdm(total=steps, initial=state.step, disable=not progress, unit="step")
    with bar, _Interrupt() as interrupt:
        while state.step < steps:
            if processes.any(interrupt.asked or time.monotonic() > deadline):
                break
            started = time.monotonic()
            batch = batches(state.step)
            trees, outcome = train_step(
                state.model,
                state.opt_state,
                batch if sharding is None else jax.device_put(batch, sharding),
                key,
                jnp.asarray(state.step),
                jnp.asarray(weight(state.step), float),
                state.budget.steps,
            )
            outcome = jax.device_get(outcome)
            seconds = time.monotonic() - started
            if state.budget.steps in compiled:
                state.seconds += seconds
            else:
                state.compile_seconds += seconds
            compiled.add(state.budget.steps)
            evaluation = outcome.evaluation
            if not evaluation.successful and state.budget.grow():
                continue
            if reason := _failure(outcome, state.budget):
                processes.save(checkpoint, state, identity)
                kept = f"kept in {checkpoint}" if checkpoint else "lost (no checkpoint)"
                raise TrainingError(
                    f"step {state.step}: {reason} The state before that step is {kept}."
                )
            state.model, state.opt_state = on_all_devices(trees, sharding)
            state.budget.note(int(evaluation.num_steps))
            if origin is not None and state.step == resumed_at:
                state.origins.append(origin)  # who trains nothing leaves no trace
            state.step += 1
            state.history.add(state.step, evaluation)
            bar.update()
            bar.set_postfix(_postfix(evaluation), refresh=False)
            if state.step % checkpoint_every == 0:
                processes.save(checkpoint, state, identity)
        processes.save(checkpoint, state, identity)
        asked = processes.any(interrupt.asked)
    if asked and state.step == steps and checkpoint is not None:
        raise KeyboardInterrupt
    if sharding is not None:
        state.model, state.opt_state = on_one_device((state.model, state.opt_state))
    return state


def _check_start(
    state: State, steps: int, checkpoint: Path | None, processes: Processes
) -> None:
    if not processes.agree(state.step):
        raise TrainingError(f"the processes do not see the same {checkpoint}.")
    if state.step > steps:
        raise TrainingError(
            f"{checkpoint} has {state.step} training steps behind it, more than steps="
            f"{steps}. Ask for as many at least. {remedy(checkpoint)}"
        )


def _failure(outcome: Outcome, budget: StepBudget) -> str | None:
    """Why training cannot go on after a step, if it cannot."""
    if not outcome.evaluation.successful:
        return (
            f"the solve needs more than {budget.limit} steps. Loosen the tolerance, "
            "lower the learning rate, or raise `StepBudget(limit=...)`. (With a NaN in "
            "the batch or in the model no number of steps will do.)"
        )
    if not outcome.finite:
        return (
            "the loss or its gradient is not finite. Lower the learning rate or the "
            "weight of the penalty."
        )
    return None


def _postfix(evaluation: Evaluation) -> dict[str, str]:
    return {
        "loss": f"{evaluation.loss:.3f}",
        **{name: f"{value:.3f}" for name, value in evaluation.merits.items()},
        "nfe": str(evaluation.nfe),
    }


class _Interrupt:
    """Lets Ctrl-C, or the signal of `kill`, end the training between two steps.

    A second one ends it at once.
    """

    def __init__(self):
        self.asked = False
        self.previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
