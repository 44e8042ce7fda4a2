"""Regularizers: quantities of a solve that training makes small."""

import abc
import functools as ft
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from diffrax._heuristics import is_sde
from jax import lax
from jaxtyping import Array, Int, PyTree, Real

from ._sampling import SAMPLINGS, scaled_error


class TakenStep(NamedTuple):
    """One step of a solver and all that it produced.

    `terms`, `solver` and `args` are as the solver saw them; `lrnde.scaled_error` takes
    the tolerances and the norm of `controller`. The step leads from the state `y0` at
    `t0` to `y1` at `t1`, with the embedded error `y_error`. `dense_info` is what the
    solver keeps for its interpolation; with a Runge-Kutta method its `"k"` has the
    derivatives at the stages, times `t1 - t0`.
    """

    terms: PyTree[diffrax.AbstractTerm]
    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractAdaptiveStepSizeController
    args: PyTree
    t0: Real[Array, ""]
    t1: Real[Array, ""]
    y0: PyTree[Array]
    y1: PyTree[Array]
    y_error: PyTree[Array]
    dense_info: dict[str, PyTree[Array]]


class AbstractRegularizer(eqx.Module):
    """A quantity of a solve that training makes small; `lrnde.diffeqsolve` takes it.

    `random` says whether it draws random numbers, so that a solve needs a key.
    """

    random: eqx.AbstractClassVar[bool]


Regularizers: TypeAlias = (
    AbstractRegularizer
    | list[AbstractRegularizer | tuple[Any, AbstractRegularizer]]
    | tuple[AbstractRegularizer | tuple[Any, AbstractRegularizer], ...]
    | tuple[Any, AbstractRegularizer]
    | None
)


class AbstractStepRegularizer(AbstractRegularizer):
    """A regularizer that measures steps of an adaptive solver."""

    def check(
        self, terms: PyTree[diffrax.AbstractTerm], solver: diffrax.AbstractSolver
    ) -> None:
        """Raises a `TypeError` if this regularizer cannot measure such steps.

        The terms and the solver are those passed to `lrnde.diffeqsolve`. Without a
        method of its own a regularizer takes any.
        """

    @abc.abstractmethod
    def measure(self, step: TakenStep) -> Real[Array, ""]:
        """Measures one step; differentiable."""


class AbstractLocalRegularizer(AbstractStepRegularizer):
    """Measures one step, or a few, after the solve, which stays a closed box.

    Subclasses measure a step (`measure`) and may say which (`sampling`, `step`) and how
    many (`samples`), as for `lrnde.LocalError`. The penalty is the mean measure times
    the length of the solve.

    ```python
    class SquaredError(lrnde.AbstractLocalRegularizer):
        def measure(self, step):
            y_error = step.y_error
            return lrnde.scaled_error(step.controller, step.y0, step.y1, y_error) ** 2
    ```
    """

    random: ClassVar[bool] = True

    # By keyword, so that a subclass may have fields without a default.
    sampling: str = eqx.field(static=True, default="unbiased", kw_only=True)
    step: str = eqx.field(static=True, default="taken", kw_only=True)
    samples: int = eqx.field(static=True, default=1, kw_only=True)

    def __check_init__(self):
        _check_choice("sampling", self.sampling, SAMPLINGS)
        _check_choice("step", self.step, ("taken", "restarted"))
        if type(self.samples) is not int or self.samples < 1:
            raise ValueError(
                f"samples={self.samples}: it is a whole number of steps, at least one."
            )


class AbstractGlobalRegularizer(AbstractStepRegularizer):
    """Measures every accepted step inside the solve, and is differentiated through it.

    Subclasses measure a step (`measure`) and may say how the measures make the penalty
    (`add`, `finish`).
    """

    random: ClassVar[bool] = False

    def add(self, total: Real[Array, ""], measure: Real[Array, ""]):
        """What the steps so far and one more come to. They start from zero."""
        return total + measure

    def finish(self, total: Real[Array, ""], num_steps: Int[Array, ""]):
        """The penalty, from what all accepted steps came to and their number."""
        del num_steps
        return total


def single(regularizer: AbstractRegularizer, measure: Any) -> Any:
    """What a regularizer measures, if it is a single number."""
    if jnp.shape(measure) != ():
        raise TypeError(
            f"{type(regularizer).__name__} measures an array of shape "
            f"{jnp.shape(measure)}; it has to be a single number, such as its mean."
        )
    return measure


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is not known; choose one of "
            f"{', '.join(map(repr, choices))}."
        )


