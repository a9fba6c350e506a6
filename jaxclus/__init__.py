"""Adversarial robustness through clustering, in JAX and Flax.

Images are float32, NHWC, in [0, 1]; labels are int32; `eps` is on that pixel scale. A classifier
is any callable from images [b, h, w, c] to logits [b, k].
"""

from jaxclus import (
    attacks,
    clustering,
    clustr,
    data,
    evaluation,
    linear,
    losses,
    metrics,
    models,
    prototypes,
    report,
    threat,
    training,
    zoo,
)
from jaxclus._compile import jit
from jaxclus._version import __version__
from jaxclus.compose import Chain, Stochastic
from jaxclus.linear import implicit_weight, linearize
from jaxclus.threat import L1, L2, Linf
from jaxclus.zoo import export, load

__all__ = [
    "Chain",
    "L1",
    "L2",
    "Linf",
    "Stochastic",
    "__version__",
    "attacks",
    "clustering",
    "clustr",
    "data",
    "evaluation",
    "export",
    "implicit_weight",
    "jit",
    "linear",
    "linearize",
    "load",
    "losses",
    "metrics",
    "models",
    "prototypes",
    "report",
    "threat",
    "training",
    "zoo",
]
