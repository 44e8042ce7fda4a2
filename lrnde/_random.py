"""Random arrays."""

import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, PRNGKeyArray

# What a seed stands for does not depend on the generator that JAX is told to use.
GENERATOR = "threefry2x32"


def draw(
    sampler: Callable[..., Array],
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    **kwargs: Any,
) -> Array:
    """`sampler(key, shape=shape, **kwargs)`, for arrays of three axes and more.

    The numbers are the same, since JAX makes them in row-major order. But XLA for CPUs
    takes up to nine seconds to compile a draw of four axes, and a third of a second to
    compile one of a single axis. Other arguments than the shape are single numbers.
    """
    return sampler(key, shape=(math.prod(shape),), **kwargs).reshape(shape)
