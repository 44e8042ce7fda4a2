"""Records by method: figures of merit, means, deviations and ratios."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..records import all_origins
from ._published import TABLES

METHODS = ("vanilla", "unbiased", "biased")

# One colour a method in every figure, from the palette of Okabe and Ito (2008), which
# colour-blind readers can tell apart. The order is that of tables and legends.
COLORS = {
    "vanilla": "#000000",
    "unbiased": "#0072B2",
    "biased": "#D55E00",
    "error": "#009E73",
    "global-error": "#CC79A7",
    "global-stiffness": "#56B4E9",
    "steer": "#E69F00",
    "taylor": "#F0E442",
    # Beyond the palette: methods that no figure shows without its name.
    "unbiased-4": "#4D4D9F",
    "kinetic": "#8C564B",
    "steer+global-error": "#9E9E9E",
    "stiffness-unbiased": "#1B4F72",
    "stiffness-biased": "#873600",
}


class Merit(NamedTuple):
    """A figure of merit: what a table, a claim and a figure are about besides cost.

    - `name`: Of its curve; the metrics are `train_<name>` and `test_<name>`.
    - `title`, `factor`, `unit`: How it is written, with the factor to its unit.
    - `relative`: Whether a change is told in per cent of it.
    - `printed`: What the published tables call it on test data.
    - `column`, `digits`: What ours call it, and their digits after the point.
    - `tasks`: Others for which there is a metric, `test_<task>_<name>`.
    """

    name: str
    title: str
    factor: int
    unit: str
    relative: bool
    printed: str
    column: str
    digits: int
    tasks: tuple[str, ...] = ()

    @property
    def test(self) -> str:
        """The metric on test data."""
        return f"test_{self.name}"


# The first one that records have in common is theirs; all have a loss.
MERITS = (
    Merit(
        name="accuracy",
        title="test accuracy",
        factor=100,
        unit="%",
        relative=False,
        printed="test acc %",
        column="acc %",
        digits=2,
    ),
    Merit(
        name="mse",
        title="test error",
        factor=1000,
        unit="×10⁻³",
        relative=True,
        printed="test loss x1e-3",
        column="MSE x1e-3",
        digits=3,
        tasks=("interpolation", "extrapolation"),
    ),
    Merit(
        name="loss",
        title="test loss",
        factor=1,
        unit="",
        relative=True,
        printed="loss",
        column="loss",
        digits=4,
    ),
)


def common_merit(records: Sequence[dict]) -> Merit:
    """The first figure of merit that records have in common."""
    return next(m for m in MERITS if all(m.test in r["metrics"] for r in records))


def merit_of(experiment: str, records: Sequence[dict]) -> Merit:
    """That of an experiment: the published one, or else that of its records."""
    if experiment not in TABLES:
        return common_merit(records)
    return next(m for m in MERITS if m.printed in TABLES[experiment][0])


def ordered(methods: Sequence[str]) -> list[str]:
    """Methods without repeats: those of `COLORS` in its order, then the others."""
    known = list(COLORS)
    place = {method: known.index(method) for method in methods if method in known}
    return sorted(set(methods), key=lambda method: (place.get(method, 99), method))


def by_method(records: Sequence[dict]) -> dict[str, list[dict]]:
    """Groups the records of one experiment in one tier."""
    origins = {(record["experiment"], record["tier"]) for record in records}
    if len(origins) > 1:
        raise ValueError(
            f"the records come from {len(origins)} experiments or tiers:"
            f" {sorted(origins)}. Give those of one."
        )
    methods = ordered([record["method"] for record in records])
    return {m: [r for r in records if r["method"] == m] for m in methods}


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


def setup(records: Sequence[dict]) -> set[tuple]:
    """What has to agree before prediction times may be compared."""
    return {(timed_on(r), r["times"]["predict_batch"]) for r in records}


def timed_on(record: dict) -> frozenset[str]:
    """The devices that the times of a record come from."""
    origins = all_origins(record)
    if "measured" in record["provenance"]:
        origins = origins[:1]
    return frozenset(origin["device"] for origin in origins)


def timed_apart(record: dict) -> bool:
    """Whether the time of a training step is not the mean over the training itself."""
    if "measured" in record["provenance"]:
        return True  # older records do not say
    mean = record["times"]["train_seconds"] / record["config"]["steps"]
    return not math.isclose(record["times"]["train_step_seconds"], mean, rel_tol=1e-9)


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

    `ValueError` if the records come from several experiments or tiers.
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
