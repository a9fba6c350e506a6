"""Distances between the mean embeddings of classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxclus import _checks

PUBLISHED_COUNT = 128
"""Embeddings of each class that the published code averages: the first ones of the test set."""


def feature_distance(
    embeddings: ArrayLike,
    labels: ArrayLike,
    num_classes: int,
    *,
    as_published: bool = False,
) -> Float[Array, "k k"]:
    """Mean squared distance between the mean embeddings of each two classes.

    F_ij = mean over the d coordinates of (m_i - m_j)^2, with m_c the mean embedding of class c.

    Args:
        embeddings: outputs of the full (non-linear) network in eval mode on clean images [n, d],
            floating point, finite. The paper takes the logits, d = k.
        labels: class of each embedding [n], integers in [0, num_classes).
        num_classes: k, at least 2; static under `jit`.
        as_published: what the published code does: m_c averages only the first `PUBLISHED_COUNT`
            (128) embeddings of class c, in the order given, and each row of F is divided by its
            own maximum, so that F is not symmetric. (A row of zeros, all means equal, gives NaN.)

    Returns:
        F [k, k], float32, at least 0, with a diagonal of 0; symmetric unless as published. Under
        tracing of the labels a class with too few members gives NaN.

    Raises:
        TypeError: `embeddings` are not floating point or `labels` no integers.
        ValueError: shapes or labels do not fit, `embeddings` are not finite, or a class has no
            member (as published: fewer than 128).

    Bai et al., NeurIPS 2021, arXiv 2111.12922: the feature distance matrix.
    """
    _checks.at_least("num_classes", num_classes, 2)
    dtype = jnp.result_type(embeddings)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`embeddings` must be floating point, got dtype {dtype}")
    embeddings = jnp.asarray(embeddings, jnp.float32)
    if embeddings.ndim != 2 or not embeddings.shape[1]:
        raise ValueError(f"`embeddings` must have the shape [n, d], got {embeddings.shape}")
    if _checks.is_concrete(embeddings) and not np.isfinite(np.asarray(embeddings)).all():
        raise ValueError("`embeddings` must be finite, but hold NaN or infinity")
    labels = _checks.integers("labels", labels, embeddings.shape[0], num_classes)
    needed = PUBLISHED_COUNT if as_published else 1
    if _checks.is_concrete(labels):
        counts = np.bincount(np.asarray(labels), minlength=num_classes)
        if counts.min() < needed:
            c = int(np.argmax(counts < needed))
            raise ValueError(
                f"`labels` must hold each class at least {needed} times, "
                f"got class {c} {counts[c]} times"
            )
    return _feature_distance(embeddings, labels, num_classes, as_published)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _feature_distance(embeddings, labels, num_classes, as_published):
    members = jax.nn.one_hot(labels, num_classes)  # [n, k]
    if as_published:
        members = members * (jnp.cumsum(members, axis=0) <= PUBLISHED_COUNT)
    counts = members.sum(axis=0)
    # Divided before the product: a division after it would be fused into the differences and
    # rounded differently on either side, so that F were not symmetric.
    weights = members / jnp.maximum(counts, 1)[None, :]
    means = jnp.matmul(weights.T, embeddings, precision="highest")
    distance = jnp.square(means[:, None] - means[None, :]).mean(axis=-1)
    enough = counts >= (PUBLISHED_COUNT if as_published else 1)
    distance = jnp.where(enough[:, None] & enough[None, :], distance, jnp.nan)
    return distance / distance.max(axis=1, keepdims=True) if as_published else distance
