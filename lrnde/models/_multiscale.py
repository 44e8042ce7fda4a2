"""A neural ODE of images at two resolutions."""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, Real

from .._random import draw
from .._regularizers import Regularizers
from ._convolutional import BatchNorm, Conv
from ._layers import Linear
from ._node import make_prediction, NeuralODE, Prediction

# Standard deviation of the initial kernels, and the rate of the dropout.
_DEVIATION = 0.01
_DROPOUT = 0.2


class Scales(NamedTuple):
    """Images at two resolutions: the state of the differential equation."""

    fine: Float[Array, "batch height width channels"]
    coarse: Float[Array, "batch height2 width2 channels"]


class Injection(NamedTuple):
    """What the vector field is given besides the state; the same in a whole solve.

    - `image`: The embedded images, added on the fine branch.
    - `masks`: What the dropout multiplies either branch with, the same at each
        evaluation of a solve (variational dropout); `None` without dropout.
    """

    image: Float[Array, "batch height width channels"]
    masks: Scales | None


def _conv(inputs, outputs, size=3, *, stride=1, bias=False, key):
    deviation = _DEVIATION
    return Conv(
        inputs, outputs, size, stride=stride, bias=bias, deviation=deviation, key=key
    )


class ConvNorm(eqx.Module):
    """A convolution, then a `BatchNorm`."""

    conv: Conv
    norm: BatchNorm

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        bias: bool = False,
        key: PRNGKeyArray,
    ):
        self.conv = _conv(inputs, outputs, size, stride=stride, bias=bias, key=key)
        self.norm = BatchNorm(outputs)

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch height2 width2 outputs"]:
        return self.norm(self.conv(x))


class Branch(eqx.Module):
    """The part of the vector field that stays at one resolution.

    With convolutions $C$, batch norms $N$, the injection $x$ and the dropout $\\delta$:
    $h = C_2 \\, \\mathrm{relu}(N_1 C_1 u)$ and $y = N_2 (\\delta h + x)$ give
    $N_3 \\, \\mathrm{relu}(y + h)$.
    """

    widen: ConvNorm
    narrow: Conv
    inner: BatchNorm
    outer: BatchNorm

    def __init__(self, channels: int, hidden: int, *, key: PRNGKeyArray):
        first, second = jr.split(key)
        self.widen = ConvNorm(channels, hidden, key=first)
        self.narrow = _conv(hidden, channels, key=second)
        self.inner, self.outer = BatchNorm(channels), BatchNorm(channels)

    def __call__(self, u, injection, mask):
        h = self.narrow(jax.nn.relu(self.widen(u)))
        y = self.inner((h if mask is None else mask * h) + injection)
        return self.outer(jax.nn.relu(y + h))


class MultiScaleField(eqx.Module):
    """An autonomous vector field on two resolutions that are fused at the end.

    A `Branch` at each; then each gets the other's result, brought to its resolution by
    a convolution, a batch norm and a relu (with stride 2 downwards, by repeating pixels
    upwards); their sum goes through a 1x1 convolution, a relu and a batch norm.
    """

    branches: tuple[Branch, Branch]
    down: ConvNorm
    up: ConvNorm
    merge: tuple[Conv, Conv]
    norms: tuple[BatchNorm, BatchNorm]

    def __init__(self, channels: int, hidden: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 6)
        self.branches = tuple(Branch(channels, hidden, key=k) for k in keys[:2])
        self.down = ConvNorm(channels, channels, stride=2, key=keys[2])
        self.up = ConvNorm(channels, channels, key=keys[3])
        self.merge = tuple(_conv(channels, channels, 1, key=k) for k in keys[4:])
        self.norms = BatchNorm(channels), BatchNorm(channels)

    def __call__(self, t: Real[Array, ""], u: Scales, args: Injection) -> Scales:
        masks = args.masks or Scales(None, None)
        fine = self.branches[0](u.fine, args.image, masks.fine)
        coarse = self.branches[1](u.coarse, 0.0, masks.coarse)
        to_coarse = jax.nn.relu(self.down(fine))
        to_fine = _twice_as_large(jax.nn.relu(self.up(coarse)))
        sums = fine + to_fine, coarse + to_coarse
        return Scales(
            *(
                norm(jax.nn.relu(conv(x)))
                for norm, conv, x in zip(self.norms, self.merge, sums, strict=True)
            )
        )


def _twice_as_large(x):
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class Bottleneck(eqx.Module):
    """Three convolutions, narrow in the middle, beside a 1x1 convolution."""

    layers: tuple[ConvNorm, ConvNorm, ConvNorm]
    shortcut: ConvNorm

    def __init__(self, inputs: int, middle: int, outputs: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 4)
        self.layers = (
            ConvNorm(inputs, middle, 1, key=keys[0]),
            ConvNorm(middle, middle, key=keys[1]),
            ConvNorm(middle, outputs, 1, key=keys[2]),
        )
        self.shortcut = ConvNorm(inputs, outputs, 1, key=keys[3])

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch height width outputs"]:
        first, second, third = self.layers
        y = third(jax.nn.relu(second(jax.nn.relu(first(x)))))
        return jax.nn.relu(y + self.shortcut(x))


