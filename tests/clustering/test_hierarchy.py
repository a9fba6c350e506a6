import dataclasses

import numpy as np
import pytest
from scipy.cluster.hierarchy import cophenet, fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from jaxclus.clustering import correlation, hierarchy


def random_correlation(k, seed=0):
    rows = np.random.default_rng(seed).standard_normal((k, 6)).astype(np.float32)
    return np.asarray(correlation(rows))


def planted(ids, within, between):
    ids = np.asarray(ids)
    C = np.where(ids[:, None] == ids, within, between)
    np.fill_diagonal(C, 1)
    return C


def test_merges_of_three_classes():
    C = np.array([[1, 0.8, 0.1], [0.8, 1, 0.3], [0.1, 0.3, 1]])
    tree = hierarchy(C)
    # 0 and 1 at distance 0.2, then class 2 at the mean of 0.9 and 0.7
    np.testing.assert_allclose(tree.linkage[:, 2:], [[0.2, 2], [0.8, 3]])
    assert set(tree.linkage[0, :2]) == {0, 1} and set(tree.linkage[1, :2]) == {2, 3}
    assert tree.order.tolist() in ([0, 1, 2], [2, 1, 0])
    assert tree.cophenetic == pytest.approx(np.corrcoef([0.2, 0.9, 0.7], [0.2, 0.8, 0.8])[0, 1])
    assert tree.cut(2).tolist() == [0, 0, 1]


def test_equals_scipy():
    C = random_correlation(9)
    distances = squareform(1 - C.astype(np.float64), checks=False)
    expected = linkage(distances, "average", optimal_ordering=True)
    tree = hierarchy(C)
    np.testing.assert_allclose(tree.linkage, expected, atol=1e-6)
    assert tree.cophenetic == pytest.approx(cophenet(expected, distances)[0], abs=1e-5)
    assert sorted(tree.order) == list(range(9))


@pytest.mark.parametrize("num_groups", range(1, 10))
def test_cut_equals_scipy_and_scikit_learn(num_groups):
    C = random_correlation(9, seed=1)
    tree = hierarchy(C)
    ids = tree.cut(num_groups)
    assert sorted(set(ids.tolist())) == list(range(num_groups))
    first = [ids.tolist().index(g) for g in range(num_groups)]
    assert first == sorted(first)
    scipy_ids = fcluster(tree.linkage, num_groups, "maxclust")
    sklearn_ids = AgglomerativeClustering(
        num_groups, metric="precomputed", linkage="average"
    ).fit_predict(1 - C)
    assert adjusted_rand_score(ids, scipy_ids) == adjusted_rand_score(ids, sklearn_ids) == 1


@pytest.mark.parametrize("ids", [[0] * 7, [0, 1, 0, 1, 2, 2, 0, 1], list(range(6))])
def test_cut_gives_the_number_asked_for_under_ties(ids):
    tree = hierarchy(planted(ids, 0.3, 0.1))
    heights = squareform(cophenet(tree.linkage))
    for num_groups in range(1, len(ids) + 1):
        cut = tree.cut(num_groups)
        assert sorted(set(cut.tolist())) == list(range(num_groups))
        same = cut[:, None] == cut
        assert heights[same].max() <= heights[~same].min(initial=np.inf)


def test_planted_groups_are_found_and_stand_together():
    ids = np.array([1, 0, 2, 0, 1, 2, 2, 1])
    tree = hierarchy(planted(ids, 0.7, -0.2))
    assert adjusted_rand_score(tree.cut(3), ids) == 1
    assert np.count_nonzero(np.diff(ids[tree.order])) == 2
    assert tree.cophenetic == pytest.approx(1)
    np.testing.assert_allclose(tree.linkage[-2:, 2], 1.2)


def test_leaf_order_is_optimal():
    C = random_correlation(7, seed=2)
    tree = hierarchy(C)
    plain = linkage(squareform(1 - C.astype(np.float64), checks=False), "average")

    def orders(node):
        """All leaf orders of the subtree."""
        if node < 7:
            return [[int(node)]]
        left, right = (orders(child) for child in plain[int(node) - 7, :2])
        return [x + y for a in left for b in right for x, y in ((a, b), (b, a))]

    def length(order):
        return sum(1 - C[a, b] for a, b in zip(order, order[1:], strict=False))

    assert length(tree.order) == pytest.approx(min(map(length, orders(12))), abs=1e-5)


def test_equal_distances_have_no_cophenetic_correlation():
    assert hierarchy(np.eye(4)).cophenetic is None
    assert hierarchy(planted([0] * 5, 0.3, 0)).cophenetic is None
    two = hierarchy(planted([0, 1], 0, 0.5))
    assert two.cophenetic is None and two.cut(2).tolist() == [0, 1]
    np.testing.assert_array_equal(two.linkage, [[0, 1, 0.5, 2]])


def test_rounding_is_forgiven():
    C = np.ones((3, 3), np.float32) + np.float32([[0, 3e-6, 0], [1e-6, -5e-6, 0], [0, 0, 2e-7]])
    np.testing.assert_array_equal(hierarchy(C).linkage[:, 2], 0)


def test_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(hierarchy(np.eye(3)), "order", None)  # noqa: B010


def changed(i, j, value):
    C = np.eye(3)
    C[i, j] = value
    return C


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.eye(3)[:2], r"`C` must have the shape \[k, k\] with k at least 2, got \(2, 3\)"),
        (np.ones(4), r"got \(4,\)"),
        (np.eye(1), r"got \(1, 1\)"),
        (changed(0, 1, np.nan), "`C` must be finite"),
        (changed(0, 1, 1e-4), "`C` must be symmetric .* off by 0.0001"),
        (changed(1, 1, 0.9), "`C` must be 1 on the diagonal .* off by 0.1"),
        (changed(0, 1, 1.5) + changed(1, 0, 1.5) - np.eye(3), r"in \[-1, 1\] .* off by 0.5"),
    ],
)
def test_bad_correlations(bad, message):
    with pytest.raises(ValueError, match=message):
        hierarchy(bad)


@pytest.mark.parametrize("bad", [0, 4, -1])
def test_bad_number_of_groups(bad):
    with pytest.raises(ValueError, match="`num_groups` must be"):
        hierarchy(np.eye(3)).cut(bad)
