"""Layers and networks that are 1-Lipschitz by construction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxclus as jc
import jaxclus.models as models
from jaxclus.models._lipschitz_resnet import ConvexPotentialBlock, Halving
from jaxclus.models._rescaled import rescale, same_convolution
from jaxclus.training import TrainingConfig
from jaxclus.training.objectives import Standard

SHAPE = (8, 6, 2)
SMALL = {"width": 4, "blocks": (1, 1), "hidden": 6}
ROUNDING = 1e-5


def rngs(seed=0):
    return nnx.Rngs(params=jax.random.key(seed))


def small(key=0, shape=SHAPE, **changes):
    return models.create("lipschitz_resnet8", 10, shape, jax.random.key(key), **(SMALL | changes))


def uniform(seed, shape):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


@jax.jit
def jacobian(layer, x):
    return jax.jacrev(lambda x: layer(x[None])[0])(x)


def matrix(layer, shape):
    """The Jacobian [outputs, inputs] of a layer at an image of the shape."""
    x = jnp.asarray(np.random.default_rng(0).uniform(size=shape))
    return np.asarray(jacobian(layer, x), np.float64).reshape(-1, np.prod(shape))


def norm(layer, shape):
    return np.linalg.norm(matrix(layer, shape), 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rescaled:
    kernel: jax.Array

    def __call__(self, x):
        return same_convolution(x, rescale(self.kernel), self.kernel.dtype)


KERNELS = {
    "normal": lambda k: k,
    "huge": lambda k: 1e30 * k,
    "tiny": lambda k: 1e-30 * k,
    "zero": lambda k: 0 * k,
    "all alike": lambda k: 0 * k + 1,
    "one entry": lambda k: np.where(k == k.max(), k, 0),
    "uneven channels": lambda k: k * np.logspace(-15, 15, k.shape[3]),
    "uneven inputs": lambda k: k * np.logspace(-15, 15, k.shape[2])[:, None],
}


@pytest.mark.parametrize("change", KERNELS)
@pytest.mark.parametrize("shape", [(3, 3, 2, 5), (3, 3, 4, 4), (3, 3, 5, 2), (1, 1, 8, 3)])
def test_rescaled_kernels_have_a_norm_of_at_most_one(shape, change):
    for seed in range(3):
        kernel = KERNELS[change](np.random.default_rng(seed).normal(size=shape))
        with jax.enable_x64(True):
            exact = norm(Rescaled(jnp.asarray(kernel)), (5, 4, shape[2]))
        assert exact <= 1 + 1e-12
        if change in ("normal", "huge", "all alike", "one entry"):
            assert exact > 0.3, "a rescaled kernel should not be far below its bound"
        kernel = jnp.asarray(kernel, jnp.float32)
        assert norm(Rescaled(kernel), (5, 4, shape[2])) <= 1 + ROUNDING
        value, gradient = gradient_of_square(kernel)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@jax.jit
def gradient_of_square(kernel):
    return jax.value_and_grad(lambda k: jnp.square(rescale(k)).sum())(kernel)


def test_rescaling_leaves_orthogonal_kernels_and_forgets_the_scale():
    matrix = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 4)))[0].astype(np.float32)
    for kernel in map(jnp.asarray, (matrix, matrix.T)):
        np.testing.assert_allclose(rescale(kernel[None, None])[0, 0], kernel, atol=1e-6)
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 3))
    np.testing.assert_allclose(rescale(1e4 * kernel), rescale(kernel), rtol=1e-5)


def test_rescaling_by_hand():
    # P = [[1, 2]] has more inputs than outputs: 1 / sqrt(P P^T) on the output's side.
    found = rescale(jnp.array([1.0, 2.0]).reshape(1, 1, 2, 1)).ravel()
    np.testing.assert_allclose(found, np.array([1, 2]) / 5**0.5, rtol=1e-6)
    # Two taps (1, 1): correlation (1, 2, 1), sum 4.
    found = rescale(jnp.array([1.0, 1.0, 0.0]).reshape(1, 3, 1, 1)).ravel()
    np.testing.assert_allclose(found, [0.5, 0.5, 0], rtol=1e-6)


def test_rescaled_gradients_are_those_of_finite_differences():
    @jax.jit
    def value_and_slope(kernel, weights, direction):
        return jax.jvp(lambda k: (rescale(k) * weights).sum(), (kernel,), (direction,))

    with jax.enable_x64(True):
        for shape in ((3, 3, 2, 3), (1, 1, 3, 2)):
            kernel, *others = jnp.asarray(np.random.default_rng(0).normal(size=(3, *shape)))
            after, before = (
                value_and_slope(kernel + step * others[1], *others)[0] for step in (1e-6, -1e-6)
            )
            slope = value_and_slope(kernel, *others)[1]
            np.testing.assert_allclose((after - before) / 2e-6, slope, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_blocks_are_1_lipschitz(seed, scale):
    shape = (5, 3, 4)
    for layer in (
        ConvexPotentialBlock(4, dtype=jnp.float32, rngs=rngs()),
        Halving(4, dtype=jnp.float32, rngs=rngs()),
    ):
        rng = np.random.default_rng(seed)
        kernel = scale * rng.normal(size=layer.conv.kernel.shape)
        layer.conv.kernel[...] = jnp.asarray(kernel, jnp.float32)
        layer.conv.bias[...] = jnp.asarray(rng.normal(size=layer.conv.bias.shape), jnp.float32)
        assert norm(layer, shape) <= 1 + ROUNDING


def test_dense_layer_is_1_lipschitz():
    for size in (3, 12):
        layer = models.RescaledLinear(6, size, rngs=rngs())
        assert 0.3 < norm(layer, (6,)) <= 1 + ROUNDING


def test_group_sort_and_space_to_depth_keep_norms():
    x = jnp.array([3.0, 1.0, 2.0, 4.0])
    np.testing.assert_array_equal(models.GroupSort()(x), [3, 4, 2, 1])
    sorting = matrix(models.GroupSort(), (2, 1, 4))
    np.testing.assert_array_equal(sorting @ sorting.T, np.eye(8))
    image = jnp.arange(12.0).reshape(1, 2, 6, 1)
    moved = models.SpaceToDepth()(image)
    np.testing.assert_array_equal(moved[0, 0], [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]])
    odd = matrix(models.SpaceToDepth(), (3, 5, 2))
    assert models.SpaceToDepth()(jnp.ones((1, 3, 5, 2))).shape == (1, 2, 3, 8)
    np.testing.assert_array_equal(odd.T @ odd, np.eye(30))


def test_kernels_start_as_near_isometries():
    model = models.create("lipschitz_resnet8", 10, (28, 28, 1), jax.random.key(0))
    x = uniform(0, (24, 28, 28, 1))
    features = np.asarray(jax.jit(lambda m, x: m.features(x))(model, x))
    ratios = [
        np.linalg.norm(features[i] - features[j]) / np.linalg.norm(x[i] - x[j])
        for i in range(24)
        for j in range(i)
    ]
    # White noise of 784 pixels keeps at most (64 / 784)^0.5 = 0.29 of its length in 64 numbers.
    assert 0.01 < min(ratios) <= max(ratios) < 1
    kernel = np.asarray(model.dense.rescaled_kernel())
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(64), atol=1e-5)


DIGITS = jc.data.load("digits").take(256)


def train(model, objective, epochs):
    config = TrainingConfig(epochs=epochs, batch_size=32, optimizer="adamw", learning_rate=0.01)
    key = jax.random.key(1)
    return jc.training.fit(key, model, DIGITS, objective, config, progress=False).model


@pytest.fixture(scope="module")
def trained():
    return train(small(shape=(8, 8, 1), hidden=16), Standard(), 12)


def test_whole_networks_are_1_lipschitz(trained):
    wild = small(shape=(8, 8, 1), std=[0.25])
    for _, layer in nnx.iter_modules(wild):
        if isinstance(layer, (models.RescaledConv, models.RescaledLinear)):
            layer.kernel[...] = 1e3 * jax.random.cauchy(jax.random.key(1), layer.kernel.shape)
    for model, bound in ((small(shape=(8, 8, 1)), 1), (trained, 1), (wild, 4)):
        jacobian = jax.jit(jax.vmap(jax.jacrev(lambda x, m=model: m.features(x[None])[0])))
        jacobians = np.asarray(jacobian(uniform(0, (8, 8, 8, 1))), np.float64).reshape(8, -1, 64)
        assert np.linalg.norm(jacobians, 2, axis=(1, 2)).max() <= bound * (1 + ROUNDING)


def test_no_pair_of_images_beats_the_bound(trained):
    """Gradient ascent on the ratio of distances, from random pairs."""

    def ratio(pair):
        x, y = jnp.split(pair, 2)
        far = trained.features(x) - trained.features(y)
        distance = jnp.sqrt(jnp.square(x - y).sum(axis=(1, 2, 3)))
        return jnp.sqrt(jnp.square(far).sum(axis=1)) / distance

    @jax.jit
    def ascend(pair):
        def step(_, pair):
            gradient = jax.grad(lambda pair: ratio(pair).sum())(pair)
            return jnp.clip(pair + 0.1 * jnp.sign(gradient) * jnp.abs(gradient) ** 0.5, 0, 1)

        return ratio(pair), ratio(jax.lax.fori_loop(0, 50, step, pair))

    before, after = ascend(jnp.asarray(uniform(0, (200, 8, 8, 1))))
    assert before.mean() < after.mean() and after.max() <= 1 + ROUNDING
    assert after.max() > 0.1


def accuracy(model):
    logits = jax.jit(lambda m, x: m(x))(model, DIGITS.images.astype(np.float32) / 255)
    return (np.argmax(logits, 1) == DIGITS.labels).mean()


def test_it_learns(trained):
    assert accuracy(trained) > 0.9


def test_its_clusters_prove_something(trained):
    """Trained as ClusTR, without an adversary."""
    model = train(trained, jc.clustr.ClusTR(clusters_per_batch=8), 3)
    assert accuracy(model) > 0.9
    shares = [
        jc.evaluation.certify(model, DIGITS, jc.L2(eps)).certified_accuracy
        for eps in (0.01, 0.1, 1.0)
    ]
    assert shares[0] > 0.8 and shares[1] > 0.3 and shares[2] < 0.1


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"width": 3}, ValueError, "`width` must be even, as GroupSort takes pairs, got 3"),
        ({"width": 0}, ValueError, "`width` must be at least 2, got 0"),
        ({"hidden": 5}, ValueError, "`hidden` must be even, as GroupSort takes pairs, got 5"),
        ({"activation": "relu"}, TypeError, "`activation` is no argument of lipschitz_resnet8"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        small(**changes)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"`x` must be images of \(8, 6\) pixels, got \(8, 8\)"):
        small()(jnp.zeros((1, 8, 8, 2)))
