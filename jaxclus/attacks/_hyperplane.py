"""Linearised decision boundaries, and projections onto them inside the pixel box.

What minimum-norm attacks by linearisation share (FAB, DeepFool).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxclus import compose, losses, threat
from jaxclus._classifier import Classifier
from jaxclus.attacks import _gradient
from jaxclus.attacks._base import Images

# Gradients of so many classes are taken in one pass; their activations are held at once.
_CLASSES_AT_ONCE = 10


class Boundary(NamedTuple):
    """The linearised boundary {z : gap + <normal, z - x> = 0} closest to each of b points x.

    Attributes:
        gap: z_t - z_y at the point, t the class on the other side [b].
        normal: gradient of the gap [b, h, w, c].
        loss: margin loss at the point [b].
        wrong: whether the point is misclassified [b].
    """

    gap: jax.Array
    normal: jax.Array
    loss: jax.Array
    wrong: jax.Array


def rivals(images: Images) -> Int[Array, "b others"]:
    """The classes other than each image's own by clean logit, highest first."""
    place = (images.ranking == images.y[:, None]).argmax(axis=1, keepdims=True)
    order = jnp.arange(images.ranking.shape[1] - 1)[None]
    return jnp.take_along_axis(images.ranking, order + (order >= place), axis=1)


def dual_norm(norm: str, w: jax.Array) -> Float[Array, " b"]:
    """The norm in which slopes [b, ...] are measured where points are in `norm`."""
    size = jnp.abs(w).reshape(w.shape[0], -1)
    if norm == "linf":
        return size.sum(axis=1)
    return jnp.sqrt((size**2).sum(axis=1)) if norm == "l2" else threat._largest(size)


def nearest_boundary(
    model: Classifier,
    keys: jax.Array,
    x: jax.Array,
    y: jax.Array,
    others: jax.Array,
    norm: str,
) -> Boundary:
    """The boundary between y and one of the other classes that is closest, in linear terms.

    argmin_t |z_t - z_y| / ||grad z_t - grad z_y||_dual, from one forward pass and one gradient per
    class; holds the gradients of all of them.

    Args:
        model: a classifier; an EOT wrapper's passes are averaged.
        keys: typed keys [b] for a stochastic one; unused otherwise.
        x: points [b, h, w, c].
        y: labels [b].
        others: the classes to look at, none of them y [b, m].
        norm: "linf", "l2" or "l1".
    """

    def one_pass(keys: jax.Array) -> tuple[jax.Array, ...]:
        logits, pull_back = jax.vjp(compose.with_keys(model, keys), x)

        def against(other: jax.Array) -> tuple[jax.Array, jax.Array]:
            gap, slopes = jax.vjp(lambda z: losses.logit_difference(z, y, other), logits)
            return gap, pull_back(*slopes(jnp.ones_like(gap)))[0]

        gaps, normals = lax.map(against, others.T, batch_size=_CLASSES_AT_ONCE)
        wrong = (jnp.argmax(logits, axis=-1) != y).astype(jnp.float32)
        return gaps, normals, losses.margin(logits, y), wrong

    gaps, normals, loss, wrong = _gradient.mean_over_passes(one_pass, model, keys)
    distance = jnp.abs(gaps) / (1e-12 + jax.vmap(lambda w: dual_norm(norm, w))(normals))
    closest = distance.argmin(axis=0)[None]
    gap = jnp.take_along_axis(gaps, closest, axis=0)[0]
    normal = jnp.take_along_axis(normals, closest[..., None, None, None], axis=0)[0]
    return Boundary(gap, normal, loss, wrong > 0.5)


