"""Attacks: `attack(key, model, x, y)` gives adversarial images, `attack.run(...)` the details."""

from jaxclus.attacks._apgd import APGD, TargetedAPGD
from jaxclus.attacks._auto_attack import AutoAttack
from jaxclus.attacks._base import Attack, AttackResult, Queries, bind
from jaxclus.attacks._deepfool import DeepFool
from jaxclus.attacks._fab import FAB, TargetedFAB
from jaxclus.attacks._fgsm import FGSM
from jaxclus.attacks._lint import Finding, lint
from jaxclus.attacks._mi_fgsm import MIFGSM
from jaxclus.attacks._pgd import PGD
from jaxclus.attacks._square import Square
from jaxclus.compose import EOT

#: Attacks by the names of the command line; the protocol test runs over all of them.
ATTACKS: dict[str, type[Attack]] = {
    "fgsm": FGSM,
    "pgd": PGD,
    "mi-fgsm": MIFGSM,
    "apgd": APGD,
    "apgd-t": TargetedAPGD,
    "fab": FAB,
    "fab-t": TargetedFAB,
    "square": Square,
    "deepfool": DeepFool,
    "autoattack": AutoAttack,
}

__all__ = [
    "APGD",
    "ATTACKS",
    "DeepFool",
    "EOT",
    "FAB",
    "FGSM",
    "MIFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Finding",
    "Queries",
    "Square",
    "TargetedAPGD",
    "TargetedFAB",
    "bind",
    "lint",
]
