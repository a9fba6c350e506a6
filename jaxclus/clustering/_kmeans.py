"""k-means for many data sets in one call: greedy k-means++ seeding, then Lloyd's iterations.

Each data set is centred on its mean, so that squared distances |x|^2 - 2 <x, c> + |c|^2 lose
little to rounding. All restarts of a data set go side by side: one product of its points with all
their centres is far cheaper than one product for each restart.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxclus import _checks, _pytree

# Scikit-learn's default: centres that move less, relative to the features' variance, stand still.
_TOLERANCE = 1e-4


@_pytree.register
@dataclasses.dataclass(frozen=True, eq=False)
class KMeans:
    """Clusters of one data set or, with leading axes, of many.

    Attributes:
        centres: c [..., k, d], float32.
        assignments: the nearest centre of each point [..., n], int32 in [0, k), also of points
            that the mask leaves out (as far as they are finite).
        inertia: sum over counted points of the squared distance to their centre [...], float32.
        iterations: Lloyd's iterations of the restart that was kept [...], int32 in [1, max_iter].
    """

    centres: Float[Array, "*sets k d"]
    assignments: Int[Array, "*sets n"]
    inertia: Float[Array, "*sets"]
    iterations: Int[Array, "*sets"]


def kmeans(
    key: jax.Array,
    points: ArrayLike,
    num_clusters: int,
    mask: ArrayLike | None = None,
    max_iter: int = 100,
    num_init: int = 1,
) -> KMeans:
    """Centres c that make sum_i min_j |x_i - c_j|^2 small, for each data set by itself.

    Greedy k-means++: the first centre is a point at random, each further one the best of
    2 + floor(log k) points drawn with probability proportional to their squared distance from the
    nearest centre so far. Then Lloyd: each point goes to its nearest centre, each centre to the
    mean of its points, until assignments stay, or the squared steps of all centres sum to at most
    1e-4 times the mean variance of the features. A cluster without points takes the point farthest
    from its centre. Of `num_init` such runs the one with the smallest sum is kept.

    Data set i, in row-major order, draws from `fold_in(key, i)`: what it gets depends neither on
    the other data sets nor on points that the mask leaves out, but for rounding in other shapes.
    Data sets run one after the other on CPUs, else all at once; each takes memory for
    n * num_init * num_clusters numbers.

    Args:
        key: typed key.
        points: x [..., n, d], float32 (NumPy's float64 becomes it): leading axes are data sets.
            Squared distances must be within float32's range.
        num_clusters: k, at least 1; static.
        mask: which points count [..., n], bool; by default all. At least k in each data set.
        max_iter: the most iterations of Lloyd, an integer of at least 1.
        num_init: restarts, at least 1; static.

    Returns:
        A `KMeans`, a pytree. Under tracing values cannot be checked: there NaN or infinity among
        the counted points makes the centres of its data set NaN.

    Raises:
        TypeError: `key` is not a typed key, `points` not float32, `mask` not bool, or a number
            not an integer.
        ValueError: `points` or `mask` has another shape; a number is below 1; a data set has fewer
            counted points than `num_clusters`, or NaN or infinity among them.

    Lloyd, IEEE Trans. Inf. Theory 1982; Arthur and Vassilvitskii, SODA 2007 (k-means++). The greedy
    choice, the stopping rules and the care of empty clusters are scikit-learn's.
    """
    key = _checks.typed_key("key", key)
    _checks.at_least("num_clusters", num_clusters, 1)
    _checks.at_least("max_iter", max_iter, 1)
    _checks.at_least("num_init", num_init, 1)
    points = _checked_points(points)
    mask = _checked_mask(mask, points, num_clusters)
    found = _fit(key, points, mask, num_clusters=num_clusters, max_iter=max_iter, num_init=num_init)
    if _checks.is_concrete(found.inertia):
        finite = np.isfinite(np.asarray(found.inertia))
        if not finite.all():
            raise ValueError(
                "`points` must be finite, with squares in float32's range, but "
                f"{_data_set(~finite)} holds NaN, infinity or too large values that count"
            )
    return found


def _checked_points(points):
    """The points as a float32 array [..., n, d] that is not empty."""
    if jnp.result_type(_checks.array("points", points, "float32 points")) != jnp.float32:
        raise TypeError(f"`points` must be float32, got dtype {points.dtype}")
    points = jnp.asarray(points)
    if points.ndim < 2 or not points.size:
        raise ValueError(
            f"`points` must have the shape [..., n, d], no axis of length 0, got {points.shape}"
        )
    return points


def _checked_mask(mask, points, num_clusters):
    """The mask [..., n] as an array, which leaves every data set `num_clusters` points or more."""
    *leading, n, _ = points.shape
    if mask is None:
        mask = np.ones((*leading, n), bool)
    mask = _checks.array("mask", mask, "bool")
    if mask.dtype != bool:
        raise TypeError(f"`mask` must be bool, got dtype {mask.dtype}")
    if mask.shape != (*leading, n):
        raise ValueError(
            f"`mask` must have the shape {(*leading, n)}, one entry for each of `points` "
            f"{points.shape}, got {mask.shape}"
        )
    counts = np.asarray(mask).sum(-1) if _checks.is_concrete(mask) else np.full(leading, n)
    if (counts < num_clusters).any():
        raise ValueError(
            f"`num_clusters` must be at most the number of points that count, got {num_clusters} "
            f"for {counts.min()} points in {_data_set(counts < num_clusters)}"
        )
    return jnp.asarray(mask)


def _data_set(bad):
    """Names the first data set for which `bad` [...] holds."""
    return f"data set {np.argwhere(bad)[0].tolist()}" if np.ndim(bad) else "the data set"


@functools.partial(jax.jit, static_argnames=("num_clusters", "num_init"))
def _fit(key, points, mask, max_iter, num_clusters, num_init):
    """`kmeans` without checks."""
    leading = points.shape[:-2]
    number = math.prod(leading)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(number))
    sets = (keys, points.reshape(number, *points.shape[-2:]), mask.reshape(number, -1))

    def one(data):
        key, points, mask = data
        return _one(key, points, mask, max_iter, num_clusters, num_init)

    # Side by side they would all take as many iterations as the slowest, which a CPU pays for.
    found = lax.platform_dependent(
        sets, cpu=lambda sets: lax.map(one, sets), default=lambda sets: jax.vmap(one)(sets)
    )
    return jax.tree.map(lambda array: array.reshape(*leading, *array.shape[1:]), found)


def _one(key, points, mask, max_iter, num_clusters, num_init):
    """One data set [n, d], with its mask [n]."""
    mean = jnp.where(mask[:, None], points, 0).sum(0) / mask.sum()
    centred = points - mean[None]
    # What does not count gets a factor of 0 below, and NaN times 0 would be NaN.
    centred = jnp.where(jnp.isfinite(centred), centred, 0)
    centres = _seeded(key, centred, mask, num_clusters, num_init)
    centres, iterations = _lloyd(centred, mask, centres, max_iter)
    distances = _partial_distances(centred, centres)
    best = jnp.where(mask[:, None], distances.min(-1), 0).sum(0).argmin()
    assignments = distances[:, best].argmin(-1)
    centres = centres[best] + mean[None]
    inertia = _inertia(points, mask, centres, assignments)
    return KMeans(
        centres=jnp.where(jnp.isfinite(inertia), centres, jnp.nan),
        assignments=assignments.astype(jnp.int32),
        inertia=inertia,
        iterations=iterations[best],
    )


def _inertia(points, mask, centres, assignments):
    """By differences: rounding in the expanded square would be relative to |x|^2.

    On CPUs a product with one-hot rows, which is exact, is twice as fast as a gather.
    """
    one_hot = (assignments[:, None] == jnp.arange(len(centres))[None]).astype(jnp.float32)
    own = jnp.matmul(one_hot, centres, precision="highest")
    return jnp.where(mask, jnp.square(points - own).sum(-1), 0).sum()


def _partial_distances(points, centres):
    """|c|^2 - 2 <x, c> for points [n, d] and centres [r, k, d]: [n, r, k].

    The squared distance but for |x|^2. With the points first: XLA's CPU backend multiplies the
    centres by the points nine times slower.
    """
    flat = centres.reshape(-1, centres.shape[-1])
    products = jnp.matmul(points, flat.T, precision="highest")
    distances = jnp.square(flat).sum(-1)[None] - 2 * products
    return distances.reshape(len(points), *centres.shape[:2])


def _seeded(key, points, mask, num_clusters, num_init):
    """Greedy k-means++: centres [num_init, k, d]; restart r draws from `fold_in(key, r)`."""
    trials = 2 + int(math.log(num_clusters))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_init))
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (num_clusters, trials)))(keys)
    norms = jnp.square(points).sum(-1)

    def distances(centres):
        squared = norms[:, None, None] + _partial_distances(points, centres)
        return jnp.where(mask[:, None, None], jnp.clip(squared, 0), 0)

    def add(j, state):
        centres, closest = state
        candidates = points[_drawn(closest, mask, uniform[:, j])]  # [r, trials, d]
        reached = jnp.minimum(closest[:, :, None], distances(candidates))
        best = reached.sum(0).argmin(-1)[:, None]
        chosen = jnp.take_along_axis(candidates, best[:, :, None], 1)
        closest = jnp.take_along_axis(reached, best[None], 2)[:, :, 0]
        return centres.at[:, j].set(chosen[:, 0]), closest

    first = points[_drawn(jnp.zeros((len(points), num_init)), mask, uniform[:, 0, :1])]
    centres = jnp.repeat(first, num_clusters, axis=1)
    return lax.fori_loop(1, num_clusters, add, (centres, distances(first)[:, :, 0]))[0]


def _drawn(weights, mask, uniform):
    """Points [r, trials], drawn in proportion to weights [n, r] by `uniform` [r, trials].

    Where all weights are 0, any point that counts. Never one of weight 0: where rounding is not
    monotone, looking `uniform` up in the cumulative sum alone could hit such a point.
    """
    weights = jnp.where(weights.sum(0)[None] > 0, weights, mask[:, None])
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights, 0), 0)
    wanted = uniform * cumulative.max(0)[:, None]
    return (cumulative[:, :, None] > wanted[None]).argmax(0)


def _lloyd(points, mask, centres, max_iter):
    """Moves centres [r, k, d] until each restart r stops: centres, and the iterations [r]."""
    squares = jnp.where(mask, jnp.square(points).sum(-1), 0)
    tolerance = _TOLERANCE * squares.sum() / (mask.sum() * points.shape[1])

    def step(state):
        centres, before, iterations, moving = state
        labels, moved = _iteration(points, mask, centres)
        settled = ((labels == before) | ~mask[:, None]).all(0)
        settled |= jnp.square(moved - centres).sum((1, 2)) <= tolerance
        centres = jnp.where(moving[:, None, None], moved, centres)
        iterations += moving
        return centres, labels, iterations, moving & ~settled & (iterations < max_iter)

    number = len(centres)
    start = (
        centres,
        jnp.full((len(points), number), -1),
        jnp.zeros(number, jnp.int32),
        jnp.ones(number, bool),
    )
    centres, _, iterations, _ = lax.while_loop(lambda state: state[-1].any(), step, start)
    return centres, iterations


def _iteration(points, mask, centres):
    """The nearest of the centres [r, k, d] to each point [n, r], and the means of their points."""
    distances = _partial_distances(points, centres)
    nearest = distances.argmin(-1)
    members = _members(nearest, mask, centres.shape[1])

    def refilled():
        squared = jnp.square(points).sum(-1)[:, None] + distances.min(-1)
        squared = jnp.where(mask[:, None], squared, -jnp.inf)
        labels = jax.vmap(_refill, (1, 1, 0), 1)(nearest, squared, members.sum(0))
        return _members(labels, mask, centres.shape[1])

    members = lax.cond((members.sum(0) == 0).any(), refilled, lambda: members)
    sums = jnp.matmul(members.reshape(len(points), -1).T, points, precision="highest")
    sizes = members.sum(0)[:, :, None]
    # A cluster whose last point filled another one stays where it is.
    means = jnp.where(sizes > 0, sums.reshape(centres.shape) / jnp.maximum(sizes, 1), centres)
    return nearest, means


def _members(labels, mask, num_clusters):
    """One-hot clusters [n, r, k] of labels [n, r], zero where the mask is."""
    one_hot = labels[:, :, None] == jnp.arange(num_clusters)[None, None]
    return (one_hot & mask[:, None, None]).astype(jnp.float32)


def _refill(labels, distances, sizes):
    """Labels [n] that give each empty cluster one of the points farthest from their centres."""
    empty = sizes == 0
    _, farthest = lax.top_k(distances, len(sizes))
    taken = jnp.where(empty, farthest[jnp.cumsum(empty) - 1], len(labels))  # the length: dropped
    return labels.at[taken].set(jnp.arange(len(sizes)), mode="drop")
