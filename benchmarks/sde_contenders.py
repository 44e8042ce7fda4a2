"""Who competes at a neural SDE: functions from (sde, y0) to the end, or to a gradient.

- "bare": as many evaluations of drift and diffusion as lrnde's solve takes, in a
  `jax.lax.scan` that does nothing else.
- "lrnde": `lrnde.diffeqsolve` with `lrnde.SOSRI` on a `lrnde.BrownianPath`; gradients
  with `lrnde.TapeAdjoint` and a step budget as in training.
- "tree": the same on a `diffrax.VirtualBrownianTree`.
- "unbiased", "biased": as "lrnde", regularized.
"""

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax

import lrnde

from .contenders import Contender, Cost, ready, step_budget
from .problems import Problem

SAMPLINGS = ("unbiased", "biased")


def _solve(sde, y0, tree=False, **kwargs):
    """The solve of `lrnde.models.NeuralSDE`, on the path of choice."""
    controller = diffrax.PIDController(rtol=sde.tolerance, atol=sde.tolerance)
    path = lrnde.BrownianPath(y0.shape, jr.key(0))
    if tree:
        controller = diffrax.ClipStepSizeController(controller, store_rejected_steps=32)
        path = diffrax.VirtualBrownianTree(
            0.0,
            1.0,
            2.0**-10,
            y0.shape,
            jr.key(0),
            levy_area=diffrax.SpaceTimeLevyArea,
        )
    return lrnde.diffeqsolve(
        sde.terms(path),
        sde.solver,
        0.0,
        1.0,
        None,
        y0,
        stepsize_controller=controller,
        throw=False,
        **kwargs,
    )


def _cost(problem: Problem, tree: bool) -> Cost:
    stats = _solve(problem.field, problem.y0, tree)[0].stats
    return Cost(int(stats["nfe"]), int(stats["num_steps"]))


def _bare(num_steps: int):
    def run(sde, y0):
        def step(y, _):
            # As in a step, drift and diffusion see different states.
            for _ in range(4):
                y = sde.diffusion(sde.drift(y))
            return y, None

        return lax.scan(step, y0, length=num_steps)[0]

    return run


def _lrnde(tree=False, regularizer=None, **kwargs):
    def run(sde, y0):
        key = None if regularizer is None else jr.key(1)
        sol, penalty = _solve(sde, y0, tree, regularizer=regularizer, key=key, **kwargs)
        return sol.ys[0], penalty

    return run


def predictions(problem: Problem) -> dict[str, Contender]:
    """Solves without a gradient."""
    ours, theirs = _cost(problem, False), _cost(problem, True)
    functions = {
        "bare": (_bare(ours.num_steps), None),
        "lrnde": (_lrnde(), ours),
        "tree": (_lrnde(tree=True), theirs),
    }
    return {name: ready(f, problem, cost) for name, (f, cost) in functions.items()}


def gradients(problem: Problem) -> dict[str, Contender]:
    """Solves with a gradient."""
    ours, theirs = _cost(problem, False), _cost(problem, True)

    def gradient(run):
        def loss(sde, y0):
            y1, penalty = run(sde, y0)
            return jnp.mean(y1**2) + penalty

        return eqx.filter_grad(loss)

    def budget(cost):
        steps = step_budget(cost.num_steps)
        return dict(max_steps=steps, adjoint=lrnde.TapeAdjoint())

    bare = _bare(ours.num_steps)
    functions = {
        "bare": (lambda sde, y0: (bare(sde, y0), 0.0), None),
        "lrnde": (_lrnde(**budget(ours)), ours),
        "tree": (_lrnde(tree=True, **budget(theirs)), theirs),
    }
    for sampling in SAMPLINGS:
        regularizer = lrnde.LocalError(sampling)
        functions[sampling] = (_lrnde(regularizer=regularizer, **budget(ours)), ours)
    return {
        name: ready(gradient(f), problem, cost) for name, (f, cost) in functions.items()
    }
