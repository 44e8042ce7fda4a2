"""Stochastic Runge-Kutta solvers of strong order 1.5 with an error estimate.

Roessler's SRI family: for Ito equations with diagonal noise, or with a single Brownian
motion. diffrax has no Ito solver that estimates its error.
"""

import functools as ft
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from diffrax._term import WrapTerm
from equinox import AbstractClassVar
from jaxtyping import Array, PyTree

from ._brownian import BrownianPath
from ._explicit import add, combine


class SRITableau(NamedTuple):
    """The coefficients of a stochastic Runge-Kutta method of the SRI family.

    With $f_j$ and $g_j$ the drift and the diffusion at stage $j$, stage $i$ evaluates

    - the drift at the state $y + h \\sum_j a^0_{ij} f_j + \\chi_2 \\sum_j b^0_{ij} g_j$
        and the time $t + h \\sum_j a^0_{ij}$,
    - the diffusion at $y + h \\sum_j a^1_{ij} f_j + \\sqrt h \\sum_j b^1_{ij} g_j$ and
        the time $t + h \\sum_j a^1_{ij}$,

    and the step leads to $y + h \\sum_j \\alpha_j f_j + W \\sum_j \\beta^1_j g_j
    + \\chi_1 \\sum_j \\beta^2_j g_j + E_2$ with the error estimate
    $\\delta h \\sum_j f_j + E_2$, where
    $E_2 = \\chi_2 \\sum_j \\beta^3_j g_j + \\chi_3 \\sum_j \\beta^4_j g_j$.

    `a0`, `a1`, `b0` and `b1` hold a row for each stage after the first.
    """

    a0: Sequence[Sequence[float]]
    a1: Sequence[Sequence[float]]
    b0: Sequence[Sequence[float]]
    b1: Sequence[Sequence[float]]
    alpha: Sequence[float]
    beta1: Sequence[float]
    beta2: Sequence[float]
    beta3: Sequence[float]
    beta4: Sequence[float]
    delta: float = 1.0

    @property
    def drift_evaluations(self) -> int:
        """Evaluations of the drift in one step."""
        return 1 + sum(any(a) or any(b) for a, b in zip(self.a0, self.b0, strict=True))

    @property
    def diffusion_evaluations(self) -> int:
        """Evaluations of the diffusion in one step."""
        return 1 + sum(any(a) or any(b) for a, b in zip(self.a1, self.b1, strict=True))


class AbstractSRI(diffrax.AbstractAdaptiveSolver, diffrax.AbstractItoSolver):
    """A stochastic Runge-Kutta method of the SRI family (Roessler, 2010).

    Solves $dy = f(t, y) dt + g(t, y) dW$ in the sense of Ito with diagonal noise, where
    each component of the state is driven by a Brownian motion of its own, or with a
    single Brownian motion for all of them. The terms are
    `diffrax.MultiTerm(diffrax.ODETerm(f), diffrax.ControlTerm(g, path))`, where `path`
    knows its space-time Levy area and `g` returns a `lineax.DiagonalLinearOperator`, or
    an array in the case of a single Brownian motion.

    Subclasses give a `tableau`. The stages are written out, as in
    `lrnde.AbstractExplicitRungeKutta`.

    **Raises:**

    - `ValueError`, in a step, if the path does not know its space-time Levy area, or
        the noise is neither diagonal nor a single Brownian motion.
    """

    term_structure: ClassVar = diffrax.MultiTerm[
        tuple[diffrax.AbstractTerm, diffrax.AbstractTerm]
    ]
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation
    tableau: AbstractClassVar[SRITableau]

    def order(self, terms):
        del terms
        return 2

    def strong_order(self, terms):
        del terms
        return 1.5

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        del terms, t0, t1, y0, args
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        drift, diffusion = terms.terms
        tableau = self.tableau
        dt = drift.contr(t0, t1)
        # A batch element that has arrived takes steps of length zero, or less, beside
        # those that have not. Nothing is kept of them, but no NaN may reach a gradient.
        h = jnp.where(t1 > t0, t1 - t0, 1)
        noise = _iterated_integrals(self, diffusion, t0, t1, h)

        def drift_at(node, y):
            return drift.vf(_time(node, t0, t1), y, args)

        def diffusion_at(node, y):
            vf = diffusion.vf(_time(node, t0, t1), y, args)
            return _diagonal(self, vf, noise.w, y)

        def drifts(weights):
            combined = _combine(weights, f)
            return None if combined is None else drift.prod(combined, dt)

        def diffusions(weights, factor):
            return _scale(_combine(weights, g), factor)

        f, g = [drift_at(0, y0)], [diffusion_at(0, y0)]
        for a0, a1, b0, b1 in zip(*tableau[:4], strict=True):
            y_drift = _sum(y0, drifts(a0), diffusions(b0, noise.chi2))
            y_diffusion = _sum(y0, drifts(a1), diffusions(b1, jnp.sqrt(h)))
            # A stage that adds nothing to the state is the first one again.
            f_next = f[0] if y_drift is y0 else drift_at(sum(a0), y_drift)
            g_next = g[0] if y_diffusion is y0 else diffusion_at(sum(a1), y_diffusion)
            f, g = [*f, f_next], [*g, g_next]
        e2 = _sum(
            diffusions(tableau.beta3, noise.chi2), diffusions(tableau.beta4, noise.chi3)
        )
        y1 = _sum(
            y0,
            drifts(tableau.alpha),
            diffusions(tableau.beta1, noise.w),
            diffusions(tableau.beta2, noise.chi1),
            e2,
        )
        y_error = _sum(drifts(len(f) * [tableau.delta]), e2)
        dense_info = dict(y0=y0, y1=y1)
        return y1, y_error, dense_info, None, diffrax.RESULTS.successful


