"""The command line: `jaxclus train | attack | evaluate | linearize | report | data | demo`."""

from jaxclus.cli._main import main

__all__ = ["main"]
