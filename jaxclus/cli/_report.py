"""`jaxclus report`."""

import dataclasses
from pathlib import Path

import tyro

from jaxclus import report


@dataclasses.dataclass(frozen=True)
class Report:
    """Compare runs on one self-contained HTML page, with the figures as PNG files beside it.

    Try:
      jaxclus report runs/digits-cnn-standard-seed0 runs/digits-cnn-pgd-seed0
      jaxclus report runs/* --output comparison
    """

    run_paths: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories of `jaxclus train`, after `jaxclus attack` and `jaxclus linearize`."""
    output: Path = Path("report")
    """Directory for index.html and the figures."""

    def run(self) -> None:
        """Writes the page."""
        print(f"written: {report.write(self.run_paths, self.output)}")
