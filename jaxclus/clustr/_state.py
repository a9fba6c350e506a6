"""Clusters of a training set, found anew after every epoch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxclus import _compile, _pytree, parallel
from jaxclus.clustering import kmeans
from jaxclus.clustr._classifier import ClusterClassifier
from jaxclus.clustr._magnet import cluster_variance, full_magnet_loss
from jaxclus.clustr._sampler import Membership


@_pytree.register
@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """What ClusTR knows of the training set; a pytree.

    Attributes:
        head: centres, variance and the classifier they make; cluster k of class c has the number
            c K + k.
        members: which images each cluster has.
        losses: the loss stored for each image [n], -1 where there is none yet.
        full_loss: mean Magnet loss of the whole set at the last refresh.
        free: what free training carries; None elsewhere.
    """

    head: ClusterClassifier
    members: Membership
    losses: jax.Array
    full_loss: jax.Array
    free: Any = None


def find_clusters(
    key: jax.Array,
    h: jax.Array,
    measured: jax.Array,
    labels: jax.Array,
    per_class: int,
    nearest: int | None,
    alpha: float,
    *,
    num_classes: int,
    num_init: int,
    max_iter: int,
    as_published: bool,
) -> tuple[ClusterClassifier, Membership, jax.Array]:
    """The clusters of embeddings, by k-means in each class: head, members and mean full-set loss.

    Args:
        key: a typed key.
        h: embeddings to be clustered, float32 [n, d].
        measured: embeddings for the variance and the loss [n, d].
        labels: int32 [n].
        per_class: K.
        nearest: L of the head.
        alpha: margin of the full-set loss.
        num_classes: k; every class must have `per_class` examples or more.
        num_init: restarts of k-means.
        max_iter: iterations of Lloyd.
        as_published: the full-set loss with the published mistake.
    """
    mesh = parallel.mesh_of(h)
    table = _by_class(np.asarray(labels), per_class, num_classes, 1 if mesh is None else mesh.size)
    present = table >= 0
    finite = bool(jnp.isfinite(h).all())
    if not finite:
        raise ValueError("`model` must give finite embeddings, but they hold NaN or infinity")
    points, mask = h[np.maximum(table, 0)], jnp.asarray(present)
    if mesh is not None:  # each device has some of the points of every class
        points, mask = jax.device_put((points, mask), NamedSharding(mesh, P(None, "data")))
    clusters = kmeans(key, points, per_class, mask, max_iter, num_init)
    if mesh is not None:
        clusters = jax.device_put(clusters, parallel.replicated(mesh))
    centres = clusters.centres.reshape(-1, h.shape[1])
    classes = tuple(np.repeat(np.arange(len(table)), per_class).tolist())
    numbers = clusters.assignments + per_class * jnp.arange(len(table))[:, None]
    cluster = jnp.zeros(len(h), jnp.int32).at[table[present]].set(numbers[present])
    members = Membership.of(cluster, len(classes))
    variance, loss = _measured(measured, labels, centres, jnp.array(classes), alpha, as_published)
    return ClusterClassifier(centres, classes, variance, nearest), members, loss


@functools.partial(_compile.jit, static_argnames=("as_published",))
def _measured(h, labels, centres, classes, alpha, as_published):
    losses = full_magnet_loss(h, labels, centres, classes, alpha, as_published=as_published)
    return cluster_variance(h, labels, centres, classes), losses.mean()


def _by_class(labels: np.ndarray, per_class: int, num_classes: int, multiple: int) -> np.ndarray:
    """The numbers of each class's examples [k, most], filled up with -1 to a multiple."""
    counts = np.bincount(labels, minlength=num_classes)
    if counts.min() < per_class:
        poor = int(counts.argmin())
        raise ValueError(
            f"`clusters_per_class` must be at most the number of images of each class, "
            f"got {per_class} for {counts[poor]} images of class {poor}"
        )
    table = np.full((len(counts), -(-counts.max() // multiple) * multiple), -1)
    for c, row in enumerate(table):
        row[: counts[c]] = np.flatnonzero(labels == c)
    return table
