import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.cluster import KMeans as Peer
from threadpoolctl import threadpool_limits

from jaxclus import parallel
from jaxclus.clustering import KMeans, _kmeans, kmeans

KEY = jax.random.key(0)


def mixture(seed, n, d, parts, spread=1.0):
    """Points from `parts` Gaussians whose means are `spread` standard deviations from 0."""
    rng = np.random.default_rng(seed)
    means = spread * rng.standard_normal((parts, d))
    return (means[rng.integers(0, parts, n)] + rng.standard_normal((n, d))).astype(np.float32)


def squared_distances(points, centres):
    """[n, k] in float64."""
    points, centres = np.asarray(points, np.float64), np.asarray(centres, np.float64)
    return np.square(points[:, None] - centres).sum(-1)


def lloyd(points, centres, max_iter, tolerance=1e-4):
    """Plain Lloyd in float64, for starts that leave no cluster empty."""
    points, centres = np.asarray(points, np.float64), np.asarray(centres, np.float64)
    labels, iterations = None, 0
    while iterations < max_iter:
        iterations += 1
        before, labels = labels, squared_distances(points, centres).argmin(1)
        old, centres = centres, np.stack([points[labels == j].mean(0) for j in range(len(centres))])
        still = np.square(centres - old).sum() <= tolerance * points.var(0).mean()
        if still or (before is not None and (labels == before).all()):
            break
    return centres, iterations


