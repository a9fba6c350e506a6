"""k-means of many classes in one call, against scikit-learn class by class, in the same run.

    python -m benchmarks.kmeans     # -> benchmarks/results/kmeans-DEVICE.json

50,000 points of 512 features in 10 classes, 2 clusters for each class: what ClusTR does to a
training set's embeddings. Each class is a mixture of overlapping Gaussians, so that Lloyd is not
done at once. Both sides seed by greedy k-means++, stop by the same rules and make as many restarts:
1 of at most 20 iterations, then 10 of at most 40. The sides take turns; the median round counts,
without the first call, which compiles. Scikit-learn runs with its default threads and with one,
which is faster where something else needs a core; the faster counts. On CPUs jaxclus may not be
slower, on accelerators it must be 10 times faster.
"""

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import jaxclus as jc
from jaxclus import runs

#: Restarts and the most iterations of each.
SETTINGS = ((1, 20), (10, 40))
#: Means in a class, and their distance from its centre in standard deviations, by coordinate.
PARTS, SPREAD = 4, 0.1
#: How many times faster than scikit-learn jaxclus must be.
FLOORS = {"cpu": 1.0, "accelerator": 10.0}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Time k-means of each class against scikit-learn's."""

    classes: int = 10
    """Data sets in a call."""
    points: int = 5000
    """Points in each class."""
    features: int = 512
    """Features of a point."""
    clusters: int = 2
    """Clusters in each class."""
    rounds: int = 7
    """Timed calls of each side, taken in turns after one to compile."""
    seed: int = 0
    """Seed of points and starts."""
    output: Path = Path("benchmarks/results")
    """Directory for the result."""

    def __post_init__(self) -> None:
        for name in ("classes", "points", "features", "clusters", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")

    def run(self) -> None:
        """Measures, prints a table, writes the result."""
        import sklearn

        floor = FLOORS["cpu" if jax.default_backend() == "cpu" else "accelerator"]
        data = self.data()
        rows = [self._measured(data, *setting) for setting in SETTINGS]
        kept = all(row["ratio"] >= floor for row in rows)
        print(f"at least {floor:g} times as fast as scikit-learn: {'kept' if kept else 'MISSED'}")
        environment = runs.environment()
        environment["versions"]["scikit-learn"] = sklearn.__version__
        kind = jax.devices()[0].device_kind.replace(" ", "-").lower()
        runs.write_json(
            self.output / f"kmeans-{kind}.json",
            {
                "what": f"{self.clusters} clusters in each of {self.classes} classes of "
                f"{self.points} points of {self.features} features",
                "rounds": self.rounds,
                "seed": self.seed,
                "rows": rows,
                "floor": floor,
                "kept": kept,
                **environment,
            },
        )
        if not kept:
            raise SystemExit(1)

    def data(self) -> np.ndarray:
        """The points of each class [classes, points, features]."""
        rng = np.random.default_rng(self.seed)
        shape = (self.classes, self.points, self.features)
        means = SPREAD * rng.standard_normal((self.classes, PARTS, self.features))
        part = rng.integers(0, PARTS, shape[:2])
        parts = np.take_along_axis(means, part[:, :, None], 1)
        return (parts + rng.standard_normal(shape)).astype(np.float32)

    def _measured(self, data: np.ndarray, starts: int, iterations: int) -> dict[str, Any]:
        """The sides with so many restarts."""
        sides = self.sides(data, starts, iterations)
        first = {name: timed(side)[0] for name, side in sides.items()}
        times, found = {name: [] for name in sides}, {}
        for _ in range(self.rounds):
            for name, side in sides.items():
                seconds, found[name] = timed(side)
                times[name].append(seconds)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        peer = min(seconds for name, seconds in median.items() if name != "jaxclus")
        row = {"starts": starts, "max_iterations": iterations, "sides": {}}
        for name, (inertia, steps) in found.items():
            row["sides"][name] = {
                "seconds": round(median[name], 4),
                "all_seconds": [round(t, 4) for t in times[name]],
                "first_call_seconds": round(first[name], 2),
                "inertia": inertia,
                "iterations": steps,
            }
            print(
                f"{starts:2d} starts, {name:24s} {median[name]:8.4f} s ({min(times[name]):.4f} to "
                f"{max(times[name]):.4f})  inertia {inertia:.6g}  iterations {steps}"
            )
        row["ratio"] = round(peer / median["jaxclus"], 3)
        print(f"{starts:2d} starts, jaxclus is {row['ratio']:.2f} times as fast")
        return row

    def sides(self, data: np.ndarray, starts: int, iterations: int) -> dict[str, Callable]:
        """Calls that cluster all classes: the sum of inertias, and the iterations by class."""
        from threadpoolctl import threadpool_limits

        key, points = jax.random.key(self.seed), jax.device_put(data)

        def ours():
            found = jc.clustering.kmeans(
                key, points, self.clusters, max_iter=iterations, num_init=starts
            )
            found = jax.device_get(found)
            return float(found.inertia.sum(dtype=np.float64)), found.iterations.tolist()

        def theirs(threads):
            with threadpool_limits(threads):
                found = [self._peer(rows, starts, iterations) for rows in data]
            return float(sum(each.inertia_ for each in found)), [each.n_iter_ for each in found]

        return {
            "jaxclus": ours,
            "scikit-learn": lambda: theirs(None),
            "scikit-learn, one thread": lambda: theirs(1),
        }

    def _peer(self, points: np.ndarray, starts: int, iterations: int) -> Any:
        """Scikit-learn's clusters of one class."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        peer = KMeans(self.clusters, n_init=starts, max_iter=iterations, random_state=self.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return peer.fit(points)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and its result."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    tyro.cli(Benchmark).run()
