"""Published results, as printed: the only numbers of the tables that were typed in."""

# ruff: noqa: E501 - a row of a table stays on one line

SOURCES = {
    "Pal 2023": (
        "A. Pal, A. Edelman, C. Rackauckas: Locally Regularized Neural Differential"
        " Equations. ICML 2023, arXiv:2303.02262"
    ),
    "Pal 2021": (
        "A. Pal, Y. Ma, V. Shah, C. Rackauckas: Opening the Blackbox. ICML 2021,"
        " arXiv:2105.03918. Other hardware than Pal 2023 and, for TayNODE, another"
        " solver"
    ),
    "DiffEqFlux": "DiffEqFlux.jl, pull request 1016 (2026), after 3,000 training steps",
}

# Cells are `mean±deviation`, a mean alone, or empty where the source gives none. The
# NFE ratio is the one the paper prints, not a quotient worked out here. Where several
# sources report a method, the one that the experiment reproduces comes first.
_TEXT = {
    "mnist-node": """
method    | source     | train acc %  | test acc %   | train h | predict s/batch | test NFE      | NFE ratio
vanilla   | Pal 2023   | 99.898±0.066 | 97.612±0.163 | 0.54    | 0.088±0.020     | 303.559±3.194 |
unbiased  | Pal 2023   | 99.447±0.039 | 97.526±0.131 | 0.49    | 0.046±0.002     | 187.961±1.812 | 0.619
biased    | Pal 2023   | 99.477±0.051 | 97.488±0.016 | 1.12    | 0.044±0.002     | 182.849±1.578 | 0.602
vanilla   | Pal 2021   | 100          | 97.94        | 0.98    | 0.094           | 253.0         |
steer     | Pal 2021   | 100          | 97.94±0.03   | 1.31    | 0.092           | 265.0±3.46    |
taylor    | Pal 2021   | 98.98        | 97.89        | 1.19    | 0.079           | 80.3±0.43     |
global-error | Pal 2021 | 99.71       | 97.32±0.06   | 0.82    | 0.060           | 177.0         |
global-stiffness | Pal 2021 | 100     | 98.08±0.15   | 1.24    | 0.094           | 259.0±3.46    |
steer+global-stiffness | Pal 2021 |   |              |         |                 | 275           |
steer+global-error | Pal 2021 |       |              |         |                 | 197           |
global-stiffness+global-error | Pal 2021 | |         |         |                 | 221           |
vanilla   | DiffEqFlux |              |              |         |                 | 363           |
unbiased  | DiffEqFlux |              |              |         |                 | 287           |
biased    | DiffEqFlux |              |              |         |                 | 282           |
""",
    "mnist-nsde": """
method   | source   | train acc % | test acc % | train h | predict s/batch | test NFE    | NFE ratio
vanilla  | Pal 2023 | 98.27±0.11  | 96.66±0.16 | 2.70    | 0.51±0.07       | 313.86±2.94 |
unbiased | Pal 2023 | 98.05±0.09  | 96.57±0.13 | 2.10    | 0.39±0.10       | 228.93±1.77 | 0.729
biased   | Pal 2023 | 98.02±0.07  | 96.44±0.16 | 1.90    | 0.36±0.03       | 230.10±0.71 | 0.733
global-error     | Pal 2021 | 98.16 | 96.27±0.35 | 4.19 | 7.23            | 184.67±2.31 |
global-stiffness | Pal 2021 | 98.79 | 96.80±0.07 | 8.54 | 14.50           | 382.0±4.0   |
""",
    "physionet": """
method   | source   | test loss x1e-3 | train h   | predict s/batch | test NFE    | NFE ratio
vanilla  | Pal 2023 | 3.41±0.10       | 2.48±0.22 | 0.16±0.01       | 758.0±25.87 |
unbiased | Pal 2023 | 3.64±0.07       | 2.31±0.02 | 0.09            | 422.0±4.58  | 0.556
biased   | Pal 2023 | 3.63±0.08       | 2.12±0.24 | 0.10±0.01       | 463.0±63.0  | 0.610
steer    | Pal 2021 | 3.48            | 1.62      | 0.54            | 699±141     |
taylor   | Pal 2021 | 4.21            | 12.3      | 0.22            | 167.3±11.9  |
global-error     | Pal 2021 | 3.57      | 0.94    | 0.21            | 287±17      |
global-stiffness | Pal 2021 | 3.58±0.05 | 0.87    | 0.20            | 273         |
""",
    "cifar10": """
method   | source   | train acc %  | test acc %   | train s/batch | predict s/batch | test NFE       | NFE ratio
vanilla  | Pal 2023 | 83.683±1.450 | 67.394±0.849 | 0.457         | 0.130±0.013     | 115.315±12.136 |
unbiased | Pal 2023 | 83.665±0.805 | 67.678±0.874 | 0.399         | 0.096±0.007     | 89.048±7.335   | 0.772
biased   | Pal 2023 | 83.958±1.032 | 67.745±0.824 | 0.555         | 0.088±0.003     | 81.301±1.255   | 0.705
""",
    "cifar10-multiscale": """
method   | source   | train acc %   | test acc %   | train s/batch | predict s/batch | test NFE     | NFE ratio
vanilla  | Pal 2023 | 92.807±12.458 | 80.048±6.740 | 0.572         | 0.170           | 27.616±0.905 |
unbiased | Pal 2023 | 94.159±9.694  | 80.432±5.548 | 0.641         | 0.175           | 27.760±0.177 |
biased   | Pal 2023 | 99.987±0.023  | 83.460±0.727 | 0.774         | 0.163           | 26.334±0.992 |
""",
    "spiral-sde": """
method           | source   | loss          | train s | predict s | test NFE
vanilla          | Pal 2021 | 0.0217±0.0088 | 178.95  | 0.0755    | 528.67
global-stiffness | Pal 2021 | 0.0204        | 166.42  | 0.0725    | 502
global-error     | Pal 2021 | 0.0227        | 173.43  | 0.0755    | 502
""",
}


def _parse(text: str) -> list[dict[str, str]]:
    header, *rows = (
        [cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()
    )
    return [dict(zip(header, row, strict=True)) for row in rows]


TABLES: dict[str, list[dict[str, str]]] = {
    experiment: _parse(text) for experiment, text in _TEXT.items()
}


def check_published(experiment: str) -> None:
    """Raises a `ValueError` if nothing was published on an experiment."""
    if experiment not in TABLES:
        problem = f"no published results for {experiment!r}; known: {', '.join(TABLES)}"
        raise ValueError(problem)


def row_of(experiment: str, method: str, source: str | None = None) -> dict[str, str]:
    """The first row of a method, from one source or any; empty if there is none."""
    rows = (row for row in TABLES.get(experiment, ()) if row["method"] == method)
    return next((row for row in rows if source in (None, row["source"])), {})
