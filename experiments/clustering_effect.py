"""Does the linear sub-network of robust nets cluster by meaning more than that of standard nets?

    python -m experiments.clustering_effect --dataset fashion_mnist
    python -m experiments.clustering_effect --dataset cifar10
    python -m experiments.clustering_effect --dataset digits --quick

Bai et al., "Clustering Effect of (Linearized) Adversarial Robust Models", NeurIPS 2021,
arXiv:2111.12922. For every seed a standard and a PGD-trained network start from the same weights
and see the same batches; both are linearised, with and without BatchNorm, and their classes'
correlations scored against groups that were fixed before any result was seen (`jaxclus.data`).

The score named in advance is `difference`, mean correlation within groups minus between, of the
paper's variant, without BatchNorm; the other scores (adjusted Rand index, silhouette, cophenetic
correlation) and the variant with BatchNorm are reported beside it. Each network's score has an
exact p-value of its own, over all labellings of its classes with groups of these sizes. Seeds are
paired: the p-value is exact over all 2^n sign flips of the differences robust - standard, one
sided, so that n seeds give at best 1 / 2^n. CIFAR-10 is the JPEG q75 re-encoding of ../shared.

Results: experiments/results/clustering_effect-DATASET.json. On 2 CPU cores: Fashion-MNIST (CNN, 6
seeds) and CIFAR-10 (ResNet-8, 6 seeds), each under 2 hours; the file says how long it took. On an
accelerator CIFAR-10 takes ResNet-18 and 3 seeds instead. Interrupted, the same command goes on.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import scipy.stats
import tyro

import jaxclus as jc
from jaxclus import runs
from jaxclus.training import TrainingConfig, objectives

# Fingerprint of the CIFAR-10 test set of TFDS 3.0.2 re-encoded as JPEG of quality 75.
JPEG_Q75 = "7646112d96e33c80d5d6efb5aa8eaa6c6842eed8c73497f60e522f45ca730872"
SCORES = ("difference", "adjusted_rand", "silhouette", "cophenetic")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained on a data set."""

    model: str
    eps: float
    seeds: int
    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.1
    attack_steps: int = 7
    num_images: int | None = None
    test_images: int = 1000


