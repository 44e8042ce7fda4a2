"""Neural ODEs of images."""

import functools
import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, Real

from .._random import draw
from .._regularizers import Regularizers
from ._layers import Linear
from ._node import make_prediction, NeuralODE, Prediction

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _convolve(x, weight, stride, padding):
    return lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=_LAYOUT,
    )


# The derivatives are written as convolutions in the layout of the convolution itself.
# Those that JAX derives have another, for which XLA on a CPU has no fast code inside a
# loop, and a solve is a loop; the chapter on CIFAR10 measures the difference.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
    x: Float[Array, "batch height width inputs"],
    weight: Float[Array, "size size inputs outputs"],
    stride: int = 1,
) -> Float[Array, "batch height2 width2 outputs"]:
    """The convolution of `Conv`, without a bias."""
    return _convolve(x, weight, stride, len(weight) // 2)


def _convolve_forward(x, weight, stride):
    return convolve(x, weight, stride), (x, weight)


def _convolve_backward(stride, residuals, cotangent):
    x, weight = residuals
    padding = len(weight) // 2
    # The cotangent of a convolution with stride one: zero where no result was taken.
    gaps = [
        (0, have - 1 - (got - 1) * stride, stride - 1)
        for have, got in zip(x.shape[1:3], cotangent.shape[1:3], strict=True)
    ]
    zero = jnp.zeros((), cotangent.dtype)
    cotangent = lax.pad(cotangent, zero, [(0, 0, 0), *gaps, (0, 0, 0)])
    turned = jnp.flip(weight, (0, 1)).swapaxes(2, 3)
    # Images take the place of channels, and what came out that of a kernel.
    gradient = _convolve(
        x.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), 1, padding
    )
    return _convolve(cotangent, turned, 1, padding), gradient.transpose(1, 2, 0, 3)


convolve.defvjp(_convolve_forward, _convolve_backward)


class Conv(eqx.Module):
    """A convolution of images with channels last; zeros beyond the border.

    The kernel's middle moves over the pixels, with a stride over every so many of them.
    Derivatives are those of reverse mode; there is no `jax.jvp`.

    **Arguments:**

    - `inputs`, `outputs`: Numbers of channels.
    - `size`: Height and width of the kernel, an odd number.
    - `stride`: Step of the kernel.
    - `bias`: Whether a bias is added.
    - `deviation`: Standard deviation of the initial kernel; `None` for Glorot uniform.
    - `key`: A `jax.random.key` for the initial kernel.

    **Raises:**

    - `ValueError` if the size is even.
    """

    weight: Float[Array, "size size inputs outputs"]
    bias: Float[Array, " outputs"] | None
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        bias: bool = True,
        deviation: float | None = None,
        key: PRNGKeyArray,
    ):
        if size % 2 == 0:
            raise ValueError(f"size={size} must be odd: a kernel has a middle.")
        self.weight = _kernel(key, (size, size, inputs, outputs), deviation)
        self.bias = jnp.zeros(outputs) if bias else None
        self.stride = stride

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch height2 width2 outputs"]:
        y = convolve(x, self.weight, self.stride)
        return y if self.bias is None else y + self.bias


def _kernel(key, shape, deviation):
    # As the initializers of `jax.nn`, but for `draw`.
    if deviation is not None:
        return draw(jax.nn.initializers.normal(deviation), key, shape)
    *window, inputs, outputs = shape
    variance = jnp.asarray(2 / (math.prod(window) * (inputs + outputs)))  # of Glorot
    return jnp.sqrt(3 * variance) * draw(jr.uniform, key, shape, minval=-1.0)


