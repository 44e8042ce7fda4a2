"""Results beside published values, as tables and in words."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .._extras import import_extra
from ._merits import common_merit, Merit, merit_of
from ._methods import by_method, METHODS, ordered
from ._origins import distinct, timed_on
from ._published import check_published, row_of, SOURCES, TABLES
from ._summary import summary

if TYPE_CHECKING:
    import pandas


# What stands for a row without records.
MISSING = "missing"
# What stands for a number that there is not.
EMPTY = "–"


def _cell(row: dict[str, int | float], name: str, factor: int, digits: int) -> str:
    mean, deviation = row.get(name, math.nan), row.get(f"{name}_std", math.nan)
    if math.isnan(mean):
        return MISSING if "seeds" not in row else EMPTY
    spread = "" if math.isnan(deviation) else f" ± {factor * deviation:.{digits}f}"
    return f"{factor * mean:.{digits}f}{spread}"


def _as_ours(published: dict[str, str]) -> dict[str, str]:
    return {name: cell.replace("±", " ± ") for name, cell in published.items()}


def _quality(
    merit: Merit, row: dict[str, int | float], published: dict[str, str]
) -> dict[str, str]:
    def cell(name):
        return _cell(row, f"{name}_{merit.name}", merit.factor, merit.digits)

    return {
        f"train {merit.column}": cell("train"),
        f"test {merit.column}": cell("test"),
        f"published test {merit.column}": published.get(merit.printed) or EMPTY,
        **{f"{task} {merit.column}": cell(f"test_{task}") for task in merit.tasks},
    }


def _line(
    records: Sequence[dict],
    row: dict[str, int | float],
    published: dict[str, str],
    merit: Merit,
) -> dict[str, str]:
    devices = [device for record in records for device in timed_on(record)]
    return {
        **_quality(merit, row, published),
        "test NFE": _cell(row, "test_nfe", 1, 1),
        "published test NFE": published.get("test NFE") or EMPTY,
        "NFE ratio": _cell(row, "nfe_ratio", 1, 3),
        "published ratio": published.get("NFE ratio") or EMPTY,
        "train step (ms)": _cell(row, "train_step_seconds", 1000, 1),
        "predict time (ms/batch)": _cell(row, "predict_seconds", 1000, 1),
        "predict ratio": _cell(row, "predict_ratio", 1, 3),
        "train step ratio": _cell(row, "train_step_ratio", 1, 3),
        "timed on": distinct(devices) or EMPTY,
        "seeds": str(row.get("seeds", 0)),
        "source": published.get("source") or EMPTY,
    }


def table(
    records: Sequence[dict],
    experiment: str,
    tier: str,
    methods: Sequence[str] = METHODS,
) -> "pandas.DataFrame":
    """The results of an experiment with the published values beside them.

    **Arguments:**

    - `records`: Records; those of other experiments and tiers are left out.
    - `experiment`: For instance `"mnist-node"`.
    - `tier`: `"smoke"`, `"book"`, `"cpu"` or `"paper"`.
    - `methods`: The methods expected. One without records shows as `missing`.

    **Returns:**

    A data frame of text, a row a method, vanilla first: mean ± sample deviation over
    seeds (the mean alone for one seed), "–" where there is no such number. Ratios
    are quotients of means. `attrs["sources"]` has the full published sources.
    """
    pd = import_extra("pandas")
    chosen = [r for r in records if (r["experiment"], r["tier"]) == (experiment, tier)]
    rows, groups = summary(chosen), by_method(chosen)
    merit = merit_of(experiment, chosen)
    lines = {
        method: _line(
            groups.get(method, []),
            rows.get(method, {}),
            _as_ours(row_of(experiment, method)),
            merit,
        )
        for method in ordered([*methods, *rows])
    }
    frame = pd.DataFrame.from_dict(lines, orient="index").rename_axis("method")
    frame.attrs["sources"] = {s: SOURCES[s] for s in frame["source"] if s in SOURCES}
    return frame


def published_table(experiment: str) -> "pandas.DataFrame":
    """The published results of an experiment, as printed.

    **Arguments:**

    - `experiment`: For instance `"mnist-node"`.

    **Returns:**

    A data frame of text, a row for each method and source; "–" where the source gives
    no value. `attrs["sources"]` has the full sources.

    **Raises:**

    - `ValueError` if nothing was published on that experiment.
    """
    check_published(experiment)
    pd = import_extra("pandas")
    frame = pd.DataFrame(TABLES[experiment]).set_index("method")
    frame = frame.replace("", EMPTY).replace("±", " ± ", regex=True)
    frame.attrs["sources"] = {source: SOURCES[source] for source in frame["source"]}
    return frame


def _readable(value: object) -> str:
    """A setting; of a schedule its numbers and its kind, of several each by name."""
    if not isinstance(value, dict):
        return str(value)
    if "kind" not in value:
        return "; ".join(f"{name}: {_readable(inner)}" for name, inner in value.items())
    numbers = [f"{number:g}" for name, number in value.items() if name != "kind"]
    return f"{', '.join(numbers)} ({value['kind']})"


def settings_table(columns: Mapping[str, Mapping]) -> "pandas.DataFrame":
    """Settings side by side.

    **Arguments:**

    - `columns`: From the name of a column to its settings; those of the first column
        are shown.

    **Returns:**

    A data frame of text, a row a setting; "–" where a column lacks it.
    """
    pd = import_extra("pandas")
    names = list(next(iter(columns.values())))
    cells = {
        column: [_readable(settings.get(name, EMPTY)) for name in names]
        for column, settings in columns.items()
    }
    return pd.DataFrame(cells, index=pd.Index(names, name="setting"))


def findings(records: Sequence[dict]) -> str:
    """What the records say, in a line of Markdown for each method.

    **Arguments:**

    - `records`: Records of one experiment in one tier.

    **Returns:**

    A list: NFE and figure of merit of vanilla; for each other method its NFE and times
    relative to vanilla's, and how far its figure of merit is from vanilla's. Times of
    another device are left out.
    """
    rows = summary(records)
    base = rows.pop("vanilla", None)
    if base is None:
        return "*Nothing to compare: there are no records of vanilla.*"
    merit = common_merit(records)
    test, title, factor = merit.test, merit.title, merit.factor
    nfe, quality = _cell(base, "test_nfe", 1, 1), _cell(base, test, factor, 3)
    lines = [f"- *vanilla*: NFE {nfe}, {title} {quality} {merit.unit}".rstrip() + "."]
    for method, row in rows.items():
        gap = factor * (row[test] - base[test])
        change = f"{gap:+z.2f} points"
        if merit.relative:
            change = f"{100 * gap / (factor * base[test]):+z.1f} %"
        costs = [
            f"{row[ratio]:.3f} times {what}"
            for ratio, what in (
                ("nfe_ratio", "the NFE of vanilla"),
                ("predict_ratio", "its prediction time"),
                ("train_step_ratio", "its time for a training step"),
            )
            if not math.isnan(row[ratio])
        ]
        lines.append(f"- *{method}*: {', '.join(costs)}; {title} {change}.")
    return "\n".join(lines)
