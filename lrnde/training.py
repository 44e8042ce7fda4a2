"""Training: one compiled step, a step budget that adapts, checkpoints that survive."""

import hashlib
import io
import json
import math
import numbers
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree, Real
from tqdm import tqdm

from ._files import write_atomically
from ._regularizers import Regularizers

_MAGIC = b"lrnde checkpoint 2\n"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what was kept."""


class Evaluation(NamedTuple):
    """What an objective says of one batch; see `fit`.

    - `loss`: The data's part of the loss.
    - `penalty`: The regularizer's penalty, not yet weighted.
    - `merits`: Figures of merit to show and record, for example an accuracy.
    - `nfe`, `num_steps`, `successful`: Of the solve; see `lrnde.models.Prediction`. Of
        several solves, as under `jax.vmap`, the mean or maximum of the first, the
        maximum of the second, and whether all of the third.

    Each is a single number.
    """

    loss: Real[Array, ""]
    penalty: Real[Array, ""]
    merits: dict[str, Real[Array, ""]]
    nfe: Int[Array, ""] | None
    num_steps: Int[Array, ""]
    successful: Bool[Array, ""]


def schedule(spec: dict[str, Any], steps: int) -> optax.Schedule:
    """A schedule of a learning rate or a weight, as an optax schedule.

    **Arguments:**

    - `spec`: One of `{"kind": "constant", "value": v}`,
        `{"kind": "exponential", "start": a, "end": b}` (a to b over all steps),
        `{"kind": "cosine", "start": a, "end": b}`,
        `{"kind": "inverse", "start": a, "rate": r}` ($a / (1 + r k)$ at step $k$).
    - `steps`: The number of training steps.

    **Returns:**

    A function from the step to the value.

    **Raises:**

    - `ValueError` for an unknown kind, a missing or surplus number, what is not a
        finite number, or a start, an end or a rate that such a schedule cannot have.
    """
    _check_schedule(spec)
    match spec["kind"]:
        case "constant":
            return optax.constant_schedule(spec["value"])
        case "exponential":
            rate = spec["end"] / spec["start"]
            return optax.exponential_decay(spec["start"], steps, rate)
        case "cosine":
            end = spec["end"] / spec["start"]
            return optax.cosine_decay_schedule(spec["start"], steps, end)
        case "inverse":
            start, rate = spec["start"], spec["rate"]
            return lambda step: start / (1 + rate * step)


_NUMBERS = {
    "constant": {"value"},
    "exponential": {"start", "end"},
    "cosine": {"start", "end"},
    "inverse": {"start", "rate"},
}


def _check_schedule(spec: dict[str, Any]) -> None:
    if not isinstance(spec, Mapping):
        raise ValueError(f"schedule {spec}: write {{kind: constant, value: {spec}}}.")
    given = {name: value for name, value in spec.items() if name != "kind"}
    for name, value in given.items():
        if not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise ValueError(
                f"schedule {spec}: {name} is not a finite number. (YAML takes 1e-3 for "
                "a text; write 1.0e-3.)"
            )
    kind = spec.get("kind")
    if kind not in _NUMBERS:
        raise ValueError(f"schedule {spec}: kind must be one of {', '.join(_NUMBERS)}.")
    if set(given) != _NUMBERS[kind]:
        names = ", ".join(sorted(_NUMBERS[kind]))
        raise ValueError(f"schedule {spec}: {kind} takes {names}.")
    # An exponential never reaches zero; a cosine may.
    if "end" in given and not (given["start"] > 0 and given["end"] >= 0):
        raise ValueError(f"schedule {spec}: start must be positive, end not negative.")
    if kind == "exponential" and given["end"] == 0:
        raise ValueError(
            f"schedule {spec}: the end of an exponential must be positive."
        )
    if kind == "inverse" and given["rate"] < 0:
        raise ValueError(f"schedule {spec}: rate must not be negative.")


@dataclass
class StepBudget:
    """How many solver steps a training step may take.

    The memory of a gradient grows with the number of steps that it is made ready for,
    and on a CPU its time does. So this is kept near what the solves need: doubled when
    one runs out (that batch is tried again), halved when `patience` training steps in a
    row used at most half of it, but not below `smallest`. A budget that is new compiles
    the training step anew.

    **Arguments:**

    - `steps`: The budget to start with.
    - `limit`: A solve that needs more than this stops the training.
    - `smallest`: The budget is not halved below this.
    - `patience`: Training steps after which an idle budget is halved: enough of them
        to pay for the compilation.
    - `idle`: Training steps in a row that used at most half of the budget.

    **Raises:**

    - `ValueError` unless `smallest` and `steps` are positive, and `steps` is at most
        `limit`.
    """

    steps: int = 32
    limit: int = 16384
    smallest: int = 8
    patience: int = 1000
    idle: int = 0

    def __post_init__(self):
        if self.smallest < 1 or not 1 <= self.steps <= self.limit:
            raise ValueError(
                f"{self} must have a smallest of at least 1, and steps between 1 and "
                "its limit."
            )

    def grow(self) -> bool:
        """Doubles the budget; `False` if it is at its limit."""
        self.idle = 0
        if self.steps >= self.limit:
            return False
        self.steps = min(2 * self.steps, self.limit)
        return True

    def note(self, used: int) -> None:
        """Takes note of the number of steps that a training step has used."""
        self.idle = self.idle + 1 if 2 * used <= self.steps else 0
        if self.idle >= self.patience and self.steps > self.smallest:
            self.steps, self.idle = max(self.steps // 2, self.smallest), 0


@dataclass
class History:
    """Learning curves: means over intervals of `every` training steps.

    Where the NFE cannot be counted, as with implicit solvers, it has no curve.

    **Arguments:**

    - `every`: Training steps in an interval.
    - `curves`: From a name to its values so far; `"step"` holds the intervals' ends.
    - `pending`: The values of the interval that is not over yet.
    """

    every: int = 10
    curves: dict[str, list[int | float]] = field(
        default_factory=lambda: {
            name: [] for name in ("step", "loss", "penalty", "nfe")
        }
    )
    pending: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: int, evaluation: Evaluation) -> None:
        """Adds what training step number `step` (from one) came to."""
        named = dict(
            loss=evaluation.loss,
            penalty=evaluation.penalty,
            nfe=evaluation.nfe,
            **evaluation.merits,
        )
        if evaluation.nfe is None:
            del named["nfe"]
            self.curves.pop("nfe", None)
        self.pending.append({name: float(value) for name, value in named.items()})
        if step % self.every:
            return
        means = {
            name: sum(values[name] for values in self.pending) / len(self.pending)
            for name in named
        }
        for name, value in {"step": step, **means}.items():
            self.curves.setdefault(name, []).append(value)
        self.pending = []


@dataclass
class State:
    """All that training goes on from, and what it has seen so far.

    - `model`, `opt_state`: Parameters and optimiser.
    - `step`: Training steps done.
    - `budget`: The step budget.
    - `history`: The learning curves.
    - `seconds`: Wall time of the training steps but the first at each step budget.
    - `compile_seconds`: Wall time of these, which are compiled unless another training
        did that.
    - `origins`: Where the training took place: the `origin` of `fit`, one a process.
    """

    model: PyTree
    opt_state: PyTree
    step: int = 0
    budget: StepBudget = field(default_factory=StepBudget)
    history: History = field(default_factory=History)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    origins: list[dict[str, Any]] = field(default_factory=list)


def new_state(model: PyTree, optimizer: optax.GradientTransformation) -> State:
    """The state before the first training step."""
    return State(model, optimizer.init(eqx.filter(model, eqx.is_inexact_array)))


def save_checkpoint(path: Path, state: State, identity: str) -> None:
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
    eqx.tree_serialise_leaves(buffer, _without_keys((state.model, state.opt_state)))
    content = buffer.getvalue()
    write_atomically(path, _MAGIC + _digest(content) + b"\n" + content)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _is_key(leaf: Any) -> bool:
    return eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    """The tree with plain arrays in the place of its `jax.random.key`s."""
    return jax.tree.map(lambda x: jr.key_data(x) if _is_key(x) else x, tree)


def _with_keys(like: PyTree, plain: PyTree) -> PyTree:
    """Undoes `_without_keys`, for a tree like that one."""

    def restored(x, data):
        return jr.wrap_key_data(data, impl=jr.key_impl(x)) if _is_key(x) else data

    return jax.tree.map(restored, like, plain)


def _arrays(state: State) -> list[str]:
    """The type and shape of every array that a checkpoint holds."""
    leaves = jax.tree.leaves((state.model, state.opt_state))
    return [f"{x.dtype}{list(x.shape)}" for x in leaves if eqx.is_array(x)]


def load_checkpoint(path: Path, like: State, identity: str) -> State:
    """Reads a checkpoint.

    **Arguments:**

    - `path`: The file.
    - `like`: A state of the same structure, for example a freshly made one.
    - `identity`: As for `save_checkpoint`; another one is refused.

    **Raises:**

    - `TrainingError` if the file is damaged, or of another run.
    """
    header, content = _read(path)
    if header["identity"] != identity:
        raise TrainingError(
            f"{path} belongs to a run with other settings. {_remedy(path)}"
        )
    if header["arrays"] != _arrays(like):
        raise TrainingError(
            f"{path} has arrays of other types or shapes than this run: was it made "
            "with another JAX_ENABLE_X64, or by other code? Go on with those, or move "
            "it away to start this run from its beginning."
        )
    trees = like.model, like.opt_state
    try:
        plain = eqx.tree_deserialise_leaves(io.BytesIO(content), _without_keys(trees))
    except (ValueError, EOFError, RuntimeError) as error:
        raise TrainingError(
            f"{path} does not fit this model ({error}). {_remedy(path)}"
        ) from error
    saved = header["budget"]
    # The limits are settings, which may have changed since.
    steps = min(saved["steps"], like.budget.limit)
    return State(
        *_with_keys(trees, plain),
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


def progress_of(path: Path) -> Progress:
    """How far a checkpoint is: at step 0 and without curves, if there is no such file.

    **Raises:**

    - `TrainingError` if the file is damaged, or not a checkpoint.
    """
    if not path.exists():
        return Progress(0, History())
    header, _ = _read(path)
    return Progress(header["step"], History(**header["history"]))


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """What a checkpoint says of itself, and its arrays."""
    if path.is_dir():
        raise TrainingError(f"{path} is a folder. {_remedy(path)}")
    with open(path, "rb") as file:
        magic, digest, content = file.readline(), file.readline(), file.read()
    if magic != _MAGIC:
        raise TrainingError(
            f"{path} is not a checkpoint of this version of lrnde. {_remedy(path)}"
        )
    if digest.strip() != _digest(content):
        raise TrainingError(
            f"{path} is damaged (its checksum does not fit). {_remedy(path)}"
        )
    header, arrays = content.split(b"\n", 1)
    return json.loads(header), arrays


def _remedy(path: Path) -> str:
    return f"Move or delete {path} to start this run from its beginning."


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


class _Interrupt:
    """Lets Ctrl-C, or the signal of `kill`, end the training between two steps.

    A second one ends it at once.
    """

    def __init__(self):
        self.asked = False
        self.previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class _Processes:
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


def _on_all_devices(tree: PyTree, sharding: PyTree[NamedSharding] | None) -> PyTree:
    """Gives each device a copy."""
    if sharding is None:
        return tree
    mesh = jax.tree.leaves(sharding)[0].mesh
    return eqx.filter_shard(tree, NamedSharding(mesh, PartitionSpec()))


def _check_start(
    state: State, steps: int, checkpoint: Path | None, processes: _Processes
) -> None:
    if not processes.agree(state.step):
        raise TrainingError(f"the processes do not see the same {checkpoint}.")
    if state.step > steps:
        raise TrainingError(
            f"{checkpoint} has {state.step} training steps behind it, more than steps="
            f"{steps}. Ask for as many at least. {_remedy(checkpoint)}"
        )


def _failure(outcome: Outcome, budget: StepBudget) -> str | None:
    """Why training cannot go on after a step, if it cannot."""
    if not outcome.evaluation.successful:
        return (
            f"the solve needs more than {budget.limit} steps. Loosen the tolerance, "
            "lower the learning rate, or raise `StepBudget(limit=...)`. (With a NaN in "
            "the batch or in the model no number of steps will do.)"
        )
    if not outcome.finite:
        return (
            "the loss or its gradient is not finite. Lower the learning rate or the "
            "weight of the penalty."
        )
    return None


def fit(
    model: PyTree,
    objective: Callable[..., Evaluation],
    batches: Callable[[int], PyTree],
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    regularizer: Regularizers = None,
    weight: float | optax.Schedule = 1.0,
    train_step: Callable | None = None,
    budget: StepBudget | None = None,
    sharding: PyTree[NamedSharding] | None = None,
    checkpoint: str | os.PathLike | None = None,
    identity: str = "",
    origin: dict[str, Any] | None = None,
    checkpoint_every: int = 100,
    deadline: float = math.inf,
    progress: bool = True,
) -> State:
    """Trains a model.

    The loss is `objective` plus, with a regularizer, `weight(step) * penalty`. A solve
    that runs out of steps is tried again with a larger budget, so no batch is lost.

    **Arguments:**

    - `model`: An `equinox.Module`; its inexact arrays are trained.
    - `objective`: Called as `objective(model, batch, regularizer=..., key=...,
        max_steps=...)`; returns an `Evaluation`. It hands the three on to its solve,
        with `throw=False`, so that a solve that runs out of steps can be tried again.
    - `batches`: From the step to its batch. All batches have the same shapes.
    - `steps`: How many training steps.
    - `optimizer`: An optax optimiser.
    - `key`: A `jax.random.key`; step `k` uses `jax.random.fold_in(key, k)`.
    - `regularizer`: As for `lrnde.diffeqsolve`.
    - `weight`: The weight of the penalty, a number or a function of the step.
    - `train_step`: The `make_step` of this objective, optimizer and regularizer, if
        there is one already: trainings that are given the same one share what it has
        compiled.
    - `budget`: The step budget to start with.
    - `sharding`: How to lay a batch over devices, `lrnde.training.shardings`: one for
        all of its arrays, or a tree of them with the structure of a batch. The model is
        copied to all devices. `None` trains on one. With devices of several processes
        (`jax.distributed`) each calls this with the same arguments, a deadline by its
        own clock. The first one writes the checkpoint, which all have to be able to
        read. A signal or deadline that meets one stops all after the same step; one
        that waits for another notices a signal when that comes. JAX's own handler of
        SIGTERM, if there are several processes, is gone afterwards.
    - `checkpoint`: A file to resume from if it exists, and to write to.
    - `identity`: Whose checkpoint it is; one of another identity is refused.
    - `origin`: Where this process trains, for `State.origins`; something that JSON can
        hold, such as `lrnde.records.provenance`.
    - `checkpoint_every`: Training steps between checkpoints.
    - `deadline`: Stop cleanly at this `time.monotonic()`.
    - `progress`: Whether to show a progress bar.

    **Returns:**

    The final `State`. Where `state.step < steps` the training was interrupted (Ctrl-C,
    SIGTERM or the deadline). A signal during the last step raises `KeyboardInterrupt`,
    if there is a checkpoint to keep its result.

    **Raises:**

    - `TrainingError`: if the loss or its gradient is not finite, or a solve needs more
        steps than the budget's limit. The last good state is in the checkpoint. If the
        checkpoint is damaged, of another identity, or has more than `steps` behind it.
        With several processes also if the checkpoint cannot be written, or is not the
        same for all.
    - `ValueError` if a part of an `Evaluation` is not a single number, or a merit has
        the name of another curve.

    ```python
    def objective(model, batch, **kwargs):  # regularizer, key and max_steps
        y0, target = batch
        sol, penalty = lrnde.diffeqsolve(
            diffrax.ODETerm(model), diffrax.Tsit5(), 0.0, 1.0, None, y0,
            stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
            throw=False, **kwargs,
        )
        return Evaluation(
            loss=jnp.mean((sol.ys[-1] - target) ** 2),
            penalty=penalty,
            merits={},
            nfe=sol.stats["nfe"],
            num_steps=sol.stats["num_steps"],
            successful=diffrax.is_successful(sol.result),
        )
    ```
    """
    if not callable(weight):
        weight = optax.constant_schedule(weight)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    state = new_state(model, optimizer)
    if budget is not None:
        state.budget = replace(budget)  # that of the caller may be used again
    if checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint, state, identity)
    processes = _Processes(sharding)
    _check_start(state, steps, checkpoint, processes)
    if train_step is None:
        train_step = make_step(objective, optimizer, regularizer)
    resumed_at, compiled = state.step, set()
    trees = state.model, state.opt_state
    state.model, state.opt_state = _on_all_devices(trees, sharding)
    bar = tqdm(total=steps, initial=state.step, disable=not progress, unit="step")
    with bar, _Interrupt() as interrupt:
        while state.step < steps:
            if processes.any(interrupt.asked or time.monotonic() > deadline):
                break
            started = time.monotonic()
            batch = batches(state.step)
            trees, outcome = train_step(
                state.model,
                state.opt_state,
                batch if sharding is None else jax.device_put(batch, sharding),
                key,
                jnp.asarray(state.step),
                jnp.asarray(weight(state.step), float),
                state.budget.steps,
            )
            outcome = jax.device_get(outcome)
            seconds = time.monotonic() - started
            if state.budget.steps in compiled:
                state.seconds += seconds
            else:
                state.compile_seconds += seconds
            compiled.add(state.budget.steps)
            evaluation = outcome.evaluation
            if not evaluation.successful and state.budget.grow():
                continue
            if reason := _failure(outcome, state.budget):
                processes.save(checkpoint, state, identity)
                kept = f"kept in {checkpoint}" if checkpoint else "lost (no checkpoint)"
                raise TrainingError(
                    f"step {state.step}: {reason} The state before that step is {kept}."
                )
            state.model, state.opt_state = _on_all_devices(trees, sharding)
            state.budget.note(int(evaluation.num_steps))
            if origin is not None and state.step == resumed_at:
                state.origins.append(origin)  # who trains nothing leaves no trace
            state.step += 1
            state.history.add(state.step, evaluation)
            bar.update()
            bar.set_postfix(_postfix(evaluation), refresh=False)
            if state.step % checkpoint_every == 0:
                processes.save(checkpoint, state, identity)
        processes.save(checkpoint, state, identity)
        asked = processes.any(interrupt.asked)
    if asked and state.step == steps and checkpoint is not None:
        raise KeyboardInterrupt
    if sharding is not None:
        state.model, state.opt_state = _on_one_device((state.model, state.opt_state))
    return state


def _on_one_device(tree: PyTree) -> PyTree:
    """Takes one of the copies that all devices have."""
    arrays, rest = eqx.partition(_without_keys(tree), eqx.is_array)
    copies = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), arrays)
    return _with_keys(tree, eqx.combine(copies, rest))


def _postfix(evaluation: Evaluation) -> dict[str, str]:
    return {
        "loss": f"{evaluation.loss:.3f}",
        **{name: f"{value:.3f}" for name, value in evaluation.merits.items()},
        "nfe": str(evaluation.nfe),
    }
