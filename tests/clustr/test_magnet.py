import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clustr_problems import clusters, full_magnet, magnet, nearest_own

import jaxclus as jc
from jaxclus.clustr import cluster_variance, full_magnet_loss, magnet_loss


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 12.5])
def test_equals_the_specification(seed, spread, alpha):
    points, ids, labels = clusters(seed, spread=spread)
    found = magnet_loss(points, ids, labels, alpha)
    np.testing.assert_allclose(found, magnet(points, ids, labels, alpha), rtol=1e-5, atol=1e-5)


def test_examples_of_a_cluster_need_not_be_neighbours():
    points, ids, labels = clusters(1)
    order = np.random.default_rng(0).permutation(len(points))
    shuffled = magnet_loss(points[order], ids[order], labels[order])
    np.testing.assert_allclose(shuffled, magnet_loss(points, ids, labels)[order], rtol=1e-5)


def test_two_clusters_by_hand():
    # Means at -2 and 2, every example 1 from its own: sigma^2 = 4/3; the other mean is 3 or 5 away.
    points = jnp.array([[-3.0], [-1.0], [1.0], [3.0]])
    found = magnet_loss(points, jnp.array([0, 0, 1, 1]), jnp.array([0, 0, 1, 1]), alpha=4.0)
    other = np.array([25.0, 9.0, 9.0, 25.0])
    wanted = np.maximum(0, 4 + (1 - other) * 3 / 8)
    np.testing.assert_allclose(found, wanted, atol=2e-4)  # the two 1e-8 make 1.4e-4 of it


def test_large_distances_neither_overflow_nor_lose_their_gradient():
    points, ids, labels = clusters(2, spread=0.01)
    points = points * 100
    swapped = np.roll(points, 6, axis=0)  # every example among those of another cluster
    ids = np.roll(np.repeat(np.arange(8), 6), 3)
    labels = np.roll(labels, 3)
    for batch in (points, swapped):
        value, gradient = jax.value_and_grad(lambda r: magnet_loss(r, ids, ids, 12.5).mean())(
            jnp.asarray(batch)
        )
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


