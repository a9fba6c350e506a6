"""Evaluation: accuracy and robust accuracy over a data set."""

from jaxclus.evaluation._robustness import (
    MICROBATCH,
    Robustness,
    correct,
    describe,
    robustness,
    robustness_curve,
)

__all__ = ["MICROBATCH", "Robustness", "correct", "describe", "robustness", "robustness_curve"]
