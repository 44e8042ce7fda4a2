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


def moment_distance(
    paths: Float[Array, "trajectories times size"],
    means: Float[Array, "times size"],
    variances: Float[Array, "times size"],
) -> Float[Array, ""]:
    """How far means and variances of paths are from given ones.

    $\\langle (m - \\mu)^2 \\rangle + \\langle (v - \\sigma^2)^2 \\rangle$ with the
    sample mean $m$ and the unbiased sample variance $v$ over trajectories; the brackets
    are means over times and components.
    """
    found = paths.mean(axis=0), paths.var(axis=0, ddof=1)
    return sum(
        jnp.mean((a - b) ** 2) for a, b in zip(found, (means, variances), strict=True)
    )
