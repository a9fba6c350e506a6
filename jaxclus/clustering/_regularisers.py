"""Differentiable measures of how far the classes of a group go together."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxclus.clustering._score import group_ids, scored_ids


def within_group_spread(
    logits: Float[Array, "b k"], groups: Sequence[Any] | ArrayLike
) -> Float[Array, " b"]:
    """sum_g sum_{c in g} (z_bc - zbar_bg)^2 for each image, zbar_bg the mean of z_bc over c in g.

    Args:
        logits: z, floating point [b, k].
        groups: the group id of each class [k], or a partition of the classes with names.

    Returns:
        Spreads [b], at least 0; a class alone in its group adds nothing.

    Raises:
        TypeError, ValueError: `groups` are no such groups of k classes.

    Bai et al., NeurIPS 2021, arXiv:2111.12922: the sum in the published regularisers.
    """
    ids = group_ids(groups, logits.shape[-1])
    same = ids[:, None] == ids[None, :]
    means = jnp.asarray(same / same.sum(axis=1), logits.dtype)  # symmetric: z -> zbar, per class
    deviation = logits - jnp.matmul(logits, means, precision="highest")
    return jnp.square(deviation).sum(axis=-1)


def within_minus_between(
    C: Float[Array, "k k"], groups: Sequence[Any] | ArrayLike
) -> Float[Array, ""]:
    """Mean of C over pairs of classes within groups, minus its mean over pairs between groups.

    The `difference` of `clustering_score`, as a JAX function of C.

    Args:
        C: a symmetric matrix [k, k]; the diagonal plays no part.
        groups: the group id of each class [k], or a partition of the classes with names; at least
            two groups, one of them with at least two classes.

    Returns:
        The difference, a scalar; in [-2, 2] for correlations.

    Raises:
        TypeError, ValueError: `groups` are no such groups of k classes.
    """
    ids = scored_ids(groups, C.shape[-1])
    pairs = np.triu(np.ones(C.shape, bool), k=1)
    within = pairs & (ids[:, None] == ids[None, :])
    between = pairs & ~within
    weights = within / within.sum() - between / between.sum()
    return jnp.sum(C * jnp.asarray(weights, C.dtype))
