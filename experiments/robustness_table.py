"""AutoAttack on every network given, in one table.

    python -m experiments.robustness_table runs/digits-cnn-pgd-seed0 model.safetensors
    python -m experiments.robustness_table --networks DIR --data-dir DIR --num-images 500 --seeds 3
    python -m experiments.robustness_table model.safetensors --dataset digits --quick

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, arXiv:2003.01690. For each network: accuracy clean and after
each attack, over the first images of the test split, mean and spread over seeds; seconds of each
attack, compilation included; the final images whose verdict depends on the batch size; and the
signs of masked gradients that `jc.evaluation.masking` finds. A network with such signs is less
robust than its figure, as far as anybody knows. CIFAR-10 is the JPEG q75 re-encoding of ../shared
where the data set's fingerprint says so.

Results: experiments/results/robustness_table.json and .md, written anew after every network.
Interrupted, the same command goes on. On 2 CPU cores, 1,000 images of a small CNN take a few
minutes for each seed, at full load of the cores; ResNets take an accelerator.
"""

import dataclasses
import fractions
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

import jaxclus as jc
from benchmarks import reference_networks
from experiments.records import shown_name
from jaxclus import runs

#: The radius at which a data set usually is attacked, by data set and norm.
USUAL_EPS = {
    ("mnist", "linf"): "0.3",
    ("fashion_mnist", "linf"): "0.1",
    ("cifar10", "linf"): "8/255",
    ("cifar10", "l2"): "0.5",
    ("digits", "linf"): "0.2",
}
QUICK_IMAGES = 16


@dataclasses.dataclass(frozen=True)
class Network:
    """A classifier, where it came from and the data set that it is for."""

    name: str
    path: Path
    model: Any
    dataset: str


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Evaluate networks under AutoAttack."""

    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories of `jaxclus train`, or .safetensors files."""
    networks: tuple[Path, ...] = ()
    """Reference networks (benchmarks/reference_networks.py): .npz files, or directories of them."""
    dataset: str | None = None
    """Data set of the checkpoints; default: the one that the run was trained on."""
    data_dir: Path | None = None
    """Where TFDS data sets stand; default: $TFDS_DATA_DIR, else TFDS's own default."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the ball."""
    eps: str | None = None
    """Radius on the pixel scale, as 0.3 or 8/255; default: the data set's usual one."""
    version: Literal["standard", "plus"] = "standard"
    """Version of AutoAttack."""
    num_images: int = 1000
    """The first so many images of the test split."""
    seeds: int = 1
    """Number of attacks with different randomness."""
    seed: int = 0
    """Seed that theirs are made from."""
    microbatch: int | None = None
    """Images in one physical batch on each device; fewer need less memory."""
    quick: bool = False
    """Few images and short attacks: a smoke test, no result."""
    output: Path = Path("experiments/results")
    """Directory for the table."""
    work: Path = Path("runs/robustness_table")
    """Directory for the state of the evaluations."""

    def run(self) -> dict[str, Any]:
        """Evaluates, prints the table, and writes it."""
        networks = self._networks()
        name = f"robustness_table{'-quick' if self.quick else ''}"
        rows: list[dict[str, Any]] = []
        result: dict[str, Any] = {}
        for network in networks:
            rows.append(self._evaluate(network))
            result = {
                "version": self.version,
                "seed": self.seed,
                "seeds": self.seeds,
                "quick": self.quick,
                "rows": rows,
                **runs.environment(),
            }
            runs.write_json(self.output / f"{name}.json", result)
            runs.write_atomic(self.output / f"{name}.md", markdown(result).encode())
        print(markdown(result))
        print(f"written: {self.output / name}.json and .md")
        return result

    def _networks(self) -> list[Network]:
        """All that is to be evaluated; each must have a name of its own, that of its folder."""
        found = [
            Network(path.stem if path.is_file() else path.name, path, jc.load(path), name)
            for path, name in ((path, self._dataset_of(path)) for path in self.checkpoints)
        ]
        for place in self.networks:
            for path in sorted(place.glob("*.npz")) if place.is_dir() else [place]:
                meta, _ = reference_networks.read(path)
                model = reference_networks.load(path)
                found.append(Network(path.stem, path, model, meta["dataset"]))
        if not found:
            raise ValueError("`checkpoints` or `networks` must name a network, got none")
        names = [network.name for network in found]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"`checkpoints` must have different names, got {sorted(repeated)}")
        return found

    def _dataset_of(self, path: Path) -> str:
        if self.dataset is not None:
            return self.dataset
        config = path / "config.json"
        if not config.exists():
            raise ValueError(
                f"`dataset` must be given, since {path} is no run directory with a config.json"
            )
        return str(runs.read_json(config)["dataset"]["name"])

    def _threat(self, dataset: str) -> jc.threat.Threat:
        eps = USUAL_EPS.get((dataset, self.norm)) if self.eps is None else self.eps
        if eps is None:
            raise ValueError(f"`eps` must be given, since {dataset} has no usual {self.norm} one")
        return jc.threat.create(self.norm, float(fractions.Fraction(eps)))

    def _attack(self, threat: jc.threat.Threat) -> jc.attacks.AutoAttack:
        if not self.quick:
            return jc.attacks.AutoAttack(threat, version=self.version)
        short = (
            jc.attacks.APGD(threat, steps=3),
            jc.attacks.TargetedFAB(threat.name, threat, steps=3, targets=1),
            jc.attacks.Square(threat, queries=20),
        )
        return jc.attacks.AutoAttack(threat, version="custom", attacks=short)

    def _evaluate(self, network: Network) -> dict[str, Any]:
        """One row."""
        data = jc.data.load(network.dataset, "test", self.data_dir)
        shown = shown_name(data)
        wanted = QUICK_IMAGES if self.quick else self.num_images
        data = data.take(min(wanted, len(data)))
        threat = self._threat(network.dataset)
        folder = f"{network.name}-{threat.name}-{float(threat.eps):.6g}-{self.version}-{len(data)}"
        work = self.work / f"{folder}{'-quick' if self.quick else ''}-seed{self.seed}"
        key = jax.random.key(self.seed)
        print(f"{network.name}: {len(data)} images of {data.name}")
        found = jc.evaluation.robustness_over_seeds(
            key, network.model, self._attack(threat), data, self.seeds, directory=work,
            microbatch=self.microbatch,
        )  # fmt: skip
        return {
            "network": network.name,
            "path": str(network.path),
            "dataset": shown,
            **summary(found),
            "masking": self._masking(work / "masking.json", key, network, data, found[0]),
            "evaluations": [result.to_json() for result in found],
        }

    def _masking(
        self,
        path: Path,
        key: jax.Array,
        network: Network,
        data: jc.data.Dataset,
        found: jc.evaluation.Robustness,
    ) -> dict[str, Any]:
        """The masking checks on 100 images; from the file, if a run before this one made it."""
        if not path.exists():
            checked = jc.evaluation.masking(
                jax.random.fold_in(key, self.seeds), network.model, data, found.attack.ball,
                robustness=found, num_images=4 if self.quick else 100,
                attack=jc.attacks.APGD(found.attack.ball, steps=5) if self.quick else None,
            )  # fmt: skip
            runs.write_json(path, checked.to_json())
        return runs.read_json(path)


