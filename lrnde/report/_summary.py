"""Means, deviations and ratios of records, by method."""

import math
from collections.abc import Sequence

import numpy as np

from ._methods import by_method
from ._origins import setup


def mean_and_std(values: Sequence[int | float]) -> tuple[float, float]:
    """The mean and sample deviation; one value has no deviation."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(deviation)


def _row(records: Sequence[dict]) -> dict[str, int | float]:
    row: dict[str, int | float] = {"seeds": len(records)}
    samples = [{**record["metrics"], **record["times"]} for record in records]
    for name in sorted(set.intersection(*map(set, samples))):
        values = [sample[name] for sample in samples]
        row[name], row[f"{name}_std"] = mean_and_std(values)
    return row


def _ratio(ours: float, base: float) -> float:
    # The first step counts as compilation, so a training of one step took no time.
    return ours / base if base else math.nan


def summary(records: Sequence[dict]) -> dict[str, dict[str, int | float]]:
    """The numbers behind `lrnde.report.table`, unrounded.

    **Arguments:**

    - `records`: Records of one experiment in one tier.

    **Returns:**

    A dictionary for each method that has records, vanilla first: `seeds`; the mean
    over seeds of each metric and time under its name (fractions, seconds), and its
    sample deviation under `<name>_std` (NaN for one seed); `nfe_ratio`,
    `predict_ratio` and `train_step_ratio`, the quotients of the mean test NFE, mean
    prediction time and mean time of a training step to vanilla's. These are NaN
    without records of vanilla, and the last two also unless the times of both were
    taken on one device, with one batch size.

    **Raises:**

    - `ValueError` if the records come from several experiments or tiers.
    """
    groups = by_method(records)
    rows = {method: _row(group) for method, group in groups.items()}
    base = rows.get("vanilla", {})
    for method, row in rows.items():
        row["nfe_ratio"] = _ratio(row["test_nfe"], base.get("test_nfe", math.nan))
        setups = setup(groups[method] + groups.get("vanilla", []))
        comparable = "vanilla" in rows and len(setups) == 1
        seconds = base["predict_seconds"] if comparable else math.nan
        row["predict_ratio"] = _ratio(row["predict_seconds"], seconds)
        step = base["train_step_seconds"] if comparable else math.nan
        row["train_step_ratio"] = _ratio(row["train_step_seconds"], step)
    return rows
