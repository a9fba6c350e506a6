"""What an evaluation found, and its JSON form."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxclus import runs
from jaxclus.attacks import Attack


@dataclasses.dataclass(frozen=True, eq=False)
class MemberResult:
    """Verdicts of one attack of an ensemble, on the images that those before it left standing.

    Attributes:
        name: its name in the ensemble.
        attack: its class and settings.
        attacked: number of images that it attacked.
        robust: whether each image is classified correctly after it and all before it, bool [n].
        seconds: wall time, with compilation, over all sessions.
        forward: forward passes, summed over the images.
        gradient: gradient passes, summed over the images.
    """

    name: str
    attack: str
    attacked: int
    robust: np.ndarray
    seconds: float
    forward: int
    gradient: int

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return dataclasses.asdict(self) | {
            "robust": as_digits(self.robust),
            "robust_accuracy": float(self.robust.mean()),
            "seconds": round(self.seconds, 3),
            "images_per_second": _rate(self.attacked, self.seconds),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "MemberResult":
        """The result that `to_json` gave as `values`."""
        fields: dict[str, Any] = {
            field.name: values[field.name] for field in dataclasses.fields(cls)
        }
        fields["robust"] = from_digits(values["robust"])
        return cls(**fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Robustness:
    """Verdicts of one attack, or ensemble of attacks, on one data set of n images.

    Attributes:
        attack: the attack with all its settings.
        dataset: name of the data set.
        split: name of its split.
        seed: the key's data.
        clean: whether each clean image is classified correctly, bool [n].
        robust: whether each image still is under attack, bool [n]; never where `clean` is not.
        norms: norm of each perturbation, float32 [n]; 0 for images that were not attacked.
        low: smallest pixel of all adversarial images.
        high: largest pixel of all adversarial images.
        members: the verdicts after each attack of the ensemble; one for a single attack.
        skipped: members left out for lack of classes, each with the reason.
        disagreements: number of adversarial images whose prediction is right in batches of
            `microbatch` and wrong in batches of half that size, or the other way round.
        microbatch: images in one physical batch on each device.
        num_devices: number of devices.
        passes: passes of the model behind each verdict, more than 1 for a stochastic one.
        samples: passes of the model behind each gradient, more than 1 for an EOT.
        adversarial: the adversarial images, float32 [n, h, w, c]: for an image that was not broken
            the best candidate of a single attack, and the image itself for an ensemble.
    """

    attack: Attack
    dataset: str
    split: str
    seed: tuple[int, ...]
    clean: np.ndarray
    robust: np.ndarray
    norms: np.ndarray
    low: float
    high: float
    members: tuple[MemberResult, ...]
    skipped: Mapping[str, str]
    disagreements: int
    microbatch: int
    num_devices: int
    passes: int
    samples: int
    adversarial: np.ndarray = dataclasses.field(repr=False)

    @property
    def clean_accuracy(self) -> float:
        """Share of images classified correctly without attack."""
        return float(self.clean.mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of images classified correctly without and under attack."""
        return float(self.robust.mean())

    @property
    def seconds(self) -> float:
        """Wall time of all attacks, with compilation, over all sessions."""
        return sum(member.seconds for member in self.members)

    def to_json(self) -> dict[str, Any]:
        """All of it but the images as JSON values, the verdicts as strings of 0 and 1.

        "images_per_second" counts the images that were attacked, those that `clean` holds.
        """
        eps = float(self.attack.ball.eps)
        return {
            "attack": describe(self.attack),
            "norm": self.attack.ball.name,
            "eps": eps,
            "eps_255": eps * 255,
            "dataset": self.dataset,
            "split": self.split,
            "num_images": len(self.clean),
            "seed": list(self.seed),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "largest_norm": float(self.norms.max()),
            "range": [self.low, self.high],
            "disagreements": self.disagreements,
            "microbatch": self.microbatch,
            "num_devices": self.num_devices,
            "passes": self.passes,
            "samples": self.samples,
            "seconds": round(self.seconds, 3),
            "images_per_second": _rate(int(self.clean.sum()), self.seconds),
            "members": [member.to_json() for member in self.members],
            "skipped": dict(self.skipped),
            "clean": as_digits(self.clean),
            "robust": as_digits(self.robust),
            **runs.environment(),
        }


@dataclasses.dataclass(frozen=True)
class Spread:
    """Robust accuracy over several keys.

    Attributes:
        mean: mean over the keys.
        std: standard deviation over the keys (n - 1), 0 for one.
        worst: share of images that no key breaks.
    """

    mean: float
    std: float
    worst: float


def spread(results: Sequence[Robustness]) -> Spread:
    """Mean and spread of the robust accuracies of `robustness_over_seeds`.

    Args:
        results: at least one, on the same images.
    """
    if not results:
        raise ValueError("`results` must hold at least one evaluation, got none")
    accuracies = [result.robust_accuracy for result in results]
    return Spread(
        mean=float(np.mean(accuracies)),
        std=float(np.std(accuracies, ddof=1)) if len(results) > 1 else 0.0,
        worst=float(np.all([result.robust for result in results], axis=0).mean()),
    )


def describe(attack: Attack) -> str:
    """The attack's name and settings but for the threat model, as "PGD(steps=20, restarts=1)"."""
    fields = (field.name for field in dataclasses.fields(attack) if field.name != "threat")  # pyright: ignore
    settings = ((name, getattr(attack, name)) for name in fields)
    given = ((name, value) for name, value in settings if value is not None and str(value) != "()")
    shown = (f"{name}={_shown(value)}" for name, value in given)
    return f"{type(attack).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    """A callable by its name: its repr holds an address, which another run does not have."""
    if isinstance(value, tuple):
        return "+".join(_shown(entry) for entry in value)
    if isinstance(value, Attack):
        return describe(value)
    if isinstance(value, (str, int, float, bool)) or not jax.tree.leaves(value):
        return str(value)
    return getattr(value, "__name__", type(value).__name__)  # a model by its class


def as_digits(verdicts: np.ndarray) -> str:
    """Verdicts, bool [n], as a string of 0 and 1."""
    return "".join(map(str, verdicts.astype(int)))


def from_digits(digits: str) -> np.ndarray:
    """The verdicts of `as_digits`."""
    return np.array([digit == "1" for digit in digits], bool)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 1) if seconds > 0 else 0.0
