"""Published claims, judged by records."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TYPE_CHECKING

import numpy as np

from .._extras import import_extra
from ._merits import merit_of
from ._methods import METHODS
from ._origins import setup, timed_apart
from ._published import check_published, row_of
from ._summary import mean_and_std
from ._tables import EMPTY, MISSING

if TYPE_CHECKING:
    import pandas


# A published saving of less than this share counts as none.
_SAVING = 0.05

# How far ours may stay behind the published factor and still reproduce it.
_SLACK = 1.1


def _number(cell: str | None) -> float:
    """The mean of a published cell."""
    return float(cell.split("±")[0]) if cell else math.nan


def _printed(experiment: str, method: str, names: Sequence[str]) -> tuple[float, float]:
    """A published number of a method, and of vanilla in the same source."""
    row = row_of(experiment, method)
    base = row_of(experiment, "vanilla", row.get("source"))
    found = (name for name in names if row.get(name) and base.get(name))
    name = next(found, "")
    return _number(row.get(name)), _number(base.get(name))


class _Pair(NamedTuple):
    """A quantity of a method and of vanilla, a value for each seed that both have."""

    ours: np.ndarray
    vanilla: np.ndarray


def _paired(records: Sequence[dict], method: str, name: str) -> _Pair:
    ours, vanilla = (
        {
            r["seed"]: {**r["metrics"], **r["times"]}.get(name, math.nan)
            for r in records
            if r["method"] == m
        }
        for m in (method, "vanilla")
    )
    seeds = sorted(ours.keys() & vanilla.keys())
    return _Pair(*(np.array([values[s] for s in seeds]) for values in (ours, vanilla)))


def _standard_error(values: np.ndarray) -> float:
    """That of the mean; one value has none."""
    return mean_and_std(values.tolist())[1] / math.sqrt(len(values))


def _factor(pair: _Pair) -> tuple[float, float]:
    """The quotient of two means, with its standard error to first order."""
    if not len(pair.ours):
        return math.nan, math.nan
    mean = float(np.mean(pair.vanilla))
    factor = float(np.mean(pair.ours)) / mean
    return factor, _standard_error(pair.ours - factor * pair.vanilla) / mean


def _cost_verdict(published: float, here: float, error: float) -> str:
    saves = here + 2 * error < 1
    if published > 1 - _SAVING:
        return "no" if saves else "yes"
    if not saves:
        return "no"
    return "yes" if here <= _SLACK * published else "in part"


def _quality_verdict(published: float, here: float, error: float) -> str:
    return "yes" if here <= max(published, 0.0) + 2 * error else "no"


def _costs(name: str, printed: Sequence[str]):
    """A claim on a cost: the factor to vanilla's."""

    def claim(experiment, method, records):
        ours, vanilla = _printed(experiment, method, printed)
        return ours / vanilla, *_factor(_paired(records, method, name))

    return claim


def _prediction_time(experiment, method, records):
    """A claim on prediction times that were measured apart and on equal terms."""
    both = [r for r in records if r["method"] in (method, "vanilla")]
    alike = len(setup(both)) == 1 and all(map(timed_apart, both))
    claim = _costs("predict_seconds", ["predict s/batch", "predict s"])
    published, *here = claim(experiment, method, records)
    return published, *(here if alike else (math.nan, math.nan))


def _lost_points(experiment, method, records):
    """How many points are lost to vanilla."""
    merit = merit_of(experiment, records)
    ours, vanilla = _printed(experiment, method, [merit.printed])
    pair = _paired(records, method, merit.test)
    lost = merit.factor * (pair.vanilla - pair.ours)
    here = (
        (float(np.mean(lost)), _standard_error(lost)) if len(lost) else 2 * [math.nan]
    )
    return vanilla - ours, *here


def _growth_of_error(experiment, method, records):
    """By how many per cent the error is larger than vanilla's."""
    merit = merit_of(experiment, records)
    ours, vanilla = _printed(experiment, method, [merit.printed])
    here, error = _factor(_paired(records, method, merit.test))
    return 100 * (ours / vanilla - 1), 100 * (here - 1), 100 * error


def _claims_of(experiment: str) -> dict[str, tuple]:
    """Quantity: what is claimed of it, how that is judged, and how it is written."""
    quality = {"accuracy lost (points)": (_lost_points, _quality_verdict, "+z.2f")}
    if merit_of(experiment, []).relative:
        quality = {"error added (%)": (_growth_of_error, _quality_verdict, "+z.1f")}
    return {
        "NFE": (_costs("test_nfe", ["test NFE"]), _cost_verdict, ".3f"),
        "prediction time": (_prediction_time, _cost_verdict, ".3f"),
        **quality,
    }


def _judged(records, experiment, method, quantity, claim, judge, form) -> tuple:
    published, here, error = claim(experiment, method, records)
    text = EMPTY if math.isnan(here) else f"{here:{form}}"
    if not len(_paired(records, method, "test_nfe").ours):
        text = verdict = MISSING
    elif math.isnan(published):
        verdict = EMPTY
    elif math.isnan(error):
        verdict = "unclear"
    else:
        verdict = judge(published, here, error)
    return method, quantity, published, here, error, text, verdict


def claims(
    records: Sequence[dict],
    experiment: str,
    tier: str,
    methods: Sequence[str] = METHODS[1:],
) -> "pandas.DataFrame":
    """Judges each published claim on an experiment by records.

    A claim is how a method stands to vanilla: the quotient of their NFE and of their
    prediction times, and the accuracy that is lost or the error that is added. Ours has
    a standard error, from the seeds that both have; runs of one seed share initial
    parameters and batches, so they are compared in pairs. A cost is *reproduced*
    ("yes") if it is below vanilla's by more than twice that error, and at most a tenth
    above the published factor; *in part* if it is below vanilla's but not by as much;
    otherwise not ("no"). Where less than a twentieth was saved in print, "yes" says
    that nothing is saved for certain here either. A quality is reproduced if no more is
    lost than in print, up to twice the standard error.

    **Arguments:**

    - `records`: Records; those of other experiments and tiers are left out.
    - `experiment`: For instance `"mnist-node"`.
    - `tier`: `"smoke"`, `"book"`, `"cpu"` or `"paper"`.
    - `methods`: The methods to judge, but for vanilla.

    **Returns:**

    A data frame with a row for each method and quantity: the published factor or
    change (a quotient or difference of printed means of one source), ours and its
    standard error as numbers, `text` that shows ours, and the `verdict`, which may also
    be "missing" (no records), "unclear" (one seed only, or times of different devices
    or of the run itself, which other runs may have slowed down)
    or "–" (not published).

    **Raises:**

    - `ValueError` if nothing was published on that experiment.
    """
    check_published(experiment)
    pd = import_extra("pandas")
    chosen = [r for r in records if (r["experiment"], r["tier"]) == (experiment, tier)]
    lines = [
        _judged(chosen, experiment, method, quantity, *how)
        for method in methods
        for quantity, how in _claims_of(experiment).items()
    ]
    columns = ["method", "quantity", "published", "here", "error", "text", "verdict"]
    return pd.DataFrame(lines, columns=columns).set_index(["method", "quantity"])
