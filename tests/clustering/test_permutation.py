import itertools

import jaxtyping
import numpy as np
import pytest

from jaxclus.clustering import _permutation
from jaxclus.clustering._permutation import permutation_test


def by_loops(matrix, ids):
    """Of all orders of the ids, the share whose sum over pairs within is as high."""

    def within(order):
        pairs = itertools.combinations(range(len(order)), 2)
        return sum(matrix[i, j] for i, j in pairs if order[i] == order[j])

    orders = set(itertools.permutations(ids))
    return np.mean([within(order) >= within(ids) for order in orders])


@pytest.mark.parametrize("ids", [[0, 0, 1, 1, 1], [1, 0, 2, 0, 1, 2], [0, 1, 1, 2, 2, 2]])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counts_with_many_ties_equal_brute_force(ids, seed):
    matrix = np.random.default_rng(seed).integers(0, 3, (len(ids), len(ids))).astype(float)
    matrix += matrix.T
    found = permutation_test(matrix, np.array(ids))
    assert found.exact
    assert found.p_value == pytest.approx(by_loops(matrix, ids), abs=1e-12)
    assert found.smallest_p == 1 / found.num_labellings <= found.p_value


def test_tie_is_how_far_a_sum_may_be_behind():
    matrix = np.zeros((4, 4))
    for (i, j), value in {(0, 1): 1.0, (0, 2): 0.9, (0, 3): 0.5}.items():
        matrix[i, j] = matrix[j, i] = value
    ids = np.array([0, 0, 1, 1])  # against 0.9 for (0, 2), (1, 3) and 0.5 for (0, 3), (1, 2)
    for tie, hits in ((0.0, 1), (0.2, 2), (0.6, 3)):
        assert permutation_test(matrix, ids, tie).p_value == hits / 3


def test_the_diagonal_is_not_read():
    matrix = np.random.default_rng(0).normal(size=(6, 6))
    matrix += matrix.T
    other = matrix + np.diag(np.arange(6) * 100.0)
    ids = np.array([0, 0, 1, 1, 2, 2])
    assert permutation_test(matrix, ids) == permutation_test(other, ids)


def test_sampled_counts_the_observed_labelling(monkeypatch):
    matrix = np.ones((6, 6))
    matrix[0, 1] = matrix[1, 0] = 2.0
    ids = np.array([0, 0, 1, 2, 3, 4])
    exact = permutation_test(matrix, ids)
    assert exact.p_value == exact.smallest_p == 1 / 15
    monkeypatch.setattr(_permutation, "_MAX_LABELLINGS", 0)
    sampled = permutation_test(matrix, ids)
    assert not sampled.exact and sampled.smallest_p == 1 / 100_001
    assert sampled.p_value == pytest.approx(1 / 15, abs=0.004)  # five standard deviations


@pytest.mark.parametrize(
    "matrix, ids, message",
    [
        (np.zeros((3, 2)), [0, 0, 1], r"`matrix` must be \[k, k\] for the 3 entries"),
        (np.zeros((2, 2)), [0, 0, 1], r"`matrix` must be \[k, k\] for the 3 entries"),
        (np.triu(np.ones((3, 3))), [0, 0, 1], "`matrix` must be finite and symmetric"),
        (np.full((3, 3), np.inf), [0, 0, 1], "`matrix` must be finite and symmetric"),
        (np.zeros((3, 3)), [0, 0, 2], "`ids` must be groups from 0, none left out"),
        (np.zeros((3, 3)), [0, 1, 2], "`ids` must be groups .*at least two classes, got"),
        (np.zeros((3, 3)), [-1, 0, 0], "`ids` must be groups from 0"),
    ],
)
def test_what_is_no_matrix_or_no_groups_is_named(matrix, ids, message, monkeypatch):
    # As users call it: pytest's type checks would come first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        permutation_test(matrix, np.array(ids))
