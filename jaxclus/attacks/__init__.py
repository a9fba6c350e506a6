"""Attacks: `attack(key, model, x, y)` gives adversarial images, `attack.run(...)` the details."""

from jaxclus.attacks._apgd import APGD, TargetedAPGD
from jaxclus.attacks._base import Attack, AttackResult, Queries, bind
from jaxclus.attacks._fgsm import FGSM
from jaxclus.attacks._mi_fgsm import MIFGSM
from jaxclus.attacks._pgd import PGD
from jaxclus.compose import EOT

#: Attacks by the names of the command line; the protocol test runs over all of them.
ATTACKS: dict[str, type[Attack]] = {
    "fgsm": FGSM,
    "pgd": PGD,
    "mi-fgsm": MIFGSM,
    "apgd": APGD,
    "apgd-t": TargetedAPGD,
}

__all__ = [
    "APGD",
    "ATTACKS",
    "EOT",
    "FGSM",
    "MIFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "Queries",
    "TargetedAPGD",
    "bind",
]
