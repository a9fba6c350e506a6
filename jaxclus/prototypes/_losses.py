"""Losses that pull embeddings to the prototypes of their classes."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxclus import _checks
from jaxclus._distances import DISTANCES

#: What `prototype_loss` measures.
PrototypeDistance = Literal["linf", "cosine", "cosine_squared", "l2"]


def prototype_loss(
    embeddings: ArrayLike, targets: ArrayLike, distance: PrototypeDistance = "linf"
) -> Float[Array, " b"]:
    """How far embeddings z are from the prototypes p of their classes, for each example:

    - "linf": max_j |z_j - p_j|, the published loss. Its gradient is that of one entry alone (of
      several equal ones, each has its share);
    - "cosine": 1 - <z, p> / (|z|_2 |p|_2), 1 where either is 0; its gradient at z = 0 is minus the
      direction of p;
    - "cosine_squared": the square of that;
    - "l2": |z - p|_2^2 / 2, for the centres of Max-Mahalanobis training.

    Args:
        embeddings: z, floating point [b, d].
        targets: p, floating point [b, d]: `prototypes[labels]`.
        distance: one of these names.

    Returns:
        The losses, float32 [b], at least 0; cosines are up to 2, their squares up to 4.

    Raises:
        ValueError, TypeError: a shape is another one, values are not finite, or the name is not
            known.

    Serban, Poll and Visser, "Deep Repulsive Prototypes for Adversarial Robustness",
    arXiv:2105.12427 (code; see `PrototypeTraining` for what differs); Pang et al., "Rethinking
    Softmax Cross-Entropy Loss for Adversarial Robustness", arXiv:1905.10626, for "l2".
    """
    z, p = (
        _checks.vectors(name, value).astype(jnp.float32)
        for name, value in (("embeddings", embeddings), ("targets", targets))
    )
    _checks.one_of("distance", distance, get_args(PrototypeDistance))
    if z.shape != p.shape:
        raise ValueError(f"`targets` must have the embeddings' shape {z.shape}, got {p.shape}")
    if distance == "l2":
        return DISTANCES["squared_l2"](z, p) / 2
    if distance == "cosine_squared":
        return jnp.square(DISTANCES["cosine"](z, p))
    return DISTANCES[distance](z, p)


def published_loss(z: jax.Array, p: jax.Array, distance: PrototypeDistance) -> jax.Array:
    """What the published code sums or averages: of each example [b], or of each entry [d].

    Its cosines are of the columns of the batch, so that every image's loss depends on the others;
    its Linf distance is that of z + 1e-6.
    """
    if distance in ("cosine", "cosine_squared"):
        return prototype_loss(z.T, p.T, distance)
    return prototype_loss(z + 1e-6 if distance == "linf" else z, p, distance)
