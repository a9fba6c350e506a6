"""The networks that ship with the library, and what is known of each."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from jaxclus import _checks, runs
from jaxclus.data import Groups

DIRECTORY = Path(__file__).parent / "models"


@dataclasses.dataclass(frozen=True)
class Figures:
    """What `measure` found on a test set, with the same settings for every network.

    Attributes:
        clean_accuracy: on all images.
        clean_images: their number.
        attacked_images: the first so many images are attacked.
        pgd_accuracy: robust accuracy under PGD, 20 steps, 1 restart, cross-entropy, seed 0.
        autoattack_accuracy: robust accuracy under AutoAttack "standard", seed 0.
        pgd_verdicts: 1 for each attacked image that is classified correctly after it, else 0.
        autoattack_verdicts: the same under AutoAttack.
        within_minus_between: clustering score of the test set's groups in the linear sub-network
            without BatchNorm, rounded to 3 decimals: rounding of float32 seldom shows, but may
            turn the last one.
        adjusted_rand: adjusted Rand index of the tree's cut against the groups, rounded likewise.
    """

    clean_accuracy: float
    clean_images: int
    attacked_images: int
    pgd_accuracy: float
    autoattack_accuracy: float
    pgd_verdicts: str
    autoattack_verdicts: str
    within_minus_between: float
    adjusted_rand: float

    def first(self, num_images: int) -> "Figures":
        """The figures as they are for the first so many attacked images alone.

        Args:
            num_images: in [1, attacked_images].
        """
        _checks.within("num_images", num_images, 1, self.attacked_images)
        pgd, ensemble = (
            digits[:num_images] for digits in (self.pgd_verdicts, self.autoattack_verdicts)
        )
        return dataclasses.replace(
            self,
            attacked_images=num_images,
            pgd_accuracy=pgd.count("1") / num_images,
            autoattack_accuracy=ensemble.count("1") / num_images,
            pgd_verdicts=pgd,
            autoattack_verdicts=ensemble,
        )


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is known of a network of the zoo.

    Attributes:
        name: its name, DATASET-MODEL-METHOD.
        dataset: the name under which `jc.data.load` finds the data.
        note: what the data are.
        class_names: names of the k classes.
        groups: named groups of the classes, those that the clustering is scored against.
        train_fingerprint: `Dataset.fingerprint` of the images it was trained on.
        training_images: how many they are.
        augmentation: of these images, in every step.
        test_fingerprint: of the images that the figures were measured on.
        model: its `ModelSpec` as JSON values.
        objective: what was minimised.
        training: the `TrainingConfig`.
        seed: of initial weights, data order and attacks in training.
        norm: norm of the threat model of training and figures.
        eps: its radius on the pixel scale.
        figures: accuracies and clustering score.
        sha256: of the file of weights, as hex digits.
        training_minutes: time spent on training steps.
        environment: versions, hardware and command of the figures.
    """

    name: str
    dataset: str
    note: str
    class_names: tuple[str, ...]
    groups: Groups
    train_fingerprint: str
    training_images: int
    augmentation: str
    test_fingerprint: str
    model: dict[str, Any]
    objective: str
    training: dict[str, Any]
    seed: int
    norm: str
    eps: float
    figures: Figures
    sha256: str
    training_minutes: float
    environment: dict[str, Any]

    @property
    def path(self) -> Path:
        """The file of weights."""
        return DIRECTORY / f"{self.name}.safetensors"


def names() -> list[str]:
    """The names of the networks that ship with the library: `jc.zoo.list()`."""
    return sorted(path.stem for path in DIRECTORY.glob("*.json"))


def card(name: str) -> ModelCard:
    """The model card of a network of the zoo.

    Args:
        name: one of `jc.zoo.list()`.

    Raises:
        ValueError: for another name; lists those there are.
    """
    if name not in names():
        raise ValueError(f"`name` must be one of {', '.join(names())}; got {name!r}")
    values = runs.read_json(DIRECTORY / f"{name}.json")
    return ModelCard(
        **values
        | {
            "figures": Figures(**values["figures"]),
            "class_names": tuple(values["class_names"]),
            "groups": tuple((group, tuple(members)) for group, members in values["groups"]),
        }
    )


def checked_path(name: str) -> Path:
    """The file of a network's weights; raises ValueError if it is not the one on its card."""
    found = card(name)
    digest = sha256(found.path)
    if digest != found.sha256:
        raise ValueError(
            f"{found.path} must have the SHA-256 {found.sha256} of its model card, got {digest}: "
            "the file was changed; install the library again"
        )
    return found.path


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
