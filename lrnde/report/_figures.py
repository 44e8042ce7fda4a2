"""Learning curves, and what models cost and achieve."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .._extras import import_extra
from ._merits import common_merit, MERITS
from ._methods import by_method, COLORS, ordered

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure


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

    - `ValueError` without records, or if one has no such curve.
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


def _legend(figure: "matplotlib.figure.Figure", panels: Sequence) -> None:
    """One legend a figure, above its panels; beside them if it is long."""
    entries = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    names = ordered(list(entries))
    if names:
        handles = [entries[name] for name in names]
        if len(names) > _LONG:
            figure.legend(handles, names, loc="outside right upper")
            return
        columns = max(3, int(figure.get_figwidth() / 1.3))
        columns = min(columns, len(names))
        figure.legend(handles, names, loc="outside upper center", ncols=columns)


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

    - `ValueError` if a quantity is unknown or not in the records, or a method has no
        colour.
    """
    if quantity is None:
        logs = [record["curves"] for record in records]
        merits = (m.name for m in MERITS if all(m.name in log for log in logs))
        quantity = ("nfe", next(merits))
    for name in set(quantity) - set(_CURVES):
        raise ValueError(f"unknown quantity {name!r}; known: {', '.join(_CURVES)}")
    groups = by_method(records)
    size = (3.8 * len(quantity), 2.9)
    with _new_figure(len(quantity), size) as (figure, panels):
        for axes, name in zip(panels, quantity, strict=True):
            label, _, scale = _CURVES[name]
            axes.set(xlabel="Training step", ylabel=label, yscale=scale)
            for method, group in groups.items():
                _draw_method(axes, method, group, name)
        _legend(figure, panels)
    return figure


def pareto(records: Sequence[dict]) -> "matplotlib.figure.Figure":
    """Draws what each model costs against what it achieves.

    **Arguments:**

    - `records`: Records of one experiment in one tier.

    **Returns:**

    The figure: test NFE against test accuracy or, where nothing is classified, the test
    error or loss; a marker a seed, darker where several lie on one another. Left is
    better, and so is up (accuracy) or down (error, loss).

    **Raises:**

    - `ValueError` if a method has no colour.
    """
    groups = by_method(records)
    merit = common_merit(records)
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
