"""`jaxclus attack`."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from jaxclus import _classifier, attacks, evaluation, models, runs, threat, zoo
from jaxclus.cli._arguments import Number, artefacts, dataset_of
from jaxclus.data import Dataset, to_float


@dataclasses.dataclass(frozen=True)
class Attack:
    """Measure the accuracy of a trained model under attack, at one or several radii.

    Try:
      jaxclus attack runs/digits-cnn-pgd-seed0 --eps 0.05 0.1 0.2
      jaxclus attack runs/cifar10-resnet18-pgd-seed0 --eps 8/255 --steps 20 --restarts 5
      jaxclus attack model.safetensors --dataset mnist --norm l2 --eps 2 --output out
    """

    run_path: tyro.conf.Positional[Path]
    """A run directory of `jaxclus train`, or a .safetensors file."""
    eps: tuple[Number, ...]
    """Radii on the pixel scale [0, 1]."""
    attack: Literal["pgd", "fgsm", "mi-fgsm"] = "pgd"
    """The attack."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the ball."""
    steps: int = 20
    """Gradient steps (pgd, mi-fgsm)."""
    restarts: int = 1
    """Random starts (pgd)."""
    loss: Literal["cross_entropy", "margin"] = "cross_entropy"
    """What the attack maximises."""
    dataset: str | None = None
    """Default: the one the run was trained on."""
    split: str = "test"
    """Split of the data set."""
    num_images: int | None = None
    """Attack the first so many images; default all."""
    examples: int = 8
    """Adversarial images to keep for the report, at the middle radius."""
    seed: int = 0
    """Seed of the attack's randomness."""
    output: Path | None = None
    """Directory for the results; default: the run directory."""

    def run(self) -> None:
        """Attacks, prints a table, and writes attacks/NAME.json and .npz."""
        if not self.eps:
            raise ValueError("`eps` must hold at least one radius, as --eps 4/255 8/255, got none")
        directory = artefacts(self.run_path, self.output) / "attacks"
        attack = self._adversary(threat.create(self.norm, self.eps[0]))
        model = zoo.load(self.run_path)
        images = dataset_of(self.run_path, self.dataset, self.split, self.num_images)
        key = jax.random.key(self.seed)
        found = evaluation.robustness_curve(key, model, attack, images, self.eps)
        path = directory / f"{self.attack}-{self.norm}.json"
        runs.write_json(path, self._record(found, images))
        middle = found[(len(found) - 1) // 2].attack
        examples = self._examples(key, model, middle, images)
        with runs.atomic_file(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, **examples)  # pyright: ignore[reportArgumentType]
        print(
            f"clean accuracy {found[0].clean_accuracy:.4f} on {len(images)} images of {images.name}"
        )
        for result in found:
            eps = float(result.attack.threat.eps)
            print(
                f"robust accuracy {result.robust_accuracy:.4f}  {self.norm} eps {eps:.4g} "
                f"({eps * 255:.4g}/255), {evaluation.describe(result.attack)}, seed {self.seed}"
            )
        print(f"written: {path}")

    def _adversary(self, ball: threat.Threat) -> attacks.Attack:
        if self.attack == "fgsm":
            return attacks.FGSM(ball, loss=self.loss)
        if self.attack == "mi-fgsm":
            return attacks.MIFGSM(ball, steps=self.steps, loss=self.loss)
        return attacks.PGD(ball, steps=self.steps, restarts=self.restarts, loss=self.loss)

    def _record(self, found: list[evaluation.Robustness], images: Dataset) -> dict:
        first = found[0].to_json()
        shared = ("attack", "norm", "split", "num_images", "clean_accuracy")
        return {
            **{name: first[name] for name in shared},
            "dataset": images.name,
            "seed": self.seed,
            "curve": [result.to_json() for result in found],
            **runs.environment(),
        }

    def _examples(
        self, key: jax.Array, model: models.Classifier, attack: attacks.Attack, images: Dataset
    ) -> dict[str, np.ndarray]:
        few = images.take(min(self.examples, len(images)))
        x = to_float(few.images)
        x_adv = attack(key, model, x, few.labels)
        predict = _classifier.logits(model)
        with jax.default_matmul_precision("highest"):  # as in the verdicts
            before, after = predict(x).argmax(axis=1), predict(x_adv).argmax(axis=1)
        return {
            "images": np.asarray(x),
            "adversarial": np.asarray(x_adv),
            "labels": few.labels,
            "predictions": np.asarray(before),
            "adversarial_predictions": np.asarray(after),
            "eps": np.asarray(attack.threat.eps, np.float32),
        }
