"""Radii and boxes within which no perturbation changes the class that prototypes give."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxclus import _checks, _compile, _linear_head, clustr
from jaxclus._distances import directions
from jaxclus.prototypes._head import PrototypeHead

# Of a distance in float32: what its rounding can be.
_ROUNDING = 1e-6


def certified_radius(
    head: PrototypeHead, embeddings: ArrayLike, lipschitz: float | jax.Array
) -> Float[Array, " b"]:
    """The radius around each image within which its predicted class cannot change.

    Let |h(x + d) - h(x)|_2 <= Lip |d|_p for all d, and y be the predicted class. By rule:

    - "l2": class l wins beyond the plane half-way between p_y and p_l,
      radius = min_l (|h - p_l|^2 - |h - p_y|^2) / (2 Lip |p_y - p_l|_2);
    - "inner_product": radius = min_l <h, p_y - p_l> / (Lip |p_y - p_l|_2);
    - "cosine": as inner products with the prototypes' directions p / |p|_2, 0 where h is 0;
    - "linf": |h - p_l|_inf moves by no more than |h| does in any norm,
      radius = min_l (|h - p_l|_inf - |h - p_y|_inf) / (2 Lip),
      which is at least (min_l |p_y - p_l|_inf / 2 - |h - p_y|_inf) / Lip.

    The first three are exact for Lip times an isometry and p = 2. Values are lowered by their
    rounding in float32, also the head's; the embeddings count as exact.

    Args:
        head: the classifier. Its temperature does not matter.
        embeddings: h(x), float32 [b, d].
        lipschitz: Lip, above 0: an upper bound as `jc.models.lipschitz_bound` gives for p = 2. For
            Linf balls multiply it by the square root of the number of pixels times channels.

    Returns:
        Radii [b], at least 0, in the norm of `lipschitz`, on the pixel scale.

    Raises:
        ValueError, TypeError: a shape is another one, or `lipschitz` is not above 0.

    Derived here, in the manner of Tsuzuku, Sato and Sugiyama, arXiv:1802.04034; arXiv:2105.12427
    has none.
    """
    _checks.positive("lipschitz", lipschitz)
    h = head.checked(embeddings)
    if head.rule == "l2":
        return clustr.certified_radius(_clusters(head), h, lipschitz, "hard")
    if head.rule == "linf":
        return jnp.maximum(_linf_leads(head, h, h, h), 0) / (2 * lipschitz)
    return _linear_head.radius(*_dense(head), h, head(h).argmax(axis=1), lipschitz)


def certified_margin(
    head: PrototypeHead, embeddings: ArrayLike, low: ArrayLike, high: ArrayLike
) -> Float[Array, " b"]:
    """A lower bound of the predicted class's lead, wherever in its box the embedding is.

    For low <= h <= high, of centre m and radius r, and y the class at the embedding itself:

    - "l2": of the differences of squared distances, halved, which are linear in h, the least;
    - "inner_product", "cosine": min_l <m, p_y - p_l> - <r, |p_y - p_l|>, of the prototypes or their
      directions;
    - "linf": the least |h - p_l|_inf of the box, less the largest |h - p_y|_inf.

    Exact for each l but for "linf". Where it is above 0, the class holds in the whole box.

    Args:
        head: the classifier. Its temperature does not matter.
        embeddings: h(x), float32 [b, d], whose class is asked about.
        low, high: float32 [b, d], low <= high: ends of the boxes, as `jc.models.interval_bounds`
            gives.

    Returns:
        Margins [b].

    Raises:
        ValueError, TypeError: a shape is another one, values are not finite, or `low` is above
            `high`.

    Derived here.
    """
    h, low, high = _checks.boxes(head, embeddings, low, high)
    if head.rule == "l2":
        return clustr.certified_margin(_clusters(head), h, low, high)
    if head.rule == "linf":
        return _linf_leads(head, h, low, high)
    return _linear_head.margin(*_dense(head), h, head(h).argmax(axis=1), low, high)


@_compile.jit
def _linf_leads(head: PrototypeHead, h: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """min_l of the least |h' - p_l|_inf in the box less the largest |h' - p_y|_inf [b]."""
    predicted = head(h).argmax(axis=1)
    centre = (low + high) / 2
    # With what the centre was rounded by.
    reach = (high - low) / 2 + 2.0**-23 * jnp.maximum(jnp.abs(low), jnp.abs(high))
    apart = jnp.abs(centre[:, None] - head.prototypes[None])
    nearest = jnp.maximum(apart - reach[:, None], 0).max(axis=2) * (1 - _ROUNDING)
    furthest = (apart + reach[:, None]).max(axis=2) * (1 + _ROUNDING)
    own = jnp.take_along_axis(furthest, predicted[:, None], axis=1)
    rival = jnp.arange(head.num_classes)[None] != predicted[:, None]
    return jnp.where(rival, nearest - own, jnp.inf).min(axis=1)


def _clusters(head: PrototypeHead) -> clustr.ClusterClassifier:
    """The head of the rule "l2" as one cluster for each class."""
    return clustr.ClusterClassifier(head.prototypes, tuple(range(head.num_classes)), 1.0)


def _dense(head: PrototypeHead) -> tuple[jax.Array, jax.Array]:
    """The head of the other rules as a dense layer: kernel [d, k] and bias [k]."""
    p = directions(head.prototypes) if head.rule == "cosine" else head.prototypes
    return p.T, jnp.zeros(head.num_classes)
