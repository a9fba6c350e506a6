"""Attacks: `attack(key, model, x, y)` gives adversarial images, `attack.run(...)` the details."""

from jaxclus.attacks._apgd import APGD, TargetedAPGD
from jaxclus.attacks._auto_attack import AutoAttack
from jaxclus.attacks._base import Attack, AttackResult, Queries, bind
from jaxclus.attacks._carlini_wagner import CarliniWagner
from jaxclus.attacks._deepfool import DeepFool
from jaxclus.attacks._ensemble import Ensemble
from jaxclus.attacks._fab import FAB, TargetedFAB
from jaxclus.attacks._fgsm import FGSM
from jaxclus.attacks._guided import Guided
from jaxclus.attacks._hop_skip_jump import HopSkipJump
from jaxclus.attacks._lint import Finding, lint
from jaxclus.attacks._mi_fgsm import MIFGSM
from jaxclus.attacks._multi_targeted import MultiTargetedPGD
from jaxclus.attacks._pgd import PGD
from jaxclus.attacks._square import Square
from jaxclus.attacks._transfer import Transfer
from jaxclus.attacks.adaptive import BPDA, DistanceLogits, Temperature
from jaxclus.compose import EOT

#: Attacks by the names of the command line; the protocol test runs over all of them.
ATTACKS: dict[str, type[Attack]] = {
    "fgsm": FGSM,
    "pgd": PGD,
    "mi-fgsm": MIFGSM,
    "mt-pgd": MultiTargetedPGD,
    "apgd": APGD,
    "apgd-t": TargetedAPGD,
    "fab": FAB,
    "fab-t": TargetedFAB,
    "square": Square,
    "autoattack": AutoAttack,
    "carlini-wagner": CarliniWagner,
    "deepfool": DeepFool,
    "hop-skip-jump": HopSkipJump,
}

__all__ = [
    "APGD",
    "ATTACKS",
    "BPDA",
    "CarliniWagner",
    "DeepFool",
    "DistanceLogits",
    "EOT",
    "Ensemble",
    "FAB",
    "FGSM",
    "Guided",
    "HopSkipJump",
    "MIFGSM",
    "MultiTargetedPGD",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Finding",
    "Queries",
    "Square",
    "TargetedAPGD",
    "TargetedFAB",
    "Temperature",
    "Transfer",
    "bind",
    "lint",
]