_LOCAL = """

    The penalty is $T$ times the measure of one step, where $T = |t_1 - t_0|$ is the
    length of the whole solve (to the end of the step in which an event ended it, if
    one did). The step is drawn during the solve:

    - `"unbiased"`: with probability proportional to its length, which is to say the
        step that contains a uniformly distributed time;
    - `"biased"`: every step of the solver with the same probability;
    - `"error"`: with probability proportional to its scaled error.

    **Arguments:**

    - `sampling`: How to draw the step.
    - `step`: `"taken"` measures the very step that the solver took. (Only what a solver
        carries from step to step is made afresh: the second state of
        `diffrax.ReversibleHeun`, and the first stage of an implicit solver, which
        differs by what its root finder leaves.) `"restarted"`
        starts a new one, as Pal et al. (2023) do: from the drawn time (under
        `"unbiased"` a uniform time inside the step, the state there interpolated), with
        a step size from the controller's own choice of a first step. Such steps are
        often much shorter, with errors smaller by orders of magnitude: the two forms
        want different weights.
    - `samples`: How many steps are drawn, independently of each other (the same one may
        be drawn again). The penalty is their mean.

    **Raises:**

    - `ValueError` for an unknown `sampling` or `step`, or without samples.
"""

_GLOBAL = """

    It has to be differentiated through the whole solve, step by step (discretize, then
    optimize), which `lrnde.TapeAdjoint`, `diffrax.RecursiveCheckpointAdjoint`,
    `diffrax.DirectAdjoint` and `diffrax.ForwardMode` do; other adjoints are refused.
    The lengths of the steps count as constants.
"""


class LocalError(AbstractLocalRegularizer):
    __doc__ = (
        """Regularizes by the scaled embedded error of one step of the solve.

    The measure is $E_j$, the error in units of the tolerance (`lrnde.scaled_error`).
    Under `"unbiased"` the mean of the penalty is $\\sum_j E_j h_j$, the global
    regularizer of Pal et al. (2021), `lrnde.GlobalError`.

    With the weight $\\lambda$ and a solve of length $T$, training gives up to about
    $2 \\lambda T$ of the loss to halve the number of steps (with Tsit5, while errors
    have the size that the controller aims at). The chapter "Choosing the weight"
    derives it."""
        + _LOCAL
    )

    sampling: str = eqx.field(static=True, default="unbiased")
    step: str = eqx.field(static=True, default="taken")
    samples: int = eqx.field(static=True, default=1)

    def check(self, terms, solver):
        _check_error(self, terms, solver)

    def measure(self, step):
        return _error(step)


class GlobalError(AbstractGlobalRegularizer):
    __doc__ = (
        """Regularizes by the scaled embedded errors of all steps of the solve.

    $\\sum_j E_j h_j$ over the accepted steps, $E_j$ as in `lrnde.scaled_error` (ERNODE,
    Pal et al. 2021)."""
        + _GLOBAL
        + """
    **Arguments:**

    - `form`: `"sum"` is the sum above; `"mean"` divides it by the number of accepted
        steps, as the program of Pal et al. (2021) does; `"squared"` is
        $\\sum_j E_j^2 h_j$.

    **Raises:**

    - `ValueError` for an unknown `form`.
"""
    )

    form: str = eqx.field(static=True, default="sum")

    def __check_init__(self):
        _check_choice("form", self.form, ("sum", "mean", "squared"))

    def check(self, terms, solver):
        _check_error(self, terms, solver)

    def measure(self, step):
        power = 2 if self.form == "squared" else 1
        return _error(step) ** power * lax.stop_gradient(step.t1 - step.t0)

    def finish(self, total, num_steps):
        return total / jnp.maximum(num_steps, 1) if self.form == "mean" else total


class LocalStiffness(AbstractLocalRegularizer):
    __doc__ = (
        """Regularizes by the stiffness estimate of one step of the solve.

    The measure is $S_j = \\|k_s - k_{s-1}\\| / (\\rho \\|g_s - g_{s-1}\\|)$, from the
    last two stages $g$ and their derivatives $k$, which share a time node: an estimate
    of the largest eigenvalue of the Jacobian (Hairer and Wanner, IV.2) over the length
    $\\rho$ of the solver's stability interval on the negative real axis. Where the last
    two stages of a tableau have different nodes, the derivative at the last but one is
    evaluated once more at the last node. The solver has to be an explicit Runge-Kutta
    method, and the equation must have no noise."""
        + _LOCAL
    )

    sampling: str = eqx.field(static=True, default="unbiased")
    step: str = eqx.field(static=True, default="taken")
    samples: int = eqx.field(static=True, default=1)

    def check(self, terms, solver):
        _check_explicit(self, terms, solver)

    def measure(self, step):
        return _stiffness(step)


class GlobalStiffness(AbstractGlobalRegularizer):
    __doc__ = (
        """Regularizes by the stiffness estimates of all steps of the solve.

    $\\sum_j S_j$ over the accepted steps, $S_j$ as in `lrnde.LocalStiffness` (SRNODE,
    Pal et al. 2021). The solver has to be an explicit Runge-Kutta method, and the
    equation must have no noise."""
        + _GLOBAL
        + """
    **Arguments:**

    - `form`: `"sum"` is the sum above; `"max"` is the largest of them, as in the
        program of Pal et al. (2021).

    **Raises:**

    - `ValueError` for an unknown `form`.
"""
    )

    form: str = eqx.field(static=True, default="sum")

    def __check_init__(self):
        _check_choice("form", self.form, ("sum", "max"))

    def check(self, terms, solver):
        _check_explicit(self, terms, solver)

    def measure(self, step):
        return _stiffness(step)

    def add(self, total, measure):
        return jnp.maximum(total, measure) if self.form == "max" else total + measure


