"""Training with the Magnet loss: alone, with a consistency term, and with free perturbations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxclus import _checks, compose, losses, models
from jaxclus._classifier import Classifier
from jaxclus.attacks import PGD, Attack
from jaxclus.clustr import _sampler, _state
from jaxclus.clustr._classifier import ClusterClassifier
from jaxclus.clustr._magnet import magnet_loss
from jaxclus.clustr._state import Clusters
from jaxclus.threat import Linf, Threat
from jaxclus.training.objectives import (
    FreeAdversarial,
    Objective,
    Outcome,
    Seen,
    TrainingModel,
)
from jaxclus.training.objectives._base import accuracy
from jaxclus.training.objectives._consistency import FromNearby, divergence


@dataclasses.dataclass(frozen=True)
class ClusTR(Objective):
    """ClusTR: the Magnet loss on batches of neighbouring clusters, classified by nearest clusters.

    Every class has K clusters, by k-means on the embeddings of the whole training set, before
    training and after each epoch. A batch is a seed cluster, drawn in proportion to the mean of
    its members' stored losses, the m - 1 clusters of other classes with the nearest centres, and
    b / m images of each without replacement; its losses are stored. An epoch is as many batches as
    fit into the set. The trained model is the network's embeddings under a `ClusterClassifier`.

    Where the published code is wrong or silent, this is done:
    - Images are embedded for clusters and variance in eval mode and as they are. There the
      variance is taken in train mode, the clusters on augmented images, and each epoch's logging
      passes training *and test* images through in train mode, so that the saved statistics of
      BatchNorm have seen the test set.
    - A cluster with too few images gives them repeatedly; there the batch is skipped in silence,
      and a batch size that is not divisible by m skips all.
    - While all stored losses are 0, every cluster can be the seed; there NumPy raises.
    - A cluster without stored losses can be the seed, in proportion to the mean of the others
      (*); there it has to come up as an impostor first.
    - The logged loss of the whole set has the right denominator (*); see `full_magnet_loss`.
    As there, stored losses outlive a refresh, although images change clusters.

    Attributes:
        clusters_per_class: K, at least 1.
        clusters_per_batch: m, at least 2 and at most K (classes - 1) + 1; the batch size must be a
            multiple of it.
        alpha: margin of the Magnet loss, at least 0.
        nearest: L, clusters that the published scores count, in [1, K classes]; None for all.
        cross_entropy: weight of an additional mean cross-entropy on the head's logits, at least 0.
        num_init: restarts of k-means, at least 1.
        max_iter: iterations of Lloyd, at least 1. In the published code 1 restart and 20 iterations
            for CIFAR-10, 10 and 40 for other sets.
        as_published: without the corrections marked (*), and with cross-entropy on the scores.

    Alfarra et al., "ClusTR: Clustering Training for Robustness", arXiv:2006.07682, and its code;
    the loss is that of Rippel et al., arXiv:1511.05939.
    """

    clusters_per_class: int = 2
    clusters_per_batch: int = 12
    alpha: float = 12.5
    nearest: int | None = None
    cross_entropy: float = 0.0
    num_init: int = 1
    max_iter: int = 20
    as_published: bool = False

    def __post_init__(self) -> None:
        for name in ("clusters_per_class", "num_init", "max_iter"):
            _checks.at_least(name, getattr(self, name), 1)
        _checks.at_least("clusters_per_batch", self.clusters_per_batch, 2)
        _checks.not_negative("alpha", self.alpha)
        _checks.not_negative("cross_entropy", self.cross_entropy)
        if self.nearest is not None:
            _checks.at_least("nearest", self.nearest, 1)

    def init(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        batch_size: int,
    ) -> Clusters:
        if batch_size % self.clusters_per_batch:
            raise ValueError(
                "`batch_size` must be a multiple of `clusters_per_batch`, "
                f"{self.clusters_per_batch}, got {batch_size}"
            )
        self._check_counts(len(np.unique(np.asarray(labels))))
        return self._clustered(key, model, images, labels, jnp.full(len(labels), -1.0))

    def refresh(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        state: Clusters,
    ) -> Clusters:
        found = self._clustered(key, model, images, labels, state.losses)
        return dataclasses.replace(found, perturbation=state.perturbation)

    def batch(self, key: jax.Array, number: jax.Array, state: Clusters, size: int) -> jax.Array:
        seed_key, member_key = jax.random.split(key)
        means = _sampler.mean_losses(state.losses, state.members, as_published=self.as_published)
        seed = _sampler.seed_cluster(seed_key, means, state.members)
        count, classes = self.clusters_per_batch, jnp.array(state.head.centre_classes)
        others = _sampler.impostors(seed, count - 1, state.head.centres, classes, state.members)
        clusters = jnp.concatenate([seed[None], others])
        return _sampler.draw_members(member_key, clusters, size // count, state.members).ravel()

    def loss(
        self,
        model: TrainingModel,
        x: jax.Array,
        x_adv: jax.Array,
        y: jax.Array,
        keys: jax.Array,
        state: Clusters,
    ) -> Outcome:
        return self._magnet(model.features(x_adv), y, state)

    def update(self, state: Clusters, seen: Seen) -> Clusters:
        return dataclasses.replace(state, losses=state.losses.at[seen.index].set(seen.losses))

    def head(self, state: Clusters) -> ClusterClassifier:
        return state.head

    def _magnet(self, h: jax.Array, y: jax.Array, state: Clusters) -> Outcome:
        """The Magnet loss of a batch's embeddings, whose clusters lie side by side."""
        clusters = jnp.arange(len(h)) // (len(h) // self.clusters_per_batch)
        found = magnet_loss(h, clusters, y, self.alpha)
        logits, loss = state.head(h), found.mean()
        if self.cross_entropy > 0:
            z = state.head.scores(h) if self.as_published else logits
            loss = loss + self.cross_entropy * losses.cross_entropy(z, y).mean()
        metrics = {"magnet_loss": found.mean(), "full_magnet_loss": state.full_loss}
        return Outcome(loss, logits, metrics | accuracy(logits, y), jax.lax.stop_gradient(found))

    def _clustered(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        stored: jax.Array,
    ) -> Clusters:
        head, members, loss = _state.find_clusters(
            key,
            _state.embeddings(model, images),
            labels,
            self.clusters_per_class,
            self.nearest,
            self.alpha,
            num_init=self.num_init,
            max_iter=self.max_iter,
            as_published=self.as_published,
        )
        self._check_filled(np.asarray(members.sizes), np.asarray(head.centre_classes))
        return Clusters(head, members, stored, loss)

    def _check_counts(self, classes: int) -> None:
        most = self.clusters_per_class * (classes - 1) + 1
        if self.clusters_per_batch > most:
            raise ValueError(
                f"`clusters_per_batch` must be in [2, {most}], one cluster and those of other "
                f"classes ({self.clusters_per_class} for each of {classes} classes), "
                f"got {self.clusters_per_batch}"
            )
        if self.nearest is not None and self.nearest > self.clusters_per_class * classes:
            raise ValueError(
                f"`nearest` must be in [1, {self.clusters_per_class * classes}], "
                f"{self.clusters_per_class} clusters for each of {classes} classes, "
                f"got {self.nearest}"
            )

    def _check_filled(self, sizes: np.ndarray, classes: np.ndarray) -> None:
        """Raises where images coincide so much that clusters are empty and too few are left."""
        filled = np.bincount(classes[sizes > 0], minlength=classes.max() + 1)
        fewest = int(filled.sum() - filled.max())
        if fewest < self.clusters_per_batch - 1:
            raise ValueError(
                f"`clusters_per_batch` must be at most {fewest + 1}, as so few clusters of other "
                f"classes have images, got {self.clusters_per_batch}: most embeddings coincide"
            )


