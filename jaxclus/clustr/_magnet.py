"""The Magnet loss: embeddings of a class gather around its clusters, away from other classes'."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxclus import _checks

# Added to denominator and ratio in the published code; it caps the loss at -log(1e-8) = 18.42.
_LOG_FLOOR = math.log(1e-8)


def magnet_loss(
    embeddings: ArrayLike,
    cluster_ids: ArrayLike,
    class_ids: ArrayLike,
    alpha: float | jax.Array = 12.5,
) -> Float[Array, " b"]:
    """The Magnet loss of a batch of clusters, for each example.

    With mu_j the mean embedding of the batch's cluster j, D_nj = |r_n - mu_j|^2, and
    sigma^2 = sum_n D_n,own / (b - 1),

        loss_n = relu(-log( exp(-D_n,own / (2 sigma^2) - alpha)
                            / (sum_j exp(-D_nj / (2 sigma^2)) + 1e-8) + 1e-8 )),

    where j runs over the batch's clusters of other classes. It is computed with logarithms: exact
    where the exponentials underflow, and with finite gradients at distance 0. The two 1e-8 are the
    published code's; they hold the loss below 18.42, near which its gradient vanishes. Means and
    variance are differentiated through, so that every loss depends on the whole batch. Examples of
    a cluster need not be neighbours, as the published code takes for granted. Where all examples
    are at their means, sigma^2 counts as the mean square of the entries of r - mean r, or as 1
    where that is 0 too.

    Args:
        embeddings: r, floating point [b, d], b at least 2.
        cluster_ids: integers [b], at least 0; equal where examples share a cluster.
        class_ids: integers [b], at least 0; all examples of a cluster must have the same.
        alpha: the margin, at least 0.

    Returns:
        The losses [b], in [0, 18.42]. Under tracing values cannot be checked: there embeddings that
        are not finite give NaN, and a cluster of two classes is also a rival of its own examples.

    Raises:
        ValueError, TypeError: a shape is another one, embeddings are not finite, a cluster has
            examples of two classes, or `alpha` is below 0.

    Rippel et al., "Metric Learning with Adaptive Density Discrimination", ICLR 2016,
    arXiv:1511.05939, equation 5, as in the code of Alfarra et al., "ClusTR: Clustering Training for
    Robustness", arXiv:2006.07682.
    """
    embeddings = _checks.vectors("embeddings", embeddings, at_least=2)
    count = len(embeddings)
    cluster_ids = _checks.integers("cluster_ids", cluster_ids, count)
    class_ids = _checks.integers("class_ids", class_ids, count)
    _checks.not_negative("alpha", alpha)
    same = cluster_ids[:, None] == cluster_ids[None]
    other = class_ids[:, None] != class_ids[None]
    if _checks.is_concrete(same, other) and (same & other).any():
        raise ValueError("`class_ids` must be one for each cluster, but a cluster has two")
    # The loss has no scale, but the derivative of 1 / sigma^2 overflows at small ones.
    centred = embeddings - embeddings.mean(axis=0, keepdims=True)
    scale = jax.lax.stop_gradient(jnp.sqrt(jnp.square(centred / _largest(centred)).mean()))
    embeddings = centred / (_largest(centred) * jnp.where(scale > 0, scale, 1))
    sizes = same.sum(axis=1, dtype=jnp.float32)
    # Each example's own mean; a cluster appears once for each of its members.
    means = jnp.matmul(same.astype(embeddings.dtype), embeddings, precision="highest")
    means = means / sizes[:, None]
    own = jnp.square(embeddings - means).sum(axis=1)
    variance = own.sum() / (count - 1)
    scale = -0.5 / jnp.where(variance > 0, variance, 1)
    exponents = jnp.where(other, scale * squared_distances(embeddings, means), -jnp.inf)
    denominator = jax.nn.logsumexp(exponents - jnp.log(sizes)[None], axis=1)
    return _capped(scale * own - alpha, denominator)


def full_magnet_loss(
    embeddings: ArrayLike,
    labels: ArrayLike,
    centres: ArrayLike,
    centre_classes: ArrayLike | Sequence[int],
    alpha: float | jax.Array = 12.5,
    *,
    as_published: bool = False,
) -> Float[Array, " n"]:
    """The Magnet loss of a whole set with given centres, for each example.

    As `magnet_loss`, but each example's own cluster is the nearest of its class, sigma^2 is
    `cluster_variance`, and the sum runs over all clusters of other classes.

    Args:
        embeddings: r, floating point [n, d], n at least 2.
        labels: the examples' classes, integers [n].
        centres: mu, floating point [m, d].
        centre_classes: the centres' classes, integers [m], as an array or as
            `ClusterClassifier.centre_classes`; each label must be among them.
        alpha: the margin, at least 0.
        as_published: with the published code's mistake: it multiplies the distances to clusters of
            the same class by 0 inside the exponential, so that each of them adds 1 to the sum.

    Returns:
        The losses [n], in [0, 18.42]. Under tracing values cannot be checked: there embeddings or
        centres that are not finite, or a label without centre, give NaN for all examples.

    Raises:
        ValueError, TypeError: as `cluster_variance`, or `alpha` is below 0.

    arXiv:1511.05939, equation 4; arXiv:2006.07682 (code).
    """
    _checks.not_negative("alpha", alpha)
    distances, is_own, own = _own_distances(embeddings, labels, centres, centre_classes)
    scale = -0.5 / _variance(own)
    # exp(0 D) = 1 for the clusters that should not count.
    exponents = jnp.where(is_own, 0.0 if as_published else -jnp.inf, scale * distances)
    return _capped(scale * own - alpha, jax.nn.logsumexp(exponents, axis=1))


def cluster_variance(
    embeddings: ArrayLike,
    labels: ArrayLike,
    centres: ArrayLike,
    centre_classes: ArrayLike | Sequence[int],
) -> Float[Array, ""]:
    """sigma^2 = sum_n min_k |r_n - mu_k|^2 / (n - 1), k over the clusters of example n's class.

    1 where it would be 0, all examples being at centres of their classes.

    Args:
        embeddings: r, floating point [n, d], n at least 2.
        labels: the examples' classes, integers [n].
        centres: mu, floating point [m, d].
        centre_classes: the centres' classes, integers [m], as an array or as
            `ClusterClassifier.centre_classes`; each label must be among them.

    Raises:
        ValueError, TypeError: a shape is another one, embeddings or centres are not finite, or a
            class has examples and no centre.

    arXiv:2006.07682 (code).
    """
    return _variance(_own_distances(embeddings, labels, centres, centre_classes)[2])


def squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x_i - y_j|^2 by one matrix product, at least 0.

    |x|^2 - 2 x y + |y|^2 cancels where both are far from the origin, so the mean of y is taken off
    first; what is left is an error of about 1e-7 times the squared distance from that mean.

    Args:
        x: floating point [n, d].
        y: floating point [m, d].
    """
    origin = jax.lax.stop_gradient(y.mean(axis=0, keepdims=True))
    x, y = x - origin, y - origin
    products = jnp.matmul(x, y.T, precision="highest")
    squares = jnp.square(x).sum(axis=1)[:, None] + jnp.square(y).sum(axis=1)[None]
    return jnp.maximum(squares - 2 * products, 0)


