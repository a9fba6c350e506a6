"""The attacks that are made for classifiers by prototypes or clusters, by what they attack."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxclus._classifier import Classifier
from jaxclus.attacks import (
    APGD,
    PGD,
    Attack,
    AutoAttack,
    Ensemble,
    Guided,
    HopSkipJump,
    MultiTargetedPGD,
    Square,
    TargetedAPGD,
)
from jaxclus.attacks._base import SteppedAttack
from jaxclus.attacks._noise import RandomNoise
from jaxclus.attacks.adaptive import DistanceLogits
from jaxclus.clustr import ClusterClassifier
from jaxclus.losses import Loss
from jaxclus.prototypes import PrototypeHead
from jaxclus.threat import Threat

#: The items, in their order.
ATTACKS = (
    "noise", "own-loss", "margin", "prototypes", "autoattack", "gradient-free", "transfer",
)  # fmt: skip

_DISTANCES = ("l2", "cosine", "l8")
_NO_HEAD = "`head` is not given, and `model` does not end in one"
_NO_EMBEDDING = "`embed` is not given, and `model` does not end in a prototype or cluster head"


def centres(head: PrototypeHead | ClusterClassifier) -> jax.Array:
    """What the head measures embeddings by [m, d]."""
    return head.prototypes if isinstance(head, PrototypeHead) else head.centres


# Attacks by name, and what is left out, with the reasons.
_Planned = tuple[Mapping[str, SteppedAttack], dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The attacks of each item; `linear_head` fits one on an embedding."""

    threat: Threat
    steps: int
    restarts: int
    own_loss: Loss | None
    embed: Any
    head: Any
    linear_head: Callable[[Any], Classifier]
    surrogates: Mapping[str, Classifier]

    def attack(self, item: str) -> tuple[Attack | None, dict[str, str]]:
        """The item's attack, if it can run, and what is left out of it, with the reasons."""
        if item == "autoattack":
            return AutoAttack(self.threat), {}
        plans = {
            "noise": self._noise,
            "own-loss": self._own_loss,
            "margin": self._margin,
            "prototypes": self._prototypes,
            "gradient-free": self._gradient_free,
            "transfer": self._transfer,
        }
        attacks, missing = plans[item]()
        names, members = tuple(attacks), tuple(attacks.values())
        return Ensemble(self.threat, members, names) if members else None, missing

    def _noise(self) -> _Planned:
        return {"noise": RandomNoise(self.threat)}, {}

    def _own_loss(self) -> _Planned:
        if self.own_loss is None:
            return {}, {"own-loss": "`own_loss` is not given"}
        attacks = {
            "PGD": PGD(self.threat, self.steps, restarts=self.restarts, loss=self.own_loss),
            "APGD": APGD(self.threat, self.own_loss, self.steps, self.restarts),
        }
        if self.embed is None:
            return attacks, {}
        return {name: Guided(attack, self.embed) for name, attack in attacks.items()}, {}

    def _margin(self) -> _Planned:
        untargeted = PGD(self.threat, self.steps, restarts=self.restarts, loss="margin")
        return {"PGD": untargeted, "targeted PGD": MultiTargetedPGD(self.threat, self.steps)}, {}

    def _prototypes(self) -> _Planned:
        if self.embed is None or self.head is None:
            return {}, {"prototypes": _NO_EMBEDDING if self.embed is None else _NO_HEAD}
        classes = getattr(self.head, "centre_classes", None)  # of prototypes one each
        return {
            f"{loss}, {rule}": Guided(
                TargetedAPGD(self.threat, loss, self.steps),
                DistanceLogits(self.embed, centres(self.head), rule, classes),
            )
            for rule in _DISTANCES
            for loss in ("target", "difference")
        }, {}

    def _gradient_free(self) -> _Planned:
        norm, square = self.threat.name, {"Square": Square(self.threat)}
        if norm not in HopSkipJump.NORMS:
            return square, {"gradient-free: HopSkipJump": f"it is not made for {norm}"}
        return square | {"HopSkipJump": HopSkipJump(norm, self.threat)}, {}

    def _transfer(self) -> _Planned:
        untargeted = APGD(self.threat, steps=self.steps)
        targeted = TargetedAPGD(self.threat, "difference", self.steps)
        attacks, missing = {}, {}
        if self.embed is None:
            missing["transfer: linear head"] = _NO_EMBEDDING
        else:
            linear = self.linear_head(self.embed)
            attacks["linear head, APGD"] = Guided(untargeted, linear)
            attacks["linear head, targeted APGD"] = Guided(targeted, linear)
        if not self.surrogates:
            missing["transfer: surrogates"] = "none is given"
        for name, source in self.surrogates.items():
            attacks[f"{name}, APGD"] = Guided(untargeted, source)
            attacks[f"{name}, targeted APGD"] = Guided(targeted, source)
        return attacks, missing
