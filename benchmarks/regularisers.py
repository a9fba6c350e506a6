"""What the clustering regularisers cost: training steps with and without them, in the same run.

    python -m benchmarks.regularisers       # -> benchmarks/results/regularisers-DEVICE.json
    python -m benchmarks.regularisers --model resnet18 --batch-size 32      # for accelerators

Each side is the trainer's own step (batch, augmentation, 10 PGD steps, loss, update) on the same
random images 32x32x3, from the same weights: adversarial training by itself, with the published
regulariser on logits, and with ours on the implicit weight, which adds k passes through the linear
sub-network and their derivative, whatever the batch size; for the k = 10 classes of CIFAR-10 and
the 100 of CIFAR-100. The sides take turns; the median round counts, without the first call, which
compiles. A step with the weight regulariser may take at most 1.30 times as long as one without.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

import jaxclus as jc
from benchmarks.steps import timed, training_step
from jaxclus import runs
from jaxclus.training import objectives

STEPS, EPS = 10, 8 / 255
# Classes whose groups are used, and how many there are.
DATASETS = {"cifar10": 10, "cifar100": 100}
#: The most that a step with the weight regulariser may take, in steps without.
LIMIT = 1.30


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time training steps with each clustering regulariser and without."""

    model: str = "resnet8"
    """Architecture; resnet18 for accelerators."""
    batch_size: int = 128
    """Images in a step."""
    rounds: int = 7
    """Timed steps of each side, taken in turns after one to compile."""
    attack_steps: int = STEPS
    """Gradient steps of PGD in each step."""
    seed: int = 0
    """Seed of weights, images and steps."""
    output: Path = Path("benchmarks/results")
    """Directory for the result."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds", "attack_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")

    def run(self) -> None:
        """Measures, prints a table, writes the result."""
        rows = {name: self._measured(name) for name in DATASETS}
        kept = all(found["weight"]["ratio"] <= LIMIT for found in rows.values())
        verdict = "kept" if kept else "MISSED"
        print(f"weight regulariser: at most {LIMIT:.2f} times plain: {verdict}")
        kind = jax.devices()[0].device_kind.replace(" ", "-").lower()
        runs.write_json(
            self.output / f"regularisers-{kind}.json",
            {
                "what": f"training step, PGD-{self.attack_steps} linf eps 8/255, 32x32x3",
                "model": self.model,
                "batch_size": self.batch_size,
                "rounds": self.rounds,
                "seed": self.seed,
                "rows": rows,
                "limit": LIMIT,
                "kept": kept,
                **runs.environment(),
            },
        )
        if not kept:
            raise SystemExit(1)

    def _measured(self, dataset: str) -> dict[str, Any]:
        """The sides for the classes and groups of a data set."""
        goals = self.compared(dataset)
        sides = {name: self._side(objective, dataset) for name, objective in goals.items()}
        return timed(sides, self.rounds, dataset)

    def compared(self, dataset: str) -> dict[str, objectives.Objective]:
        """What the sides minimise."""
        attack = jc.attacks.PGD(jc.Linf(EPS), steps=self.attack_steps)
        plain, groups = objectives.Adversarial(attack), jc.data.class_groups(dataset)
        return {
            "plain": plain,
            "logits": objectives.LogitClustering(plain, groups),
            "weight": objectives.WeightClustering(plain, groups),
        }

    def _side(self, objective: objectives.Objective, dataset: str) -> Callable[[], None]:
        """A training step on the state that the last one left."""
        return training_step(
            objective, model=self.model, classes=DATASETS[dataset], batch_size=self.batch_size,
            num_images=self.batch_size, seed=self.seed,
        )  # fmt: skip


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