def test_the_gradient_is_finite_where_examples_are_at_their_means():
    points, ids, labels = clusters(3, spread=0.0)

    def mean(r):
        return magnet_loss(r, ids, labels).mean()

    assert np.isfinite(jax.grad(mean)(jnp.asarray(points))).all()
    # All examples of a batch at one place: every distance is 0, the losses log(clusters) + alpha.
    nowhere = jnp.zeros((48, 5))
    np.testing.assert_allclose(magnet_loss(nowhere, ids, labels, 1.0), 1 + np.log(6), rtol=1e-5)
    assert np.isfinite(jax.grad(mean)(nowhere)).all()
    # Two clusters 3 apart: entries of r - mean r are 1.5 in size, so D / (2 sigma^2) = 9 / 4.5.
    apart, two = jnp.array([[0.0], [0.0], [3.0], [3.0]]), jnp.array([0, 0, 1, 1])
    np.testing.assert_allclose(magnet_loss(apart, two, two, 12.5), 10.5, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_no_scale_is_too_small_or_too_large(scale):
    points, ids, labels = clusters(4, spread=2.0)

    def mean(r):
        return magnet_loss(r, ids, labels, 3.0).mean()

    wanted, slope = jax.value_and_grad(mean)(jnp.asarray(points))
    found, scaled = jax.value_and_grad(mean)(jnp.asarray(scale * points, jnp.float32))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    np.testing.assert_allclose(scale * np.asarray(scaled, float), slope, rtol=1e-2, atol=1e-4)


def test_the_gradient_equals_finite_differences():
    points, ids, labels = clusters(4, classes=3, members=3, dim=2, spread=2.0)
    gradient = jax.grad(lambda r: magnet_loss(r, ids, labels, 3.0).sum())(jnp.asarray(points))
    numeric, step = np.zeros(points.shape), 1e-5
    for place in np.ndindex(points.shape):
        moved = np.zeros(points.shape)
        moved[place] = step
        up, down = (magnet(points + sign * moved, ids, labels, 3.0).sum() for sign in (1, -1))
        numeric[place] = (up - down) / (2 * step)
    assert np.abs(numeric).max() > 0.1
    np.testing.assert_allclose(gradient, numeric, atol=2e-3 * np.abs(numeric).max())


def test_jit_and_vmap_agree():
    points, ids, labels = clusters(5)
    alone = magnet_loss(points, ids, labels)
    np.testing.assert_allclose(jax.jit(magnet_loss)(points, ids, labels), alone, rtol=1e-5)
    both = jax.vmap(magnet_loss, (0, None, None))(np.stack([points, 2 * points]), ids, labels)
    np.testing.assert_allclose(both[0], alone, rtol=1e-5)
    # The loss does not change with the scale: sigma does with it.
    np.testing.assert_allclose(both[1], alone, rtol=1e-4)


@pytest.mark.parametrize("as_published", [False, True])
def test_the_full_loss_equals_the_specification(as_published):
    points, ids, labels = clusters(6, spread=2.0)
    centres = np.stack([points[ids == j].mean(axis=0) for j in range(8)]) + 0.1
    classes = np.arange(8) // 2
    found = full_magnet_loss(points, labels, centres, classes, 2.0, as_published=as_published)
    wanted = full_magnet(points, labels, centres, classes, 2.0, as_published)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    variance = nearest_own(points, labels, centres, classes).sum() / 47
    np.testing.assert_allclose(cluster_variance(points, labels, centres, classes), variance, 1e-5)


def test_the_published_full_loss_is_the_larger():
    points, ids, labels = clusters(7)
    centres = np.stack([points[ids == j].mean(axis=0) for j in range(8)])
    right, published = (
        full_magnet_loss(points, labels, centres, np.arange(8) // 2, 1.0, as_published=flag)
        for flag in (False, True)
    )
    assert (published > right + 0.5).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embeddings": np.zeros((1, 3), np.float32)}, "`embeddings` must have the shape"),
        ({"embeddings": np.zeros((48, 5), int)}, "`embeddings` must be floating point"),
        ({"embeddings": np.full((48, 5), np.nan, np.float32)}, "`embeddings` must be finite"),
        ({"cluster_ids": np.zeros(3, int)}, "`cluster_ids` must have the shape"),
        ({"class_ids": np.zeros(3, int)}, "`class_ids` must have the shape"),
        ({"class_ids": np.arange(48)}, "`class_ids` must be one for each cluster"),
        ({"alpha": -1.0}, "`alpha` must be"),
    ],
)
def test_bad_batches_are_refused(change, message):
    names = ("embeddings", "cluster_ids", "class_ids")
    arguments = dict(zip(names, clusters(), strict=True)) | change
    with pytest.raises((TypeError, ValueError), match=message):
        magnet_loss(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"centres": np.zeros((8, 4), np.float32)}, "`centres` must have the embeddings' size 5"),
        ({"centre_classes": np.zeros(8, int)}, r"`centre_classes` .* \[1, 2, 3\] have no centre"),
        ({"labels": np.zeros(4, int)}, "`labels` must have the shape"),
        ({"centres": np.full((8, 5), np.inf, np.float32)}, "`centres` must be finite"),
    ],
)
def test_bad_sets_are_refused(change, message):
    points, _, labels = clusters()
    arguments = {
        "embeddings": points,
        "labels": labels,
        "centres": points[::6],
        "centre_classes": np.arange(8) // 2,
    } | change
    with pytest.raises((TypeError, ValueError), match=message):
        cluster_variance(**arguments)


def test_under_jit_what_is_wrong_gives_nan():
    points, ids, labels = clusters()
    full = jax.jit(full_magnet_loss)
    centres, classes = points[::6], np.arange(8) // 2
    assert np.isfinite(full(points, labels, centres, classes)).all()
    holed = points.copy()
    holed[7, 2] = np.nan
    assert np.isnan(full(holed, labels, centres, classes)).all()
    assert np.isnan(full(points, labels, centres, classes * 0)).all()  # labels without centres
    assert np.isnan(full(points, labels, centres * np.float32(np.inf), classes)).all()
    assert np.isnan(jax.jit(magnet_loss)(holed, ids, labels)).all()


def test_classes_of_a_head_will_do():
    points, _, labels = clusters()
    head = jc.clustr.ClusterClassifier(jnp.asarray(points[::6]), (0, 0, 1, 1, 2, 2, 3, 3), 1.0)
    for function in (full_magnet_loss, cluster_variance):
        found = function(points, labels, head.centres, head.centre_classes)
        wanted = function(points, labels, head.centres, np.asarray(head.centre_classes))
        np.testing.assert_array_equal(found, wanted)
