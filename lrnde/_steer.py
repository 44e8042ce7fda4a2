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
    same.

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
        moved, ends = [], []
        for sub, sub_key in zip(subs, jr.split(key, len(subs)), strict=True):
            if sub.ts is not None:
                ts = sub.ts.astype(t1.dtype) * direction
                new = ts + self._shifts(sub_key, ts, start)
                ends.append(jnp.where(ts[-1] == end, new[-1], end))
                sub = eqx.tree_at(lambda s: s.ts, sub, new * direction)
            moved.append(sub)
        last = jnp.max(jnp.stack(ends)) * direction
        subs = jtu.tree_unflatten(tree, moved)
        return last, eqx.tree_at(lambda s: s.subs, saveat, subs)

    def _shifts(self, key, ts, start):
        # The last time has as much room after it as before it.
        before = jnp.concatenate([start[None], ts[:-1]])
        after = jnp.concatenate([ts[1:], 2 * ts[-1:] - before[-1:]])
        left = jnp.minimum((ts - before) / 2, self.width)
        right = jnp.minimum((after - ts) / 2, self.width)
        uniform = jr.uniform(key, ts.shape, ts.dtype)
        return jnp.where(ts == start, 0, uniform * (left + right) - left)
