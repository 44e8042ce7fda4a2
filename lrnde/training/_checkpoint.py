"""Checkpoints that survive whatever ends a training."""

import hashlib
import io
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax

from .._files import write_atomically
from .._random import with_keys, without_keys
from ._state import History, State, TrainingError

_MAGIC = b"lrnde checkpoint 2\n"


def save_checkpoint(path: str | os.PathLike, state: State, identity: str) -> None:
    """Writes a checkpoint; at any moment the file is either the old or the new one.

    **Arguments:**

    - `path`: The file.
    - `state`: What to save.
    - `identity`: Whose checkpoint it is, for example the hash of a configuration.
    """
    header = dict(
        identity=identity,
        step=state.step,
        budget=asdict(state.budget),
        history=asdict(state.history),
        seconds=state.seconds,
        compile_seconds=state.compile_seconds,
        origins=state.origins,
        arrays=_arrays(state),
    )
    buffer = io.BytesIO()
    buffer.write(json.dumps(header).encode() + b"\n")
    eqx.tree_serialise_leaves(buffer, without_keys((state.model, state.opt_state)))
    content = buffer.getvalue()
    write_atomically(Path(path), _MAGIC + _digest(content) + b"\n" + content)


def load_checkpoint(path: str | os.PathLike, like: State, identity: str) -> State:
    """Reads a checkpoint.

    **Arguments:**

    - `path`: The file.
    - `like`: A state of the same structure, for example a freshly made one.
    - `identity`: As for `save_checkpoint`; another one is refused.

    **Raises:**

    - `TrainingError` if the file is damaged, or of another run; `FileNotFoundError` if
        there is none.
    """
    path = Path(path)
    header, content = _read(path)
    if header["identity"] != identity:
        raise TrainingError(
            f"{path} belongs to a run with other settings. {remedy(path)}"
        )
    if header["arrays"] != _arrays(like):
        raise TrainingError(
            f"{path} has arrays of other types or shapes than this run: was it made "
            "with another JAX_ENABLE_X64, or by other code? Go on with those, or move "
            "it away to start this run from its beginning."
        )
    trees = like.model, like.opt_state
    try:
        plain = eqx.tree_deserialise_leaves(io.BytesIO(content), without_keys(trees))
    except (ValueError, EOFError, RuntimeError) as error:
        raise TrainingError(
            f"{path} does not fit this model ({error}). {remedy(path)}"
        ) from error
    saved = header["budget"]
    # The limits are settings, which may have changed since.
    steps = min(saved["steps"], like.budget.limit)
    return State(
        *with_keys(trees, plain),
        header["step"],
        replace(like.budget, steps=steps, idle=saved["idle"]),
        History(**header["history"]),
        header["seconds"],
        header["compile_seconds"],
        header["origins"],
    )


class Progress(NamedTuple):
    """How far a checkpoint is: its training steps, and its learning curves."""

    step: int
    history: History


def progress_of(path: str | os.PathLike) -> Progress:
    """How far a checkpoint is: at step 0 and without curves, if there is no such file.

    **Raises:**

    - `TrainingError` if the file is damaged, or not a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        return Progress(0, History())
    header, _ = _read(path)
    return Progress(header["step"], History(**header["history"]))


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """What a checkpoint says of itself, and its arrays."""
    if path.is_dir():
        raise TrainingError(f"{path} is a folder. {remedy(path)}")
    with open(path, "rb") as file:
        magic, digest, content = file.readline(), file.readline(), file.read()
    if magic != _MAGIC:
        raise TrainingError(
            f"{path} is not a checkpoint of this version of lrnde. {remedy(path)}"
        )
    if digest.strip() != _digest(content):
        raise TrainingError(
            f"{path} is damaged (its checksum does not fit). {remedy(path)}"
        )
    header, arrays = content.split(b"\n", 1)
    return json.loads(header), arrays


def remedy(path: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    return f"Move or delete {path} to start this run from its beginning."


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _arrays(state: State) -> list[str]:
    """The type and shape of every array that a checkpoint holds."""
    leaves = jax.tree.leaves((state.model, state.opt_state))
    return [f"{x.dtype}{list(x.shape)}" for x in leaves if eqx.is_array(x)]
