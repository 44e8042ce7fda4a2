"""Adjoints: what backpropagation keeps of a solve."""

import functools as ft

import diffrax
import equinox as eqx
import equinox.internal as eqxi
from diffrax._heuristics import is_unsafe_sde
from jax import lax

from ._brownian import RememberingSolver
from ._sampling import ControllerState
from ._tape import taped_while_loop


class TapeAdjoint(diffrax.AbstractAdjoint):
    """Backpropagates through the solver from a tape, without computing anything again.

    Discretise-then-optimise, as `diffrax.RecursiveCheckpointAdjoint`, with the same
    gradient. That adjoint stores states and takes each step again on the way back, once
    or several times; this one stores what the derivative of each step needs, and is
    faster for it. The price is memory: a row of the tape holds about one state for each
    stage of the solver, and the hidden layers of the vector field besides.

    The tape has `min(rows, max_steps)` rows. A solve with more steps than rows goes in
    stretches of so many; it stores the state at the start of each, and takes the steps
    of all stretches but the last once more on the way back. `max_steps` should be near
    what the solve needs, since all of this memory is set aside beforehand.

    **Arguments:**

    - `rows`: Steps that the tape holds.

    **Raises:**

    - `ValueError` if `rows` is not positive, or the term has an `UnsafeBrownianPath`.
    - `RuntimeError` if a solve with `max_steps=None` is differentiated.
    """

    rows: int = 64

    def __check_init__(self):
        if self.rows < 1:
            raise ValueError(f"rows={self.rows}: a tape has at least one row.")

    def loop(
        self,
        *,
        terms,
        solver,
        max_steps,
        throw,
        passed_solver_state,
        passed_controller_state,
        **kwargs,
    ):
        if is_unsafe_sde(terms):
            raise ValueError(
                "`TapeAdjoint` does not support `UnsafeBrownianPath`. Use "
                "`diffrax.VirtualBrownianTree`, or `adjoint=diffrax.ForwardMode()`."
            )
        del throw, passed_solver_state, passed_controller_state
        if max_steps is None:
            # No tape can be set aside: a solve without a derivative.
            outer_while_loop = ft.partial(eqxi.while_loop, kind="lax")
            inner_while_loop = outer_while_loop
        else:
            outer_while_loop = ft.partial(taped_while_loop, rows=self.rows)
            inner_while_loop = ft.partial(eqxi.while_loop, kind="checkpointed")
        final_state = self._loop(
            terms=terms,
            solver=solver,
            max_steps=max_steps,
            inner_while_loop=inner_while_loop,
            outer_while_loop=_between_steps(outer_while_loop, solver),
            **kwargs,
        )
        # The only part of the state whose derivative is an error.
        shown = lambda final: final[0].progress_meter_state  # noqa: E731
        final_state = eqx.tree_at(
            shown,
            final_state,
            lax.stop_gradient(shown(final_state)),
            is_leaf=lambda x: x is None,
        )
        if max_steps is None:
            final_state = eqxi.nondifferentiable_backward(
                final_state,
                msg="`TapeAdjoint` cannot backpropagate through a solve with "
                "`max_steps=None`: bound the number of steps.",
                symbolic=True,
            )
        return final_state


class CheckpointAdjoint(diffrax.RecursiveCheckpointAdjoint):
    """`diffrax.RecursiveCheckpointAdjoint` that knows of samples and remembered noise.

    It leaves the sample out of what is stored.
    """

    @property
    def _loop(self):
        loop = super()._loop

        def aware_loop(*, solver, outer_while_loop, **kwargs):
            outer_while_loop = _between_steps(outer_while_loop, solver)
            return loop(solver=solver, outer_while_loop=outer_while_loop, **kwargs)

        return aware_loop


def _between_steps(while_loop, solver):
    """A while loop over steps that does what has to be done between two of them.

    A `RememberingSolver` draws the noise of the next step. The sampled step is taken
    for a buffer: what is stored of a loop, at a checkpoint or at the start of a
    stretch, is all that it carries except buffers, and the backward pass never reads
    the sample.
    """
    remembering = isinstance(solver, RememberingSolver)

    def wrapped(cond_fun, body_fun, init_val, *, max_steps, buffers):
        sampler = init_val.controller_state
        sampling = isinstance(sampler, ControllerState) and bool(sampler.reservoirs)

        def body(state):
            new = body_fun(state)
            return solver.go_on(state, new) if remembering else new

        def all_buffers(state):
            if not sampling:
                return buffers(state)
            slots = [x.slots for x in state.controller_state.reservoirs]
            noise = state.solver_state[1].samples if remembering else ()
            return [*buffers(state), *slots, *noise]

        return while_loop(
            cond_fun, body, init_val, max_steps=max_steps, buffers=all_buffers
        )

    return wrapped


class SteadyStateAdjoint(diffrax.ImplicitAdjoint):
    """`diffrax.ImplicitAdjoint` that does not mind the sampler's state being saved.

    It insists on `SaveAt(t1=True)` alone, though any state that is not part of the
    solution has no derivative anyway.
    """

    def loop(self, *, saveat, **kwargs):
        saveat = eqx.tree_at(lambda s: s.controller_state, saveat, False)
        return super().loop(saveat=saveat, **kwargs)