def _largest(values: jax.Array) -> jax.Array:
    """The largest size of the entries, 1 where all are 0; a constant to differentiation."""
    found = jax.lax.stop_gradient(jnp.abs(values).max())
    return jnp.where(found > 0, found, 1)


def _own_distances(
    embeddings: ArrayLike,
    labels: ArrayLike,
    centres: ArrayLike,
    centre_classes: ArrayLike | Sequence[int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Squared distances [n, m], whether a centre is of the example's class, the least of those."""
    embeddings = _checks.vectors("embeddings", embeddings, at_least=2)
    centres = _checks.vectors("centres", centres)
    if embeddings.shape[1] != centres.shape[1]:
        raise ValueError(
            f"`centres` must have the embeddings' size {embeddings.shape[1]}, "
            f"got {centres.shape[1]}"
        )
    labels = _checks.integers("labels", labels, len(embeddings))
    if isinstance(centre_classes, tuple | list):
        centre_classes = np.asarray(centre_classes)
    centre_classes = _checks.integers("centre_classes", centre_classes, len(centres))
    is_own = labels[:, None] == centre_classes[None]
    if _checks.is_concrete(is_own) and not is_own.any(axis=1).all():
        missing = sorted(set(labels.tolist()) - set(centre_classes.tolist()))
        raise ValueError(f"`centre_classes` must hold every label, but {missing} have no centre")
    distances = squared_distances(embeddings, centres)
    own = jnp.where(is_own, distances, jnp.inf).min(axis=1)
    return distances, is_own, jnp.where(is_own.any(axis=1), own, jnp.nan)


def _variance(own: jax.Array) -> jax.Array:
    found = own.sum() / (len(own) - 1)
    return jnp.where(found == 0, 1, found)  # and NaN stays NaN


def _capped(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """relu(-log(exp(numerator) / (exp(denominator) + 1e-8) + 1e-8))."""
    ratio = numerator - jnp.logaddexp(denominator, _LOG_FLOOR)
    return jax.nn.relu(-jnp.logaddexp(ratio, _LOG_FLOOR))
