"""Training objectives: what `jc.training.fit` minimises."""

from jaxclus.training.objectives._adversarial import Adversarial
from jaxclus.training.objectives._base import Metrics, Objective, TrainingModel
from jaxclus.training.objectives._standard import Standard, mean_cross_entropy

__all__ = [
    "Adversarial",
    "Metrics",
    "Objective",
    "Standard",
    "TrainingModel",
    "mean_cross_entropy",
]
