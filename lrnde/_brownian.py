"""A Brownian path that is drawn as a solve goes, and remembers what it has shown."""

import math
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float32, Int, PRNGKeyArray, PyTree, Real, UInt32

from ._wrapped import AbstractTransparentSolver


class Increment(NamedTuple):
    """What is known of a Brownian path over an interval.

    - `w`: Its increment.
    - `area`: Its space-time Levy area, `None` if nobody needs it.
    """

    w: PyTree[Array]
    area: PyTree[Array] | None


class BrownianPath(diffrax.AbstractBrownianPath):
    """A Brownian motion for `lrnde.diffeqsolve`, many times as fast as a tree.

    `diffrax.VirtualBrownianTree` finds the path at a time by going down a tree of
    bridges: about a dozen draws of normal numbers for each step, which for a small
    network cost more than the network. This path draws each step's noise once, when the
    step is tried. If the step is rejected, what it has shown of the path is remembered:
    shorter steps are drawn as bridges within it (Rackauckas and Nie, 2017), and a later
    step ends where it ended (Foster and Jelincic, 2024). So adaptive steps do not bias
    the path.

    The price: the path belongs to one solve. Another tolerance or another parameter
    means other steps, and other noise. And to end where a rejected step ended takes a
    few more steps, as it does on a tree with
    `diffrax.ClipStepSizeController(store_rejected_steps=...)`.

    A solver may ask for the noise of its steps, not of parts of them; of diffrax's
    solvers `HalfSolver` and `LeapfrogMidpoint` do, and are refused. Times cannot be
    differentiated.

    **Arguments:**

    - `shape`: As for `diffrax.VirtualBrownianTree`: the shape of the noise, or a PyTree
        whose leaves are `jax.ShapeDtypeStruct`.
    - `key`: A `jax.random.key`.
    - `levy_area`: `diffrax.SpaceTimeLevyArea`, or `diffrax.BrownianIncrement` for
        solvers that need no Levy area.
    - `memory`: How many rejected steps, one within the other, can be remembered at a
        time. A solve that needs more fails.

    **Raises:**

    - `TypeError` if `shape` is neither of the two.
    - `ValueError` for another `levy_area` or a `memory` below 1; if used outside
        `lrnde.diffeqsolve`, twice in one solve, with an adjoint other than
        `lrnde.TapeAdjoint` and `diffrax.RecursiveCheckpointAdjoint`, with an implicit
        solver, `diffrax.HalfSolver` or `diffrax.LeapfrogMidpoint`, or with a
        `solver_state` of an earlier solve.
    """

    shape: PyTree[jax.ShapeDtypeStruct] = eqx.field(static=True)
    key: PRNGKeyArray
    levy_area: type = eqx.field(static=True)
    memory: int = eqx.field(static=True)
    known: Increment | None

    def __init__(
        self,
        shape: tuple[int, ...] | PyTree[jax.ShapeDtypeStruct],
        key: PRNGKeyArray,
        levy_area: type = diffrax.SpaceTimeLevyArea,
        memory: int = 16,
    ):
        if isinstance(shape, tuple) and all(isinstance(n, int) for n in shape):
            shape = jax.ShapeDtypeStruct(shape, jnp.result_type(float))
        leaves = jtu.tree_leaves(shape)
        if not all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise TypeError(
                f"shape={shape!r} must be a tuple of whole numbers, such as `(3,)`, or "
                "a PyTree of `jax.ShapeDtypeStruct`."
            )
        if levy_area not in (diffrax.SpaceTimeLevyArea, diffrax.BrownianIncrement):
            raise ValueError(
                f"levy_area={levy_area!r}: choose `diffrax.SpaceTimeLevyArea` or "
                "`diffrax.BrownianIncrement`."
            )
        if memory < 1:
            raise ValueError(f"memory={memory}: at least one step is remembered.")
        self.shape, self.key, self.levy_area = shape, key, levy_area
        self.memory = memory
        self.known = None

    @property
    def t0(self):
        return -jnp.inf

    @property
    def t1(self):
        return jnp.inf

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        """The noise of the step at hand."""
        del left
        if self.known is None or t1 is None:
            raise ValueError(
                "lrnde.BrownianPath is drawn step by step in `lrnde.diffeqsolve`. To "
                "look at the path, or for another solve, use "
                "`diffrax.VirtualBrownianTree`."
            )
        if not use_levy:
            return self.known.w
        dt = jtu.tree_map(lambda w: jnp.asarray(t1 - t0, w.real.dtype), self.known.w)
        if self.known.area is None:
            return diffrax.BrownianIncrement(dt=dt, W=self.known.w)
        return diffrax.SpaceTimeLevyArea(dt=dt, W=self.known.w, H=self.known.area)

    def given(self, known: Increment) -> "BrownianPath":
        """The same path, with the noise of the step at hand."""
        return eqx.tree_at(
            lambda path: path.known, self, known, is_leaf=lambda x: x is None
        )

    def draw(self, key: PRNGKeyArray, length: Real[Array, ""]) -> Increment:
        """The noise of an interval of which nothing is known."""
        length = eqxi.nondifferentiable(length, name="the length of a step")
        leaves, tree = jtu.tree_flatten(self.shape)
        keys = jr.split(key, len(leaves))
        with_area = self.levy_area is diffrax.SpaceTimeLevyArea

        def draw(key, leaf):
            scale = jnp.sqrt(length).astype(leaf.dtype)
            if not with_area:
                return [scale * jr.normal(key, leaf.shape, leaf.dtype)]
            return [scale * x for x in _two_normals(key, leaf.shape, leaf.dtype)]

        noise = [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
        noise = lax.stop_gradient(noise)
        w = jtu.tree_unflatten(tree, [x[0] for x in noise])
        if not with_area:
            return Increment(w, None)
        # The variance of the area is a twelfth of the length.
        area = jtu.tree_unflatten(tree, [x[1] * 12**-0.5 for x in noise])
        return Increment(w, area)

    def split(
        self,
        key: PRNGKeyArray,
        whole: Increment,
        a: Real[Array, ""],
        b: Real[Array, ""],
    ) -> tuple[Increment, Increment]:
        """The noise of both parts of an interval, given that of the whole.

        **Arguments:**

        - `key`: A `jax.random.key`.
        - `whole`: What is known of the interval.
        - `a`, `b`: The lengths of its parts.
        """
        left, right = jr.split(key)
        return self._condition(whole, self.draw(left, a), self.draw(right, b), a, b)

    def _condition(self, whole, left, right, a, b) -> tuple[Increment, Increment]:
        """Turns parts that were drawn alone into parts of the whole."""
        # Look what whole they make, and add the regression of the parts on the whole,
        # times what the whole lacks. For Gaussian variables the result has exactly the
        # conditional distribution.
        p, q = _shares(a, b)
        made = self.join(left, right, a, b)
        lacks = jtu.tree_map(jnp.subtract, whole, made)

        def corrected(part, share, slope):
            w = _add(part.w, lacks.w, share)
            if part.area is None:
                return Increment(w, None)
            area = _add(part.area, lacks.area, share * share)
            return Increment(_add(w, lacks.area, slope), area)

        slope = 6 * p * q
        return corrected(left, p, slope), corrected(right, q, -slope)

    @staticmethod
    def join(
        left: Increment, right: Increment, a: Real[Array, ""], b: Real[Array, ""]
    ) -> Increment:
        """The noise of an interval from that of its two parts (Chen's relation).

        **Arguments:**

        - `left`, `right`: What is known of the parts.
        - `a`, `b`: Their lengths.
        """
        w = _add(left.w, right.w, 1)
        if left.area is None:
            return Increment(w, None)
        p, q = _shares(a, b)
        area = jtu.tree_map(lambda x: p.astype(x.dtype) * x, left.area)
        for tree, factor in ((right.area, q), (left.w, q / 2), (right.w, -p / 2)):
            area = _add(area, tree, factor)
        return Increment(w, area)


def _two_normals(key: PRNGKeyArray, shape, dtype):
    """Two arrays of independent standard normal numbers.

    As `jax.random.normal`, but of the two words that Threefry makes at a time neither
    is thrown away, which takes two thirds of the time.
    """
    if dtype != jnp.float32 or str(jr.key_impl(key)) != "threefry2x32":
        return jr.normal(key, (2, *shape), dtype)
    counts = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    words = threefry2x32_p.bind(*jr.key_data(key), counts, jnp.zeros_like(counts))
    return [_normal(word) for word in words]


def _normal(word: UInt32[Array, "..."]) -> Float32[Array, "..."]:
    # 23 bits as the mantissa of a number in [1, 2), moved to (-1, 1).
    bits = lax.shift_right_logical(word, jnp.uint32(9)) | jnp.uint32(0x3F800000)
    uniform = lax.bitcast_convert_type(bits, jnp.float32) - 1
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(low, uniform * (1 - low) + low)
    return np.float32(2**0.5) * lax.erf_inv(uniform)


def _shares(a, b):
    length = jnp.where(a + b > 0, a + b, 1)
    return a / length, b / length


def _add(x: PyTree[Array], y: PyTree[Array], factor) -> PyTree[Array]:
    return jtu.tree_map(lambda x, y: x + jnp.asarray(factor, x.dtype) * y, x, y)


class Memory(NamedTuple):
    """All that a solve remembers of its Brownian path.

    - `current`: The noise of the step at hand.
    - `ends`: The ends of the intervals ahead, the nearest last.
    - `ahead`: Their noise. A last row takes writes that nobody wants.
    - `depth`: How many there are.
    - `overflowed`: Whether there were too many at some time.
    - `samples`: As `lrnde._sampling.Reservoir.slots`: the noise of each sampled step.
    """

    current: Increment
    ends: Real[Array, " rows"]
    ahead: Increment
    depth: Int[Array, ""]
    overflowed: Bool[Array, ""]
    samples: tuple[Increment, ...] | None


class RememberingSolver(AbstractTransparentSolver):
    """Gives a solver the noise of each of its steps, and keeps the memory.

    The solver's state is a pair of the stepper's state and a `Memory`. diffrax
    puts a solver's state back when a step is rejected; so what a rejected step has
    shown is noted by `go_on`, between two steps. `samples` says for how many sampled
    steps it keeps the noise.
    """

    stepper: diffrax.AbstractSolver
    path: BrownianPath
    samples: int = eqx.field(static=True)

    def init(self, terms, t0, t1, y0, args):
        # Negative, if the solve ends where it starts.
        length = jnp.maximum(t1 - t0, 0)
        current = self.path.draw(jr.fold_in(self.path.key, 0), length)
        rows = self.path.memory + 1
        memory = Memory(
            current,
            jnp.zeros(rows, jnp.result_type(t0)),
            jtu.tree_map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), current),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), bool),
            tuple(
                jtu.tree_map(lambda x: jnp.stack([x, x]), current)
                for _ in range(self.samples)
            )
            or None,
        )
        terms = show(terms, current)
        return self.stepper.init(terms, t0, t1, y0, args), memory

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        inner, memory = solver_state
        terms = show(terms, memory.current)
        *rest, inner, result = self.stepper.step(
            terms, t0, t1, y0, args, inner, made_jump
        )
        return *rest, (inner, memory), result

    def go_on(self, before: Any, after: Any) -> Any:
        """Draws the noise of the next step.

        **Arguments:**

        - `before`, `after`: The state of diffrax's loop before and after a step.

        **Returns:**

        The state to go on from.
        """
        inner, memory = after.solver_state
        rejected = after.num_accepted_steps == before.num_accepted_steps
        row = jnp.where(rejected, memory.depth, memory.depth - 1)
        known = row >= 0
        end = jnp.where(rejected, before.tnext, memory.ends[row])
        tnext = jnp.where(known, jnp.minimum(after.tnext, end), after.tnext)
        length = jnp.maximum(tnext - after.tprev, 0)
        rest_length = jnp.maximum(end - tnext, 0)
        left, right = jr.split(jr.fold_in(self.path.key, after.num_steps))
        drawn = self.path.draw(left, length)

        def split():
            nearest = jtu.tree_map(lambda x: x[row], memory.ahead)
            whole = jtu.tree_map(
                lambda x, y: jnp.where(rejected, x, y), memory.current, nearest
            )
            rest = self.path.draw(right, rest_length)
            return self.path._condition(whole, drawn, rest, length, rest_length)

        current, rest = lax.cond(known, split, lambda: (drawn, drawn))
        ahead = known & (tnext < end)
        last = self.path.memory
        slot = jnp.where(ahead, jnp.minimum(row, last), last)
        memory = Memory(
            current,
            memory.ends.at[slot].set(end),
            jtu.tree_map(lambda xs, x: xs.at[slot].set(x), memory.ahead, rest),
            jnp.where(ahead, jnp.minimum(row + 1, last), jnp.maximum(row, 0)),
            memory.overflowed | (ahead & (row >= last)),
            self._sample(before, after, memory),
        )
        return eqx.tree_at(
            lambda s: (s.tnext, s.solver_state), after, (tnext, (inner, memory))
        )

    def _sample(self, before, after, memory: Memory) -> tuple[Increment, ...] | None:
        if not self.samples:
            return None
        old, new = (s.controller_state.reservoirs for s in (before, after))

        def keep(samples, old, new):
            slot = jnp.where(new.replacements > old.replacements, 0, 1)
            return jtu.tree_map(
                lambda x, xs: xs.at[slot].set(x), memory.current, samples
            )

        return tuple(map(keep, memory.samples, old, new))


def _is_path(x) -> bool:
    return isinstance(x, BrownianPath)


def find_path(terms: PyTree[diffrax.AbstractTerm]) -> BrownianPath | None:
    """The `BrownianPath` of these terms, if there is one.

    **Raises:**

    - `ValueError` if there are several.
    """
    paths = [x for x in jtu.tree_leaves(terms, is_leaf=_is_path) if _is_path(x)]
    if len(paths) > 1:
        raise ValueError(
            "these terms have several `lrnde.BrownianPath`s. Use one whose shape is a "
            "PyTree, or `diffrax.VirtualBrownianTree`s."
        )
    return paths[0] if paths else None


def show(
    terms: PyTree[diffrax.AbstractTerm], known: Increment
) -> PyTree[diffrax.AbstractTerm]:
    """The same terms, their path knowing the noise of the step at hand."""
    return jtu.tree_map(
        lambda x: x.given(known) if _is_path(x) else x, terms, is_leaf=_is_path
    )
