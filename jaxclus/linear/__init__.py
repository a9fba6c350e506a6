"""The linear sub-network of a classifier and its implicit weight."""

from jaxclus.linear._implicit_weight import (
    ImplicitWeight,
    implicit_weight,
    nonlinear_primitives,
)
from jaxclus.linear._linearize import LinearSubnetwork, linearize

__all__ = [
    "ImplicitWeight",
    "LinearSubnetwork",
    "implicit_weight",
    "linearize",
    "nonlinear_primitives",
]
