"""Training with the Magnet loss on batches of neighbouring clusters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxclus import _checks, losses
from jaxclus.clustr import _sampler, _state
from jaxclus.clustr._classifier import ClusterClassifier
from jaxclus.clustr._magnet import magnet_loss
from jaxclus.clustr._state import Clusters
from jaxclus.training.objectives import Objective, Outcome, Seen, TrainingModel, embeddings
from jaxclus.training.objectives._base import Metrics, accuracy, num_classes


@dataclasses.dataclass(frozen=True)
class ClusTR(Objective):
    """ClusTR: the Magnet loss on batches of neighbouring clusters, classified by nearest clusters.

    Every class has K clusters, by k-means on the embeddings of the whole training set, before
    training and after each epoch. A batch is a seed cluster, drawn in proportion to the mean of
    its members' stored losses, the m - 1 clusters of other classes with the nearest centres, and
    b / m images of each without replacement; its losses are stored. An epoch is as many batches as
    fit into the set. The trained model is the network's embeddings under a `ClusterClassifier`.

    Where the published code is wrong or silent, this is done:
    - The variance, as the clusters, is that of embeddings in eval mode; there the variance (*) and
      the first clusters are those of train mode.
    - Images are embedded for clusters, variance and logged loss as they are, there augmented.
    - What is logged after an epoch leaves BatchNorm's statistics alone; there training *and test*
      images pass in train mode, so that the saved network has seen the test set.
    - A cluster with too few images gives them repeatedly; there the batch is skipped in silence,
      and a batch size that is not divisible by m skips all.
    - While all stored losses are 0, every cluster can be the seed; there NumPy raises.
    - A cluster without stored losses can be the seed, in proportion to the mean of the others
      (*); there it has to come up as an impostor first.
    - The logged loss of the whole set has the right denominator (*); see `full_magnet_loss`.
    - A cluster's mean loss is that of its present members; there it is renewed where a batch falls,
      and after a refresh stays with the cluster's number.
    As there, the losses stored of images outlive a refresh.

    Logged: "magnet_loss", of the batches; "accuracy", by the clusters of the last refresh, of the
    batches' embeddings in train mode; after each epoch "full_magnet_loss", the mean
    `full_magnet_loss` of the training set under its new clusters.

    Published from a trained network, with Adam at a rate of 1e-4, no weight decay and batches of
    240, and without selecting an epoch: of a network that separates the classes already, accuracy
    on held-out images selects an early one.

    Attributes:
        clusters_per_class: K, at least 1.
        clusters_per_batch: m, at least 2 and at most K (classes - 1) + 1; the batch size must be a
            multiple of it.
        alpha: margin of the Magnet loss, at least 0.
        nearest: L, clusters that the published scores count, in [1, K classes]; None for all, as
            in the published evaluation (20 for 10 classes). Its training counts 10.
        cross_entropy_weight: of an additional mean cross-entropy on the head's logits, at least 0.
        num_init: restarts of k-means, at least 1.
        max_iter: iterations of Lloyd, at least 1. In the published code 1 restart and 20 iterations
            for CIFAR-10, 10 and 40 for other sets.
        as_published: without the corrections marked (*), and with cross-entropy on the scores. The
            other points stay as said here. In train mode a batch is 256 images for each device,
            there a 400th of the set.

    Alfarra et al., "ClusTR: Clustering Training for Robustness", arXiv:2006.07682, and its code;
    the loss is that of Rippel et al., arXiv:1511.05939.
    """

    clusters_per_class: int = 2
    clusters_per_batch: int = 12
    alpha: float = 12.5
    nearest: int | None = None
    cross_entropy_weight: float = 0.0
    num_init: int = 1
    max_iter: int = 20
    as_published: bool = False

    def __post_init__(self) -> None:
        for name in ("clusters_per_class", "num_init", "max_iter"):
            _checks.at_least(name, getattr(self, name), 1)
        _checks.at_least("clusters_per_batch", self.clusters_per_batch, 2)
        _checks.not_negative("alpha", self.alpha)
        _checks.not_negative("cross_entropy_weight", self.cross_entropy_weight)
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
        self._check_counts(num_classes(model, labels))
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
        return dataclasses.replace(found, free=state.free)

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
        return dataclasses.replace(state, losses=state.losses.at[seen.index].set(seen.noted))

    def summary(self, state: Clusters) -> Metrics:
        return {"full_magnet_loss": state.full_loss}

    def head(self, state: Clusters) -> ClusterClassifier:
        return state.head

    def _magnet(self, h: jax.Array, y: jax.Array, state: Clusters) -> Outcome:
        """The Magnet loss of a batch's embeddings, whose clusters lie side by side."""
        clusters = jnp.arange(len(h)) // (len(h) // self.clusters_per_batch)
        found = magnet_loss(h, clusters, y, self.alpha)
        logits, loss = state.head(h), found.mean()
        if self.cross_entropy_weight > 0:
            z = state.head.scores(h) if self.as_published else logits
            loss = loss + self.cross_entropy_weight * losses.cross_entropy(z, y).mean()
        metrics = {"magnet_loss": found.mean()} | accuracy(logits, y)
        return Outcome(loss, logits, metrics, jax.lax.stop_gradient(found))

    def _clustered(
        self,
        key: jax.Array,
        model: nnx.Module,
        images: jax.Array,
        labels: jax.Array,
        stored: jax.Array,
    ) -> Clusters:
        h = measured = embeddings(model, images)
        if self.as_published:
            measured = embeddings(model, images, train_mode=True)
        head, members, loss = _state.find_clusters(
            key,
            h,
            measured,
            labels,
            self.clusters_per_class,
            self.nearest,
            self.alpha,
            num_classes=num_classes(model, labels),
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
