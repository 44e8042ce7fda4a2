"""A while loop that keeps a tape, so that its derivative recomputes nothing.

Checkpointing stores states and runs the loop's body again on the way back: forward,
once more, and the two products of the chain rule come to four passes through the
arithmetic, and to more where room for states is scarce. A tape stores what the
derivative of each iteration needs; then three passes suffice, as for `jax.lax.scan`,
while the number of iterations stays open.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from equinox.internal._loop.common import common_rewrite
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, Literal, no_effects
from jaxtyping import Array, Int, PyTree


def taped_while_loop(
    cond_fun: Callable[[PyTree], Any],
    body_fun: Callable[[PyTree], PyTree],
    init_val: PyTree,
    *,
    max_steps: int,
    buffers: Callable[[PyTree], Any] | None,
    rows: int,
) -> PyTree:
    """A while loop with a reverse-mode derivative.

    **Arguments:**

    - `cond_fun`, `body_fun`, `init_val`, `max_steps`, `buffers`: As for
        `equinox.internal.while_loop`.
    - `rows`: How many iterations the tape holds. A longer loop goes in stretches of
        that many; it stores its value at the start of each, and runs all of them but
        the last once more on the way back.

    **Returns:**

    The final value.
    """
    if max_steps == 0:
        return init_val
    cond_fun, body_fun, init_val, buffers = common_rewrite(
        cond_fun, body_fun, init_val, max_steps, buffers, makes_false_steps=False
    )
    cond_fun = eqx.filter_closure_convert(cond_fun, init_val)
    cond_fun = jtu.tree_map(
        lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x, cond_fun
    )
    body_fun = eqx.filter_closure_convert(body_fun, init_val)
    rows = min(rows, max_steps)
    stretches = -(-max_steps // rows)
    arguments = cond_fun, buffers, rows, stretches, _Splits()
    final_val = _loop((body_fun, init_val), *arguments)
    # `common_rewrite` puts a counter and flags of its own before the value.
    return final_val[-1]


@eqx.filter_custom_vjp
def _loop(vjp_arg, cond_fun, buffers, rows, stretches, splits):
    del buffers, rows, stretches, splits
    body_fun, val = vjp_arg
    return lax.while_loop(lambda val: cond_fun(val), lambda val: body_fun(val), val)


class _Saved(NamedTuple):
    """What the forward pass leaves for the backward pass.

    - `tape`: The residuals of the last stretch, an iteration a row, and then empty
        arrays.
    - `used`: Rows of the tape in use.
    - `starts`: The value at the start of each stretch, buffers left out.
    - `count`: Stretches in use.
    - `final_val`: The final value, wanted for its buffers.
    """

    tape: list[Array]
    used: Int[Array, ""]
    starts: PyTree[Array]
    count: Int[Array, ""]
    final_val: PyTree[Array]


@_loop.def_fwd
def _forward(perturbed, vjp_arg, cond_fun, buffers, rows, stretches, splits):
    body_fun, val = vjp_arg
    body = splits.make(body_fun, val, perturbed)
    tape = _empty_tape(rows, body.columns)
    starts, count = None, jnp.array(1)
    if stretches == 1:
        val, tape, used = _run(body, body_fun, cond_fun, val, tape)
    else:

        def next_stretch(carry):
            val, tape, _, starts, count = carry
            starts = _write(starts, count, _without(buffers, val))
            return *_run(body, body_fun, cond_fun, val, tape), starts, count + 1

        starts = jtu.tree_map(
            lambda x: jnp.zeros((stretches, *x.shape), x.dtype), _without(buffers, val)
        )
        zero = jnp.array(0)
        val, tape, used, starts, count = lax.while_loop(
            lambda carry: cond_fun(carry[0]),
            next_stretch,
            (val, tape, zero, starts, zero),
        )
    return val, _Saved(splits.padded(tape), used, starts, count, val)


def _empty_tape(rows: int, columns) -> list[Array]:
    # What is in it does not matter; but equal arrays the compiler would make once and
    # copy, which takes twice as long as filling each.
    inexact = [jnp.issubdtype(x.dtype, jnp.inexact) for x in columns]
    return [
        lax.full((rows, *x.shape), fill if inexact[fill] else 0, x.dtype)
        for fill, x in enumerate(columns)
    ]


def _run(body: "_Body", body_fun, cond_fun, val, tape):
    """Goes on until the loop ends or the tape is full; returns the rows used, too."""
    rows = len(tape[0]) if tape else jnp.iinfo(jnp.int32).max

    def next_row(carry):
        val, tape, row = carry
        val, residuals = body.forward(body_fun, val)
        return val, _write(tape, row, residuals), row + 1

    return lax.while_loop(
        lambda carry: cond_fun(carry[0]) & (carry[2] < rows),
        next_row,
        (val, tape, jnp.array(0)),
    )


@_loop.def_bwd
def _backward(
    saved, grad_val, perturbed, vjp_arg, cond_fun, buffers, rows, stretches, splits
):
    body_fun, _ = vjp_arg
    body = splits.found(perturbed)
    invariants = body.invariants(body_fun)
    tape, used, starts, count, final_val = saved
    tape = tape[: len(body.columns)]
    grad_body = jtu.tree_map(_zeros, body_fun, perturbed[0])
    grad_val = jtu.tree_map(
        lambda wanted, x, grad: _zeros(x, wanted) if grad is None else grad,
        body.active,
        final_val,
        eqx.filter(grad_val, body.active),
        is_leaf=_is_none,
    )

    def unwind(grads, tape, used):
        def previous_row(carry):
            (grad_body, grad_val), row = carry
            residuals = [lax.dynamic_index_in_dim(x, row, keepdims=False) for x in tape]
            update, grad_val = body.backward(residuals, invariants, grad_val)
            return (jtu.tree_map(jnp.add, grad_body, update), grad_val), row - 1

        return lax.while_loop(
            lambda carry: carry[1] >= 0, previous_row, (grads, used - 1)
        )[0]

    def previous_stretch(carry):
        grads, tape, stretch = carry
        start = jtu.tree_map(
            lambda x: lax.dynamic_index_in_dim(x, stretch, keepdims=False), starts
        )
        val = _with(buffers, start, final_val)
        _, tape, used = _run(body, body_fun, cond_fun, val, tape)
        return unwind(grads, tape, used), tape, stretch - 1

    grads = unwind((grad_body, grad_val), tape, used)
    if stretches > 1:
        grads, *_ = lax.while_loop(
            lambda carry: carry[2] >= 0, previous_stretch, (grads, tape, count - 2)
        )
    grad_body, grad_val = grads
    return grad_body, jtu.tree_map(
        lambda wanted, grad: grad if wanted else None,
        perturbed[1],
        grad_val,
        is_leaf=_is_none,
    )


def _zeros(x, wanted):
    return jnp.zeros_like(x) if wanted else None


def _write(trees: PyTree[Array], index, tree: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(
        lambda xs, x: lax.dynamic_update_index_in_dim(xs, x, index, axis=0), trees, tree
    )


def _is_none(x) -> bool:
    return x is None


def _without(buffers, val):
    return eqx.tree_at(buffers(None), val, replace_fn=lambda _: None)


def _with(buffers, val, source):
    where = buffers(_is_none)
    return eqx.tree_at(where, val, where(source), is_leaf=_is_none)


class _Body(NamedTuple):
    """The body of a loop, split into a forward and a backward half.

    - `forward`: From (body, value) to the new value and a row of residuals.
    - `invariants`: From the body to the residuals that do not depend on the value.
    - `backward`: From a row, the invariants and the gradient of the new value to the
        gradients of the body and of the value.
    - `active`: Which leaves of the value carry a derivative.
    - `columns`: Shapes and dtypes of a row.
    """

    forward: Callable[..., tuple[PyTree, list[Array]]]
    invariants: Callable[..., list[Any]]
    backward: Callable[..., tuple[PyTree, PyTree]]
    active: PyTree[bool]
    columns: list[Any]


class _Splits:
    """The halves of one loop's body, for each set of inputs that carry a derivative.

    JAX keeps the forward pass of each such set, but the structure of what it saves of
    the last one only (as of jax 0.10). Where a solve is differentiated in several ways,
    `jax.checkpoint` may then read what one has saved with the structure of another. So
    the structure has to be the same for all: the tape is filled up with empty arrays,
    to a length with room for more than the first of them needs. (If a later one needs
    more than that, it is saved all the same, and `jax.checkpoint` may fail.)
    """

    def __init__(self):
        self._bodies = {}
        self._length = 0

    def padded(self, tape: list[Array]) -> list[Array]:
        return [*tape, *[jnp.zeros(0)] * (self._length - len(tape))]

    def make(self, body_fun, val, perturbed) -> _Body:
        body = _split(body_fun, val, *perturbed)
        if not self._bodies:
            # The bodies that we counted left 0.4 residuals an operation at most; a
            # derivative of somebody's own may leave any number.
            operations = _operations(_jaxpr_of(body_fun, val))
            self._length = 2 * max(operations, len(body.columns))
        return self._bodies.setdefault(self._key(perturbed), body)

    def found(self, perturbed) -> _Body:
        return self._bodies[self._key(perturbed)]

    @staticmethod
    def _key(perturbed) -> tuple[bool, ...]:
        return tuple(map(bool, jtu.tree_leaves(perturbed)))


def _split(body_fun, val, perturbed_body, perturbed_val) -> _Body:
    active = _activity(body_fun, val, perturbed_body, perturbed_val)
    (body_leaves, val_leaves), restore = _flatten(body_fun, val)
    vjp_tree = None

    def linearized(*leaves):
        nonlocal vjp_tree
        diff, rest = eqx.partition(restore(leaves), (perturbed_body, active))

        def call(diff):
            body_fun, val = eqx.combine(diff, rest)
            return eqx.partition(body_fun(val), active)

        out, vjp, rest_out = jax.vjp(call, diff, has_aux=True)
        residuals, vjp_tree = jtu.tree_flatten(vjp)
        return jtu.tree_leaves(eqx.combine(out, rest_out)), residuals

    closed = jax.make_jaxpr(linearized)(*body_leaves, *val_leaves)
    jaxpr, num_val = closed.jaxpr, len(val_leaves)
    constant, changing = jaxpr.invars[:-num_val], jaxpr.invars[-num_val:]
    varying = set(changing)
    fixed_eqns = []
    for eqn in jaxpr.eqns:
        if eqn.effects or any(_is_in(varying, x) for x in eqn.invars):
            varying.update(eqn.outvars)
        else:
            fixed_eqns.append(eqn)
    residuals = jaxpr.outvars[num_val:]
    # The same array may be several residuals: the tape has it once.
    columns = list(dict.fromkeys(x for x in residuals if _is_in(varying, x)))
    fixed = [x for x in residuals if not _is_in(varying, x)]
    places = {x: place for place, x in enumerate(columns)}
    run = jaxpr_as_fun(
        ClosedJaxpr(
            jaxpr.replace(outvars=[*jaxpr.outvars[:num_val], *columns]), closed.consts
        )
    )
    run_fixed = jaxpr_as_fun(
        ClosedJaxpr(
            jaxpr.replace(
                invars=constant, outvars=fixed, eqns=fixed_eqns, effects=no_effects
            ),
            closed.consts,
        )
    )
    val_tree = jtu.tree_structure(val)
    # On the way back an array may be another kind of number: so it goes by its place.
    arrays = jtu.tree_map(eqx.is_array, (body_fun, val))

    def forward(body_fun, val):
        out = run(*jtu.tree_leaves(eqx.filter((body_fun, val), arrays)))
        return jtu.tree_unflatten(val_tree, out[:num_val]), out[num_val:]

    def invariants(body_fun):
        return run_fixed(*jtu.tree_leaves(eqx.filter(body_fun, arrays[0])))

    def backward(row, invariants, grad_val):
        invariants = iter(invariants)
        leaves = [
            row[places[x]] if _is_in(varying, x) else next(invariants)
            for x in residuals
        ]
        ((grad_body, grad_val),) = jtu.tree_unflatten(vjp_tree, leaves)(grad_val)
        return grad_body, grad_val

    avals = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in columns]
    return _Body(forward, invariants, backward, active, avals)


def _jaxpr_of(body_fun, val) -> Jaxpr:
    (body_leaves, val_leaves), restore = _flatten(body_fun, val)

    def body(*leaves):
        body_fun, val = restore(leaves)
        return eqx.filter(body_fun(val), eqx.is_array)

    return jax.make_jaxpr(body)(*body_leaves, *val_leaves).jaxpr


def _operations(jaxpr: Jaxpr) -> int:
    parts = [
        getattr(x, "jaxpr", x)
        for eqn in jaxpr.eqns
        for x in jtu.tree_leaves(list(eqn.params.values()))
    ]
    inner = (_operations(x) for x in parts if isinstance(x, Jaxpr))
    return len(jaxpr.eqns) + sum(inner)


def _is_in(variables: set, x) -> bool:
    return not isinstance(x, Literal) and x in variables


def _flatten(body_fun, val):
    arrays, static = eqx.partition((body_fun, val), eqx.is_array)
    leaves, tree = jtu.tree_flatten(arrays)
    num_body = len(jtu.tree_leaves(arrays[0]))

    def restore(leaves):
        return eqx.combine(jtu.tree_unflatten(tree, leaves), static)

    return (leaves[:num_body], leaves[num_body:]), restore


def _activity(body_fun, val, perturbed_body, active) -> PyTree[bool]:
    """Which leaves of the value carry a derivative, at some iteration or other."""
    while True:
        changed = _propagate(body_fun, val, perturbed_body, active)
        wider = jtu.tree_map(lambda a, b: a or b, active, changed)
        if wider == active:
            return active
        active = wider


def _propagate(body_fun, val, perturbed_body, active) -> PyTree[bool]:
    """Which leaves of the new value have a tangent, given those of the old."""
    has_tangent = None

    @jax.custom_jvp
    def watch(out):
        return out

    def watch_jvp(primals, tangents):
        nonlocal has_tangent
        has_tangent = jtu.tree_map(
            lambda x: not isinstance(x, SymbolicZero),
            tangents[0],
            is_leaf=lambda x: isinstance(x, SymbolicZero),
        )
        return primals[0], tangents[0]

    watch.defjvp(watch_jvp, symbolic_zeros=True)
    diff, rest = eqx.partition((body_fun, val), (perturbed_body, active))

    def call(diff):
        body_fun, val = eqx.combine(diff, rest)
        out, rest_out = eqx.partition(body_fun(val), eqx.is_inexact_array)
        return eqx.combine(watch(out), rest_out)

    jax.eval_shape(lambda diff: jax.linearize(call, diff)[0], diff)
    inexact = jtu.tree_map(eqx.is_inexact_array, val)
    return jtu.tree_map(
        lambda differentiable, tangent: differentiable and tangent, inexact, has_tangent
    )