def _check_error(regularizer, terms, solver) -> None:
    remedy = "`diffrax.Tsit5()`, or wrap yours in `diffrax.HalfSolver`"
    if is_sde(terms):
        remedy = (
            "`lrnde.SOSRI()` for an equation in the sense of Ito, or `diffrax.SPaRK()` "
            "for one in the sense of Stratonovich"
        )
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise TypeError(
            f"{type(regularizer).__name__} needs a solver with an embedded error "
            f"estimate, which {type(solver).__name__} does not have. Use for "
            f"example {remedy}."
        )


def _error(step: TakenStep) -> Real[Array, ""]:
    return scaled_error(step.controller, step.y0, step.y1, step.y_error)


def _is_explicit(solver) -> bool:
    tableau = getattr(solver, "tableau", None)
    return isinstance(tableau, diffrax.ButcherTableau) and not tableau.implicit


def _check_explicit(regularizer, terms, solver) -> None:
    if not _is_explicit(solver):
        raise TypeError(
            f"{type(regularizer).__name__} needs an explicit Runge-Kutta solver, such "
            f"as `diffrax.Tsit5()`; {type(solver).__name__} is not one. `LocalError` "
            "and `GlobalError` work with any solver that has an error estimate."
        )
    if is_sde(terms):
        raise TypeError(
            f"{type(regularizer).__name__} compares the stages of a step, which the "
            "noise of a stochastic differential equation tears apart. `LocalError` and "
            "`GlobalError` work with such equations, too."
        )


def _stiffness(step: TakenStep) -> Real[Array, ""]:
    tableau = step.solver.tableau
    k, g = _last_stages(step, tableau)
    dk, dg = (jtu.tree_map(lambda a, b: a - b, *pair) for pair in (k, g))
    norm = step.controller.norm
    # A stationary state has equal stages, and in a batch those that have arrived take
    # steps of no length: no division by zero, and no NaN behind it in the gradient.
    distance = norm(dg)
    moving = distance > 0
    h = jnp.where(step.t1 > step.t0, step.t1 - step.t0, 1)
    slope = norm(dk) / (h * jnp.where(moving, distance, 1))
    return jnp.where(moving, slope, 0) / stability_interval(type(step.solver))


def _last_stages(step: TakenStep, tableau: diffrax.ButcherTableau):
    """Derivatives (times h) and states of the last two stages, last one first."""
    ks = step.dense_info["k"]

    def state(stage):
        a = tableau.a_lower[stage - 1]

        def increment(y, k):
            weights = jnp.asarray(a, k.dtype)
            return y + jnp.tensordot(weights, k[: len(a)], axes=1)

        return jtu.tree_map(increment, step.y0, ks)

    last = tableau.num_stages - 1
    k_last = jtu.tree_map(lambda k: k[last], ks)
    g_last, g_before = state(last), state(last - 1) if last > 1 else step.y0
    if last > 1 and tableau.c[last - 1] == tableau.c[last - 2]:
        k_before = jtu.tree_map(lambda k: k[last - 1], ks)
    else:
        c = np.asarray(tableau.c[last - 1], jnp.result_type(step.t0))
        t = step.t0 + c * (step.t1 - step.t0)
        control = step.terms.contr(step.t0, step.t1)
        k_before = step.terms.vf_prod(t, g_before, step.args, control)
    return (k_last, k_before), (g_last, g_before)


@ft.cache
def stability_interval(solver: type[diffrax.AbstractSolver]) -> float:
    """Length of the interval of absolute stability on the negative real axis.

    The first $x > 0$ with $|R(-x)| = 1$, where $R$ is the stability polynomial of the
    method: 3.31 for `diffrax.Dopri5`, 3.51 for `diffrax.Tsit5`.

    **Arguments:**

    - `solver`: The class of an explicit Runge-Kutta solver.

    **Returns:**

    A positive float.

    **Raises:**

    - `TypeError` for any other solver.
    """
    if not _is_explicit(solver):
        raise TypeError(f"{solver.__name__} is not an explicit Runge-Kutta solver.")
    tableau = solver.tableau
    stages = tableau.num_stages
    a = np.zeros((stages, stages))
    for i, row in enumerate(tableau.a_lower):
        a[i + 1, : i + 1] = row
    # R(z) = 1 + sum_k z^(k+1) b.A^k.1, a polynomial since A is nilpotent.
    powers = [np.ones(stages)]
    for _ in range(stages - 1):
        powers.append(a @ powers[-1])
    polynomial = np.polynomial.Polynomial(
        [1.0] + [tableau.b_sol @ power for power in powers]
    )
    roots = np.concatenate([(polynomial - 1).roots(), (polynomial + 1).roots()])
    real = roots[np.abs(roots.imag) < 1e-6].real
    return float(-real[real < -1e-3].max())
