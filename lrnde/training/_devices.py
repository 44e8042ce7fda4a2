"""Batches divided over devices, and processes that decide together."""

from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ._checkpoint import save_checkpoint, TrainingError, with_keys, without_keys
from ._state import State


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


class Processes:
    """The processes of one training: what one of them decides, all do."""

    def __init__(self, sharding: PyTree[NamedSharding] | None):
        leaves = jax.tree.leaves(sharding)
        self._several = any(not s.is_fully_addressable for s in leaves)

    def any(self, here: bool) -> bool:
        return bool(_of_all_processes(here).any()) if self._several else here

    def agree(self, value: int) -> bool:
        return not self._several or len(set(_of_all_processes(value).tolist())) == 1

    def save(self, path: Path | None, state: State, identity: str) -> None:
        if path is None:
            return
        problem = None
        if not self._several or jax.process_index() == 0:
            try:
                save_checkpoint(path, state, identity)
            except Exception as error:
                problem = error
        # Nobody goes on before the first process has saved, or if it could not.
        if self.any(problem is not None):
            raise problem or TrainingError(f"{path} could not be written.")


def _of_all_processes(value: bool | int) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(np.asarray(value)))
