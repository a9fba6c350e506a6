"""Attacks: `attack(key, model, x, y)` gives adversarial images, `attack.run(...)` the details."""

from jaxclus.attacks._base import Attack, AttackResult, Queries, bind
from jaxclus.attacks._fgsm import FGSM
from jaxclus.attacks._mi_fgsm import MIFGSM
from jaxclus.attacks._pgd import PGD

#: Attacks by the names of the command line; the protocol test runs over all of them.
ATTACKS: dict[str, type[Attack]] = {"fgsm": FGSM, "pgd": PGD, "mi-fgsm": MIFGSM}

__all__ = ["ATTACKS", "Attack", "AttackResult", "FGSM", "MIFGSM", "PGD", "Queries", "bind"]
