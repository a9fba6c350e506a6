"""Interval bounds against sampled and attacked images, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_lipschitz import FAMILIES, SHAPE, features_of, model_of

import jaxclus.models as models
from jaxclus.models._interval import _Box, _image

MONOTONE = [name for name in FAMILIES if name not in ("cnn_gelu", "resnet_bottleneck")]
bounds = jax.jit(models.interval_bounds)


@pytest.fixture(scope="module")
def x():
    return jax.random.uniform(jax.random.key(1), (3, *SHAPE))


@jax.jit
def random_points(model, x, eps):
    """The features [n, b, d] of images at random in the ball and at its corners."""

    def features(key):
        inner = jax.random.uniform(key, x.shape, minval=-1.0)
        delta = jnp.where(jax.random.bernoulli(key), inner, jnp.sign(inner)) * eps
        return model.features(jnp.clip(x + delta, 0, 1))

    return jax.lax.map(features, jax.random.split(jax.random.key(2), 700), batch_size=50)


@jax.jit
def attacked_points(model, x, eps):
    """The features of images at which PGD drives the first and the last feature down and up."""

    def ends(place_and_sign):
        index, sign = place_and_sign

        def step(_, point):
            gradient = jax.grad(lambda z: model.features(z)[:, index].sum())(point)
            point = jnp.clip(point + sign * eps / 4 * jnp.sign(gradient), x - eps, x + eps)
            return jnp.clip(point, 0, 1)

        return model.features(jax.lax.fori_loop(0, 8, step, x))

    return jax.lax.map(ends, (jnp.array([0, 0, -1, -1]), jnp.array([-1, 1, -1, 1])))


@pytest.mark.parametrize("family", MONOTONE)
def test_bounds_hold_all_features_in_the_ball(family, x):
    model = model_of(family)
    for eps in (0.0, 0.01, 0.3):
        low, high = bounds(model, x, eps)
        assert low.shape == high.shape == features_of(model, x).shape and low.dtype == jnp.float32
        found = np.concatenate([random_points(model, x, eps), attacked_points(model, x, eps)])
        assert (found >= low[None]).all() and (found <= high[None]).all()


@pytest.mark.parametrize("family", MONOTONE)
def test_at_eps_0_they_are_the_features(family, x):
    model = model_of(family)
    low, high = bounds(model, x, 0.0)
    wide = np.subtract(*bounds(model, x, 1 / 255)[::-1])
    # Rounding alone is left, which intervals multiply as they do everything.
    assert np.mean(high - low) < 2e-3 * np.mean(wide)
    np.testing.assert_allclose((low + high) / 2, features_of(model, x), atol=1e-3 * wide.max())


def test_bounds_of_an_affine_network_are_exact(x):
    """A perceptron whose ReLUs are all on: reached by one image for each bound."""
    model = models.create(
        "cnn", 3, SHAPE, jax.random.key(0), widths=(), hidden=4, mean=[0.4, 0.5], std=[0.3, 0.2]
    )
    model.dense.bias[...] = jnp.full(4, 100.0)
    eps = 0.1
    low, high = (np.asarray(end) for end in bounds(model, x, eps))
    sign = np.sign(np.asarray(model.dense.kernel[...])).T.reshape(4, 1, *SHAPE)
    lows = [features_of(model, jnp.clip(x - eps * s, 0, 1))[:, i] for i, s in enumerate(sign)]
    highs = [features_of(model, jnp.clip(x + eps * s, 0, 1))[:, i] for i, s in enumerate(sign)]
    np.testing.assert_allclose(low, np.stack(lows, 1), rtol=1e-5)
    np.testing.assert_allclose(high, np.stack(highs, 1), rtol=1e-5)


def test_single_layers_by_hand():
    box = _Box(jnp.array([[[[0.0, 2.0]]]]), jnp.array([[[[1.0, 3.0]]]]))
    dense = models.Linear(2, 1, rngs=nnx.Rngs(0))
    dense.kernel[...], dense.bias[...] = jnp.array([[1.0], [-1.0]]), jnp.array([0.5])
    flat = _Box(box.low[:, 0, 0], box.high[:, 0, 0])
    low, high = _image(dense, flat)
    np.testing.assert_allclose([low[0, 0], high[0, 0]], [-2.5, -0.5], atol=1e-4)
    low, high = _image(models.Normalize([1.0, 1.0], [0.5, 0.5]), box)
    np.testing.assert_allclose([low[0, 0, 0], high[0, 0, 0]], [[-2, 2], [0, 4]], atol=1e-4)
    norm = models.BatchNorm(2, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.array([-1.0, 2.0])
    low, high = _image(norm, box)
    np.testing.assert_allclose([low[0, 0, 0], high[0, 0, 0]], [[-1, 4], [0, 6]], atol=1e-3)
    maps = _Box(jnp.zeros((1, 2, 2, 1)), jnp.arange(4.0).reshape(1, 2, 2, 1))
    for pool, top in (
        (models.AvgPool(2), 1.5),
        (models.MaxPool(2), 3),
        (models.GlobalAvgPool(), 1.5),
    ):
        low, high = _image(pool, maps)
        np.testing.assert_allclose([low.item(), high.item()], [0, top], atol=1e-4)


def test_gradients_exist_and_grow_with_eps(x):
    """Of the mean width, in the weights, the images and eps."""

    @jax.jit
    def gradients(model, x, eps):
        def width(model, x, eps):
            low, high = models.interval_bounds(model, x, eps)
            return (high - low).mean()

        return jax.grad(width, argnums=(0, 1, 2), allow_int=True)(model, x, eps)

    for family in ("cnn", "lipschitz_resnet"):
        of_model, of_x, of_eps = gradients(model_of(family), x, 0.05)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_model))
        assert np.isfinite(of_x).all() and of_eps > 0


def test_compiled_and_not_are_alike(x):
    model = model_of("cnn_without_norm")
    for found, wanted in zip(
        bounds(model, x, 0.02), models.interval_bounds(model, x, 0.02), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"model": lambda: model_of("cnn_gelu")}, ValueError, "`model` must have monotone activa"),
        ({"model": lambda: models.create("vgg11", 3, SHAPE, jax.random.key(0), width=2,
                                         blocks=(1,))}, TypeError, "got a VGG"),
        ({"eps": -0.1}, ValueError, "`eps` must be a finite number of at least 0, got -0.1"),
        ({"x": jnp.full((1, *SHAPE), 1.5)}, ValueError, r"`x` must be in \[0, 1\], got values"),
        ({"x": jnp.zeros((1, 8, 8, 2))}, ValueError, r"`x` must be images of \(6, 8\) pixels"),
        ({"x": jnp.zeros((1, 6, 8, 1))}, ValueError, r"`x` must be images of the shape \[b, h, w"),
    ],
)  # fmt: skip
def test_errors(changes, error, message):
    arguments = {"model": lambda: model_of("cnn"), "x": jnp.zeros((1, *SHAPE)), "eps": 0.1}
    arguments |= changes
    arguments["model"] = arguments["model"]()
    with pytest.raises(error, match=message):
        models.interval_bounds(**arguments)
