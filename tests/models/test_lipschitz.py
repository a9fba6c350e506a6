"""Upper bounds of Lipschitz constants against dense matrices and Jacobians."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxclus.models as models
from jaxclus.models._activations import ACTIVATIONS, SLOPES
from jaxclus.models._lipschitz import _constant, circular_norm

SHAPE = (6, 8, 2)
# name, arguments
FAMILIES = {
    "cnn": ("cnn", {"widths": (4, 6), "hidden": 5}),
    "cnn_without_norm": ("cnn", {"widths": (4,), "hidden": 5, "batch_norm": False}),
    "cnn_gelu": ("cnn", {"widths": (4,), "hidden": 5, "activation": "gelu"}),
    "resnet": ("resnet8", {"width": 3}),
    "resnet_imagenet": ("resnet18", {"width": 3, "blocks": (1, 1), "stem": "imagenet"}),
    "resnet_bottleneck": ("resnet50", {"width": 2, "blocks": (1, 1), "activation": "silu"}),
    "preact_resnet": ("preact_resnet18", {"width": 3, "blocks": (1, 1)}),
    "preact_resnet_raw": (
        "preact_resnet18",
        {"width": 3, "blocks": (1, 1), "shortcut_input": "raw", "stride_padding": "after"},
    ),
    "wide_resnet": ("wide_resnet_10_1", {"width": 3, "stem_width": 2}),
    "lipschitz_resnet": ("lipschitz_resnet8", {"width": 4, "blocks": (1, 1), "hidden": 6}),
}
families = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def model_of(family):
    """A network with statistics as after training: far from the identity."""
    name, arguments = FAMILIES[family]
    key = jax.random.key(0)
    model = models.create(name, 3, SHAPE, key, mean=[0.4, 0.5], std=[0.3, 0.2], **arguments)
    rng = np.random.default_rng(1)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.BatchNorm):
            size = layer.mean.shape
            layer.mean[...] = jnp.asarray(rng.normal(0, 0.2, size), jnp.float32)
            layer.var[...] = jnp.asarray(rng.uniform(0.2, 2, size), jnp.float32)
            layer.scale[...] = jnp.asarray(rng.normal(0, 1, size), jnp.float32)
            layer.bias[...] = jnp.asarray(rng.normal(0, 0.2, size), jnp.float32)
    return model


features_of = jax.jit(lambda model, x: model.features(x))


@jax.jit
def jacobian(model, x):
    return jax.jacrev(lambda x: model.features(x[None])[0])(x)


@jax.jit
def layer_jacobian(layer, x):
    return jax.jacrev(lambda x: layer(x[None])[0])(x)


def norm(jacobian):
    rows = np.asarray(jacobian, np.float64)
    return np.linalg.norm(rows.reshape(len(rows.reshape(-1)) // np.prod(SHAPE), -1), 2)


@families
def test_bounds_are_above_jacobians_and_ratios_of_distances(family):
    model = model_of(family)
    bound = models.lipschitz_bound(model, SHAPE)
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(24, *SHAPE)).astype(np.float32)
    largest = max(norm(jacobian(model, image)) for image in x[:6])
    assert 1e-4 * bound < largest <= bound * (1 + 1e-5)
    features = np.asarray(features_of(model, x), np.float64)
    apart = np.linalg.norm(features[:, None] - features[None], axis=-1)
    flat = x.reshape(24, -1).astype(np.float64)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    assert (apart <= bound * distances * (1 + 1e-5)).all()


def test_bound_of_a_lipschitz_network_is_at_most_one_over_the_least_deviation():
    bound = models.lipschitz_bound(model_of("lipschitz_resnet"), SHAPE)
    assert 2 < bound <= 5 * (1 + 1e-8)
    name, arguments = FAMILIES["lipschitz_resnet"]
    bare = models.create(name, 3, SHAPE, jax.random.key(0), **arguments)
    np.testing.assert_allclose(models.lipschitz_bound(bare, SHAPE), bound / 5, rtol=1e-8)


def test_surgery_on_a_lipschitz_network_is_seen():
    """GELU falls below zero, so that a convex potential block with it is no contraction."""
    model = model_of("lipschitz_resnet")
    changed = models.replace_activation(model, ACTIVATIONS["gelu"])
    assert models.lipschitz_bound(changed, SHAPE) > 1.1 * models.lipschitz_bound(model, SHAPE)


def test_bound_of_a_linear_network_is_exact():
    """A perceptron whose ReLUs are all on has the Jacobian W / std."""
    model = models.create("cnn", 3, SHAPE, jax.random.key(0), widths=(), hidden=7, std=[0.5, 0.5])
    model.dense.bias[...] = jnp.full(7, 100.0)
    wanted = norm(jacobian(model, np.full(SHAPE, 0.5, np.float32)))
    found = models.lipschitz_bound(model, SHAPE)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    kernel = np.asarray(model.dense.kernel[...], np.float64)
    np.testing.assert_allclose(found, 2 * np.linalg.norm(kernel, 2), rtol=1e-8)


def test_batch_norm_is_folded_into_the_convolution():
    model = model_of("cnn")
    apart = _constant(model.blocks[0].conv, SHAPE) * _constant(model.blocks[0].norm, SHAPE)
    kernel = np.asarray(model.blocks[0].conv.kernel[...], np.float64)
    norm = model.blocks[0].norm
    scale = np.asarray(norm.scale[...]) / np.sqrt(np.asarray(norm.var[...], np.float64) + 1e-5)
    assert circular_norm(kernel * scale, (8, 10), 2) < apart
    negative = nnx.clone(model)
    negative.blocks[0].norm.scale[...] = -norm.scale[...]
    np.testing.assert_allclose(
        models.lipschitz_bound(negative, SHAPE), models.lipschitz_bound(model, SHAPE), rtol=1e-7
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_norm_of_circular_and_zero_padded_convolutions(size, stride):
    shape, rng = (12, 12, 2), np.random.default_rng(size)
    kernel = rng.normal(size=(size, size, 2, 3))

    def circular(x):
        left, right = size // 2, (size - 1) // 2
        x = jnp.pad(x, ((left, right), (left, right), (0, 0)), mode="wrap")
        return plain(x, 0)

    def plain(x, pad):
        return lax.conv_general_dilated(
            x[None], jnp.asarray(kernel), (stride, stride), ((pad, pad),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    with jax.enable_x64(True):
        x = jnp.zeros(shape, jnp.float64)
        exact = jax.jit(jax.jacrev(circular))(x).reshape(-1, x.size)
        padded = jax.jit(jax.jacrev(lambda x: plain(x, size // 2)))(x).reshape(-1, x.size)
    found = circular_norm(kernel, shape[:2], stride)
    np.testing.assert_allclose(found, np.linalg.norm(exact, 2), rtol=1e-10)
    on_padded = circular_norm(kernel, [n + 2 * (size // 2) for n in shape[:2]], stride)
    assert 0.5 * on_padded < np.linalg.norm(padded, 2) <= on_padded * (1 + 1e-10)


@pytest.mark.parametrize(
    "layer",
    [
        models.AvgPool(2),
        models.AvgPool(3, 2, 1),
        models.MaxPool(2),
        models.MaxPool(3, 2, 1),
        models.MaxPool(3, 1, 1),
        models.GlobalAvgPool(),
        models.Normalize([0.5, 0.1], [0.25, 2.0]),
        models.Flatten(),
    ],
)
def test_constants_of_layers_without_parameters(layer):
    constant = _constant(layer, SHAPE)
    rng = np.random.default_rng(0)
    spread = [norm(layer_jacobian(layer, rng.normal(size=SHAPE))) for _ in range(4)]
    # An image of one bright pixel is in as many maxima as windows overlap there.
    lone = np.zeros(SHAPE, np.float32)
    lone[3, 3] = 1
    spread.append(norm(layer_jacobian(layer, lone)))
    assert 0.7 * constant < max(spread) <= constant * (1 + 1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_of_activations(name):
    x = np.linspace(-8, 8, 400_001)
    with jax.enable_x64(True):
        y = np.asarray(ACTIVATIONS[name](jnp.asarray(x)))
    slopes = np.diff(y) / np.diff(x)
    low, high = SLOPES[name]
    assert low - 1e-6 <= slopes.min() <= low + 1e-3 and high - 1e-3 <= slopes.max() <= high + 1e-6


@pytest.mark.parametrize(
    "model, shape, error, message",
    [
        (lambda: models.create("vgg11", 3, SHAPE, jax.random.key(0), width=2, blocks=(1,)), SHAPE,
         TypeError, "`model` must be a CNN, ResNet, PreActResNet, LipschitzResNet, got a VGG"),
        (lambda: models.create("resnet8", 3, SHAPE, jax.random.key(0), dtype="bfloat16", width=2),
         SHAPE, TypeError, "`model` must compute in float32, got one made in bfloat16"),
        (lambda: models.replace_activation(model_of("cnn"), jnp.sin), SHAPE,
         TypeError, "`model` must have activations of gelu, .*tanh, got .*sin"),
        (lambda: model_of("resnet"), (6, 8), ValueError, r"must be \(h, w, c\), got \(6, 8\)"),
        (lambda: model_of("resnet"), 8, ValueError, r"must be \(h, w, c\), got 8"),
        (lambda: model_of("resnet"), (6, 0, 2), ValueError, "`input_shape` must be at least 1"),
        (lambda: model_of("resnet"), (6, 8, 3), ValueError, r"must be \('h', 'w', 2\), as the mod"),
        (lambda: model_of("cnn"), (8, 8, 2), ValueError, r"`input_shape` must be \(6, 8, 2\)"),
    ],
)  # fmt: skip
def test_errors(model, shape, error, message, monkeypatch):
    # In the tests annotations are checked before our own checks.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(error, match=message):
        models.lipschitz_bound(model(), shape)


def test_residual_networks_have_bounds_for_any_size():
    small, large = (models.lipschitz_bound(model_of("resnet"), (n, n, 2)) for n in (8, 16))
    assert 0 < large < small  # the mean is over more pixels