def assert_consistent(found, points, mask=None):
    """Assignments are nearest and inertia theirs, in float64; clusters' means the centres."""
    mask = np.ones(len(points), bool) if mask is None else mask
    squared = squared_distances(points, found.centres)
    taken = np.take_along_axis(squared, np.asarray(found.assignments)[:, None], 1)[:, 0]
    np.testing.assert_allclose(taken, squared.min(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.inertia, taken[mask].sum(), rtol=2e-6, atol=1e-9)


def assert_equal(found, expected):
    """The same clusters, up to rounding in another shape."""
    np.testing.assert_allclose(found.centres, expected.centres, atol=2e-5)
    np.testing.assert_allclose(found.inertia, expected.inertia, rtol=2e-6)
    np.testing.assert_array_equal(found.assignments, expected.assignments)
    np.testing.assert_array_equal(found.iterations, expected.iterations)


def test_as_many_clusters_as_points():
    points = mixture(0, 7, 3, 2)
    found = kmeans(KEY, points, 7)
    assert sorted(found.assignments.tolist()) == list(range(7))
    np.testing.assert_allclose(found.inertia, 0, atol=1e-10)
    np.testing.assert_allclose(found.centres[found.assignments], points, atol=1e-6)


def test_one_cluster_is_the_mean():
    points = mixture(1, 501, 4, 3) + 100
    found = kmeans(KEY, points, 1)
    assert isinstance(found, KMeans) and found.centres.shape == (1, 4)
    assert found.inertia.dtype == found.centres.dtype == jnp.float32
    assert found.assignments.dtype == found.iterations.dtype == jnp.int32
    np.testing.assert_allclose(found.centres[0], points.mean(0, dtype=np.float64), rtol=1e-6)
    expected = 501 * points.var(0, dtype=np.float64).sum()
    np.testing.assert_allclose(found.inertia, expected, rtol=1e-6)
    assert not found.assignments.any() and found.iterations in (1, 2)


def test_separated_blobs_are_found():
    corners = np.float32([*itertools.product((-50, 50), repeat=3)])
    blob = np.repeat(np.arange(8), 30)
    points = corners[blob] + 1000 + np.random.default_rng(2).uniform(-1, 1, (240, 3))
    found = kmeans(KEY, points.astype(np.float32), 8)
    pairs = {*zip(blob.tolist(), found.assignments.tolist(), strict=True)}
    assert len(pairs) == 8 == len({j for _, j in pairs})
    for i, j in pairs:
        expected = points[blob == i].mean(0)
        np.testing.assert_allclose(found.centres[j], expected, rtol=1e-6)
    assert found.iterations <= 3


def test_lloyd_in_float64_from_the_same_start():
    run = jax.jit(_kmeans._lloyd)
    for seed in range(5):
        points = mixture(seed, 1000, 2, 6)
        points -= points.mean(0)
        start = points[np.random.default_rng(seed).choice(1000, 4, replace=False)]
        for max_iter in (1, 3, 100):
            found, iterations = run(points, np.ones(1000, bool), start[None], max_iter)
            expected, done = lloyd(points, start, max_iter)
            np.testing.assert_allclose(found[0], expected, atol=1e-5)
            assert iterations.tolist() == [done]
        assert 3 < done < lloyd(points, start, 100, tolerance=0)[1]  # the tolerance stops it


def test_a_fixed_point_is_returned():
    points = mixture(3, 400, 8, 10) + 20
    found = kmeans(KEY, points, 6)
    assert_consistent(found, points)
    means = [points[found.assignments == j].mean(0, dtype=np.float64) for j in range(6)]
    # It stops at steps of at most 1e-4 of the variance, and those shrink.
    step = np.square(found.centres - np.stack(means)).sum()
    assert step <= 1e-4 * points.var(0).mean()
    assert 2 < found.iterations < 100


def test_results_belong_together_also_when_stopped_early():
    points = mixture(4, 400, 8, 10)
    for max_iter in (1, 2):
        found = kmeans(KEY, points, 6, max_iter=max_iter)
        assert found.iterations == max_iter
        assert_consistent(found, points)


@pytest.mark.parametrize(
    ("n", "d", "parts", "k", "num_init"),
    [(300, 2, 12, 12, 8), (200, 50, 8, 3, 4), (150, 4, 20, 20, 8)],
)
def test_inertias_are_those_of_scikit_learn(n, d, parts, k, num_init):
    points = mixture(n, n, d, parts, spread=3.0)
    fit = jax.jit(lambda key: kmeans(key, points, k, num_init=num_init).inertia)
    ours = np.array([fit(key) for key in jax.random.split(KEY, 20)])
    with threadpool_limits(1):  # its threads wait for each other where another process runs
        peers = [Peer(k, n_init=num_init, random_state=i).fit(points).inertia_ for i in range(20)]
    assert np.median(ours) == pytest.approx(np.median(peers), rel=1e-2)
    assert np.mean(ours) == pytest.approx(np.mean(peers), rel=1e-2)


def test_one_restart_finds_the_best_as_often_as_scikit_learns():
    # Inertias of single restarts lie apart, in several optima: medians jump from one to another.
    points, seeds = mixture(400, 400, 16, 4, spread=3.0), 400
    fit = jax.jit(lambda key: kmeans(key, points, 2).inertia)
    ours = np.array([fit(key) for key in jax.random.split(KEY, seeds)])
    with threadpool_limits(1):
        peers = [Peer(2, n_init=1, random_state=i).fit(points).inertia_ for i in range(seeds)]
    best = 1.0001 * min(ours.min(), *peers)
    shares = [np.mean(np.array(inertias) < best) for inertias in (ours, peers)]
    assert 0.2 < shares[0] < 0.9
    assert shares[0] == pytest.approx(shares[1], abs=0.1)  # 3 standard deviations


def test_seeds_are_distinct_points_that_count_and_greedy():
    points, mask = mixture(5, 60, 2, 5, spread=9), np.arange(60) % 2 == 0

    def potential(seeds):
        return squared_distances(points, seeds).min(1)[mask].mean()

    seeds = jax.jit(_kmeans._seeded, static_argnums=(3, 4))(KEY, points, mask, 5, 40)
    seeds = np.asarray(seeds)
    at = (seeds[:, :, None] == points).all(-1)
    assert at.any(-1).all() and mask[at.argmax(-1)].all()
    assert all(len({*row}) == 5 for row in at.argmax(-1).tolist())
    rng = np.random.default_rng(0)
    uniform = [points[2 * rng.choice(30, 5, replace=False)] for _ in range(40)]
    assert np.median([*map(potential, seeds)]) < 0.5 * np.median([*map(potential, uniform)])


def test_draws_are_in_proportion_to_the_weights():
    weights = jnp.float32([0, 3, 0, 1, 0, 4, 0])
    uniform = jax.random.uniform(KEY, (1, 20_000))
    drawn = _kmeans._drawn(weights[:, None], jnp.ones(7, bool), uniform)
    shares = np.bincount(drawn[0], minlength=7) / 20_000
    np.testing.assert_allclose(shares, weights / 8, atol=0.015)
    assert not shares[weights == 0].any()
    mask = jnp.array([False, True, False, True])
    for weight in (0, 1e-30):
        extremes = jnp.float32([[0, 0.5, 1 - 2**-24]])
        drawn = _kmeans._drawn(jnp.full((4, 1), weight) * mask[:, None], mask, extremes)
        assert drawn.tolist() in ([[1, 3, 3]], [[1, 1, 3]])


def test_more_restarts_are_no_worse():
    points = mixture(6, 400, 3, 15, spread=4)
    found = [kmeans(KEY, points, 15, num_init=r).inertia for r in (1, 16)]
    assert found[1] < 0.99 * found[0]


def test_masked_points_change_nothing_and_have_the_nearest_centre():
    points = mixture(7, 90, 3, 4, spread=5)
    mask = np.arange(90) % 3 > 0
    found = kmeans(KEY, points, 4, mask)
    assert_consistent(found, points, mask)
    other = np.where(mask[:, None], points, np.float32(1e20))
    other[0], other[3] = np.nan, -np.inf
    again = kmeans(KEY, other, 4, mask)
    np.testing.assert_array_equal(again.centres, found.centres)
    np.testing.assert_array_equal(again.assignments[mask], found.assignments[mask])
    assert again.inertia == found.inertia and again.iterations == found.iterations
    assert (again.assignments >= 0).all() and (again.assignments < 4).all()


def test_a_batch_of_unequal_data_sets_equals_each_alone():
    sizes = np.array([50, 20, 37, 9])
    mask = np.arange(50) < sizes[:, None]
    points = np.stack([mixture(i, 50, 6, 3, spread=3) + 10 * i for i in range(4)])
    points[~mask] = np.nan

    def fit(order):
        return kmeans(KEY, points[order], 3, mask[order], num_init=2)

    found = fit(np.arange(4))
    assert found.centres.shape == (4, 3, 6) and found.assignments.shape == (4, 50)
    for i in range(4):  # the other data sets do not matter, the place does
        others = fit(np.where(np.arange(4) == i, i, 3 - np.arange(4)))
        for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(a[i], b[i])
    for i in (1, 2):  # alone it is at place 0
        alone = kmeans(KEY, points[i, : sizes[i]], 3, num_init=2)
        first = jax.tree.map(lambda array: array[0], fit(np.arange(4) - 4 + i))
        first = dataclasses.replace(first, assignments=first.assignments[: sizes[i]])
        assert_equal(first, alone)
        assert_consistent(alone, points[i, : sizes[i]])


def test_leading_axes():
    points = np.stack([mixture(i, 30, 2, 3) for i in range(2)])
    flat = kmeans(KEY, points, 3)
    found = kmeans(KEY, points[:, None], 3)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(flat), strict=True):
        assert a.shape == (2, 1, *b.shape[1:])
        np.testing.assert_array_equal(a[:, 0], b)
    twice = kmeans(KEY, points[[0, 0]], 3, max_iter=1)  # another place, other random numbers
    assert not np.array_equal(twice.centres[0], twice.centres[1])


