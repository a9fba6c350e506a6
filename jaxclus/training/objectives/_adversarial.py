"""Adversarial training."""

import dataclasses
from typing import Any

import jax

from jaxclus.attacks import Attack
from jaxclus.training.objectives._base import Metrics, Objective, TrainingModel
from jaxclus.training.objectives._standard import mean_cross_entropy


@dataclasses.dataclass(frozen=True)
class Adversarial(Objective):
    """Mean cross-entropy on the attack's last iterates: min_w E max_{|d| <= eps} CE(f_w(x + d), y).

    The attack sees the network in eval mode, the update in train mode, as in the code of the
    clustering effect (arXiv:2111.12922). The logged accuracy is that on the attacked images.

    Attributes:
        attack: what makes the images; PGD in the paper.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
    arXiv:1706.06083, equation 2.1.
    """

    attack: Attack

    def loss(
        self, model: TrainingModel, x: jax.Array, y: jax.Array, keys: jax.Array, state: Any
    ) -> tuple[jax.Array, Metrics]:
        x_adv = self.attack.perturb(keys, model.frozen, x, y)
        return mean_cross_entropy(model, x_adv, y)

    def validation_attack(self) -> Attack | None:
        return self.attack