def _time(node, t0, t1):
    # Some nodes lie outside the step.
    return t0 + np.asarray(node, jnp.result_type(t0)) * (t1 - t0)


def _combine(weights, trees: Sequence[PyTree[Array]]) -> PyTree[Array] | None:
    """Their linear combination; `None` if it has no term."""
    return combine(np.asarray(weights), trees) if any(weights) else None


def _sum(*trees: PyTree[Array] | None) -> PyTree[Array]:
    """The sum of those trees that are there."""
    return ft.reduce(add, [tree for tree in trees if tree is not None])


def _scale(tree: PyTree[Array] | None, factor: PyTree[Array]) -> PyTree[Array] | None:
    """Multiplies by a tree of the same structure, or by one number."""
    if tree is None:
        return None
    if _is_number(factor):
        return jtu.tree_map(lambda x: x * factor.astype(x.dtype), tree)
    return jtu.tree_map(jnp.multiply, tree, factor)


def _is_number(tree: PyTree[Array]) -> bool:
    return isinstance(tree, jax.Array) and tree.ndim == 0


class _IteratedIntegrals(NamedTuple):
    """What a step needs of the Brownian path.

    Over a step of length $h$ with the increment $W$ and the space-time Levy area $H$:
    $W$ itself, $\\chi_1 = I_{(1,1)} / \\sqrt h$, $\\chi_2 = I_{(1,0)} / h = W / 2 + H$
    and $\\chi_3 = I_{(1,1,1)} / h$.
    """

    w: PyTree[Array]
    chi1: PyTree[Array]
    chi2: PyTree[Array]
    chi3: PyTree[Array]


def _iterated_integrals(solver, diffusion, t0, t1, h) -> _IteratedIntegrals:
    try:
        path = diffusion.contr(t0, t1, use_levy=True)
    except TypeError:
        path = None
    if not isinstance(path, diffrax.AbstractSpaceTimeLevyArea):
        raise ValueError(
            f"{type(solver).__name__} needs a Brownian motion that knows its "
            "space-time Levy area, as the second term's control: "
            "`lrnde.BrownianPath(...)` with its default `levy_area`, or "
            "`diffrax.VirtualBrownianTree(..., levy_area=diffrax.SpaceTimeLevyArea)`."
        )

    def chi1(w):
        length = h.astype(w.real.dtype)
        return (w * w - length) / (2 * jnp.sqrt(length))

    def chi3(w):
        length = h.astype(w.real.dtype)
        return w * (w * w - 3 * length) / (6 * length)

    def chi2(w, area):
        return w / 2 + _sign(diffusion).astype(area.real.dtype) * area

    return _IteratedIntegrals(
        path.W,
        jtu.tree_map(chi1, path.W),
        jtu.tree_map(chi2, path.W, path.H),
        jtu.tree_map(chi3, path.W),
    )


def _sign(diffusion):
    # A solve backwards in time turns the increment of a path around, and diffrax with
    # it the area; but what the path has beyond its chord stays. A `BrownianPath` is
    # drawn along the solve, whichever way that goes, and turned around as a whole.
    backwards = isinstance(diffusion, WrapTerm) and not isinstance(
        getattr(diffusion.term, "control", None), BrownianPath
    )
    return jnp.asarray(diffusion.direction if backwards else 1)


