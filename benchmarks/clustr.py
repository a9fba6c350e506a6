"""What ClusTR costs: its training step against a plain one of the same batch, in the same run.

    python -m benchmarks.clustr     # -> benchmarks/results/clustr-DEVICE.json
    python -m benchmarks.clustr --model resnet18 --batch-size 240     # for accelerators

Each side is the trainer's own step (batch, augmentation, loss, update) on 50,000 random images
32x32x3, from the same weights: cross-entropy on shuffled images, and the Magnet loss on clusters
that the sampler draws on the device (the published code draws them on the host). The sides take
turns; the median round counts, without the first call, which compiles. A step of ClusTR may take
at most 1.15 times as long as a plain one; k-means, once an epoch, is not in it. QTRADES, which
makes an adversary and sees twice the images, is timed for comparison.
"""

import dataclasses
from pathlib import Path

import jax
import tyro

import jaxclus as jc
from benchmarks.steps import timed, training_step
from jaxclus import runs
from jaxclus.training import objectives

#: The most that a step of ClusTR may take, in plain steps.
LIMIT = 1.15


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time training steps of ClusTR against plain ones."""

    model: str = "resnet8"
    """Architecture; resnet18 for accelerators."""
    batch_size: int = 240
    """Images in a step, a multiple of 12 clusters."""
    num_images: int = 50_000
    """Images of the training set."""
    rounds: int = 15
    """Timed steps of each side, taken in turns after one to compile."""
    seed: int = 0
    """Seed of weights, images and steps."""
    output: Path = Path("benchmarks/results")
    """Directory for the result."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_images", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")

    def run(self) -> None:
        """Measures, prints a table, writes the result."""
        compared = {
            "plain": objectives.Standard(),
            "clustr": jc.clustr.ClusTR(),
            "qtrades": jc.clustr.QTRADES(),
        }
        how = {"model": self.model, "batch_size": self.batch_size, "num_images": self.num_images}
        sides = {
            name: training_step(objective, classes=10, seed=self.seed, **how)
            for name, objective in compared.items()
        }
        rows = timed(sides, self.rounds)
        kept = rows["clustr"]["ratio"] <= LIMIT
        print(f"clustr: at most {LIMIT:.2f} times plain: {'kept' if kept else 'MISSED'}")
        kind = jax.devices()[0].device_kind.replace(" ", "-").lower()
        runs.write_json(
            self.output / f"clustr-{kind}.json",
            {"what": "training step, 32x32x3, 10 classes", **how, "rounds": self.rounds}
            | {"seed": self.seed, "rows": rows, "limit": LIMIT, "kept": kept, **runs.environment()},
        )
        if not kept:
            raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
