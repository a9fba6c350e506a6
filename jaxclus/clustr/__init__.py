"""ClusTR: Magnet-loss embeddings, classification by nearest clusters, certificates.

Alfarra et al., "ClusTR: Clustering Training for Robustness", arXiv:2006.07682.
"""

from jaxclus.clustr._certificate import certified_radius
from jaxclus.clustr._classifier import ClusterClassifier
from jaxclus.clustr._magnet import cluster_variance, full_magnet_loss, magnet_loss

__all__ = [
    "ClusterClassifier",
    "certified_radius",
    "cluster_variance",
    "full_magnet_loss",
    "magnet_loss",
]
