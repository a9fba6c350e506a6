"""Training objectives: what `jc.training.fit` minimises."""

from jaxclus.training.objectives._adversarial import (
    Adversarial,
    FastAdversarial,
    FreeAdversarial,
)
from jaxclus.training.objectives._base import (
    Head,
    Metrics,
    Objective,
    Outcome,
    Seen,
    TrainingModel,
    mean_cross_entropy,
)
from jaxclus.training.objectives._centres import CentrePull
from jaxclus.training.objectives._clustering import LogitClustering, WeightClustering
from jaxclus.training.objectives._consistency import MART, TRADES
from jaxclus.training.objectives._over_images import embeddings, over_images
from jaxclus.training.objectives._standard import Standard
from jaxclus.training.objectives._weight_perturbation import AWP
from jaxclus.training.objectives._wrapped import Wrapped, WrappedState

__all__ = [
    "AWP",
    "MART",
    "TRADES",
    "Adversarial",
    "CentrePull",
    "FastAdversarial",
    "FreeAdversarial",
    "Head",
    "LogitClustering",
    "Metrics",
    "Objective",
    "Outcome",
    "Seen",
    "Standard",
    "TrainingModel",
    "WeightClustering",
    "Wrapped",
    "WrappedState",
    "embeddings",
    "mean_cross_entropy",
    "over_images",
]
