"""Certificates and attacks together: certified <= true robust accuracy <= attacked."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxclus import runs
from jaxclus.evaluation._certify import Certificates
from jaxclus.evaluation._result import Robustness, as_digits, describe

# Norms are judged to this, relative to their size.
_NORM_ROUNDING = 1e-5
# Share of the images whose clean verdict may depend on rounding, in batches of another shape.
_DISAGREEING = 1e-3
# Images that a message names.
_NAMED = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Bracket:
    """Bounds of the true robust accuracy on n images, made by `bracket`.

    Attributes:
        certificates: at least one, each of the same images and threat model as `attacked`.
        attacked: what an attack found.

    Raises:
        TypeError, ValueError: as `bracket`.
    """

    certificates: tuple[Certificates, ...]
    attacked: Robustness

    def __post_init__(self) -> None:
        for each in self.certificates:
            _check_same(each, self.attacked)
            _check_no_contradiction(each, self.attacked)

    @property
    def certified(self) -> np.ndarray:
        """Whether any certificate holds for each image, bool [n]."""
        return np.any([each.certified for each in self.certificates], axis=0)

    @property
    def clean_accuracy(self) -> float:
        """Share of images classified correctly without attack."""
        return self.attacked.clean_accuracy

    @property
    def certified_accuracy(self) -> float:
        """Share of images certified, at most the true robust accuracy."""
        return float(self.certified.mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of images that the attack did not break, at least the true robust accuracy."""
        return self.attacked.robust_accuracy

    @property
    def undecided(self) -> float:
        """Share of images that are neither certified nor broken."""
        return float((self.attacked.robust & ~self.certified).mean())

    @property
    def broken(self) -> float:
        """Share of images classified correctly without attack and wrongly under it."""
        return float((self.attacked.clean & ~self.attacked.robust).mean())

    def to_json(self) -> dict[str, Any]:
        """The shares as JSON values, and who is certified and robust as strings of 0 and 1."""
        attacked = self.attacked
        eps = float(attacked.attack.ball.eps)
        return {
            "norm": attacked.attack.ball.name,
            "eps": eps,
            "eps_255": eps * 255,
            "dataset": attacked.dataset,
            "split": attacked.split,
            "num_images": len(attacked.clean),
            "attack": describe(attacked.attack),
            "seed": list(attacked.seed),
            "clean_accuracy": self.clean_accuracy,
            "certified_accuracy": self.certified_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "undecided": self.undecided,
            "broken": self.broken,
            "methods": [
                {"method": each.method, "certified_accuracy": each.certified_accuracy}
                for each in self.certificates
            ],
            "certified": as_digits(self.certified),
            "robust": as_digits(attacked.robust),
            **runs.environment(),
        }


def bracket(certificates: Certificates | Sequence[Certificates], attacked: Robustness) -> Bracket:
    """Bounds of the true robust accuracy: certified <= true <= attacked, image by image.

    An image is certified if any certificate certifies it. None of those may be broken, nor may an
    attack have succeeded at a norm below an image's certified radius: then certificate or attack is
    wrong, and this raises instead of giving figures.

    Args:
        certificates: of `jc.evaluation.certify`, one or several.
        attacked: of `jc.evaluation.robustness`, for the same model, data and threat model.

    Raises:
        TypeError: if an argument is anything else.
        ValueError: if certificates and attack are of other images, norms, radii or models, as
            their clean verdicts tell (they may differ in 0.1 % of the images, and in one); or if
            they contradict each other, with the numbers of the images.
    """
    several = isinstance(certificates, (list, tuple))
    given: tuple[Any, ...] = tuple(certificates) if several else (certificates,)
    if not given or not all(isinstance(each, Certificates) for each in given):
        raise TypeError(
            "`certificates` must be what jc.evaluation.certify gives, one or several, "
            f"got {[type(each).__name__ for each in given]}"
        )
    if not isinstance(attacked, Robustness):
        raise TypeError(
            f"`attacked` must be a jc.evaluation.Robustness, got {type(attacked).__name__}"
        )
    return Bracket(given, attacked)


def _check_same(certificates: Certificates, attacked: Robustness) -> None:
    """Raises unless both are of the same data, threat model and, as far as one sees, model."""
    ball, count = attacked.attack.ball, len(certificates.clean)
    for name, mine, its in (
        ("data set", certificates.dataset, attacked.dataset),
        ("split", certificates.split, attacked.split),
        ("number of images", count, len(attacked.clean)),
        ("norm", certificates.threat.name, ball.name),
        ("eps", float(certificates.threat.eps), float(ball.eps)),
    ):
        if mine != its:
            raise ValueError(f"`attacked` must have the certificates' {name} {mine}, got {its}")
    differing = int((certificates.clean != attacked.clean).sum())
    if differing > max(1, _DISAGREEING * count):
        raise ValueError(
            "`attacked` must have the certificates' clean verdicts but for rounding, but "
            f"{differing} of {count} images differ: they are of other models or images"
        )


def _check_no_contradiction(certificates: Certificates, attacked: Robustness) -> None:
    """Raises if an image is certified and broken, or broken within its certified radius."""
    wrong = certificates.certified & ~attacked.robust
    if certificates.radius is not None:
        norms = attacked.norms.astype(np.float64) * (1 + _NORM_ROUNDING)
        wrong |= attacked.clean & ~attacked.robust & (norms < certificates.radius)
    found = np.flatnonzero(wrong).tolist()
    if found:
        more = ", ..." if len(found) > _NAMED else ""
        raise ValueError(
            f"`attacked` breaks {len(found)} of the images that the {certificates.method} "
            f"certificate says it cannot: numbers {', '.join(map(str, found[:_NAMED]))}{more}. "
            "Certificate or attack is wrong: neither may be published"
        )
