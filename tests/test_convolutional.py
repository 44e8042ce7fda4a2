"""Convolutional neural ODEs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.signal
from jax.flatten_util import ravel_pytree
from problems import random_parameters

import lrnde
from lrnde.models import (
    BatchNorm,
    Conv,
    ConvODEClassifier,
    Injection,
    MultiScaleODEClassifier,
    Scales,
    TimeConv,
)
from lrnde.models._convolutional import convolve
from lrnde.models._multiscale import _dropout
from lrnde.objectives import cross_entropy

SHAPE = (6, 5, 3)


def normal(*shape, seed=0):
    """Numbers drawn by NumPy: XLA would compile the draw anew for every shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), float)


def make_model(tolerance=1e-4):
    return random_parameters(
        ConvODEClassifier, SHAPE, 5, 4, 3, solver=lrnde.Bosh3(), tolerance=tolerance
    )


def make_multiscale():
    return random_parameters(
        MultiScaleODEClassifier,
        *((6, 4, 3), 4, 8, 3),
        solver=lrnde.Bosh3(),
        tolerance=1e-4,
    )


@eqx.filter_jit
def predict(model, x, key=None):
    return model(x, key=key, max_steps=64)


def sizes(make, *args, **kwargs):
    model = eqx.filter_eval_shape(make, *args, **kwargs, key=jr.key(0))
    return [x.size for x in jax.tree.leaves(model) if hasattr(x, "size")]


def images(batch=7):
    return normal(batch, int(np.prod(SHAPE)), seed=100)


# The equations, in NumPy


def in_numpy(tree):
    return jax.tree.map(lambda a: np.asarray(a) if eqx.is_array(a) else a, tree)


def correlate(x, kernel, stride=1):
    result = [
        [
            sum(
                scipy.signal.correlate2d(image[:, :, c], kernel[:, :, c, k], "same")
                for c in range(kernel.shape[2])
            )
            for k in range(kernel.shape[3])
        ]
        for image in x
    ]
    return np.moveaxis(np.array(result), 1, 3)[:, ::stride, ::stride]


def apply_conv(conv, x):
    y = correlate(x, conv.weight, conv.stride)
    return y if conv.bias is None else y + conv.bias


def apply_time_conv(layer, t, x):
    x = np.concatenate([x, np.full((*x.shape[:3], 1), t)], axis=3)
    kernel = np.concatenate([layer.conv.weight, layer.time], axis=2)
    return correlate(x, kernel) + layer.conv.bias


def apply_norm(norm, x):
    axes = (0, 1, 2)
    x = (x - x.mean(axis=axes)) / np.sqrt(x.var(axis=axes) + 1e-5)
    return norm.scale * x + norm.shift


def apply_conv_norm(layer, x):
    return apply_norm(layer.norm, apply_conv(layer.conv, x))


def relu(x):
    return np.maximum(x, 0)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def apply_conv_field(field, t, u):
    v = gelu(apply_norm(field.first_norm, apply_time_conv(field.first, t, u)))
    v = gelu(apply_norm(field.second_norm, apply_time_conv(field.second, t, v)))
    return apply_time_conv(field.third, t, v)


def apply_branch(branch, u, x, mask):
    v = apply_conv(branch.narrow, relu(apply_conv_norm(branch.widen, u)))
    return apply_norm(branch.outer, relu(apply_norm(branch.inner, mask * v + x) + v))


def apply_multiscale_field(field, u, x, masks):
    fine = apply_branch(field.branches[0], u.fine, x, masks.fine)
    coarse = apply_branch(field.branches[1], u.coarse, 0, masks.coarse)
    up = np.kron(relu(apply_conv_norm(field.up, coarse)), np.ones((1, 2, 2, 1)))
    down = relu(apply_conv_norm(field.down, fine))
    return Scales(
        apply_norm(field.norms[0], relu(apply_conv(field.merge[0], fine + up))),
        apply_norm(field.norms[1], relu(apply_conv(field.merge[1], coarse + down))),
    )


def apply_bottleneck(head, x):
    first, second, third = head.layers
    y = relu(apply_conv_norm(second, relu(apply_conv_norm(first, x))))
    return relu(apply_conv_norm(third, y) + apply_conv_norm(head.shortcut, x))


def read_off_both(model, u):
    fine, coarse = (
        apply_bottleneck(head, x) for head, x in zip(model.heads, u, strict=True)
    )
    both = relu(apply_conv_norm(model.down, fine)) + coarse
    means = relu(apply_conv_norm(model.widen, both)).mean(axis=(1, 2))
    return means @ model.readout.weight + model.readout.bias


# One resolution


