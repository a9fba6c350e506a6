import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclus.clustering import (
    clustering_score,
    correlation,
    within_group_spread,
    within_minus_between,
)

# The same groups in both forms; class 3 is alone.
IDS = (4, 7, 4, -1, 7, 4)
NAMED = (("a", (0, 2, 5)), ("b", (1, 4)), ("alone", (3,)))
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 6)).astype(np.float32)
C = np.asarray(correlation(RNG.normal(size=(6, 9)).astype(np.float32)))


def spread_by_loops(logits):
    """Image by image and group by group, in float64."""
    found = []
    for row in np.asarray(logits, np.float64):
        total = 0.0
        for _, members in NAMED:
            mean = sum(row[c] for c in members) / len(members)
            total += sum((row[c] - mean) ** 2 for c in members)
        found.append(total)
    return np.array(found)


def difference_by_loops(matrix):
    """Pair by pair, in float64."""
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for i, j in itertools.combinations(range(6), 2):
        same = IDS[i] == IDS[j]
        sums[same] += float(matrix[i, j])
        counts[same] += 1
    return sums[True] / counts[True] - sums[False] / counts[False]


def numeric_gradient(function, at, h=1e-6):
    """Central differences in float64."""
    found = np.zeros(at.shape)
    for place in np.ndindex(at.shape):
        moved = np.asarray(at, np.float64).copy()
        moved[place] += h
        above = function(moved)
        moved[place] -= 2 * h
        found[place] = (above - function(moved)) / (2 * h)
    return found


@pytest.mark.parametrize("groups", [IDS, np.array(IDS), NAMED], ids=["ids", "array", "named"])
def test_against_loops(groups):
    spread = within_group_spread(jnp.asarray(LOGITS), groups)
    np.testing.assert_allclose(spread, spread_by_loops(LOGITS), rtol=1e-6)
    difference = within_minus_between(jnp.asarray(C), groups)
    np.testing.assert_allclose(difference, difference_by_loops(C), atol=1e-7)
    assert spread.shape == (5,) and difference.shape == ()


def test_by_hand():
    logits = jnp.array([[1.0, 5.0, 3.0, 2.0], [2.0, 9.0, 2.0, 9.0]])
    # Groups of 1 and 3, of 5 and 2, by twos: squares 1 + 1 and 2.25 + 2.25; then none.
    np.testing.assert_array_equal(within_group_spread(logits, (0, 1, 0, 1)), [6.5, 0.0])
    matrix = jnp.array([[1.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.0]])
    np.testing.assert_allclose(within_minus_between(matrix, (0, 0, 1)), 0.5 - 0.2, rtol=1e-6)


def test_a_class_alone_adds_no_spread_and_no_pair_within():
    np.testing.assert_array_equal(within_group_spread(jnp.asarray(LOGITS), np.arange(6)), 0)
    moved = LOGITS.copy()
    moved[:, 3] += 2  # the class alone
    spread = within_group_spread(jnp.asarray(LOGITS), NAMED)
    np.testing.assert_array_equal(within_group_spread(jnp.asarray(moved), NAMED), spread)
    slope = jax.grad(within_minus_between)(jnp.asarray(C), NAMED)
    assert (slope[3, 4:] < 0).all() and (slope[:3, 3] < 0).all()


def test_the_difference_is_the_score_and_leaves_the_diagonal_out():
    difference = within_minus_between(jnp.asarray(C), NAMED)
    assert difference == pytest.approx(clustering_score(C, NAMED).difference, abs=1e-6)
    other = jnp.asarray(C + 5 * np.eye(6, dtype=np.float32))
    np.testing.assert_array_equal(within_minus_between(other, NAMED), difference)


def test_jit_and_vmap_agree():
    stacked = jnp.stack([LOGITS, 2 * LOGITS])
    each = jnp.stack([within_group_spread(one, NAMED) for one in stacked])
    found = jax.jit(jax.vmap(lambda z: within_group_spread(z, NAMED)))(stacked)
    np.testing.assert_allclose(found, each, rtol=1e-6)
    matrices = jnp.stack([C, C**2])
    each = jnp.stack([within_minus_between(one, NAMED) for one in matrices])
    found = jax.jit(jax.vmap(lambda matrix: within_minus_between(matrix, NAMED)))(matrices)
    np.testing.assert_allclose(found, each, atol=1e-7)


def test_gradients():
    slope = jax.grad(lambda z: within_group_spread(z, NAMED).sum())(jnp.asarray(LOGITS))
    wanted = numeric_gradient(lambda z: spread_by_loops(z).sum(), LOGITS)
    np.testing.assert_allclose(slope, wanted, atol=1e-5)
    # Of the mean over the group, detached or not: sum_{c in g} (z_c - zbar_g) = 0.
    means = np.stack([LOGITS[:, np.array(IDS) == g].mean(axis=1) for g in IDS], axis=1)
    np.testing.assert_allclose(slope, 2 * (LOGITS - means), atol=1e-5)
    slope = jax.grad(within_minus_between)(jnp.asarray(C), NAMED)
    wanted = numeric_gradient(difference_by_loops, C)
    np.testing.assert_allclose(slope, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "groups, error, message",
    [
        ((0, 1, 0), ValueError, "`groups` must give a group for each of the 6 classes"),
        ((0.0, 1.0, 0.0, 1.0, 0.0, 1.0), TypeError, "`groups` must be integer group ids"),
        ((("a", (0, 1, 2)), ("b", (3, 4))), ValueError, "`groups` .* class 5 is in none"),
        ((("a", (0, 1, 2)), ("b", (2, 3, 4, 5))), ValueError, "`groups` .* got class 2 twice"),
        ((("a", (0, 1, 2)), ("b", (3, 4, 6))), ValueError, r"in \[0, 5\], got 6"),
        ((("a", (0, 1, 2)), (3, 4, 5)), TypeError, "`groups` must hold pairs of a name and its"),
    ],
)
def test_bad_groups(groups, error, message):
    for function, array in ((within_group_spread, LOGITS), (within_minus_between, C)):
        with pytest.raises(error, match=message):
            function(jnp.asarray(array), groups)


@pytest.mark.parametrize("groups", [(0,) * 6, tuple(range(6))], ids=["one", "all alone"])
def test_pairs_within_and_between_are_needed_for_a_difference(groups):
    with pytest.raises(ValueError, match="`groups` must be at least two, one of them with at"):
        within_minus_between(jnp.asarray(C), groups)
    assert within_group_spread(jnp.asarray(LOGITS), groups).shape == (5,)
