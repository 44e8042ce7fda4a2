"""Who competes: functions from (field, y0) to the end of the solve, or to a gradient.

- "bare": as many evaluations of the vector field as lrnde's solve takes, in a
  `jax.lax.scan` that does nothing else. No solver can be faster.
- "fixed steps": as many steps of `lrnde.Tsit5`, all of one size, in a `jax.lax.scan`:
  the evaluations and the sums over stages, without error estimate or control.
- "lrnde": `lrnde.diffeqsolve` with `lrnde.Tsit5`; gradients with `lrnde.TapeAdjoint`
  and a step budget as in training.
- "lrnde, checkpoints": the same with diffrax's default adjoint.
- "unbiased", "biased", "error": the same, regularized.
- "diffrax": `diffrax.diffeqsolve` with `diffrax.Tsit5` and its defaults.
"""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

import lrnde
from lrnde.training import StepBudget

from .problems import Problem

SAMPLINGS = ("unbiased", "biased", "error")


class Cost(NamedTuple):
    """What a solve took: vector field evaluations and steps."""

    nfe: int
    num_steps: int


class Contender(NamedTuple):
    """A function ready to be timed.

    - `call`: Runs it once; returns arrays.
    - `peak_bytes`: Memory set aside for one run, arguments left out; `None` if unknown.
    - `cost`: Of the solve; `None` for the limits.
    """

    call: Callable[[], object]
    peak_bytes: int | None
    cost: Cost | None


def _controller(problem: Problem) -> diffrax.PIDController:
    return diffrax.PIDController(rtol=problem.tolerance, atol=problem.tolerance)


def _solve(problem: Problem, field, y0, solver=None, **kwargs):
    """`lrnde.diffeqsolve` of the problem."""
    return lrnde.diffeqsolve(
        diffrax.ODETerm(field),
        solver or lrnde.Tsit5(),
        0.0,
        1.0,
        None,
        y0,
        stepsize_controller=_controller(problem),
        throw=False,
        **kwargs,
    )


def cost(problem: Problem, solver: diffrax.AbstractSolver | None = None) -> Cost:
    """What a solve takes."""
    stats = _solve(problem, problem.field, problem.y0, solver)[0].stats
    return Cost(int(stats["nfe"]), int(stats["num_steps"]))


def _bare(evaluations: int):
    def run(field, y0):
        def evaluate(y, t):
            return field(t, y), None

        return lax.scan(evaluate, y0, jnp.linspace(0.0, 1.0, evaluations))[0]

    return run


def _fixed_steps(num_steps: int):
    def run(field, y0):
        solver, term = lrnde.Tsit5(), diffrax.ODETerm(field)

        def step(carry, t):
            y, stage = carry
            y, _, _, stage, _ = solver.step(
                term, t, t + 1 / num_steps, y, None, stage, made_jump=False
            )
            return (y, stage), None

        ts = jnp.arange(num_steps) / num_steps
        return lax.scan(step, (y0, field(ts[0], y0)), ts)[0][0]

    return run


def _diffrax(problem: Problem):
    def run(field, y0):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            0.0,
            1.0,
            None,
            y0,
            stepsize_controller=_controller(problem),
        ).ys[0]

    return run


def _lrnde(problem: Problem, **kwargs):
    return lambda field, y0: _solve(problem, field, y0, **kwargs)[0].ys[0]


def ready(function, problem: Problem, cost: Cost | None) -> Contender:
    """Compiles a function of (field, y0)."""
    arrays, static = eqx.partition(problem.field, eqx.is_array)
    on_arrays = jax.jit(lambda arrays, y0: function(eqx.combine(arrays, static), y0))
    compiled = on_arrays.lower(arrays, problem.y0).compile()
    memory = compiled.memory_analysis()
    peak = None
    if memory is not None:
        peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Contender(lambda: compiled(arrays, problem.y0), peak, cost)


def predictions(problem: Problem, without: tuple[str, ...]) -> dict[str, Contender]:
    """Solves without a gradient."""
    ours, theirs = cost(problem), cost(problem, diffrax.Tsit5())
    functions = {
        "bare": (_bare(ours.nfe), None),
        "fixed steps": (_fixed_steps(ours.num_steps), None),
        "lrnde": (_lrnde(problem), ours),
        "diffrax": (_diffrax(problem), theirs),
    }
    return _all_ready(functions, problem, without)


def _all_ready(functions, problem, without):
    return {
        name: ready(function, problem, cost)
        for name, (function, cost) in functions.items()
        if name not in without
    }


def _gradient(run):
    """The gradient of a loss at the end of the solve, for the field's parameters."""
    return jax.grad(lambda field, y0: jnp.mean(run(field, y0) ** 2))


def _regularized_gradient(problem: Problem, sampling: str, max_steps: int):
    def loss(field, y0):
        sol, penalty = _solve(
            problem,
            field,
            y0,
            max_steps=max_steps,
            adjoint=lrnde.TapeAdjoint(),
            regularizer=lrnde.LocalError(sampling),
            key=jr.key(0),
        )
        return jnp.mean(sol.ys[0] ** 2) + penalty

    return jax.grad(loss)


def step_budget(num_steps: int) -> int:
    """The step budget that a training with so many steps a solve settles at."""
    budget, before = StepBudget(), None
    while budget.steps < num_steps:
        budget.grow()
    while budget.steps != before:
        before = budget.steps
        for _ in range(budget.patience):
            budget.note(num_steps)
    return budget.steps


def gradients(problem: Problem, without: tuple[str, ...]) -> dict[str, Contender]:
    """Solves with a gradient."""
    ours, theirs = cost(problem), cost(problem, diffrax.Tsit5())
    budget = step_budget(ours.num_steps)
    tape = _lrnde(problem, max_steps=budget, adjoint=lrnde.TapeAdjoint())
    checkpoints = _lrnde(problem, max_steps=budget)
    functions = {
        "bare": (_gradient(_bare(ours.nfe)), None),
        "fixed steps": (_gradient(_fixed_steps(ours.num_steps)), None),
        "lrnde": (_gradient(tape), ours),
        "lrnde, checkpoints": (_gradient(checkpoints), ours),
        "diffrax": (_gradient(_diffrax(problem)), theirs),
    }
    for sampling in SAMPLINGS:
        function = _regularized_gradient(problem, sampling, budget)
        functions[sampling] = (function, ours)
    return _all_ready(functions, problem, without)


def adjoints(problem: Problem, max_steps: int) -> dict[str, Contender]:
    """Gradients of lrnde's solve through different adjoints."""
    ours = cost(problem)
    choices = {
        "tape": lrnde.TapeAdjoint(),
        "tape of 8 rows": lrnde.TapeAdjoint(rows=8),
        "checkpoints": diffrax.RecursiveCheckpointAdjoint(),
    }
    return {
        name: ready(
            _gradient(_lrnde(problem, max_steps=max_steps, adjoint=adjoint)),
            problem,
            ours,
        )
        for name, adjoint in choices.items()
    }


def field_calls(problem: Problem, fields: dict, evaluations: int = 100):
    """Different ways to write one field, evaluated again and again."""
    run = _bare(evaluations)
    return {
        name: ready(lambda _, y0, field=field: run(field, y0), problem, None)
        for name, field in fields.items()
    }
