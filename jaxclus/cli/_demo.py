"""`jaxclus demo`."""

import dataclasses
import time
from pathlib import Path

from jaxclus.cli._arguments import Number
from jaxclus.cli._attack import Attack
from jaxclus.cli._linearize import Linearize
from jaxclus.cli._report import Report
from jaxclus.cli._train import Train
from jaxclus.training import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train a standard and a robust classifier, attack, linearise and compare them in a report.

    The defaults take a minute or two on two CPU cores and need no download.

    Try:
      jaxclus demo
      jaxclus demo --dataset fashion_mnist --eps 0.1 --num-images 10000
    """

    dataset: str = "digits"
    """Data set to train on."""
    model: str = "cnn"
    """Architecture."""
    eps: Number = 0.2
    """Linf radius of the adversarial training; the attacks sweep around it."""
    epochs: int = 30
    """Passes over the training set."""
    num_images: int | None = None
    """Train on the first so many images only."""
    output: Path = Path("runs/demo")
    """Directory for the two runs and the report."""

    def run(self) -> None:
        """Runs the five commands one after the other, and names each."""
        begin = time.perf_counter()
        config = TrainingConfig(epochs=self.epochs, batch_size=64, learning_rate=0.05)
        paths = []
        for method in ("standard", "pgd"):
            train = Train(
                dataset=self.dataset, model=self.model, method=method, eps=self.eps,
                attack_steps=7, training=config, num_images=self.num_images, output=self.output,
            )  # fmt: skip
            self._step(f"training: {method}")
            train.run()
            paths.append(train.directory(0))
        for path in paths:
            self._step(f"attacking: {path.name}")
            sweep = tuple(round(self.eps * factor, 6) for factor in (0.25, 0.5, 1.0, 1.5, 2.0))
            Attack(path, eps=sweep, num_images=1000).run()
            self._step(f"linear sub-network: {path.name}")
            Linearize(path).run()
        self._step("report")
        Report(tuple(paths), self.output / "report").run()
        print(f"done in {time.perf_counter() - begin:.0f} s; open the page in a browser")

    @staticmethod
    def _step(text: str) -> None:
        print(f"\n== {text}", flush=True)
