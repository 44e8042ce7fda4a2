"""Batches divided over devices."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._random import with_keys, without_keys


class Shardings(NamedTuple):
    """Two ways of laying an array over all devices.

    - `split`: Its first axis is divided among them.
    - `whole`: Each has a copy.
    """

    split: NamedSharding
    whole: NamedSharding


def shardings(batch_size: int) -> Shardings:
    """How to lay batches over all devices that JAX knows, those of other hosts too.

    The training step stays the same function of the whole batch: JAX divides its work.
    So the error of a solver step is still one norm over all examples, and all devices
    take the same steps.

    **Arguments:**

    - `batch_size`: Examples in a batch.

    **Raises:**

    - `ValueError` if a batch cannot be divided evenly.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        raise ValueError(
            f"a batch of {batch_size} cannot be divided evenly over {len(devices)} "
            "devices. Choose a multiple, or fewer devices (CUDA_VISIBLE_DEVICES)."
        )
    mesh = Mesh(np.array(devices), ("batch",))
    return Shardings(
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )


def on_all_devices(tree: PyTree, sharding: PyTree[NamedSharding] | None) -> PyTree:
    """Gives each device a copy."""
    if sharding is None:
        return tree
    mesh = jax.tree.leaves(sharding)[0].mesh
    return eqx.filter_shard(tree, NamedSharding(mesh, PartitionSpec()))


def on_one_device(tree: PyTree) -> PyTree:
    """Takes one of the copies that all devices have."""
    arrays, rest = eqx.partition(without_keys(tree), eqx.is_array)
    copies = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), arrays)
    return with_keys(tree, eqx.combine(copies, rest))
