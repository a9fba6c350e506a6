"""How well given groups of classes stand out in a correlation matrix, against chance."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Int

from jaxclus.clustering._hierarchy import distance_matrix, hierarchy
from jaxclus.clustering._permutation import permutation_test

# Scores closer than this are equal: C is float32, so that rounding would decide between them.
_TIE = 1e-6


@dataclasses.dataclass(frozen=True)
class ClusteringScore:
    """What `clustering_score` found; `dataclasses.asdict` gives a dictionary ready for JSON.

    Attributes:
        within: mean correlation over all pairs of classes of one group (no class with itself).
        between: mean correlation over all pairs of classes of two groups.
        difference: within - between, the score; in [-2, 2].
        p_value: share of the labellings with groups of these sizes whose score is at least as
            high, the observed one included.
        smallest_p: the smallest value that `p_value` could have taken for groups of these sizes.
        num_labellings: labellings looked at: all that are different partitions if `exact`, else
            the random ones that were drawn.
        exact: whether all labellings were enumerated.
        cophenetic: cophenetic correlation of the tree; None where all distances are equal.
        adjusted_rand: adjusted Rand index between the groups and the tree cut into as many.
        silhouette: mean silhouette of the groups on the distances 1 - C, in [-1, 1].
    """

    within: float
    between: float
    difference: float
    p_value: float
    smallest_p: float
    num_labellings: int
    exact: bool
    cophenetic: float | None
    adjusted_rand: float
    silhouette: float


def clustering_score(C: ArrayLike, groups: Sequence[Any] | ArrayLike) -> ClusteringScore:
    """Scores how far classes of one group correlate more than classes of two (on the host).

    The score is the mean of C over pairs of classes within groups minus the mean over pairs
    between groups; a group of one class has no pair within. It needs no choice of a cut and comes
    with an exact permutation test: with L labellings of the classes by groups of the same sizes
    (labellings that are the same partition counted once),

        p = #{labellings with a score >= the observed one} / L,

    where scores closer than 1e-6 count as equal. The smallest possible p is 1/L: 1/210 for groups
    of 4 and 6. Above a million labellings (20 groups of 5), or above 50 million pairs of classes
    in all of them, p = (1 + hits) / (1 + samples) from 100,000 random labellings with a fixed
    seed, and `exact` is False.

    Args:
        C: correlations [k, k]: finite, symmetric, in [-1, 1], with a diagonal of 1, each up to
            1e-5; as `correlation` gives them.
        groups: the group id of each class [k], integers; or a partition with names,
            `(("vehicles", (0, 1, 8, 9)), ("animals", (2, 3, 4, 5, 6, 7)))`, as data sets hold it.
            At least two groups, one of them with at least two classes.

    Returns:
        The score, its p-value, and the fit of the tree, a `ClusteringScore`.

    Raises:
        TypeError: `groups` are no integers.
        ValueError: `C` is no correlation matrix or `groups` no such partition of its classes.

    The score is ours (the published code compares heat maps by eye), on the matrix of Bai et al.,
    NeurIPS 2021, arXiv 2111.12922.
    """
    from sklearn.metrics import adjusted_rand_score, silhouette_score

    distances = distance_matrix(C)
    ids = scored_ids(groups, len(distances))
    correlations = 1 - distances
    upper = np.triu_indices(len(ids), k=1)
    pairs, same = correlations[upper], (ids[:, None] == ids[None, :])[upper]
    within, between = pairs[same].mean(), pairs[~same].mean()
    # The score grows with the sum within, at this rate.
    rate = 1 / same.sum() + 1 / (~same).sum()
    test = permutation_test(correlations, ids, tie=_TIE / rate)
    tree = hierarchy(C)
    return ClusteringScore(
        within=float(within),
        between=float(between),
        difference=float(within - between),
        p_value=test.p_value,
        smallest_p=test.smallest_p,
        num_labellings=test.num_labellings,
        exact=test.exact,
        cophenetic=tree.cophenetic,
        adjusted_rand=float(adjusted_rand_score(ids, tree.cut(int(ids.max()) + 1))),
        silhouette=float(silhouette_score(distances, ids, metric="precomputed")),
    )


def scored_ids(groups: Sequence[Any] | ArrayLike, num_classes: int) -> Int[np.ndarray, " k"]:
    """`group_ids` of groups that can be told from chance: some pairs within, some between."""
    ids = group_ids(groups, num_classes)
    sizes = np.bincount(ids)
    if len(sizes) < 2 or max(sizes) < 2:
        raise ValueError(
            "`groups` must be at least two, one of them with at least two classes, "
            f"got groups of {', '.join(map(str, sizes))}"
        )
    return ids


def group_ids(groups: Sequence[Any] | ArrayLike, num_classes: int) -> Int[np.ndarray, " k"]:
    """The group of each class, from either form in which groups are given.

    Args:
        groups: the group id of each class [k], any integers; or a partition of the classes with
            names, `((name, (class, ...)), ...)`.
        num_classes: k.

    Returns:
        Ids [k] in [0, number of groups): ranks of the ids given, or places of the named groups.

    Raises:
        TypeError: ids or classes are no integers, or a group is no pair of a name and classes.
        ValueError: there are not k ids; or a named group is empty, or a class is in no group, in
            two, or out of range.
    """
    if named(groups):
        return _named_ids(groups, num_classes)
    ids = np.asarray(groups)
    if ids.shape != (num_classes,):
        raise ValueError(
            f"`groups` must give a group for each of the {num_classes} classes, "
            f"got the shape {ids.shape}"
        )
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"`groups` must be integer group ids, got dtype {ids.dtype}")
    return np.unique(ids, return_inverse=True)[1]


def named(groups: Any) -> bool:
    """Whether the groups come as names with their classes."""
    return isinstance(groups, Sequence) and any(isinstance(g, Sequence) for g in groups)


def count_classes(groups: Any) -> int:
    """The number of classes that groups are about, in either form: up to the largest index.

    Of malformed groups it is 1 at least, as `group_ids` says what is wrong with them.
    """
    if not named(groups):
        return np.size(groups)
    members = [g[-1] for g in groups if isinstance(g, Sequence) and len(g) == 2]
    found = [int(c) for m in members for c in np.ravel(m) if isinstance(c, np.integer)]
    return 1 + max(found, default=0)


def _named_ids(groups, num_classes):
    ids = np.full(num_classes, -1)
    for place, group in enumerate(groups):
        if not (isinstance(group, Sequence) and len(group) == 2 and isinstance(group[0], str)):
            raise TypeError(f"`groups` must hold pairs of a name and its classes, got {group!r}")
        name, classes = group
        classes = np.asarray(classes)
        if classes.ndim != 1 or not classes.size:
            raise ValueError(
                f"`groups` must hold a tuple of classes for {name!r}, got {group[1]!r}"
            )
        if not np.issubdtype(classes.dtype, np.integer):
            raise TypeError(f"`groups` must hold integer classes, got {group[1]!r} for {name!r}")
        for c in classes.tolist():
            if not 0 <= c < num_classes:
                raise ValueError(
                    f"`groups` must hold classes in [0, {num_classes - 1}], got {c} in {name!r}"
                )
            if ids[c] >= 0:
                raise ValueError(f"`groups` must hold each class once, got class {c} twice")
            ids[c] = place
    if (ids < 0).any():
        missing = int(np.argmin(ids))
        raise ValueError(f"`groups` must hold every class, but class {missing} is in none")
    return ids
