import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxclus.clustering import PUBLISHED_COUNT, feature_distance


def reference(embeddings, labels, k, first=None):
    means = [embeddings.astype(np.float64)[labels == c][:first].mean(axis=0) for c in range(k)]
    return np.array([[np.mean((a - b) ** 2) for b in means] for a in means])


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(40) % 4)
    embeddings = rng.standard_normal((40, 6)).astype(np.float32) + labels[:, None]
    return embeddings.astype(np.float32), labels


@pytest.fixture
def published():
    """Logits of three classes with 130, 128 and 200 members in random order."""
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([0, 1, 2], [130, 128, 200]))
    return rng.standard_normal((458, 3)).astype(np.float32) * (labels[:, None] + 1), labels


def test_by_hand():
    embeddings = np.float32([[0, 0], [3, 1], [2, 2], [5, 5], [4, 6]])
    F = feature_distance(embeddings, np.array([0, 1, 0, 2, 2]), num_classes=3)
    # means (1, 1), (3, 1), (4.5, 5.5)
    d02, d12 = (3.5**2 + 4.5**2) / 2, (1.5**2 + 4.5**2) / 2
    np.testing.assert_allclose(F, [[0, 2, d02], [2, 0, d12], [d02, d12, 0]], rtol=1e-6)


def test_equals_numpy_in_float64(data):
    F = feature_distance(*data, 4)
    assert F.dtype == jnp.float32
    np.testing.assert_allclose(F, reference(*data, 4), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(F, F.T)
    np.testing.assert_array_equal(np.diagonal(F), 0)


def test_order_and_relabelling_do_not_matter(data):
    embeddings, labels = data
    F = np.asarray(feature_distance(embeddings, labels, 4))
    order = np.random.default_rng(3).permutation(40)
    np.testing.assert_allclose(feature_distance(embeddings[order], labels[order], 4), F, rtol=1e-5)
    renamed = np.array([2, 0, 3, 1])
    moved = np.asarray(feature_distance(embeddings, renamed[labels], 4))
    np.testing.assert_allclose(moved[np.ix_(renamed, renamed)], F, rtol=1e-5)


def test_small_distances_between_far_means_survive():
    # |m|^2 - 2 m.m' + |m'|^2 in float32 would give 0 or less here
    embeddings = np.float32([[1000, 1000], [1000, 1000.25]])
    F = feature_distance(embeddings, np.array([0, 1]), 2)
    np.testing.assert_allclose(F, [[0, 0.25**2 / 2], [0.25**2 / 2, 0]], rtol=1e-6)


def test_as_published_takes_the_first_128_and_scales_rows(published):
    F = feature_distance(*published, 3, as_published=True)
    raw = reference(*published, 3, first=PUBLISHED_COUNT)
    np.testing.assert_allclose(F, raw / raw.max(axis=1, keepdims=True), rtol=1e-4)
    np.testing.assert_array_equal(F.max(axis=1), 1)
    assert PUBLISHED_COUNT == 128
    assert np.abs(F - F.T).max() > 0.1


def test_as_published_ignores_later_embeddings(published):
    embeddings, labels = published
    late = np.flatnonzero(labels == 2)[PUBLISHED_COUNT:]
    changed = embeddings.copy()
    changed[late] = 100
    same, other = (feature_distance(e, labels, 3, as_published=True) for e in (embeddings, changed))
    np.testing.assert_array_equal(same, other)
    assert np.abs(feature_distance(changed, labels, 3) - same).max() > 1


@pytest.mark.parametrize("as_published", [False, True])
def test_jit_and_vmap_agree(published, as_published):
    embeddings, labels = published

    def distance(e, y):
        return feature_distance(e, y, 3, as_published=as_published)

    single = distance(embeddings, labels)
    np.testing.assert_allclose(jax.jit(distance)(embeddings, labels), single, rtol=1e-5)
    batch = jnp.stack([embeddings, embeddings**2])
    np.testing.assert_allclose(
        jax.vmap(distance, in_axes=(0, None))(batch, labels),
        jnp.stack([single, distance(batch[1], labels)]),
        rtol=1e-5,
    )


def test_gradient(data):
    embeddings, labels = data
    check_grads(
        lambda e: feature_distance(e, labels, 4),
        (jnp.asarray(embeddings),),
        order=1,
        modes=("fwd", "rev"),
        rtol=2e-2,
    )
    # dF_01 / de = +-2 (m_0 - m_1) / (d n_c) for the members of classes 0 and 1
    gradient = jax.grad(lambda e: feature_distance(e, labels, 4)[0, 1])(jnp.asarray(embeddings))
    gap = embeddings[labels == 0].mean(axis=0) - embeddings[labels == 1].mean(axis=0)
    sign = np.array([1, -1, 0, 0])[labels]
    np.testing.assert_allclose(gradient, sign[:, None] * 2 * gap / (6 * 10), atol=1e-6)


def test_missing_class_raises_on_the_host_and_gives_nan_under_tracing(data):
    embeddings, labels = data
    with pytest.raises(ValueError, match="each class at least 1 times, got class 4 0 times"):
        feature_distance(embeddings, labels, 6)
    F = jax.jit(feature_distance, static_argnums=2)(embeddings, labels, 5)
    np.testing.assert_allclose(F[:4, :4], feature_distance(embeddings, labels, 4), rtol=1e-5)
    assert np.isnan(F[4]).all() and np.isnan(F[:, 4]).all()


def test_as_published_needs_128_of_each_class(published):
    embeddings, labels = published
    short = np.delete(np.arange(458), np.flatnonzero(labels == 1)[0])
    with pytest.raises(ValueError, match="at least 128 times, got class 1 127 times"):
        feature_distance(embeddings[short], labels[short], 3, as_published=True)
    feature_distance(embeddings[short], labels[short], 3)

    def distance(e, y):
        return feature_distance(e, y, 3, as_published=True)

    assert np.isnan(jax.jit(distance)(embeddings[short], labels[short])).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeddings": np.ones((4, 3), np.int32)}, TypeError, "`embeddings` must be floating"),
        ({"embeddings": np.ones(4, np.float32)}, ValueError, r"\[n, d\], got \(4,\)"),
        ({"embeddings": np.ones((4, 0), np.float32)}, ValueError, r"\[n, d\], got \(4, 0\)"),
        ({"embeddings": np.full((4, 3), np.nan, np.float32)}, ValueError, "must be finite"),
        ({"labels": np.array([0, 1, 0])}, ValueError, r"`labels` must have the shape \(4,\)"),
        ({"labels": np.array([0, 1, 0, 2])}, ValueError, r"`labels` must be in \[0, 1\]"),
        ({"labels": np.array([0, 1, 0, -1])}, ValueError, r"`labels` must be in \[0, 1\]"),
        ({"labels": np.float32([0, 1, 0, 1])}, TypeError, "`labels` must be integer"),
        ({"num_classes": 1}, ValueError, "`num_classes` must be at least 2, got 1"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "embeddings": np.ones((4, 3), np.float32),
        "labels": np.array([0, 1, 0, 1]),
        "num_classes": 2,
    }
    feature_distance(**good)
    with pytest.raises(error, match=message):
        feature_distance(**(good | change))
