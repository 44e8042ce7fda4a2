"""Explicit Runge-Kutta solvers with their stages written out.

diffrax forms each stage as a matrix-vector product with a buffer of all stages, inside
a loop over the stages. Here the stages are unrolled into multiplications and additions,
which the compiler fuses with what comes before and after. The steps are the same.
"""

from collections.abc import Sequence
from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from equinox import AbstractClassVar
from jax import lax
from jaxtyping import Array, Float64, PyTree


def combine(
    coefficients: Float64[np.ndarray, " trees"], trees: Sequence[PyTree[Array]]
) -> PyTree[Array]:
    """The linear combination of `trees`, leaf by leaf, without the zero terms."""
    kept = [i for i, c in enumerate(coefficients) if c != 0]

    def leafwise(*leaves):
        # Coefficients are cast: a float64 one must not lift a float32 state.
        terms = [np.asarray(coefficients[i], leaves[0].dtype) * leaves[i] for i in kept]
        return sum(terms[1:], start=terms[0])

    return jtu.tree_map(leafwise, *trees)


class AbstractExplicitRungeKutta(diffrax.AbstractAdaptiveSolver):
    """An embedded explicit Runge-Kutta pair, its stages written out.

    Subclasses give a `tableau`, an `interpolation_cls` and their order. Takes every
    kind of term, state and adjoint that diffrax's own Runge-Kutta solvers take.

    A first-same-as-last pair evaluates its first stage once before the first step
    rather than within it. The loop over steps then has no branch, unless the step size
    controller knows of jumps.
    """

    term_structure: ClassVar = diffrax.AbstractTerm
    tableau: AbstractClassVar[diffrax.ButcherTableau]

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        del t1
        return terms.vf(t0, y0, args) if self.tableau.fsal else None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        tableau = self.tableau
        control = terms.contr(t0, t1)
        first = solver_state
        if not tableau.fsal:
            first = terms.vf(t0, y0, args)
        elif made_jump is not False:
            first = lax.cond(made_jump, lambda: terms.vf(t0, y0, args), lambda: first)
        stages, products = [first], [terms.prod(first, control)]
        linear = _linear_in_its_arrays(first)

        def increment(coefficients):
            if linear:  # one product instead of one for each stage
                return terms.prod(combine(coefficients, stages), control)
            return combine(coefficients, products)

        y1 = y0
        for a, c in zip(tableau.a_lower, tableau.c, strict=True):
            # The last node is t1 itself, without a rounding error.
            t = t1 if c == 1 else t0 + np.asarray(c, jnp.result_type(t0)) * (t1 - t0)
            y1 = add(y0, increment(a))
            stages.append(terms.vf(t, y1, args))
            products.append(terms.prod(stages[-1], control))
        if not tableau.ssal:
            y1 = add(y0, increment(tableau.b_sol))
        y_error = increment(tableau.b_error)
        k = jtu.tree_map(lambda *leaves: jnp.stack(leaves), *products)
        last = stages[-1] if tableau.fsal else None
        dense_info = dict(y0=y0, y1=y1, k=k)
        return y1, y_error, dense_info, last, diffrax.RESULTS.successful


def _linear_in_its_arrays(vf: PyTree) -> bool:
    """Whether a linear combination of such values is that of their arrays.

    Not so where a value is a lineax operator that is a product, or has no array at all.
    """
    plain = lx.DiagonalLinearOperator, lx.MatrixLinearOperator
    leaves = jtu.tree_leaves(
        vf, is_leaf=lambda x: isinstance(x, lx.AbstractLinearOperator)
    )
    return all(
        isinstance(x, plain) or not isinstance(x, lx.AbstractLinearOperator)
        for x in leaves
    )


def add(y: PyTree[Array], dy: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(jnp.add, y, dy)


class Tsit5(AbstractExplicitRungeKutta):
    """Tsitouras' 5(4) pair, as `diffrax.Tsit5`, with its stages written out."""

    tableau: ClassVar = diffrax.Tsit5.tableau
    interpolation_cls: ClassVar = diffrax.Tsit5.interpolation_cls

    def order(self, terms):
        del terms
        return 5


class Dopri5(AbstractExplicitRungeKutta):
    """Dormand and Prince's 5(4) pair, as `diffrax.Dopri5`, its stages written out."""

    tableau: ClassVar = diffrax.Dopri5.tableau
    interpolation_cls: ClassVar = diffrax.Dopri5.interpolation_cls

    def order(self, terms):
        del terms
        return 5


class Bosh3(AbstractExplicitRungeKutta):
    """Bogacki and Shampine's 3(2) pair, as `diffrax.Bosh3`, its stages written out."""

    tableau: ClassVar = diffrax.Bosh3.tableau
    interpolation_cls: ClassVar = diffrax.Bosh3.interpolation_cls

    def order(self, terms):
        del terms
        return 3


class Dopri8(AbstractExplicitRungeKutta):
    """Dormand and Prince's 8(7) pair, as `diffrax.Dopri8`, its stages written out."""

    tableau: ClassVar = diffrax.Dopri8.tableau
    interpolation_cls: ClassVar = diffrax.Dopri8.interpolation_cls

    def order(self, terms):
        del terms
        return 8