@dataclasses.dataclass(frozen=True)
class _Consistent(ClusTR):
    """ClusTR with a term that asks for the same class at x_adv, and the adversary's ball."""

    threat: Threat = Linf(8 / 255)
    weight: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threat, Threat):
            raise TypeError(f"`threat` must be one as Linf(8 / 255) makes, got {self.threat!r}")
        _checks.not_negative("weight", self.weight)

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
        return self._with_gap(found, h, state.head.scores(model.features(x_adv)), state)

    def _with_gap(self, found: Outcome, h: jax.Array, z: jax.Array, state: Clusters) -> Outcome:
        """Adds the weight times the mean of H(p(h), softmax(z)) to the loss."""
        gap = soft_cross_entropy(state.head.probabilities(h), z).mean()
        metrics = found.metrics | {"consistency": gap}
        return found._replace(loss=found.loss + self.weight * gap, metrics=metrics)


@dataclasses.dataclass(frozen=True)
class QTRADES(_Consistent):
    """ClusTR + QTRADES: mean Magnet loss + weight mean H(p(x), softmax(S(x_adv))).

    H(t, q) = -sum_c t_c log q_c; S are the published scores under the clusters of the last refresh,
    p = S / sum S. The adversary takes one step: x_0 uniform in the ball and box, p held fixed,

        x_adv = project(x_0 + step_size step(grad_x H(p(x), softmax(S(x_0))))).

    p is differentiated through in the loss, as published. S lies in [0, K], so that H cannot come
    near 0 (for K = 2 and 10 classes it stays above 0.80), and far from all clusters S and its
    gradient vanish: robustness measured by attacks on S is not to be believed. Validation attacks
    the head's logits.

    Published mistakes, put right unless `as_published`: the adversary acts in train mode, and its
    pass moves BatchNorm's statistics; and its gradient with respect to the weights is added to the
    update, as it is not cleared. Others are named at `ClusTR`.

    Attributes:
        threat: the threat model, Linf in the paper.
        weight: lambda, at least 0; 8 for CIFAR-10.
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
        return self._one_step(keys, models.features(_network(model)), x, y, state)

    def _one_step(
        self, keys: jax.Array, embed: Any, x: jax.Array, y: jax.Array, state: Clusters
    ) -> jax.Array:
        target = state.head.probabilities(embed(x))
        attack = self._attack(lambda z, _: soft_cross_entropy(target, z))
        chain = compose.Chain(embed, state.head.as_published)
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
        target = jax.lax.stop_gradient(state.head.probabilities(h))
        leak = soft_cross_entropy(target, state.head.scores(model.features(start))).mean()
        found = self._magnet(h, y, state)
        found = self._with_gap(found, h, state.head.scores(model.features(x_adv)), state)
        # Its gradient alone: the published loss does not contain it.
        return found._replace(loss=found.loss + leak - jax.lax.stop_gradient(leak))


@dataclasses.dataclass(frozen=True)
class ClusTRTRADES(_Consistent):
    """ClusTR with the adversary of TRADES: mean Magnet loss + weight mean H(p(x), softmax(S(x'))).

    The published code's "actual TRADES": x' maximises KL(softmax(S(x)) || softmax(S(x'))) in
    `steps` projected steps from x + 0.001 N(0, 1), with the network in eval mode; the outer term
    is still the cross-entropy H of `QTRADES`. There the step is 0.03 on normalised pixels, about
    0.006 for CIFAR-10.

    Attributes:
        threat: the threat model, Linf in the paper.
        weight: lambda, at least 0.
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
        chain = compose.Chain(models.features(_network(model)), state.head.as_published)
        clean = chain(x)
        return self._attack(lambda z, _: divergence(clean, z)).perturb(keys, chain, x, y)


@dataclasses.dataclass(frozen=True)
class FreeClusTR(ClusTR):
    """ClusTR on images that carry the perturbation of free adversarial training.

    As `jc.training.objectives.FreeAdversarial` with the mean Magnet loss: each batch is used in
    `replays` consecutive steps at x + d, and each step moves d by eps sign(g), the gradient of the
    same backward pass, within the ball; d goes on to the next batch. The losses stored are those of
    the last replay, where the published code takes one more pass.

    Attributes:
        threat: the threat model, Linf; eps 8/255 in the paper.
        replays: r, steps for each batch, at least 1.

    The others are those of `ClusTR`.

    arXiv:2006.07682 (code); Shafahi et al., arXiv:1904.12843, algorithm 1.
    """

    threat: Linf = Linf(8 / 255)
    replays: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._free()  # checks both

    def _free(self) -> FreeAdversarial:
        return FreeAdversarial(self.threat, self.replays)

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
    ) -> Clusters:
        state = super().init(key, model, images, labels, batch_size)
        first = self._free().init(key, model, images, labels, batch_size)
        return dataclasses.replace(state, perturbation=first)

    def perturb(
        self, keys: jax.Array, model: Classifier, x: jax.Array, y: jax.Array, state: Clusters
    ) -> jax.Array:
        return self._free().perturb(keys, model, x, y, state.perturbation)

    def update(self, state: Clusters, seen: Seen) -> Clusters:
        moved = self._free().update(state.perturbation, seen)
        return dataclasses.replace(super().update(state, seen), perturbation=moved)

    def validation_attack(self) -> Attack | None:
        return PGD(self.threat, steps=10)


def soft_cross_entropy(target: jax.Array, logits: jax.Array) -> jax.Array:
    """H(t, softmax(z)) = -sum_c t_c log softmax(z)_c for each image [b]."""
    return -(target * jax.nn.log_softmax(logits)).sum(axis=-1)


def _network(model: Classifier) -> models.Classifier:
    if not isinstance(model, models.Classifier):
        raise TypeError(f"`model` must be one that jc.models.create makes, got {type(model)}")
    return model
