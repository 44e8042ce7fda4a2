"""Figures of merit: what is compared besides cost."""

from collections.abc import Sequence
from typing import NamedTuple

from ._published import TABLES


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