SETTINGS = {
    "fashion_mnist": Setting("cnn", 0.1, seeds=6, epochs=5),
    "cifar10": Setting("resnet8", 8 / 255, seeds=6, epochs=2, attack_steps=3),
    "cifar10 on an accelerator": Setting("resnet18", 8 / 255, seeds=3, epochs=30, attack_steps=10),
    "digits": Setting("cnn", 0.2, seeds=6, epochs=30, batch_size=64, learning_rate=0.05),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Compare the clustering effect of standard and robust networks."""

    dataset: Literal["fashion_mnist", "cifar10", "digits"]
    """Data set."""
    quick: bool = False
    """Two seeds, two epochs, 500 images: a smoke test, no result."""
    output: Path = Path("experiments/results")
    """Directory for the results file."""
    work: Path = Path("runs/clustering_effect")
    """Directory for checkpoints."""

    def run(self) -> dict[str, Any]:
        """Trains, evaluates, prints the table, and writes the results file."""
        setting = self.setting()
        train, test = jc.data.load(self.dataset, "train"), jc.data.load(self.dataset, "test")
        if setting.num_images is not None:
            train = train.take(setting.num_images)
        rows = [
            self._evaluate(method, seed, setting, train, test)
            for seed in range(setting.seeds)
            for method in ("standard", "robust")
        ]
        result = {
            "dataset": self.dataset + (" (JPEG q75)" if test.fingerprint == JPEG_Q75 else ""),
            "fingerprints": {"train": train.fingerprint, "test": test.fingerprint},
            "train_images": len(train),
            "groups": [[name, list(members)] for name, members in test.groups],
            "setting": dataclasses.asdict(setting),
            "quick": self.quick,
            "comparison": compare(rows),
            "accuracy": accuracies(rows),
            "runs": rows,
            "training_minutes": round(sum(row["training_seconds"] for row in rows) / 60, 1),
            **runs.environment(),
        }
        name = f"clustering_effect-{self.dataset}{'-quick' if self.quick else ''}.json"
        runs.write_json(self.output / name, result)
        print(table(result))
        print(f"written: {self.output / name}")
        return result

    def setting(self) -> Setting:
        """The data set's setting, on this hardware."""
        accelerated = self.dataset == "cifar10" and jax.default_backend() != "cpu"
        setting = SETTINGS[self.dataset + (" on an accelerator" if accelerated else "")]
        if self.quick:
            return dataclasses.replace(
                setting, model="cnn", seeds=2, epochs=2, num_images=500, test_images=100
            )
        return setting

    def _evaluate(
        self,
        method: str,
        seed: int,
        setting: Setting,
        train: jc.data.Dataset,
        test: jc.data.Dataset,
    ) -> dict[str, Any]:
        """One network: trained, attacked, linearised."""
        name = f"{self.dataset}{'-quick' if self.quick else ''}-{setting.model}-{method}-{seed}"
        init, fit, attack_key = jax.random.split(jax.random.key(seed), 3)
        ball = jc.Linf(setting.eps)
        adversary = jc.attacks.PGD(ball, steps=setting.attack_steps)
        objective = objectives.Standard()
        if method == "robust":
            objective = objectives.Adversarial(adversary)
        config = TrainingConfig(
            epochs=setting.epochs,
            batch_size=setting.batch_size,
            learning_rate=setting.learning_rate,
            weight_decay=5e-4,
            schedule="cyclic",
        )
        model = jc.models.create(setting.model, train.num_classes, train.input_shape, init)
        run = jc.training.fit(fit, model, train, objective, config, directory=self.work / name)
        model = run.model
        attack = jc.attacks.PGD(ball, steps=20)
        few = test.take(min(setting.test_images, len(test)))
        robustness = jc.evaluation.robustness(attack_key, model, attack, few)
        effect = jc.evaluation.clustering_effect(model, test)
        return {
            "method": method,
            "seed": seed,
            "training_seconds": seconds(run, setting.batch_size),
            "clean_accuracy": float(jc.evaluation.correct(model, test).mean()),
            "clean_images": len(test),
            "robust_accuracy": robustness.robust_accuracy,
            "robust_images": len(few),
            "attack": f"{attack.threat.name} eps {setting.eps:.4g}, "
            f"{jc.evaluation.describe(attack)}",
            **effect.to_json(test)["variants"],
        }


def seconds(run: jc.training.Run, batch_size: int) -> float:
    """Time spent on training steps, from the log: it survives interruptions."""
    steps = np.diff([0, *(line["step"] for line in run.history)])
    rates = np.array([line["images_per_second"] for line in run.history])
    return round(float((steps * batch_size / rates).sum()), 1)


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Robust against standard by variant and score: mean, spread, paired differences, p-value."""
    found = {}
    for variant in ("with_batch_norm", "without_batch_norm"):
        found[variant] = {}
        for score in SCORES:
            values = {
                method: [r[variant]["score"][score] for r in rows if r["method"] == method]
                for method in ("standard", "robust")
            }
            found[variant][score] = _paired(values["standard"], values["robust"])
    return found


def _paired(standard: list[float | None], robust: list[float | None]) -> dict[str, Any]:
    pairs = [(a, b) for a, b in zip(standard, robust, strict=True) if None not in (a, b)]
    if len(pairs) < 2:
        return {"seeds": len(pairs)}
    before, after = np.array(pairs).T
    # Scores of float32 matrices: differences below 1e-6 are none.
    change = np.round(after - before, 6)
    test = scipy.stats.permutation_test(
        (change,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    return {
        "seeds": len(pairs),
        "standard": [float(before.mean()), float(before.std(ddof=1))],
        "robust": [float(after.mean()), float(after.std(ddof=1))],
        "change": [float(change.mean()), float(change.std(ddof=1))],
        "seeds_with_more": int((change > 0).sum()),
        "p_value": float(test.pvalue),
        "smallest_p": 0.5 ** len(pairs),
    }


def accuracies(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of clean and robust accuracy, by method."""
    found = {}
    for method in ("standard", "robust"):
        for kind in ("clean_accuracy", "robust_accuracy"):
            values = [row[kind] for row in rows if row["method"] == method]
            found[f"{method} {kind}"] = [statistics.mean(values), statistics.stdev(values)]
    return found


def table(result: dict[str, Any]) -> str:
    """The answer as text."""
    lines = [f"{result['dataset']}, {result['setting']['model']}, {result['runs'][0]['attack']}"]
    for name, (mean, spread) in result["accuracy"].items():
        lines.append(f"  {name:28s} {mean:.3f} +- {spread:.3f}")
    for variant, scores in result["comparison"].items():
        lines.append(f"  {variant.replace('_', ' ')}: standard -> robust")
        for score, row in scores.items():
            if "p_value" not in row:
                lines.append(f"    {score:14s} not defined for enough seeds")
                continue
            (a, sa), (b, sb) = row["standard"], row["robust"]
            lines.append(
                f"    {score:14s} {a:7.3f} +- {sa:.3f} -> {b:7.3f} +- {sb:.3f}   more in "
                f"{row['seeds_with_more']} of {row['seeds']} seeds, p = {row['p_value']:.4f} "
                f"(smallest possible {row['smallest_p']:.4f})"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(Experiment).run()
