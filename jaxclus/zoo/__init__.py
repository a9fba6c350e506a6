"""Models on disk: those that ship with the library, and users' own."""

from jaxclus.zoo._cards import Figures, ModelCard, card
from jaxclus.zoo._cards import names as list
from jaxclus.zoo._measure import measure, remeasure
from jaxclus.zoo._weights import export, load

__all__ = ["Figures", "ModelCard", "card", "export", "list", "load", "measure", "remeasure"]
