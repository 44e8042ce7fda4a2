"""Objectives, each defined once."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """Mean cross-entropy in nats.

    $-\\frac1n \\sum_i \\log \\mathrm{softmax}(z_i)_{y_i}$ for logits $z$, labels $y$.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def correct(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Bool[Array, " batch"]:
    """Which examples have their label as the most probable class."""
    return jnp.argmax(logits, axis=-1) == labels


def accuracy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, ""]:
    """The fraction of examples classified correctly."""
    return correct(logits, labels).mean()
