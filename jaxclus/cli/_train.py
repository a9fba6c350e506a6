"""`jaxclus train`."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from jaxclus import attacks, data, models, runs, threat, training
from jaxclus.cli._arguments import Number
from jaxclus.training import TrainingConfig, objectives


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a classifier, plainly or against an adversary.

    A run can be killed at any moment: the same command goes on from its newest checkpoint.

    Try:
      jaxclus train digits
      jaxclus train fashion_mnist --method pgd --eps 0.1 --epochs 5
      jaxclus train cifar10 --model resnet18 --method pgd --eps 8/255 --seeds 0 1 2
    """

    dataset: tyro.conf.Positional[str]
    """A name (`jaxclus data list`), a directory of image folders, or an .npz file."""
    model: str = "cnn"
    """Architecture: cnn, resnet8, resnet20, resnet18, resnet34, resnet50, preact_resnet18,
    wide_resnet_DEPTH_WIDTH, vgg11, vgg13, vgg16, vgg19, densenet121, alexnet."""
    method: Literal["standard", "pgd"] = "standard"
    """Plain training, or training on PGD's adversarial images."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the adversary's ball."""
    eps: Number | None = None
    """Radius of the ball on the pixel scale [0, 1]; needed for pgd."""
    attack_steps: int = 10
    """Gradient steps of the adversary."""
    step_size: Number | None = None
    """Length of its steps; default 2.5 * eps / attack_steps."""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TrainingConfig
    )
    """Optimiser, schedule, bookkeeping."""
    validation: Annotated[float, tyro.conf.arg(metavar="[0, 1)")] = 0.05
    """Share of the training set held out, by class, to select the best epoch; 0 for none."""
    num_images: int | None = None
    """Train on the first so many images only."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initial weights, data order and attacks; each makes a run of its own."""
    output: Path = Path("runs")
    """Directory for the run directories."""
    name: str | None = None
    """Name of the run directories, before the seed; default DATASET-MODEL-METHOD."""
    deterministic: bool = False
    """Bit-identical results on GPUs too, at some cost in speed."""

    def run(self) -> None:
        """Trains one run for each seed; they share one compiled program."""
        if not self.seeds:
            raise ValueError("`seeds` must hold at least one seed, as --seeds 0 1 2, got none")
        if self.deterministic:
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
        train = data.load(self.dataset, "train")
        if self.num_images is not None:
            train = train.take(self.num_images)
        for seed in self.seeds:
            directory = self.directory(seed)
            accuracy = self._train(train, seed, directory)
            print(f"{directory}: {accuracy}")

    def directory(self, seed: int) -> Path:
        """The run directory of a seed."""
        default = f"{Path(self.dataset).stem}-{self.model}-{self.method}"
        return self.output / f"{self.name or default}-seed{seed}"

    def objective(self) -> objectives.Objective:
        """What is minimised."""
        if self.method == "standard":
            return objectives.Standard()
        if self.eps is None:
            raise ValueError("`eps` must be given for --method pgd, as --eps 8/255")
        ball = threat.create(self.norm, self.eps)
        attack = attacks.PGD(ball, steps=self.attack_steps, step_size=self.step_size)
        return objectives.Adversarial(attack)

    def _train(self, train: data.Dataset, seed: int, directory: Path) -> str:
        init, split, fit = jax.random.split(jax.random.key(seed), 3)
        held_out = None
        if self.validation:
            train, held_out = train.holdout(split, self.validation)
        model = models.create(self.model, train.num_classes, train.input_shape, init)
        objective = self.objective()
        record = self._record(train, model, objective, seed)
        # A run that was made with other settings is refused below, and keeps its record.
        if not (directory / "config.json").exists():
            runs.write_json(directory / "config.json", record)
        run = training.fit(
            fit, model, train, objective, self.training, validation=held_out, directory=directory
        )
        runs.write_json(directory / "config.json", record)
        last = next(line for line in reversed(run.history) if "loss" in line)
        shown = [f"training loss {last['loss']:.3f}", f"training accuracy {last['accuracy']:.3f}"]
        if held_out is not None:
            names = ("validation_robust_accuracy", "validation_accuracy")
            lines = [line for line in run.history if names[1] in line]
            # The first of the best: the epoch whose weights `fit` returns.
            best = max(lines, key=lambda line: next(line[n] for n in names if n in line))
            shown.append(f"best epoch {best['epoch']}")
            shown += [f"{n.replace('_', ' ')} {best[n]:.3f}" for n in names[::-1] if n in best]
        return ", ".join(shown)

    def _record(
        self,
        train: data.Dataset,
        model: models.Classifier,
        objective: objectives.Objective,
        seed: int,
    ) -> dict:
        attack = objective.validation_attack()
        adversary = {}
        if attack is not None:
            adversary = {
                "attack": repr(attack),
                "norm": attack.ball.name,
                "eps": float(attack.ball.eps),
            }
        return {
            "name": self.directory(seed).name,
            "dataset": {
                "name": self.dataset,
                "split": "train",
                "num_images": len(train),
                "fingerprint": train.fingerprint,
            },
            "model": model.spec.to_json() if model.spec else {},
            "objective": {"name": self.method, **adversary},
            "training": dataclasses.asdict(self.training) | {"validation": self.validation},
            "seed": seed,
            **runs.environment(),
        }
