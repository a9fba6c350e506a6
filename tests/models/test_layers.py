import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxclus.models as models


def rngs():
    return nnx.Rngs(params=jax.random.key(0))


@pytest.mark.parametrize("size, use_bias, gain", [(1, False, 1.0), (3, True, 1.0), (7, True, 2.0)])
def test_conv_starts_uniform_within_gain_over_root_fan_in(size, use_bias, gain):
    layer = models.Conv(8, 256, size, use_bias=use_bias, gain=gain, rngs=rngs())
    bound = (8 * size**2) ** -0.5
    kernel = np.asarray(layer.kernel[...]) / gain
    assert kernel.shape == (size, size, 8, 256)
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    # A uniform variable on +-bound has the standard deviation bound / sqrt(3).
    np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.05)
    assert abs(kernel.mean()) < 0.1 * bound
    assert (layer.bias is not None) == use_bias
    if use_bias:
        bias = np.asarray(layer.bias[...])
        assert 0.9 * bound < np.abs(bias).max() <= bound


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_linear_starts_uniform_within_gain_over_root_of_its_inputs(gain):
    layer = models.Linear(100, 200, gain=gain, rngs=rngs())
    kernel, bias = np.asarray(layer.kernel[...]) / gain, np.asarray(layer.bias[...])
    assert 0.098 < np.abs(kernel).max() <= 0.1 and 0.09 < np.abs(bias).max() <= 0.1
    np.testing.assert_allclose(kernel.std(), 0.1 / 3**0.5, rtol=0.03)


@pytest.mark.parametrize("strides, rows, columns", [(1, 5, 4), (2, 3, 2)])
def test_conv_pads_alike_on_all_sides(strides, rows, columns):
    layer = models.Conv(1, 1, 3, strides, rngs=rngs())
    image = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    kernel = np.asarray(layer.kernel[...])[:, :, 0, 0]
    padded = np.pad(image, 1)
    expected = [
        [(padded[i : i + 3, j : j + 3] * kernel).sum() for j in range(0, 4, strides)]
        for i in range(0, 5, strides)
    ]
    out = layer(jnp.asarray(image)[None, :, :, None])
    assert out.shape == (1, rows, columns, 1)
    np.testing.assert_allclose(out[0, :, :, 0], expected, atol=1e-6)


def test_conv_padding_can_be_given():
    layer = models.Conv(2, 3, 3, padding=0, rngs=rngs())
    assert layer(jnp.ones((1, 6, 5, 2))).shape == (1, 4, 3, 3)


def test_batch_norm_in_train_mode_keeps_unbiased_running_variance():
    x = np.random.default_rng(1).normal(2.0, 3.0, size=(4, 3, 2, 5)).astype(np.float32)
    layer = nnx.view(models.BatchNorm(5, rngs=rngs()), use_running_average=False)
    y = layer(jnp.asarray(x))
    values = x.reshape(-1, 5).astype(np.float64)
    mean, var = values.mean(0), values.var(0)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    np.testing.assert_allclose(layer.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], 0.9 + 0.1 * values.var(0, ddof=1), rtol=1e-5)


def test_batch_norm_of_a_single_value_stays_finite():
    layer = nnx.view(models.BatchNorm(3, rngs=rngs()), use_running_average=False)
    np.testing.assert_array_equal(layer(jnp.full((1, 3), 7.0)), np.zeros((1, 3)))
    np.testing.assert_allclose(layer.var[...], [0.9] * 3, rtol=1e-6)


def test_batch_norm_starts_in_eval_mode_and_leaves_statistics_alone():
    layer = models.BatchNorm(2, rngs=rngs())
    layer.mean[...] = jnp.array([1.0, -1.0])
    layer.var[...] = jnp.array([4.0, 9.0])
    layer.scale[...] = jnp.array([2.0, 3.0])
    layer.bias[...] = jnp.array([0.5, 0.0])
    y = layer(jnp.array([[3.0, 2.0]]))
    np.testing.assert_allclose(y, [[2.5, 3.0]], rtol=1e-5)
    np.testing.assert_array_equal(layer.mean[...], [1.0, -1.0])
    np.testing.assert_array_equal(layer.var[...], [4.0, 9.0])


def test_pooling_by_hand():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1) - 20.0
    np.testing.assert_array_equal(models.MaxPool(2)(x)[0, :, :, 0], [[-15, -13], [-7, -5]])
    np.testing.assert_array_equal(models.AvgPool(2)(x)[0, :, :, 0], [[-17.5, -15.5], [-9.5, -7.5]])
    # Padding is never the largest, and a zero in the average.
    np.testing.assert_array_equal(models.MaxPool(3, 2, 1)(x)[0, :, :, 0], [[-15, -13], [-7, -5]])
    np.testing.assert_allclose(
        models.AvgPool(3, 2, 1)(x)[0, 0, 0, 0], (-20 - 19 - 16 - 15) / 9, rtol=1e-6
    )
    np.testing.assert_array_equal(models.GlobalAvgPool()(x), [[-12.5]])


def test_global_average_is_float32():
    x = jnp.full((2, 16, 16, 1), 1.0, jnp.bfloat16).at[0, 0, 0, 0].set(2.0)
    pooled = models.GlobalAvgPool()(x)
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled[:, 0], [1 + 1 / 256, 1])


def test_flatten_and_identity():
    x = jnp.arange(12.0).reshape(2, 1, 2, 3)
    np.testing.assert_array_equal(models.Flatten()(x), np.arange(12.0).reshape(2, 6))
    assert models.Identity()(x) is x


def test_normalize_by_hand():
    layer = models.Normalize([0.5, 0.25], [0.5, 0.25])
    y = layer(jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2))
    np.testing.assert_array_equal(y.ravel(), [1.0, -1.0])
    assert not jax.tree.leaves(layer)


def test_flatten_in_the_order_of_pytorch():
    x = jnp.arange(12.0).reshape(1, 2, 3, 2)
    np.testing.assert_array_equal(
        models.Flatten(channels_first=True)(x), [[0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]]
    )


def test_linbp_is_relu_with_the_derivative_of_the_identity():
    x = jnp.array([-2.5, -1e-3, 0.0, 1e-3, 40.0])
    value, tangent = jax.jvp(models.linbp, (x,), (2 * jnp.ones(5),))
    np.testing.assert_array_equal(value, jax.nn.relu(x))
    np.testing.assert_array_equal(tangent, [2.0] * 5)
    gradient = jax.grad(lambda x: models.linbp(x).sum())(x)
    np.testing.assert_array_equal(gradient, [1.0] * 5)


@pytest.mark.parametrize(
    "name, at_minus_one, at_one",
    [
        ("relu", 0.0, 1.0),
        ("leaky_relu", -0.01, 1.0),
        ("gelu", -0.15865525, 0.84134475),
        ("silu", -0.26894142, 0.73105858),
        ("softplus", 0.31326169, 1.31326169),
        ("tanh", -0.76159416, 0.76159416),
        ("linbp", 0.0, 1.0),
    ],
)
def test_activations_by_name(name, at_minus_one, at_one):
    y = models.Activation.named(name)(jnp.array([-1.0, 1.0]))
    np.testing.assert_allclose(y, [at_minus_one, at_one], rtol=1e-5)


def test_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match="`activation` must be one of gelu, .*tanh; got 'swish'"):
        models.Activation.named("swish")
