"""Regularizers that are integrals along the solution: TayNODE and RNODE."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from diffrax._term import WrapTerm
from jax import lax
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array, PRNGKeyArray, PyTree, Real

from ._regularizers import AbstractRegularizer, single


class AbstractIntegralRegularizer(AbstractRegularizer):
    """An integral over the time of the solve, of a function of the vector field.

    It is integrated by the solver, along with the state, but has no say in the choice
    of the steps. Any adjoint will do that can differentiate the solve (not
    `diffrax.ImplicitAdjoint`). With `diffrax.BacksolveAdjoint` it ends at the last time
    that is saved.

    The equation has to be ordinary and one `diffrax.ODETerm`; a `diffrax.ControlTerm`
    with a differentiable path becomes one by its method `to_ode`.
    """

    random: ClassVar[bool] = False

    def draw(self, key: PRNGKeyArray | None, y0: PyTree[Array]) -> Any:
        """The random numbers of one solve; none, unless a subclass needs some."""
        del key, y0

    @abc.abstractmethod
    def integrand(
        self,
        field: Callable[[Any, PyTree], PyTree],
        t: Real[Array, ""],
        y: PyTree[Array],
        drawn: Any,
    ) -> Real[Array, ""]:
        """What is integrated, for the vector field `field(t, y)`."""


class Taylor(AbstractIntegralRegularizer):
    """Regularizes by a total derivative of the solution (TayNODE, Kelly et al. 2020).

    $\\int_{t_0}^{t_1} \\langle |d^K y / dt^K|^2 \\rangle\\, dt$, where $y$ is the
    solution and the brackets are the mean over every entry of the state. The derivative
    is found in Taylor mode (`jax.experimental.jet`) at every stage of every step.

    Custom derivatives inside the vector field are set aside in Taylor mode, which does
    not know them; loops and other operations that it does not know are refused. Powers
    of negative numbers need an exponent written as a whole number.

    **Arguments:**

    - `order`: $K$. A solver of order $K - 1$ is exact where the derivative is zero.

    **Raises:**

    - `ValueError` if `order` is not positive.
    - `NotImplementedError`, naming the operation, for a vector field of which Taylor
        mode does not know every operation.
    """

    order: int = eqx.field(static=True, default=3)

    def __check_init__(self):
        if self.order < 1:
            raise ValueError(f"order={self.order}: a derivative has order 1 or more.")

    def integrand(self, field, t, y, drawn):
        del drawn
        return _mean_square(total_derivative(field, t, y, self.order))


class Kinetic(AbstractIntegralRegularizer):
    """Regularizes by kinetic energy and Jacobian (RNODE, Finlay et al. 2020).

    $\\frac1n \\int (\\alpha \\|f\\|^2 + \\beta \\|\\epsilon^\\top J\\|^2) dt$
    for the vector field $f$, its Jacobian $J = \\partial f / \\partial y$, and a state
    of $n$ entries. The signs $\\epsilon = \\pm 1$ are drawn once a solve; the mean of
    $\\|\\epsilon^\\top J\\|^2$ over them is the squared Frobenius norm of $J$
    (Hutchinson's estimator).

    **Arguments:**

    - `energy`: $\\alpha$.
    - `jacobian`: $\\beta$; at 0 it is not computed.
    """

    random: ClassVar[bool] = True

    energy: float = eqx.field(static=True, default=1.0)
    jacobian: float = eqx.field(static=True, default=1.0)

    def draw(self, key, y0):
        leaves, tree = jtu.tree_flatten(y0)
        # Integers, which no adjoint takes for parameters.
        signs = [
            jr.rademacher(k, y.shape)
            for k, y in zip(jr.split(key, len(leaves)), leaves, strict=True)
        ]
        return jtu.tree_unflatten(tree, signs)

    def integrand(self, field, t, y, drawn):
        if self.jacobian == 0:
            return self.energy * _mean_square(field(t, y))
        f, vjp = jax.vjp(lambda y: field(t, y), y)
        signs = jtu.tree_map(lambda sign, y: sign.astype(y.dtype), drawn, f)
        return self.energy * _mean_square(f) + self.jacobian * _mean_square(vjp(signs))


def _mean_square(tree: PyTree[Array]) -> Real[Array, ""]:
    leaves = jtu.tree_leaves(tree)
    total = sum(jnp.sum(jnp.real(x * jnp.conj(x))) for x in leaves)
    return total / sum(x.size for x in leaves)


def total_derivative(
    field: Callable[[Any, PyTree], PyTree],
    t: Real[Array, ""],
    y: PyTree[Array],
    order: int,
) -> PyTree[Array]:
    """The derivative $d^K y / dt^K$ of the solution of $y' = f(t, y)$ through $(t, y)$.

    **Arguments:**

    - `field`: The vector field $f$.
    - `t`, `y`: The point.
    - `order`: $K$, at least 1.

    **Returns:**

    Of the structure of `y`.

    **Raises:**

    - `NotImplementedError`, as `Taylor`.
    """
    # It is experimental, so only those who ask for it depend on it.
    from jax.experimental.jet import jet

    leaves, tree = jtu.tree_flatten(y)

    def flat(t, *leaves):
        return jtu.tree_leaves(field(t, jtu.tree_unflatten(tree, leaves)))

    derivatives = [flat(t, *leaves)]
    if order > 1:
        flat = _in_known_operations(flat, t, *leaves)
    for k in range(1, order):
        # k derivatives of (t, y) give k of f along the solution, and so y's next one.
        of_time = [jnp.ones_like(t)] + [jnp.zeros_like(t)] * (k - 1)
        of_leaves = [list(series) for series in zip(*derivatives, strict=True)]
        try:
            _, series = jet(flat, (t, *leaves), (of_time, *of_leaves))
        except KeyError as error:
            raise NotImplementedError(
                f"`lrnde.Taylor`: Taylor mode does not know the operation {error} of "
                "this vector field. Write it without, or use `lrnde.LocalError()`."
            ) from error
        derivatives.append([terms[-1] for terms in series])
    return jtu.tree_unflatten(tree, derivatives[-1])


# Operations that do no more than to call a function.
_CALLS = (
    "checkpoint",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "jit",
    "pjit",
    "remat2",
)


# Operations that take scalars beside arrays, where Taylor mode wants equal shapes.
_SAME_SHAPE = ("clamp", "max", "min", "select_n")


def _in_known_operations(function, *args):
    """The same function without calls and custom derivatives, which stop `jet`."""
    closed = jax.make_jaxpr(function)(*args)
    return lambda *args: _evaluate(closed.jaxpr, closed.consts, args)


def _evaluate(jaxpr: Jaxpr, consts, args) -> list:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(x):
        return x.val if isinstance(x, Literal) else values[x]

    for eqn in jaxpr.eqns:
        outputs = _apply(eqn, [read(x) for x in eqn.invars])
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _apply(eqn, inputs: list) -> list:
    if eqn.primitive.name in _CALLS:
        called = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
        inner, consts = getattr(called, "jaxpr", called), getattr(called, "consts", [])
        return _evaluate(inner, consts, inputs)
    if eqn.primitive.name in _SAME_SHAPE:
        shape = eqn.outvars[0].aval.shape
        inputs = [lax.broadcast(x, shape[: len(shape) - jnp.ndim(x)]) for x in inputs]
    if _is_remainder(eqn):
        # Taylor mode rounds the quotient down, also where it is negative.
        quotient = inputs[0] / inputs[1]
        whole = lax.sign(quotient) * lax.floor(lax.abs(quotient))
        return [inputs[0] - whole * inputs[1]]
    if _is_whole_power(eqn):
        # Taylor mode takes a power for the exponential of a logarithm, which is wrong
        # for what is negative.
        return [lax.integer_pow(inputs[0], int(inputs[1]))]
    outputs = eqn.primitive.bind(*inputs, **eqn.params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _is_remainder(eqn) -> bool:
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    return eqn.primitive.name == "rem" and floating


def _is_whole_power(eqn) -> bool:
    if eqn.primitive.name != "pow" or not isinstance(eqn.invars[1], Literal):
        return False
    return float(eqn.invars[1].val).is_integer()


class Augmented(NamedTuple):
    """A state and the integrals up to its time."""

    state: PyTree[Array]
    integrals: tuple[Array, ...]


class AugmentedField(eqx.Module):
    """The vector field of a state and its integrals."""

    term: diffrax.ODETerm
    regularizers: tuple[AbstractIntegralRegularizer, ...]
    drawn: tuple[Any, ...]

    def __call__(self, t, y, args):
        def field(t, y):
            return self.term.vf(t, y, args)

        integrands = tuple(
            single(x, x.integrand(field, t, y.state, drawn)).astype(integral.dtype)
            for x, drawn, integral in zip(
                self.regularizers, self.drawn, y.integrals, strict=True
            )
        )
        return Augmented(field(t, y.state), integrands)


def strip(tree: PyTree) -> PyTree:
    """The same tree as it would be without the integrals: states and terms."""

    def is_field(x):
        return isinstance(x, diffrax.ODETerm) and isinstance(
            x.vector_field, AugmentedField
        )

    def without(x):
        if isinstance(x, Augmented):
            return x.state
        return x.vector_field.term if is_field(x) else x

    return jtu.tree_map(
        without, tree, is_leaf=lambda x: isinstance(x, Augmented) or is_field(x)
    )


class Problem(NamedTuple):
    """Those arguments of `diffrax.diffeqsolve` that an integral changes."""

    terms: PyTree[diffrax.AbstractTerm]
    y0: PyTree[Array]
    saveat: diffrax.SaveAt
    controller: diffrax.AbstractStepSizeController
    event: diffrax.Event | None


def augment(
    problem: Problem,
    regularizers: tuple[AbstractIntegralRegularizer, ...],
    keys: tuple[PRNGKeyArray | None, ...],
    adjoint: diffrax.AbstractAdjoint,
) -> Problem:
    """The problem with the integrals as a part of the state.

    **Arguments:**

    - `problem`: The problem.
    - `regularizers`, `keys`: What to integrate, and a random key for each.
    - `adjoint`: The adjoint of the solve.
    """
    terms, y0, saveat, controller, event = problem
    drawn = tuple(x.draw(key, y0) for x, key in zip(regularizers, keys, strict=True))
    field = AugmentedField(terms, regularizers, drawn)
    # Solvers do not take a state that mixes real and complex numbers.
    dtype = jnp.result_type(*jtu.tree_leaves(y0))
    zeros = tuple(jnp.zeros((), dtype) for _ in regularizers)
    if not isinstance(adjoint, diffrax.BacksolveAdjoint):
        saveat = _save_integrals(saveat)
    if event is not None:
        event = _blind(event, terms)
    return Problem(
        diffrax.ODETerm(field),
        Augmented(y0, zeros),
        saveat,
        _blinded(controller),
        event,
    )


def read_integrals(
    sol: diffrax.Solution, adjoint: diffrax.AbstractAdjoint
) -> tuple[diffrax.Solution, tuple[Array, ...]]:
    """The solution as it would be without the integrals, and the integrals."""
    if isinstance(adjoint, diffrax.BacksolveAdjoint):
        integrals = sol.ys.integrals
    else:
        ts, (ys, integrals) = sol.ts[0], sol.ys
        sol = eqx.tree_at(lambda s: (s.ts, s.ys), sol, (ts, ys), is_leaf=_is_none)
    return strip(sol), tuple(jnp.real(x[-1]) for x in integrals)


def _is_none(x) -> bool:
    return x is None


def _save_integrals(saveat: diffrax.SaveAt) -> diffrax.SaveAt:
    """Saves the integrals at the end, beside what was asked for."""

    def see_the_state(sub):
        if not isinstance(sub, diffrax.SubSaveAt):
            return sub
        fn = sub.fn
        return eqx.tree_at(lambda s: s.fn, sub, lambda t, y, args: fn(t, y.state, args))

    subs = jtu.tree_map(
        see_the_state, saveat.subs, is_leaf=lambda x: isinstance(x, diffrax.SubSaveAt)
    )
    last = diffrax.SubSaveAt(t1=True, fn=lambda t, y, args: y.integrals)
    return eqx.tree_at(lambda s: s.subs, saveat, (subs, last), is_leaf=_is_none)


def _blind(event: diffrax.Event, terms) -> diffrax.Event:
    """An event that sees the state alone."""

    def see_the_state(cond_fn):
        def seeing(t, y, args, **kwargs):
            direction = kwargs["terms"].direction
            kwargs = {**kwargs, "terms": WrapTerm(terms, direction)}
            return cond_fn(t, y.state, args, **kwargs)

        return seeing

    conditions = jtu.tree_map(see_the_state, event.cond_fn, is_leaf=callable)
    return diffrax.Event(conditions, event.root_finder, event.direction)


def _blinded(controller):
    """A controller whose norm sees the state alone."""
    if not isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        return controller
    norm = controller.norm
    return eqx.tree_at(lambda c: c.norm, controller, lambda y: norm(strip(y)))
