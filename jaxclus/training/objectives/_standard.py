"""Empirical risk minimisation."""

import dataclasses

from jaxclus.training.objectives._base import Objective


@dataclasses.dataclass(frozen=True)
class Standard(Objective):
    """Mean cross-entropy on clean images."""
