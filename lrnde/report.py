"""Tables and figures of the book, made from records and from published values alone.

Everything here takes a list of records (`lrnde.records.load_all`). The tables need
pandas and the figures matplotlib: `pip install 'lrnde[book]'`.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TYPE_CHECKING

import numpy as np

from ._extras import import_extra
from ._published import SOURCES, TABLES
from .records import all_origins, path_of

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import pandas


MISSING = "missing"
EMPTY = "–"
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
_MARKERS = dict(zip(COLORS, "osD^vPX*<>pHd", strict=True))
# Methods that often end where another one does: both lines can be seen.
_DASHED = ("biased", "global-error", "stiffness-biased")
_LONG = 8  # a legend with more entries stands beside the panels

# curve: label, factor to the unit of the label, scale of the axis.
_CURVES = {
    "nfe": ("NFE", 1, "linear"),
    "accuracy": ("Accuracy (%)", 100, "linear"),
    "loss": ("Loss", 1, "log"),
    "mse": ("Mean squared error", 1, "log"),
    "kl": ("KL divergence", 1, "linear"),
    "penalty": ("Penalty", 1, "log"),
}


class _Merit(NamedTuple):
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
_MERITS = (
    _Merit(
        name="accuracy",
        title="test accuracy",
        factor=100,
        unit="%",
        relative=False,
        printed="test acc %",
        column="acc %",
        digits=2,
    ),
    _Merit(
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
    _Merit(
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

_STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


# Numbers


def _ordered(methods: Sequence[str]) -> list[str]:
    """Methods without repeats: those of `COLORS` in its order, then the others."""
    known = list(COLORS)
    place = {method: known.index(method) for method in methods if method in known}
    return sorted(set(methods), key=lambda method: (place.get(method, 99), method))


def _by_method(records: Sequence[dict]) -> dict[str, list[dict]]:
    """Groups the records of one experiment in one tier."""
    origins = {(record["experiment"], record["tier"]) for record in records}
    if len(origins) > 1:
        raise ValueError(
            f"the records come from {len(origins)} experiments or tiers:"
            f" {sorted(origins)}. Give those of one."
        )
    methods = _ordered([record["method"] for record in records])
    return {m: [r for r in records if r["method"] == m] for m in methods}


def _mean_and_std(values: Sequence[int | float]) -> tuple[float, float]:
    """The mean and sample deviation; one value has no deviation."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(deviation)


def _row(records: Sequence[dict]) -> dict[str, int | float]:
    row: dict[str, int | float] = {"seeds": len(records)}
    samples = [{**record["metrics"], **record["times"]} for record in records]
    for name in sorted(set.intersection(*map(set, samples))):
        values = [sample[name] for sample in samples]
        row[name], row[f"{name}_std"] = _mean_and_std(values)
    return row


def _setup(records: Sequence[dict]) -> set[tuple]:
    """What has to agree before prediction times may be compared."""
    return {(_timed_on(r), r["times"]["predict_batch"]) for r in records}


def _timed_on(record: dict) -> frozenset[str]:
    """The devices that the times of a record come from."""
    origins = all_origins(record)
    if "measured" in record["provenance"]:
        origins = origins[:1]
    return frozenset(origin["device"] for origin in origins)


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
    groups = _by_method(records)
    rows = {method: _row(group) for method, group in groups.items()}
    base = rows.get("vanilla", {})
    for method, row in rows.items():
        row["nfe_ratio"] = _ratio(row["test_nfe"], base.get("test_nfe", math.nan))
        setups = _setup(groups[method] + groups.get("vanilla", []))
        comparable = "vanilla" in rows and len(setups) == 1
        seconds = base["predict_seconds"] if comparable else math.nan
        row["predict_ratio"] = _ratio(row["predict_seconds"], seconds)
        step = base["train_step_seconds"] if comparable else math.nan
        row["train_step_ratio"] = _ratio(row["train_step_seconds"], step)
    return rows


# Tables


def _cell(row: dict[str, int | float], name: str, factor: int, digits: int) -> str:
    mean, deviation = row.get(name, math.nan), row.get(f"{name}_std", math.nan)
    if math.isnan(mean):
        return MISSING if "seeds" not in row else EMPTY
    spread = "" if math.isnan(deviation) else f" ± {factor * deviation:.{digits}f}"
    return f"{factor * mean:.{digits}f}{spread}"


def _published(experiment: str, method: str) -> dict[str, str]:
    """The published row of a method that the experiment reproduces, if there is one."""
    rows = (row for row in TABLES.get(experiment, ()) if row["method"] == method)
    return {name: cell.replace("±", " ± ") for name, cell in next(rows, {}).items()}


