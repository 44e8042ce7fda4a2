"""Timings of contenders that take turns, as rows of a table."""

import importlib.util
from collections.abc import Iterator, Mapping
from statistics import median

from lrnde.timing import interleave

from . import contenders, problems, sde_contenders
from .contenders import Contender
from .problems import Problem

COLUMNS = [
    "section",
    "contender",
    "mode",
    "field",
    "batch",
    "size",
    "tolerance",
    "depth",
    "budget",
    "nfe",
    "num_steps",
    "peak_bytes",
    "median",
    "seconds",
]

TORCH = all(importlib.util.find_spec(name) for name in ("torch", "torchdiffeq"))


def compare(
    problem: Problem, mode: str, repeats: int, without: tuple[str, ...] = ()
) -> list[dict]:
    """Times all contenders at one problem.

    **Arguments:**

    - `problem`: What to solve.
    - `mode`: "predict" or "gradient".
    - `repeats`: How often each is timed.
    - `without`: Contenders to leave out. "torchdiffeq" is left out where it is not
        installed.

    **Returns:**

    A dictionary a contender: its name, the `mode`, the problem (`field`, `batch`,
    `size` of one state, `tolerance`), the solve's `nfe` and `num_steps`, the
    `peak_bytes` that one run sets aside, all wall times in `seconds`, their `median`.
    """
    source = {"predict": "predictions", "gradient": "gradients"}[mode]
    ready = getattr(contenders, source)(problem, without)
    if TORCH and "torchdiffeq" not in without:
        from . import torch_contenders

        ready |= getattr(torch_contenders, source)(problem)
    return _time(ready, problem, mode, repeats)


def _time(
    ready: Mapping[str, Contender], problem: Problem, mode: str, repeats: int
) -> list[dict]:
    seconds = interleave({name: x.call for name, x in ready.items()}, repeats)
    return [
        dict(
            contender=name,
            mode=mode,
            field=problem.name,
            batch=problem.y0.shape[0],
            size=problem.y0[0].size,
            tolerance=problem.tolerance,
            nfe=x.cost and x.cost.nfe,
            num_steps=x.cost and x.cost.num_steps,
            peak_bytes=x.peak_bytes,
            median=median(seconds[name]),
            seconds=seconds[name],
        )
        for name, x in ready.items()
    ]


def sde_sections(repeats: int) -> Iterator[tuple[str, list[dict]]]:
    """The record of the neural SDE, piece by piece: (section, rows)."""
    for mode, ready in (
        ("predict", sde_contenders.predictions),
        ("gradient", sde_contenders.gradients),
    ):
        for batch in (32, 128, 512):
            problem = problems.sde(batch)
            yield "batch", _time(ready(problem), problem, mode, repeats)


def sections(repeats: int) -> Iterator[tuple[str, list[dict]]]:
    """Everything that a record holds, piece by piece: (section, rows)."""
    jax_only = ("torchdiffeq", "lrnde, checkpoints", "unbiased", "error")
    both = ("predict", "gradient")
    for mode in both:
        for batch in (32, 128, 512):
            yield "batch", compare(problems.mlp(batch), mode, repeats)
        for batch in (32, 128, 512):
            # Convolutions are slow on a CPU, hence fewer repeats.
            few = max(repeats // 4, 1)
            yield "batch", compare(problems.conv(batch), mode, few)
    for name, key, values in (
        ("size", "size", (196, 784, 3136)),
        ("tolerance", "tolerance", (1e-3, 1e-4, 1e-5, 1e-6)),
        ("depth", "depth", (1, 2, 4)),
    ):
        for value in values:
            problem = problems.mlp(128, **{key: value})
            for mode in both:
                rows = compare(problem, mode, repeats, jax_only)
                yield name, [row | {name: value} for row in rows]
    for batch in (128, 512):
        yield "field", compare_fields(batch, repeats)
    for budget in (32, 64, 256, 1024, 4096):
        rows = compare_adjoints(budget, repeats)
        yield "budget", [row | {"budget": budget} for row in rows]


def compare_fields(batch: int, repeats: int) -> list[dict]:
    """Times three ways to write the published vector field, 100 calls each."""
    problem = problems.mlp(batch)
    fields = {
        "lrnde": problem.field,
        "separate arrays": problems.separate_arrays(problem.field),
        "appended time": problems.appended_time(problem.field),
    }
    ready = contenders.field_calls(problem, fields)
    return _time(ready, problem, "100 evaluations", repeats)


def compare_adjoints(budget: int, repeats: int) -> list[dict]:
    """Times gradients of one solve that may take up to `budget` steps."""
    problem = problems.mlp(128)
    return _time(contenders.adjoints(problem, budget), problem, "gradient", repeats)
