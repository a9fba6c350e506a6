"""How far apart prototypes are."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy.spatial.distance import pdist

from jaxclus import _checks
from jaxclus.prototypes._head import RULES, PrototypeHead, Rule


@dataclasses.dataclass(frozen=True)
class Separation:
    """Distances of pairs of prototypes, and which of them are classified as their own class.

    Attributes:
        min_linf, mean_linf: of |p_i - p_j|_inf.
        min_l2, mean_l2: of |p_i - p_j|_2.
        min_angle, mean_angle: of the angle between p_i and p_j, in radians, in [0, pi].
        self_classified: for each rule of `PrototypeHead`, the share of prototypes p_y whose
            largest score, in float32 as of the head, is that of class y and no other, in [0, 1].
    """

    min_linf: float
    mean_linf: float
    min_l2: float
    mean_l2: float
    min_angle: float
    mean_angle: float
    self_classified: dict[str, float]


def separation(prototypes: ArrayLike) -> Separation:
    """How far apart prototypes are, in Linf, L2 and angle.

    Args:
        prototypes: floating point [k, d], k at least 2, none of them zero.

    Returns:
        Least and mean distances of pairs, and shares by rule.

    Raises:
        ValueError, TypeError: the prototypes are not as said.
    """
    points = np.asarray(_checks.vectors("prototypes", prototypes, at_least=2), np.float64)
    zero = np.flatnonzero(~points.any(axis=1))
    if len(zero):
        raise ValueError(
            f"`prototypes` must not be zero, as a zero vector has no angle, but number {zero[0]} is"
        )
    linf, l2 = pdist(points, "chebyshev"), pdist(points, "euclidean")
    angles = np.arccos(np.clip(1 - pdist(points, "cosine"), -1, 1))
    return Separation(
        min_linf=float(linf.min()),
        mean_linf=float(linf.mean()),
        min_l2=float(l2.min()),
        mean_l2=float(l2.mean()),
        min_angle=float(angles.min()),
        mean_angle=float(angles.mean()),
        self_classified={rule: _self_classified(prototypes, rule) for rule in RULES},
    )


def _self_classified(prototypes: ArrayLike, rule: Rule) -> float:
    scores = np.array(PrototypeHead(jnp.asarray(prototypes), rule)(prototypes))
    own = np.diagonal(scores).copy()
    np.fill_diagonal(scores, -np.inf)
    return float((own > scores.max(axis=1)).mean())
