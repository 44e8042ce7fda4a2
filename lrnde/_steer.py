"""STEER: the end of the solve at a random time."""

from typing import ClassVar

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import Array, PRNGKeyArray, Real

from ._regularizers import AbstractRegularizer


class Steer(AbstractRegularizer):
    """Moves the times at which a solve saves, at random (STEER, Ghosh et al. 2020).

    What is saved for a time is the solution at another one, so the vector field has to
    change little around it. There is no penalty. For training alone: evaluate without.

    Without `SaveAt(ts=...)` the solve ends at a time drawn uniformly from
    $[t_1 - b, t_1 + b]$. With it, each time is drawn uniformly from around its place,
    up to $b$ away but not beyond the middle between it and its neighbours, so their
    order stays; times at `t0` stay, and `t1` moves with the last time if it is the
    same. What the solve takes from outside, such as a Brownian tree, has to reach as
    far as the moved times.

    **Arguments:**

    - `width`: $b$, in units of time.

    **Raises:**

    - `ValueError` if `width` is not positive. A solve that could end before it starts
        fails.
    """

    random: ClassVar[bool] = True

    width: float = eqx.field(static=True, default=0.5)

    def __check_init__(self):
        if self.width <= 0:
            raise ValueError(f"width={self.width} is not positive.")

    def jitter(
        self,
        key: PRNGKeyArray,
        t0: Real[Array, ""],
        t1: Real[Array, ""],
        saveat: diffrax.SaveAt,
    ) -> tuple[Real[Array, ""], diffrax.SaveAt]:
        """New times for a solve.

        **Arguments:**

        - `key`: A `jax.random.key`.
        - `t0`, `t1`: Start and end of the solve.
        - `saveat`: When it saves.

        **Returns:**

        A new `t1` and a new `saveat`.
        """
        is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)  # noqa: E731
        subs, tree = jtu.tree_flatten(saveat.subs, is_leaf=is_sub)
        # As in the solve, time increases.
        direction = jnp.where(t0 < t1, 1, -1).astype(t1.dtype)
        start, end = t0 * direction, t1 * direction
        if all(sub.ts is None for sub in subs):
            end = eqx.error_if(
                end, self.width >= end - start, "Steer: `width` must be below t1 - t0."
            )
            shift = jr.uniform(key, (), t1.dtype, -self.width, self.width)
            return (end + shift) * direction, saveat
        moved, ends, tied = [], [], []
        for sub in subs:
            if sub.ts is not None:
                ts = sub.ts.astype(t1.dtype) * direction
                # One key: who saves at the same times saves at the same moved times.
                new = ts + self._shifts(key, ts, start, end)
                ends.append(new[-1])
                tied.append(ts[-1] == end)
                sub = eqx.tree_at(lambda s: s.ts, sub, new * direction)
            moved.append(sub)
        last = jnp.max(jnp.stack(ends))
        end = jnp.where(jnp.any(jnp.stack(tied)), last, end)
        subs = jtu.tree_unflatten(tree, moved)
        return end * direction, eqx.tree_at(lambda s: s.subs, saveat, subs)

    def _shifts(self, key, ts, start, end):
        # The last time has as much room after it as before it, but not beyond the end
        # of the solve, unless it is the end.
        before = jnp.concatenate([start[None], ts[:-1]])
        room = ts[-1:] - before[-1:]
        room = jnp.where(ts[-1] == end, room, jnp.minimum(room, 2 * (end - ts[-1])))
        after = jnp.concatenate([ts[1:], ts[-1:] + room])
        left = jnp.minimum((ts - before) / 2, self.width)
        right = jnp.minimum((after - ts) / 2, self.width)
        uniform = jr.uniform(key, ts.shape, ts.dtype)
        return jnp.where(ts == start, 0, uniform * (left + right) - left)
