"""What the regularizers of a solve ask of it."""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from ._adjoint import TapeAdjoint
from ._integrals import AbstractIntegralRegularizer
from ._random import is_key
from ._regularizers import (
    AbstractGlobalRegularizer,
    AbstractLocalRegularizer,
    AbstractRegularizer,
    AbstractStepRegularizer,
    Regularizers,
)
from ._steer import Steer

_KINDS = (
    AbstractLocalRegularizer,
    AbstractGlobalRegularizer,
    AbstractIntegralRegularizer,
    Steer,
)

# Those that differentiate every step, and with it what was measured there.
_STEP_BY_STEP = (
    TapeAdjoint,
    diffrax.RecursiveCheckpointAdjoint,
    diffrax.DirectAdjoint,
    diffrax.ForwardMode,
)


class Item(NamedTuple):
    """A regularizer, the weight of its part of the penalty, and its random key."""

    weight: Any
    regularizer: AbstractRegularizer
    key: PRNGKeyArray | None


class Plan(NamedTuple):
    """The regularizers of a solve, by what they ask of it.

    - `local`: One item for each step that is to be sampled.
    - `sums`: Those that measure every step.
    - `integrals`: Those that are integrated with the state.
    - `steer`: Those that move the times.
    """

    local: tuple[Item, ...]
    sums: tuple[Item, ...]
    integrals: tuple[Item, ...]
    steer: tuple[Item, ...]


def make_plan(regularizer: Regularizers, key: PRNGKeyArray | None) -> Plan:
    """Sorts regularizers, and gives each a key of its own.

    **Raises:**

    - `TypeError`, naming what is not a regularizer, a weight or a key.
    - `ValueError` if one draws random numbers and there is no key.
    """
    pairs = _pairs(regularizer)
    _check_key(key)
    for _, x in pairs:
        if x.random and key is None:
            raise ValueError(
                f"{type(x).__name__} draws random numbers. Pass "
                "`key=jax.random.key(...)`, a new one for every solve."
            )
    keys = _split(key, len(pairs))
    items = [Item(*pair, key) for pair, key in zip(pairs, keys, strict=True)]

    def of(kind):
        return tuple(item for item in items if isinstance(item.regularizer, kind))

    local = tuple(x for item in of(AbstractLocalRegularizer) for x in _samples(item))
    sums, integrals = of(AbstractGlobalRegularizer), of(AbstractIntegralRegularizer)
    return Plan(local, sums, integrals, of(Steer))


def _check_key(key) -> None:
    if key is None:
        return
    # Keys of the old kind are vectors, as long as their generator wants.
    if jnp.ndim(key) != (0 if is_key(key) else 1):
        raise TypeError(
            f"key={key!r} is not one random key. Pass `key=jax.random.key(...)`; for a "
            "batch of keys use `jax.vmap`."
        )


def _pairs(regularizer: Regularizers) -> list[tuple[Any, AbstractRegularizer]]:
    if regularizer is None:
        return []
    several = isinstance(regularizer, list | tuple) and not _is_pair(regularizer)
    given = regularizer if several else [regularizer]
    pairs = [x if _is_pair(x) else (1, x) for x in given]
    for weight, x in pairs:
        if not isinstance(x, _KINDS):
            raise TypeError(
                f"regularizer={x!r} is not a regularizer; pass an instance, for example"
                " `regularizer=lrnde.LocalError()`, a pair `(weight, instance)`, or a"
                " list of such. One of your own derives from "
                "`lrnde.AbstractLocalRegularizer`, `lrnde.AbstractGlobalRegularizer` or"
                " `lrnde.AbstractIntegralRegularizer`."
            )
        number = eqx.is_array_like(weight) and jnp.shape(weight) == ()
        if not number or jnp.iscomplexobj(weight):
            raise TypeError(
                f"the weight {weight!r} of {type(x).__name__} is not a single real "
                "number."
            )
    return pairs


def _is_pair(x) -> bool:
    """Whether it is meant as a weight and a regularizer, not as two regularizers."""
    pair = isinstance(x, tuple) and len(x) == 2
    return pair and not isinstance(x[0], (*_KINDS, tuple))


def _split(key, count: int):
    if key is None:
        return [None] * count
    # A single one has the key itself.
    return [key] if count == 1 else list(jr.split(key, count))


def _samples(item: Item) -> list[Item]:
    count = item.regularizer.samples
    return [
        Item(item.weight / count, item.regularizer, key)
        for key in _split(item.key, count)
    ]


def check_plan(
    plan: Plan, terms, solver, controller, adjoint, solver_state, old_event
) -> None:
    """Refuses what a solve cannot do.

    **Arguments:**

    - `plan`: What the regularizers ask for.
    - `terms`, `solver`, `controller`, `adjoint`, `solver_state`: As passed to
        `lrnde.diffeqsolve`.
    - `old_event`: The `discrete_terminating_event` passed to it.

    **Raises:**

    - `TypeError`, `ValueError`, as `lrnde.diffeqsolve`.
    """
    for _, x, _ in (*plan.local, *plan.sums):
        _check_steps(x, terms, solver, controller)
    for _, x, _ in plan.sums:
        _check_step_by_step(x, adjoint)
    for _, x, _ in plan.integrals:
        _check_integral(x, terms, adjoint, solver_state, old_event)


def _check_steps(
    regularizer: AbstractStepRegularizer, terms, solver, controller
) -> None:
    if not isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        raise ValueError(
            f"{type(regularizer).__name__} measures adaptive steps, but "
            f"{type(controller).__name__} does not adapt them. Pass for example "
            "`stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6)`."
        )
    regularizer.check(terms, solver)


def _check_step_by_step(regularizer: AbstractGlobalRegularizer, adjoint) -> None:
    if not isinstance(adjoint, _STEP_BY_STEP):
        raise ValueError(
            f"{type(regularizer).__name__} is differentiated through every step of the "
            f"solve, which {type(adjoint).__name__} does not look into: it sees the "
            "solution alone. Use `adjoint=diffrax.RecursiveCheckpointAdjoint()`, or a "
            "local regularizer, such as `lrnde.LocalError()`, with any adjoint."
        )


def _check_integral(regularizer, terms, adjoint, solver_state, old_event) -> None:
    name = type(regularizer).__name__
    if not isinstance(terms, diffrax.ODETerm):
        raise TypeError(
            f"{name} needs an ordinary differential equation in one "
            f"`diffrax.ODETerm`, not a {type(terms).__name__}. (A `ControlTerm` with a "
            "differentiable path becomes one by `.to_ode()`.) `lrnde.LocalError()` "
            "works with all kinds of terms."
        )
    if isinstance(adjoint, diffrax.ImplicitAdjoint):
        raise ValueError(
            f"{name} is an integral along the solution, of which ImplicitAdjoint sees "
            "the end alone. Use `adjoint=diffrax.RecursiveCheckpointAdjoint()`."
        )
    if solver_state is not None:
        raise ValueError(
            f"{name} starts with the solve: it cannot go on from a `solver_state`."
        )
    if old_event is not None:
        raise ValueError(
            f"{name} is integrated along with the state, which a "
            "`discrete_terminating_event` would see. Use `event=diffrax.Event(...)`."
        )
