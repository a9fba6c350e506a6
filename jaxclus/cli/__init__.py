"""The command line: `jaxclus train | attack | linearize | report | data | demo`."""

from jaxclus.cli._main import main

__all__ = ["main"]
