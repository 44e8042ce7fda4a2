"""What evaluations have in common, whatever the experiment."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from .. import data
from ..training import Evaluation, StepBudget

# What training may use, evaluation may use: it sets no memory aside for its steps.
MAX_STEPS = StepBudget().limit


def check_solved(successful: bool) -> None:
    """Raises a `RuntimeError` if a solve of the evaluation did not reach its end."""
    if not successful:
        raise RuntimeError(
            f"evaluation: a solve needs more than {MAX_STEPS} steps, the limit of the "
            "training. Loosen the tolerance or train with a larger weight."
        )


def evaluation_of(
    loss: jax.Array, merits: dict[str, jax.Array], out: Any
) -> Evaluation:
    """What an objective says, from the result of a model such as `Prediction`."""
    return Evaluation(loss, out.penalty, merits, out.nfe, out.num_steps, out.successful)


def in_batches(
    score: Callable[..., tuple], examples: int, batch_size: int
) -> tuple[list, float]:
    """Evaluates all examples, in batches of one size.

    **Arguments:**

    - `score`: Called with the number of a batch, its rows and a mask of those that
        count; returns what it found, the NFE, and whether the solve was successful.
    - `examples`, `batch_size`: How many examples there are, and in one solve at most.

    **Returns:**

    What was found in each batch, as NumPy arrays, and the mean NFE over batches; NaN
    where it is not counted.

    **Raises:**

    - `RuntimeError` if a solve does not reach its end.
    """
    scores, nfes = [], []
    batches = data.padded_batches(examples, min(batch_size, examples))
    for number, (rows, mask) in enumerate(batches):
        found, nfe, successful = jax.device_get(score(number, rows, mask))
        check_solved(bool(successful))
        scores.append(found)
        nfes.append(math.nan if nfe is None else int(nfe))
    return scores, sum(nfes) / len(nfes)


def by_part(scores: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a record, `train_loss` and so on, from the scores of each part."""
    return {
        f"{part}_{name}": value
        for part, found in scores.items()
        for name, value in found._asdict().items()
    }
