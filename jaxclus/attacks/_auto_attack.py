"""AutoAttack: an ensemble of attacks without parameters to tune."""

import dataclasses

from jaxclus import _checks, _pytree, compose
from jaxclus._classifier import Classifier
from jaxclus.attacks._apgd import APGD, TargetedAPGD
from jaxclus.attacks._base import SteppedAttack
from jaxclus.attacks._ensemble import InTurn
from jaxclus.attacks._fab import FAB, TargetedFAB
from jaxclus.attacks._square import Square
from jaxclus.threat import L1, Threat

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}


def _member(name: str, threat: Threat, version: str) -> SteppedAttack:
    """The attack of a name with the settings it has in a version, in "custom" as in "standard"."""
    standard_l1 = version in ("standard", "custom") and isinstance(threat, L1)
    many = 5 if version == "plus" or standard_l1 else 1
    if name == "apgd-ce":
        return APGD(threat, restarts=many)
    if name == "apgd-dlr":
        return APGD(threat, loss="dlr", restarts=many)
    if name == "apgd-t":
        return TargetedAPGD(threat, targets=5 if standard_l1 else 9)
    if name == "fab":
        return FAB(threat.name, threat, restarts=5 if version == "plus" else 1)
    if name == "fab-t":
        return TargetedFAB(threat.name, threat)
    return Square(threat)


def _lacks(attack: SteppedAttack, classes: int) -> str | None:
    """Why so many classes are too few for an attack; None if they are enough."""
    try:
        attack.check_classes(classes)
    except ValueError as error:
        return str(error)
    return None


@_pytree.register
@dataclasses.dataclass(frozen=True)
class AutoAttack(InTurn):
    """Several attacks one after the other, each on the images that all before it left standing.

    - "standard": APGD on the cross-entropy, targeted APGD on the DLR loss (9 targets), targeted FAB
      (9 targets), Square (5,000 queries). In the L1 norm, 5 restarts and 5 targets for APGD.
    - "plus": APGD on the cross-entropy and on the DLR loss with 5 restarts each, FAB with 5
      restarts, Square, targeted APGD, targeted FAB.
    - "rand": APGD on the cross-entropy and on the DLR loss, for a stochastic classifier, given as
      `jc.attacks.EOT(model, samples=20)`, which averages gradients over as many passes as the
      reference does; any other model is refused.
    - "custom": the attacks given, all with this `threat`.

    An image is broken if any member breaks it. Every member starts from the clean image. A member
    that needs more classes than the model has is left out (`skipped` says so). As in the reference
    implementation, the adversarial image of an unbroken one is the clean image itself. APGD in the
    L1 norm searches larger balls first in every version; the reference does so in "standard" alone.

    Attributes:
        threat: the threat model.
        version: "standard", "plus", "rand" or "custom".
        attacks: with "custom", the members: names as above ("apgd-ce", "apgd-dlr", "apgd-t", "fab",
            "fab-t", "square"), with the settings of "standard" (the reference leaves "apgd-ce",
            "apgd-dlr" and "fab" at 5 restarts here), or attacks of the same norm; else empty.

    Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", ICML 2020, arXiv:2003.01690, section 5; settings of the reference
    implementation (fra31/auto-attack, revision a392200).
    """

    threat: Threat
    version: str = dataclasses.field(default="standard", metadata={"static": True})
    attacks: tuple[str | SteppedAttack, ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.one_of("version", self.version, (*VERSIONS, "custom"))
        if (self.version == "custom") != bool(self.attacks):
            raise ValueError(
                '`attacks` must name the members if `version` is "custom", and be empty otherwise, '
                f"got {self.attacks!r} with {self.version!r}"
            )
        names = {name for members in VERSIONS.values() for name in members}
        for member in self.attacks:
            if isinstance(member, str):
                _checks.one_of("attacks", member, names)
            elif not isinstance(member, SteppedAttack):
                raise TypeError(f"`attacks` must be names or attacks, got {member!r}")
            elif member.ball.name != self.threat.name:
                raise ValueError(
                    f"`attacks` must be of the threat's norm {self.threat.name}, got {member!r}"
                )

    def _all(self) -> list[tuple[str, SteppedAttack]]:
        given = self.attacks or VERSIONS[self.version]
        return [
            (given, _member(given, self.threat, self.version))
            if isinstance(given, str)
            else (type(given).__name__, dataclasses.replace(given, threat=self.threat))  # pyright: ignore
            for given in given
        ]

    def check_classes(self, classes: int) -> None:
        if not self.members(classes):
            reasons = "; ".join(self.skipped(classes).values())
            raise ValueError(
                f"`attacks` must hold one that {classes} classes are enough for: {reasons}"
            )

    def check_model(self, model: Classifier) -> None:
        if self.version == "rand" and not isinstance(model, compose.EOT):
            raise ValueError(
                '`model` must be a jc.attacks.EOT(model, samples=20) for the version "rand", got '
                f'{type(model).__name__}; a deterministic one is attacked with "standard"'
            )

    def members(self, classes: int) -> list[tuple[str, SteppedAttack]]:
        """The attacks by name, in order, that a model of so many classes can be attacked with."""
        return [(name, attack) for name, attack in self._all() if _lacks(attack, classes) is None]

    def skipped(self, classes: int) -> dict[str, str]:
        """The members that are left out for a model of so many classes, each with the reason."""
        return {
            name: reason
            for name, attack in self._all()
            if (reason := _lacks(attack, classes)) is not None
        }