def test_kernels_are_those_of_the_initializers_of_jax():
    glorot = jax.nn.initializers.glorot_uniform(in_axis=-2, out_axis=-1)
    normal = jax.nn.initializers.normal(0.01)
    for deviation, initializer in ((None, glorot), (0.01, normal)):
        found = Conv(4, 5, deviation=deviation, key=jr.key(1)).weight
        np.testing.assert_array_equal(found, initializer(jr.key(1), (3, 3, 4, 5)))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_its_sum(stride):
    conv = random_parameters(Conv, 3, 2, stride=stride)
    x = normal(4, 7, 5, 3)
    expected = apply_conv(in_numpy(conv), np.asarray(x))
    np.testing.assert_allclose(conv(x), expected, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 2)])
def test_derivatives_of_a_convolution(float64, shape, size, stride):
    x, weight = normal(3, *shape, 2), normal(size, size, 2, 4, seed=1)

    def derived(x, weight):  # with the derivatives that JAX finds
        return jax.lax.conv_general_dilated(
            x,
            weight,
            (stride, stride),
            [(size // 2, size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    expected, expected_vjp = jax.vjp(derived, x, weight)
    found, found_vjp = jax.vjp(lambda *args: convolve(*args, stride), x, weight)
    np.testing.assert_array_equal(found, expected)
    cotangent = normal(*found.shape, seed=2)
    for a, b in zip(found_vjp(cotangent), expected_vjp(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.7])
def test_the_time_is_one_more_channel(t):
    layer, x = random_parameters(TimeConv, 3, 4), normal(2, *SHAPE)
    expected = apply_time_conv(in_numpy(layer), t, np.asarray(x))
    np.testing.assert_allclose(layer(jnp.asarray(t), x), expected, atol=1e-5)


def test_channels_are_normalised_over_the_batch_and_the_image():
    norm = BatchNorm(3)
    norm = eqx.tree_at(
        lambda n: (n.scale, n.shift),
        norm,
        (jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 2.0])),
    )
    y = np.asarray(norm(5 + 4 * normal(8, *SHAPE)))
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), [0, 1, 2], atol=1e-5)
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), [1, 2, 3], rtol=1e-4)
    assert jnp.all(jnp.isfinite(norm(jnp.ones((8, *SHAPE)))))  # without any variance


def test_the_published_size():
    found = sizes(ConvODEClassifier, (32, 32, 3), solver=lrnde.Tsit5(), tolerance=1e-4)
    conv = lambda inputs, outputs: 9 * inputs * outputs + outputs  # noqa: E731
    embedding = conv(3, 5) + 2 * 8
    field = conv(9, 64) + 2 * 64 + conv(65, 64) + 2 * 64 + conv(65, 8)
    head = conv(8, 1) + 1024 * 10 + 10
    assert sum(found) == embedding + field + head


def test_the_image_keeps_its_rows_and_columns():
    state = eqx.filter_eval_shape(make_model().embed, images(2))
    assert state.shape == (2, *SHAPE[:2], 5)


def test_the_order_of_a_batch_does_not_matter(float64):
    model, x = make_model(), images()
    order = np.random.default_rng(0).permutation(len(x))
    out, permuted = predict(model, x), predict(model, x[order])
    np.testing.assert_allclose(permuted.logits, out.logits[order], rtol=1e-8)
    assert permuted.nfe == out.nfe and out.successful


def test_the_field_of_images_is_its_equation(float64):
    field, u = make_model().ode.vector_field, normal(3, *SHAPE[:2], 5)
    found = eqx.filter_jit(field)(jnp.asarray(0.7), u)
    expected = apply_conv_field(in_numpy(field), 0.7, np.asarray(u))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_classes_are_read_off_where_the_embedded_images_end(float64):
    model, third = make_model(), lambda m: m.ode.vector_field.third
    kernels = lambda m: (third(m).conv.weight, third(m).time)  # noqa: E731
    model = eqx.tree_at(kernels, model, replace_fn=jnp.zeros_like)
    x, m = images(), in_numpy(model)
    u = np.asarray(x).reshape(-1, *SHAPE)
    u = apply_norm(m.norm, np.concatenate([u, apply_conv(m.embedding, u)], axis=3))
    u += third(m).conv.bias  # the derivative, which is constant
    pixels = gelu(apply_conv(m.merge, u)).reshape(len(x), -1)
    expected = pixels @ m.readout.weight + m.readout.bias
    np.testing.assert_allclose(predict(model, x).logits, expected, rtol=1e-9)


