"""Convolutional neural ODEs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.signal

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


def make_model(tolerance=1e-4):
    return ConvODEClassifier(
        SHAPE, 5, 4, 3, solver=lrnde.Bosh3(), tolerance=tolerance, key=jr.key(0)
    )


def make_multiscale(tolerance=1e-4):
    return MultiScaleODEClassifier(
        (6, 4, 3), 4, 8, 3, solver=lrnde.Bosh3(), tolerance=tolerance, key=jr.key(0)
    )


@eqx.filter_jit
def predict(model, x, key=None):
    return model(x, key=key, max_steps=64)


def sizes(make, *args, **kwargs):
    model = eqx.filter_eval_shape(make, *args, **kwargs, key=jr.key(0))
    return [x.size for x in jax.tree.leaves(model) if hasattr(x, "size")]


def images(batch=7):
    return jr.normal(jr.key(1), (batch, int(np.prod(SHAPE))))


def in_double(tree):
    return jax.tree.map(
        lambda a: a.astype(float) if eqx.is_inexact_array(a) else a, tree
    )


def test_kernels_are_those_of_the_initializers_of_jax():
    glorot = jax.nn.initializers.glorot_uniform(in_axis=-2, out_axis=-1)
    normal = jax.nn.initializers.normal(0.01)
    for deviation, initializer in ((None, glorot), (0.01, normal)):
        found = Conv(4, 5, deviation=deviation, key=jr.key(1)).weight
        np.testing.assert_array_equal(found, initializer(jr.key(1), (3, 3, 4, 5)))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_its_sum(stride):
    conv = Conv(3, 2, stride=stride, key=jr.key(2))
    conv = eqx.tree_at(lambda c: c.bias, conv, jnp.array([0.5, -1.0]))
    x = jr.normal(jr.key(3), (4, 7, 5, 3))
    found = conv(x)
    for image, result in zip(np.asarray(x), found, strict=True):
        for k in range(2):
            expected = sum(
                scipy.signal.correlate2d(
                    image[:, :, c], np.asarray(conv.weight[:, :, c, k]), "same"
                )
                for c in range(3)
            )
            expected = expected[::stride, ::stride] + conv.bias[k]
            np.testing.assert_allclose(result[:, :, k], expected, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 2)])
def test_derivatives_of_a_convolution(float64, shape, size, stride):
    x = jr.normal(jr.key(0), (3, *shape, 2))
    weight = jr.normal(jr.key(1), (size, size, 2, 4))

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
    cotangent = jr.normal(jr.key(2), found.shape)
    for a, b in zip(found_vjp(cotangent), expected_vjp(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, 0.7])
def test_the_time_is_one_more_channel(t):
    layer = TimeConv(3, 4, key=jr.key(4))
    x = jr.normal(jr.key(5), (2, *SHAPE))
    whole = Conv(4, 4, key=jr.key(0))
    kernel = jnp.concatenate([layer.conv.weight, layer.time], axis=2)
    whole = eqx.tree_at(lambda c: c.weight, whole, kernel)
    appended = jnp.concatenate([x, jnp.full((*x.shape[:3], 1), t)], axis=3)
    np.testing.assert_allclose(layer(jnp.asarray(t), x), whole(appended), atol=1e-5)


def test_channels_are_normalised_over_the_batch_and_the_image():
    norm = BatchNorm(3)
    norm = eqx.tree_at(
        lambda n: (n.scale, n.shift),
        norm,
        (jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 2.0])),
    )
    y = norm(5 + 4 * jr.normal(jr.key(6), (8, *SHAPE)))
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), [0, 1, 2], atol=1e-5)
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), [1, 2, 3], rtol=1e-4)
    assert jnp.all(jnp.isfinite(norm(jnp.ones((2, *SHAPE)))))  # without any variance


def test_the_published_size():
    found = sizes(ConvODEClassifier, (32, 32, 3), solver=lrnde.Tsit5(), tolerance=1e-4)
    conv = lambda inputs, outputs: 9 * inputs * outputs + outputs  # noqa: E731
    embedding = conv(3, 5) + 2 * 8
    field = conv(9, 64) + 2 * 64 + conv(65, 64) + 2 * 64 + conv(65, 8)
    head = conv(8, 1) + 1024 * 10 + 10
    assert sum(found) == embedding + field + head


def test_the_image_keeps_its_rows_and_columns():
    model = make_model()
    assert model.embed(images(2)).shape == (2, *SHAPE[:2], 5)


def test_the_order_of_a_batch_does_not_matter(float64):
    model, x = in_double((make_model(), images()))
    order = np.random.default_rng(0).permutation(len(x))
    out, permuted = predict(model, x), predict(model, x[order])
    np.testing.assert_allclose(permuted.logits, out.logits[order], rtol=1e-8)
    assert permuted.nfe == out.nfe


def test_an_evaluation_leaves_nothing_behind():
    model, x = make_model(), images()
    before = predict(model, x)
    predict(model, 100 * x[::-1])
    assert eqx.tree_equal(predict(model, x), before)


def assert_derivative(function, model):
    """The gradient of a function of the model agrees with finite differences."""
    params, static = eqx.partition(in_double(model), eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(params)
    keys = jr.split(jr.key(7), len(leaves))
    direction = tree.unflatten(
        [jr.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    )

    # Not from the initial parameters, with which a relu may sit at its kink.
    @jax.jit
    @jax.value_and_grad
    def along(scale):
        moved = jax.tree.map(lambda a, d: a + (0.1 + scale) * d, params, direction)
        return function(eqx.combine(moved, static))

    h = 1e-6
    expected = (along(h)[0] - along(-h)[0]) / (2 * h)
    np.testing.assert_allclose(along(0.0)[1], expected, rtol=1e-5)


def test_gradient_against_finite_differences(float64):
    x, labels = in_double(images()), jnp.arange(7) % 3

    def loss(model):
        return cross_entropy(model(x, max_steps=1024).logits, labels)

    assert_derivative(loss, make_model(1e-6))


@pytest.mark.parametrize("sampling", ["unbiased", "biased"])
def test_the_penalty_reaches_the_field_alone(sampling):
    model, x = make_model(), images()

    def penalty(model):
        regularizer = lrnde.LocalError(sampling)
        out = model(x, regularizer=regularizer, key=jr.key(8), max_steps=64)
        return out.penalty

    gradient = eqx.filter_grad(penalty)(model)
    for leaf in jax.tree.leaves((gradient.embedding, gradient.norm, gradient.readout)):
        assert jnp.all(leaf == 0)
    field = jax.tree.leaves(gradient.ode)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in field)
    assert any(jnp.any(leaf != 0) for leaf in field)


# Two resolutions


def test_the_published_size_of_the_multiscale_model():
    settings = dict(solver=lrnde.Bosh3(), tolerance=0.05)
    assert sum(sizes(MultiScaleODEClassifier, (32, 32, 3), **settings)) == 163_546


def test_the_order_does_not_matter_at_two_resolutions(float64):
    model = in_double(make_multiscale())
    x = jr.normal(jr.key(1), (5, 72), float)
    order = np.array([3, 0, 4, 2, 1])
    out, permuted = predict(model, x), predict(model, x[order])
    np.testing.assert_allclose(permuted.logits, out.logits[order], rtol=1e-7, atol=1e-9)
    assert permuted.nfe == out.nfe
    # Without a key nothing is drawn; with one, something is dropped.
    assert eqx.tree_equal(predict(model, x), out)
    assert jnp.any(predict(model, x, jr.key(0)).logits != out.logits)


def test_gradient_of_the_field_at_two_resolutions(float64):
    # Of the field and not of a solve: its relus have kinks, at which the step size
    # controller of a precise solve stumbles.
    x = jr.normal(jr.key(1), (5, 72), float)
    coarse = jr.normal(jr.key(2), (5, 3, 2, 4), float)

    def function(model):
        state = Scales(model.embed(x).fine, coarse)
        injection = Injection(state.fine, in_double(_dropout(jr.key(3), state)))
        out = model.ode.vector_field(jnp.zeros(()), state, injection)
        return jnp.sum(jnp.sin(out.fine)) + jnp.sum(jnp.cos(out.coarse))

    assert_derivative(function, make_multiscale())


def test_dropout_keeps_the_mean():
    like = Scales(jnp.zeros((50, 8, 8, 4)), jnp.zeros((50, 4, 4, 4)))
    for mask in _dropout(jr.key(0), like):
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
