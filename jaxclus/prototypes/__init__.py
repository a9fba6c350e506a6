"""Deep repulsive prototypes and their relatives: classes with fixed places far apart.

Serban, Poll and Visser, "Deep Repulsive Prototypes for Adversarial Robustness", arXiv:2105.12427.
"""

from jaxclus.prototypes._certificate import certified_margin, certified_radius
from jaxclus.prototypes._generators import hadamard, hyperspherical, repulsive, simplex
from jaxclus.prototypes._head import PrototypeHead, Rule
from jaxclus.prototypes._learned import LearnedPrototypes
from jaxclus.prototypes._losses import PrototypeDistance, prototype_loss
from jaxclus.prototypes._objectives import (
    AdversarialPrototypes,
    Generator,
    PrototypeTRADES,
    PrototypeTraining,
    TrainingDistance,
)
from jaxclus.prototypes._separation import Separation, separation

__all__ = [
    "AdversarialPrototypes",
    "Generator",
    "LearnedPrototypes",
    "PrototypeDistance",
    "PrototypeHead",
    "PrototypeTRADES",
    "PrototypeTraining",
    "Rule",
    "Separation",
    "TrainingDistance",
    "certified_margin",
    "certified_radius",
    "hadamard",
    "hyperspherical",
    "prototype_loss",
    "repulsive",
    "separation",
    "simplex",
]
