import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from jaxclus.clustering import (
    _permutation,
    _score,
    clustering_score,
    correlation,
    group_ids,
    hierarchy,
)

CIFAR10 = (("vehicles", (0, 1, 8, 9)), ("animals", (2, 3, 4, 5, 6, 7)))


def random_correlation(k, seed=0):
    rows = np.random.default_rng(seed).standard_normal((k, 6)).astype(np.float32)
    return np.asarray(correlation(rows))


def planted(ids, within, between):
    ids = np.asarray(ids)
    C = np.where(ids[:, None] == ids, within, between)
    np.fill_diagonal(C, 1)
    return C


def by_loops(C, ids):
    """Mean within and mean between, pair by pair."""
    means = {True: [], False: []}
    for i, j in itertools.combinations(range(len(ids)), 2):
        means[ids[i] == ids[j]].append(float(C[i, j]))
    return np.mean(means[True]), np.mean(means[False])


def all_partitions(ids):
    """One labelling for each different partition with the same group sizes."""
    seen = {}
    for p in set(itertools.permutations(ids)):
        groups = frozenset(
            frozenset(i for i, g in enumerate(p) if g == group) for group in set(ids)
        )
        seen[groups] = p
    return list(seen.values())


@pytest.mark.parametrize(
    ("ids", "count"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1, 1, 1], 210),
        ([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], 126),
        ([0, 0, 0, 0, 1, 1, 1, 2, 2, 2], 2100),
        ([0, 0, 0, 0, 1, 1, 1, 2, 2, 3], 12600),
        ([0, 0, 1], 3),
        ([0, 0, 1, 2, 3, 4], 15),
        ([0, 0, 1, 1, 2, 2, 3, 3], 105),
    ],
)
def test_planted_groups_get_the_smallest_p(ids, count):
    a, b = 0.6, -0.1
    order = np.random.default_rng(0).permutation(len(ids))
    s = clustering_score(planted(ids, a, b)[np.ix_(order, order)], np.array(ids)[order])
    assert (s.within, s.between, s.difference) == pytest.approx((a, b, a - b))
    assert s.exact and s.num_labellings == count
    assert s.p_value == s.smallest_p == 1 / count
    assert s.adjusted_rand == 1
    assert s.cophenetic == pytest.approx(1)
    members = np.bincount(ids)
    alone = np.count_nonzero(members == 1) / len(ids)  # their silhouette is 0
    assert s.silhouette == pytest.approx((1 - alone) * (1 - (1 - a) / (1 - b)))


