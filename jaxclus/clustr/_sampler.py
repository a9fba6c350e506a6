"""Batches of neighbouring clusters, drawn on the device with shapes that are known beforehand."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Membership(NamedTuple):
    """Which examples each cluster has.

    Attributes:
        cluster: the cluster of each example, int32 [n].
        order: the examples' numbers, those of a cluster side by side, int32 [n].
        starts: where each cluster begins in `order`, int32 [m].
        sizes: number of examples in each cluster, int32 [m].
    """

    cluster: jax.Array
    order: jax.Array
    starts: jax.Array
    sizes: jax.Array

    @classmethod
    def of(cls, cluster: jax.Array, num_clusters: int) -> "Membership":
        """The memberships of examples in clusters [n]."""
        sizes = jnp.bincount(cluster, length=num_clusters).astype(jnp.int32)
        order = jnp.argsort(cluster, stable=True).astype(jnp.int32)
        return cls(cluster.astype(jnp.int32), order, jnp.cumsum(sizes) - sizes, sizes)


def mean_losses(losses: jax.Array, members: Membership, *, as_published: bool) -> jax.Array:
    """The mean stored loss of each cluster [m], from which seed clusters are drawn.

    Args:
        losses: the loss stored for each example [n]; below 0 where there is none yet.
        members: the examples of each cluster.
        as_published: clusters without a stored loss have 0, as in the published code, so that
            they can be no seeds; else the mean of the other clusters.
    """
    stored = losses >= 0
    count, clusters = stored.astype(jnp.float32), len(members.sizes)
    sums = jax.ops.segment_sum(jnp.where(stored, losses, 0), members.cluster, clusters)
    counts = jax.ops.segment_sum(count, members.cluster, clusters)
    means, known = sums / jnp.maximum(counts, 1), counts > 0
    if as_published:
        return means
    typical = means.sum() / jnp.maximum(known.sum(), 1)
    return jnp.where(known, means, typical)


def seed_cluster(key: jax.Array, means: jax.Array, members: Membership) -> jax.Array:
    """A cluster drawn in proportion to its mean loss; any, where all losses are 0; never an empty.

    Args:
        key: a typed key.
        means: mean loss of each cluster, at least 0 [m].
        members: the examples of each cluster.
    """
    filled = members.sizes > 0
    means = jnp.where(filled, means, 0)
    chances = jnp.where(means.sum() > 0, means, filled.astype(means.dtype))
    return jax.random.categorical(key, jnp.log(chances))


def impostors(
    seed: jax.Array, count: int, centres: jax.Array, classes: jax.Array, members: Membership
) -> jax.Array:
    """The `count` clusters of other classes whose centres are nearest to the seed's [count].

    Args:
        seed: number of the seed cluster.
        count: at most the number of filled clusters of other classes.
        centres: centres of all clusters [m, d].
        classes: their classes, int32 [m].
        members: the examples of each cluster.
    """
    distances = jnp.square(centres - centres[seed][None]).sum(axis=1)
    other = (classes != classes[seed]) & (members.sizes > 0)
    return jax.lax.top_k(-jnp.where(other, distances, jnp.inf), count)[1]


def draw_members(key: jax.Array, clusters: jax.Array, count: int, members: Membership) -> jax.Array:
    """`count` examples of each cluster without replacement [len(clusters), count].

    A cluster with fewer gives all it has, in random order, over and over.

    Args:
        key: a typed key.
        clusters: numbers of filled clusters.
        count: examples of each.
        members: the examples of each cluster.
    """
    sizes, starts = members.sizes[clusters], members.starts[clusters]
    keys = jax.random.split(key, len(clusters))
    places = jax.vmap(_places, (0, 0, None))(keys, sizes, count)
    return members.order[starts[:, None] + places]


def _places(key: jax.Array, size: jax.Array, count: int) -> jax.Array:
    """`count` different numbers in [0, size), or all of them in cycles where there are fewer."""
    subset, permute = jax.random.split(key)
    every = jnp.arange(count)
    # The random order of the first `size` places; the others sort behind them.
    scores = jnp.where(every < size, jax.random.uniform(permute, (count,)), jnp.inf)
    cycled = jnp.argsort(scores)[every % jnp.maximum(size, 1)]
    draws = jax.random.randint(subset, (count,), 0, jnp.maximum(size - count + every, 0) + 1)

    def draw(number: jax.Array, chosen: jax.Array) -> jax.Array:
        # Floyd's algorithm: a number in [0, last], or `last` where that one has been drawn.
        taken = ((chosen == draws[number]) & (every < number)).any()
        last = size - count + number
        return chosen.at[number].set(jnp.where(taken, last, draws[number]))

    chosen = jax.lax.fori_loop(0, count, draw, jnp.zeros(count, draws.dtype))
    return jnp.where(size < count, cycled, chosen)
