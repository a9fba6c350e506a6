"""Trains the networks that ship with the library, measures them, and writes their model cards.

    python -m experiments.zoo
    python -m experiments.zoo --names fashion_mnist-cnn-pgd

For each data set a standard network, a PGD-trained one (Madry et al., arXiv:1706.06083) and one
trained on the same loss with the published clustering regulariser (Bai et al., arXiv:2111.12922,
the CIFAR-10 form, beta 0.1, on the groups in `jaxclus.data`): same initial weights, batches and
number of epochs, last epoch, no selection. They are what a 2-core budget allows, small networks to
look at and to test with, and no state of the art. CIFAR-10 is the JPEG q75 re-encoding.

Writes NAME.safetensors and NAME.json into jaxclus/zoo/models, at most 1.5 MB each. On 2 CPU cores
about 90 minutes for all six, of which CIFAR-10's trainings take most. Interrupted, the same command
goes on. `jaxclus zoo --verify` measures the shipped weights again and compares every figure.
"""

import dataclasses

from jaxclus.training import TrainingConfig


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
}
METHODS = ("standard", "pgd", "pgd_clustering")
NAMES = tuple(f"{data}-{recipe.model}-{m}" for data, recipe in RECIPES.items() for m in METHODS)
