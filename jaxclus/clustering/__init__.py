"""Do the classes of a network group by meaning? Correlations, distances, trees and their scores.

Bai et al., "Clustering Effect of (Linearized) Adversarial Robust Models", NeurIPS 2021,
arXiv 2111.12922. `correlation`, `filter_correlation`, `feature_distance`, `within_group_spread` and
`within_minus_between` are JAX functions (`jit`, `vmap`, `grad`); `hierarchy` and `clustering_score`
analyse one [k, k] matrix on the host.
"""

from jaxclus.clustering._correlation import correlation, filter_correlation
from jaxclus.clustering._feature_distance import PUBLISHED_COUNT, feature_distance
from jaxclus.clustering._hierarchy import Hierarchy, hierarchy
from jaxclus.clustering._kmeans import KMeans, kmeans
from jaxclus.clustering._permutation import PermutationTest, permutation_test
from jaxclus.clustering._regularisers import within_group_spread, within_minus_between
from jaxclus.clustering._score import ClusteringScore, clustering_score, group_ids

__all__ = [
    "PUBLISHED_COUNT",
    "ClusteringScore",
    "Hierarchy",
    "KMeans",
    "PermutationTest",
    "clustering_score",
    "correlation",
    "feature_distance",
    "filter_correlation",
    "group_ids",
    "hierarchy",
    "kmeans",
    "permutation_test",
    "within_group_spread",
    "within_minus_between",
]