def test_fewer_distinct_points_than_clusters():
    points = np.repeat(np.float32([[0, 0], [3, 0], [0, 4]]), [5, 4, 3], axis=0)
    found = kmeans(KEY, points, 6, num_init=2)
    assert np.isfinite(found.centres).all() and found.iterations < 10
    np.testing.assert_allclose(found.inertia, 0, atol=1e-9)
    assert {*map(tuple, np.round(found.centres, 4).tolist())} == {*map(tuple, points.tolist())}
    same = kmeans(KEY, np.full((12, 2), 7.3, np.float32), 6, num_init=2)
    np.testing.assert_allclose(same.centres, 7.3, rtol=1e-6)


def test_empty_clusters_take_the_farthest_points():
    run = jax.jit(_kmeans._iteration)
    points = np.float32([[0], [1], [2], [3], [30], [-40], [99]])
    mask = np.arange(7) < 6  # 99 does not count
    start = np.float32([[1.5, 500, 900], [-40, 1.5, 900]])[:, :, None]
    nearest, means = run(points, mask, start)
    assert nearest[:6].tolist() == [[0, 1]] * 5 + [[0, 0]]
    np.testing.assert_allclose(means[:, :, 0], [[1.5, -40, 30], [-40, 1.5, 30]])
    # A cluster that loses its only point to an empty one stays where it was.
    mask = np.isin(points[:, 0], [30, 1, 2])
    start = np.float32([[1.5, 10, 900], [1.5, 10, 900]])[:, :, None]
    nearest, means = run(points, mask, start)
    np.testing.assert_allclose(means[:, :, 0], [[1.5, 10, 30]] * 2)


def test_jit_and_vmap_agree():
    points = np.stack([mixture(i, 80, 4, 5, spread=2) for i in range(3)])
    mask = np.arange(80) < np.array([80, 60, 40])[:, None]

    def fit(key, points, mask):
        return kmeans(key, points, 4, mask, num_init=2)

    keys = jax.random.split(KEY, 3)
    expected = [fit(*each) for each in zip(keys, points, mask, strict=True)]
    found = jax.vmap(fit)(keys, points, mask)
    for i in range(3):
        assert_equal(jax.tree.map(lambda array, i=i: array[i], found), expected[i])
    assert_equal(jax.jit(fit)(keys[1], points[1], mask[1]), expected[1])


