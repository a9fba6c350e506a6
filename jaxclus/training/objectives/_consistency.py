"""Objectives that ask for the same answer at x and at x_adv: TRADES and MART."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxclus import _checks, _pytree, losses
from jaxclus._classifier import Classifier
from jaxclus.attacks import PGD, Attack
from jaxclus.threat import Threat
from jaxclus.training.objectives._base import Objective, Outcome, TrainingModel, accuracy


@_pytree.register
@dataclasses.dataclass(frozen=True)
class FromNearby(PGD):
    """PGD that starts close to x, at x + 0.001 N(0, 1), instead of anywhere in the ball.

    Not at x itself, where the divergence that TRADES maximises has no gradient.
    """

    def _start(self, keys: jax.Array, x: jax.Array) -> jax.Array:
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        return x + 0.001 * noise


@dataclasses.dataclass(frozen=True)
class _Consistency(Objective):
    """An adversary of some steps that starts close to x, and the weight of a divergence."""

    threat: Threat
    beta: float
    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        _checks.not_negative("beta", self.beta)
        self._attack()  # checks the rest

    def _attack(self) -> PGD:
        return FromNearby(self.threat, self.steps, self.step_size)

    def validation_attack(self) -> Attack | None:
        return PGD(self.threat, self.steps, self.step_size)


@dataclasses.dataclass(frozen=True)
class TRADES(_Consistency):
    """TRADES: mean CE(f(x), y) + beta mean KL(p(x) || p(x_adv)), with p = softmax(f).

    x_adv maximises the same divergence: `steps` projected steps from x + 0.001 N(0, 1) with the
    network in eval mode. Both terms of the update are in train mode and differentiated through
    both p, and move BatchNorm's statistics once each. The logged accuracy is that on x_adv.

    Attributes:
        threat: the threat model.
        beta: weight of the divergence, at least 0; 1 / lambda of the paper, 6 for CIFAR-10.
        steps: of the adversary, at least 1.
        step_size: in the threat's norm, on the pixel scale, above 0; None means 2.5 eps / steps.
            The published code has 0.007 for eps 0.031 and 10 steps.

    Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019,
    arXiv:1901.08573, equation 5 and algorithm 1.
    """

    beta: float = 6.0

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: Any
    ) -> jax.Array:
        clean = model(x)
        attack = dataclasses.replace(self._attack(), loss=lambda z, _: divergence(clean, z))
        return attack.perturb(keys, model, x, y)

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: Any,
    ) -> Outcome:
        clean, attacked = model(x), model(x_adv)
        natural = losses.cross_entropy(clean, y).mean()
        gap = divergence(clean, attacked).mean()
        metrics = accuracy(attacked, y) | {"natural_loss": natural, "divergence": gap}
        return Outcome(natural + self.beta * gap, attacked, metrics)


@dataclasses.dataclass(frozen=True)
class MART(_Consistency):
    """MART: mean BCE(x_adv) + beta mean KL(p(x) || p(x_adv)) (1 - p_y(x)), with p = softmax(f).

    BCE = -log p_y(x_adv) - log(1.0001 - max_{i != y} p_i(x_adv)). x_adv is PGD's for the
    cross-entropy, from x + 0.001 N(0, 1), with the network in eval mode; the update is in train
    mode. The 1.0001 is the published code's, as it bounds the second term; its 1e-12 inside
    logarithms are left out, since log-probabilities need none, and its weight 1.0000001 - p_y(x)
    is 1 - p_y(x) here, as in the paper. The logged accuracy is that on x_adv.

    Attributes:
        threat: the threat model.
        beta: weight of the divergence, lambda in the paper, at least 0.
        steps: of the adversary, at least 1.
        step_size: in the threat's norm, on the pixel scale, above 0; None means 2.5 eps / steps.

    Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
    ICLR 2020 (openreview rklOg6EFwS), equation 11.
    """

    beta: float = 5.0

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: Any
    ) -> jax.Array:
        return self._attack().perturb(keys, model, x, y)

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: Any,
    ) -> Outcome:
        clean, attacked = model(x), model(x_adv)
        own = jax.nn.one_hot(y, clean.shape[-1], dtype=bool)
        rival = jnp.where(own, 0, jax.nn.softmax(attacked)).max(axis=-1)
        boosted = losses.cross_entropy(attacked, y) - jnp.log(1.0001 - rival)
        doubt = 1 - jnp.exp(-losses.cross_entropy(clean, y))
        gap = (divergence(clean, attacked) * doubt).mean()
        loss = boosted.mean() + self.beta * gap
        return Outcome(loss, attacked, accuracy(attacked, y) | {"divergence": gap})


def divergence(clean: jax.Array, attacked: jax.Array) -> jax.Array:
    """KL(softmax(clean) || softmax(attacked)) of logits [b, k] for each image [b]."""
    log_clean, log_attacked = jax.nn.log_softmax(clean), jax.nn.log_softmax(attacked)
    return optax.losses.kl_divergence_with_log_targets(log_attacked, log_clean)