def _quality(
    merit: _Merit, row: dict[str, int | float], published: dict[str, str]
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
    merit: _Merit,
) -> dict[str, str]:
    devices = [device for record in records for device in _timed_on(record)]
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
        "timed on": _distinct(devices) or EMPTY,
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
    rows, groups = summary(chosen), _by_method(chosen)
    merit = _merit_of(experiment, chosen)
    lines = {
        method: _line(
            groups.get(method, []),
            rows.get(method, {}),
            _published(experiment, method),
            merit,
        )
        for method in _ordered([*methods, *rows])
    }
    frame = pd.DataFrame.from_dict(lines, orient="index").rename_axis("method")
    frame.attrs["sources"] = {s: SOURCES[s] for s in frame["source"] if s in SOURCES}
    return frame


def _check_published(experiment: str) -> None:
    if experiment not in TABLES:
        problem = f"no published results for {experiment!r}; known: {', '.join(TABLES)}"
        raise ValueError(problem)


def published_table(experiment: str) -> "pandas.DataFrame":
    """The published results of an experiment, as printed.

    **Arguments:**

    - `experiment`: For instance `"mnist-node"`.

    **Returns:**

    A data frame of text, a row for each method and source; "–" where the source gives
    no value. `attrs["sources"]` has the full sources.

    **Raises:**

    `ValueError` if nothing was published on that experiment.
    """
    _check_published(experiment)
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


def _merit(records: Sequence[dict]) -> _Merit:
    """The figure of merit of records."""
    return next(m for m in _MERITS if all(m.test in r["metrics"] for r in records))


def _merit_of(experiment: str, records: Sequence[dict]) -> _Merit:
    """That of an experiment: the published one, or else that of its records."""
    if experiment not in TABLES:
        return _merit(records)
    return next(m for m in _MERITS if m.printed in TABLES[experiment][0])


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
    merit = _merit(records)
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


def _distinct(values: Sequence) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))


def _commit(origin: dict) -> str:
    if origin["git_commit"] is None:
        return "unknown"
    return f"`{origin['git_commit'][:10]}`" + " (changed)" * (not origin["git_clean"])


def provenance_note(records: Sequence[dict], root: str = "book/results") -> str:
    """Says in a line of Markdown where the numbers of a table come from.

    **Arguments:**

    - `records`: Records of one experiment in one tier.
    - `root`: The folder of all records, as the reader should see it.

    **Returns:**

    Number and folder of the records, seeds, devices, precision, `XLA_FLAGS` if there
    were any in the training, versions, commits and dates, each with all of its values
    where the records differ; and how many of the times were measured side by side after
    the runs, by how many commands if not by one, and with what commits and flags, where
    the records say it.
    """
    if not records:
        return "**Provenance.** No records."
    _by_method(records)
    origins = [origin for record in records for origin in all_origins(record)]
    names = origins[0]["versions"]
    versions = (f"{n} {_distinct([o['versions'][n] for o in origins])}" for n in names)
    devices = [
        f"{o['device']} ({o['platform']}, precision {o['precision']})" for o in origins
    ]
    # Records from before they were noted have none.
    flags = Counter(
        text
        for record in records
        for text in {o.get("xla_flags") for o in all_origins(record)} - {None, ""}
    )
    parts = (
        f"{len(records)} records in `{root}/{records[0]['experiment']}/"
        f"{records[0]['tier']}`",
        f"seeds {_distinct([record['seed'] for record in records])}",
        _distinct(devices),
        *(f"{n} trained with XLA_FLAGS `{text}`" for text, n in sorted(flags.items())),
        ", ".join(versions),
        f"commit {_distinct([_commit(origin) for origin in origins])}",
        f"run on {_distinct([origin['started'][:10] for origin in origins])}",
        _measured([record for record in records if _timed_apart(record)]),
    )
    return f"**Provenance.** {'; '.join(parts)}."


def _measured(records: Sequence[dict]) -> str:
    """How times were measured after the runs, as far as the records say it."""
    origins = [r["provenance"].get("measured", {}) for r in records]
    # One command measures side by side, and notes when it started.
    commands = len({o.get("started") for o in origins})
    several = f", by {commands} commands" if commands > 1 else ""
    text = f"times of {len(records)} measured side by side afterwards{several}"
    found = [o for o in origins if o]
    if not found:
        return text
    flags = _distinct([f"`{o['xla_flags']}`" for o in found if o["xla_flags"]])
    with_flags = f", XLA_FLAGS {flags}" if flags else ""
    return f"{text} (commit {_distinct([_commit(o) for o in found])}{with_flags})"


