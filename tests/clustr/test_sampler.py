import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxclus.clustr import _sampler
from jaxclus.clustr._sampler import Membership

SIZES = (5, 9, 1, 0, 30, 3)
CLUSTER = np.random.default_rng(0).permutation(np.repeat(np.arange(6), SIZES))
MEMBERS = Membership.of(jnp.asarray(CLUSTER), 6)
KEYS = jax.random.split(jax.random.key(0), 4000)


def test_memberships_list_the_examples_of_each_cluster():
    np.testing.assert_array_equal(MEMBERS.sizes, SIZES)
    for j, (start, size) in enumerate(zip(MEMBERS.starts, MEMBERS.sizes, strict=True)):
        found = np.asarray(MEMBERS.order[int(start) : int(start + size)])
        np.testing.assert_array_equal(np.sort(found), np.flatnonzero(CLUSTER == j))


def test_mean_losses_are_those_of_the_examples_that_have_one():
    rng = np.random.default_rng(1)
    losses = np.where(rng.uniform(size=48) < 0.5, -1, rng.uniform(0, 5, 48)).astype(np.float32)
    losses[CLUSTER == 1] = -1
    wanted = []
    for j in range(6):
        stored = losses[(CLUSTER == j) & (losses >= 0)]
        wanted.append(stored.mean() if len(stored) else np.nan)
    known = ~np.isnan(wanted)
    assert not known[1] and known.sum() >= 3
    for as_published, missing in ((True, 0.0), (False, np.nanmean(wanted))):
        found = _sampler.mean_losses(jnp.asarray(losses), MEMBERS, as_published=as_published)
        np.testing.assert_allclose(found, np.where(known, wanted, missing), rtol=1e-6)


@pytest.mark.parametrize(
    "means, chances",
    [
        ((1, 0, 2, 7, 5, 0), (1, 0, 2, 0, 5, 0)),
        ((0, 0, 0, 0, 0, 0), (1, 1, 1, 0, 1, 1)),
        ((0, 0, 0, 3, 0, 0), (1, 1, 1, 0, 1, 1)),
    ],
)
def test_seeds_come_in_proportion_to_losses(means, chances):
    means = jnp.array(means, jnp.float32)
    seeds = jax.vmap(lambda key: _sampler.seed_cluster(key, means, MEMBERS))(KEYS)
    counts, chances = np.bincount(seeds, minlength=6), np.array(chances) / np.sum(chances)
    assert not counts[chances == 0].any()
    drawn = chances > 0
    assert stats.chisquare(counts[drawn], len(KEYS) * chances[drawn]).pvalue > 1e-3


def test_impostors_are_the_nearest_clusters_of_other_classes():
    centres = jnp.array([[0.0], [1.0], [5.0], [2.0], [-3.0], [4.0]])
    classes = jnp.array([0, 0, 1, 1, 2, 2])
    for seed, wanted in ((0, [4, 5, 2]), (1, [5, 4, 2]), (4, [0, 1, 2]), (2, [5, 1, 0])):
        found = _sampler.impostors(jnp.int32(seed), 3, centres, classes, MEMBERS)
        assert sorted(found.tolist()) == sorted(wanted)  # the empty cluster 3 never


def test_members_are_drawn_without_replacement():
    draws = jax.vmap(lambda key: _sampler.draw_members(key, jnp.array([1, 4]), 4, MEMBERS))(KEYS)
    for column, j in enumerate((1, 4)):
        drawn = np.asarray(draws[:, column])
        assert (CLUSTER[drawn] == j).all()
        assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
        # Every example as often as the others, and every pair.
        own = np.flatnonzero(CLUSTER == j)
        counts = np.array([(drawn == n).sum() for n in own])
        expected = 4 * len(KEYS) / len(own)
        assert abs(counts - expected).max() < 4.5 * np.sqrt(expected)
        if j == 1:
            has = np.stack([(drawn == n).any(axis=1) for n in own], 1).astype(int)
            pairs = (has.T @ has)[np.triu_indices(9, 1)]
            expected = len(KEYS) * (4 * 3) / (9 * 8)
            assert abs(pairs - expected).max() < 4.5 * np.sqrt(expected)


def test_a_cluster_of_just_enough_gives_all():
    drawn = _sampler.draw_members(KEYS[0], jnp.array([0, 5]), 5, MEMBERS)
    np.testing.assert_array_equal(np.sort(drawn[0]), np.flatnonzero(CLUSTER == 0))


def test_short_clusters_are_drawn_again_and_again():
    draws = jax.vmap(lambda key: _sampler.draw_members(key, jnp.array([5, 2]), 8, MEMBERS))(KEYS)
    for n in np.flatnonzero(CLUSTER == 5):
        counts = (np.asarray(draws[:, 0]) == n).sum(axis=1)
        assert set(counts.tolist()) == {2, 3}  # 8 places among 3 examples
        assert abs((counts == 3).mean() - 2 / 3) < 0.04
    assert (np.asarray(draws[:, 1]) == np.flatnonzero(CLUSTER == 2)[0]).all()