def _diagonal(solver, vf, w: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """The diffusion as a tree like the state."""
    operator = isinstance(vf, lx.DiagonalLinearOperator)
    g = vf.diagonal if operator else vf
    if isinstance(g, int | float):
        g = jnp.asarray(g, jnp.result_type(*jtu.tree_leaves(y)))
    like_the_noise = _shapes(g) == _shapes(w) if operator else _is_number(w)
    if like_the_noise and _shapes(g) == _shapes(y):
        return g
    raise ValueError(
        f"{type(solver).__name__} needs diagonal noise: a Brownian motion like the "
        "state, and a diffusion that returns `lineax.DiagonalLinearOperator(g)` with "
        "`g` like the state (or a single Brownian motion, of shape (), and `g` itself)."
        " For other noise use `diffrax.SPaRK()`, which solves in the sense of "
        "Stratonovich, or `diffrax.ItoMilstein()` with constant steps."
    )


def _shapes(tree):
    return jtu.tree_map(jnp.shape, tree)


class SOSRI(AbstractSRI):
    """Rackauckas and Nie's stability-optimised method of strong order 1.5.

    Stable for larger steps in the drift than `SRIW2`. The solver of the paper's neural
    SDEs. One step evaluates drift and diffusion four times each.
    """

    tableau: ClassVar = SRITableau(
        a0=(
            (-0.04199224421316468,),
            (2.842612915017106, -2.0527723684000727),
            (4.338237071435815, -2.8895936137439793, 2.3017575594644466),
        ),
        a1=(
            (0.26204282091330466,),
            (0.20903646383505375, -0.1502377115150361),
            (0.05836595312746999, 0.6149440396332373, 0.08535117634046772),
        ),
        b0=(
            (-0.21641093549612528,),
            (1.5336352863679572, 0.26066223492647056),
            (-1.0536037558179159, 1.7015284721089472, -0.20725685784180017),
        ),
        b1=(
            (-0.5119011827621657,),
            (2.67767339866713, -4.9395031322250995),
            (0.15580956238299215, 3.2361551006624674, -1.4223118283355949),
        ),
        alpha=(
            1.140099274172029,
            -0.6401334255743456,
            0.4736296532772559,
            0.026404498125060714,
        ),
        beta1=(
            -1.8453464565104432,
            2.688764531100726,
            -0.2523866501071323,
            0.40896857551684956,
        ),
        beta2=(
            0.4969658141589478,
            -0.5771202869753592,
            -0.12919702470322217,
            0.2093514975196336,
        ),
        beta3=(
            2.8453464565104425,
            -2.688764531100725,
            0.2523866501071322,
            -0.40896857551684945,
        ),
        beta4=(
            0.11522663875443433,
            -0.57877086147738,
            0.2857851028163886,
            0.17775911990655704,
        ),
    )


class SOSRI2(AbstractSRI):
    """Rackauckas and Nie's second stability-optimised method of strong order 1.5.

    Its nodes lie within the step, those of `SOSRI` do not. One step evaluates drift and
    diffusion four times each.
    """

    tableau: ClassVar = SRITableau(
        a0=(
            (0.13804532298278663,),
            (0.5818361298250374, 0.4181638701749618),
            (0.4670018408674211, 0.8046204792187386, -0.27162232008616016),
        ),
        a1=(
            (0.45605532163856893,),
            (0.7555807846451692, 0.24441921535482677),
            (0.6981181143266059, 0.3453277086024727, -0.04344582292908241),
        ),
        b0=(
            (0.08852381537667678,),
            (1.0317752458971061, 0.4563552922077882),
            (1.73078280444124, -0.46089678470929774, -0.9637509618944188),
        ),
        b1=(
            (0.6753186815412179,),
            (-0.07452812525785148, -0.49783736486149366),
            (-0.5591906709928903, 0.022696571806569924, -0.8984927888368557),
        ),
        alpha=(
            -0.15036858140642623,
            0.7545275856696072,
            0.686995463807979,
            -0.2911544680711602,
        ),
        beta1=(
            -0.45315689727309133,
            0.8330937231303951,
            0.3792843195533544,
            0.24077885458934192,
        ),
        beta2=(
            -0.4994383733810986,
            0.9181786186154077,
            -0.25613778661003145,
            -0.16260245862427797,
        ),
        beta3=(
            1.4531568972730915,
            -0.8330937231303933,
            -0.3792843195533583,
            -0.24077885458934023,
        ),
        beta4=(
            -0.4976090683622265,
            0.9148155835648892,
            -1.4102107084476505,
            0.9930041932449877,
        ),
    )


class SRIW2(AbstractSRI):
    """Roessler's method of strong order 1.5, of order 3 without noise.

    One step evaluates the drift three times, the diffusion four times.
    """

    tableau: ClassVar = SRITableau(
        a0=((1.0,), (0.25, 0.25), (0.0, 0.0, 0.0)),
        a1=((0.25,), (1.0, 0.0), (0.0, 0.0, 0.25)),
        b0=((0.0,), (1.0, 0.5), (0.0, 0.0, 0.0)),
        b1=((-0.5,), (1.0, 0.0), (2.0, -1.0, 0.5)),
        alpha=(0.16666666666666666, 0.16666666666666666, 0.6666666666666666, 0.0),
        beta1=(-1.0, 1.3333333333333333, 0.6666666666666666, 0.0),
        beta2=(1.0, -1.3333333333333333, 0.3333333333333333, 0.0),
        beta3=(2.0, -1.3333333333333333, -0.6666666666666666, 0.0),
        beta4=(-2.0, 1.6666666666666667, -0.6666666666666666, 1.0),
    )