def summary(found: list[jc.evaluation.Robustness]) -> dict[str, Any]:
    """What the table says of one network, means over the seeds but for the counts."""
    spread = jc.evaluation.spread(found)
    first = found[0]
    names = [member.name for member in first.members]

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    seconds = mean([result.seconds for result in found])
    return {
        "norm": first.attack.ball.name,
        "eps": float(first.attack.ball.eps),
        "num_images": len(first.clean),
        "clean_accuracy": first.clean_accuracy,
        "accuracy_after": {
            name: mean([float(result.members[i].robust.mean()) for result in found])
            for i, name in enumerate(names)
        },
        "robust_accuracy": spread.mean,
        "std_over_seeds": spread.std,
        "worst_over_seeds": spread.worst,
        "seconds": {
            name: round(mean([result.members[i].seconds for result in found]), 2)
            for i, name in enumerate(names)
        },
        "images_per_second": round(int(first.clean.sum()) / seconds, 2) if seconds else 0.0,
        "disagreements": sum(result.disagreements for result in found),
        "skipped": dict(first.skipped),
    }


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["accuracy_after"]))
    head = [
        "network", "data", "images", "norm, eps", "clean %", *(f"{name} %" for name in names),
        "robust %", "worst %", "seconds", "images/s", "disagreements", "signs of masking",
    ]  # fmt: skip
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        after = [row["accuracy_after"].get(name) for name in names]
        cells = [
            row["network"],
            row["dataset"],
            str(row["num_images"]),
            f"{row['norm']}, {row['eps']:.4g} ({row['eps'] * 255:.4g}/255)",
            f"{100 * row['clean_accuracy']:.2f}",
            *("-" if value is None else f"{100 * value:.2f}" for value in after),
            f"{100 * row['robust_accuracy']:.2f} +- {100 * row['std_over_seeds']:.2f}",
            f"{100 * row['worst_over_seeds']:.2f}",
            " + ".join(f"{value:.0f}" for value in row["seconds"].values()),
            f"{row['images_per_second']:g}",
            str(row["disagreements"]),
            flags(row["masking"]),
        ]
        lines.append(" | ".join(cells))
    table = "\n".join(f"| {line} |" for line in lines)
    members = f"AutoAttack {result['version']}" if not result["quick"] else "A smoke test"
    return (
        f"{members}, {result['seeds']} seeds from {result['seed']}; accuracy after each attack and "
        f"all before it; robust: mean and standard deviation over seeds; worst: no seed breaks the "
        f"image; seconds of each attack with compilation, {result['hardware']}.\n\n{table}\n"
    )


def flags(masking: dict[str, Any]) -> str:
    """The findings that cast doubt on the figure; what merely informs is in the JSON file."""
    names = [
        f"{finding['name']} ({finding['severity']})"
        for finding in masking["findings"]
        if finding["severity"] != "information"
    ]
    return ", ".join(dict.fromkeys(names)) or "none"


if __name__ == "__main__":
    tyro.cli(Experiment).run()
