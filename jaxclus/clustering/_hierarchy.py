"""The tree of classes that average linkage builds on a correlation matrix."""

import dataclasses

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jaxclus import _checks

# What float32 may make of a matrix that is symmetric, with entries in [-1, 1] and a diagonal of 1.
_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Hierarchy:
    """The tree of k classes, and how well it fits the distances it was built on.

    Attributes:
        linkage: SciPy's linkage matrix [k-1, 4], float64: in each row the two nodes that merge,
            their distance and the classes below. `scipy.cluster.hierarchy.dendrogram` draws it.
        order: the classes as the leaves of the tree from left to right [k], so arranged that
            neighbours are as close as the tree allows: rows and columns of a heat map.
        cophenetic: correlation between the distances and the heights at which classes merge, in
            [-1, 1]; None where all distances are equal (up to 1e-6) and it is not defined.
    """

    linkage: Float[np.ndarray, "merges 4"]
    order: Int[np.ndarray, " k"]
    cophenetic: float | None

    def cut(self, num_groups: int) -> Int[np.ndarray, " k"]:
        """Group of each class after the cut into `num_groups` groups.

        Args:
            num_groups: in [1, k]. There are always that many groups, also where merges at equal
                heights leave a choice.

        Returns:
            Group ids [k] in [0, num_groups), numbered by their smallest class.

        Raises:
            TypeError, ValueError: `num_groups` is no integer in [1, k].
        """
        from scipy.cluster.hierarchy import cut_tree

        _checks.at_least("num_groups", num_groups, 1)
        if num_groups > len(self.order):
            raise ValueError(f"`num_groups` must be in [1, {len(self.order)}], got {num_groups}")
        return cut_tree(self.linkage, n_clusters=num_groups)[:, 0]


def hierarchy(C: ArrayLike) -> Hierarchy:
    """Average linkage of classes on the distances 1 - C, with optimal leaf order (on the host).

    Args:
        C: correlations [k, k], k at least 2: finite, symmetric, in [-1, 1], with a diagonal of 1,
            each up to 1e-5. Distances that rounding made negative count as 0.

    Returns:
        The tree, a `Hierarchy`.

    Raises:
        ValueError: `C` is not such a matrix.
    """
    from scipy.cluster.hierarchy import cophenet, leaves_list, linkage
    from scipy.spatial.distance import squareform

    distances = squareform(distance_matrix(C))
    tree = linkage(distances, method="average", optimal_ordering=True)
    # A spread this small is rounding of C, and so would be its correlation with anything.
    defined = np.ptp(distances) > 1e-6
    return Hierarchy(
        linkage=tree,
        order=leaves_list(tree),
        cophenetic=float(cophenet(tree, distances)[0]) if defined else None,
    )


def distance_matrix(C: ArrayLike) -> Float[np.ndarray, "k k"]:
    """1 - C in float64, exactly symmetric, at least 0, with a diagonal of 0; checks `C`."""
    C = np.asarray(C, np.float64)
    if C.ndim != 2 or C.shape[0] != C.shape[1] or len(C) < 2:
        raise ValueError(f"`C` must have the shape [k, k] with k at least 2, got {C.shape}")
    if not np.isfinite(C).all():
        raise ValueError("`C` must be finite, but holds NaN or infinity")
    for rule, off in {
        "symmetric": np.abs(C - C.T).max(),
        "1 on the diagonal": np.abs(np.diagonal(C) - 1).max(),
        "in [-1, 1]": np.abs(C).max() - 1,
    }.items():
        if off > _TOLERANCE:
            raise ValueError(f"`C` must be {rule} (up to {_TOLERANCE:g}), but is off by {off:g}")
    distances = np.clip(1 - (C + C.T) / 2, min=0)
    np.fill_diagonal(distances, 0)
    return distances
