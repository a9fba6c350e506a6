"""ClusTR with a term that asks for the same class nearby: QTRADES, and with TRADES' adversary."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxclus import _checks, compose, losses, models
from jaxclus._classifier import Classifier
from jaxclus.attacks import PGD, Attack
from jaxclus.clustr._classifier import ClusterClassifier
from jaxclus.clustr._clustr import ClusTR
from jaxclus.clustr._state import Clusters
from jaxclus.models._classifier import checked
from jaxclus.threat import Linf, Threat
from jaxclus.training.objectives import Outcome, TrainingModel
from jaxclus.training.objectives._consistency import FromNearby, divergence


@dataclasses.dataclass(frozen=True)
class _Consistent(ClusTR):
    """ClusTR with a term that asks for the same class at x_adv, and the adversary's ball."""

    threat: Threat = Linf(8 / 255)
    beta: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, Threat):
            raise TypeError(f"`threat` must be one as Linf(8 / 255) makes, got {self.threat!r}")
        _checks.not_negative("beta", self.beta)

    def validation_attack(self) -> Attack | None:
        return PGD(self.threat, steps=10)

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: Clusters,
    ) -> Outcome:
        h = model.features(x)
        found = self._magnet(h, y, state)
        return self._with_gap(found, h, model.features(x_adv), state)

    def _target(self, head: ClusterClassifier, h: jax.Array) -> jax.Array:
        """p [b, k]; as published it is 0 for all classes where all scores underflow."""
        if not self.as_published:
            return head.probabilities(h)
        scores = head.scores(h)
        return scores / jnp.maximum(scores.sum(axis=1, keepdims=True), 1e-12)

    def _with_gap(self, found: Outcome, h: jax.Array, h_adv: jax.Array, state: Clusters) -> Outcome:
        """Adds beta times the mean of H(p(h), softmax(S(h_adv))) to the loss."""
        head = state.head
        gap = soft_cross_entropy(self._target(head, h), head.scores(h_adv)).mean()
        loss, metrics = found.loss + self.beta * gap, found.metrics | {"consistency": gap}
        return found._replace(loss=loss, logits=head(h_adv), metrics=metrics)


@dataclasses.dataclass(frozen=True)
class QTRADES(_Consistent):
    """ClusTR + QTRADES: mean Magnet loss + beta mean H(p(x), softmax(S(x_adv))).

    H(t, q) = -sum_c t_c log q_c; S are the published scores under the clusters of the last refresh,
    p = S / sum S. The adversary takes one step: x_0 uniform in the ball and box, p held fixed,

        x_adv = project(x_0 + step_size step(grad_x H(p(x), softmax(S(x_0))))).

    p is differentiated through in the loss, as published. S lies in [0, K]: while p is one class's,
    H cannot come near 0 (for K = 2 and 10 classes it stays above 0.80), and far from all clusters S
    and its gradient vanish, so that robustness measured by attacks on S is not to be believed.
    Validation attacks the head's logits.

    Published mistakes, put right unless `as_published`: p is divided by max(sum S, 1e-12), so that
    far from all centres it is 0 for every class, and H with it; the adversary acts in train mode,
    and its pass moves BatchNorm's statistics; and its gradient with respect to the weights is added
    to the update, as it is not cleared. Others are named at `ClusTR`.

    Logged as by `ClusTR`, and "consistency", the mean of H.

    Attributes:
        threat: the threat model, Linf in the paper.
        beta: the weight, lambda in the paper, at least 0; 8 for CIFAR-10.
        step_size: in the threat's norm, on the pixel scale, above 0; None means 1.25 eps, the
            published 10/255 for eps 8/255.

    The others are those of `ClusTR`.

    arXiv:2006.07682, equation 5, and its code.
    """

    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._attack(losses.cross_entropy)  # checks the step size

    def _attack(self, loss: losses.Loss) -> PGD:
        step_size = 1.25 * self.threat.eps if self.step_size is None else self.step_size
        return PGD(self.threat, steps=1, step_size=step_size, loss=loss)

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: Clusters
    ) -> jax.Array:
        if self.as_published:
            return x  # in the loss, where the network is in train mode
        return self._one_step(keys, models.features(checked("model", model)), x, y, state)

    def _one_step(
        self, keys: jax.Array, embed: Any, x: jax.Array, y: jax.Array, state: Clusters
    ) -> jax.Array:
        target = self._target(state.head, embed(x))
        attack = self._attack(lambda z, _: soft_cross_entropy(target, z))
        chain = compose.Chain(embed, state.head.score_classifier)
        return jax.lax.stop_gradient(attack.perturb(keys, chain, x, y))

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: Clusters,
    ) -> Outcome:
        if not self.as_published:
            return super().loss(model, x, x_adv, y, keys, state)
        h = model.features(x)
        x_adv = self._one_step(keys, lambda x: model.at(model.params).features(x), x, y, state)
        start = self.threat.random_start(keys, x)
        target = jax.lax.stop_gradient(self._target(state.head, h))
        leak = soft_cross_entropy(target, state.head.scores(model.features(start))).mean()
        found = self._magnet(h, y, state)
        found = self._with_gap(found, h, model.features(x_adv), state)
        # Its gradient alone: the published loss does not contain it.
        return found._replace(loss=found.loss + leak - jax.lax.stop_gradient(leak))


@dataclasses.dataclass(frozen=True)
class ClusTRTRADES(_Consistent):
    """ClusTR with the adversary of TRADES: mean Magnet loss + beta mean H(p(x), softmax(S(x'))).

    The published code's "actual TRADES": x' maximises KL(softmax(S(x)) || softmax(S(x'))) in
    `steps` projected steps from x + 0.001 N(0, 1), with the network in eval mode; the outer term
    is still the cross-entropy H of `QTRADES`. There the step is 0.03 on normalised pixels, about
    0.006 for CIFAR-10.

    Attributes:
        threat: the threat model, Linf in the paper.
        beta: the weight, lambda in the paper, at least 0.
        steps: of the adversary, at least 1.
        step_size: in the threat's norm, on the pixel scale, above 0; None means 2.5 eps / steps.

    The others are those of `ClusTR`.

    arXiv:2006.07682 (code).
    """

    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._attack(losses.cross_entropy)  # checks the rest

    def _attack(self, loss: losses.Loss) -> PGD:
        return FromNearby(self.threat, self.steps, self.step_size, loss=loss)

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: Clusters
    ) -> jax.Array:
        chain = compose.Chain(models.features(checked("model", model)), state.head.score_classifier)
        clean = chain(x)
        return self._attack(lambda z, _: divergence(clean, z)).perturb(keys, chain, x, y)


def soft_cross_entropy(target: jax.Array, logits: jax.Array) -> jax.Array:
    """H(t, softmax(z)) = -sum_c t_c log softmax(z)_c for each image [b]."""
    return -(target * jax.nn.log_softmax(logits)).sum(axis=-1)
