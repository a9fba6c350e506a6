"""Evaluation: accuracy, robust accuracy and the clustering effect over a data set."""

from jaxclus.evaluation._clustering_effect import (
    ClusteringEffect,
    LinearVariant,
    clustering_effect,
)
from jaxclus.evaluation._masking import Masking, masking
from jaxclus.evaluation._predict import MICROBATCH
from jaxclus.evaluation._result import MemberResult, Robustness, Spread, describe, spread
from jaxclus.evaluation._robustness import (
    correct,
    robustness,
    robustness_curve,
    robustness_over_seeds,
)
from jaxclus.evaluation._signs import SIGNS, Sign

__all__ = [
    "MICROBATCH",
    "SIGNS",
    "ClusteringEffect",
    "LinearVariant",
    "Masking",
    "MemberResult",
    "Robustness",
    "Sign",
    "Spread",
    "clustering_effect",
    "correct",
    "describe",
    "masking",
    "robustness",
    "robustness_curve",
    "robustness_over_seeds",
    "spread",
]
