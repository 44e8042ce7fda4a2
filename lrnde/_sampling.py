"""A step size controller that watches the steps of a solve and keeps some of them."""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Real

SAMPLINGS = ("unbiased", "biased", "error")

# A step replaces the sample with the probability of its share in the weight so far, so
# equal weights replace it about log(number of steps) times. More than 64 times has
# probability below 1e-20 for 100,000 such steps, and below 1e-9 for 300 steps whose
# lengths grow over twelve decades. Past that the last draw is used again.
_MAX_REPLACEMENTS = 64


class Step(NamedTuple):
    """One step of a solver: it leads from the state `y0` at `t0` to `t1`."""

    t0: Real[Array, ""]
    t1: Real[Array, ""]
    y0: PyTree[Array]


class Reservoir(NamedTuple):
    """A weighted reservoir of size one, in constant memory.

    `length` is the length of all steps so far, `total` their weight.

    `slots` holds two `Step`s along a leading axis: row 0 is the sample, row 1 takes
    the writes of the steps that are not chosen. (Writing always, to one place or the
    other, keeps the update in place; selecting between old and new would copy.)
    """

    slots: Step
    length: Float[Array, ""]
    total: Float[Array, ""]
    threshold: Float[Array, ""]
    replacements: Int[Array, ""]


class ControllerState(NamedTuple):
    inner: PyTree
    first_stages: Int[Array, ""]
    evaluate_first_stage: Bool[Array, ""]
    # `None` for none: an empty tuple has no leaf that diffrax could replace.
    reservoirs: tuple[Reservoir, ...] | None


def scaled_error(
    controller: diffrax.AbstractAdaptiveStepSizeController,
    y0: PyTree[Array],
    y1: PyTree[Array],
    y_error: PyTree[Array],
) -> Real[Array, ""]:
    """The error of a step in units of the tolerance.

    $E = \\| e / (\\mathrm{atol} + \\mathrm{rtol} \\max(|y_0|, |y_1|)) \\|$, with the
    tolerances and the norm (by default the root mean square over every entry of the
    state) of the step size controller. A step is accepted when $E < 1$. The chapter
    "Adaptive solvers and their error estimates" derives it.

    **Arguments:**

    - `controller`: An adaptive step size controller.
    - `y0`: The state at the start of the step.
    - `y1`: The state at its end.
    - `y_error`: The embedded error estimate, of the same structure as the state.

    **Returns:**

    A real scalar.
    """

    def scale(a, b, error):
        size = jnp.maximum(jnp.abs(a), jnp.abs(b))
        return error / (controller.atol + controller.rtol * size)

    return controller.norm(jtu.tree_map(scale, y0, y1, y_error))


def _init_reservoir(t0, y0) -> Reservoir:
    empty = lax.stop_gradient(Step(t0, t0, y0))
    dtype = jnp.result_type(t0)
    return Reservoir(
        slots=jtu.tree_map(lambda x: jnp.stack([x, x]), empty),
        length=jnp.zeros((), dtype),
        total=jnp.zeros((), dtype),
        threshold=jnp.zeros((), dtype),
        replacements=jnp.zeros((), jnp.int32),
    )


def _offer(reservoir: Reservoir, step: Step, weight, keep_step, uniforms) -> Reservoir:
    # After a replacement at total weight W the sample must survive until the total is
    # W' with probability W / W'. So draw one uniform number u per replacement, not one
    # per step: the next step to enter is the first one to lift the total to W / u.
    # See Efraimidis and Spirakis (2006), the "exponential jumps", for a reservoir of
    # size one.
    total = reservoir.total + jnp.where(keep_step, weight, 0)
    replace = keep_step & (total >= reservoir.threshold)
    slot = jnp.where(replace, 0, 1)
    draw = uniforms[jnp.minimum(reservoir.replacements, _MAX_REPLACEMENTS - 1)]
    return Reservoir(
        # The sample is data: gradients reach the parameters through the step that is
        # taken from it after the solve, never through the solve itself.
        slots=jtu.tree_map(
            lambda x, xs: xs.at[slot].set(lax.stop_gradient(x)), step, reservoir.slots
        ),
        length=reservoir.length + jnp.where(keep_step, step.t1 - step.t0, 0),
        total=total,
        threshold=jnp.where(replace, total / draw, reservoir.threshold),
        replacements=reservoir.replacements + replace.astype(jnp.int32),
    )


