"""Evaluation: accuracy, attacks and certificates over a data set, and the clustering effect."""

from jaxclus.evaluation._adaptive_inputs import ITEMS
from jaxclus.evaluation._adaptive_suite import AdaptiveSuite, adaptive_suite
from jaxclus.evaluation._bracket import Bracket, bracket
from jaxclus.evaluation._certify import Certificates, certify
from jaxclus.evaluation._clustering_effect import (
    ClusteringEffect,
    LinearVariant,
    clustering_effect,
    discover_groups,
    implicit_correlation,
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
from jaxclus.evaluation._success_pattern import SuccessPattern, success_pattern
from jaxclus.evaluation._superclass import SuperclassAccuracy, SuperclassLogits, superclass_accuracy

__all__ = [
    "ITEMS",
    "MICROBATCH",
    "SIGNS",
    "AdaptiveSuite",
    "Bracket",
    "Certificates",
    "ClusteringEffect",
    "LinearVariant",
    "Masking",
    "MemberResult",
    "Robustness",
    "Sign",
    "Spread",
    "SuccessPattern",
    "SuperclassAccuracy",
    "SuperclassLogits",
    "adaptive_suite",
    "bracket",
    "certify",
    "clustering_effect",
    "correct",
    "describe",
    "discover_groups",
    "implicit_correlation",
    "masking",
    "robustness",
    "robustness_curve",
    "robustness_over_seeds",
    "spread",
    "success_pattern",
    "superclass_accuracy",
]
