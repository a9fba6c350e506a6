"""ClusTR: Magnet-loss embeddings, classification by nearest clusters, certificates.

Alfarra et al., "ClusTR: Clustering Training for Robustness", arXiv:2006.07682.
"""

from jaxclus.clustr._certificate import certified_margin, certified_radius
from jaxclus.clustr._classifier import ClusterClassifier
from jaxclus.clustr._clustr import ClusTR
from jaxclus.clustr._consistent import QTRADES, ClusTRTRADES
from jaxclus.clustr._free import FreeClusTR
from jaxclus.clustr._magnet import cluster_variance, full_magnet_loss, magnet_loss
from jaxclus.clustr._state import Clusters

__all__ = [
    "QTRADES",
    "ClusTR",
    "ClusTRTRADES",
    "ClusterClassifier",
    "Clusters",
    "FreeClusTR",
    "certified_margin",
    "certified_radius",
    "cluster_variance",
    "full_magnet_loss",
    "magnet_loss",
]
