"""Models on disk."""

from jaxclus.zoo._weights import export, load

__all__ = ["export", "load"]