def _timed_apart(record: dict) -> bool:
    """Whether the time of a training step is not the mean over the training itself."""
    if "measured" in record["provenance"]:
        return True  # older records do not say
    mean = record["times"]["train_seconds"] / record["config"]["steps"]
    return not math.isclose(record["times"]["train_step_seconds"], mean, rel_tol=1e-9)


def record_links(records: Sequence[dict], root: str = "../book/results") -> str:
    """Links to the files of records, in a line of Markdown.

    **Arguments:**

    - `records`: Records of one experiment in one tier.
    - `root`: The folder of all records, as the page sees it.

    **Returns:**

    A link for each seed, by method.
    """
    groups = _by_method(records)
    if not groups:
        return "**Records.** None."

    def seeds(group):
        ordered = sorted(group, key=lambda record: record["seed"])
        return ", ".join(f"[{r['seed']}]({path_of(r, root)})" for r in ordered)

    parts = (f"*{method}* {seeds(group)}" for method, group in groups.items())
    return f"**Records,** by seed. {'; '.join(parts)}."


# What reproduces

# A published saving of less than this share counts as none.
_SAVING = 0.05
# How far ours may stay behind the published factor and still reproduce it.
_SLACK = 1.1


def _number(cell: str | None) -> float:
    """The mean of a published cell."""
    return float(cell.split("±")[0]) if cell else math.nan


def _printed(experiment: str, method: str, names: Sequence[str]) -> tuple[float, float]:
    """A published number of a method, and of vanilla in the same source."""
    table = TABLES.get(experiment, [])
    row = next((row for row in table if row["method"] == method), {})
    same = (r for r in table if r["source"] == row.get("source"))
    base = next((r for r in same if r["method"] == "vanilla"), {})
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
    return _mean_and_std(values.tolist())[1] / math.sqrt(len(values))


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
    alike = len(_setup(both)) == 1 and all(map(_timed_apart, both))
    claim = _costs("predict_seconds", ["predict s/batch", "predict s"])
    published, *here = claim(experiment, method, records)
    return published, *(here if alike else (math.nan, math.nan))


def _lost_points(experiment, method, records):
    """How many points are lost to vanilla."""
    merit = _merit_of(experiment, records)
    ours, vanilla = _printed(experiment, method, [merit.printed])
    pair = _paired(records, method, merit.test)
    lost = merit.factor * (pair.vanilla - pair.ours)
    here = (
        (float(np.mean(lost)), _standard_error(lost)) if len(lost) else 2 * [math.nan]
    )
    return vanilla - ours, *here


def _growth_of_error(experiment, method, records):
    """By how many per cent the error is larger than vanilla's."""
    merit = _merit_of(experiment, records)
    ours, vanilla = _printed(experiment, method, [merit.printed])
    here, error = _factor(_paired(records, method, merit.test))
    return 100 * (ours / vanilla - 1), 100 * (here - 1), 100 * error


def _claims_of(experiment: str) -> dict[str, tuple]:
    """Quantity: what is claimed of it, how that is judged, and how it is written."""
    quality = {"accuracy lost (points)": (_lost_points, _quality_verdict, "+z.2f")}
    if _merit_of(experiment, []).relative:
        quality = {"error added (%)": (_growth_of_error, _quality_verdict, "+z.1f")}
    return {
        "NFE": (_costs("test_nfe", ["test NFE"]), _cost_verdict, ".3f"),
        "prediction time": (_prediction_time, _cost_verdict, ".3f"),
        **quality,
    }


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

    `ValueError` if nothing was published on that experiment.
    """
    _check_published(experiment)
    pd = import_extra("pandas")
    chosen = [r for r in records if (r["experiment"], r["tier"]) == (experiment, tier)]
    lines = [
        _judged(chosen, experiment, method, quantity, *how)
        for method in methods
        for quantity, how in _claims_of(experiment).items()
    ]
    columns = ["method", "quantity", "published", "here", "error", "text", "verdict"]
    return pd.DataFrame(lines, columns=columns).set_index(["method", "quantity"])


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


# Figures


def style() -> None:
    """Sets matplotlib's defaults to the book's; the figures here use them anyway."""
    import_extra("matplotlib").rcParams.update(_STYLE)


@contextlib.contextmanager
def _new_figure(panels: int, size: tuple[float, float]) -> Iterator[tuple]:
    """A figure in the book's style, and its panels side by side."""
    plt = import_extra("matplotlib.pyplot")
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False)
        try:
            yield figure, list(axes[0])
        finally:
            # What pyplot keeps open a notebook shows twice: drawn, and as a value.
            plt.close(figure)


def _color(method: str) -> str:
    if method not in COLORS:
        problem = f"no colour for method {method!r}: add one to lrnde.report.COLORS"
        raise ValueError(problem)
    return COLORS[method]


