"""Reports: one HTML page, and its plots as PNG, from the files that runs leave behind."""

from jaxclus.report._page import write as write

__all__ = ["write"]
