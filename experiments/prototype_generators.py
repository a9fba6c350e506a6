"""What the generators of prototypes make: distances, lengths, cosines, self-classification.

    python -m experiments.prototype_generators
    python -m experiments.prototype_generators --quick

Every generator of `jc.prototypes` for 10 classes in R^100 and 100 classes in R^500, with five keys;
of "Deep Repulsive Prototypes for Adversarial Robustness" (arXiv:2105.12427) the settings that its
configurations name: the objective as its code has it (the sum over pairs), and its mean. Nothing is
trained: what networks learn of it is the question of `experiments.repulsive_prototypes`.

Results: experiments/results/prototype_generators.json, a table in .md.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from scipy.spatial.distance import pdist

from experiments.paired import spread
from experiments.records import written
from jaxclus import runs
from jaxclus.prototypes import hadamard, hyperspherical, repulsive, separation, simplex

# Number of classes, dimension, and how many steps of the descent.
SIZES = {
    "uniform": ((10, 100, 0), (100, 500, 0)),
    "repulsive, sum": ((10, 50, 100), (10, 100, 100), (100, 100, 50), (100, 500, 1000)),
    "repulsive, mean": ((10, 100, 100), (100, 500, 1000), (100, 500, 5000)),
    "simplex": ((10, 100, 0), (100, 500, 0)),
    "hadamard": ((10, 100, 0), (100, 500, 0)),
    "hyperspherical": ((10, 100, 10_000), (100, 500, 10_000)),
}
KIND = ("generator", "num_classes", "dim", "steps")
OTHERS = ("cosine", "linf", "l2")
QUICK = ((4, 6, 10),)
SEEDS = (0, 1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What the generators of prototypes make."""

    quick: bool = False
    """Two keys and few steps: a smoke test, no result."""
    output: Path = Path("experiments/results")
    """Directory for the results."""

    def run(self) -> dict[str, Any]:
        """Makes prototypes, measures, and writes results and a table."""
        rows = [
            dict(zip(KIND, (name, classes, dim, steps), strict=True), seed=seed)
            | measured(made(name, seed, classes, dim, steps))
            for name, sizes in SIZES.items()
            for classes, dim, steps in (QUICK if self.quick else sizes)
            for seed in SEEDS[: 2 if self.quick else None]
        ]
        result = {"quick": self.quick, "rows": rows, **runs.environment()}
        name = "prototype_generators" + self.quick * "-quick"
        return written(self.output, name, result, table(result), {})


def made(name: str, seed: int, classes: int, dim: int, steps: int) -> jax.Array:
    """The prototypes of a seed."""
    key = jax.random.key(seed)
    return {
        "uniform": lambda: repulsive(key, classes, dim, 0),
        "repulsive, sum": lambda: repulsive(key, classes, dim, steps, "sum"),
        "repulsive, mean": lambda: repulsive(key, classes, dim, steps, "mean"),
        "simplex": lambda: simplex(classes, dim),
        "hadamard": lambda: hadamard(classes, dim),
        "hyperspherical": lambda: hyperspherical(key, classes, dim, steps),
    }[name]()


def measured(prototypes: jax.Array) -> dict[str, Any]:
    """Separation, lengths, cosines and the largest entry."""
    points = np.asarray(prototypes, np.float64)
    cosines, lengths = 1 - pdist(points, "cosine"), np.linalg.norm(points, axis=1)
    return dataclasses.asdict(separation(prototypes)) | {
        "min_length": lengths.min(), "max_length": lengths.max(),
        "min_cosine": cosines.min(), "mean_cosine": cosines.mean(), "max_cosine": cosines.max(),
        "largest_entry": np.abs(points).max(),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: dict[str, Any]) -> Iterable[str]:
    columns = (
        "min_linf", "mean_linf", "min_l2", "min_length", "max_length", "min_cosine", "mean_cosine",
        "max_cosine", "largest_entry",
    )  # fmt: skip
    seeds = sorted({row["seed"] for row in result["rows"]})
    yield "# Prototypes by generator"
    yield ""
    yield (
        f"`{result['command']}` ({result['hardware']}; JAX {result['versions']['jax']}). Mean ± "
        f"standard deviation over keys {', '.join(map(str, seeds))}. Linf and L2: distances of "
        "pairs. Length: L2 norm. Own: share of prototypes that are classified as their own class, "
        "by inner products and by the worst of the other rules (cosine, Linf, L2). Uniform: "
        "[-1, 1]^d, where the repulsive ones start."
    )
    yield ""
    names = " | ".join(name.replace("_", " ") for name in columns)
    yield f"| generator | k | d | steps | {names} | own, inner product % | own, others % |"
    yield "|---" * (len(columns) + 6) + "|"
    kinds = [tuple(row[name] for name in KIND) for row in result["rows"]]
    for kind in dict.fromkeys(kinds):
        found = [row for row, own in zip(result["rows"], kinds, strict=True) if own == kind]
        cells = [_shown([row[column] for row in found]) for column in columns]
        own = [row["self_classified"] for row in found]
        cells.append(_shown([100 * each["inner_product"] for each in own]))
        cells.append(_shown([100 * min(each[r] for r in OTHERS) for each in own]))
        yield f"| {' | '.join([*map(str, kind), *cells])} |"


def _shown(values: list[float]) -> str:
    """Mean and standard deviation, the latter only where keys differ."""
    mean, deviation = spread(values)
    return f"{mean:.3g}" + (f" ± {deviation:.2g}" if deviation > 1e-3 * abs(mean) else "")


if __name__ == "__main__":
    tyro.cli(Experiment).run()
