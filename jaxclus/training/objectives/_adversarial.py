"""Adversarial training on cross-entropy: with any attack, with one step, and for free."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxclus import _checks
from jaxclus._classifier import Classifier
from jaxclus.attacks import PGD, Attack
from jaxclus.threat import Linf, Threat
from jaxclus.training.objectives._base import Objective, Seen


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

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise TypeError(
                f"`attack` must be an attack as PGD(Linf(8 / 255)) is, got {self.attack!r}"
            )

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: Any
    ) -> jax.Array:
        return self.attack.perturb(keys, model, x, y)

    def validation_attack(self) -> Attack | None:
        return self.attack


@dataclasses.dataclass(frozen=True)
class FastAdversarial(Objective):
    """Fast adversarial training, FGSM-RS: one long step from a random start.

    d uniform in the ball; x_adv = project(x + d + step_size * step(grad_x CE(f(x + d), y))).

    The step is taken in eval mode, as everywhere here; the published code takes it in train mode.
    Long training, or steps of more than 1.25 eps, can end in catastrophic overfitting: full
    robustness to one step and none to PGD. A held-out split is therefore judged under PGD of ten
    steps, and its best epoch is what `jc.training.fit` returns.

    Attributes:
        threat: the threat model, Linf in the paper.
        step_size: length of the step in the threat's norm, on the pixel scale, above 0; None means
            1.25 eps.

    Wong, Rice, Kolter, "Fast is better than free", ICLR 2020, arXiv:2001.03994, algorithm 3.
    """

    threat: Threat
    step_size: float | None = None

    def __post_init__(self) -> None:
        self._attack()  # checks both

    def _attack(self) -> PGD:
        step_size = 1.25 * self.threat.eps if self.step_size is None else self.step_size
        return PGD(self.threat, steps=1, step_size=step_size)

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: Any
    ) -> jax.Array:
        return self._attack().perturb(keys, model, x, y)

    def validation_attack(self) -> Attack | None:
        return PGD(self.threat, steps=10)


@dataclasses.dataclass(frozen=True)
class FreeAdversarial(Objective):
    """Free adversarial training: one backward pass updates the weights and the perturbation.

    Each batch is used in `replays` consecutive steps. In each, with the perturbation d [b, h, w, c]
    left by the step before, also by that of another batch,

        g_w, g_x = gradient of mean CE(f_w(x_adv), y) at x_adv = clip(x + d, 0, 1),
        w <- the optimiser's step along g_w,    d <- clip(d + step_size sign(g_x), -eps, eps),

    where pixels that the box has cut keep their d. (Within another objective, such as a clustering
    regulariser, g_x is the gradient of the whole loss.) An epoch visits each image `replays` times,
    so train for 1 / `replays` of the usual epochs.

    Attributes:
        threat: the threat model, Linf.
        replays: m, steps for each batch, at least 1.
        step_size: on the pixel scale, above 0; None means eps, as published.

    Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019, arXiv:1904.12843, algorithm 1.
    """

    threat: Threat
    replays: int = 4
    step_size: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.threat, Linf):
            raise TypeError(f"`threat` must be one as Linf(8 / 255) makes, got {self.threat!r}")
        _checks.at_least("replays", self.replays, 1)
        if self.step_size is not None:
            _checks.positive("step_size", self.step_size)

    @property
    def steps_per_batch(self) -> int:
        return self.replays

    def init(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        batch_size: int,
    ) -> jax.Array:
        return jnp.zeros((batch_size, *images.shape[1:]))

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: jax.Array
    ) -> jax.Array:
        return jnp.clip(x + state, min=0, max=1)

    def update(self, state: jax.Array, seen: Seen) -> jax.Array:
        step_size = self.threat.eps if self.step_size is None else self.step_size
        inside = seen.x + state == seen.x_adv
        moved = state + step_size * jnp.where(inside, self.threat.step(seen.gradient), 0)
        return jnp.clip(moved, min=-self.threat.eps, max=self.threat.eps)

    def validation_attack(self) -> Attack | None:
        return PGD(self.threat, steps=10)
