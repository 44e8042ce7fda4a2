"""Processes that decide together."""

from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from ._checkpoint import save_checkpoint
from ._state import State, TrainingError


class Processes:
    """The processes of one training: what one of them decides, all do."""

    def __init__(self, sharding: PyTree[NamedSharding] | None):
        leaves = jax.tree.leaves(sharding)
        self._several = any(not s.is_fully_addressable for s in leaves)

    def any(self, here: bool) -> bool:
        """Whether it is so for one of them at least."""
        return bool(_of_all_processes(here).any()) if self._several else here

    def agree(self, value: int) -> bool:
        """Whether all have the same number."""
        return not self._several or len(set(_of_all_processes(value).tolist())) == 1

    def save(self, path: Path | None, state: State, identity: str) -> None:
        """Lets the first one write the checkpoint; all fail if it could not."""
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