def project(
    norm: str, t: Float[Array, "b n"], w: Float[Array, "b n"], excess: Float[Array, " b"]
) -> Float[Array, "b n"]:
    """The shortest step d that takes each point onto its hyperplane inside the box [0, 1]^n.

    min ||d|| such that <w, d> = -excess and 0 <= t + d <= 1; where no point of the box lies on the
    hyperplane, d goes to the corner closest to it. Each d_i has the sign that brings the hyperplane
    closer, and a size of at most the room r_i that the box leaves: min(m, r_i) for Linf,
    min(m |w_i|, r_i) for L2, with one multiplier m, and for L1 the coordinates of largest |w_i| use
    up their room. Coordinates with w_i = 0 stay.

    (The reference implementation of FAB also leaves out those with |w_i| < 1e-8, in L2 and L1;
    here the step depends on w's direction alone.)

    Args:
        norm: "linf", "l2" or "l1".
        t: points in the box.
        w: normals of the hyperplanes.
        excess: <w, t> - b for the hyperplane <w, z> = b; taken directly, since the difference of
            two products would lose its digits close to the hyperplane.

    Croce and Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack",
    ICML 2020, arXiv:1907.02044, equation (5) and supplement A.
    """
    largest = threat._largest(w)
    scale = jnp.where(largest > 0, largest, 1.0)
    slope, amount = jnp.abs(w) / scale[:, None], jnp.abs(excess) / scale
    rises = (w < 0) == (excess >= 0)[:, None]
    room = jnp.where(slope > 0, jnp.maximum(jnp.where(rises, 1 - t, t), 0.0), 0.0)
    if norm == "l1":
        size = _use_up(slope, room, amount)
    else:
        speed = slope if norm == "l2" else jnp.ones_like(slope)
        size = jnp.minimum(_multiplier(slope, speed, room, amount)[:, None] * speed, room)
    return jnp.where(rises, size, -size)


def _multiplier(
    slope: jax.Array, speed: jax.Array, room: jax.Array, amount: jax.Array
) -> Float[Array, " b"]:
    """The smallest m with sum_i slope_i min(m speed_i, room_i) = amount, or one that fills all.

    Newton's method on a concave, piecewise linear function, from the left: m can only grow, each
    round's m follows from the coordinates that are full at the last one, and it ends once they are
    the same. (Sorting the coordinates by when they fill takes a hundred times as long on a CPU.)
    """

    # Nobody differentiates an attack's steps, and forward mode lacks rules for such a reduction.
    slope, speed, room, amount = lax.stop_gradient((slope, speed, room, amount))

    def another_round(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        m, _ = carry
        full = m[:, None] * speed >= room
        # Both sums in one pass: the rounds are most of the projection's time.
        parts = jnp.where(full, slope * room, 0.0), jnp.where(full, 0.0, slope * speed)
        used, rate = lax.reduce(parts, (zero, zero), _add_pairs, (1,))
        left = amount - used
        grown = jnp.where(rate > 0, jnp.maximum(left / jnp.where(rate > 0, rate, 1.0), m), m)
        return grown, jnp.any(grown > m)

    zero = jnp.zeros((), slope.dtype)
    start = jnp.zeros_like(amount), jnp.array(True)
    return lax.while_loop(lambda carry: carry[1], another_round, start)[0]


def _add_pairs(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.add, one, other))


def _use_up(slope: jax.Array, room: jax.Array, amount: jax.Array) -> Float[Array, "b n"]:
    """Sizes with sum_i slope_i size_i = amount, full room for the largest slopes first.

    The slope at which `amount` is used up is bracketed by bisection to 2^-24 of the largest one,
    which is 1; coordinates inside the bracket fill by one fraction.
    """

    def used(above: jax.Array) -> jax.Array:
        return jnp.where(above, slope * room, 0.0).sum(axis=1)

    def halve(_, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = (low + high) / 2
        enough = used(slope > middle[:, None]) > amount
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    start = jnp.zeros_like(amount), jnp.ones_like(amount)
    low, high = lax.fori_loop(0, 24, halve, start)
    full = slope > high[:, None]
    last = (slope > low[:, None]) & ~full
    rest, shared = amount - used(full), used(last)
    fraction = jnp.clip(rest / jnp.where(shared > 0, shared, 1.0), min=0.0, max=1.0)
    return jnp.where(full, room, jnp.where(last, fraction[:, None] * room, 0.0))