class TimeConv(eqx.Module):
    """A convolution of (image, time), the time being one more channel.

    The time is the same everywhere, so its share is the time multiplied by an image
    that does not depend on the state: the channel is never appended.
    """

    conv: Conv
    time: Float[Array, "size size 1 outputs"]

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, key: PRNGKeyArray):
        conv = Conv(inputs + 1, outputs, size, key=key)
        kernel, self.time = conv.weight[:, :, :-1], conv.weight[:, :, -1:]
        self.conv = eqx.tree_at(lambda c: c.weight, conv, kernel)

    def __call__(
        self, t: Real[Array, ""], x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch height width outputs"]:
        ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
        return self.conv(x) + t * convolve(ones, self.time)


class BatchNorm(eqx.Module):
    """Normalises each channel over the batch and the image, then scales and shifts it.

    Always by the statistics of the batch at hand, in the evaluation as well. A batch is
    one state, and a vector field may be any function of it; running statistics would
    have to be those of a whole trajectory, which changes with every training step. So
    there is no state that an evaluation could change. The price: what is made of an
    image depends on the others in its batch, though not on their order.
    """

    scale: Float[Array, " channels"]
    shift: Float[Array, " channels"]

    def __init__(self, channels: int):
        self.scale, self.shift = jnp.ones(channels), jnp.zeros(channels)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        mean = x.mean(axis=(0, 1, 2))
        variance = jnp.mean((x - mean) ** 2, axis=(0, 1, 2))
        gain = self.scale * lax.rsqrt(variance + 1e-5)
        return x * gain + (self.shift - mean * gain)


class ConvField(eqx.Module):
    """A vector field of three convolutions; the time is an input of each.

    The first two are followed by a `BatchNorm` and a gelu.
    """

    first: TimeConv
    first_norm: BatchNorm
    second: TimeConv
    second_norm: BatchNorm
    third: TimeConv

    def __init__(self, channels: int, hidden: int, *, key: PRNGKeyArray):
        keys = jr.split(key, 3)
        self.first = TimeConv(channels, hidden, key=keys[0])
        self.first_norm = BatchNorm(hidden)
        self.second = TimeConv(hidden, hidden, key=keys[1])
        self.second_norm = BatchNorm(hidden)
        self.third = TimeConv(hidden, channels, key=keys[2])

    def __call__(
        self,
        t: Real[Array, ""],
        y: Float[Array, "batch height width channels"],
        args: None = None,
    ) -> Float[Array, "batch height width channels"]:
        y = jax.nn.gelu(self.first_norm(self.first(t, y)))
        y = jax.nn.gelu(self.second_norm(self.second(t, y)))
        return self.third(t, y)


class ConvODEClassifier(eqx.Module):
    """Embed an image, let it follow a convolutional ODE, then read the classes off.

    The embedding appends channels that a convolution makes of the image to the image
    itself and normalises them. The readout is a convolution to one channel, a gelu and
    an affine map. A batch is one state of one solve from time 0 to 1.

    **Arguments:**

    - `image_shape`: Rows, columns and channels of an image.
    - `channels`: Channels of the state.
    - `hidden`: Channels inside the vector field.
    - `classes`: Number of classes.
    - `solver`, `tolerance`, `adjoint`: As for `NeuralODE`, but with checkpointing where
        no adjoint is given, since a tape of images takes much memory.
    - `key`: A `jax.random.key` for the initial parameters.

    **Raises:**

    - `ValueError` if the state has no more channels than the images.
    """

    embedding: Conv
    norm: BatchNorm
    ode: NeuralODE
    merge: Conv
    readout: Linear
    image_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: int = 8,
        hidden: int = 64,
        classes: int = 10,
        *,
        solver: diffrax.AbstractSolver,
        tolerance: float,
        adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),  # noqa: B008
        key: PRNGKeyArray,
    ):
        height, width, colors = image_shape
        if channels <= colors:
            raise ValueError(
                f"channels={channels} must be more than the {colors} of the images, "
                "which are channels of the state, too."
            )
        keys = jr.split(key, 4)
        self.embedding = Conv(colors, channels - colors, key=keys[0])
        self.norm = BatchNorm(channels)
        vector_field = ConvField(channels, hidden, key=keys[1])
        self.ode = NeuralODE(vector_field, solver, tolerance, adjoint)
        self.merge = Conv(channels, 1, key=keys[2])
        self.readout = Linear(height * width, classes, key=keys[3])
        self.image_shape = image_shape

    def embed(
        self, x: Float[Array, "batch pixels"]
    ) -> Float[Array, "batch height width channels"]:
        """The initial states of a batch of flattened images."""
        x = x.reshape(len(x), *self.image_shape)
        return self.norm(jnp.concatenate([x, self.embedding(x)], axis=-1))

    def __call__(
        self,
        x: Float[Array, "batch pixels"],
        *,
        regularizer: Regularizers = None,
        key: PRNGKeyArray | None = None,
        max_steps: int = 4096,
    ) -> Prediction:
        """Classifies a batch of flattened images; see `NeuralODEClassifier`."""
        sol, penalty = self.ode.solve(
            self.embed(x), regularizer=regularizer, key=key, max_steps=max_steps
        )
        merged = jax.nn.gelu(self.merge(sol.ys[0])).reshape(len(x), -1)
        return make_prediction(self.readout(merged), sol, penalty)
