"""Reports: one HTML page, and its plots as PNG, from the files that runs leave behind."""

from jaxclus.report._page import write as write
from jaxclus.report._panels import correlation_panels

__all__ = ["correlation_panels", "write"]
