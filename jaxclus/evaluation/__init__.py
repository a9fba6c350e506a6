"""Evaluation: accuracy, robust accuracy and the clustering effect over a data set."""

from jaxclus.evaluation._clustering_effect import (
    ClusteringEffect,
    LinearVariant,
    clustering_effect,
)
from jaxclus.evaluation._robustness import (
    MICROBATCH,
    Robustness,
    correct,
    describe,
    robustness,
    robustness_curve,
)

__all__ = [
    "MICROBATCH",
    "ClusteringEffect",
    "LinearVariant",
    "Robustness",
    "clustering_effect",
    "correct",
    "describe",
    "robustness",
    "robustness_curve",
]