def test_deterministic_and_random():
    points = mixture(8, 400, 8, 9)
    one, two, other = (kmeans(key, points, 6) for key in (KEY, KEY, jax.random.key(1)))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.centres, other.centres)


@pytest.mark.parametrize("axis", ["data sets", "points"])
def test_eight_devices_give_the_same(axis):
    points = np.stack([mixture(i, 64, 4, 3, spread=3) for i in range(8)])
    mask = np.arange(64) < np.arange(57, 65)[:, None]
    points[0, :40] = points[0, 0]
    spec = PartitionSpec("data") if axis == "data sets" else PartitionSpec(None, "data")
    placement = NamedSharding(parallel.mesh(jax.devices()), spec)
    split = jax.device_put((points, mask), placement)
    assert len(split[0].sharding.device_set) == 8
    found = kmeans(KEY, split[0], 3, split[1], num_init=2)
    assert_equal(found, kmeans(KEY, points, 3, mask, num_init=2))


GOOD = np.ones((5, 2), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"key": jax.random.PRNGKey(0)}, TypeError, "`key` must be a typed key"),
        ({"key": jax.random.split(KEY)}, ValueError, "`key` must be one key"),
        ({"num_clusters": 0}, ValueError, "`num_clusters` must be at least 1, got 0"),
        ({"num_clusters": 2.0}, TypeError, "num_clusters"),
        ({"max_iter": 0}, ValueError, "`max_iter` must be at least 1, got 0"),
        ({"num_init": 0}, ValueError, "`num_init` must be at least 1, got 0"),
        ({"points": [[1.0]]}, TypeError, "points"),
        ({"points": np.ones((5, 2), int)}, TypeError, "`points` must be float32, got dtype int"),
        ({"points": jnp.ones((5, 2), jnp.bfloat16)}, TypeError, "float32, got dtype bfloat16"),
        ({"points": GOOD[0]}, ValueError, r"shape \[..., n, d\], .* got \(2,\)"),
        ({"points": GOOD[:, :0]}, ValueError, r"no axis of length 0, got \(5, 0\)"),
        ({"points": GOOD[None][:0]}, ValueError, r"no axis of length 0, got \(0, 5, 2\)"),
        ({"mask": np.ones(5)}, TypeError, "`mask` must be bool, got dtype float64"),
        ({"mask": [True] * 5}, TypeError, "mask"),
        ({"mask": np.ones(4, bool)}, ValueError, r"`mask` must have the shape \(5,\), .*\(4,\)"),
        ({"num_clusters": 6}, ValueError, "got 6 for 5 points in the data set"),
        (
            {"points": np.stack([GOOD] * 3), "mask": np.arange(5) < np.array([[2], [1], [5]])},
            ValueError,
            r"points that count, got 2 for 1 points in data set \[1\]",
        ),
        ({"points": GOOD * np.float32([1, np.inf])}, ValueError, "the data set holds NaN"),
        (
            {"points": np.stack([GOOD, GOOD * np.float32(np.nan)])},
            ValueError,
            r"`points` must be finite, .* data set \[1\] holds NaN, infinity or too large",
        ),
        ({"points": GOOD * np.float32([[1e30], [0], [-1e30], [7], [8]])}, ValueError, "too large"),
    ],
)
def test_bad_arguments(arguments, error, message):
    arguments = {"key": KEY, "points": GOOD, "num_clusters": 2} | arguments
    with pytest.raises(error, match=message):
        kmeans(**arguments)


def test_under_jit_shapes_are_checked_and_values_are_not():
    fit = jax.jit(lambda points, mask: kmeans(KEY, points, 3, mask))
    with pytest.raises(ValueError, match="got 3 for 2 points"):
        fit(GOOD[:2], np.ones(2, bool))
    with pytest.raises(TypeError, match="`points` must be float32"):
        fit(np.ones((5, 2), int), np.ones(5, bool))
    points = np.stack([mixture(0, 5, 2, 2)] * 2)
    points[1, 2, 0] = np.nan
    found = fit(points, np.ones((2, 5), bool))
    assert np.isnan(found.centres[1]).all() and np.isfinite(found.centres[0]).all()
    fit(points, np.zeros((2, 5), bool))
