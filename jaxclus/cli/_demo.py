"""`jaxclus demo`."""

import dataclasses
import time
from pathlib import Path

from jaxclus import clustering, evaluation, report, runs, zoo
from jaxclus.cli._arguments import Number
from jaxclus.cli._attack import Attack
from jaxclus.cli._linearize import Linearize
from jaxclus.cli._report import Report
from jaxclus.cli._train import Train
from jaxclus.training import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Demo:
    """Show the clustering effect in the networks that ship, then train, attack, compare two more.

    The first half loads the networks of `jaxclus zoo` and takes their linear sub-networks apart:
    seconds, no data, no training. The second trains a standard and a robust classifier, attacks
    and linearises them and writes a report: a minute or two on two CPU cores, and no download.

    Try:
      jaxclus demo
      jaxclus demo --dataset fashion_mnist --eps 0.1 --num-images 10000
    """

    dataset: str = "digits"
    """Data set to train on."""
    model: str = "cnn"
    """Architecture."""
    eps: Number = 0.2
    """Linf radius of the adversarial training; the attacks sweep around it."""
    epochs: int = 30
    """Passes over the training set."""
    num_images: int | None = None
    """Train on the first so many images only."""
    output: Path = Path("runs/demo")
    """Directory for the two runs and the report."""

    def run(self) -> None:
        """Looks at the zoo, then runs the five commands one after the other, and names each."""
        begin = time.perf_counter()
        self._step("clustering effect of the networks that ship with the library")
        clustering_of_the_zoo(self.output)
        config = TrainingConfig(epochs=self.epochs, batch_size=64, learning_rate=0.05)
        paths = []
        standard = Train(
            dataset=self.dataset, model=self.model, training=config, num_images=self.num_images,
            output=self.output,
        )  # fmt: skip
        robust = dataclasses.replace(standard, method="pgd", eps=self.eps, attack_steps=7)
        for train in (standard, robust):
            self._step(f"training: {train.method}")
            train.run()
            paths.append(train.directory(0))
        for path in paths:
            self._step(f"attacking: {path.name}")
            sweep = tuple(round(self.eps * factor, 6) for factor in (0.25, 0.5, 1.0, 1.5, 2.0))
            Attack(path, eps=sweep, num_images=1000).run()
            self._step(f"linear sub-network: {path.name}")
            Linearize(path).run()
        self._step("report")
        Report(tuple(paths), self.output / "report").run()
        print(f"done in {time.perf_counter() - begin:.0f} s; open the page in a browser")

    @staticmethod
    def _step(text: str) -> None:
        print(f"\n== {text}", flush=True)


def clustering_of_the_zoo(directory: Path) -> None:
    """Prints how the classes of each shipped network cluster, and draws it for each data set."""
    cards = [zoo.card(name) for name in zoo.list()]
    # Standard networks first; the others are equal to two digits and keep their order.
    cards.sort(key=lambda card: -round(card.figures.clean_accuracy, 2))
    print(f"{'network':34s} {'clean':>6s} {'attacked':>9s} {'eps':>7s} {'score':>6s} {'Rand':>5s}")
    for dataset in dict.fromkeys(card.dataset for card in cards):
        matrices = {}
        for card in (card for card in cards if card.dataset == dataset):
            shape = card.model["input_shape"]
            matrix = evaluation.implicit_correlation(zoo.load(card.path), shape)
            score = clustering.clustering_score(matrix, card.groups)
            matrices[card.name.removeprefix(f"{dataset}-")] = matrix
            print(
                f"{card.name:34s} {card.figures.clean_accuracy:6.1%} "
                f"{card.figures.autoattack_accuracy:9.1%} {card.eps:7.4f} {score.difference:6.2f} "
                f"{score.adjusted_rand:5.2f}"
            )
        figure = report.correlation_panels(matrices, card.class_names, card.groups)
        path = directory / f"zoo-{dataset}.png"
        with runs.atomic_file(path) as file:
            figure.savefig(file, format="png", bbox_inches="tight")
        print(f"  {card.note}; written: {path}")
    attacked = cards[0].figures.attacked_images
    print(
        f"attacked: AutoAttack, {cards[0].norm}, radius eps, on the first {attacked} test images,\n"
        "from the model cards (`jaxclus zoo`); score: correlation of class weights in the linear\n"
        "sub-network, within groups of classes minus between them; Rand: adjusted Rand index of\n"
        "the tree against the groups"
    )