@pytest.mark.parametrize(
    "ids",
    [
        [0, 1, 0, 1, 0, 1],
        [0, 1, 2, 0, 1, 2],
        [0, 1, 1, 2, 2, 2],
        [3, 1, 1, 2, 2, 2, 1],
        [0, 0, 1, 1, 2, 2, 2],
        [0, 1, 2, 2, 3, 3, 4],
        [0, 0, 0, 0, 0, 1],
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_brute_force(ids, seed):
    C = random_correlation(len(ids), seed)
    s = clustering_score(C, ids)
    within, between = by_loops(C, ids)
    assert (s.within, s.between) == pytest.approx((within, between), abs=1e-6)
    assert s.difference == pytest.approx(within - between, abs=1e-6)
    scores = [np.subtract(*by_loops(C, p)) for p in all_partitions(ids)]
    assert s.num_labellings == len(scores)
    assert s.p_value == np.mean(np.array(scores) >= within - between - 1e-6)
    sums = np.sort(_permutation._all_sums(C, np.bincount(ids)[np.bincount(ids) > 0].tolist()))
    pairs = C[np.triu_indices(len(ids), 1)]
    n = sum(m * (m - 1) // 2 for m in np.bincount(ids))
    by_sums = sums / n - (pairs.sum() - sums) / (len(pairs) - n)
    np.testing.assert_allclose(by_sums, np.sort(scores), atol=1e-5)


def test_equals_scikit_learn():
    C, ids = random_correlation(8, 4), [0, 1, 2, 0, 1, 2, 0, 1]
    s = clustering_score(C, ids)
    D = 1 - C.astype(np.float64)
    np.fill_diagonal(D, 0)
    assert s.silhouette == pytest.approx(silhouette_score(D, ids, metric="precomputed"), abs=1e-6)
    tree = hierarchy(C)
    assert s.adjusted_rand == adjusted_rand_score(ids, tree.cut(3))
    assert s.cophenetic == tree.cophenetic


def test_ties_count_as_hits():
    C = np.eye(4)
    for i, j in ((0, 1), (2, 3), (0, 2), (1, 3)):
        C[i, j] = C[j, i] = 0.1 + 0.2  # two of the three labellings by pairs score the same
    assert clustering_score(C, [0, 0, 1, 1]).p_value == 2 / 3
    assert clustering_score(C, [0, 1, 0, 1]).p_value == 2 / 3
    assert clustering_score(C, [0, 1, 1, 0]).p_value == 1


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_no_structure_at_all(value):
    s = clustering_score(planted([0] * 10, value, 0), CIFAR10)
    assert s.p_value == 1 and s.num_labellings == 210
    assert s.difference == pytest.approx(0)
    assert s.silhouette == pytest.approx(0)
    assert s.cophenetic is None


def test_rounding_of_float32_does_not_break_ties():
    rows = np.linalg.qr(np.random.default_rng(5).standard_normal((40, 10)))[0].T
    C = correlation(rows.astype(np.float32))
    assert 0 < np.abs(C - np.eye(10)).max() < 1e-6
    assert clustering_score(C, CIFAR10).p_value == 1


def test_worst_labelling_has_p_one():
    C = planted([0, 0, 0, 1, 1, 1], 0.9, 0.0)
    assert clustering_score(-C + 2 * np.eye(6), [0, 0, 0, 1, 1, 1]).p_value == 1


def test_both_forms_of_groups_and_order_of_classes_agree():
    C = random_correlation(10, 6)
    named = clustering_score(C, CIFAR10)
    ids = np.array([7, 7, 3, 3, 3, 3, 3, 3, 7, 7])
    for other in (ids, ids.tolist(), jnp.asarray(ids), tuple(reversed(CIFAR10))):
        assert clustering_score(C, other) == named
    order = np.random.default_rng(7).permutation(10)
    moved = dataclasses.asdict(clustering_score(C[np.ix_(order, order)], ids[order]))
    assert moved == pytest.approx(dataclasses.asdict(named))


def test_too_many_labellings_are_sampled():
    ids = np.repeat(np.arange(20), 5)  # CIFAR-100
    s = clustering_score(planted(ids, 0.2, 0.1), ids)
    assert not s.exact and s.num_labellings == 100_000
    assert s.p_value == s.smallest_p == 1 / 100_001
    assert s == clustering_score(planted(ids, 0.2, 0.1), ids)
    assert clustering_score(np.eye(100), ids).p_value == 1


@pytest.mark.parametrize("limit", ["_MAX_LABELLINGS", "_MAX_PAIRS"])
def test_sampled_p_estimates_the_exact_p(monkeypatch, limit):
    C = random_correlation(10, 8)
    exact = clustering_score(C, CIFAR10)
    monkeypatch.setattr(_permutation, limit, 0)
    sampled = clustering_score(C, CIFAR10)
    assert exact.exact and not sampled.exact
    assert 0.05 < exact.p_value < 0.95
    spread = np.sqrt(exact.p_value * (1 - exact.p_value) / 100_000)
    assert abs(sampled.p_value - exact.p_value) < 4 * spread
    assert sampled.difference == exact.difference


def test_result_goes_through_json():
    for C in (random_correlation(10), np.eye(10)):
        s = clustering_score(C, CIFAR10)
        text = json.dumps(dataclasses.asdict(s), allow_nan=False)
        assert _score.ClusteringScore(**json.loads(text)) == s


def test_group_ids():
    assert group_ids(CIFAR10, 10).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert group_ids([["b", [2]], ["a", [1, 0]]], 3).tolist() == [1, 1, 0]
    assert group_ids([-3, 8, 8, -3, 0], 5).tolist() == [0, 2, 2, 0, 1]
    assert group_ids(np.uint8([1, 0]), 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([0, 1], ValueError, r"each of the 4 classes, got the shape \(2,\)"),
        (np.zeros((4, 1), int), ValueError, r"got the shape \(4, 1\)"),
        ((), ValueError, r"got the shape \(0,\)"),
        (np.ones(4), TypeError, "integer group ids, got dtype float64"),
        (np.ones(4, bool), TypeError, "integer group ids, got dtype bool"),
        ("abcd", TypeError, "pairs of a name and its classes, got 'a'"),
        ((("a", (0, 1)), 2, 3), TypeError, "pairs of a name and its classes, got 2"),
        (((0, 1), (2, 3)), TypeError, r"pairs of a name and its classes, got \(0, 1\)"),
        ((("a", (0, 1)), ("b", 2)), ValueError, "tuple of classes for 'b', got 2"),
        ((("a", (0, 1, 2, 3)), ("b", ())), ValueError, r"tuple of classes for 'b', got \(\)"),
        ((("a", (0, 1)), ("b", (2.0, 3.0))), TypeError, r"integer classes, got \(2.0, 3.0\)"),
        ((("a", (0, 1)), ("b", (2, 4))), ValueError, r"in \[0, 3\], got 4 in 'b'"),
        ((("a", (0, 1)), ("b", (2, -1))), ValueError, r"in \[0, 3\], got -1 in 'b'"),
        ((("a", (0, 1)), ("b", (2, 1, 3))), ValueError, "each class once, got class 1 twice"),
        ((("a", (0, 1)), ("b", (3,))), ValueError, "class 2 is in none"),
    ],
)
def test_groups_that_are_no_partition(bad, error, message):
    for function in (lambda g: group_ids(g, 4), lambda g: clustering_score(np.eye(4), g)):
        with pytest.raises(error, match=f"`groups` must .*{message}"):
            function(bad)


@pytest.mark.parametrize("bad", [[0, 0, 0, 0], [0, 1, 2, 3], (("all", (0, 1, 2, 3)),)])
def test_groups_without_pairs_of_both_kinds(bad):
    with pytest.raises(ValueError, match="`groups` must be at least two, one of them with"):
        clustering_score(np.eye(4), bad)


def test_bad_correlations():
    with pytest.raises(ValueError, match="`C` must be 1 on the diagonal"):
        clustering_score(np.zeros((4, 4)), [0, 0, 1, 1])