class StepSampler(diffrax.AbstractAdaptiveStepSizeController):
    """Wraps an adaptive step size controller; the steps taken stay the same.

    Counts how often the first stage of a step is evaluated (which a solver with the
    first-same-as-last property skips unless the step before was a jump or there is
    none), and keeps one accepted step in each of its reservoirs, chosen with
    probability proportional to its length ("unbiased"), with equal probability
    ("biased") or in proportion to its scaled error ("error").

    **Arguments:**

    - `controller`: The step size controller to wrap.
    - `samplings`: How to weigh the steps, for each reservoir.
    - `uniforms`: Uniform random numbers in [0, 1) for each reservoir, one for each
        replacement.
    - `evaluate_first_stage`: Whether the first step evaluates its first stage.
    """

    controller: diffrax.AbstractAdaptiveStepSizeController
    samplings: tuple[str, ...] = eqx.field(static=True)
    uniforms: tuple[Float[Array, " replacements"], ...]
    evaluate_first_stage: Bool[Array, ""]
    wrapped: bool = eqx.field(static=True, default=False)

    @property
    def rtol(self):
        return self.controller.rtol

    @property
    def atol(self):
        return self.controller.atol

    @property
    def norm(self):
        return self.controller.norm

    def wrap(self, direction):
        controller = self.controller.wrap(direction)
        # `diffrax.BacksolveAdjoint` wraps the controller again for its backward solve,
        # of whose steps nobody wants a sample: hand back the plain controller.
        if self.wrapped:
            return controller
        return StepSampler(
            controller, self.samplings, self.uniforms, self.evaluate_first_stage, True
        )

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        tnext, inner = self.controller.init(
            terms, t0, t1, y0, dt0, args, func, error_order
        )
        return tnext, self.init_state(inner, t0, y0)

    def init_state(self, inner: PyTree, t0, y0) -> ControllerState:
        reservoirs = tuple(_init_reservoir(t0, y0) for _ in self.samplings) or None
        first_stages = jnp.zeros((), jnp.int32)
        return ControllerState(
            inner, first_stages, self.evaluate_first_stage, reservoirs
        )

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, order, state):
        if y_error is None:
            raise ValueError(
                "This solver has no embedded error estimate, so its step size cannot "
                "be adapted. Use a solver that has one, such as `diffrax.Tsit5()`, or "
                "wrap yours in `diffrax.HalfSolver`."
            )
        error = scaled_error(self, y0, y1_candidate, y_error)
        error = lax.stop_gradient(jnp.where(jnp.isnan(error), jnp.inf, error))
        controller, ys = _given_the_error(
            self.controller, error, (y0, y1_candidate, y_error)
        )
        keep_step, tprev, tnext, made_jump, inner, result = controller.adapt_step_size(
            t0, t1, ys[0], ys[1], args, ys[2], order, state.inner
        )
        step = Step(t0, t1, y0)
        reservoirs = tuple(
            _offer(reservoir, step, _weight(sampling, step, error), keep_step, uniforms)
            for reservoir, sampling, uniforms in zip(
                state.reservoirs or (), self.samplings, self.uniforms, strict=True
            )
        )
        evaluated = state.evaluate_first_stage
        new_state = ControllerState(
            inner,
            state.first_stages + evaluated.astype(jnp.int32),
            jnp.where(keep_step, made_jump, evaluated),
            reservoirs or None,
        )
        return keep_step, tprev, tnext, made_jump, new_state, result


def _weight(sampling: str, step: Step, error):
    if sampling == "unbiased":
        return step.t1 - step.t0
    if sampling == "biased":
        return jnp.ones_like(step.t0)
    return error.astype(step.t0.dtype)


def _given_the_error(controller, error, ys):
    """A controller that takes the same decision from the scaled error alone.

    A `diffrax.PIDController` looks at the states and the error estimate only through
    the scaled error. Computed here, in one go, it saves several passes over the state.
    """

    def is_pid(x):
        return type(x) is diffrax.PIDController

    def replace(x):
        if not is_pid(x):
            return x
        return eqx.tree_at(lambda c: (c.rtol, c.atol, c.norm), x, (0.0, 1.0, jnp.abs))

    inner = controller
    while isinstance(inner, diffrax.ClipStepSizeController):
        inner = inner.controller
    if not is_pid(inner):
        return controller, ys
    controller = jtu.tree_map(replace, controller, is_leaf=is_pid)
    return controller, (jnp.zeros_like(error), jnp.zeros_like(error), error)


def draw_uniforms(key: PRNGKeyArray, dtype) -> Float[Array, " replacements"]:
    """The random numbers that one reservoir needs for one solve."""
    return jr.uniform(key, (_MAX_REPLACEMENTS,), dtype)
