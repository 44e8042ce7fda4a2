"""What training goes on from, and what it has seen."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import equinox as eqx
import optax
from jaxtyping import Array, Bool, Int, PyTree, Real


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, and what was kept."""


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
