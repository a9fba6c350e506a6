"""Trains the networks that ship with the library, measures them, and writes their model cards.

    python -m experiments.zoo
    python -m experiments.zoo --names fashion_mnist-cnn-pgd
    python -m experiments.zoo --names digits-cnn-pgd_clustering --num-images 16 --output runs/zoo

For each data set a standard network, a PGD-trained one (Madry et al., arXiv:1706.06083) and one
trained on the same loss with the published clustering regulariser (Bai et al., arXiv:2111.12922,
the CIFAR-10 form, beta 0.1, on the groups in `jaxclus.data`): same initial weights, batches and
number of epochs, last epoch, no selection. They are what a 2-core budget allows, small networks to
look at and to test with, and no state of the art. CIFAR-10 is the JPEG q75 re-encoding.

Writes NAME.safetensors and NAME.json into jaxclus/zoo/models, at most 1.5 MB each. On 2 CPU cores
99 minutes of training for all six, by their cards, and then AutoAttack. Interrupted, the same
command goes on. `jaxclus zoo --verify` measures the shipped weights again and compares every
figure. Networks on scikit-learn's digits do not ship: they show in seconds that all of this works.
"""

import dataclasses
import hashlib
from pathlib import Path

import jax
import tyro

import jaxclus as jc
from experiments.clustering_trials import seconds
from jaxclus import runs
from jaxclus.training import TrainingConfig, objectives


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the networks of a data set are trained."""

    model: str
    eps: float
    attack_steps: int
    config: TrainingConfig


RECIPES = {
    "fashion_mnist": Recipe(
        "cnn", 0.1, 7, TrainingConfig(epochs=15, weight_decay=5e-4, schedule="cyclic")
    ),
    "cifar10": Recipe(
        "resnet8", 8 / 255, 5, TrainingConfig(epochs=8, weight_decay=5e-4, schedule="cyclic")
    ),
    "digits": Recipe(
        "cnn", 0.2, 2, TrainingConfig(epochs=2, batch_size=64, learning_rate=0.05, log_every=1)
    ),
}
METHODS = ("standard", "pgd", "pgd_clustering")
NAMES = tuple(f"{data}-{recipe.model}-{m}" for data, recipe in RECIPES.items() for m in METHODS)
SHIPPED = tuple(name for name in NAMES if not name.startswith("digits"))
NOTES = {
    "fashion_mnist": "Fashion-MNIST, the official images",
    "cifar10": "CIFAR-10 re-encoded as JPEG q75: not to be compared with figures on CIFAR-10",
    "digits": "scikit-learn's digits, trained for moments",
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train, measure and export the networks that ship with the library."""

    names: tuple[str, ...] = SHIPPED
    """Networks, as DATASET-MODEL-METHOD; default those that ship."""
    num_images: int = 500
    """Images that are attacked for the model card, the first of the test set."""
    seed: int = 0
    """Seed of initial weights, data order and attacks in training."""
    output: Path = Path("jaxclus/zoo/models")
    """Directory of the weights and cards."""
    work: Path = Path("runs/zoo")
    """Directory for checkpoints."""

    def __post_init__(self) -> None:
        for name in self.names:  # before an hour goes into those ahead of it
            if name not in NAMES:
                raise ValueError(f"`names` must be some of {', '.join(NAMES)}; got {name!r}")

    def run(self) -> None:
        """Makes the networks one after the other, and prints their figures."""
        for name in self.names:
            figures = self._make(name).figures
            print(
                f"{name}: clean {figures.clean_accuracy:.4f}, PGD {figures.pgd_accuracy:.3f}, "
                f"AutoAttack {figures.autoattack_accuracy:.3f}, within - between "
                f"{figures.within_minus_between:.3f}",
                flush=True,
            )

    def _make(self, name: str) -> jc.zoo.ModelCard:
        dataset, _, method = name.split("-")
        recipe = RECIPES[dataset]
        train, test = jc.data.load(dataset, "train"), jc.data.load(dataset, "test")
        init, fit = jax.random.split(jax.random.key(self.seed))
        model = jc.models.create(recipe.model, train.num_classes, train.input_shape, init)
        goal = objective(method, recipe, train)
        run = jc.training.fit(fit, model, train, goal, recipe.config, directory=self.work / name)
        ball = jc.Linf(recipe.eps)
        # Weights come into the library together with their card, or not at all.
        exported = jc.export(run.model, self.work / f"{name}.safetensors")
        weights = exported.read_bytes()
        card = jc.zoo.ModelCard(
            name=name,
            dataset=dataset,
            note=NOTES[dataset],
            class_names=test.class_names,
            groups=test.groups,
            train_fingerprint=train.fingerprint,
            training_images=len(train),
            augmentation=repr(jc.data.default_augmentation(dataset)),
            test_fingerprint=test.fingerprint,
            model=run.model.spec.to_json(),
            objective=repr(goal),
            training=dataclasses.asdict(recipe.config),
            seed=self.seed,
            norm=ball.name,
            eps=ball.eps,
            figures=jc.zoo.measure(jc.load(exported), test, ball, self.num_images),
            sha256=hashlib.sha256(weights).hexdigest(),
            training_minutes=round(seconds(run, recipe.config.batch_size) / 60, 1),
            environment=runs.environment()
            | {"command": f"python -m experiments.zoo --names {name}"},
        )
        runs.write_atomic(self.output / f"{name}.safetensors", weights)
        runs.write_json(self.output / f"{name}.json", dataclasses.asdict(card))
        return card


def objective(method: str, recipe: Recipe, data: jc.data.Dataset) -> objectives.Objective:
    """What a network of this method minimises."""
    if method == "standard":
        return objectives.Standard()
    attack = jc.attacks.PGD(jc.Linf(recipe.eps), steps=recipe.attack_steps)
    adversarial = objectives.Adversarial(attack)
    if method == "pgd":
        return adversarial
    return objectives.LogitClustering(adversarial, data.groups, beta=0.1)


if __name__ == "__main__":
    tyro.cli(Experiment).run()
