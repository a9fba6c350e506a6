"""Distances of vectors along the last axis, with finite gradients where they vanish."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def directions(vectors: jax.Array) -> jax.Array:
    """The vectors along the last axis divided by their L2 norms; themselves where they are 0."""
    largest = jax.lax.stop_gradient(jnp.abs(vectors).max(axis=-1, keepdims=True))
    # Of shares of the largest entry, as squares overflow and vanish. They keep the gradient.
    shares = vectors / jnp.where(largest > 0, largest, 1.0)
    length = norm(shares)[..., None]
    return shares / jnp.where(length > 0, length, 1.0)


def norm(values: jax.Array) -> jax.Array:
    """The L2 norm along the last axis, with gradient 0 at 0."""
    square = jnp.square(values).sum(axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    return 1 - (directions(a) * directions(b)).sum(axis=-1)


def _l8(a: jax.Array, b: jax.Array) -> jax.Array:
    """The L8 norm of a - b, with gradient 0 at 0."""
    size = jnp.abs(a - b)
    largest = jax.lax.stop_gradient(size.max(axis=-1, keepdims=True))
    # Of shares of the largest, as eighth powers overflow.
    shares = size / jnp.where(largest > 0, largest, 1.0)
    total = jnp.square(jnp.square(jnp.square(shares))).sum(axis=-1)
    return largest[..., 0] * jnp.where(total > 0, total, 1.0) ** 0.125


#: (a, b) -> distance, broadcasting; "cosine" is 1 - cos, 1 where a vector is zero.
DISTANCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "l2": lambda a, b: norm(a - b),
    "squared_l2": lambda a, b: jnp.square(a - b).sum(axis=-1),
    "l8": _l8,
    "linf": lambda a, b: jnp.abs(a - b).max(axis=-1),
    "cosine": _cosine,
}