def curves(records: Sequence[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A learning curve of each record, at the steps that all of them have in common.

    **Arguments:**

    - `records`: Records.
    - `name`: For instance `"nfe"`.

    **Returns:**

    The steps, and an array with a row for each record and a column for each step.

    **Raises:**

    `ValueError` without records, or if one has no such curve.
    """
    if not records:
        raise ValueError(f"no records, so no curve of {name}.")
    logs = [record["curves"] for record in records]
    for log in logs:
        if name not in log:
            raise ValueError(f"no curve of {name} in these records: {', '.join(log)}.")
    rows = [dict(zip(log["step"], log[name], strict=True)) for log in logs]
    steps = sorted(set.intersection(*map(set, rows)))
    return np.array(steps), np.array([[row[step] for step in steps] for row in rows])


def _draw_method(
    axes: "matplotlib.axes.Axes", method: str, records: Sequence[dict], name: str
) -> None:
    step, values = curves(records, name)
    values = values * _CURVES[name][1]
    if not values.any():
        return  # such as the penalty of vanilla, which a log axis cannot show
    mean, color = values.mean(0), _color(method)
    style = "--" if method in _DASHED else "-"
    axes.plot(step, mean, color=color, linestyle=style, label=method)
    if len(values) > 1:
        band = values.std(0, ddof=1)
        axes.fill_between(
            step, mean - band, mean + band, color=color, alpha=0.18, linewidth=0
        )


def learning_curves(
    records: Sequence[dict], quantity: Sequence[str] | None = None
) -> "matplotlib.figure.Figure":
    """Draws how quantities change during training.

    **Arguments:**

    - `records`: Records of one experiment in one tier.
    - `quantity`: A panel each: `"nfe"`, `"loss"`, `"penalty"`, and what the experiment
        has of `"accuracy"`, `"mse"` and `"kl"`. By default the NFE and the first of
        accuracy, error and loss that there is.

    **Returns:**

    The figure: for each method the mean over seeds as a line and one sample deviation
    to both sides as a band (no band for one seed).

    **Raises:**

    `ValueError` if a quantity is unknown or not in the records, or a method has no
    colour.
    """
    if quantity is None:
        logs = [record["curves"] for record in records]
        merits = (m.name for m in _MERITS if all(m.name in log for log in logs))
        quantity = ("nfe", next(merits))
    for name in set(quantity) - set(_CURVES):
        raise ValueError(f"unknown quantity {name!r}; known: {', '.join(_CURVES)}")
    groups = _by_method(records)
    size = (3.8 * len(quantity), 2.9)
    with _new_figure(len(quantity), size) as (figure, panels):
        for axes, name in zip(panels, quantity, strict=True):
            label, _, scale = _CURVES[name]
            axes.set(xlabel="Training step", ylabel=label, yscale=scale)
            for method, group in groups.items():
                _draw_method(axes, method, group, name)
        _legend(figure, panels)
    return figure


def _legend(figure: "matplotlib.figure.Figure", panels: Sequence) -> None:
    """One legend a figure, above its panels; beside them if it is long."""
    entries = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    names = _ordered(list(entries))
    if names:
        handles = [entries[name] for name in names]
        if len(names) > _LONG:
            figure.legend(handles, names, loc="outside right upper")
            return
        columns = max(3, int(figure.get_figwidth() / 1.3))
        columns = min(columns, len(names))
        figure.legend(handles, names, loc="outside upper center", ncols=columns)


def pareto(records: Sequence[dict]) -> "matplotlib.figure.Figure":
    """Draws what each model costs against what it achieves.

    **Arguments:**

    - `records`: Records of one experiment in one tier.

    **Returns:**

    The figure: test NFE against test accuracy or, where nothing is classified, the test
    error or loss; a marker a seed, darker where several lie on one another. Left is
    better, and so is up (accuracy) or down (error, loss).

    **Raises:**

    `ValueError` if a method has no colour.
    """
    groups = _by_method(records)
    merit = _merit(records)
    label = merit.title.capitalize() + (f" ({merit.unit})" if merit.unit else "")
    size = (7.0, 3.8) if len(groups) > _LONG else (4.6, 3.2)
    with _new_figure(1, size) as (figure, (axes,)):
        axes.set(xlabel="Test NFE", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for method, group in groups.items():
            nfe = [record["metrics"]["test_nfe"] for record in group]
            merits = [merit.factor * r["metrics"][merit.test] for r in group]
            color, marker = _color(method), _MARKERS.get(method, "o")
            look = {"facecolors": (color, 0.6), "edgecolors": "0.2", "linewidths": 0.6}
            axes.scatter(nfe, merits, s=48, marker=marker, label=method, **look)
        _legend(figure, [axes])
    return figure