class MultiScaleODEClassifier(eqx.Module):
    """A neural ODE at two resolutions, the multi-scale model of Pal et al. (2023).

    An embedding of two convolutions gives the fine state and is injected into the
    vector field; the coarse state starts at zero. After a solve from time 0 to 1 both
    states are widened, the fine one is brought to the resolution of the coarse one and
    added, and the classes are read off the mean over all pixels. A batch is one state.

    **Arguments:**

    - `image_shape`: Rows, columns and channels of an image; rows and columns are even.
    - `channels`: Channels of either state.
    - `hidden`: Channels inside a branch.
    - `classes`: Number of classes.
    - `solver`, `tolerance`, `adjoint`: As for `NeuralODE`, but with checkpointing where
        no adjoint is given, since a tape of images takes much memory.
    - `key`: A `jax.random.key` for the initial parameters.

    **Raises:**

    - `ValueError` if a side of the images is odd.
    """

    embedding: tuple[ConvNorm, ConvNorm]
    ode: NeuralODE
    heads: tuple[Bottleneck, Bottleneck]
    down: ConvNorm
    widen: ConvNorm
    readout: Linear
    image_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: int = 24,
        hidden: int = 120,
        classes: int = 10,
        *,
        solver: diffrax.AbstractSolver,
        tolerance: float,
        adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),  # noqa: B008
        key: PRNGKeyArray,
    ):
        if image_shape[0] % 2 or image_shape[1] % 2:
            raise ValueError(
                f"image_shape={image_shape}: the coarse state has half as many rows "
                "and columns, so both have to be even."
            )
        keys = jr.split(key, 8)
        self.embedding = (
            ConvNorm(image_shape[2], channels, key=keys[0]),
            ConvNorm(channels, channels, key=keys[1]),
        )
        vector_field = MultiScaleField(channels, hidden, key=keys[2])
        self.ode = NeuralODE(vector_field, solver, tolerance, adjoint)
        self.heads = (
            Bottleneck(channels, 8, 32, key=keys[3]),
            Bottleneck(channels, 16, 64, key=keys[4]),
        )
        # The batch norms cancel these biases; the published number of parameters has
        # them.
        self.down = ConvNorm(32, 64, stride=2, bias=True, key=keys[5])
        self.widen = ConvNorm(64, 200, 1, bias=True, key=keys[6])
        self.readout = Linear(200, classes, key=keys[7])
        self.image_shape = image_shape

    def embed(self, x: Float[Array, "batch pixels"]) -> Scales:
        """The initial states of a batch of flattened images.

        The fine one is also what is injected.
        """
        x = x.reshape(len(x), *self.image_shape)
        for layer in self.embedding:
            x = jax.nn.relu(layer(x))
        return Scales(x, jnp.zeros_like(x[:, ::2, ::2]))

    def __call__(
        self,
        x: Float[Array, "batch pixels"],
        *,
        regularizer: Regularizers = None,
        key: PRNGKeyArray | None = None,
        max_steps: int = 4096,
    ) -> Prediction:
        """Classifies a batch of flattened images.

        **Arguments:**

        - `x`: Inputs, a row an example.
        - `regularizer`: As for `lrnde.diffeqsolve`.
        - `key`: A `jax.random.key` for the dropout and for the step that is measured.
            Without it nothing is dropped.
        - `max_steps`: Steps after which the solve gives up, which `successful` tells.

        **Returns:**

        A `Prediction`.
        """
        y0 = self.embed(x)
        masks, sample = None, None
        if key is not None:
            drop, sample = jr.split(key)
            masks = _dropout(drop, y0)
        sol, penalty = self.ode.solve(
            y0,
            Injection(y0.fine, masks),
            regularizer=regularizer,
            key=sample,
            max_steps=max_steps,
        )
        final = jax.tree.map(lambda ys: ys[0], sol.ys)
        wide = [head(u) for head, u in zip(self.heads, final, strict=True)]
        merged = jax.nn.relu(self.down(wide[0])) + wide[1]
        merged = jax.nn.relu(self.widen(merged)).mean(axis=(1, 2))
        return make_prediction(self.readout(merged), sol, penalty)


def _dropout(key: PRNGKeyArray, like: Scales) -> Scales:
    """Masks that keep an entry, larger in turn, or make it zero."""
    keys = Scales(*jr.split(key))
    return jax.tree.map(
        lambda key, x: (
            draw(jr.bernoulli, key, x.shape, p=1 - _DROPOUT) / (1 - _DROPOUT)
        ),
        keys,
        like,
    )
