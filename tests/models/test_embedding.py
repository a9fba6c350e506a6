"""Networks with a dense layer of a chosen size before the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxclus as jc

SHAPE, KEY = (8, 8, 3), jax.random.key(0)
NETWORKS = {
    "cnn": {"widths": (4,), "hidden": 6},
    "resnet8": {"width": 4},
    "lipschitz_resnet8": {"width": 2},
}
X = jax.random.uniform(jax.random.key(1), (5, *SHAPE))
features = jc.jit(lambda model, x: model.features(x))
body = jc.jit(lambda model, x: model.body(model.normalize(x)))
logits = jc.jit(lambda model, x: model(x))


def create(name, **arguments):
    return jc.models.create(name, 10, SHAPE, KEY, **(NETWORKS[name] | arguments))


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_a_dense_layer_of_the_body(name):
    model = create(name, embedding_size=7)
    layer = model.embedding
    kernel = layer.rescaled_kernel() if name == "lipschitz_resnet8" else layer.kernel[...]
    wanted = body(model, X) @ kernel + layer.bias[...][None]
    h, z = features(model, X), logits(model, X)
    np.testing.assert_allclose(h, wanted, rtol=1e-5, atol=1e-6)
    assert h.shape == (5, 7) and z.shape == (5, 10)
    assert np.any(h < 0)
    again = jc.jit(lambda model, x: (model(x), model.head(model.features(x))))(model, X)
    np.testing.assert_allclose(*again, rtol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_has_as_many_weights_as_that_layer_more(name):
    def count(model):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    with_it, without = create(name, embedding_size=7), create(name)
    d = without.head.in_features
    assert count(with_it) - count(without) == d * 7 + 7 + (7 - d) * 10
    assert with_it.spec != without.spec


@pytest.mark.parametrize("name", NETWORKS)
def test_it_goes_through_a_file(tmp_path, name):
    model = create(name, embedding_size=7)
    loaded = jc.load(jc.export(model, tmp_path / "model.safetensors"))
    assert loaded.spec == model.spec
    np.testing.assert_array_equal(logits(loaded, X), logits(model, X))


@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_go_through_it(name):
    model = create(name, embedding_size=7)
    bound = jc.models.lipschitz_bound(model, SHAPE)
    if name == "lipschitz_resnet8":
        assert bound <= 1 + 1e-5
    jacobian = jax.jit(jax.vmap(jax.jacobian(lambda x: model.features(x[None])[0])))(X)
    jacobian = jacobian.reshape(5, 7, -1)
    assert np.linalg.norm(jacobian, 2, axis=(1, 2)).max() <= bound
    low, high = jc.jit(jc.models.interval_bounds)(model, X, 0.01)
    for sign in np.sign(np.random.default_rng(0).standard_normal((20, 1, *SHAPE))):
        moved = features(model, jnp.clip(X + jnp.float32(0.01 * sign), 0, 1))
        assert np.all(low <= moved) and np.all(moved <= high)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_head_stands_on_it(name):
    model = create(name, embedding_size=7)
    renewed = jc.models.with_new_head(model, 3, jax.random.key(2))
    np.testing.assert_array_equal(features(renewed, X), features(model, X))
    assert logits(renewed, X).shape == (5, 3) and renewed.spec.num_classes == 3
    assert dict(renewed.spec.arguments)["embedding_size"] == 7


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_it_is_part_of_the_linear_sub_network(name):
    model = create(name, embedding_size=7)
    weight, bias = jc.implicit_weight(jc.linearize(model), SHAPE)
    without = jc.linearize(lambda x: model.body(model.normalize(x)))
    h = jax.jit(without)(X) @ model.embedding.kernel[...] + model.embedding.bias[...][None]
    wanted = h @ model.head.kernel[...] + model.head.bias[...][None]
    found = jnp.einsum("bhwc,khwc->bk", X, weight) + bias[None]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "resnet8"])
def test_in_bfloat16_embeddings_are_float32_and_near(name):
    model, low = create(name, embedding_size=7), create(name, embedding_size=7, dtype="bfloat16")
    h, h_low = features(model, X), features(low, X)
    assert h_low.dtype == jnp.float32 == low.embedding.kernel[...].dtype
    np.testing.assert_allclose(h_low, h, atol=0.05 * float(jnp.abs(h).max()))
    assert np.any(h_low != h)


def test_bad_sizes():
    with pytest.raises(ValueError, match="`embedding_size` must be at least 1, got 0"):
        create("cnn", embedding_size=0)
    with pytest.raises(TypeError, match="`embedding_size` must be an integer of at least 1"):
        create("cnn", embedding_size=2.5)
