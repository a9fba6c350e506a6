"""Radii and boxes within which no perturbation changes the class that clusters give."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jaxclus import _checks, _compile
from jaxclus.clustr._classifier import ClusterClassifier

# Halvings of the search for the soft radius, down to what float32 tells apart.
_HALVINGS = 30
# Of a sum of squared distances, in float32: what its rounding can be.
_ROUNDING = 1e-6


def certified_radius(
    head: ClusterClassifier,
    embeddings: ArrayLike,
    lipschitz: float | jax.Array,
    rule: Literal["soft", "hard"] = "soft",
) -> Float[Array, " b"]:
    """The radius around each image within which its predicted class cannot change.

    Let |h(x + d) - h(x)|_2 <= Lip |d|_p for all d. With u_j = -|h - mu_j|^2 / (2 sigma^2),

    "hard", the class y of the nearest centre: a centre l of another class wins only where it is
    nearer than every centre k of y, so beyond each of the planes half-way between them,

        radius = min_l max_{k of y} sigma^2 (u_k - u_l) / (Lip |mu_k - mu_l|).

    With one cluster for each class no larger radius holds for Lip times an isometry and p = 2. (The
    usual statement has the nearest centre for k, which can give less.)

    "soft", the argmax of G_c = logsumexp_{j of c} u_j. A move of the embedding by t changes each
    u_k - u_l by at most t |mu_k - mu_l| / sigma^2. Hence, y the predicted class,

        G_y - G_c >= F_c(t) = -logsumexp_{l of c} -logsumexp_{k of y}(u_k - u_l
                                                                   - t |mu_k - mu_l| / sigma^2),

    and the radius is min_c t_c / Lip with F_c(t_c) = 0. F_c is exact at t = 0 and falls; with one
    cluster for each class this is the hard rule. It is never less than
    min_c sigma^2 (G_y - G_c) / (Lip max_{k,l} |mu_k - mu_l|), as F_c falls no faster than that.

    Differences of squared distances are lowered by 1e-6 of their sum and of twice the squared
    distance from the centres' mean, for rounding in float32, also the head's; the embeddings count
    as exact. Ties and centres that two classes share leave the radius 0.

    Args:
        head: the classifier.
        embeddings: h(x), float32 [b, d].
        lipschitz: Lip, above 0: an upper bound as `jc.models.lipschitz_bound` gives for p = 2. For
            Linf balls multiply it by the square root of the number of pixels times channels.
        rule: which classifier's prediction is certified: "soft", the head's logits; "hard", the
            nearest centre.

    Returns:
        Radii [b], at least 0, in the norm of `lipschitz`, on the pixel scale. A head of one class
        has the radius infinity.

    Raises:
        ValueError, TypeError: a shape is another one, `lipschitz` is not above 0, or the rule is
            not known.

    Derived here. Alfarra et al., arXiv:2006.07682, state that a certificate exists; their code
    computes none.
    """
    _checks.one_of("rule", rule, ("soft", "hard"))
    _checks.positive("lipschitz", lipschitz)
    return _radius(head, head.checked(embeddings), rule=rule) / lipschitz


@functools.partial(_compile.jit, static_argnames=("rule",))
def _radius(head: ClusterClassifier, embeddings: jax.Array, *, rule: str) -> jax.Array:
    """The radius among embeddings [b]."""
    # By differences, and not by a product: these must not cancel.
    distances = jnp.square(embeddings[:, None] - head.centres[None]).sum(axis=2)
    gaps = jnp.sqrt(jnp.square(head.centres[:, None] - head.centres[None]).sum(axis=2))
    classes = jnp.array(head.centre_classes)
    hard = rule == "hard"
    predicted = classes[distances.argmin(axis=1)] if hard else head(embeddings).argmax(axis=1)
    members, present = (jnp.asarray(part)[predicted] for part in head.members)
    sizes = distances + _from_origin(head, embeddings)
    leads, apart = _half_leads(distances, members, sizes), gaps[members]
    if hard:
        radii = jnp.where(present[..., None], _ratio(leads, apart), 0).max(axis=1)
        return jnp.where(classes[None] == predicted[:, None], jnp.inf, radii).min(axis=1)

    def log_lead(t: jax.Array) -> jax.Array:
        """F_c for moves t [b, k] of the embedding."""
        return _log_leads(head, leads - t[:, None, classes] * apart, present)

    def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        holds = log_lead(middle) > 0
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    # F_c falls by at least the least distance of two centres for each unit of t.
    low = jnp.zeros((len(embeddings), head.num_classes))
    closest = _least_of_classes(_least_of_classes(gaps, head).T, head)[predicted]
    high = _ratio(jnp.maximum(log_lead(low), 0) * head.variance, closest)
    low, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    rival = jnp.arange(head.num_classes)[None] != predicted[:, None]
    return jnp.where(rival, low, jnp.inf).min(axis=1)


def certified_margin(
    head: ClusterClassifier, embeddings: ArrayLike, low: ArrayLike, high: ArrayLike
) -> Float[Array, " b"]:
    """How far the predicted class leads at least, wherever in its box the embedding is.

    With u_j = -|h - mu_j|^2 / (2 sigma^2), u_k - u_l is linear in h, so that its minimum over the
    box low <= h <= high, of centre m and radius r, is exact:

        L_kl = u_k(m) - u_l(m) - r . |mu_k - mu_l| / sigma^2   (sizes entry by entry).

    Hence, y = argmax_c G_c the class at the embedding itself,

        min_h G_y - G_c >= -logsumexp_{l of c} -logsumexp_{k of y} L_kl,

    and the margin is the least of these among the other classes c: where it is above 0, the class
    holds in the whole box. It is exact for two clusters, and where the box is a point; else the
    corners at which the L_kl are reached need not be the same one.

    Differences of squared distances are lowered as there, by the largest of each in the box; the
    box counts as exact.

    Args:
        head: the classifier.
        embeddings: h(x), float32 [b, d], whose class is asked about.
        low, high: float32 [b, d], low <= high: ends of the boxes, as `jc.models.interval_bounds`
            gives.

    Returns:
        Margins [b] of the logits G. A head of one class has the margin infinity.

    Raises:
        ValueError, TypeError: a shape is another one, values are not finite, or `low` is above
            `high`.

    Derived here, with the inequality of `certified_radius`.
    """
    return _margin(head, *_checks.boxes(head, embeddings, low, high))


@_compile.jit
def _margin(
    head: ClusterClassifier, embeddings: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """The margin in boxes [b]."""
    predicted = head(embeddings).argmax(axis=1)
    members, present = (jnp.asarray(part)[predicted] for part in head.members)
    centre = (low + high) / 2
    # With what the centre was rounded by.
    radius = (high - low) / 2 + 2.0**-23 * jnp.maximum(jnp.abs(low), jnp.abs(high))
    offsets = jnp.abs(centre[:, None] - head.centres[None])
    distances = jnp.square(offsets).sum(axis=2)
    furthest = jnp.square(offsets + radius[:, None]).sum(axis=2)
    own = head.centres[members]

    def spread(rival: jax.Array) -> jax.Array:
        """r . |mu_k - mu_l| for the centre l [d], and all k of the predicted class [b, K]."""
        return (radius[:, None] * jnp.abs(own - rival[None, None])).sum(axis=2)

    # One centre after the other: [b, K, m, d] could take gigabytes.
    spreads = jnp.moveaxis(jax.lax.map(spread, head.centres), 0, 2)
    sizes = furthest + _from_origin(head, centre, radius)
    leads = _half_leads(distances, members, sizes) - spreads
    rival = jnp.arange(head.num_classes)[None] != predicted[:, None]
    return jnp.where(rival, _log_leads(head, leads, present), jnp.inf).min(axis=1)


def _from_origin(
    head: ClusterClassifier, embeddings: jax.Array, radius: jax.Array | float = 0.0
) -> jax.Array:
    """The largest squared distance from the centres' mean [b, 1] in boxes of that radius.

    The head multiplies from there, so its own rounding is relative to these.
    """
    offsets = jnp.abs(embeddings - head.centres.mean(axis=0, keepdims=True)) + radius
    return jnp.square(offsets).sum(axis=1, keepdims=True)


def _half_leads(distances: jax.Array, own: jax.Array, sizes: jax.Array) -> jax.Array:
    """(D_j - D_k) / 2 [b, K, m], k the centres `own` [b, K], lowered by the rounding at `sizes`.

    Both `distances` and `sizes`, the largest ones of interest, are [b, m].
    """

    def pairs(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return values[:, None], jnp.take_along_axis(values, own, axis=1)[..., None]

    (others, mine), (other_sizes, own_sizes) = pairs(distances), pairs(sizes)
    return (others - mine - _ROUNDING * (other_sizes + own_sizes)) / 2


def _log_leads(head: ClusterClassifier, leads: jax.Array, present: jax.Array) -> jax.Array:
    """-logsumexp_{l of c} -logsumexp_k of leads / sigma^2 for each class c, [b, K, m] -> [b, k].

    Of the centres k [b, K] those count that are `present`.
    """
    counted = jnp.where(present[..., None], leads / head.variance, -jnp.inf)
    return -head.log_sums(-jax.nn.logsumexp(counted, axis=1))


def _ratio(value: jax.Array, by: jax.Array) -> jax.Array:
    """value / by, at least 0; 0 where `by` is, as where centres of two classes coincide."""
    return jnp.where(by > 0, jnp.maximum(value, 0) / jnp.where(by > 0, by, 1), 0)


def _least_of_classes(values: jax.Array, head: ClusterClassifier) -> jax.Array:
    """The least of the rows of each class's centres: [m, ...] -> [k, ...]."""
    return jax.ops.segment_min(values, jnp.array(head.centre_classes), head.num_classes)
