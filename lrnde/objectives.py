"""Objectives, each defined once."""

import math

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


def mean_per_series(
    values: Float[Array, "batch times channels"],
    mask: Bool[Array, "batch times channels"],
) -> Float[Array, " batch"]:
    """The mean of each series over the entries in the mask; 0 if it has none.

    $\\sum_{jk} m_{ijk} v_{ijk} \\,/\\, \\sum_{jk} m_{ijk}$ for series $i$. What entries
    outside the mask hold has no effect, on the gradient neither.
    """
    total = jnp.where(mask, values, 0).sum(axis=(1, 2))
    return total / jnp.maximum(mask.sum(axis=(1, 2)), 1)


def squared_error(
    prediction: Float[Array, "batch times channels"],
    x: Float[Array, "batch times channels"],
    mask: Bool[Array, "batch times channels"],
) -> Float[Array, " batch"]:
    """The masked mean squared error of each series.

    `mean_per_series` of $(\\hat x - x)^2$. The mask says what is asked for, and nothing
    else is mixed in: entries that the encoder has seen (reconstruction), that were
    hidden from it among others (interpolation), or that come after all that it has
    seen (extrapolation).
    """
    return mean_per_series((prediction - jnp.where(mask, x, 0)) ** 2, mask)


def gaussian_log_likelihood(
    prediction: Float[Array, "batch times channels"],
    x: Float[Array, "batch times channels"],
    mask: Bool[Array, "batch times channels"],
    deviation: float,
) -> Float[Array, " batch"]:
    """The masked Gaussian log-likelihood of each series, in nats an observed entry.

    $-\\frac{1}{2 \\sigma^2} e_i - \\log \\sigma - \\frac12 \\log 2\\pi$ with the
    `squared_error` $e_i$ and the standard deviation $\\sigma$.
    """
    error = squared_error(prediction, x, mask)
    constant = math.log(deviation) + math.log(2 * math.pi) / 2
    return -error / (2 * deviation**2) - constant


def kl_divergence(
    mean: Float[Array, "batch latent"], log_variance: Float[Array, "batch latent"]
) -> Float[Array, " batch"]:
    """The Kullback-Leibler divergence from the prior, in nats a latent coordinate.

    $\\frac{1}{2 d} \\sum_k (\\mu_k^2 + \\sigma_k^2 - 1 - \\log \\sigma_k^2)$: that of
    $N(\\mu, \\sigma^2)$ from $N(0, 1)$, its mean over the $d$ coordinates.
    """
    terms = mean**2 + jnp.expm1(log_variance) - log_variance
    return terms.mean(axis=-1) / 2


def kl_annealing(step: int, wait: int, rate: float) -> float:
    """The weight of the divergence at a training step.

    $1 - r^{\\max(0, k - w)}$ at step $k$: zero up to step $w$, so that the model learns
    to reconstruct first, then towards one.
    """
    return 1.0 - rate ** max(0, step - wait)
