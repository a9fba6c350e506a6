"""Training steps of different objectives, timed in turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import jaxclus as jc
from jaxclus import parallel
from jaxclus.training import TrainingConfig, _step, objectives

SHAPE = (32, 32, 3)


def training_step(
    objective: objectives.Objective,
    *,
    model: str,
    classes: int,
    batch_size: int,
    num_images: int,
    seed: int,
) -> Callable[[], None]:
    """The trainer's own step (batch, augmentation, loss, update), on the state the last one left.

    Args:
        objective: what is minimised.
        model: architecture.
        classes: number of classes.
        batch_size: images in a step.
        num_images: random images 32x32x3 that the batches are taken from.
        seed: of weights, images and steps.
    """
    network = jc.models.create(model, classes, SHAPE, jax.random.key(seed))
    program = _step.Program.of(
        network,
        objective=objective,
        config=TrainingConfig(batch_size=batch_size, learning_rate=1e-3),
        augmentation=jc.data.default_augmentation("cifar10"),
        steps_per_epoch=num_images // batch_size,
        mesh=parallel.mesh(jax.devices()[:1]),
    )
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_images, *SHAPE), np.uint8)
    labels = rng.integers(0, classes, num_images, np.int32)
    order = rng.permutation(num_images).astype(np.int32)
    key, placement = jax.random.key(seed), parallel.replicated(program.mesh)
    batch = jax.device_put((key, order, images, labels), placement)
    own = objective.init(key, network, *batch[2:], batch_size)
    state = _step.initial_state(program, _step.weights_of(network), own, validated=False)

    def step() -> None:
        nonlocal state
        state, _ = _step.train_step(state, *batch, program=program)
        jax.block_until_ready(state)

    return step


def timed(sides: Mapping[str, Callable[[], None]], rounds: int, label: str = "") -> dict[str, Any]:
    """Seconds of each side, in turns after a first call that compiles; ratios to the first side.

    Prints a line for each.

    Args:
        sides: what is timed, by name.
        rounds: timed calls of each; the median counts.
        label: printed before the name.
    """
    compiling = {name: seconds(side) for name, side in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(seconds(side))
    median = {name: statistics.median(found) for name, found in times.items()}
    plain = next(iter(median.values()))
    rows = {
        name: {
            "seconds": round(median[name], 4),
            "all_seconds": [round(t, 4) for t in times[name]],
            "first_call_seconds": round(compiling[name], 2),
            "ratio": round(median[name] / plain, 3),
        }
        for name in sides
    }
    for name, row in rows.items():
        print(
            f"{label:8s} {name:6s} {row['seconds']:8.4f} s ({min(times[name]):.4f} to "
            f"{max(times[name]):.4f})  {row['ratio']:6.3f} times {next(iter(rows))}  "
            f"({row['first_call_seconds']:.1f} s for the first call)"
        )
    return rows


def seconds(call: Callable[[], None]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
