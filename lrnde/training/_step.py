"""The training step, compiled once for each step budget."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Bool

from .._regularizers import Regularizers
from ._state import Evaluation


class Outcome(NamedTuple):
    """What a training step came to.

    - `evaluation`: What the objective says of the batch, before the step.
    - `finite`: Whether the loss and its gradient are.
    """

    evaluation: Evaluation
    finite: Bool[Array, ""]


def make_step(
    objective: Callable[..., Evaluation],
    optimizer: optax.GradientTransformation,
    regularizer: Regularizers,
) -> Callable:
    """The training step, compiled once for each step budget.

    **Arguments:**

    - `objective`, `optimizer`, `regularizer`: As for `fit`.

    **Returns:**

    A function `(model, opt_state, batch, key, step, weight, max_steps) -> (model,
    opt_state), outcome`, where `weight` is an array, the weight of the penalty in this
    step, and `outcome` an `Outcome`. A step that does not work out changes nothing.
    """

    def total_loss(model, batch, key, weight, max_steps):
        evaluation = objective(
            model, batch, regularizer=regularizer, key=key, max_steps=max_steps
        )
        _check(evaluation)
        loss = evaluation.loss
        if regularizer is not None:
            penalty = evaluation.penalty
            loss = loss + weight.astype(penalty.dtype) * penalty
        return loss, evaluation

    @eqx.filter_jit
    def train_step(model, opt_state, batch, key, step, weight, max_steps):
        key = jr.fold_in(key, step)
        gradient_of = eqx.filter_value_and_grad(total_loss, has_aux=True)
        (loss, evaluation), gradient = gradient_of(model, batch, key, weight, max_steps)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, new_opt_state = optimizer.update(gradient, opt_state, params)
        new_model = eqx.apply_updates(model, updates)
        # A step that did not work out leaves no trace: its batch is tried again.
        keep = finite & evaluation.successful
        select = lambda new, old: jnp.where(keep, new, old)  # noqa: E731
        new, old = (
            eqx.filter(tree, eqx.is_array)
            for tree in ((new_model, new_opt_state), (model, opt_state))
        )
        chosen = jax.tree.map(select, new, old)
        static = eqx.filter((model, opt_state), eqx.is_array, inverse=True)
        return eqx.combine(chosen, static), Outcome(evaluation, finite)

    return train_step


def _check(evaluation: Evaluation) -> None:
    taken = evaluation.merits.keys() & {"step", "loss", "penalty", "nfe"}
    if taken:
        raise ValueError(
            f"{', '.join(sorted(taken))}: the history has a curve of that name, so no "
            "merit of the evaluation can have it."
        )
    for name, value in {**evaluation._asdict(), **evaluation.merits}.items():
        if name != "merits" and value is not None and jnp.shape(value) != ():
            raise ValueError(
                f"{name} of the evaluation has shape {jnp.shape(value)}; it must be "
                "a single number, of several solves the mean or the maximum."
            )
