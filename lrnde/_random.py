"""Random arrays and keys."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray, PyTree

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


def is_key(leaf: Any) -> bool:
    """Whether it is a `jax.random.key`, or an array of them."""
    return eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def without_keys(tree: PyTree) -> PyTree:
    """The tree with plain arrays in the place of its `jax.random.key`s."""
    return jax.tree.map(lambda x: jr.key_data(x) if is_key(x) else x, tree)


def with_keys(like: PyTree, plain: PyTree) -> PyTree:
    """Undoes `without_keys`, for a tree like that one."""

    def restored(x, data):
        return jr.wrap_key_data(data, impl=jr.key_impl(x)) if is_key(x) else data

    return jax.tree.map(restored, like, plain)
