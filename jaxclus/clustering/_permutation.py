"""An exact permutation test: do given groups hold more of a matrix's pairs than chance would?"""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
from jaxtyping import Float, Int

# Enumerated at most: labellings, for memory; pairs of classes in all of them, for about a second.
_MAX_LABELLINGS = 1_000_000
_MAX_PAIRS = 50_000_000
_NUM_SAMPLES = 100_000
_CHUNK = 10_000
_SEED = 0


@dataclasses.dataclass(frozen=True)
class PermutationTest:
    """What `permutation_test` found.

    Attributes:
        p_value: share of the labellings with groups of these sizes whose sum is at least as high,
            the observed one included.
        smallest_p: the smallest value that `p_value` could have taken for groups of these sizes.
        num_labellings: labellings looked at: all that are different partitions if `exact`, else
            the random ones that were drawn.
        exact: whether all labellings were enumerated.
    """

    p_value: float
    smallest_p: float
    num_labellings: int
    exact: bool


def permutation_test(
    matrix: Float[np.ndarray, "k k"], ids: Int[np.ndarray, " k"], tie: float = 0.0
) -> PermutationTest:
    """Compares the sum of a matrix over the pairs within groups with that of other labellings.

    With L labellings of the classes by groups of the same sizes (labellings that are the same
    partition counted once),

        p = #{labellings with a sum >= the observed one - tie} / L.

    Above a million labellings (20 groups of 5), or above 50 million pairs of classes in all of
    them, p = (1 + hits) / (1 + samples) from 100,000 random labellings with a fixed seed.

    Args:
        matrix: one number for each pair of classes, symmetric, float64; the diagonal is not read.
        ids: group of each class, from 0, no number left out; at least one pair within a group.
        tie: sums closer than this are equal.

    Raises:
        ValueError: `matrix` is not [k, k], finite and symmetric, or `ids` are no such groups.
    """
    _check(matrix, ids)
    sizes = tuple(np.bincount(ids).tolist())
    same = np.triu(ids[:, None] == ids[None, :], k=1)
    labellings = _num_labellings(sizes)
    exact = labellings <= _MAX_LABELLINGS and labellings * int(same.sum()) <= _MAX_PAIRS
    sums = _all_sums(matrix, sizes) if exact else _sampled_sums(matrix, sizes)
    hits = int(np.count_nonzero(sums >= matrix[same].sum() - tie))
    drawn = 0 if exact else 1  # the observed labelling, which a random draw does not include
    return PermutationTest(
        p_value=(drawn + hits) / (drawn + len(sums)),
        smallest_p=1 / (drawn + len(sums)),
        num_labellings=len(sums),
        exact=exact,
    )


def _check(matrix, ids):
    if matrix.ndim != 2 or matrix.shape != ids.shape * 2:
        raise ValueError(
            f"`matrix` must be [k, k] for the {ids.size} entries of `ids`, got {matrix.shape}"
        )
    if not (np.isfinite(matrix).all() and (matrix == matrix.T).all()):
        raise ValueError("`matrix` must be finite and symmetric, and is not")
    sizes = np.bincount(ids) if ids.min(initial=0) >= 0 else np.zeros(1, int)
    if not sizes.all() or sizes.max(initial=0) < 2:
        raise ValueError(
            "`ids` must be groups from 0, none left out, one of them of at least two classes, "
            f"got {ids.tolist()}"
        )


def _num_labellings(sizes):
    """Number of partitions into unlabelled groups of these sizes."""
    count = math.factorial(sum(sizes))
    for n in (*sizes, *Counter(sizes).values()):
        count //= math.factorial(n)
    return count


def _pair_sums(matrix, members):
    """Sums over the pairs of each group: members [s, ...] -> [...]."""
    return sum(matrix[member, members[i + 1 :]].sum(axis=0) for i, member in enumerate(members))


def _all_sums(matrix, sizes):
    """Sum over the pairs within groups, for every partition of these sizes once."""
    sizes = [s for s in sizes if s > 1]  # one class alone has no pair, so who is alone is chosen
    chosen = _combinations(len(matrix), sum(sizes))
    return _sums_of_rest(matrix, chosen, sizes, np.zeros(chosen.shape[1]))


def _sums_of_rest(matrix, classes, sizes, sums):
    """All ways to split each column of `classes` [r, n] into groups of `sizes`; adds to `sums` [n].

    The first class of a column always joins the group that is formed next, of any of the sizes
    left. So no partition comes twice.
    """
    if not sizes:
        return sums
    found = []
    for size in set(sizes):
        others = 1 + _combinations(len(classes) - 1, size - 1)
        group = np.insert(others, 0, 0, axis=0)  # places [size, ways]
        outside = np.ones((group.shape[1], len(classes)), bool)
        np.put_along_axis(outside, group.T, False, axis=1)
        rest = np.nonzero(outside)[1].reshape(len(outside), len(classes) - size).T
        extended = sums + _pair_sums(matrix, classes[group])  # [ways, n]
        left = list(sizes)
        left.remove(size)
        classes_left = classes[rest].reshape(len(rest), extended.size)
        found.append(_sums_of_rest(matrix, classes_left, left, extended.ravel()))
    return np.concatenate(found)


def _combinations(n, size):
    """All `size` of n places, a column each: [size, n over size]."""
    flat = itertools.chain.from_iterable(itertools.combinations(range(n), size))
    return np.fromiter(flat, np.intp).reshape(math.comb(n, size), size).T


def _sampled_sums(matrix, sizes):
    """Sum over the pairs within groups, for random labellings by groups of these sizes."""
    rng = np.random.default_rng(_SEED)
    ends = np.cumsum(sizes)[:-1]
    sums = []
    for _ in range(_NUM_SAMPLES // _CHUNK):
        orders = rng.permuted(np.tile(np.arange(len(matrix)), (_CHUNK, 1)), axis=1)
        sums.append(sum(_pair_sums(matrix, group) for group in np.split(orders.T.copy(), ends)))
    return np.concatenate(sums)
