"""Evaluation: accuracy, robust accuracy and the clustering effect over a data set."""

from jaxclus.evaluation._clustering_effect import (
    ClusteringEffect,
    LinearVariant,
    clustering_effect,
)
from jaxclus.evaluation._result import MemberResult, Robustness, Spread, spread
from jaxclus.evaluation._robustness import (
    MICROBATCH,
    correct,
    describe,
    robustness,
    robustness_curve,
    robustness_over_seeds,
)

__all__ = [
    "MICROBATCH",
    "ClusteringEffect",
    "LinearVariant",
    "MemberResult",
    "Robustness",
    "Spread",
    "clustering_effect",
    "correct",
    "describe",
    "robustness",
    "robustness_curve",
    "robustness_over_seeds",
    "spread",
]
