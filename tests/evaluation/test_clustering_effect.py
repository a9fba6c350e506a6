"""The clustering effect of one network against its parts, computed by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclus as jc


@pytest.fixture(scope="module")
def digits():
    return jc.data.load("digits", "test")


@pytest.fixture(scope="module")
def model():
    network = jc.models.create("cnn", 10, (8, 8, 1), jax.random.key(0))
    # Statistics as after training: a fresh BatchNorm would be nearly the identity.
    for block in network.blocks:
        block.norm.mean[...] = jnp.linspace(-0.1, 0.1, block.norm.mean.shape[0])
        block.norm.var[...] = jnp.linspace(0.2, 2.0, block.norm.var.shape[0])
    return network


@pytest.fixture(scope="module")
def effect(model, digits):
    return jc.evaluation.clustering_effect(model, digits)


def test_each_variant_is_the_implicit_weight_of_its_linear_network(model, digits, effect):
    networks = {
        "with_batch_norm": model,
        "without_batch_norm": jc.models.without_batch_norm(model),
    }
    weights = []
    for name, network in networks.items():
        weight, bias = jc.implicit_weight(jc.linearize(network), (8, 8, 1))
        variant = effect.variants[name]
        np.testing.assert_allclose(variant.weight, weight, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(variant.bias, bias, rtol=1e-5, atol=1e-7)
        assert variant.affine_error <= 1e-4
        rows = np.asarray(weight, np.float64).reshape(10, -1)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(variant.correlation, rows @ rows.T, atol=1e-5)
        score = jc.clustering.clustering_score(variant.correlation, digits.groups)
        assert variant.score == score
        weights.append(rows)
    assert np.abs(weights[0] - weights[1]).max() > 1e-3, "BatchNorm made no difference"


def test_feature_distance_is_that_of_the_whole_network(model, digits, effect):
    logits = np.asarray(model(jc.data.to_float(digits.images)), np.float64)
    means = np.stack([logits[digits.labels == c].mean(axis=0) for c in range(10)])
    wanted = ((means[:, None] - means[None]) ** 2).mean(axis=-1)
    np.testing.assert_allclose(effect.feature_distance, wanted, rtol=1e-4, atol=1e-7)
    assert effect.feature_distance_as_published is None, "digits has fewer than 128 a class"
    assert effect.num_images == len(digits)


def test_the_published_feature_distance_needs_128_images_of_each_class(model):
    images = np.random.default_rng(0).integers(0, 256, (1290, 8, 8, 1), np.uint8)
    data = jc.data.Dataset(images, np.arange(1290) % 10)
    found = jc.evaluation.clustering_effect(model, data)
    assert found.feature_distance_as_published is not None
    np.testing.assert_allclose(found.feature_distance_as_published.max(axis=1), 1, rtol=1e-6)
    assert all(variant.score is None for variant in found.variants.values()), "no groups"


def test_filters_are_named_after_their_layers(effect):
    assert {name: matrix.shape for name, matrix in effect.filters.items()} == {
        "blocks/0/conv": (16, 16),
        "blocks/1/conv": (32, 32),
        "blocks/2/conv": (64, 64),
    }


def test_record_is_strict_json_and_plain_arrays(effect, digits):
    record = json.loads(json.dumps(effect.to_json(digits), allow_nan=False))
    assert record["groups"] == [[name, list(members)] for name, members in digits.groups]
    assert record["variants"]["with_batch_norm"]["score"]["exact"] is True
    arrays = effect.arrays()
    assert arrays["without_batch_norm/linkage"].shape == (9, 4)
    assert all(array.dtype != object for array in arrays.values())


def test_other_callables_are_refused(digits):
    with pytest.raises(TypeError, match="`model` must be a jc.models.Classifier"):
        jc.evaluation.clustering_effect(lambda x: x.sum((1, 2)), digits)


def test_a_network_that_cannot_be_made_affine_is_named(digits):
    model = jc.models.create("cnn", 10, (8, 8, 1), jax.random.key(0), activation="tanh")
    with pytest.raises(ValueError, match="tanh"):
        jc.evaluation.clustering_effect(model, digits)


def test_discovered_groups_are_the_planted_ones():
    planted = (("a", (0, 4, 5)), ("b", (1, 3)), ("c", (2, 6, 7)))
    network = jc.models.create("cnn", 8, (8, 8, 1), jax.random.key(0), widths=(8,), hidden=32)
    columns = np.random.default_rng(0).normal(size=(3, 32))
    noise = 0.3 * np.random.default_rng(1).normal(size=(8, 32))
    for number, (_, members) in enumerate(planted):
        for c in members:
            network.head.kernel[...] = network.head.kernel.at[:, c].set(columns[number] + noise[c])
    found = jc.evaluation.discover_groups(network, (8, 8, 1), 3)
    assert [members for _, members in found] == [members for _, members in planted]
    matrix = jc.evaluation.implicit_correlation(network, (8, 8, 1))
    images = np.random.default_rng(2).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    effect = jc.evaluation.clustering_effect(network, jc.data.Dataset(images, np.arange(16) % 8))
    np.testing.assert_array_equal(matrix, effect.variants["without_batch_norm"].correlation)
    # They can be handed on as they are.
    objective = jc.training.objectives.WeightClustering(
        jc.training.objectives.Standard(), found, beta=1.0
    )
    assert objective.groups == (0, 1, 2, 1, 0, 0, 2, 2)


def test_discovering_needs_a_network_and_a_number_of_groups():
    network = jc.models.create("cnn", 4, (8, 8, 1), jax.random.key(0), widths=(4,), hidden=8)
    with pytest.raises(ValueError, match=r"`num_groups` must be in \[1, 4\], got 5"):
        jc.evaluation.discover_groups(network, (8, 8, 1), 5)
    with pytest.raises(TypeError, match="`teacher` must be a jc.models.Classifier"):
        jc.evaluation.discover_groups(lambda x: x, (8, 8, 1), 2)