def assert_derivative(function, model):
    """The gradient of a function of the model agrees with finite differences."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(params)
    direction = normal(flat.size, seed=101)

    @jax.jit
    @jax.value_and_grad
    def along(scale):
        return function(eqx.combine(unravel(flat + scale * direction), static))

    h = 1e-6
    expected = (along(h)[0] - along(-h)[0]) / (2 * h)
    np.testing.assert_allclose(along(0.0)[1], expected, rtol=1e-5)


def test_gradient_against_finite_differences(float64):
    x, labels = images(), jnp.arange(7) % 3

    def loss(model):
        return cross_entropy(model(x, max_steps=1024).logits, labels)

    assert_derivative(loss, make_model(1e-6))


def test_the_penalty_reaches_the_field_alone():
    samplings = "unbiased", "biased"

    @eqx.filter_jit
    @eqx.filter_grad
    def find_gradient(model, weights):
        regularizer = [
            (weight, lrnde.LocalError(sampling))
            for weight, sampling in zip(weights, samplings, strict=True)
        ]
        out = model(images(), regularizer=regularizer, key=jr.key(8), max_steps=64)
        return out.penalty

    for weights in jnp.eye(2):
        gradient = find_gradient(make_model(), weights)
        for leaf in jax.tree.leaves(
            (gradient.embedding, gradient.norm, gradient.readout)
        ):
            assert jnp.all(leaf == 0)
        field = jax.tree.leaves(gradient.ode)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in field)
        assert any(jnp.any(leaf != 0) for leaf in field)


# Two resolutions


def test_the_published_size_of_the_multiscale_model():
    settings = dict(solver=lrnde.Bosh3(), tolerance=0.05)
    assert sum(sizes(MultiScaleODEClassifier, (32, 32, 3), **settings)) == 163_546


def test_the_order_does_not_matter_at_two_resolutions(float64):
    model, x = make_multiscale(), normal(5, 72, seed=100)
    order = np.array([3, 0, 4, 2, 1])
    out, permuted = predict(model, x), predict(model, x[order])
    np.testing.assert_allclose(permuted.logits, out.logits[order], rtol=1e-7, atol=1e-9)
    assert permuted.nfe == out.nfe and out.successful
    assert jnp.any(predict(model, x, jr.key(0)).logits != out.logits)  # dropout


def test_without_a_key_nothing_is_dropped(float64):
    model, x = make_multiscale(), normal(5, 72, seed=100)
    m, image = in_numpy(model), np.asarray(x).reshape(-1, 6, 4, 3)
    for layer in m.embedding:
        image = relu(apply_conv_norm(layer, image))
    y0 = Scales(jnp.asarray(image), jnp.zeros((5, 3, 2, 4)))

    @eqx.filter_jit
    def solve(model):
        return model.ode.solve(y0, Injection(y0.fine, None), max_steps=64)[0].ys

    end = jax.tree.map(lambda ys: np.asarray(ys[0]), solve(model))
    np.testing.assert_allclose(
        predict(model, x).logits, read_off_both(m, end), rtol=1e-9
    )


def test_the_field_of_two_resolutions_is_its_equation(float64):
    field = make_multiscale().ode.vector_field
    u = Scales(normal(2, 6, 4, 4), normal(2, 3, 2, 4, seed=1))
    x, masks = normal(2, 6, 4, 4, seed=2), jax.tree.map(jnp.abs, u)
    apply = eqx.filter_jit(field)
    for drop in (masks, None):
        found = apply(jnp.zeros(()), u, Injection(x, drop))
        expected = apply_multiscale_field(
            in_numpy(field), *in_numpy((u, x, drop or Scales(1, 1)))
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_gradient_of_the_field_at_two_resolutions(float64):
    # Of the field and not of a solve: its relus have kinks, at which the step size
    # controller of a precise solve stumbles.
    x, coarse = normal(5, 72, seed=100), normal(5, 3, 2, 4)
    masks = Scales(normal(5, 6, 4, 4, seed=1), normal(5, 3, 2, 4, seed=2))

    def function(model):
        state = Scales(model.embed(x).fine, coarse)
        injection = Injection(state.fine, masks)
        out = model.ode.vector_field(jnp.zeros(()), state, injection)
        return jnp.sum(jnp.sin(out.fine)) + jnp.sum(jnp.cos(out.coarse))

    assert_derivative(function, make_multiscale())


def test_dropout_keeps_the_mean():
    like = Scales(jnp.zeros((50, 8, 8, 4)), jnp.zeros((50, 4, 4, 4)))
    for mask in map(np.asarray, _dropout(jr.key(0), like)):
        assert set(np.unique(mask)) == {0.0, 1.25}
        np.testing.assert_allclose(mask.mean(), 1, atol=0.05)


def test_what_cannot_be_built_is_refused():
    settings = dict(solver=lrnde.Tsit5(), tolerance=1e-3, key=jr.key(0))
    with pytest.raises(ValueError, match="channels=3 must be more than the 3"):
        ConvODEClassifier(SHAPE, channels=3, **settings)
    with pytest.raises(ValueError, match="size=2 must be odd"):
        Conv(3, 4, 2, key=jr.key(0))


def test_an_odd_image_is_refused():
    with pytest.raises(ValueError, match="have to be even"):
        MultiScaleODEClassifier(
            (5, 4, 3), solver=lrnde.Bosh3(), tolerance=1e-3, key=jr.key(0)
        )
