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
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import jaxclus as jc
from jaxclus import parallel, runs
from jaxclus.training import TrainingConfig, _step, objectives

STEPS, EPS, SHAPE = 10, 8 / 255, (32, 32, 3)
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
        compiling = {name: seconds(side) for name, side in sides.items()}
        times = {name: [] for name in sides}
        for _ in range(self.rounds):
            for name, side in sides.items():
                times[name].append(seconds(side))
        median = {name: statistics.median(found) for name, found in times.items()}
        rows = {
            name: {
                "seconds": round(median[name], 4),
                "all_seconds": [round(t, 4) for t in times[name]],
                "first_call_seconds": round(compiling[name], 2),
                "ratio": round(median[name] / median["plain"], 3),
            }
            for name in sides
        }
        for name, row in rows.items():
            print(
                f"{dataset:8s} {name:6s} {row['seconds']:8.4f} s ({min(times[name]):.4f} to "
                f"{max(times[name]):.4f})  {row['ratio']:6.3f} times plain  "
                f"({row['first_call_seconds']:.1f} s for the first call)"
            )
        return rows

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
        k = DATASETS[dataset]
        model = jc.models.create(self.model, k, SHAPE, jax.random.key(self.seed))
        program = _step.Program.of(
            model,
            objective=objective,
            config=TrainingConfig(batch_size=self.batch_size, learning_rate=1e-3),
            augmentation=jc.data.default_augmentation("cifar10"),
            steps_per_epoch=1,
            mesh=parallel.mesh(jax.devices()[:1]),
        )
        rng = np.random.default_rng(self.seed)
        images = rng.integers(0, 256, (self.batch_size, *SHAPE), np.uint8)
        labels = rng.integers(0, k, self.batch_size, np.int32)
        order = np.arange(self.batch_size, dtype=np.int32)
        key, placement = jax.random.key(self.seed), parallel.replicated(program.mesh)
        batch = jax.device_put((key, order, images, labels), placement)
        own = objective.init(key, model, *batch[2:], self.batch_size)
        state = _step.initial_state(program, _step.weights_of(model), own, validated=False)

        def step() -> None:
            nonlocal state
            state, _ = _step.train_step(state, *batch, program=program)
            jax.block_until_ready(state)

        return step


def seconds(call: Callable[[], None]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
